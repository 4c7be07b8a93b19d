"""ItD's deduced data, its prior, and group decoding against brute force."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.data.task import Splits
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.group_decoding import group_beams
from ship_ds.evaluation.baselines.itd import Itd
from tests.evaluation.baselines.test_frozen_base import awake_lora

pytestmark = pytest.mark.slow


def test_deduced_targets_are_the_bases_own(
    make: Callable[..., Any], ship: Ship, splits: Splits
) -> None:
    method = make(Itd)
    deduced, _ = method.deduce_data()
    said = {wording for task in splits.seen for wording in task.wordings}
    inputs = {e.input for task in splits.seen for e in task.train}
    proposed = method.propose()
    assert said < set(proposed) and len(set(proposed)) == len(proposed)
    assert {one.instruction for one in deduced} <= set(proposed) and len(deduced) > 20
    for one in deduced[:4]:
        example = one.examples[0]
        assert example.input in inputs
        assert ship.model.answer(None, [example.input], 8, [one.instruction]) == [example.target]


def test_base_that_ends_no_answer_votes_on_its_own_texts(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method = make(Itd)
    shown = [task.train[:2] for task in method.setting.splits.seen[:2]]
    untrained = method.induce(shown)
    monkeypatch.setattr(method.base, "generate", lambda prompts, length: [None] * len(prompts))
    method.prepare()
    assert "itd: the base ended no answer" in capsys.readouterr().err
    assert method.induce(shown) == untrained


def test_one_prompt_and_one_beam_are_greedy(ship: Ship) -> None:
    base = FrozenBase.of_run(ship)
    adapter = awake_lora(base, 1)()
    prompts = [base.prompts.task_prompt(x, "reverse the list") for x in ("3 9 5", "1 2 8 8", "4")]
    greedy = base.answer([prompts], lambda _: adapter)[0]
    num_tokens = base.config.evaluation.max_new_tokens
    beams = group_beams(base, adapter, [[prompt] for prompt in prompts], 1, num_tokens)
    assert [texts[0] for texts in beams] == greedy
    assert all(greedy)


def test_wide_beams_find_the_best_text_of_all_under_two_prompts(ship: Ship) -> None:
    """Texts of at most one token, all scored by hand; two tasks at once, each with prompts of
    unequal length."""
    base = FrozenBase.of_run(ship)
    adapter = awake_lora(base, 1)()
    words = [base.prompts.text([token]) for token in range(base.task_llm.lm.config.vocab_size)]  # type: ignore[union-attr]
    texts = sorted({word for word in words if len(base.prompts.target(word)) == 2} | {""})
    tasks = [
        [base.prompts.task_prompt(x, "give the smallest number") for x in row]
        for row in (("7 3", "9 3 5 5"), ("8", "2 6"))
    ]
    found = group_beams(base, adapter, tasks, 6, 2)
    for prompts, beams in zip(tasks, found, strict=True):
        scores = torch.stack(
            [base.log_likelihoods(adapter, [prompt] * len(texts), texts) for prompt in prompts]
        ).mean(0)
        assert beams[0] == texts[int(scores.argmax())]


def test_ranking_divides_by_the_prior(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two texts that the examples make equally likely, the one that is rarer without examples
    wins; with one, neither."""
    method = make(Itd)
    example = next(e for task in method.setting.splits.seen for e in task.train)
    monkeypatch.setattr(
        "ship_ds.evaluation.baselines.itd.group_beams", lambda *rest: [["common", "rare"]]
    )
    prior = {"common": -1.0, "rare": -3.0}

    def log_likelihoods(adapter: Any, prompts: Any, texts: list[str]) -> torch.Tensor:
        nothing = method.base.prompts.decoder_prompt(())
        given = {"common": -2.0, "rare": -2.5}
        return torch.tensor(
            [
                (prior if prompt == nothing else given)[text]
                for prompt, text in zip(prompts, texts, strict=True)
            ]
        )

    monkeypatch.setattr(method.base, "log_likelihoods", log_likelihoods)
    assert method.induce([[example, example]]) == ["rare"]  # -5 + 3 against -4 + 1
    assert method.induce([[example]]) == ["common"]
