"""Chats: rows of `messages`, each with `role` and `content`, as a JSON array or as JSONL.

    {"messages": [{"role": "system", "content": "Name its colour."},
                  {"role": "user", "content": "sky"},
                  {"role": "assistant", "content": "blue"}]}

ShareGPT's `conversations` of `from` and `value` are read likewise. Of a chat the first question and
its answer are taken: later turns answer to the ones before, not to an instruction. Where there is a
system message that is the instruction and the question is the input; else the question is the
instruction and the input is empty. Rows with one instruction are the examples of one task.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ship_ds.data.readers.checks import expect, field
from ship_ds.data.readers.rows import Triple, files_of, first_row, read_triples
from ship_ds.data.task import Task, read_error

MIN_EXAMPLES_PER_TASK = 1
"""See alpaca.py."""
_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


_MOST_TURNS = 3
"""That are read of a row: a system's, a user's and an assistant's."""


def matches(path: Path) -> bool:
    """Whether the first row is a chat."""
    row = first_row(path)
    return row is not None and any(isinstance(row.get(key), list) for key in _KEYS)


def read(path: Path) -> list[Task]:
    """The tasks, one for each distinct instruction."""
    return read_triples(files_of(path), _read_row)


def _read_row(row: dict[str, Any], path: Path, where: str) -> Triple:
    key = next((key for key in _KEYS if key in row), None)
    if key is None:
        raise read_error(path, where, f"has neither {' nor '.join(map(repr, _KEYS))}")
    turns = [
        _turn(expect(turn, dict, path, f"{where}.{key}[{i}]"), key, path, f"{where}.{key}[{i}]")
        # What comes after the first answer is not read: tools and pictures may turn up there.
        for i, turn in enumerate(field(row, key, list, path, where)[:_MOST_TURNS])
    ]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    if [role for role, _ in turns[:2]] != ["user", "assistant"]:
        raise read_error(
            path,
            f"{where}.{key}",
            "expected a user's turn and then an assistant's, got "
            f"{', '.join(role for role, _ in turns[:2]) or 'neither'}",
        )
    (_, question), (_, answer) = turns[:2]
    return Triple(system, question, answer) if system else Triple(question, "", answer)


def _turn(turn: Mapping[str, Any], key: str, path: Path, where: str) -> tuple[str, str]:
    """Who speaks, in our words, and what is said."""
    role_key, text_key = _KEYS[key]
    role = field(turn, role_key, str, path, where)
    if role not in _ROLES:
        raise read_error(
            path, f"{where}.{role_key}", f"expected one of {', '.join(_ROLES)}, got {role!r}"
        )
    return _ROLES[role], field(turn, text_key, str, path, where).strip()
