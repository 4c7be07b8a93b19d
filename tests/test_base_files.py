"""Faults of a base are told by its files, before torch is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ship_ds.base_files import check_base_files, encoder_decoder, linears_of_t5
from ship_ds.config import base_folder
from ship_ds.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4976698672\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder("embedded"), tmp_path / "base"))


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        values = json.loads((base / name).read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (base / name).write_text(json.dumps(kept))

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda base: (base / name).write_text(text) and None


def move_the_end(id: int) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        tokenizer = json.loads((base / "tokenizer.json").read_text())
        tokenizer["added_tokens"][1]["id"] = tokenizer["model"]["vocab"]["<eos>"] = id
        (base / "tokenizer.json").write_text(json.dumps(tokenizer))

    return change


def change_weights(value: float, dtype: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        weights = load_file(base / "model.safetensors")
        name = min(weights)
        weights[name] = weights[name].astype(dtype)
        weights[name].flat[3] = value
        save_file(weights, base / "model.safetensors")

    return change


def add_weights(name: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        weights = load_file(base / "model.safetensors")
        save_file(weights | {name: np.ones(1, "float32")}, base / "model.safetensors")

    return change


def change_bytes(change_content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        path = base / "model.safetensors"
        content = path.read_bytes()
        changed = change_content(content)
        assert changed != content
        path.write_bytes(changed)

    return change


def instead_of_weights(name: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        (base / "model.safetensors").unlink()
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"x")

    return change


def shard(base: Path) -> None:
    """As every large base is: an index, and files that it lists."""
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(base / "model-1-of-1.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-1-of-1.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_embedded_base_has_no_fault(base: Path) -> None:
    check_base_files(base)
    shard(base)
    check_base_files(base)


def test_metadata_may_be_null_as_the_formats_own_reader_has_it(base: Path) -> None:
    change_bytes(lambda content: content.replace(b'{"format":"pt"}', b"null" + 11 * b" "))(base)
    assert load_file(base / "model.safetensors")
    check_base_files(base)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("config.json", POINTER), "config.json: a Git LFS pointer"),
        (write("tokenizer.json", POINTER), "tokenizer.json: a Git LFS pointer"),
        (write("model.safetensors", POINTER), "model.safetensors: a Git LFS pointer"),
        (write("model.safetensors.index.json", POINTER), "index.json: a Git LFS pointer"),
        (write("generation_config.json", POINTER), "generation_config.json: a Git LFS pointer"),
        (write("chat_template.jinja", POINTER), "chat_template.jinja: a Git LFS pointer"),
        (write("config.json", "[]"), "config.json: expected a JSON object"),
        (write("config.json", "{}"), "config.json: has no model_type"),
        (write("tokenizer_config.json", "{"), "tokenizer_config.json: line 1: not JSON"),
        (write("merges.txt", POINTER), "merges.txt: a Git LFS pointer"),
        (write("added_tokens.json", POINTER), "added_tokens.json: a Git LFS pointer"),
        (write("special_tokens_map.json", POINTER), "special_tokens_map.json: a Git LFS pointer"),
        (write("tokenizer.json", "[]"), "tokenizer.json: expected a JSON object, got list"),
        (write("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer: has no 'model'"),
        (write("vocab.json", "[]"), "vocab.json: expected a JSON object, got list"),
        (move_the_end(266), "eos_token is id 266, and the model embeds 266 tokens"),
        (
            edit("config.json", vocab_size=300),
            "config.json: vocab_size is 300, and model.embed_tokens.weight has 266 rows",
        ),
        (
            edit("config.json", num_hidden_layers=5),
            "config.json: num_hidden_layers is 5, and the weights' files have no model.layers.4;",
        ),
        (
            edit("config.json", num_hidden_layers=10**12),
            "num_hidden_layers is 1000000000000, and the weights' files have no model.layers.4;",
        ),
        (write("model.safetensors.index.json", '{"weight_map": {}}'), "not an index of safetens"),
        (
            write("model.safetensors.index.json", '{"weight_map": {"a": "../../a.safetensors"}}'),
            "not an index of safetensors files",
        ),
        (
            write("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
            "b.safetensors: this file is missing",
        ),
        (lambda base: (base / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda base: (base / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (edit("tokenizer_config.json", eos_token=None), "the tokenizer has no eos_token"),
        (edit("config.json", model_type="qwen99"), "'qwen99' is not known to this transformers"),
        (
            edit("config.json", model_type="falcon"),
            "config.json: falcon: hands its blocks nothing but its own arguments",
        ),
        (
            edit("config.json", model_type="mine", auto_map={"AutoConfig": "m.C"}),
            "needs code of its own",
        ),
        (
            edit("config.json", quantization_config={"quant_method": "gptq"}),
            r"are quantised already \(gptq\)",
        ),
        (
            edit("config.json", model_type="bart", is_encoder_decoder=True),
            "a bart is an encoder-decoder, and of those only .*t5 can be a base",
        ),
        (
            edit("config.json", model_type="t5", architectures=["T5EncoderModel"]),
            "a T5EncoderModel has no stack that writes",
        ),
        (edit("config.json", model_type="AutoConfig"), "'AutoConfig' is not known to this"),
        (edit("config.json", model_type=""), "'' is not known to this transformers"),
        (edit("config.json", num_hidden_layers=0), "num_hidden_layers: expected a whole number"),
        (edit("config.json", hidden_size="64"), "hidden_size: expected a whole number above 0"),
        (edit("config.json", num_key_value_heads=True), "num_key_value_heads: expected a whole"),
        (edit("config.json", quantization_config="awq"), "expected an object that says how"),
        (
            edit("config.json", compression_config={"quant_method": "compressed-tensors"}),
            r"are quantised already \(compressed-tensors\)",
        ),
        (write("config.json", "\ufeff{}"), "config.json: begins with a byte order mark"),
        (write("generation_config.json", '{"eos_token_id": "<eos>"}'), "expected the id of a tok"),
        (write("generation_config.json", '{"eos_token_id": [2, -1]}'), "such, got -1; correct"),
        (write("adapter_config.json", "{}"), "adapter_config.json: an adapter beside the model"),
        (
            lambda base: [write("adapter_config.json", "{}")(base), shard(base)],
            "adapter_config.json: an adapter beside the model",
        ),
        (change_weights(1, "int8"), r"\(I8\): the weights are quantised already, and config"),
        (change_weights(1, "bool"), r"\(BOOL\): the weights are quantised already, and config"),
        (
            add_weights("model.layers.0.mlp.up_proj.weight_scale_inv"),
            "weight_scale_inv .*quantised already, and config.json does not say how",
        ),
        (
            lambda base: [
                edit("config.json", quantization_config={"quant_method": "bitsandbytes"})(base),
                change_weights(1, "uint8")(base),
            ],
            r"4-bit weights without their scales \(.*\.absmax is not there\)",
        ),
        (change_bytes(lambda content: content + b"\0"), "damaged: its tensors do not follow each"),
        (
            change_bytes(lambda content: content.replace(b'"format":"pt"', b'"format":  12')),
            "not a safetensors file",
        ),
        (instead_of_weights("pytorch_model.bin"), "but pickled weights, pytorch_model.bin,"),
        (instead_of_weights("adapter_model.safetensors"), "but an adapter of a model, adapter_"),
        (instead_of_weights("x.gguf"), "but x.gguf, of which `ship-ds base` makes"),
        (instead_of_weights("model-1-of-2.safetensors"), "model-1-of-2.* without the index"),
        (instead_of_weights("model.safetensors/x"), "but model.safetensors as no plain file"),
        (
            lambda base: [
                (base / "model.safetensors").unlink(),
                (base / "model.safetensors").symlink_to("../blob"),
            ],
            r"but a link to \.\./blob, which is not there",
        ),
        (
            lambda base: (base / "model.safetensors.index.json").write_bytes(
                '{"weight_map": {"a": "model.safetensors"}}'.encode("utf-16")
            ),
            "model.safetensors.index.json: not an index of safetensors files",
        ),
        (change_weights(float("nan"), "float32"), "has values that are infinite or no numbers"),
        (change_weights(float("-inf"), "float16"), "has values that are infinite or no numbers"),
    ],
)
def test_a_fault_is_one_line(damage: Callable[[Path], object], message: str, base: Path) -> None:
    damage(base)
    with pytest.raises(UserError, match=message) as caught:
        check_base_files(base)
    assert "\n" not in str(caught.value) and str(base) in str(caught.value)


def test_an_end_that_no_file_names_is_not_taken_from_a_row_without_a_text(base: Path) -> None:
    """Of a class that has an end of its own."""
    edit("tokenizer_config.json", eos_token=None, tokenizer_class="LlamaTokenizer")(base)
    edit("tokenizer.json", added_tokens=[{"id": 9999}])(base)
    check_base_files(base)


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_a_t5_is_known_by_its_config(feed_forward: str, base: Path) -> None:
    two_stacks = {"model_type": "t5", "is_encoder_decoder": True}
    edit("config.json", **two_stacks, feed_forward_proj=feed_forward)(base)
    check_base_files(base)
    assert encoder_decoder(base) == "t5" and encoder_decoder(base_folder("embedded")) is None
    assert linears_of_t5(base) == {"q", "k", "v", "o", "wo"} | (
        {"wi"} if feed_forward == "relu" else {"wi_0", "wi_1"}
    )


def test_a_base_whose_files_lack_a_layer_in_between_is_told_which(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".layers.2." not in name}
    save_file(kept, base / "model.safetensors")
    with pytest.raises(UserError, match="the weights' files have no model.layers.2;"):
        check_base_files(base)


def test_layers_and_tokens_beyond_what_the_config_uses_are_no_fault(base: Path) -> None:
    """As the layers that some models have for predicting two tokens at once."""
    edit("config.json", num_hidden_layers=3)(base)
    move_the_end(265)(base)
    check_base_files(base)


def test_large_numbers_are_numbers(base: Path) -> None:
    change_weights(float(np.finfo("float32").max), "float32")(base)
    check_base_files(base)


def test_a_base_in_4_bits_by_bitsandbytes_is_none(base: Path) -> None:
    edit("config.json", quantization_config={"quant_method": "bitsandbytes"})(base)
    check_base_files(base)
