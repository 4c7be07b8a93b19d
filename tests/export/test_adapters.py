"""Adapters out of the hypernetwork: equal to the live ones for every shape, many in one go,
composed, and never useless."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from ship_ds import cli
from ship_ds.data.task import Example, Reading
from ship_ds.errors import UserError
from ship_ds.export.compose import compose
from ship_ds.export.deduce import export_many, export_one, generate
from ship_ds.export.peft_adapter import Exporter, live_logits, max_difference
from ship_ds.export.requests import Request, read_latents
from ship_ds.lora_folder import add, read_lora
from ship_ds.model.adapters.lora import LoraExport
from ship_ds.model.loading import load_lm
from ship_ds.model.rotation import rotated_by
from tests.export.models import FAMILIES, PROBES, make_base, make_ship
from tests.inference.conftest import random_bundle

pytestmark = pytest.mark.slow

TEXTS = ("put 7 at the front", "reverse the list", "keep the numbers greater than 4")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_equals_the_live_adapter_for_every_shape(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """All seven projections, grouped-query attention; NF4 as trained, padded as vLLM wants it."""
    ship = make_ship(make_base(tmp_path / "base", family, tied))
    proof = export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES, pad_to=8)
    assert proof.from_live <= 1e-4 < 0.1 < proof.from_base
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 12) and len(
        settings["target_modules"]
    ) == 7
    assert len(load_file(tmp_path / "a" / "adapter_model.safetensors")) == 2 * 2 * 7


def test_card_and_record_say_where_it_comes_from(tmp_path: Path) -> None:
    """Of a saved latent, whose text may have words that the embedded base has none for."""
    ship = make_ship("embedded")
    latent_Z = ship.model.encode(["reverse the list"])[0]
    export_one(ship, Request("a", 'two lines\nand "quotes"', latent_Z), tmp_path / "a", PROBES)
    card = (tmp_path / "a" / "README.md").read_text()
    assert '- ask with "<user> input 3 1 <assistant>", the input in the place of `3 1`' in card
    assert '    model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n' in card
    for part in (
        r'instruction: "two lines\nand \"quotes\""',
        "base: embedded",
        "runs/none",
        "0" * 64,
        "rank 4, scaling 1.5",
    ):
        assert part in card
    record = json.loads((tmp_path / "a" / "ship.json").read_text())
    assert (
        record["quantisation"] == "nf4" and len(record["probes"]) == 2 and record["adapter"] in card
    )


@pytest.mark.parametrize("kind", ["soft_prompt", "reshape"])
def test_soft_prompts_leave_as_prompt_tuning(kind: str, tmp_path: Path) -> None:
    ship = make_ship(make_base(tmp_path / "base"), kind=kind, num_virtual_tokens=1)
    proof = export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    assert proof.from_live <= 1e-4 < proof.from_base
    with pytest.raises(UserError, match="has no rank"):
        export_one(ship, Request("a", TEXTS[0]), tmp_path / "b", PROBES, pad_to=8)
    with pytest.raises(UserError, match="soft prompt.*a sum of such adapters means nothing"):
        compose(ship, [(1.0, TEXTS[0])], tmp_path / "b", PROBES)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a"}


@pytest.mark.parametrize(
    ("kind", "quantisation"), [("prefix", "nf4"), ("layer_prompt", "nf4"), ("layer_prompt", "none")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_leave_as_prefix_tuning(
    family: str, kind: str, quantisation: str, tmp_path: Path
) -> None:
    """Where `peft` has the prompt begin behind the prefix, keys are turned on by as much."""
    base = make_base(tmp_path / "base", family)
    ship = make_ship(base, quantisation=quantisation, kind=kind, length=3)
    proof = export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    assert proof.from_live <= 1e-4 < 0.1 < proof.from_base
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["num_virtual_tokens"]) == ("PREFIX_TUNING", 3)
    assert "prefix, 3 keys and values in each of 2 blocks" in (tmp_path / "a/README.md").read_text()
    with pytest.raises(UserError, match="prefix.*a sum of such adapters means nothing"):
        compose(ship, [(1.0, TEXTS[0])], tmp_path / "b", PROBES)


def test_fused_states_leave_as_a_prefix_as_long_as_the_text(tmp_path: Path) -> None:
    """A latent alone has no states, and is told so before a folder is there."""
    ship = make_ship(make_base(tmp_path / "base"), kind="fusion", width=16)
    requests = [Request("a", TEXTS[0]), Request("b", "put 7 at the front of the list")]
    lengths = [
        len(ship.model.encoder_prompts.encoder_prompt(str(one.instruction))) for one in requests
    ]
    assert lengths[0] != lengths[1]
    for request, length in zip(requests, lengths, strict=True):
        proof = export_one(ship, request, tmp_path / request.name, PROBES)
        assert proof.from_live <= 1e-4 < proof.from_base
        settings = json.loads((tmp_path / request.name / "adapter_config.json").read_text())
        assert settings["num_virtual_tokens"] == length
    latent_Z = torch.tensor(ship.encode(TEXTS[0]))
    with pytest.raises(UserError, match="which a latent has not"):
        export_one(ship, Request("c", None, latent_Z), tmp_path / "c", PROBES)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a", "b"}


def test_a_prefix_of_a_model_without_rotations_has_no_folder() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=5, n_positions=9))
    with pytest.raises(UserError, match="GPT2LMHeadModel: its positions are not rotated"):
        rotated_by(model, torch.zeros(2, 3, 4), 3)


@pytest.mark.parametrize(
    ("hypernetwork", "message"),
    [
        ({"kind": "bottleneck", "rank": 2}, "deduce: .* no file format"),
        (
            {"kind": "combination", "parts": [{"kind": "lora"}, {"kind": "bottleneck"}]},
            "deduce: .* no file format",
        ),
    ],
)
def test_kinds_without_a_folder_say_so(
    hypernetwork: dict[str, object], message: str, tmp_path: Path
) -> None:
    ship = make_ship(make_base(tmp_path / "base"), **hypernetwork)
    with pytest.raises(UserError, match=message):
        export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    assert len(ship.answer(TEXTS[0], ["3 9 5"])) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_examples_become_a_proved_folder(tmp_path: Path) -> None:
    """Read in one pass; the card says of what it is made."""
    reads = {"max_examples": 2, "drop_instruction": 0.5}
    ship = make_ship("embedded", encoder=reads)
    read = ship.read([("3 1", "1 3")])
    request = Request("a", None, torch.tensor(read.latent), "1 example, of which nothing is read")
    proof = export_one(ship, request, tmp_path / "a", PROBES)
    assert proof.from_live <= 1e-4 < proof.from_base
    assert "1 example, of which nothing is read" in (tmp_path / "a" / "README.md").read_text()
    for other, message in (
        (make_ship("embedded"), "reads instructions alone"),
        (make_ship("embedded", encoder={"max_examples": 2}), "always read an instruction"),
    ):
        with pytest.raises(UserError, match=f"examples: this run's encoder {message}"):
            other.read([("3 1", "1 3")])


def test_inputs_without_targets_become_a_proved_folder(tmp_path: Path) -> None:
    """The encoder sees no target, not even an empty one."""
    reads = {"max_examples": 2, "drop_instruction": 0.5, "drop_targets": 0.5}
    ship = make_ship("embedded", encoder=reads)
    read = ship.read(inputs=["3 1", "4"])
    reading = Reading(None, (Example("3 1", "1 3"), Example("4", "4")), states_targets=False)
    torch.testing.assert_close(torch.tensor(read.latent), ship.model.encode([reading])[0])
    assert read.latent != ship.read([("3 1", "1 3"), ("4", "4")]).latent
    request = Request("a", None, torch.tensor(read.latent), "2 inputs", read.reading)
    proof = export_one(ship, request, tmp_path / "a", PROBES)
    assert proof.from_live <= 1e-4 < proof.from_base
    with pytest.raises(UserError, match="give examples, or inputs"):
        ship.read([("3 1", "1 3")], inputs=["3"])
    with pytest.raises(UserError, match=r"inputs: .*drop_targets=0\): give examples"):
        make_ship("embedded", encoder=reads | {"drop_targets": 0}).read(inputs=["3"])


def test_a_saved_latent_makes_the_same_adapter(tmp_path: Path) -> None:
    ship = make_ship("embedded")
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    [request] = read_latents(tmp_path / "a" / "latent.safetensors", ship.digest, 64)
    export_one(ship, request, tmp_path / "b", PROBES)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(one[key].equal(two[key]) for key in one)


@pytest.mark.slow
def test_many_are_what_they_are_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship = make_ship("embedded")
    two = 2 * ship.model.adapter_bytes
    monkeypatch.setattr("ship_ds.model.budget.bytes_free", lambda device: two)
    batch = export_many(
        ship, [Request(f"r{i}", text) for i, text in enumerate(TEXTS)], tmp_path / "many", PROBES
    )
    assert (batch.num_written, batch.num_kept) == (
        3,
        0,
    ) and batch.worst.from_live <= 1e-4 < batch.worst.from_base
    for i, text in enumerate(TEXTS):
        [(_, alone)] = generate(ship, [Request("x", text)])
        assert isinstance(alone, LoraExport)
        for path, (a_RI, b_OR) in read_lora(tmp_path / "many" / f"r{i}").factors.items():
            torch.testing.assert_close((a_RI, b_OR), alone.lora.factors[path])


def test_a_batch_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    ship, requests = make_ship("embedded"), [Request(f"r{i}", text) for i, text in enumerate(TEXTS)]

    def cut_off(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_many(ship, requests, tmp_path / "many", PROBES, each=cut_off)
    assert not (tmp_path / "many").exists()
    with (tmp_path / "many.part" / "r1" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)
    batch = export_many(ship, requests, tmp_path / "many", PROBES)
    assert (batch.num_written, batch.num_kept) == (2, 1)
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["r0", "r1", "r2"]
    assert not (tmp_path / "many.part").exists()


def test_what_a_killed_batch_of_others_left_is_no_part_of_this_one(tmp_path: Path) -> None:
    ship, part = make_ship("embedded"), tmp_path / "many.part"
    requests = [Request(f"r{i}", text) for i, text in enumerate(TEXTS)]

    def cut_off(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_many(ship, requests, tmp_path / "many", PROBES, each=cut_off)
    (part / "r2.part").mkdir()  # as where it was killed while it wrote
    (part / "r2.part" / "adapter_config.json").write_text("{")
    batch = export_many(ship, requests[1:2], tmp_path / "many", PROBES)
    assert (batch.num_written, batch.num_kept) == (0, 1)
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["r1"]


def test_keys_that_match_nothing_fail_the_proof_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silent failure that the proof is for; also for the second folder of a batch, whose
    modules are there already."""
    ship = make_ship("embedded")
    own = LoraExport.write
    written: list[Path] = []

    def renamed(self: LoraExport, part: Path, base: str, lm: torch.nn.Module) -> None:
        written.append(part)
        if len(written) == 2:
            factors = {
                path.replace("layers", "blocks"): pair for path, pair in self.lora.factors.items()
            }
            self = LoraExport(type(self.lora)(factors, self.lora.scaling))
        own(self, part, base, lm)

    monkeypatch.setattr(LoraExport, "write", renamed)
    with pytest.raises(UserError, match="nothing was written"):
        export_many(
            ship, [Request("a", TEXTS[0]), Request("b", TEXTS[1])], tmp_path / "many", PROBES
        )
    assert len(written) == 2 and not list(tmp_path.iterdir())


def test_a_thousandth_more_fails_the_proof_however_much_the_adapter_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound grows with what the adapter changes, and so does what is wrong with it."""
    assert [max_difference(one) for one in (0.5, 15.0)] == pytest.approx([1e-4, 1.5e-3])
    ship = make_ship("embedded", std=1.0)
    assert export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES).from_base > 1
    own = LoraExport.write

    def louder(self: LoraExport, part: Path, base: str, lm: torch.nn.Module) -> None:
        own(LoraExport(replace(self.lora, scaling=1.001 * self.lora.scaling)), part, base, lm)

    monkeypatch.setattr(LoraExport, "write", louder)
    with pytest.raises(UserError, match="nothing was written"):
        export_one(ship, Request("b", TEXTS[0]), tmp_path / "b", PROBES)
    assert not (tmp_path / "b").exists()


def test_a_sum_is_what_its_parts_do_to_the_weights(tmp_path: Path) -> None:
    ship = make_ship("embedded")
    made = compose(ship, [(0.5, TEXTS[0]), (-1.0, TEXTS[1])], tmp_path / "sum", PROBES)
    assert (made.rank, made.error) == (8, 0.0) and made.proof.from_live <= 1e-4
    loras = [
        export.lora
        for _, export in generate(ship, [Request("a", t) for t in TEXTS[:2]])
        if isinstance(export, LoraExport)
    ]
    exact = add([(0.5, loras[0]), (-1.0, loras[1])])
    saved = read_lora(tmp_path / "sum")
    assert saved.scaling == 1.5
    for path in exact.factors:
        wanted = 0.5 * loras[0].delta(path).double() - loras[1].delta(path).double()
        torch.testing.assert_close(saved.delta(path).double(), wanted, atol=1e-5, rtol=1e-5)
    small = compose(ship, [(0.5, TEXTS[0]), (-1.0, TEXTS[1])], tmp_path / "small", PROBES, rank=2)
    assert small.rank == 2 and 0.01 < small.error < 1 and small.proof.from_live <= 1e-4
    with pytest.raises(UserError, match="--rank 9: the exact sum's rank is 8"):
        compose(ship, [(0.5, TEXTS[0]), (-1.0, TEXTS[1])], tmp_path / "large", PROBES, rank=9)


def test_a_sum_ends_with_a_line_that_it_is_no_one_instruction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = random_bundle(tmp_path / "run", 0.3, 12)
    parts = ["--part", "0.5", TEXTS[0], "--part", "0.5", TEXTS[1]]
    arguments = ["compose", *parts, "--run", str(run), "--out", str(tmp_path / "sum")]
    assert cli.main([*arguments, "--probe", *PROBES]) == 0
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]
    assert last.startswith("ship-ds: a sum mixes") and "no substitute" in last
    assert last.endswith(f"ship-ds deduce '{TEXTS[0]} and then {TEXTS[1]}'")
    assert len(shown.out.splitlines()) == 1


def test_prompts_that_state_the_instruction_are_proved_with_it(tmp_path: Path) -> None:
    ship = make_ship("embedded")
    task_llm = ship.config.model.task_llm.model_copy(update={"instruction": "hard"})
    stated = ship.config.model.model_copy(update={"task_llm": task_llm})
    ship.model._collator = replace(ship.model.collator, instruction="hard")
    ship.model.config, ship.config = stated, ship.config.model_copy(update={"model": stated})
    export_one(ship, Request("a", TEXTS[0]), tmp_path / "a", PROBES)
    record = json.loads((tmp_path / "a" / "ship.json").read_text())
    assert record["probes"][0] == list(ship.model.prompts.task_prompt(PROBES[0], TEXTS[0]))
    with pytest.raises(UserError, match="a bare latent or a sum of adapters has none"):
        export_one(ship, Request("a", None, torch.zeros(64)), tmp_path / "b", PROBES)


def test_several_adapters_serve_one_batch_in_peft(tmp_path: Path) -> None:
    """Rows choose their adapter, the bare base among them."""
    ship = make_ship("embedded")
    export_many(
        ship, [Request(f"r{i}", text) for i, text in enumerate(TEXTS)], tmp_path / "many", PROBES
    )
    base = load_lm("embedded", "nf4", torch.float32)
    served = PeftModel.from_pretrained(base, str(tmp_path / "many" / "r0"), adapter_name="r0")
    for name in ("r1", "r2"):
        served.load_adapter(str(tmp_path / "many" / name), adapter_name=name)
    ids = ship.model.question(PROBES[0])
    names = ["r2", "__base__", "r0", "r1"]
    with torch.no_grad():
        rows = served.eval()(input_ids=torch.tensor([ids] * 4), adapter_names=names).logits
        bare = Exporter(ship, PROBES).base.bare([ids])[0]
    exports = {
        request.name: export
        for request, export in generate(ship, [Request(f"r{i}", t) for i, t in enumerate(TEXTS)])
    }
    with torch.no_grad():
        for name, row in zip(names, rows, strict=True):
            wanted = bare if name == "__base__" else live_logits(ship, exports[name].live(), ids)
            torch.testing.assert_close(row, wanted, atol=1e-4, rtol=0)
