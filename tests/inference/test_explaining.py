"""`Ship.explain`: anybody's adapter in words, with what it is worth, or "none"."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ship_ds import cli
from ship_ds.api import Ship
from ship_ds.config import base_folder
from ship_ds.data.task import Example, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.export.deduce import export_one
from ship_ds.export.requests import Request
from ship_ds.inference import lora_reader
from ship_ds.inference.adapter_reading import induce_from_weights, read_adapter, read_merged
from ship_ds.inference.bank import Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.explaining import (
    Threshold,
    agreement_of,
    calibrate,
    explain_many,
    made_up,
    noise_like,
    threshold_of,
)
from ship_ds.inference.lora_reader import LoraReader, features, train_reader
from ship_ds.inference.results import Explanation
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.adapters.sites import linears_of, weight_of
from tests.model.models import tiny_lm

pytestmark = pytest.mark.slow

QUICK = InductionConfig(
    num_views=1,
    num_samples=2,
    num_beams=2,
    num_rounds=1,
    num_edits=4,
    num_splices=8,
    refine_steps=2,
    steps=4,
    num_known=24,
    num_restarts=2,
    max_new_tokens=8,
    analogies=False,
)
SAID = "remove element 2"


@pytest.fixture(scope="module")
def adapter(ship: Ship, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    export_one(ship, Request("adapter", SAID), folder, ["3 4 9"])
    return folder


@pytest.fixture(autouse=True)
def measured(ship: Ship) -> Iterator[None]:
    """What takes minutes, once a run: a threshold, and a reader that has learnt nothing."""
    size = ship.config.model.latent_size
    ship._threshold = Threshold(0.5, 1.0, 1.0, 16)
    ship._reader = LoraReader(ship.model.task_llm.sites(), size).requires_grad_(False)
    yield
    ship._threshold = ship._reader = None


def explain(ship: Ship, folder: Path, inputs: list[str]) -> Explanation:
    return ship.explain(folder, inputs, config=QUICK)


def test_a_generated_adapter_is_named_exactly(ship: Ship, adapter: Path, inputs: list[str]) -> None:
    found = explain(ship, adapter, inputs)
    best = found.candidates[0]
    assert found.instruction == best.instruction == SAID
    assert best.agreement == found.agreement and best.same == len(inputs) == len(found.inputs)
    assert "bank" in best.sources and best.distance is not None and best.distance < 1e-3
    assert list(found.answers) == ship.answer(SAID, inputs)
    assert list(found.base_answers) == ship.answer_bare(inputs)
    assert 0 < found.num_changed <= len(inputs)
    assert found.updates.keys() == ship.model.task_llm.sites().keys()
    path, norm = next(iter(found.updates.items()))
    assert norm == pytest.approx(float(_lora(ship, adapter).delta_norm(path)), rel=1e-4)


class _Dense:
    """An adapter's updates as whole matrices."""

    def __init__(self, adapter: LoraAdapter) -> None:
        self.adapter = adapter

    def delta(self, path: str) -> torch.Tensor:
        a_1RI, b_1OR = self.adapter.factors[path]
        return self.adapter.scaling * (b_1OR[0].double() @ a_1RI[0].double())

    def delta_norm(self, path: str) -> torch.Tensor:
        return self.delta(path).norm()


def _lora(ship: Ship, folder: Path) -> _Dense:
    read = read_adapter(ship.model, folder)
    assert isinstance(read, LoraAdapter)
    return _Dense(read)


def test_a_random_adapter_of_the_same_norms_is_none(
    ship: Ship, adapter: Path, inputs: list[str]
) -> None:
    lora = _lora(ship, adapter)
    noise = noise_like(lora.adapter, "one")
    for path in noise.factors:
        assert float(_Dense(noise).delta_norm(path)) == pytest.approx(
            float(lora.delta_norm(path)), rel=1e-4
        )
    assert float(noise.distance(lora.adapter)) > 1.5
    [found] = explain_many(ship.model, ship.bank, [noise], [inputs], QUICK, 6)
    assert found.instruction is None and found.candidates and found.agreement < 0.5
    assert found.num_changed > 0


def test_an_adapter_that_changes_no_answer_is_none(
    ship: Ship, adapter: Path, inputs: list[str]
) -> None:
    still = replace(_lora(ship, adapter).adapter, scaling=1e-6)
    [found] = explain_many(ship.model, ship.bank, [still], [inputs], QUICK, 6)
    assert found.num_changed == 0 and found.instruction is None and found.agreement == 0


def turned(adapter: LoraAdapter) -> LoraAdapter:
    """A -> G A, B -> B G^-1 at every site: other factors of the same updates."""
    generator, factors = torch.Generator().manual_seed(3), {}
    for path, (a_1RI, b_1OR) in adapter.factors.items():
        rank = a_1RI.shape[1]
        gauge = torch.eye(rank) + 0.1 * torch.randn(rank, rank, generator=generator)
        inverse = torch.linalg.inv(gauge.double()).float()
        factors[path] = gauge @ a_1RI, b_1OR @ inverse
    return replace(adapter, factors=factors)


def test_other_factors_of_the_same_updates_change_nothing(
    ship: Ship, adapter: Path, inputs: list[str]
) -> None:
    lora = _lora(ship, adapter).adapter
    other, sites = turned(lora), ship.model.task_llm.sites()
    path = next(iter(sites))
    assert (other.factors[path][0] - lora.factors[path][0]).norm() > 0.1
    torch.testing.assert_close(features(other, sites), features(lora, sites), atol=1e-5, rtol=1e-4)
    noise = features(noise_like(lora, "x"), sites)
    assert (noise - features(lora, sites)).norm() > 0.5 * noise.norm()
    # Of random ones it is above 1.5; what is left is rounding of sums in fp32.
    assert float(other.distance(lora)) < 1e-4
    first, second = explain_many(ship.model, ship.bank, [lora, other], [inputs] * 2, QUICK, 6)
    assert first.instruction == second.instruction == SAID
    assert first.agreement == second.agreement and first.answers == second.answers


def test_the_reader_learns_where_adapters_come_from(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A little training explains most of latents that it was not trained on; what is kept reads the
    same."""
    monkeypatch.setattr(lora_reader, "_ROUNDS", 6)
    monkeypatch.setattr(lora_reader, "_PAIRS", 256)
    known_CZ = ship.bank.latent_CZ
    # An untrained encoder's posterior is as wide as its means are far apart.
    narrow = Bank(ship.bank.instructions, known_CZ, torch.zeros_like(known_CZ))
    said: list[str] = []
    reader = train_reader(ship.model, narrow, said.append)
    assert any("training on pairs" in line for line in said)
    said.clear()
    latent_CZ = known_CZ[:12].lerp(known_CZ[12:], 0.3)
    generated = torch.cat([reader.read(ship.model.adapt(one[None])) for one in latent_CZ])
    center = known_CZ.mean(0)
    lost = (generated - latent_CZ).square().sum() / (latent_CZ - center).square().sum()
    assert float(lost) < 0.2
    # A site that the adapter leaves alone is no obstacle.
    whole = ship.model.adapt(latent_CZ[:1])
    some = replace(whole, factors=dict(list(whole.factors.items())[:-1]))
    assert reader.read(some).isfinite().all()
    assert ship._derived is not None
    ship._derived.keep_reader(reader)
    again = ship._derived.reader(ship.model.task_llm.sites(), ship.config.model.latent_size)
    assert again is not None and torch.equal(again.read(some), reader.read(some))
    assert replace(ship._derived, digest="another").reader(reader.sites, 64) is None
    (ship._derived.bundle / "derived" / "lora_reader.safetensors").unlink()


def test_the_threshold_is_measured_on_dev_and_kept(ship: Ship, inputs: list[str]) -> None:
    """The random bundle's own adapters, with noise beside them, answer more as they would alone
    than random ones do."""
    dev = [
        _task(text) for text in ("add 1", "remove every 2", "take the first 3", "remove element 4")
    ]
    found = calibrate(ship.model, ship.bank, dev, inputs[:6], QUICK, 6)
    assert found.num_tasks == 4 and 0 < found.value <= 1 and found.share_refused >= 0.75
    assert found.share_named >= 0.5
    assert calibrate(ship.model, ship.bank, dev[:3], inputs[:6], QUICK, 6).num_tasks == 0
    assert ship._derived is not None
    ship._derived.keep_threshold(found)
    assert ship._derived.threshold() == found
    assert replace(ship._derived, digest="another").threshold() is None
    (ship._derived.bundle / "derived" / "explaining_agreement.json").unlink()


def test_a_run_whose_data_are_gone_can_be_made_ready(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By half, which is not kept: the data may come back."""

    def gone(config: object) -> None:
        raise UserError("data.path: no such folder")

    monkeypatch.setattr("ship_ds.api.source_of", gone)
    monkeypatch.setattr(ship, "_threshold", None)
    assert not ship.is_ready_to_explain
    ship.prepare_to_explain()
    assert ship.is_ready_to_explain and ship.explaining_threshold().value == 0.5
    assert ship._derived is not None and ship._derived.threshold() is None
    monkeypatch.setattr(ship, "_reader", None)
    assert not ship.is_ready_to_explain, "the reader is trained first"


def test_thresholds_by_hand() -> None:
    # All apart: half way between the two.
    assert threshold_of([0.9, 0.7], [0.1, 0.3]) == Threshold(0.5, 1.0, 1.0, 2)
    # From 0.7 on one of two and none of the others; from 0.2 on all.
    assert threshold_of([0.7, 0.2], [0.2, 0.1]) == Threshold((0.2 + 0.1) / 2, 1.0, 0.5, 2)
    # Nothing agrees at all: every value parts as badly, and zero would name everything.
    assert threshold_of([0.0, 0.0], [0.0, 0.0]).value == 0.5
    # The wrong way round: below both, as the lowest would be, random adapters were named.
    assert threshold_of([0.1, 0.1], [0.2, 0.4]) == Threshold(0.5, 0.0, 1.0, 2)
    assert threshold_of([0.1, 0.1], [0.2, 0.5]) == Threshold(0.75, 0.0, 1.0, 2)


def test_agreement_by_hand() -> None:
    said, bare = ["1", "2", None, "4"], ["1", "0", "0", "0"]
    # Two of four, and one of the three that the base answers otherwise.
    assert agreement_of(["1", "2", None, "9"], said, bare) == 1 / 3
    # Those that the base gives anyway explain nothing.
    assert agreement_of(["1", "0", "0", "0"], said, bare) == 0
    assert agreement_of(["0", "2", "0", "4"], said, bare) == 2 / 4
    assert agreement_of(["1"], ["1"], ["1"]) == 0


def _task(text: str) -> SplitTask:
    example = Example("1 2", "2")
    return SplitTask(Task(text, text, (example,)), (example,), (example,))


def test_inputs_are_of_the_runs_tasks_or_made_of_its_probes(ship: Ship) -> None:
    tried = ship.inputs_to_try()
    assert tried == ship.inputs_to_try() and len(tried) == len(set(tried)) == 24
    own = {example.input for task in ship._seen() for example in task.train}
    assert set(tried) <= own
    alone = made_up([], ["3 7 1", "9 8"])
    assert alone[:2] == ["3 7 1", "9 8"] and len(set(alone)) == len(alone) > 12
    assert {word for text in alone for word in text.split()} == set("37198")
    assert made_up([], ["3 7 1", "9 8"]) == alone


def peft_model(ship: Ship, **settings: object) -> LlamaForCausalLM:
    """A random adapter by peft around what the run's Task LLM computes with."""
    model = AutoModelForCausalLM.from_pretrained(base_folder(ship.config.model.task_llm.base))
    with torch.no_grad():
        for path, linear in linears_of(ship.model.task_llm.lm).items():
            model.get_submodule(path).weight.copy_(weight_of(linear))
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    # As after training: else a DoRA's magnitudes are those of the weights.
    for name, parameter in tuned.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
    return tuned.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["up_proj"]},
        {"r": 4, "lora_alpha": 4, "use_dora": True, "target_modules": ["v_proj", "o_proj"]},
        {
            "r": 4,
            "lora_alpha": 4,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.gate_proj": 6},
            "alpha_pattern": {"gate_proj": 9},
            "target_modules": ["q_proj", "gate_proj"],
        },
    ],
    ids=["fewer modules", "rank-stabilised", "dora", "patterns"],
)
def test_an_adapter_of_peft_answers_as_with_peft(
    ship: Ship, tmp_path: Path, settings: dict[str, object]
) -> None:
    """Logits of the Task LLM under what was read, against peft's own forward."""
    tuned = peft_model(ship, **settings)
    tuned.save_pretrained(tmp_path)
    read = read_adapter(ship.model, tmp_path)
    assert {path.rpartition(".")[2] for path in read.update_norms()} == set(
        settings["target_modules"]  # type: ignore[call-overload]
    )
    batch = ship.model.task_batch(["3 4 9", "1 2"], None, ["", ""])
    with torch.no_grad():
        ours = ship.model.task_llm.logits(read, batch)
        bare = ship.model.task_llm.logits(None, batch)
        theirs = tuned(input_ids=batch.ids_ES, attention_mask=batch.real_ES.long()).logits
    real = batch.real_ES
    torch.testing.assert_close(ours[real], theirs[real], atol=2e-3, rtol=1e-3)
    assert (ours[real] - bare[real]).abs().max() > 0.1


def test_a_merged_model_is_read_as_what_was_merged(
    ship: Ship, adapter: Path, tmp_path: Path, inputs: list[str]
) -> None:
    lora = _lora(ship, adapter)
    base = base_folder(ship.config.model.task_llm.base)
    for number, weights in enumerate(("own", "as computed")):
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            for path, linear in linears_of(ship.model.task_llm.lm).items():
                weight = model.get_submodule(path).weight
                if weights == "as computed":
                    weight.copy_(weight_of(linear))
                weight += lora.delta(path).float()
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        read = read_merged(ship.model, folder)
        assert isinstance(read, LoraAdapter)
        for path in lora.adapter.factors:
            torch.testing.assert_close(
                _Dense(read).delta(path), lora.delta(path), atol=1e-4, rtol=1e-3
            )
    found = ship.explain(folder, inputs, merged=True, config=QUICK)
    assert found.instruction == SAID
    with pytest.raises(UserError, match="every weight is the base's"):
        read_merged(ship.model, base)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    model.save_pretrained(tmp_path / "embeddings")
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is another one than"):
        read_merged(ship.model, tmp_path / "embeddings")
    tiny_lm("llama").save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="a model of another base"):
        read_merged(ship.model, tmp_path / "tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", "another base model"),
        ("path", "another base model"),
        ("magnitude", "has lora_A, lora_B; expected lora_A, lora_B and lora_magnitude_vector"),
        ("kind", "peft_type is IA3; expected LORA"),
        ("empty", "no adapter here"),
        ("half", "cannot be read"),
        ("bias", "bias is 'all'"),
        ("b", "down_proj: has lora_A; expected lora_A and lora_B"),
        ("nan", r"down_proj\.lora_B\.weight has values that are no finite numbers"),
        ("embeddings", "adapts model.embed_tokens, which is none of the"),
        ("list", "expected a JSON object"),
        ("deep", "nested too deeply"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(
    ship: Ship, adapter: Path, tmp_path: Path, change: str, message: str
) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    site = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    if change == "shape":
        tensors = {
            name: torch.zeros(tensor.shape[0], tensor.shape[1] + ("lora_A" in name))
            for name, tensor in tensors.items()
        }
    if change == "path":
        tensors = {
            name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()
        }
    if change == "embeddings":
        tensors = {
            name.replace("layers.0.mlp.down_proj", "embed_tokens"): tensor
            for name, tensor in tensors.items()
        }
    if change == "b":
        tensors.pop(site)
    if change == "nan":
        tensors[site][0, 0] = torch.nan
    settings |= {
        "magnitude": {"use_dora": True},
        "kind": {"peft_type": "IA3"},
        "bias": {"bias": "all"},
    }.get(change, {})
    text = {"list": "[]", "deep": "[" * 100_000}.get(change, json.dumps(settings))
    if change != "empty":
        (tmp_path / "adapter_config.json").write_text(text)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    if change == "half":
        (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match=message) as caught:
        ship.explain(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_ours_for_other_weights_of_the_same_shape_is_one_line(
    ship: Ship, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    origin = json.loads((adapter / "ship.json").read_text())
    (tmp_path / "adapter" / "ship.json").write_text(
        json.dumps(origin | {"base_fingerprint": "0" * 64})
    )
    with pytest.raises(
        UserError, match="made for embedded with fingerprint 000000000000.* another base model"
    ):
        ship.explain(tmp_path / "adapter")


def test_the_weights_alone_lead_back_to_the_instruction(ship: Ship, adapter: Path) -> None:
    lora = _lora(ship, adapter).adapter
    found = induce_from_weights(ship.model, ship.bank, lora, QUICK)
    assert found.instruction == SAID and found.candidates[0].distance < 1e-3
    assert found.candidates[1].distance > 1e-2 and found.latent_distance < 1e-2


def test_the_verb_says_it_in_words_and_as_json(
    ship: Ship,
    bundle: Path,
    adapter: Path,
    inputs: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ship._derived is not None and ship._threshold is not None and ship._reader is not None
    # As an earlier call would have left them.
    ship._threshold = replace(ship._threshold, value=0.4)  # another one than where none is kept
    ship._derived.keep_threshold(ship._threshold)
    ship._derived.keep_reader(ship._reader)
    few = ["num_known=24", "num_rounds=0", "num_views=1", "num_samples=1", "steps=2"]
    command = ["explain", str(adapter), "--run", str(bundle), "--input", *inputs[:6]]
    command += [part for one in few for part in ("--set", one)]
    assert cli.main([*command, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["instruction"] == SAID == row["candidates"][0]["instruction"]
    assert [one["input"] for one in row["answers"]] == inputs[:6]
    assert row["threshold"] == 0.4 <= row["agreement"]
    assert cli.main(command) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{adapter}: {SAID}"
    assert second.startswith(f"  {SAID!r}: its own adapter gives 6 of the 6 answers")
    num_layers = ship.model.task_llm.lm.config.num_hidden_layers
    assert any(f"q_proj ({num_layers})" in line for line in rest)
    for name in ("explaining_agreement.json", "lora_reader.safetensors"):
        (ship._derived.bundle / "derived" / name).unlink()


def test_lora_of_other_modules_counts_in_the_distance(ship: Ship, adapter: Path) -> None:
    whole = _lora(ship, adapter).adapter
    path = next(iter(whole.factors))
    without = replace(whole, factors={p: f for p, f in whole.factors.items() if p != path})
    size = sum(norm**2 for norm in whole.update_norms().values())
    missed = whole.update_norms()[path] ** 2 / size
    assert float(without.distance(whole)) == pytest.approx(missed, rel=1e-3)
