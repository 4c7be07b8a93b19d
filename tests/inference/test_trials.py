"""The stages that a proposed instruction goes through."""

from typing import Any

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.data.task import Example
from ship_ds.inference import trials as stages
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.results import Candidate
from ship_ds.inference.scoring import Fit, fit_of_latents
from ship_ds.inference.search_state import Proposal, ScreeningScore, SearchState
from ship_ds.inference.trials import Trial, TrialTable
from ship_ds.model.batch import TokenBatch
from tests.export.models import make_ship


@pytest.fixture
def searches() -> list[SearchState]:
    pairs = [("1 2", "2"), ("3 4", "4"), ("5 6 7", "6 7")]
    examples = tuple(Example(x, y) for x, y in pairs)
    return [SearchState(examples), SearchState(examples[::-1])]


def test_a_text_is_tried_once_under_the_origin_that_came_first(
    ship: Ship, searches: list[SearchState]
) -> None:
    first, second = searches
    first.tested["add 1"] = Candidate("add 1", 0, 1.0, 0, 1.0, (0.0,), "known")
    proposals = [
        Proposal(second, "add 3", "beam"),
        Proposal(first, "add 3", "known"),
        Proposal(first, "add 1", "sampled"),
        Proposal(first, "", "sampled"),
        Proposal(first, "add 2", "sampled"),
        Proposal(first, "add 3", "beam"),
    ]
    trials = stages.unique_new_trials(ship.model, searches, proposals)
    assert [(trial.search, trial.text, trial.origin) for trial in trials] == [
        (first, "add 3", "known"),
        (first, "add 2", "sampled"),
        (second, "add 3", "beam"),
    ]
    encoded = ship.model.encode(["add 3", "add 2"])
    torch.testing.assert_close(trials[2].latent_Z, encoded[0])
    torch.testing.assert_close(trials[1].latent_Z, encoded[1])


def test_a_fused_text_is_read_once_by_all_stages_and_tasks(
    searches: list[SearchState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known one too, of which the latent says not all; what it answers stays."""
    parts = [{"kind": "lora", "rank": 2, "width": 8}, {"kind": "block_fusion"}]
    model, read = make_ship("embedded", kind="combination", parts=parts).model, []
    texts = ["add 3", "put 7 at the front", "reverse"]
    known_CZ = model.encode(texts)
    plain = fit_of_latents(model, known_CZ, texts, [searches[1].examples] * 3)

    def counted(self: Any, batch: TokenBatch, *given: Any, **options: Any) -> Any:
        read.extend(batch.lengths)
        return forward(self, batch, *given, **options)

    forward = type(model.encoder).forward
    monkeypatch.setattr(type(model.encoder), "forward", counted)
    proposals = [Proposal(search, text, "sampled") for search in searches for text in texts[:2]]
    proposals += [Proposal(search, texts[2], "known", known_CZ[2]) for search in searches]
    config = InductionConfig(ranks_in_prompt=False, num_screened=1)
    stages.test_proposals(model, searches, proposals, config)
    assert len(read) == 3
    for row, text in enumerate(texts):
        found = searches[1].tested[text]
        assert found.loss == pytest.approx(float(plain.loss_CM[row].mean()), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kinds", [["lora"], ["lora", "block_fusion"]])
def test_known_and_new_texts_are_tried_together_on_a_gpu(
    kinds: list[str], searches: list[SearchState]
) -> None:
    """Latents of a bank lie there, and so do those of texts that were just read."""
    numbers = {"lora": {"rank": 2, "width": 8}}
    parts = [{"kind": kind, **numbers.get(kind, {})} for kind in kinds]
    model = make_ship("embedded", kind="combination", parts=parts).model.to("cuda")
    known = Proposal(searches[1], "add 3", "known", model.encode(["add 3"])[0])
    proposals = [known, Proposal(searches[1], "reverse", "sampled")]
    config = InductionConfig(ranks_in_prompt=False, num_screened=1)
    stages.test_proposals(model, searches, proposals, config)
    assert set(searches[1].tested) == {"add 3", "reverse"}


def test_finalists_are_the_best_of_each_task(searches: list[SearchState]) -> None:
    """The second task's worst is better than the first one's best."""
    texts, scores = ["a", "b", "c"], [(0.0, 5.0), (-1.0, 9.0), (0.0, 4.0)]
    trials = [Trial(search, text, "known", torch.zeros(1)) for search in searches for text in texts]
    for search, bonus in zip(searches, (0.0, -10.0), strict=True):
        for text, (num_right, loss) in zip(texts, scores, strict=True):
            search.screened[text] = ScreeningScore(num_right + bonus, loss)
    fit = Fit(torch.arange(6.0)[:, None], torch.zeros(6, 1))
    table = stages.keep_finalists(TrialTable(tuple(trials), fit, fit), 2)
    assert [trial.text for trial in table.trials] == ["b", "c", "b", "c"]
    assert [trial.search for trial in table.trials] == [
        search for search in searches for _ in range(2)
    ]
    assert table.encoded.loss_CM[:, 0].tolist() == [1, 2, 4, 5], "rows stay with their trials"


def test_screening_and_the_rest_are_together_all_examples(
    ship: Ship, searches: list[SearchState]
) -> None:
    proposals = [Proposal(search, text, "known") for search in searches for text in ship.known[:4]]
    trials = stages.unique_new_trials(ship.model, searches, proposals)
    screened = stages.screen(ship.model, trials, 2)
    assert screened.encoded.loss_CM.shape == (8, 2)
    rest = stages.test_on_rest(ship.model, screened, 2)
    whole = TrialTable.measure(ship.model, trials, slice(None))
    torch.testing.assert_close(rest.encoded.loss_CM, whole.encoded.loss_CM, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        rest.in_prompt.loss_CM, whole.in_prompt.loss_CM, rtol=1e-3, atol=1e-3
    )
    assert stages.test_on_rest(ship.model, whole, 3) is whole
    assert set(searches[0].screened) == set(ship.known[:4])


def test_all_that_was_tried_is_remembered_and_the_finalists_are_candidates(
    ship: Ship, searches: list[SearchState]
) -> None:
    proposals = [Proposal(searches[0], text, "known") for text in ship.known[:6]]
    config = InductionConfig(num_screened=1, num_finalists=2)
    stages.test_proposals(ship.model, searches, proposals, config)
    assert len(searches[0].screened) == 6 and len(searches[0].tested) == 2
    assert not searches[1].screened and not searches[1].tested
    assert searches[0].parents(2) == sorted(
        searches[0].tested, key=lambda text: searches[0].screened[text]
    )
