"""Chats: rows of `messages`, each with `role` and `content`, as a JSON array or as JSONL.

    {"messages": [{"role": "system", "content": "Name its colour."},
                  {"role": "user", "content": "sky"},
                  {"role": "assistant", "content": "blue"}]}

ShareGPT's `conversations` of `from` and `value` are read likewise. Of a chat the first question and
its answer are taken: later turns answer to the ones before, not to an instruction. Where there is a
system message that is the instruction and the question is the input; else the question is the
instruction and the input is empty. Rows with one instruction are the examples of one task.

Many chat sets begin every row with the same words, such as "You are a helpful assistant.". They
say what to do with no question, and all rows would be one task. So a system message that most rows
share is left out, and counted. So is a chat that an assistant's turn begins, as it does the second
half of a long one in ShareGPT's files: what it answers is not there.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from ship_ds.data.readers.checks import expect, field
from ship_ds.data.readers.rows import Triple, files, first_row, rows_of, tasks_of_triples
from ship_ds.data.task import Task, read_error
from ship_ds.parsing import trimmed

MIN_EXAMPLES_PER_TASK = 1
"""See alpaca.py."""
_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
_WITHOUT_QUESTION = "chats that begin with an assistant's turn"


_MOST_TURNS = 3
"""That are read of a row: a system's, a user's and an assistant's."""
_MOST_WITH_ONE_MESSAGE = 0.5
"""Of the rows with a system message: one that more of them share is no instruction. Tasks that a
run can be split into are three rules at least, so of a set of tasks hardly one has most rows."""
_WIDTH = 60
"""Letters of such a message that are printed."""


def matches(path: Path) -> bool:
    """Whether the first row is a chat."""
    row = first_row(path)
    return row is not None and any(isinstance(row.get(key), list) for key in _KEYS)


def read(path: Path, counts: Counter[str]) -> list[Task]:
    """The tasks, one for each distinct instruction."""
    chats = []
    for file, where, row in rows_of(files(path)):
        chat = _read_row(row, file, where)
        if chat is None:
            counts[_WITHOUT_QUESTION] += 1
        else:
            chats.append((file, where, chat))
    shared = _shared_message(chats, counts)
    return tasks_of_triples((file, where, chat.triple(shared)) for file, where, chat in chats)


class _Chat(NamedTuple):
    """What is read of a row. system: empty where there is no such message."""

    system: str
    question: str
    answer: str

    def triple(self, shared: str | None) -> Triple:
        """With the system message as the instruction, unless it is the one that rows share."""
        if not self.system or self.system == shared:
            return Triple(self.question, "", self.answer)
        return Triple(self.system, self.question, self.answer)


def _shared_message(chats: Sequence[tuple[Path, str, _Chat]], counts: Counter[str]) -> str | None:
    """The system message of several rows that are more than `_MOST_WITH_ONE_MESSAGE` of those that
    have any, which is counted; None where there is none such."""
    messages = Counter(chat.system for _, _, chat in chats if chat.system)
    if not messages:
        return None
    text, count = messages.most_common(1)[0]
    if count < 2 or count <= _MOST_WITH_ONE_MESSAGE * messages.total():
        return None
    words = shorten(text, _WIDTH, placeholder="...")
    counts[f"system messages, the same in most rows that have one ({words!r})"] = count
    return text


def _read_row(row: dict[str, Any], path: Path, where: str) -> _Chat | None:
    """None: an assistant begins it."""
    key = next((key for key in _KEYS if key in row), None)
    if key is None:
        raise read_error(path, where, f"has neither {' nor '.join(map(repr, _KEYS))}")
    turns = [
        _turn(expect(turn, dict, path, f"{where}.{key}[{i}]"), key, path, f"{where}.{key}[{i}]")
        # What comes after the first answer is not read: tools and pictures may turn up there.
        for i, turn in enumerate(field(row, key, list, path, where)[:_MOST_TURNS])
    ]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    if turns and turns[0][0] == "assistant":
        return None
    if [role for role, _ in turns[:2]] != ["user", "assistant"]:
        raise read_error(
            path,
            f"{where}.{key}",
            "expected a user's turn and then an assistant's, got "
            f"{', '.join(role for role, _ in turns[:2]) or 'neither'}",
        )
    (_, question), (_, answer) = turns[:2]
    return _Chat(system, question, answer)


def _turn(turn: Mapping[str, Any], key: str, path: Path, where: str) -> tuple[str, str]:
    """Who speaks, in our words, and what is said."""
    role_key, text_key = _KEYS[key]
    role = field(turn, role_key, str, path, where)
    if role not in _ROLES:
        raise read_error(
            path, f"{where}.{role_key}", f"expected one of {', '.join(_ROLES)}, got {role!r}"
        )
    return _ROLES[role], trimmed(field(turn, text_key, str, path, where))
