"""How an adapter lies on disk: one folder of `peft`, or several in one, of two files each.

    FOLDER/adapter_config.json, adapter_model.safetensors
    FOLDER/lora/..., prefix/...       of a combination; none in FOLDER itself

Imports no torch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from ship_ds.errors import UserError
from ship_ds.files import sha256
from ship_ds.parsing import read_json_object
from ship_ds.safetensors_header import refuse_pointer_file

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
Leaves = Literal["lora", "shira", "prefix", "prompt"]
"""What a folder of `peft` holds, by which it is called where several lie in an adapter's folder."""
PEFT_TYPES: Mapping[Leaves, str] = {
    "lora": "LORA",
    "shira": "SHIRA",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
}
"""What `peft` calls them in a folder's config."""
BEFORE_THE_PROMPT = ("prefix", "prompt")
"""Those that `peft` puts around a whole model, with its LoRA or without."""


def paths_of(folder: Path, names: Sequence[Leaves]) -> list[Path]:
    """The folders of these names in an adapter's; without a name itself."""
    return [folder / name for name in names] or [folder]


def check_folder(folder: Path, name: Leaves) -> None:
    """Both files are there, and of the kind of this name.

    Raises:
        UserError: They are not.
    """
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: is missing; export the adapter again")
    kind = read_json_object(folder / ADAPTER_CONFIG).get("peft_type")
    if kind != PEFT_TYPES[name]:
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: peft_type is {kind!r}; expected {PEFT_TYPES[name]!r}: "
            "export the adapter again"
        )


def check_weights(folder: Path) -> None:
    """A folder of `peft` has its weights, as safetensors.

    Raises:
        UserError: They are not there, or Git LFS keeps them elsewhere.
    """
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        return refuse_pointer_file(path)
    others = sorted(one.name for one in folder.glob("adapter_model*") if one.is_file())
    raise UserError(
        f"{path}: is missing; "
        + (
            f"{others[0]} is not read here: load the adapter by peft, and save it again"
            if others
            else "save the adapter again"
        )
    )


def weights_digest(paths: Sequence[Path]) -> str:
    """SHA-256 of the weights of one folder of `peft`; of several that of a line a folder with its
    own."""
    digests = [sha256(path / ADAPTER_WEIGHTS) for path in paths]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{one}\n" for one in digests).encode()).hexdigest()
