"""Whether config.json, the headers of the weights and the tokenizer describe one model: the rows of
the embedding, the layers, the id of the end of sequence. Known without torch, before a weight is
read; families name these things each in its way, and what is named in none of these ways is told as
the model is loaded."""

import re
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from ship_ds.errors import UserError
from ship_ds.safetensors_header import Place

_ROWS = "vocab_size"
_EMBEDDING = re.compile(r"(?:\w+\.)*?(?:embed_tokens|embed_in|wte|word_embeddings|shared)\.weight")
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_IN_A_LAYER = re.compile(r"(|.*?\.)(\d+)\..+")
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
"""What is a number wherever it is set; a family may have a list, or null for another setting."""
_OTHER_LAYERS, _OTHER_ROWS = {"longcat_flash"}, {"moshi"}
"""Model types that have other numbers of layers, or of rows, than their configs say."""
_WAY_OUT = "download the config and the weights of one model"


def check_shapes(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Place], end_id: int | None
) -> None:
    """Compare what config.json says with what the weights' headers say.

    Args:
        folder: of the model.
        settings: what its config.json holds.
        tensors: of all its files, by name.
        end_id: of the token that ends a sequence, where the tokenizer's files tell it.

    Raises:
        UserError: they are of two models.
    """
    if isinstance(settings.get("text_config"), dict):
        return
    for key in _SIZES:
        size = settings.get(key, 1)
        if isinstance(size, bool | int | float | str) and (type(size) is not int or size < 1):
            raise UserError(
                f"{folder / 'config.json'}: {key}: expected a whole number above 0, got "
                f"{size!r}; download it again"
            )
    _check_layers(folder, settings, tensors)
    _check_rows(folder, settings, tensors)
    num_tokens = settings.get(_ROWS)
    if type(num_tokens) is int and end_id is not None:
        check_end_id(folder, end_id, num_tokens)


def check_end_id(place: object, end_id: int, num_tokens: int) -> None:
    """Refuse an end of sequence that the model does not embed.

    Args:
        place: the model's folder or the tokenizer's name, for the message.
        end_id: of the token that ends a sequence.
        num_tokens: that the model embeds.

    Raises:
        UserError: the model has no such id.
    """
    if end_id >= num_tokens:
        raise UserError(
            f"{place}: the tokenizer's eos_token is id {end_id}, and the model embeds {num_tokens} "
            "tokens; tokenizer and model do not belong together"
        )


def no_end(place: object) -> UserError:
    """The error of a tokenizer without an end of sequence."""
    return UserError(
        f"{place}: the tokenizer has no eos_token; set one in its tokenizer_config.json"
    )


def _check_rows(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Place]) -> None:
    expected = settings.get(_ROWS)
    if type(expected) is not int or settings["model_type"] in _OTHER_ROWS:
        return
    for name, place in tensors.items():
        if _EMBEDDING.fullmatch(name) and len(place.shape) == 2 and place.shape[0] != expected:
            raise UserError(
                f"{folder / 'config.json'}: {_ROWS} is {expected}, and {name} has "
                f"{place.shape[0]} rows in the weights' file; {_WAY_OUT}"
            )


def _check_layers(folder: Path, settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """Some list of layers in the files has to be as long as the config says."""
    key = next((one for one in _NUM_LAYERS if type(settings.get(one)) is int), None)
    if key is None or settings["model_type"] in _OTHER_LAYERS:
        return
    there: dict[str, set[str]] = {}
    for match in filter(None, map(_IN_A_LAYER.fullmatch, names)):
        there.setdefault(match[1], set()).add(match[2])
    first_lacking = {
        path: next(i for i in count() if str(i) not in numbers) for path, numbers in there.items()
    }
    path = max(first_lacking, key=first_lacking.__getitem__, default=None)
    if (first_lacking[path] if path is not None else 0) < settings[key]:
        lack = "no layers" if path is None else f"no {path}{first_lacking[path]}"
        raise UserError(
            f"{folder / 'config.json'}: {key} is {settings[key]}, and the weights' files have "
            f"{lack}; {_WAY_OUT}"
        )
