"""Adapters of two kinds at once: a folder of `peft` each, which together do what the live one
does, merged or not."""

import asyncio
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ship_ds import cli
from ship_ds.bundle import check_merges, frozen_bases, write_bundle
from ship_ds.cli.checks import check_explained, check_has_file_format, check_sums
from ship_ds.config import ModelConfig, base_folder, parse_config
from ship_ds.errors import UserError
from ship_ds.export.compose import compose
from ship_ds.export.convert import merge_into
from ship_ds.export.deduce import export_many, export_one
from ship_ds.export.merge import Merge
from ship_ds.export.peft_adapter import live_logits
from ship_ds.export.proof import PeftBase
from ship_ds.export.requests import Request
from ship_ds.files import write_json
from ship_ds.inference import lora_reader
from ship_ds.inference.adapter_reading import read_adapter
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import answer_latents, answer_under
from ship_ds.model.adapters.combination import Combination, CombinedAdapter
from ship_ds.model.loading import load_lm
from ship_ds.origin import read_origin
from ship_ds.prompt import describe_roles
from ship_ds.serving.vllm_plugin import InstructionResolver
from tests.export.models import FAMILIES, PROBES, make_base, make_ship, make_t5_base

pytestmark = pytest.mark.slow

TEXTS = ("put 7 at the front", "reverse the list", "put 7 at the front of the list")
LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 6, "width": 32}
SPARSE: dict[str, Any] = {"kind": "sparse", "rank": 3, "width": 32, "num_blocks": 1}
FUSED: dict[str, Any] = {"kind": "block_fusion"}
PREFIX: dict[str, Any] = {"kind": "prefix", "length": 3, "width": 32}
PROMPT: dict[str, Any] = {"kind": "soft_prompt", "num_virtual_tokens": 2, "width": 32}
# The order of a config is none of loading: peft puts what stands before the prompt around the rest.
PAIRS = {
    "lora and block_fusion": ([LORA, FUSED], ["lora", "prefix"]),
    "prefix and lora": ([PREFIX, LORA], ["lora", "prefix"]),
    "sparse and soft_prompt": ([SPARSE, PROMPT], ["shira", "prompt"]),
}


def combined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"kind": "combination", "parts": parts}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_folders_side_by_side_equal_the_live_adapter(
    family: str, pair: str, tmp_path: Path
) -> None:
    """Several in one go, of texts of three lengths, and one of them again, the second of two.

    Either folder alone is far from the live adapter, and the outer one is none that peft loads."""
    parts, names = PAIRS[pair]
    ship = make_ship(make_base(tmp_path / "base", family), **combined(parts))
    requests = [Request(f"r{number}", text) for number, text in enumerate(TEXTS)]
    batch = export_many(ship, requests, tmp_path / "many", PROBES)
    assert batch.worst.from_live <= 1e-4 < 0.1 < batch.worst.from_base
    # Encoded together, as the export did: alone, a text's z rounds otherwise.
    adapters = ship.model.adapt(ship.model.encode(list(TEXTS)), list(TEXTS))
    for number in range(len(TEXTS)):
        folder = tmp_path / "many" / f"r{number}"
        origin = read_origin(folder)
        assert list(origin.folders) == names and not (folder / "adapter_config.json").exists()
        card = (folder / "README.md").read_text()
        assert f'get_base_model(), "THIS_FOLDER/{names[1]}")' in card
        own = adapters.rows(torch.tensor([number]))
        live = [live_logits(ship, own, ids) for ids in origin.probes]
        assert _difference(_by_peft(ship, folder, names, origin.probes), live) <= 1e-4
        for name in names:
            assert _difference(_by_peft(ship, folder, [name], origin.probes), live) > 0.01


def _by_peft(
    ship: Any, folder: Path, names: list[str], probes: list[list[int]]
) -> list[torch.Tensor]:
    """As the card says, on the base in the dtype and quantisation of the run."""
    config = ship.config.model.task_llm
    device = torch.device("cpu")
    model: Any = load_lm(config.base, config.quantisation, torch.float32, device=device)
    for name in names:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        model = PeftModel.from_pretrained(inner, str(folder / name)).eval()
    with torch.no_grad():
        found = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in probes]
    return [logits[-len(ids) :] for logits, ids in zip(found, probes, strict=True)]


def _difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def test_folders_are_read_back(tmp_path: Path) -> None:
    """Both together do what was written; one alone, or anybody's LoRA, is that part; and what no
    part can be is one line."""
    ship = make_ship(make_base(tmp_path / "base"), **combined([LORA, FUSED]))
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    probes = read_origin(tmp_path / "a").probes
    adapter = ship.model.adapt(ship.model.encode([TEXTS[0]]), [TEXTS[0]])
    live = [live_logits(ship, adapter, ids) for ids in probes]
    read = ship.model.read_adapter(tmp_path / "a")
    assert isinstance(read, CombinedAdapter) and len(read.parts) == 2
    assert _difference([live_logits(ship, read, ids) for ids in probes], live) <= 1e-4
    assert set(read.update_norms()) == set(ship.model.task_llm.sites())
    for name in ("lora", "prefix"):
        alone = ship.model.read_adapter(tmp_path / "a" / name)
        made = [live_logits(ship, alone, ids) for ids in probes]
        by_peft = _by_peft(ship, tmp_path / "a", [name], probes)
        assert _difference(made, by_peft) <= 1e-4
    # By what can be compared: z makes the LoRA, the text the prefix.
    [own, other] = ship.model.encode([TEXTS[0], TEXTS[1]])
    assert float(ship.model.adapt(own[None]).distance(read)) < 1e-6
    assert float(ship.model.adapt(other[None]).distance(read)) > 0.01
    with pytest.raises(UserError, match="cannot be compared by their weights"):
        ship.model.adapt(own[None]).distance(ship.model.read_adapter(tmp_path / "a" / "prefix"))
    settings = json.loads((tmp_path / "a/lora/adapter_config.json").read_text())
    for found, message in (("IA3", "expected one of LORA"), ("SHIRA", "is of shira, and this run")):
        write_json(tmp_path / "a/lora/adapter_config.json", settings | {"peft_type": found})
        with pytest.raises(UserError, match=message):
            ship.model.read_adapter(tmp_path / "a" / "lora")
    with pytest.raises(UserError, match="no folder of lora and prefix in it"):
        ship.model.read_adapter(tmp_path / "base")


def test_a_run_of_one_kind_says_which_folder_it_can_read(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    ship = make_ship(base, **combined([LORA, FUSED]))
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    for kind in (LORA, PREFIX):
        with pytest.raises(UserError, match="no adapter_config.json.*: give lora or prefix in it"):
            make_ship(base, **kind).model.read_adapter(tmp_path / "a")


def test_a_part_alone_has_no_places_for_virtual_tokens(tmp_path: Path) -> None:
    """The run's prompts have them: they would be there, and empty."""
    ship = make_ship(make_base(tmp_path / "base"), **combined([LORA, PROMPT]))
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    read = ship.model.read_adapter(tmp_path / "a")
    answers = answer_under(ship.model, read, "", list(PROBES), 6)
    assert (
        answers
        == answer_latents(ship.model, ship.model.encode([TEXTS[0]]), [TEXTS[0]], [list(PROBES)], 6)[
            0
        ]
    )
    with pytest.raises(UserError, match="has no virtual tokens, which this run's adapters have"):
        ship.model.read_adapter(tmp_path / "a" / "lora")


def test_a_part_alone_is_of_the_same_base(tmp_path: Path) -> None:
    """The record lies in the folder around it."""
    parts = combined([LORA, FUSED])
    ship = make_ship(make_base(tmp_path / "base"), **parts)
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    other = make_ship(make_base(tmp_path / "other", seed=1), **parts)
    for name in ("", "lora", "prefix"):
        read_adapter(ship.model, tmp_path / "a" / name)
        with pytest.raises(UserError, match="an adapter of another base model"):
            read_adapter(other.model, tmp_path / "a" / name)


def test_an_adapter_of_two_folders_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its answers, and by the weights of the part that z makes."""
    monkeypatch.setattr(lora_reader, "_ROUNDS", 2)
    ship = make_ship(make_base(tmp_path / "base"), **combined([LORA, FUSED]))
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    config = InductionConfig(num_samples=2, num_beams=2, steps=2, num_rounds=0)
    check_explained(tmp_path / "a", is_merged=False)
    found = ship.explain(tmp_path / "a", PROBES, config=config)
    assert len(found.inputs) == len(PROBES) and found.threshold == 0.5


def test_peft_writes_on_as_the_live_adapter_does(tmp_path: Path) -> None:
    """`generate` keeps keys and values behind the prefix; the live one reads all anew."""
    ship = make_ship(make_base(tmp_path / "base"), quantisation="none", **combined([LORA, FUSED]))
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(tmp_path / "a" / "lora"))
    model = PeftModel.from_pretrained(model.get_base_model(), str(tmp_path / "a" / "prefix")).eval()
    adapter = ship.model.adapt(ship.model.encode([TEXTS[0]]), [TEXTS[0]])
    for ids in read_origin(tmp_path / "a").probes:
        expected = list(ids)
        for _ in range(6):
            expected.append(int(live_logits(ship, adapter, expected)[-1].argmax()))
        written = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False)
        assert written[0].tolist() == expected


@torch.no_grad()
def test_the_bare_base_is_under_none_of_the_folders(tmp_path: Path) -> None:
    """Asked of prompts that it was not asked of before they were loaded."""
    ship = make_ship(make_base(tmp_path / "base"), **combined([LORA, FUSED]))
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    cpu, ids = torch.device("cpu"), [[5, 9, 20, 7]]
    fresh, loaded = (
        PeftBase(load_lm(str(tmp_path / "base"), "nf4", torch.float32, device=cpu), cpu)
        for _ in range(2)
    )
    loaded.load([tmp_path / "a" / "lora", tmp_path / "a" / "prefix"])
    assert torch.equal(loaded.bare(ids)[0], fresh.bare(ids)[0])
    assert not torch.equal(loaded.under([tmp_path / "a" / "lora"], ids)[0], fresh.bare(ids)[0])


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
def test_the_merged_model_takes_the_other_folder_along(quantisation: str, tmp_path: Path) -> None:
    ship = make_ship(
        make_base(tmp_path / "base"), quantisation=quantisation, **combined([LORA, FUSED])
    )
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    merge = Merge(tmp_path / "a", dtype="float32")
    report = merge_into(tmp_path / "merged", merge, True)
    assert report["around"] == ["prefix"] and report["drift_of_effect"] < 1e-3
    settings = json.loads((tmp_path / "merged/prefix/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((tmp_path / "merged").resolve())
    assert "prefix/ is the adapter's other part" in (tmp_path / "merged/README.md").read_text()


def test_another_prefix_than_the_one_proved_is_no_merge(tmp_path: Path) -> None:
    ship = make_ship(make_base(tmp_path / "base"), **combined([LORA, FUSED]))
    for name, text in (("a", TEXTS[0]), ("b", TEXTS[1])):
        export_one(ship, Request(name, text), tmp_path / name, PROBES)
    weights = "prefix/adapter_model.safetensors"
    (tmp_path / "a" / weights).write_bytes((tmp_path / "b" / weights).read_bytes())
    with pytest.raises(
        UserError, match="prefix/.*safetensors: not the file that its ship.json lists"
    ):
        Merge(tmp_path / "a")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", ""])
def test_half_an_adapter_is_told_before_anything_is_merged_or_read(
    missing: str, tmp_path: Path
) -> None:
    """Copied without its prefix, or without a file of that; or with one of another kind."""
    ship = make_ship(make_base(tmp_path / "base"), **combined([LORA, FUSED]))
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    prefix = tmp_path / "a" / "prefix"
    if missing:
        (prefix / missing).unlink()
    else:
        shutil.rmtree(prefix)
    for use in (lambda: Merge(tmp_path / "a"), lambda: ship.model.read_adapter(tmp_path / "a")):
        with pytest.raises(UserError, match="prefix/adapter_.*: is missing; export"):
            use()
    shutil.rmtree(prefix, ignore_errors=True)
    shutil.copytree(tmp_path / "a" / "lora", prefix)
    for use in (lambda: Merge(tmp_path / "a"), lambda: ship.model.read_adapter(tmp_path / "a")):
        with pytest.raises(UserError, match="peft_type is 'LORA'; expected 'PREFIX_TUNING'"):
            use()


def test_a_batch_that_was_killed_keeps_what_is_whole(tmp_path: Path) -> None:
    """A folder whose prefix is of another text is written again."""
    ship = make_ship(make_base(tmp_path / "base"), **combined([LORA, FUSED]))
    requests = [Request(f"r{number}", text) for number, text in enumerate(TEXTS)]
    export_many(ship, requests, tmp_path / "many", PROBES)
    (tmp_path / "many").rename(tmp_path / "many.part")
    weights = "prefix/adapter_model.safetensors"
    part = tmp_path / "many.part"
    (part / "r0" / weights).write_bytes((part / "r1" / weights).read_bytes())
    shutil.rmtree(part / "r2" / "prefix")
    batch = export_many(ship, requests, tmp_path / "many", PROBES)
    assert (batch.num_written, batch.num_kept) == (2, 1)
    assert batch.worst.from_live <= 1e-4


def test_a_rank_is_padded_and_a_sum_refused(tmp_path: Path) -> None:
    ship = make_ship(make_base(tmp_path / "base"), **combined([PREFIX, LORA]))
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES, pad_to=8)
    assert json.loads((tmp_path / "a/lora/adapter_config.json").read_text())["r"] == 8
    with pytest.raises(UserError, match="a sum of such adapters means nothing"):
        compose(ship, [(1.0, TEXTS[0])], tmp_path / "b", PROBES)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([LORA, SPARSE], "two kinds, one that changes linears"),
        ([PREFIX, PROMPT], "two kinds, one that changes linears"),
        ([LORA, PREFIX, PROMPT], "two kinds, one that changes linears"),
        ([{"kind": "bottleneck", "rank": 2, "width": 8}, PREFIX], "no file format"),
    ],
)
def test_what_cannot_leave_says_so(
    parts: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    ship = make_ship(make_base(tmp_path / "base"), **combined(parts))
    kind = type(ship.model.hypernetwork)
    assert message in str(kind.cannot_leave(ship.config.model.hypernetwork))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"deduce: .*{message}"):
        export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_no_format_is_told_by_the_config_alone(tmp_path: Path) -> None:
    """`deduce`, `compose` and `convert` ask before a model is loaded: here there is none."""
    settings = {
        "combination": combined([LORA, {"kind": "bottleneck", "rank": 2}]),
        "bottleneck": {"kind": "bottleneck", "rank": 2},
        "fused": combined([LORA, FUSED]),
        "lora": LORA,
        "prompt": PROMPT,
    }
    for name, section in settings.items():
        (tmp_path / name).mkdir()
        values = {"run": {"folder": "x"}, "training": {"steps": 1}}
        config = parse_config(values | {"model": {"hypernetwork": section}}, "test")
        write_json(tmp_path / name / "config.json", config.model_dump(mode="json"))
    for name in ("combination", "bottleneck"):
        with pytest.raises(UserError, match=f"deduce: {tmp_path / name}: .*no file format"):
            check_has_file_format("deduce", tmp_path / name)
    for name in ("fused", "lora"):
        check_has_file_format("deduce", tmp_path / name)
        check_merges("convert", tmp_path / name)
    with pytest.raises(UserError, match=f"convert: {tmp_path / 'prompt'}: .*nothing to merge"):
        check_merges("convert", tmp_path / "prompt")


def test_a_kind_of_somebody_elses_leaves_alone_unless_it_says_as_what(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = importlib.import_module("tests.toys.adapter").DiagonalCore
    monkeypatch.setattr(kind, "leaves", None)
    parts = [{"kind": "diagonal_core"}, PREFIX]
    config = ModelConfig.model_validate({"hypernetwork": combined(parts)}).hypernetwork
    assert "two kinds" in str(Combination.cannot_leave(config))  # type: ignore[arg-type]
    monkeypatch.setattr(kind, "leaves", "lora")
    assert Combination.cannot_leave(config) is None  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fused_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Around the embedded base."""
    ship = make_ship("embedded", **combined([LORA, FUSED]))
    folder = tmp_path_factory.mktemp("run") / "bundle"
    state = {
        name: parameter.detach()
        for name, parameter in ship.model.named_parameters()
        if parameter.requires_grad
    }
    form = describe_roles(vars(ship.model.collator.prompts))
    bases = frozen_bases(ship.config)
    write_bundle(folder, state, ship.config, form, bases, [TEXTS[1]], list(PROBES))
    return folder


def test_from_a_bundle_to_merged_models_in_one_command(
    fused_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the line that says that half of it stands beside the weights."""
    command = ["convert", str(fused_bundle), "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--instruction", TEXTS[0], "--target", "dequantised", "--dtype", "float32"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    [merged] = (tmp_path / "out" / "merged").iterdir()
    assert (merged / "prefix" / "adapter_config.json").is_file()
    assert f"from_pretrained(model, '{merged / 'prefix'}')" in said
    assert "100 % of next tokens are the same" in said


def test_a_sum_is_refused_by_the_config_alone(fused_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compose: .*a sum of such adapters means nothing"):
        check_sums(fused_bundle)
    for section in ({"kind": "bottleneck", "rank": 2}, PREFIX, PROMPT, LORA, SPARSE):
        (tmp_path / section["kind"]).mkdir()
        values = {"run": {"folder": "x"}, "training": {"steps": 1}}
        config = parse_config(values | {"model": {"hypernetwork": section}}, "test")
        write_json(tmp_path / section["kind"] / "config.json", config.model_dump(mode="json"))
    for name in ("bottleneck", "prefix", "soft_prompt"):
        with pytest.raises(UserError, match="no file format|a sum of such adapters"):
            check_sums(tmp_path / name)
    for name in ("lora", "sparse"):
        check_sums(tmp_path / name)


def test_vllm_is_given_no_half_of_an_adapter(
    fused_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = str(base_folder("embedded"))
    made = asyncio.run(InstructionResolver(fused_bundle).resolve_lora(base, f"ship:{TEXTS[0]}"))
    assert made is None and "its adapters are no LoRAs, and vLLM serves no others" in caplog.text


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "bottleneck"])
def test_a_record_names_no_folder_of_its_own(name: str, tmp_path: Path) -> None:
    """`ship.json` may be somebody else's."""
    ship = make_ship(make_base(tmp_path / "base"), **combined([LORA, FUSED]))
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    record = json.loads((tmp_path / "a" / "ship.json").read_text())
    write_json(tmp_path / "a" / "ship.json", record | {"folders": ["lora", name]})
    with pytest.raises(UserError, match="ship.json: folders.*export the adapter again"):
        Merge(tmp_path / "a")


def test_a_prefix_of_two_stacks_leaves_nothing(tmp_path: Path) -> None:
    """Its LoRA was written already."""
    lora = LORA | {"targets": ["all-linear"]}
    base = make_t5_base(tmp_path / "base")
    ship = make_ship(base, quantisation="none", **combined([lora, PREFIX]))
    with pytest.raises(UserError, match="prefixes stand in the writing stack alone"):
        export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
