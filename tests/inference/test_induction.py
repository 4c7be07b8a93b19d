"""Induction on behaviour that an adapter of the model itself made, so the right answer is known
exactly."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.data.task import Example, Reading
from ship_ds.errors import UserError
from ship_ds.inference.bank import BRIEF, THOROUGH, Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import answer_latents, answer_read
from ship_ds.inference.gradient import (
    NEUTRAL_INSTRUCTION,
    Schedule,
    descend_on_latent,
    instruction_span,
)
from ship_ds.inference.induction import _read_by_encoder, induce_many
from ship_ds.inference.proposals import (
    edits,
    latents_beside,
    sample_texts,
    splices,
    views,
)
from ship_ds.inference.reasoning import examples_alone, reason_many, with_examples
from ship_ds.inference.scoring import fit_in_prompt, fit_of_latents
from ship_ds.inference.search_state import SearchState
from ship_ds.model.drawing import draw_seed
from ship_ds.model.ship import ShipModel

pytestmark = pytest.mark.slow

QUICK = {
    "num_views": 2,
    "num_samples": 2,
    "num_beams": 2,
    "num_rounds": 1,
    "num_edits": 4,
    "refine_steps": 2,
    "steps": 4,
    "num_known": 8,
    "num_restarts": 2,
    "max_new_tokens": 8,
}


def behaviour(ship: Ship, instruction: str, inputs: list[str], count: int = 5) -> list[Example]:
    """Examples of what the instruction's adapter does."""
    answers = zip(inputs, ship.answer(instruction, inputs), strict=True)
    found = [Example(x, y) for x, y in answers if y is not None][:count]
    assert len(found) == count
    return found


def test_a_fit_is_the_greedy_answer_and_its_loss(ship: Ship, inputs: list[str]) -> None:
    own = behaviour(ship, "add 3", inputs)
    other = ship.answer("remove every 5", [e.input for e in own])
    assert any(example.target != answer for example, answer in zip(own, other, strict=True))
    texts = ["add 3", "remove every 5"]
    fit = fit_of_latents(ship.model, ship.model.encode(texts), texts, [own, own])
    assert fit.right_CM[0].all() and not fit.right_CM[1].all()
    assert fit.right_CM[1].tolist() == [
        example.target == answer for example, answer in zip(own, other, strict=True)
    ]
    logits, labels = ship.model.task_llm.score(
        ship.model.adapt(ship.model.encode(["add 3"])),
        ship.model.task_batch([own[2].input], [own[2].target], ["add 3"]),
        1,
    )
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert float(fit.loss_CM[0, 2]) == pytest.approx(float(expected), rel=1e-3)


def test_fit_in_prompt_is_the_bare_models_answer(ship: Ship, inputs: list[str]) -> None:
    said = "remove every 5"
    answers = ship.model.answer(None, inputs, 8, [said] * len(inputs))
    examples = [Example(x, y) for x, y in zip(inputs, answers, strict=True) if y is not None]
    assert fit_in_prompt(ship.model, [said], [examples]).right_CM.all()


def test_the_bank_finds_the_instruction_behind_the_behaviour(ship: Ship, inputs: list[str]) -> None:
    config = InductionConfig.model_validate(
        {**QUICK, "method": "bank", "num_known": 24, "num_finalists": 24}
    )
    said = ["add 3", "remove every 5", "take the first 2"]
    found = induce_many(
        ship.model, ship.bank, [behaviour(ship, text, inputs) for text in said], config
    )
    for text, induction in zip(said, found, strict=True):
        right = {c.instruction: c.num_right for c in induction.candidates}
        assert (
            right[text] == 5 == induction.num_right
            and list(right.values()).count(5) < len(right) / 2
        )
        assert {c.origin for c in induction.candidates} == {"known"}


def test_the_walk_over_the_bank_is_the_exhaustive_search_on_a_small_one(
    ship: Ship, inputs: list[str]
) -> None:
    tasks = [behaviour(ship, text, inputs, 1) for text in ("add 3", "remove every 5")]
    bank = ship.bank
    walked = bank.shortlist(ship.model, tasks, 5)
    texts = list(bank.instructions)
    for task, row in zip(tasks, walked, strict=True):
        losses = fit_of_latents(ship.model, bank.latent_CZ, texts, [task] * len(texts)).loss_CM[
            :, 0
        ]
        assert row == losses.topk(5, largest=False).indices.tolist()


def test_the_union_finds_an_instruction_that_follows_by_analogy_and_the_bank_does_not(
    ship: Ship, inputs: list[str]
) -> None:
    """By the walk, since fewer are handed on than there are; the untrained decoder writes nothing
    of the kind."""
    texts = [
        f"{start} {number}"
        for number in (1, 2, 3, 4, 5)
        for start in ("add", "remove every", "append")
    ]
    bank = Bank.build(ship.model, [text for text in texts if text != "remove every 4"])
    task = behaviour(ship, "remove every 4", inputs)
    settings = {**QUICK, "num_known": 6, "num_samples": 0, "num_finalists": 15, "num_rounds": 0}
    (union,), (known,), (without,) = (
        induce_many(ship.model, bank, [task], InductionConfig.model_validate(settings | changes))
        for changes in ({}, {"method": "bank"}, {"analogies": False})
    )
    assert {c.instruction: c.origin for c in union.candidates}[
        "remove every 4"
    ] == "analogy" and union.num_right == 5
    for other in (known, without):
        assert "remove every 4" not in {c.instruction for c in other.candidates}
    assert "analogy" not in {c.origin for c in without.candidates}


def test_a_thorough_walk_goes_by_more_examples(ship: Ship, inputs: list[str]) -> None:
    """Two adapters may explain the first example alike; what the walk returns is ordered by all
    that it tried."""
    task, bank = behaviour(ship, "put 7", inputs, 3), ship.bank
    losses_CM = fit_of_latents(
        ship.model, bank.latent_CZ, bank.instructions, [task] * len(bank)
    ).loss_CM
    for walk in (BRIEF, THOROUGH):
        found = bank.shortlist(ship.model, [task], 3, walk=walk)[0]
        losses_C = losses_CM[:, : walk.num_tried].sum(1)
        assert losses_C[found].tolist() == pytest.approx(
            losses_C.topk(3, largest=False).values.tolist(), rel=1e-4
        )
    by_one, by_two = (
        losses_CM[:, :count].sum(1).topk(3, largest=False).indices.tolist() for count in (1, 2)
    )
    assert by_one != by_two


def test_trying_all_known_misses_none_of_the_best_in_a_bank_too_large_to_walk_whole(
    ship: Ship, inputs: list[str]
) -> None:
    texts = [
        f"{start} {number}"
        for number in range(10)
        for start in ("add", "append", "put", "replace 3 by", "keep", "sort")
    ]
    bank = Bank.build(ship.model, texts)
    tasks = [behaviour(ship, text, inputs, 2) for text in ("put 7", "sort 0", "reverse the list")]
    found, walked = (
        bank.shortlist_of_all(ship.model, tasks, 4),
        bank.shortlist(ship.model, tasks, 4),
    )
    for task, row, others in zip(tasks, found, walked, strict=True):
        losses = fit_of_latents(ship.model, bank.latent_CZ, texts, [task[:1]] * len(texts)).loss_CM[
            :, 0
        ]
        assert losses[row].tolist() == pytest.approx(
            losses.topk(4, largest=False).values.tolist(), abs=1e-4
        )
        assert (losses[row] <= losses[others] + 1e-4).all(), "the walk cannot do better"


def test_the_decoders_shortlist_is_its_likelihood_order(ship: Ship, inputs: list[str]) -> None:
    """With a beam as wide as the bank the tree gives every instruction, ordered as whole texts
    are."""
    from ship_ds.inference.scoring import losses_by_example
    from ship_ds.model.batch import TokenBatch

    model, bank, shown = ship.model, ship.bank, behaviour(ship, "add 3", inputs, 2)
    found = bank.shortlist_by_decoder(model, [shown], len(bank))[0]
    prompts = model.decoder_prompts
    batch = TokenBatch.build(
        [prompts.decoder_prompt(shown)] * len(bank),
        [prompts.target(text) for text in bank.instructions],
        prompts.pad_id,
        model.config.decoder.num_soft_tokens,
    )
    with torch.no_grad():
        logits, labels = model.decoder.score(*latents_beside(model, len(bank), None), batch)
    losses = losses_by_example(logits, labels, batch, len(bank))[:, 0]
    assert sorted(found) == list(range(len(bank)))
    assert losses[found].diff().min() > -1e-3 and losses.max() - losses.min() > 0.1


@pytest.mark.parametrize("method", ["direct", "indirect", "propose", "union"])
def test_every_method_gives_tested_candidates_in_order(
    ship: Ship, inputs: list[str], method: str
) -> None:
    config = InductionConfig.model_validate({"method": method, **QUICK})
    found = induce_many(ship.model, ship.bank, [behaviour(ship, "add 3", inputs, 3)], config)[0]
    keys = [
        (-(c.num_right + c.num_right_in_prompt), c.loss + c.loss_in_prompt)
        for c in found.candidates
    ]
    assert keys == sorted(keys) and len({c.instruction for c in found.candidates}) == len(keys) > 0
    assert found.instruction == found.candidates[0].instruction and found.num_examples == 3
    assert {c.origin for c in found.candidates} <= {
        "known",
        "sampled",
        "beam",
        "refined",
        "edit",
        "splice",
        "neutral",
    }


@pytest.fixture
def reading(ship: Ship, monkeypatch: pytest.MonkeyPatch) -> ShipModel:
    """The model as if its encoder had been trained on examples alone, too."""
    model = ship.model
    encoder = model.config.encoder.model_copy(update={"max_examples": 2, "drop_instruction": 0.5})
    monkeypatch.setattr(model, "config", model.config.model_copy(update={"encoder": encoder}))
    return model


def test_what_the_encoder_makes_of_examples_is_proposed_with_its_neighbours(
    ship: Ship, reading: ShipModel, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many examples as it was trained to read, in `num_read` choices."""
    asked: list[tuple[Sequence[Sequence[Example]], torch.Tensor]] = []

    def writes(
        model: ShipModel, shown: Sequence[Sequence[Example]], latent_WZ: torch.Tensor, *rest: int
    ) -> list[list[str]]:
        asked.append((shown, latent_WZ))
        return [["add 5"] for _ in shown]

    monkeypatch.setattr("ship_ds.inference.induction.likeliest_texts", writes)
    shown = behaviour(ship, "add 3", inputs, 3)
    alone = {"method": "propose", "num_views": 1, "num_samples": 0, "num_read": 3, "num_rounds": 0}
    config = InductionConfig.model_validate({**QUICK, **alone})
    (found,) = induce_many(reading, ship.bank, [shown], config)
    assert ("add 5", "encoded") in {(c.instruction, c.origin) for c in found.candidates}
    (views_of, latent_WZ), _ = asked
    chosen = views(shown, 2, 3, draw_seed(0, repr(tuple(shown)), "views", "read"))
    expected = reading.encode([Reading(None, tuple(view)) for view in chosen])
    assert views_of == [(), (), ()] and torch.equal(latent_WZ, expected.cpu())
    assert len({tuple(row) for row in latent_WZ.tolist()}) == 3

    proposals = _read_by_encoder(
        reading,
        ship.bank,
        [SearchState(tuple(shown))],
        config.model_copy(update={"method": "union"}),
        0,
    )
    known = [proposal.text for proposal in proposals if proposal.origin == "known"]
    nearest = ship.bank.nearest(expected, config.num_beams)
    assert known == [ship.bank.instructions[c] for row in nearest for c in row]

    asked.clear()
    induce_many(reading, ship.bank, [shown], config.model_copy(update={"num_read": 0}))
    assert [latent for _, latent in asked] == [None]


def test_what_is_known_by_then_is_read_together(
    ship: Ship, reading: ShipModel, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The induced text beside the first examples, where the encoder was trained on both."""
    shown, texts = [behaviour(ship, t, inputs, 3) for t in ("add 3", "add 1")], ["add 5", "add 2"]
    both = [Reading(text, tuple(task[:2])) for text, task in zip(texts, shown, strict=True)]
    asked = [inputs[3:6]] * 2
    own = answer_latents(reading, reading.encode(both), texts, asked, 6, readings=both)
    without = answer_latents(reading, reading.encode(texts), texts, asked, 6)
    assert with_examples(reading, texts, shown) == both
    assert with_examples(reading, texts, [()] * 2) == texts
    assert examples_alone(reading, shown) == [Reading(None, one.examples) for one in both]
    assert answer_read(reading, both, texts, asked, 6) == own != without

    config = InductionConfig.model_validate({**QUICK, "num_rounds": 0})
    for most, expected in ((2, both), (0, texts)):
        encoder = reading.config.encoder.model_copy(update={"max_examples": most})
        changed = reading.config.model_copy(update={"encoder": encoder})
        monkeypatch.setattr(reading, "config", changed)
        for found, task, one in zip(
            reason_many(reading, ship.bank, shown, asked, config, 6), shown, expected, strict=True
        ):
            text = found.induction.instruction
            read = Reading(text, one.examples) if isinstance(one, Reading) else text
            latent_TZ = reading.encode([read])
            again = answer_latents(reading, latent_TZ, [text], asked[:1], 6, readings=[read])
            assert found.refined == again[0], task
            alone = [Reading(None, tuple(task[:2]))]
            read = answer_latents(
                reading, reading.encode(alone), [text], asked[:1], 6, readings=alone
            )
            assert found.read == (read[0] if most else None)


def test_a_direct_descent_starts_at_what_the_encoder_makes_of_the_examples(
    ship: Ship, reading: ShipModel, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[torch.Tensor] = []

    def spied(model: ShipModel, start_CZ: torch.Tensor, *rest: Any) -> Any:
        starts.append(start_CZ.clone())
        return descend_on_latent(model, start_CZ, *rest)

    monkeypatch.setattr("ship_ds.inference.descents.descend_on_latent", spied)
    config = InductionConfig.model_validate({**QUICK, "method": "direct", "num_rounds": 0})
    tasks = [behaviour(ship, text, inputs, 3) for text in ("add 3", "add 1")]
    for changes in ({}, {"num_read": 0}, {"starts_from_draw": True}):
        induce_many(reading, ship.bank, tasks, config.model_copy(update=changes))
    read, mean, draws = (torch.cat(starts[i : i + 1]) for i in range(3))
    seeds = [draw_seed(0, repr(tuple(task)), "views", "read") for task in tasks]
    chosen = [views(task, 2, 1, seed)[0] for task, seed in zip(tasks, seeds, strict=True)]
    expected = reading.encode([Reading(None, tuple(view)) for view in chosen])
    torch.testing.assert_close(read[[0, 2]], expected.cpu())
    assert torch.equal(mean[0], reading.prior.mean(1)[0]) and torch.equal(mean[1], read[1])
    assert not torch.equal(draws[0], read[0]) and not torch.equal(draws[0], mean[0])


def test_a_decoder_that_proposes_nothing_leaves_the_neutral_instruction(
    ship: Ship, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ship_ds.inference.induction._written_by_decoder",
        lambda model, searches, config, seed: [],
    )
    config = InductionConfig.model_validate({**QUICK, "method": "propose", "num_rounds": 0})
    found = induce_many(ship.model, ship.bank, [behaviour(ship, "add 3", inputs, 3)], config)[0]
    assert [c.origin for c in found.candidates] == ["neutral"]


def test_descent_lowers_the_loss_and_restarts_are_independent(
    ship: Ship, inputs: list[str]
) -> None:
    examples = behaviour(ship, "add 3", inputs)
    start = torch.zeros(2, ship.config.model.latent_size)
    start[1] = ship.model.encode(["remove every 5"])[0]
    before = fit_of_latents(ship.model, start, ["", ""], [examples] * 2).loss_CM.mean(1)
    both = descend_on_latent(
        ship.model, start, ["", ""], [examples] * 2, Schedule(8, 0.05, 0.0), hold_back=False
    )
    assert (both.loss_C < before).all()
    alone = descend_on_latent(
        ship.model, start[1:], [""], [examples], Schedule(8, 0.05, 0.0), hold_back=False
    )
    torch.testing.assert_close(alone.latent_CZ[0], both.latent_CZ[1], rtol=1e-3, atol=1e-4)


def test_the_prior_pulls_z_to_zero(ship: Ship, inputs: list[str]) -> None:
    examples, start = [behaviour(ship, "add 3", inputs)], ship.model.encode(["remove every 5"])
    norms = [
        float(
            descend_on_latent(
                ship.model, start, [""], examples, Schedule(5, 0.05, prior), hold_back=False
            ).latent_CZ.norm()
        )
        for prior in (0.0, 100.0)
    ]
    assert norms[1] < norms[0]


@pytest.mark.slow
def test_a_seed_repeats_an_induction_and_tasks_do_not_touch_each_other(
    ship: Ship, inputs: list[str]
) -> None:
    config = InductionConfig(method="propose", **QUICK)
    tasks = [behaviour(ship, text, inputs, 3) for text in ("add 3", "remove every 5")]
    state = torch.get_rng_state()
    both, again = (induce_many(ship.model, ship.bank, tasks, config, seed=4) for _ in range(2))
    alone = [induce_many(ship.model, ship.bank, [task], config, seed=4)[0] for task in tasks]
    assert both == again and torch.equal(torch.get_rng_state(), state)
    for own, beside in zip(alone, both, strict=True):
        assert [c.instruction for c in own.candidates] == [c.instruction for c in beside.candidates]


def test_tasks_may_have_different_numbers_of_examples(ship: Ship, inputs: list[str]) -> None:
    config = InductionConfig(method="bank", **QUICK)
    found = induce_many(
        ship.model, ship.bank, [behaviour(ship, "add 3", inputs, n) for n in (1, 4, 2)], config
    )
    assert [induction.num_examples for induction in found] == [1, 4, 2]


def test_views_show_every_subset_before_one_twice() -> None:
    examples = [Example(str(i), str(i)) for i in range(4)]
    drawn = views(examples, 2, 8, draw_seed(0))
    assert len({frozenset(view) for view in drawn[:6]}) == 6 and len(drawn) == 8
    assert views(examples[:1], 6, 2, 0) == [(examples[0],)] * 2


def test_edits_change_one_token(ship: Ship, inputs: list[str]) -> None:
    shown = behaviour(ship, "add 3", inputs, 2)
    found = edits(ship.model, [shown], ["remove every 5"], 6)[0]
    assert len(set(found)) == 6
    assert all(
        sum(a != b for a, b in zip(text.split(), "remove every 5".split(), strict=True)) == 1
        for text in found
    )


def test_splices_go_on_as_another_text_from_a_shared_token(ship: Ship) -> None:
    texts = ["add 3 then reverse the list", "remove every 5 then take the last 2", "sort numbers"]
    found = splices(ship.model, texts, 20, 12, excluded=())
    assert found[:2] == ["add 3 then take the last 2", "add 3 then reverse the last 2"]
    assert "remove every 5 then reverse the list" in found and len(set(found)) == len(found)
    assert not [text for text in found if "sort" in text]
    assert splices(ship.model, texts, 20, 12, excluded=found[:1]) == found[1:]
    assert splices(ship.model, texts[:1], 20, 12, excluded=()) == []
    assert splices(ship.model, texts, 20, 8, excluded=()) == [
        text for text in found if len(text.split()) < 8
    ]
    assert splices(ship.model, texts, 1, 12, excluded=()) == found[:1]


@pytest.mark.slow
def test_induction_splices_the_best_texts_unless_told_not_to(ship: Ship, inputs: list[str]) -> None:
    tasks = [
        behaviour(ship, text, inputs, 3) for text in ("add 3", "remove every 5", "take the first 2")
    ]
    config = {**QUICK, "method": "propose", "num_finalists": 80, "num_samples": 6}
    for num_splices in (0, 40):
        found = induce_many(
            ship.model,
            ship.bank,
            tasks,
            InductionConfig.model_validate({**config, "num_splices": num_splices}),
        )
        origins = {candidate.origin for induction in found for candidate in induction.candidates}
        assert ("splice" in origins) == (num_splices > 0)


def test_sampled_proposals_all_end(ship: Ship, inputs: list[str]) -> None:
    texts = sample_texts(ship.model, [behaviour(ship, "add 3", inputs, 2)], None, 8, 1.0, [7], 8)[0]
    assert len(texts) <= 8 and all(len(text.split()) < 8 for text in texts)


def test_the_neutral_instruction_is_all_that_indirect_moves(ship: Ship) -> None:
    prompt = ship.model.encoder_prompts.encoder_prompt(NEUTRAL_INSTRUCTION)
    place = instruction_span(ship.model, prompt)
    other = ship.model.encoder_prompts.encoder_prompt("add 3")
    after = len(prompt) - place.stop
    assert prompt[: place.start] == other[: place.start] and prompt[-after:] == other[-after:]
    assert place.stop - place.start == 8


def test_no_bank_and_no_examples_are_one_line(ship: Ship) -> None:
    config = InductionConfig(method="bank", **QUICK)
    with pytest.raises(UserError, match="knows no instructions"):
        induce_many(ship.model, Bank.build(ship.model, []), [[Example("1", "2")]], config)
    with pytest.raises(UserError, match="no examples"):
        induce_many(ship.model, ship.bank, [[]], config)


def test_no_text_is_encoded_twice(
    ship: Ship, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a known one nor what follows from them, whoever proposes it."""
    encoded: list[str] = []
    # What `posterior`, `read_once` and an adapter that fuses states read with.
    passes = type(ship.model)._encoder_batches

    def counted(model: ShipModel, texts: Sequence[str], **how: bool) -> Any:
        encoded.extend(texts)
        return passes(model, texts, **how)

    monkeypatch.setattr(type(ship.model), "_encoder_batches", counted)
    bank = Bank.build(ship.model, [text for text in ship.known if text != "remove every 4"])
    tasks = [behaviour(ship, text, inputs) for text in ("remove every 4", "add 3")]
    encoded.clear()
    for method in ("bank", "union"):
        config = InductionConfig.model_validate({**QUICK, "method": method})
        induce_many(ship.model, bank, tasks, config)
        assert bool(encoded) == (method == "union"), "the bank's latents are known"
    assert len(encoded) > 10 and len(encoded) == len(set(encoded))
