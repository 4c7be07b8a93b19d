"""Methods beside SHIP's own row: published inductions, the ablation, LoRAs by gradient, sums,
weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.data.matching import exact_match
from ship_ds.data.rules import RulesConfig, build_world
from ship_ds.data.task import CutOff, Example, Reading, Splits
from ship_ds.evaluation.baselines.lora_per_task import LoraPerTask
from ship_ds.evaluation.baselines.oracles import OracleRecipe
from ship_ds.evaluation.budgets import Steps
from ship_ds.evaluation.cells import PROTOCOLS
from ship_ds.evaluation.harness import _changed
from ship_ds.evaluation.measure import measure
from ship_ds.evaluation.method import Setting
from ship_ds.evaluation.methods import METHODS, TRAINED_NAMES
from ship_ds.evaluation.methods.composing import AdapterSum
from ship_ds.evaluation.methods.controls import (
    BareBase,
    NeighbourInstruction,
    ShuffledInstruction,
)
from ship_ds.evaluation.methods.doubting import Doubting
from ship_ds.evaluation.methods.explaining import ExplainTrainedLora
from ship_ds.evaluation.methods.icl import InContextLearning
from ship_ds.evaluation.methods.nearest_known import NearestKnown
from ship_ds.evaluation.methods.prompting import Prompting
from ship_ds.evaluation.methods.published import ShipDirect, ShipIndirect
from ship_ds.evaluation.methods.retrieval import Retrieval, RetrievalRecipe
from ship_ds.evaluation.methods.rounds import ShipRounds
from ship_ds.evaluation.methods.searching import Searching, with_run_length
from ship_ds.evaluation.methods.ship import SearchWithoutDecoder, ShipMethod
from ship_ds.evaluation.methods.weights import ReadOwnAdapter, ReadTrainedLora
from ship_ds.evaluation.questions import ask
from ship_ds.inference import reasoning
from ship_ds.inference.bank import Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import answer_under
from ship_ds.inference.explaining import Threshold, noise_like
from ship_ds.inference.gradient import NEUTRAL_INSTRUCTION
from ship_ds.inference.induction import MOST_TRIED
from ship_ds.inference.lora_reader import LoraReader
from ship_ds.model.batch import TokenBatch
from tests.inference.conftest import bundle, ship

pytestmark = pytest.mark.slow

__all__ = ["bundle", "ship"]

Make = Callable[[Any], Any]
NEAREST = NearestKnown.recipe
"""As it is, before the fixtures shorten it."""
FEW = {
    "num_known": 3,
    "num_samples": 1,
    "num_beams": 1,
    "num_views": 1,
    "num_finalists": 2,
    "num_splices": 4,
    "num_parents": 3,
    "num_edits": 2,
    "num_rounds": 1,
    "steps": 2,
    "num_restarts": 1,
    "refine_steps": 1,
}


def _loss_a_token(ship: Ship, adapter: Any, prompt: Sequence[int], target: str) -> float:
    """By the whole model's logits, of one example alone."""
    end = ship.model.prompts.target(target)
    batch = TokenBatch.build([[*prompt, *end]], None, ship.model.prompts.pad_id)
    logits_1SV = ship.model.task_llm.language_model.logits(batch, adapter)
    states = logits_1SV[0, len(prompt) - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(states, torch.tensor(end)))


@torch.no_grad()
def test_the_loss_of_an_answer_is_the_cross_entropy_a_token(ship: Ship, splits: Splits) -> None:
    """Of tasks with more and with fewer inputs, and with none."""
    tasks = splits.seen[:3]
    setting = Setting(ship, splits, Path(), None, 0)
    wordings = [task.task.instruction for task in tasks]
    asked = [tasks[0].test[:2], (), (Example("1 2 3", "3"), *tasks[2].test[:2])]
    prompts = ship.model.prompts
    latent_TZ = ship.model.encode(wordings)
    by_hand: dict[type, Callable[[int, Example], float]] = {
        ShipMethod: lambda t, e: _loss_a_token(
            ship, ship.model.adapt(latent_TZ[[t]]), prompts.task_prompt(e.input), e.target
        ),
        BareBase: lambda t, e: _loss_a_token(ship, None, prompts.task_prompt(e.input), e.target),
        Prompting: lambda t, e: _loss_a_token(
            ship, None, prompts.task_prompt(e.input, wordings[t]), e.target
        ),
    }
    for method, loss in by_hand.items():
        found = method(setting).answer_losses(tasks, wordings, asked)
        assert [len(row) for row in found] == [2, 0, 3]
        expected = [loss(t, e) for t, row in enumerate(asked) for e in row]
        assert list(chain(*found)) == pytest.approx(expected, rel=1e-3)
    for control in (ShuffledInstruction(setting), NeighbourInstruction(setting)):
        others = control.others(tasks, wordings)
        assert all(other != own for other, own in zip(others, wordings, strict=True))
        losses = ShipMethod(setting).answer_losses(tasks, others, asked)
        assert control.answer_losses(tasks, wordings, asked) == losses


def test_a_neighbour_is_the_seen_task_with_the_nearest_latent(ship: Ship, splits: Splits) -> None:
    """Of an unseen task by its wording; of a seen one the nearest other, whatever its wording."""
    neighbours = NeighbourInstruction(Setting(ship, splits, Path(), None, 0))
    seen = [task.task.instruction for task in splits.seen]
    latent_CZ = ship.model.encode(seen)
    tasks = [splits.unseen[0], splits.unseen[1], splits.seen[2]]
    wordings = [task.task.instruction for task in tasks]
    for task, wording in zip(tasks, wordings, strict=True):
        distances = (ship.model.encode([wording]) - latent_CZ).square().sum(1).tolist()
        best = min(
            (far, text) for far, text in zip(distances, seen, strict=True) if text != wording
        )
        assert neighbours.others([task], [wording]) == [best[1]]
    # A task that is asked in another's wording: its own row alone is left out.
    assert neighbours.others([splits.seen[0]], [seen[5]]) == [seen[5]]
    # One that says what another says: neither is its neighbour.
    twin = replace(splits.seen[5], task=replace(splits.seen[5].task, id="twin"))
    assert neighbours.others([twin], [seen[5]]) == neighbours.others([splits.seen[5]], [seen[5]])
    assert neighbours.others([twin], [seen[5]]) != [seen[5]]


def test_the_loss_of_answers_is_a_metric_of_deduction(ship: Ship, splits: Splits) -> None:
    questions = [ask(task, 0, 0, 2) for task in splits.seen[:2]]
    method = ShipMethod(Setting(ship, splits, Path(), None, 0))
    outcome = measure(method, "deduction", questions)
    losses = method.answer_losses([], [q.wording for q in questions], [q.asked for q in questions])
    assert outcome.values("answer_loss") == losses and [len(row) for row in losses] == [2, 2]


def test_what_the_decoder_takes_from_a_latent_is_a_metric_of_reconstruction(
    ship: Ship, splits: Splits
) -> None:
    """The loss of each instruction beside its own latent, and how much less it is than beside
    another task's: nothing where the decoder's soft tokens are the same for all."""
    tasks = [*splits.seen[:2], splits.unseen[0]]
    questions = [ask(task, 0, 0) for task in tasks]
    wordings = [q.wording for q in questions]
    method = ShipMethod(Setting(ship, splits, Path(), None, 0))
    control = ShuffledInstruction(Setting(ship, splits, Path(), None, 0))
    outcome = measure(method, "reconstruction", questions)
    model = ship.model

    def by_hand(read: str, wording: str) -> float:
        prompts, end = model.decoder_prompts, model.decoder_prompts.target(wording)
        ids = [[*prompts.decoder_prompt(()), *end]]
        batch = TokenBatch.build(ids, None, prompts.pad_id, model.collator.num_soft_tokens)
        soft = model.decoder.soft_tokens(model.encode([read]))
        logits_1SV = model.decoder.language_model.logits(
            batch, model.decoder.own_adapter, soft=soft
        )
        states = logits_1SV[0, -len(end) - 1 : -1].float()
        return float(torch.nn.functional.cross_entropy(states, torch.tensor(end)))

    with torch.no_grad():
        own = [by_hand(wording, wording) for wording in wordings]
        others = control.others(tasks, wordings)
        gains = [by_hand(*pair) - loss for *pair, loss in zip(others, wordings, own, strict=True)]
    assert list(chain(*outcome.values("text_loss"))) == pytest.approx(own, rel=1e-4)
    assert list(chain(*outcome.values("latent_gain"))) == pytest.approx(gains, abs=1e-4)
    assert min(map(abs, gains)) > 0.05, "too small to tell from rounding"
    # In place and back: the fixture is the whole session's, and a module's parameter is no plain
    # attribute, which monkeypatch would put back.
    weight = model.decoder.from_latent[-1].weight.data
    kept = weight.clone()
    try:
        weight.zero_()
        deaf = measure(method, "reconstruction", questions)
    finally:
        weight.copy_(kept)
    assert list(chain(*deaf.values("latent_gain"))) == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(
    "method",
    [ShipMethod, Prompting, BareBase, ShuffledInstruction, Doubting, InContextLearning, ShipRounds],
)
def test_what_was_written_of_an_answer_that_did_not_end_is_scored(
    method: Any, ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two tokens, where no answer ends but an empty one and those of one token."""
    if method is ShipRounds:
        monkeypatch.setattr(method, "recipe", method.recipe.model_copy(update=FEW))
    evaluation = ship.config.evaluation.model_copy(update={"max_new_tokens": 2})
    config = ship.config.model_copy(update={"evaluation": evaluation})
    short = Ship(ship.model, config, digest=ship.digest)
    is_shown = method in (InContextLearning, ShipRounds)
    questions = [ask(task, 2 if is_shown else 0, 0, 3) for task in splits.seen[:4]]
    asked = method(Setting(short, splits, Path(), None, 0))
    outcome = measure(asked, "reasoning" if is_shown else "deduction", questions)
    said = [text for row in outcome.rows for text in row["said"]]
    cut_off = [text for text in said if isinstance(text, CutOff)]
    assert cut_off and None not in said
    assert sum(row.get("cut_off", 0) for row in outcome.rows) == len(cut_off)
    assert any(text.strip() for text in cut_off)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return build_world(RulesConfig(train_examples=6, test_examples=3, num_seen=12))


@pytest.fixture
def make(
    ship: Ship,
    splits: Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    """make(method), whose search takes few of everything."""

    def build(method: Any) -> Any:
        if hasattr(method, "recipe") and not issubclass(method, LoraPerTask):
            monkeypatch.setattr(method, "recipe", method.recipe.model_copy(update=FEW))
        return method(Setting(ship, splits, tmp_path, None, 0))

    return build


def test_texts_are_as_long_as_the_run_says_unless_a_length_was_set(ship: Ship) -> None:
    limit = ship.config.evaluation.max_instruction_tokens
    assert with_run_length(NEAREST, ship) == NEAREST.model_copy(update={"max_new_tokens": limit})
    changed: Any = _changed("nearest_known", ["max_new_tokens=5"])
    assert with_run_length(changed.recipe, ship).max_new_tokens == 5 != limit


@pytest.mark.parametrize("method", [ShipIndirect, ShipDirect, SearchWithoutDecoder])
def test_inductions_answer_with_a_text_and_inputs(
    method: type[Searching], make: Make, splits: Splits
) -> None:
    made, shown = make(method), [task.train[:3] for task in splits.unseen[:2]]
    texts = made.induce(shown)
    assert len(texts) == 2 and all(texts)
    assert [len(row) for row in made.reason(shown, [["1 2"], ["3 4", "5"]])] == [1, 2]


def test_ablation_never_asks_the_decoder(
    make: Make, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(SearchWithoutDecoder)
    for name in ("forward", "stream", "generate"):
        monkeypatch.setattr(
            made.ship.model.decoder, name, lambda *rest, **options: pytest.fail("it was asked")
        )
    (found,) = made._inductions([splits.unseen[0].train[:3]])
    assert {candidate.origin for candidate in found.candidates} <= {
        "known",
        "analogy",
        "splice",
        "asked",
    }


def test_nearest_known_tries_every_rule_of_the_quickstart(
    make: Make, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk in its place is a weaker control: it misses the task's own rule (docs/results.md)."""
    monkeypatch.setattr(Bank, "shortlist", lambda *rest: pytest.fail("it walks"))
    made, own = make(NearestKnown), splits.seen[0]
    (found,) = made._inductions([own.train[:3]])
    best = max(c.num_right for c in found.candidates)
    assert found.candidates[0].num_right == best and found.instruction in made.bank.instructions
    assert len(build_world(RulesConfig(more_compositions=4)).seen) <= MOST_TRIED
    assert (NEAREST.num_known, NEAREST.num_finalists) == (48, 48)


def test_retrieval_answers_by_the_text_and_the_examples(
    make: Make, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run whose encoder reads both; SHIP does likewise, and its controls do not."""
    found, own = make(Retrieval), splits.seen[0]
    shown, inputs = [own.train[:3]], [["4 2 7", "9 1"]]
    assert found.induce(shown) == [own.task.instruction]
    assert found.induce([[Example("zebra", "zebra")]]) == [NEUTRAL_INSTRUCTION]

    model = found.ship.model
    encoder = model.config.encoder.model_copy(update={"max_examples": 2, "drop_instruction": 0.5})
    monkeypatch.setattr(model, "config", model.config.model_copy(update={"encoder": encoder}))

    read: list[Any] = []

    def spied(
        _: Any, readings: Sequence[Any], texts: Sequence[str], *rest: Any, **more: Any
    ) -> Any:
        read.append((*readings, *texts))
        return [["1", "2"]]

    monkeypatch.setattr("ship_ds.evaluation.methods.retrieval.answer_read", spied)
    monkeypatch.setattr("ship_ds.evaluation.methods.searching.answer_read", spied)
    text = own.task.instruction
    assert found.reason(shown, inputs) == [["1", "2"]]
    without = type("Other", (Retrieval,), {"recipe": RetrievalRecipe(reads_examples=False)})
    make(without).reason(shown, inputs)
    assert read == [(Reading(text, own.train[:2]), text), (text, text)]
    assert without.settings() != Retrieval.settings()

    for method in (ShipMethod, SearchWithoutDecoder, NearestKnown, ShipDirect):
        read.clear()
        made = make(method)
        (induced,) = made.induce(shown)
        made.reason(shown, inputs)
        others = made.reason_otherwise(shown, inputs)
        reads = method in (ShipMethod, SearchWithoutDecoder)
        both, alone = Reading(induced, own.train[:2]), Reading(None, own.train[:2])
        by_text = [(induced, induced)]
        assert read == ([(both, induced), (alone, induced)] if reads else by_text)
        assert ("read" in others) is reads is ("reads_examples" in method.settings())
        looks = method.recipe.method == "union"
        assert ("index" in method.settings(), made.bank.index is not None) == (looks, looks)


def test_rounds_induce_twice_and_answer_every_input(
    make: Make, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time from the shown examples and no fewer; among tasks with like ones."""
    given: list[Sequence[Sequence[Example]]] = []

    def spied(model: Any, bank: Any, tasks: Sequence[Sequence[Example]], *rest: Any) -> Any:
        assert bank.index is not None
        given.append(tasks)
        return induce_many(model, bank, tasks, *rest)

    induce_many = reasoning.induce_many
    monkeypatch.setattr(reasoning, "induce_many", spied)
    shown = [splits.unseen[0].train[:2]]
    assert [len(row) for row in make(ShipRounds).reason(shown, [["1 2", "3 4"]])] == [2]
    first, second = given
    assert first == shown and set(second[0]) >= set(shown[0])


def test_lora_per_task_learns_each_task_whatever_its_group(
    make: Make, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraPerTask, "recipe", OracleRecipe(steps=60, lr=3e-2))
    tasks = [splits.seen[0], splits.unseen[3]]
    inputs = [[example.input for example in task.train] for task in tasks]
    made = make(LoraPerTask)
    made.num_drawn = 6
    together = made.deduce(tasks, ["", ""], inputs)
    num_right = [
        sum(
            exact_match(answer, example.answers)
            for answer, example in zip(row, task.train, strict=True)
        )
        for row, task in zip(together, tasks, strict=True)
    ]
    assert min(num_right) >= 4, "of the six examples that it was trained on"
    monkeypatch.setattr("ship_ds.evaluation.baselines.oracles._MOST_IN_GROUP", 1)
    apart = made.deduce(tasks, ["", ""], inputs)
    pairs = zip(chain.from_iterable(apart), chain.from_iterable(together), strict=True)
    same = [one == other for one, other in pairs]
    assert sum(same) >= len(same) - 2, "two tasks in a batch are as two batches, up to rounding"


@torch.no_grad()
def test_sum_of_adapters_adds_what_each_does(make: Make, ship: Ship, splits: Splits) -> None:
    """By the instruction, whatever the wording that is asked."""
    made, model = make(AdapterSum), ship.model
    both = made._sum(["add 3", "take the first 2"])
    parts = model.adapt(model.encode(["add 3", "take the first 2"]))
    path = next(iter(model.task_llm.sites()))
    x = torch.randn(1, 4, model.task_llm.sites()[path][0])
    wanted = sum(parts.rows(torch.tensor([row])).delta(path, x) for row in (0, 1))
    torch.testing.assert_close(both.delta(path, x), wanted, rtol=1e-4, atol=1e-5)
    assert float(wanted.abs().max()) > 1e-3
    worded = replace(splits.unseen[0].task, instruction="add 3 and then take the first 2")
    task = replace(splits.unseen[0], task=worded)
    said = made.deduce([task], ["begin with add 3, then take the first 2"], [["1 2 3"]])
    assert said == [answer_under(model, both, "", ["1 2 3"], 6)]


def test_sum_is_asked_of_generated_compositions_alone(ship: Ship, splits: Splits) -> None:
    applies = [AdapterSum.applies(task, ship) for task in splits.unseen]
    assert applies == [" and then " in task.task.instruction for task in splits.unseen]
    assert any(applies) and not all(applies)
    read = replace(splits.unseen[0].task, source="file", instruction="read it and then sum it up")
    assert not AdapterSum.applies(replace(splits.unseen[0], task=read), ship)


def test_own_adapters_weights_name_a_known_instruction(
    make: Make,
    ship: Ship,
    splits: Splits,
) -> None:
    """Its own adapter is at no distance from itself."""
    wordings = [task.task.instruction for task in splits.seen[:2]]
    assert make(ReadOwnAdapter).reconstruct(wordings) == wordings


def test_a_lora_of_each_tasks_shown_examples_is_what_is_read(
    make: Make, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers them, and the other task's does not; both have answers of two numbers."""
    monkeypatch.setattr(ReadTrainedLora, "lora", OracleRecipe(steps=60))
    made = make(ReadTrainedLora)
    shown = [splits.seen[1].train[:3], splits.seen[10].train[:3]]
    loras: list[Any] = []
    read = made.read
    monkeypatch.setattr(made, "read", lambda lora: loras.append(lora) or read(lora))
    assert all(made.induce(shown))

    def num_right(lora: Any, examples: Sequence[Example]) -> int:
        questions = [[made.base.prompts.task_prompt(example.input) for example in examples]]
        (answers,) = made.base.answer(questions, lambda _: lora)
        return sum(map(exact_match, answers, [example.answers for example in examples]))

    right = [[num_right(lora, examples) for examples in shown] for lora in loras]
    assert right[0][0] == right[1][1] == 3 and max(right[0][1], right[1][0]) < 3


def test_a_lora_that_ship_would_make_is_read_as_its_instruction(
    make: Make, ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task's own, in their order."""
    made, wordings = make(ReadTrainedLora), [task.task.instruction for task in splits.seen[:2]]
    trained = iter([ship.model.adapt(ship.model.encode([wording])) for wording in wordings])
    monkeypatch.setattr(made, "_lora", lambda examples: next(trained))
    assert made.induce([task.train[:2] for task in splits.seen[:2]]) == wordings


def test_a_lora_is_explained_or_said_to_be_none(
    make: Make, ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SHIP itself makes of an instruction is named by it; a random one is an empty text."""
    made, wording = make(ExplainTrainedLora), splits.seen[0].task.instruction
    own = ship.model.adapt(ship.model.encode([wording]))
    trained = iter([own, noise_like(own, "x")])
    monkeypatch.setattr(made, "_lora", lambda examples: next(trained))
    monkeypatch.setattr(ship, "_threshold", Threshold(0.5, 1.0, 1.0, 16))
    size = ship.config.model.latent_size
    monkeypatch.setattr(ship, "_reader", LoraReader(ship.model.task_llm.sites(), size))
    assert made.induce([task.train[:2] for task in splits.seen[:2]]) == [wording, ""]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_whether_it_asks_what_training_made(
    name: str, ship: Ship, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whether any weight that SHIP trains takes part. `ship-ds compare` measures a method that
    does not once for all runs."""
    method: Any = METHODS[name]
    recipe = getattr(method, "recipe", None)
    if isinstance(recipe, InductionConfig):
        monkeypatch.setattr(method, "recipe", recipe.model_copy(update=FEW))
    elif hasattr(recipe, "oracles"):
        monkeypatch.setattr(method, "recipe", replace(recipe, oracles=OracleRecipe(steps=1)))
    elif isinstance(recipe, OracleRecipe):
        monkeypatch.setattr(method, "recipe", OracleRecipe(steps=1))
    monkeypatch.setattr(ship, "_threshold", Threshold(0.5, 1.0, 1.0, 16))
    size = ship.config.model.latent_size
    monkeypatch.setattr(ship, "_reader", LoraReader(ship.model.task_llm.sites(), size))
    made = method(Setting(ship, splits, tmp_path, Steps(1) if name in TRAINED_NAMES else None, 0))
    [task] = [one for one in splits.unseen if AdapterSum.applies(one, ship)][:1]
    asked: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: asked.add(type(module).__name__))
        for module in ship.model.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    assert hooks
    try:
        made.prepare()
        for direction, protocol in PROTOCOLS.items():
            if isinstance(made, protocol) and direction not in method.cannot(ship):
                measure(made, direction, [ask(task, 2, 0, 1)])
    finally:
        for hook in hooks:
            hook.remove()
    assert bool(asked) is method.asks_ship, asked
