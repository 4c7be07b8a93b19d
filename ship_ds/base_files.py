"""What is wrong with the files of a base, as far as they tell it without torch: a download that was
cut short, a model that needs its own code, weights that are no numbers.

    check_base_files(Path("models/llama"))      # raises UserError

What only a model's code knows, such as names of weights that its config does not describe, is told
as it is loaded.
"""

import codecs
import importlib.util
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ship_ds.base_shapes import check_shapes, no_end
from ship_ds.errors import UserError
from ship_ds.parsing import read_json_object, read_text
from ship_ds.safetensors_header import (
    SINGLE_FILE,
    WEIGHTS_INDEX,
    Place,
    not_finite,
    read_header,
    weight_files,
)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_BESIDE = (
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
)
_ADAPTER = "adapter_config.json"
_WHOLE_TOKENIZER = "tokenizer.json"
_TEXTS = (".txt", ".jinja")
_OWN_DEFAULTS = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of tokenizers that have no special tokens but those of their files."""
UNFIT = dict.fromkeys(
    ("bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt"),
    "hands its blocks nothing but its own arguments, so that no adapter reaches them",
) | {
    "doge": "makes a mask of its own of the one that it is given, and cannot do without one",
    "recurrent_gemma": "keeps what it has read within its blocks, where no row can move or end",
}
"""Model types of one stack that cannot be a base in any role, and why."""
_ONE_STACK = ("T5EncoderModel", "T5ForTokenClassification")
"""Architectures of T5 whose files lack the stack that writes."""
_READS_QUANTISED = ("bitsandbytes",)
"""Ways to quantise whose weights are read here."""
_MOST_SCANNED = 2_000_000_000
"""Bytes of weights that are read for numbers that are none; larger ones as they are loaded."""
_CHUNK_BYTES = 1 << 24
_EXPONENTS = {"F32": (4, 0x7F800000), "BF16": (2, 0x7F80), "F16": (2, 0x7C00)}
"""Bytes of a value, and its bits that are all set where it is infinite or no number."""


def check_base_files(folder: Path) -> None:
    """Look through the files of a model folder.

    Raises:
        UserError: one is missing, damaged, or of a kind that is not read here.
    """
    settings = check_settings(folder)
    has_weights = any((folder / name).is_file() for name in (SINGLE_FILE, WEIGHTS_INDEX))
    if has_weights and (folder / _ADAPTER).is_file():
        raise UserError(
            f"{folder / _ADAPTER}: an adapter beside the model, which transformers would put into "
            "it unasked: move it elsewhere, or give the merged model"
        )
    end_id = _check_tokenizer(folder)
    places = {file: _header(folder, file) for file in weight_files(folder)}
    tensors = {name: place for file in places.values() for name, place in file.items()}
    _check_stored(folder, settings, tensors)
    check_shapes(folder, settings, tensors, end_id)
    if sum(one.end - one.start for one in tensors.values()) < _MOST_SCANNED:
        for file, its_tensors in places.items():
            _check_numbers(folder / file, its_tensors)


def check_settings(folder: Path) -> dict[str, Any]:
    """What config.json holds, looked at alone: all that a plan needs. Raises UserError."""
    path = folder / "config.json"
    settings = _read_object(path)
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{path}: has no model_type; give the folder of a transformers model")
    if not _is_known(kind):
        needs = (
            "it needs code of its own (auto_map), which is never run here"
            if settings.get("auto_map")
            else "install a transformers that knows it"
        )
        raise UserError(f"{path}: model_type {kind!r} is not known to this transformers: {needs}")
    if reason := UNFIT.get(kind):
        raise UserError(f"{path}: {kind}: {reason}; give another base")
    _check_stacks(path, settings)
    how = settings.get("quantization_config")
    if how is not None and not isinstance(how, dict):
        raise UserError(
            f"{path}: quantization_config: expected an object that says how the weights are "
            f"quantised, got {type(how).__name__}; download it again"
        )
    method = quantised_by(settings)
    if method is not None and method not in _READS_QUANTISED:
        raise UserError(
            f"{path}: the weights are quantised already ({method}), which is not read here: give "
            "the model's 16-bit weights, and quantise by model.task_llm.quantisation=nf4"
        )
    return settings


def _read_object(path: Path) -> dict[str, Any]:
    """Of a file that transformers will read too. Raises UserError."""
    content = read_json_object(path)
    with path.open("rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            raise UserError(
                f"{path}: begins with a byte order mark, with which transformers reads no JSON: "
                "save it as UTF-8 without one"
            )
    return content


def _check_stacks(path: Path, settings: Mapping[str, Any]) -> None:
    kind = settings["model_type"]
    if settings.get("is_encoder_decoder") and kind not in ENCODER_DECODERS:
        raise UserError(
            f"{path}: a {kind} is an encoder-decoder, and of those only "
            f"{', '.join(sorted(ENCODER_DECODERS))} can be a base: give one of these, or a "
            "decoder-only model"
        )
    named = settings.get("architectures")
    lacking = [one for one in named if one in _ONE_STACK] if isinstance(named, list) else []
    if lacking:
        raise UserError(
            f"{path}: a {lacking[0]} has no stack that writes; give the folder of a "
            "T5ForConditionalGeneration"
        )


def encoder_decoder(folder: Path) -> str | None:
    """The model type of a folder whose model reads with one stack and writes with another; None for
    any other model."""
    kind = read_json_object(folder / "config.json").get("model_type")
    return kind if kind in ENCODER_DECODERS else None


def linears_of_t5(folder: Path) -> set[str]:
    """Last names of the linears in the blocks of a T5."""
    settings = read_json_object(folder / "config.json")
    is_gated = str(settings.get("feed_forward_proj", "relu")).startswith("gated")
    return {"q", "k", "v", "o", "wo"} | ({"wi_0", "wi_1"} if is_gated else {"wi"})


ENCODER_DECODERS: dict[str, Callable[[Path], set[str]]] = {"t5": linears_of_t5}
"""Model types that read with one stack and write with another, and have a language model here ->
what names the linears in the blocks of such a folder. A plugin that brings one of its own adds its
type."""


def quantised_by(settings: Mapping[str, Any]) -> str | None:
    """How a model's weights are quantised already; None where they are not."""
    how = settings.get("quantization_config", settings.get("compression_config"))
    return str(how.get("quant_method", "unknown")) if isinstance(how, dict) else None


@cache
def _auto_tables() -> str:
    """The text of transformers' tables of models: to import them takes torch along."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    tables = Path(spec.submodule_search_locations[0]) / "models" / "auto"
    return "".join(path.read_text(encoding="utf-8") for path in sorted(tables.glob("*.py")))


def _is_known(kind: str) -> bool:
    return re.search(rf'\(\s*"{re.escape(kind)}",', _auto_tables()) is not None


def _check_tokenizer(folder: Path) -> int | None:
    """The id of the token that ends a sequence, where the tokenizer's files tell it.

    Raises:
        UserError: one of them is missing or damaged.
    """
    there = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not there:
        raise UserError(
            f"{folder}: has no tokenizer ({', '.join(_TOKENIZER_FILES[:2])}, ...); download those "
            "files of the model too"
        )
    objects = {}
    for name in (*there, *(one for one in _BESIDE if (folder / one).is_file())):
        path = folder / name
        if path.suffix == ".json":
            objects[name] = _read_object(path)
        elif path.suffix in _TEXTS or path.stat().st_size < 1024:  # else a sentencepiece model
            read_text(path)
    _check_ends(folder / "generation_config.json", objects.get("generation_config.json", {}))
    if _WHOLE_TOKENIZER not in objects:
        return None
    tokenizer = objects[_WHOLE_TOKENIZER]
    if not isinstance(tokenizer.get("model"), dict):
        raise UserError(
            f"{folder / _WHOLE_TOKENIZER}: not a tokenizer: has no 'model'; download it again"
        )
    return _end_id(folder, tokenizer, objects)


def _check_ends(path: Path, generation: Mapping[str, Any]) -> None:
    ends = generation.get("eos_token_id")
    for one in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if type(one) is not int or one < 0:
            raise UserError(
                f"{path}: eos_token_id: expected the id of a token, or a list of such, got "
                f"{one!r}; correct it, or take it out"
            )


def _end_id(
    folder: Path, tokenizer: Mapping[str, Any], objects: Mapping[str, dict[str, Any]]
) -> int | None:
    """Raise UserError where the files name no end of sequence, and no class does it for them."""
    settings = objects.get("tokenizer_config.json", {})
    end = settings.get("eos_token") or objects.get("special_tokens_map.json", {}).get("eos_token")
    if not end and settings.get("tokenizer_class") in _OWN_DEFAULTS:
        raise no_end(folder)
    text = end.get("content") if isinstance(end, dict) else end
    words, added = tokenizer["model"].get("vocab"), tokenizer.get("added_tokens")
    if not isinstance(text, str):
        return None
    ids = [words.get(text)] if isinstance(words, dict) else []
    for one in added if isinstance(added, list) else ():
        if isinstance(one, dict) and one.get("content") == text:
            ids.insert(0, one.get("id"))
    return next((one for one in ids if type(one) is int), None)


def _header(folder: Path, file: str) -> dict[str, Place]:
    path = folder / file
    if not path.is_file():
        raise UserError(
            f"{path}: this file is missing, and the index of the weights lists it; download the "
            "model again"
        )
    return read_header(path)


def _check_stored(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Place]) -> None:
    """Raise UserError for weights that are codes, of which config.json does not say so: they would
    be taken for the numbers themselves; and for 4-bit codes without their scales."""
    if quantised_by(settings) is not None:
        for name, place in tensors.items():
            is_code = name.endswith(".weight") and place.dtype == "U8"
            if is_code and f"{name}.absmax" not in tensors:
                raise UserError(
                    f"{folder}: {name}: 4-bit weights without their scales ({name}.absmax is not "
                    "there); download the model again, or give its 16-bit weights"
                )
        return
    for name, place in tensors.items():
        is_code = name.endswith(".weight") and place.dtype in _NO_WEIGHTS
        if is_code or name.endswith(_SCALES):
            raise UserError(
                f"{folder}: {name} ({place.dtype}): the weights are quantised already, and "
                "config.json does not say how; give the model's 16-bit weights"
            )


_SCALES = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    "_scale_inv",
    ".absmax",
    ".SCB",
)
_NO_WEIGHTS = ("BOOL", "C64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


def _check_numbers(path: Path, tensors: Mapping[str, Place]) -> None:
    """Raise UserError for a weight that is infinite or no number."""
    import numpy as np

    with path.open("rb") as file:
        for name, place in tensors.items():
            if place.dtype not in _EXPONENTS:
                continue
            num_bytes, bits = _EXPONENTS[place.dtype]
            file.seek(place.start)
            for start in range(place.start, place.end, _CHUNK_BYTES):
                chunk = file.read(min(_CHUNK_BYTES, place.end - start))
                values = np.frombuffer(chunk, f"<u{num_bytes}")
                if ((values & bits) == bits).any():
                    raise not_finite(path, name)
