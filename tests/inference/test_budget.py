"""What comes out does not depend on how many rows the memory allows at once."""

from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.data.task import Example
from ship_ds.inference.bank import Bank
from ship_ds.inference.deduction import answer_bare, answer_latents, answer_stated
from ship_ds.inference.proposals import edits, likeliest_texts, sample_texts
from ship_ds.inference.scoring import Fit, _row_fits, fit_in_prompt, fit_of_latents
from ship_ds.model import budget
from ship_ds.model.batch import TokenBatch

TEXTS = ["add 3", "remove every 5", "take the first 2"]
EXAMPLES = [Example("1 2 3", "4 5"), Example("7", "7 8 9 1"), Example("4 4 4 4 4 1", "2")]
VIEWS = [EXAMPLES[:2], EXAMPLES[:1], EXAMPLES[1:]]


def _answers(ship: Ship, num_beams: int) -> Any:
    inputs = [["1 2", "3 4 5 6 7", "9"], ["3"], ["1 1 1", "2 2", "5 6 7 8"]]
    latent_TZ = ship.model.encode(TEXTS)
    return (
        answer_latents(ship.model, latent_TZ, TEXTS, inputs, 6, num_beams),
        answer_stated(ship.model, TEXTS, inputs, 6, num_beams),
        answer_bare(ship.model, inputs, 6),
    )


def _fits(ship: Ship) -> list[Fit]:
    latent_CZ, examples = ship.model.encode(TEXTS), [EXAMPLES] * 3
    return [
        fit_of_latents(ship.model, latent_CZ, TEXTS, examples),
        fit_in_prompt(ship.model, TEXTS, examples),
    ]


def _texts(ship: Ship) -> Any:
    model, latent_WZ = ship.model, ship.model.encode(TEXTS)
    bank = Bank.build(model, [f"add {number}" for number in range(9)])
    return (
        sample_texts(model, VIEWS, latent_WZ, 4, 1.0, [1, 2, 3], 8),
        likeliest_texts(model, VIEWS, None, 3, 8),
        edits(model, VIEWS, TEXTS, 3, latent_WZ),
        bank.shortlist_by_decoder(model, VIEWS, 4),
        model.decode(latent_WZ, 8),
    )


@pytest.mark.slow
@pytest.mark.parametrize("made", [lambda s: _answers(s, 1), lambda s: _answers(s, 3), _texts])
def test_tokens_are_the_same_one_row_at_a_time(
    ship: Ship, monkeypatch: pytest.MonkeyPatch, made: Callable[[Ship], Any]
) -> None:
    many = made(ship)
    monkeypatch.setattr(budget, "bytes_free", lambda device: 1)
    assert made(ship) == many


def test_encoding_tells_how_many_more_are_done(
    ship: Ship, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hundreds of known instructions take minutes, and are encoded at the first `deduce` of a
    run."""
    seconds = count(step=11)
    monkeypatch.setattr("ship_ds.monitor.progress.time.perf_counter", lambda: next(seconds))
    monkeypatch.setattr(budget, "bytes_free", lambda device: 1)
    counts: list[int] = []
    ship.model.posterior(TEXTS, counts.append)
    assert counts == [1] * len(TEXTS)
    Bank.build(ship.model, TEXTS)
    assert capsys.readouterr().err == "".join(
        f"ship-ds: encoding: {done} of 3 instructions, {11 * done} s\n" for done in (1, 2, 3)
    )


def test_losses_and_latents_are_the_same_one_row_at_a_time(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, latent_TZ = _fits(ship), ship.model.encode(TEXTS)
    monkeypatch.setattr(budget, "bytes_free", lambda device: 1)
    for fit, expected in zip(_fits(ship), many, strict=True):
        torch.testing.assert_close(fit.loss_CM, expected.loss_CM, rtol=1e-4, atol=1e-4)
        assert torch.equal(fit.right_CM, expected.right_CM) and expected.loss_CM.min() > 0
    torch.testing.assert_close(ship.model.encode(TEXTS), latent_TZ, rtol=1e-4, atol=1e-5)


def test_an_answer_that_another_end_ends_is_right() -> None:
    """Greedy decoding gives back any end of the base as `eos_id`; before the end it is wrong."""
    form: Any = SimpleNamespace(eos_id=1, other_ends=(7, 9))
    targets = [[4, 5, 1]] * 4
    batch = TokenBatch.build([[3]] * 4, targets, 0)
    chosen = torch.tensor([[4, 5, 1], [4, 5, 9], [4, 7, 1], [4, 5, 6]])
    logits_KV = torch.nn.functional.one_hot(chosen.flatten(), 10).float()
    assert batch.labels_K.tolist() == [one for row in targets for one in row]
    _, right_E = _row_fits(logits_KV, batch.labels_K, batch, form)
    assert right_E.tolist() == [True, True, False, False]
