"""The objectives' formulas: by hand, by torch, and through the whole model."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ship_ds.config import (
    ContrastiveConfig,
    CycleConfig,
    DistillationConfig,
    KlConfig,
    LoraHypernetworkConfig,
    LossConfig,
    ModelConfig,
    TaskLlmConfig,
)
from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.contrastive import Contrastive, SecondWordings
from ship_ds.model.cycle import Cycle, CycleInputs
from ship_ds.model.distillation import Distillation
from ship_ds.model.drawing import keyed_generator
from ship_ds.model.generation import greedy, greedy_of_length
from ship_ds.model.objectives import KlLoss, Objective, Training
from ship_ds.model.ship import ShipModel
from ship_ds.model.step import Outputs, Predictions, ShipBatch
from tests.model.models import wake_up

EXAMPLES = tuple(Example(text, text) for text in ("3 9 5", "1 2", "8 8 1", "4"))
DRAWS = (
    TaskDraw("a", "reverse it", EXAMPLES[:2], EXAMPLES[2:3], True, "reverse the list"),
    TaskDraw("b", "put 7 at the front", EXAMPLES[2:], (), True),
)


class Spy(Objective):
    """Keeps what the others get."""

    outputs: Outputs

    def count(self, batch: ShipBatch) -> int:
        return 1

    def sum(self, outputs: Outputs) -> Tensor:
        self.outputs = outputs
        return outputs.kl_TZ.sum() * 0


def ship_with(loss: LossConfig) -> tuple[ShipModel, Spy]:
    torch.manual_seed(0)
    config = ModelConfig(
        latent_size=16,
        task_llm=TaskLlmConfig(quantisation="none"),
        hypernetwork=LoraHypernetworkConfig(rank=2, width=8, targets=("q_proj",)),
    )
    ship = build_ship(config, LoadedWeights(), loss)
    wake_up(ship)
    ship.objectives["spy"] = spy = Spy(LossConfig())
    return ship, spy


def outputs_of(kl_TZ: Tensor, step: int = 0) -> Any:
    return SimpleNamespace(kl_TZ=kl_TZ, batch=SimpleNamespace(step=step))


def test_the_kl_alone_is_its_mean_over_dimensions() -> None:
    kl_TZ = torch.tensor([[0.1, 0.5], [2.0, 0.0]])
    assert float(KlLoss(KlConfig()).sum(outputs_of(kl_TZ))) == pytest.approx(0.3 + 1.0)


def test_free_bits_count_whole_and_pull_no_more() -> None:
    """Below 0.3 nats a dimension counts as 0.3 and has no gradient, to the bit."""
    kl_TZ = torch.tensor([[0.1, 0.5], [2.0, 0.0]], requires_grad=True)
    loss = KlLoss(KlConfig(free_bits=0.3)).sum(outputs_of(kl_TZ))
    assert float(loss.detach()) == pytest.approx((0.3 + 0.5) / 2 + (2.0 + 0.3) / 2)
    loss.backward()
    assert kl_TZ.grad is not None and kl_TZ.grad.tolist() == [[0.0, 0.5], [0.5, 0.0]]


def test_capacity_pulls_to_c_from_both_sides() -> None:
    """C is 0.25, 0.5, 0.75 and 1 at the first four steps."""
    objective = KlLoss(KlConfig(capacity=1.0, capacity_steps=4))
    for step, capacity in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        kl_TZ = torch.tensor([[0.1, 0.5], [2.0, 1.0]], requires_grad=True)
        loss = objective.sum(outputs_of(kl_TZ, step))
        assert float(loss.detach()) == pytest.approx(abs(0.3 - capacity) + 1.5 - capacity)
        loss.backward()
        below = 0.5 if capacity < 0.3 else -0.5
        assert kl_TZ.grad is not None and kl_TZ.grad.tolist() == [[below] * 2, [0.5] * 2]


@pytest.mark.parametrize("mean_over", ["tokens", "answers"])
def test_the_loss_of_answers_is_a_mean_over_what_it_says(mean_over: str) -> None:
    """By hand, each answer alone, and with its gradient."""
    ship, spy = ship_with(LossConfig.model_validate({"task": {"mean_over": mean_over}}))
    found = ship(ship.collate(DRAWS, 0, 0)).objectives["task"]
    batch, lengths = spy.outputs.batch, spy.outputs.batch.answers.target_lengths
    assert len(set(lengths)) > 1
    rows = zip(
        spy.outputs.answers.logits_KV.split(lengths),
        batch.answers.labels_K.split(lengths),
        strict=True,
    )
    of_answers = [torch.nn.functional.cross_entropy(*row) for row in rows]
    weights = lengths if mean_over == "tokens" else [1] * len(lengths)
    expected = sum(weight * one for weight, one in zip(weights, of_answers, strict=True))
    assert ship.objectives["task"].count(batch) == sum(weights)
    torch.testing.assert_close(found, expected)
    parameters = list(ship.hypernetwork.parameters())
    gradients = (
        torch.autograd.grad(one, parameters, retain_graph=True) for one in (found, expected)
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_teacher_reads_the_instruction_and_the_students_answers() -> None:
    ship, spy = ship_with(LossConfig.model_validate({"distillation": 1}))
    ship(ship.collate(DRAWS, 0, 0))
    teacher = spy.outputs.batch.extras["distillation"]
    read = ship.prompts.tokenizer.batch_decode(teacher.ids_ES)
    for draw, texts in zip(DRAWS, (read[:2], read[2:]), strict=True):
        assert all(draw.wording in text for text in texts)
    answers = spy.outputs.batch.answers
    assert torch.equal(teacher.labels_K, answers.labels_K)
    assert not any(
        "reverse" in text for text in ship.prompts.tokenizer.batch_decode(answers.ids_ES)
    )
    assert ship.objectives["distillation"].count(spy.outputs.batch) == answers.num_targets


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_torchs_divergence(temperature: float) -> None:
    section = {"weight": 1, "temperature": temperature}
    ship, spy = ship_with(LossConfig.model_validate({"distillation": section}))
    sums = ship(ship.collate(DRAWS, 0, 0))
    batch = spy.outputs.batch
    with torch.no_grad():
        teacher_KV, _ = ship.task_llm.score(None, batch.extras["distillation"], 2)
    student_KV = spy.outputs.answers.logits_KV
    expected = torch.nn.functional.kl_div(
        (student_KV / temperature).log_softmax(1),
        (teacher_KV / temperature).softmax(1),
        reduction="sum",
    )
    found = sums.objectives["distillation"]
    assert float(found.detach()) > 0.01
    torch.testing.assert_close(found, expected * temperature**2, rtol=1e-3, atol=1e-4)


def test_distillation_trains_what_the_adapter_comes_from_and_the_teacher_not() -> None:
    ship, _ = ship_with(LossConfig.model_validate({"distillation": 1}))
    ship(ship.collate(DRAWS, 0, 0)).objectives["distillation"].backward()
    moved = {name.split(".")[0] for name, p in ship.named_parameters() if p.grad is not None}
    assert moved == {"encoder", "hypernetwork"}
    assert all(p.grad is None for p in ship.task_llm.parameters())


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    ship, spy = ship_with(LossConfig.model_validate({"distillation": 1}))
    ship(ship.collate(DRAWS, 0, 0))
    outputs = spy.outputs
    lm = ship.task_llm.language_model
    states_KH, labels_K = ship.task_llm(None, outputs.batch.extras["distillation"], 2, lm.packs)
    same: Any = SimpleNamespace(
        parts=outputs.parts, batch=outputs.batch, answers=Predictions(lm, states_KH, labels_K)
    )
    assert float(Distillation(DistillationConfig(temperature=2)).sum(same)) == pytest.approx(
        0, abs=1e-5
    )


def by_hand(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    apart: Sequence[Sequence[bool]],
    anchors: Sequence[int],
    temperature: float,
) -> float:
    """InfoNCE in plain Python."""

    def cosine(one: Sequence[float], other: Sequence[float]) -> float:
        product = sum(a * b for a, b in zip(one, other, strict=True))
        return product / math.hypot(*one) / math.hypot(*other)

    total = 0.0
    for anchor in anchors:
        others = [n for n in range(len(first)) if n == anchor or apart[anchor][n]]
        for scores in (
            {n: cosine(first[anchor], second[n]) / temperature for n in others},
            {n: cosine(second[anchor], first[n]) / temperature for n in others},
        ):
            total += math.log(sum(map(math.exp, scores.values()))) - scores[anchor]
    return total / 2


def test_contrast_is_infonce_by_hand() -> None:
    """Of four tasks the third has one wording, and the fourth is the first once more."""
    torch.manual_seed(0)
    first_TZ, second_TZ = torch.randn(2, 4, 3)
    apart = [[True, True, True, False], [True] * 4, [True] * 4, [False, True, True, True]]
    extra = SecondWordings(
        None,  # type: ignore[arg-type]
        torch.tensor([True, True, False, True]),
        torch.tensor(apart),
        3,
    )
    outputs: Any = SimpleNamespace(
        posterior=SimpleNamespace(mean_TZ=first_TZ),
        parts=SimpleNamespace(encoder=lambda batch, **_: (second_TZ, None)),
        batch=SimpleNamespace(extras={"contrastive": extra}),
    )
    found = Contrastive(ContrastiveConfig(temperature=0.5)).sum(outputs)
    expected = by_hand(first_TZ.tolist(), second_TZ.tolist(), apart, (0, 1, 3), 0.5)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_contrast_compares_two_wordings_of_each_task() -> None:
    """The one that is read anew is the other one; who has none is not counted, nor is who shares
    one told apart from."""
    ship, _ = ship_with(LossConfig.model_validate({"contrastive": 1}))
    twice = TaskDraw("c", "rotate", EXAMPLES[:2], (), True, "reverse it")
    batch = ship.collate((*DRAWS, twice), 0, 0)
    extra = batch.extras["contrastive"]
    texts = ship.encoder_prompts.tokenizer.batch_decode(extra.instructions.ids_ES)
    for text, said in zip(texts, ("reverse the list", DRAWS[1].wording, "reverse it"), strict=True):
        assert said in text
    assert extra.has_two_T.tolist() == [True, False, True]
    assert extra.are_apart_TT.tolist() == [
        [False, True, False],
        [True, False, True],
        [False, True, False],
    ]
    assert ship.objectives["contrastive"].count(batch) == 2
    sums = ship(batch)
    means = [ship.encode([draw.wording for draw in (*DRAWS, twice)])]
    means.append(ship.encode(["reverse the list", DRAWS[1].wording, "reverse it"]))
    apart = extra.are_apart_TT.tolist()
    expected = by_hand(means[0].tolist(), means[1].tolist(), apart, (0, 2), 0.1)
    found = sums.objectives["contrastive"]
    assert float(found.detach()) == pytest.approx(expected, rel=1e-3)
    found.backward()
    moved = {name.split(".")[0] for name, p in ship.named_parameters() if p.grad is not None}
    assert moved == {"encoder"}


def test_contrast_says_how_many_tasks_teach_it() -> None:
    objective = Contrastive(ContrastiveConfig())
    said: list[str] = []
    alone = SplitTask(Task("a", "reverse it", (), ("reverse it",)), EXAMPLES, ())
    two = SplitTask(Task("b", "rotate it", (), ("turn it",)), EXAMPLES, ())
    assert objective.begin(Training([alone, two], {}, {}, said.append)) == ""
    assert said == ["loss.contrastive: 1 of 2 seen tasks have two wordings"]
    with pytest.raises(UserError, match="none of the 1 seen tasks has two wordings"):
        objective.begin(Training([alone], {}, {}, said.append))


def test_contrast_without_a_second_wording_is_zero_and_reads_all_the_same() -> None:
    """So that no rank waits for one that has nothing to compare."""
    ship, _ = ship_with(LossConfig.model_validate({"contrastive": 1}))
    batch = ship.collate((DRAWS[1],), 0, 0)
    calls: list[int] = []
    ship.encoder.register_forward_hook(lambda *_: calls.append(1))
    loss = ship(batch).objectives["contrastive"]
    loss.backward()
    assert float(loss.detach()) == 0 and len(calls) == 2
    assert ship.objectives["contrastive"].count(batch) == 0
    assert all(p.grad is None or not p.grad.any() for p in ship.parameters())


def cycle_of(latent_TZ: Tensor, mean_TZ: Tensor) -> float:
    """The objective where the encoder reads `mean_TZ` out of whatever is written."""

    class Stub:
        training = True

        def eval(self) -> None:
            self.training = False

        def train(self, mode: bool) -> None:
            self.training = mode

        def stream(self, latent_TZ: Tensor, *_: Any) -> Any:
            assert not self.training, "no dropout"
            self.latent_TZ = latent_TZ
            return SimpleNamespace(logits_EV=torch.eye(2), reserve=print, advance=print)

    decoder = Stub()
    outputs: Any = SimpleNamespace(
        latent_TZ=latent_TZ,
        parts=SimpleNamespace(decoder=decoder, encoder=lambda ids_TY, **_: (mean_TZ, None)),
        batch=SimpleNamespace(extras={"cycle": CycleInputs(None, repr, lambda ids: ids)}),  # type: ignore[arg-type, return-value]
    )
    loss = Cycle(CycleConfig(num_tokens=1)).sum(outputs)
    assert torch.equal(decoder.latent_TZ, latent_TZ) and decoder.training
    # What is read is what moves, not what was written of.
    loss.backward()
    assert latent_TZ.grad is None and mean_TZ.grad is not None
    return float(loss.detach())


def test_the_cycle_is_half_the_mean_square_by_hand() -> None:
    latent_TZ = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    mean_TZ = torch.tensor([[1.0, 0.0], [3.0, 1.0]], requires_grad=True)
    assert cycle_of(latent_TZ, mean_TZ) == pytest.approx((0 + 4) / 4 + (9 + 1) / 4)
    same_TZ = latent_TZ.detach().clone().requires_grad_()
    assert cycle_of(latent_TZ, same_TZ) == 0


@pytest.mark.parametrize("latents", ["posterior", "prior"])
def test_a_cycle_reads_what_is_written_of_the_latents(latents: str) -> None:
    """As `encode` reads what `decode` writes; the encoder learns by it, and nobody else."""
    section = {"weight": 1, "latents": latents, "num_tokens": 6}
    ship, spy = ship_with(LossConfig.model_validate({"cycle": section}))
    batch = ship.collate(DRAWS, 0, 0)
    loss = ship(batch).objectives["cycle"]
    latent_TZ = spy.outputs.latent_TZ.detach()
    if latents == "prior":
        keys = [f"cycle {noise!r}" for noise in batch.noise_TZ[:, 0].tolist()]
        latent_TZ = torch.cat([ship.prior.sample(1, keyed_generator(key)) for key in keys])
    texts = ship.decode(latent_TZ, 6)
    assert len({*texts}) == 2
    expected = (latent_TZ - ship.encode(texts)).square().mean(1).sum() / 2
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    assert ship.objectives["cycle"].count(batch) == 2
    loss.backward()
    moved = {n.split(".")[0] for n, p in ship.named_parameters() if p.grad is not None}
    assert moved == {"encoder"} and ship.decoder.training


def test_a_draw_from_the_prior_belongs_to_its_task() -> None:
    """On whatever rank that is: the sums of the parts are the whole's."""
    section = {"weight": 1, "latents": "prior", "num_tokens": 4}
    ship, _ = ship_with(LossConfig.model_validate({"cycle": section}))
    whole, *parts = (
        float(ship(ship.collate(draws, 0, 0)).objectives["cycle"].detach())
        for draws in (DRAWS, DRAWS[:1], DRAWS[1:])
    )
    assert sum(parts) == pytest.approx(whole, rel=1e-4)
    drawn = [
        ship.collate(DRAWS, seed, step).extras["cycle"].draw(ship.prior, noise_TZ)
        for seed, step in ((0, 0), (0, 1), (1, 0))
        for noise_TZ in [ship.collate(DRAWS, seed, step).noise_TZ]
    ]
    assert len({tuple(row) for one in drawn for row in one.tolist()}) == 6, "by seed, step and task"


def test_a_text_longer_than_a_context_is_cut_or_refused() -> None:
    ship, _ = ship_with(LossConfig.model_validate({"cycle": {"num_tokens": 4}}))
    short = replace(ship.collator, encoder_context=12)
    extra = ship.objectives["cycle"].prepare(DRAWS, short, torch.device("cpu"))
    assert extra is not None
    words = ship.decoder_prompts.ids("reverse the list and then reverse the list and then sort it")
    assert max(extra.read(torch.tensor([words])).lengths) <= 12
    before = max(ship.collator.undecoded(1, torch.device("cpu")).lengths)
    for num_tokens, fits in ((512 - before, True), (513 - before, False)):
        ship, _ = ship_with(LossConfig.model_validate({"cycle": {"num_tokens": num_tokens}}))
        if fits:
            ship.collate(DRAWS, 0, 0)
            continue
        with pytest.raises(UserError, match=rf"at most 512 .*: set {512 - before} or less"):
            ship.collate(DRAWS, 0, 0)


def test_every_rank_writes_as_many_tokens_whatever_ends() -> None:
    """Under ZeRO-3 the passes have to be as many everywhere; the texts are those of `greedy`."""
    ship, _ = ship_with(LossConfig.model_validate({"cycle": {"num_tokens": 5}}))
    latent_TZ, batch = torch.randn(3, 16), ship.collator.undecoded(3, torch.device("cpu"))
    passes: list[int] = []
    stream = ship.decoder.stream(latent_TZ, None, batch)
    stream.before_token = lambda: passes.append(1)
    ids_TY = greedy_of_length(stream, 5)
    assert ids_TY.shape == (3, 5) and len(passes) == 4
    eos, found = ship.decoder_prompts.eos_id, ids_TY.tolist()
    for end in (eos, found[0][1]):  # one that comes soon, too
        rows = greedy(ship.decoder.stream(latent_TZ, None, batch), end, 5)
        cut = [row[: row.index(end) + 1] if end in row else row for row in found]
        assert rows == cut


def test_a_cycle_without_a_trained_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cycle=1 needs loss\.reconstruction above zero"):
        LossConfig.model_validate({"cycle": 1, "reconstruction": 0})
    LossConfig.model_validate({"cycle": 0, "reconstruction": 0})
