"""SHIP as a whole on the embedded tiny LM: what is trained, what the Task LLM reads, sizes, modes
and dtypes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ship_ds.config import (
    BottleneckHypernetworkConfig,
    CombinationConfig,
    DecoderConfig,
    EncoderConfig,
    FusionHypernetworkConfig,
    LoraHypernetworkConfig,
    LoraTuning,
    LossConfig,
    ModelConfig,
    ReshapeHypernetworkConfig,
    SoftPromptHypernetworkConfig,
    TaskLlmConfig,
)
from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.flops import flops_of_parts
from ship_ds.inference.descents import latents_of
from ship_ds.inference.results import Candidate
from ship_ds.inference.scoring import fit_of_latents
from ship_ds.inference.search_state import SearchState
from ship_ds.model import budget
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.batch import TokenBatch
from ship_ds.model.decoder import Decoder
from ship_ds.model.decoder_only import DecoderOnly
from ship_ds.model.encoder import posterior_noise
from ship_ds.model.ship import ShipModel
from ship_ds.model.sizes import step_rows
from tests.model.models import wake_up

WORDINGS = ("keep the numbers greater than 4", "put 7 at the front")
INPUTS = ("3 9 5", "1 2", "8 8 1", "4")
TUNING = LoraTuning(rank=2, alpha=8, dropout=0.0, targets=("q_proj", "down_proj"))
PLAIN = TaskLlmConfig(quantisation="none")


def _config(**sections: Any) -> ModelConfig:
    defaults: dict[str, Any] = {
        "latent_size": 16,
        "task_llm": PLAIN,
        "hypernetwork": LoraHypernetworkConfig(rank=2, width=8, targets=("q_proj",)),
    }
    return ModelConfig(**(defaults | sections))


def _ship(**sections: Any) -> ShipModel:
    torch.manual_seed(0)
    return build_ship(_config(**sections), LoadedWeights())


def _draws() -> list[TaskDraw]:
    examples = [Example(text, text) for text in INPUTS]
    return [
        TaskDraw("a", WORDINGS[0], tuple(examples[:2]), (examples[2],), True),
        TaskDraw("b", WORDINGS[1], tuple(examples[2:]), (), True),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_lora_roles_train_lora_and_heads_alone(quantisation: Any) -> None:
    ship = _ship(
        encoder=EncoderConfig(quantisation=quantisation, tuning=TUNING),
        decoder=DecoderConfig(quantisation=quantisation, tuning=TUNING),
        task_llm=TaskLlmConfig(shard="always"),
    )
    wake_up(ship)
    draws = _draws()
    # the decoder without z
    draws[1] = TaskDraw("b", WORDINGS[1], draws[1].answered, draws[1].answered, False)
    sums = ship(ship.collate(draws, 0, 0))
    sum(sums.objectives.values()).backward()
    trained = {name for name, parameter in ship.named_parameters() if parameter.requires_grad}
    for role, own in (("encoder", ("head.",)), ("decoder", ("from_latent.", "without_latent"))):
        names = {name.removeprefix(f"{role}.") for name in trained if name.startswith(role)}
        assert sum("lora_" in name for name in names) == 2 * 2 * 4
        assert all("lora_" in name or name.startswith(own) for name in names)
    assert not any(name.startswith("sharded_task_llm") for name in trained)
    for name, parameter in ship.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), (
            name
        )


def test_full_tuning_trains_all_of_both_roles() -> None:
    ship = _ship()
    wake_up(ship)
    sums = ship(ship.collate(_draws(), 0, 0))
    sum(sums.objectives.values()).backward()
    idle = {name for name, p in ship.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == {"decoder.without_latent"}  # both draws showed z


def test_tokens_are_hidden_from_the_decoder_task_by_task() -> None:
    """About as many as asked for, others at each step, of each task by its name and the step alone;
    what has to be written stays, and so does all else that the step reads."""
    whole, hiding = (_ship(decoder=DecoderConfig(drop_tokens=share)) for share in (0.0, 0.4))
    draws = [
        TaskDraw(f"task {i}", WORDINGS[i % 2], (Example("1", "1"),), (Example("2", "3"),), True)
        for i in range(40)
    ]
    full, some = whole.collate(draws, 0, 3), hiding.collate(draws, 0, 3)
    assert some.decoded.labels_K.tolist() == full.decoded.labels_K.tolist()
    assert some.answers.ids_ES.equal(full.answers.ids_ES)
    assert some.instructions.ids_ES.equal(full.instructions.ids_ES)
    hidden_ES = some.decoded.ids_ES != full.decoded.ids_ES
    assert (some.decoded.ids_ES[hidden_ES] == hiding.decoder_prompts.pad_id).all()
    assert 0.3 < float(hidden_ES.sum()) / some.decoded.num_targets < 0.5
    before_S = torch.arange(hidden_ES.shape[1]) < full.decoded.padded.column_K.min() + 1
    assert not hidden_ES[:, before_S].any(), "something before the instruction is hidden"
    later = hiding.collate(draws, 0, 4).decoded.ids_ES
    assert not later.equal(some.decoded.ids_ES)
    alone = hiding.collate(draws[7:8], 0, 3).decoded
    length = alone.lengths[0]
    assert alone.ids_ES[0].tolist() == some.decoded.ids_ES[7, :length].tolist()


def test_a_decoder_reads_what_stands_in_place_of_a_hidden_token() -> None:
    """Packed and padded alike; what comes before the first hidden one is read as ever."""
    ship = _ship(decoder=DecoderConfig(tuning=TUNING))
    batch = ship.collate(_draws(), 0, 0).decoded
    third_K = torch.cat([torch.arange(n) == 2 for n in batch.target_lengths])
    after_K = torch.cat([torch.arange(n) > 2 for n in batch.target_lengths])
    hidden = batch.hiding(third_K, ship.decoder_prompts.pad_id)
    latent_TZ = torch.randn(2, 16)
    with torch.no_grad():
        whole_KH, packed_KH, padded_KH = (
            ship.decoder(latent_TZ, None, one, packed)[0]
            for one, packed in ((batch, True), (hidden, True), (hidden, False))
        )
    torch.testing.assert_close(packed_KH, padded_KH)
    torch.testing.assert_close(packed_KH[~after_K], whole_KH[~after_K])
    assert float((packed_KH - whole_KH)[after_K].abs().amax(1).min()) > 1e-3


def test_the_instruction_leaves_the_prompts_task_by_task() -> None:
    """At first all of them read as with `hard`, in the end none; each task by its name and the step
    alone, whoever is beside it; an evaluation never states it."""
    fading, hard, none = (
        _ship(task_llm=TaskLlmConfig(quantisation="none", **more))
        for more in ({"fading_steps": 4}, {"instruction": "hard"}, {})
    )
    draws = [
        TaskDraw(f"task {i}", WORDINGS[i % 2], (Example(INPUTS[i % 4], "1"),), (), True)
        for i in range(40)
    ]

    def prompts(ship: ShipModel, step: int, draws: list[TaskDraw] = draws) -> list[list[int]]:
        answers = ship.collate(draws, 0, step).answers
        return [
            row[:length]
            for row, length in zip(answers.ids_ES.tolist(), answers.lengths, strict=True)
        ]

    stated, bare = prompts(hard, 0), prompts(none, 0)
    assert prompts(fading, 0) == stated and prompts(fading, 4) == prompts(fading, 9) == bare
    assert all(len(one) > len(other) for one, other in zip(stated, bare, strict=True))
    numbers = []
    for step in (1, 3):
        mixed = prompts(fading, step)
        for row, *both in zip(mixed, stated, bare, strict=True):
            assert row in both
        assert prompts(fading, step, draws[::-3]) == mixed[::-3]
        numbers.append(sum(row == one for row, one in zip(mixed, stated, strict=True)))
    assert 24 <= numbers[0] <= 36 and 4 <= numbers[1] <= 16  # 30 and 10 on average
    asked, expected = (
        ship.collator.answers(INPUTS, None, [WORDINGS[0]] * 4, torch.device("cpu"))
        for ship in (fading, none)
    )
    assert asked.ids_ES.equal(expected.ids_ES)


def test_without_reconstruction_there_is_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """It neither runs nor is trained nor counted; all else is to the bit as it was."""
    whole = _ship()
    expected = whole(whole.collate(_draws(), 0, 0))
    torch.manual_seed(0)
    ship = build_ship(_config(), LoadedWeights(), LossConfig(reconstruction=0))
    monkeypatch.setattr(Decoder, "forward", lambda *_: pytest.fail("the decoder ran"))
    batch = ship.collate(_draws(), 0, 0)
    sums = ship(batch)
    sum(sums.objectives.values()).backward()
    for name in ("task", "kl"):
        assert torch.equal(sums.objectives[name], expected.objectives[name])
    assert float(sums.objectives["reconstruction"]) == 0
    assert not any(p.requires_grad or p.grad is not None for p in ship.decoder.parameters())
    assert all(p.requires_grad for p in ship.encoder.parameters())
    assert batch.num_tokens == batch.instructions.num_tokens + batch.answers.num_tokens
    assert flops_of_parts(ship.flop_size(), step_rows(batch))["decoder"] == 0
    assert ship.decode(torch.zeros(2, 16), 5) == ["", ""]


@pytest.mark.parametrize(
    "hypernetwork",
    [
        LoraHypernetworkConfig(rank=2, width=8, heads="per_layer"),
        LoraHypernetworkConfig(rank=2, width=8, heads="per_rank"),
        SoftPromptHypernetworkConfig(num_virtual_tokens=3, width=8),
    ],
)
def test_padded_and_packed_steps_have_the_same_loss(
    hypernetwork: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship = _ship(hypernetwork=hypernetwork)
    wake_up(ship)
    batch = ship.collate(_draws(), 0, 0)
    with torch.no_grad():
        packed = ship(batch)
        monkeypatch.setattr(DecoderOnly, "packs", False)
        padded = ship(batch)
    for name in ("task", "reconstruction", "kl"):
        torch.testing.assert_close(
            packed.objectives[name], padded.objectives[name], rtol=1e-4, atol=1e-4
        )


def test_published_fusion_has_no_weights_between_z_and_the_soft_tokens() -> None:
    ship = _ship(
        latent_size=2 * 128,
        hypernetwork=ReshapeHypernetworkConfig(num_virtual_tokens=2),
        decoder=DecoderConfig(num_soft_tokens=2, fusion="reshape"),
    )
    latent = torch.randn(1, 256)
    assert torch.equal(ship.decoder.soft_tokens(latent), latent.view(1, 2, 128))
    assert (
        ship.parameter_counts()["hypernetwork trunk"]
        == ship.parameter_counts()["hypernetwork heads"]
        == 0
    )
    assert ship(ship.collate(_draws(), 0, 0)).objectives["task"].isfinite()
    with pytest.raises(UserError, match="model.decoder.num_soft_tokens"):
        _ship(latent_size=16, decoder=DecoderConfig(num_soft_tokens=2, fusion="reshape"))


def _by_hand(
    ship: ShipModel, prompts: Sequence[Sequence[int]], adapter: Any, num_virtual: int = 0
) -> list[list[int]]:
    batch = TokenBatch.build(prompts, None, ship.prompts.pad_id, num_virtual)
    return ship.task_llm.generate(adapter, batch, ship.prompts.eos_id, 6)


@pytest.mark.parametrize("num_virtual", [0, 3])
@pytest.mark.parametrize("form", ["none", "hard", "soft"])
def test_instruction_in_the_task_llms_prompt(form: Any, num_virtual: int) -> None:
    """Training and answering read the same: the prompt built by hand, and for `soft` the tokens
    before it."""
    hypernetwork = (
        SoftPromptHypernetworkConfig(num_virtual_tokens=3, width=8)
        if num_virtual
        else _config().hypernetwork
    )
    ship = _ship(
        task_llm=TaskLlmConfig(quantisation="none", instruction=form), hypernetwork=hypernetwork
    )
    wake_up(ship)
    prompts, said = ship.prompts, [WORDINGS[0]] * 2 + [WORDINGS[1]] * 2
    before = [
        prompts.tokenizer(text, add_special_tokens=False)["input_ids"] if form == "soft" else []
        for text in said
    ]
    asked = [
        list(prompts.task_prompt(x, k if form == "hard" else None))
        for x, k in zip(INPUTS, said, strict=True)
    ]
    answers = ship.collate(_draws(), 0, 0).answers
    for e, (first, prompt, text) in enumerate(zip(before, asked, INPUTS, strict=True)):
        expected = first + prompt + list(prompts.target(text))
        assert answers.ids_ES[e, num_virtual : answers.lengths_E[e]].tolist() == expected
    assert answers.num_virtual_tokens == num_virtual
    assert answers.instruction_X.tolist() == [
        e * answers.ids_ES.shape[1] + num_virtual + i
        for e, first in enumerate(before)
        for i in range(len(first))
    ]
    adapter = ship.adapt(ship.encode(WORDINGS))
    read = [first + prompt for first, prompt in zip(before, asked, strict=True)]
    rows = _by_hand(ship, read, adapter, num_virtual)
    expected_answers = [prompts.text(row) if row[-1] == prompts.eos_id else None for row in rows]
    assert ship.answer(adapter, INPUTS, 6, said) == expected_answers
    assert [list(ship.question(x, k)) for x, k in zip(INPUTS, said, strict=True)] == read


@torch.no_grad()
def test_optimised_embeddings_stand_in_for_a_soft_instruction() -> None:
    ship = _ship(task_llm=TaskLlmConfig(quantisation="none", instruction="soft"))
    batch = ship.task_batch(INPUTS, INPUTS, [WORDINGS[0]] * 4)
    adapter, ids = ship.adapt(ship.encode([WORDINGS[0]])), ship.prompts.target(WORDINGS[0])[:-1]
    table = ship.task_llm.language_model.embed_ids(torch.tensor([ids]))
    expected, _ = ship.task_llm.score(adapter, batch, 1)
    torch.testing.assert_close(
        ship.task_llm.score(adapter, batch, 1, instruction=table)[0], expected
    )
    assert not torch.allclose(
        ship.task_llm.score(adapter, batch, 1, instruction=-table)[0], expected, atol=1e-2
    )


def test_control_states_the_instruction_as_text_whatever_the_form() -> None:
    for form in ("none", "soft"):
        ship = _ship(task_llm=TaskLlmConfig(quantisation="none", instruction=form))
        said = [WORDINGS[0]] * 4
        rows = _by_hand(
            ship, [ship.prompts.task_prompt(x, k) for x, k in zip(INPUTS, said, strict=True)], None
        )
        expected = [
            ship.prompts.text(row) if row[-1] == ship.prompts.eos_id else None for row in rows
        ]
        assert ship.answer(None, INPUTS, 6, said) == expected
        assert any(answer is not None for answer in expected)


def test_adapted_answer_without_the_wordings_it_was_trained_with_is_refused() -> None:
    ship = _ship(task_llm=TaskLlmConfig(quantisation="none", instruction="hard"))
    with pytest.raises(ValueError, match="model.task_llm.instruction=hard"):
        ship.answer(ship.adapt(ship.encode(WORDINGS[:1])), INPUTS, 2)


def test_parameter_counts_count_a_4_bit_weight_as_one() -> None:
    plain, quantised = (_ship(task_llm=TaskLlmConfig(quantisation=q)) for q in ("none", "nf4"))
    counts = plain.parameter_counts()
    lm = sum(parameter.numel() for parameter in plain.task_llm.parameters())
    assert counts == quantised.parameter_counts() and counts["task LLM"] == lm
    output_layer, head = (
        quantised.task_llm.lm.get_input_embeddings().num_embeddings * 128,
        128 * 256 + 256 + 256 * 32 + 32,
    )
    assert counts["encoder"] == lm - output_layer + head
    assert counts["hypernetwork heads"] == (8 + 1) * 2 * (128 + 128)
    assert counts["trained"] == sum(counts.values()) - counts["task LLM"] - counts["trained"]


@pytest.mark.parametrize("shard", ["always", "never"])
def test_training_mode_and_casts_and_the_task_llm(shard: Any) -> None:
    ship = _ship(task_llm=TaskLlmConfig(quantisation="none", shard=shard))
    assert not ship.train().task_llm.lm.training and ship.decoder.lm.training
    assert ship.double().task_llm.lm.get_input_embeddings().weight.dtype == torch.float64
    assert any("task_llm" in name for name in ship.state_dict()) == (shard == "always")


def test_bf16_step_has_fp32_losses_and_finite_gradients() -> None:
    torch.manual_seed(0)
    ship = build_ship(_config(), LoadedWeights(torch.bfloat16))
    for model in (ship, ship.bfloat16()):  # as built, and as DeepSpeed casts it
        sums = model(model.collate(_draws(), 0, 0))
        assert {term.dtype for term in sums.objectives.values()} == {torch.float32}
        sum(sums.objectives.values()).backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        model.zero_grad()


def test_attention_of_another_machine_is_one_line() -> None:
    with pytest.raises(UserError, match="model.attention=varlen: needs CUDA"):
        build_ship(
            _config(attention="varlen"),
            LoadedWeights(attention="varlen", device=torch.device("cpu")),
        )


def test_noise_is_keyed_by_seed_step_and_task_alone() -> None:
    both = posterior_noise(3, 5, ["a", "b"], 4000)
    assert torch.equal(both[1:], posterior_noise(3, 5, ["b"], 4000)) and not torch.equal(
        both[0], both[1]
    )
    for seed, step in ((4, 5), (3, 6)):
        assert not torch.equal(posterior_noise(seed, step, ["a"], 4000)[0], both[0])
    assert abs(float(both.mean())) < 0.05 and float(both.std()) == pytest.approx(1, abs=0.05)


def test_encoder_reads_the_last_real_token() -> None:
    """Padding beside a longer instruction changes nothing."""
    ship = _ship()
    both = ship.encode(
        ["put 7 at the front", "keep the numbers greater than 4 and then reverse them"]
    )
    torch.testing.assert_close(both[:1], ship.encode(["put 7 at the front"]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


def _fusing() -> ShipModel:
    """States beside a part of z alone, whose size no instruction changes."""
    parts = (BottleneckHypernetworkConfig(rank=2, width=8), FusionHypernetworkConfig(width=8))
    ship = _ship(hypernetwork=CombinationConfig(parts=parts))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ship.hypernetwork.parameters():
            parameter.normal_(std=0.5)
    return ship.eval()


def test_fused_texts_are_read_as_many_at_a_time_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ship, texts = _fusing(), [WORDINGS[0], "", WORDINGS[1]]
    latent_TZ = ship.encode([WORDINGS[0], WORDINGS[1], WORDINGS[1]])
    together = ship.adapt(latent_TZ, texts).tensors()
    monkeypatch.setattr(budget, "bytes_free", lambda device: 1)
    num_rows: list[int] = []
    ship.encoder.register_forward_hook(lambda _, read, __: num_rows.append(len(read[0].ids_ES)))
    alone = ship.adapt(latent_TZ, texts).tensors()
    assert num_rows == [1, 1, 1]
    for name, tensor in together.items():
        torch.testing.assert_close(alone[name], tensor, rtol=1e-4, atol=1e-5)


def test_of_a_fused_adapter_the_part_of_the_states_alone_grows_with_the_text() -> None:
    ship = _fusing()
    sizes = []
    for length in (1, 2, 128):
        read = TokenBatch.build([[1] * length], None, 0)
        tensors = ship.adapt_read(torch.zeros(1, 16), read).tensors()
        sizes.append(2 * sum(tensor.nbytes for tensor in tensors.values()))
    assert sizes[0] + 127 * (sizes[1] - sizes[0]) == sizes[2]
    # The states that it is made of lie there meanwhile: three times, in fp32.
    states = 3 * ship.encoder.state_width * 4
    assert ship.adapter_bytes == sizes[2] + 128 * states
    length = len(ship.collator.read_prompt(WORDINGS[0]))
    assert ship.adapter_bytes_of([WORDINGS[1], WORDINGS[0], None]) == (
        sizes[0] + (length - 1) * (sizes[1] - sizes[0]) + length * states
    )
    assert ship.adapter_bytes_of([None]) == sizes[0] + states


def test_a_latent_that_no_text_stands_behind_is_tried_without_states() -> None:
    """As descent made its adapter, whatever text it began at."""
    ship, latent_TZ = _fusing(), torch.randn(1, 16)
    examples = [[Example("3 9 5", "9 5")]]
    alone = fit_of_latents(ship, latent_TZ, [""], examples)
    fused = fit_of_latents(ship, latent_TZ, [WORDINGS[0]], examples)
    without = fit_of_latents(ship, latent_TZ, [WORDINGS[0]], examples, [""])
    torch.testing.assert_close(without.loss_CM, alone.loss_CM)
    assert float((fused.loss_CM - alone.loss_CM).abs()) > 1e-3
    search = SearchState(tuple(examples[0]))
    [found] = latents_of(ship, search, latent_TZ, WORDINGS[0])
    assert found.loss == pytest.approx(float(alone.loss_CM), abs=1e-5)
    search.tested[WORDINGS[1]] = Candidate(
        WORDINGS[1], 0, found.loss + 1, None, None, (0.0,) * 16, "known"
    )
    assert search.result().latent_reading == "", "of descent"
    search.tested[WORDINGS[1]] = Candidate(
        WORDINGS[1], 0, found.loss - 1, None, None, (0.0,) * 16, "known"
    )
    assert search.result().latent_reading == WORDINGS[1]
