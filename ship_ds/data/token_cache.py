"""Token ids of many texts, computed once with `datasets` and kept in a folder under a fingerprint
of tokenizer and texts.

The caller lets rank 0 go first; the others then find the folder and only read it. Where ranks do
not share a disk, each node's first to finish is kept.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MANIFEST = "manifest.json"


def fingerprint(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> str:
    digest = hashlib.sha256(_definition(tokenizer).encode())
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:16]


def _definition(tokenizer: "PreTrainedTokenizerBase") -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    content = json.loads(backend.to_str())
    # what the last call asked for, no part of the tokenizer
    return json.dumps(content | {"truncation": None, "padding": None})


def tokenise_all(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> dict[str, tuple[int, ...]]:
    """text -> ids without special tokens. A cache that is missing, unfinished or damaged is made
    anew."""
    if not texts:
        return {}
    import datasets

    datasets.disable_progress_bars()
    name = folder / fingerprint(texts, tokenizer)
    found = _read(name)
    if found is None:
        made = datasets.Dataset.from_dict({"text": list(texts)}).map(
            lambda rows: {
                "ids": tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
            },
            batched=True,
            remove_columns=["text"],
            load_from_cache_file=False,
        )
        _write(made, name)
        found = made["ids"]
    return {text: tuple(ids) for text, ids in zip(texts, found, strict=True)}


def _write(table: Any, name: Path) -> None:
    """Whole or not at all: into a folder of this process, which is then renamed."""
    part = name.with_name(f"{name.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    table.save_to_disk(str(part))
    (part / _MANIFEST).write_text(json.dumps(_hashes(part)))
    shutil.rmtree(name, ignore_errors=True)
    try:
        part.rename(name)
    except OSError:
        if not name.is_dir():
            raise
        shutil.rmtree(part)  # another process was first; its ids are the same


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.iterdir() if file.name != _MANIFEST)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _read(folder: Path) -> Any | None:
    """The rows of ids; None where the folder is not there or not what its manifest says."""
    import datasets

    try:
        if json.loads((folder / _MANIFEST).read_text()) != _hashes(folder):
            return None
    except (OSError, ValueError):
        return None
    return datasets.load_from_disk(str(folder))["ids"]
