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

from ship_ds.files import Manifest, part_of, publish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> str:
    """A name for these texts under this tokenizer: 16 hex digits of a SHA-256."""
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
    anew.

    Args:
        texts: that one cache holds: others, or another order, have a cache of their own. Without
            any nothing is read or written.
        tokenizer: whose ids they are.
        folder: where caches lie, each in a folder named by its `fingerprint`.
    """
    if not texts:
        return {}
    import datasets

    datasets.disable_progress_bars()
    name = folder / fingerprint(texts, tokenizer)
    ids = _read(name)
    if ids is None:
        table = datasets.Dataset.from_dict({"text": list(texts)}).map(
            lambda rows: {
                "ids": tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
            },
            batched=True,
            remove_columns=["text"],
            load_from_cache_file=False,
        )
        _write(table, name)
        ids = table["ids"]
    return {text: tuple(row) for text, row in zip(texts, ids, strict=True)}


def _write(table: Any, name: Path) -> None:
    """Whole or not at all: into a folder of this process, which is then renamed."""
    part = part_of(name.with_name(f"{name.name}.{os.getpid()}"))
    shutil.rmtree(part, ignore_errors=True)
    table.save_to_disk(str(part))
    Manifest.of(part).write(part)
    if _is_whole(name):
        shutil.rmtree(part)  # another process was first; its ids are the same
    else:
        publish(part, name)


def _is_whole(folder: Path) -> bool:
    try:
        return Manifest.read(folder).problem(folder) is None
    except (ValueError, OSError):
        return False


def _read(folder: Path) -> Any | None:
    """The rows of ids; None where the folder is not there or not what its manifest says."""
    import datasets

    return datasets.load_from_disk(str(folder))["ids"] if _is_whole(folder) else None
