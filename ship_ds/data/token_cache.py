"""Token ids of many texts, computed once with `datasets` and kept in a folder under a fingerprint of tokenizer and texts.

The caller lets rank 0 go first; the others then find the folder and only read it.
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


_DONE = "done.json"


def fingerprint(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> str:
    digest = hashlib.sha256(_definition(tokenizer).encode())
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _definition(tokenizer: "PreTrainedTokenizerBase") -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)


def tokenise_all(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", folder: Path) -> dict[str, tuple[int, ...]]:
    """text -> ids without special tokens. A cache that is missing, unfinished or damaged is made anew."""
    import datasets

    datasets.disable_progress_bars()
    name = folder / fingerprint(texts, tokenizer)
    table = _read(name, len(texts))
    if table is None:
        part = name.with_name(f"{name.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        made = datasets.Dataset.from_dict({"text": list(texts)}).map(
            lambda rows: {"ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]}, batched=True,
            remove_columns=["text"], load_from_cache_file=False,
        )
        made.save_to_disk(str(part))
        (part / _DONE).write_text(json.dumps({"texts": len(texts)}))
        shutil.rmtree(name, ignore_errors=True)
        part.rename(name)
        table = _read(name, len(texts))
    assert table is not None
    return {text: tuple(ids) for text, ids in zip(texts, table["ids"], strict=True)}


def _read(folder: Path, num_texts: int) -> Any | None:
    import datasets

    try:
        if json.loads((folder / _DONE).read_text())["texts"] != num_texts:
            return None
        table = datasets.load_from_disk(str(folder))
        return table if len(table) == num_texts else None
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetGenerationError):
        return None
