"""Adapters of a T5 on their way out: what `peft` and transformers compute with them is what the
hypernetwork's own Task LLM does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftModelForSeq2SeqLM
from transformers import AutoModelForSeq2SeqLM

from ship_ds.api import Ship
from ship_ds.errors import UserError
from ship_ds.export.deduce import export_one
from ship_ds.export.drift import drift
from ship_ds.export.merge import Merge
from ship_ds.export.peft_adapter import live_logits
from ship_ds.export.requests import Request
from ship_ds.lora_folder import read_lora
from ship_ds.model.loading import load_prompts
from tests.export.models import PROBES, make_base, make_ship, make_t5_base
from tests.model.models import HIDDEN

pytestmark = pytest.mark.slow

TEXT = "put 7 at the front"
OTHERS: Any = {"encoder": {"base": "embedded"}, "decoder": {"base": "embedded"}}


def _ship(base: Path, quantisation: str = "none", **hypernetwork: Any) -> Ship:
    hypernetwork = hypernetwork or {"targets": "all-linear", "rank": 3}
    return make_ship(base, quantisation=quantisation, std=0.1, **OTHERS, **hypernetwork)


def _answer_logits(model: Any, ids: list[int], answer: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=torch.tensor([ids]), labels=torch.tensor([answer])
        ).logits[0]
    return logits


def test_prompts_of_a_folder_without_a_template_end_as_t5_reads(tmp_path: Path) -> None:
    """As every published T5 is; those of a base of one stack are gone on with."""
    folders = make_t5_base(tmp_path / "t5"), make_base(tmp_path / "llama")
    for folder in folders:
        (folder / "chat_template.jinja").unlink()
    read, continued = (load_prompts(str(folder), None) for folder in folders)
    assert read.task_prompt("3 1")[-1] == read.eos_id
    assert continued.eos_id not in continued.task_prompt("3 1")


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_lora_leaves_for_peft_and_merges(version: str, quantisation: str, tmp_path: Path) -> None:
    """The proof, then peft's and transformers' own classes against the live adapter's answers."""
    base = make_t5_base(tmp_path / "base", version)
    ship = _ship(base, quantisation)
    proof = export_one(ship, Request("a", TEXT), tmp_path / "a", PROBES)
    assert proof.from_live <= 1e-4 < 0.1 < proof.from_base
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    wi = ["wi"] if version == "1.0" else ["wi_0", "wi_1"]
    assert settings["task_type"] == "SEQ_2_SEQ_LM"
    assert settings["target_modules"] == ["k", "o", "q", "v", *wi, "wo"]
    assert len(read_lora(tmp_path / "a").factors) == 2 * (4 + 8) + 4 * (len(wi) + 1)

    merged = Merge(tmp_path / "a", dtype="float32")
    merged.run(tmp_path / "merged")
    ids, answer = list(ship.model.question(PROBES[0])), list(ship.model.prompts.target("7 3 7"))
    adapter = ship.model.adapt(ship.model.encode([TEXT]))
    batch = ship.model.task_batch([PROBES[0]], ["7 3 7"], [None])
    with torch.no_grad():
        live = ship.model.task_llm.score(adapter, batch, 1)[0]
    # Under NF4 a merge adds to what training saw, and peft's base is in 16 or 32 bits.
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(_answer_logits(plain, ids, answer), live, rtol=0, atol=2e-3)
    if quantisation == "none":
        stock = AutoModelForSeq2SeqLM.from_pretrained(base)
        bare = _answer_logits(stock, ids, answer)
        loaded = PeftModel.from_pretrained(stock, str(tmp_path / "a")).eval()
        assert isinstance(loaded, PeftModelForSeq2SeqLM)
        torch.testing.assert_close(_answer_logits(loaded, ids, answer), live, rtol=0, atol=1e-3)
        assert float((bare - live).abs().max()) > 0.1
    if quantisation == "nf4":
        report = drift(tmp_path / "merged", tmp_path / "a", base)
        assert report["logit_drift"] < 1e-2 < 0.1 < report["adapter_effect"]


@pytest.mark.parametrize("kind", ["soft_prompt", "reshape"])
def test_a_soft_prompt_leaves_as_prompt_tuning(kind: str, tmp_path: Path) -> None:
    """Before what is read, and nowhere else: one place, since z is as wide as one embedding."""
    ship = _ship(make_t5_base(tmp_path / "base"), kind=kind, num_virtual_tokens=64 // HIDDEN)
    proof = export_one(ship, Request("a", TEXT), tmp_path / "a", PROBES)
    assert proof.from_live <= 1e-4 < proof.from_base
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["num_transformer_submodules"]) == ("SEQ_2_SEQ_LM", 1)
    ids = list(ship.model.question(PROBES[0]))
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(stock, str(tmp_path / "a")).eval()
    adapter = ship.model.adapt(ship.model.encode([TEXT]))
    with torch.no_grad():
        live = live_logits(ship, adapter, ids)
    torch.testing.assert_close(_answer_logits(loaded, ids, ids), live, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["prefix", "layer_prompt"])
def test_a_prefix_has_no_folder_and_says_so(kind: str, tmp_path: Path) -> None:
    ship = _ship(make_t5_base(tmp_path / "base"), kind=kind, length=2)
    with pytest.raises(
        UserError, match="T5ForConditionalGeneration: .* alone, .*ship-ds answer"
    ) as caught:
        export_one(ship, Request("a", TEXT), tmp_path / "a", PROBES)
    assert "\n" not in str(caught.value) and not (tmp_path / "a").exists()
    assert len(ship.answer(TEXT, ["3 9 5"])) == 1
