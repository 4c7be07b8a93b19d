"""JSON lines in and out of the verbs: `{"input": ..., "target": ...}` a line, from a file or from
standard input. Read without torch, so that a bad line is told at once."""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ship_ds.data.task import read_error
from ship_ds.errors import UserError
from ship_ds.inference.results import (
    Candidate,
    Explained,
    Explanation,
    Induction,
    Reasoning,
)
from ship_ds.parsing import decode, parse_json, read_text, split_lines, trimmed, unicode_text

STDIN = "-"
_PAIRS = 'a JSON object a line, {"input": ..., "target": ...}'


def read_pairs(source: str) -> list[tuple[str, str]]:
    """Examples (input, target) of JSON lines, one or more.

    Args:
        source: a file, or STDIN.

    Raises:
        UserError: a line is not one; the message names file and line.
    """
    return [
        (_field(source, number, row, "input"), _field(source, number, row, "target"))
        for number, row in _rows(source)
    ]


def read_inputs(source: str) -> list[str]:
    """`input` of each JSON line; a line that is no JSON object is an input as it stands.

    Raises UserError: there is none, or an object has none.
    """
    inputs = []
    for number, line in _lines(source, 'one input a line, or JSON lines {"input": ...}'):
        row = _parsed(line, f"{_name(source)}: line {number}")
        is_object = isinstance(row, dict)
        inputs.append(_field(source, number, row, "input") if is_object else trimmed(line))
    return inputs


def _rows(source: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in _lines(source, _PAIRS):
        row = _parsed(line, f"{_name(source)}: line {number}")
        if not isinstance(row, dict):
            raise read_error(
                _name(source),
                f"line {number}",
                f"expected {_PAIRS}",
            )
        rows.append((number, row))
    return rows


def _lines(source: str, expected: str) -> list[tuple[int, str]]:
    """Numbered from 1, without empty ones."""
    text = _stdin() if source == STDIN else read_text(Path(source))
    lines = [
        (number, line) for number, line in enumerate(split_lines(text), start=1) if line.strip()
    ]
    if not lines:
        raise UserError(f"{_name(source)}: is empty; give {expected}")
    return lines


def _stdin() -> str:
    """As UTF-8, whatever the terminal's locale."""
    bytes_of = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if bytes_of is None else decode(bytes_of.read(), _name(STDIN))


def _parsed(line: str, place: str) -> Any:
    """The JSON of a line; None where it is none. Raises UserError for an object that is broken."""
    try:
        return parse_json(line, place, is_line=True)
    except UserError:
        if line.lstrip().startswith("{"):
            raise
        return None


def _field(source: str, number: int, row: dict[str, Any], key: str) -> str:
    if not isinstance(row.get(key), str):
        raise read_error(
            _name(source),
            f"line {number}: {key}",
            f"expected a string, got {type(row.get(key)).__name__}",
        )
    return unicode_text(trimmed(row[key]), f"{_name(source)}: line {number}: {key}")


def _name(source: str) -> str:
    return "standard input" if source == STDIN else source


def induction_row(induction: Induction, num_candidates: int) -> dict[str, Any]:
    """The best candidates without their latents; `alternatives` are the texts beside the best one
    that fit every example."""
    fitting = [candidate.instruction for candidate in induction.that_fit]
    return {
        "instruction": induction.instruction,
        "alternatives": [text for text in fitting if text != induction.instruction],
        "num_examples": induction.num_examples,
        "candidates": [_candidate(c) for c in induction.candidates[:num_candidates]],
        "latent": _short(induction.latent),
    }


def _candidate(candidate: Candidate | Explained) -> dict[str, Any]:
    row = asdict(candidate)
    row.pop("latent", None)
    # Infinity is no JSON number that another language reads, but rounding it would raise here.
    return {
        key: round(value, 4) if isinstance(value, float) and math.isfinite(value) else value
        for key, value in row.items()
    }


def explanation_row(explanation: Explanation) -> dict[str, Any]:
    """An explanation as JSON, with every answer."""
    answers = zip(explanation.inputs, explanation.answers, explanation.base_answers, strict=True)
    return {
        "instruction": explanation.instruction,
        "agreement": round(explanation.agreement, 4),
        "threshold": round(explanation.threshold, 4),
        "candidates": [_candidate(one) for one in explanation.candidates],
        "answers": [
            {"input": text, "adapter": answer, "base": bare} for text, answer, bare in answers
        ],
        "updates": {path: round(norm, 4) for path, norm in explanation.updates.items()},
    }


def explanation_text(explanation: Explanation, folder: str) -> list[str]:
    """The same for people: what it does, how that is known, and what it changes."""
    count, best = len(explanation.inputs), explanation.candidates[:1]
    if explanation.instruction is not None:
        lines = [f"{folder}: {explanation.instruction}"]
    elif not explanation.num_changed:
        lines = [f"{folder}: answers all {count} inputs as the base does"]
    else:
        lines = [f"{folder}: none of what this run can say does this"]
    for one in best:
        prompt = (
            "" if one.same_in_prompt is None else f", as text in the prompt {one.same_in_prompt}"
        )
        lines.append(
            f"  {one.instruction!r}: its own adapter gives {one.same} of the {count} answers"
            f"{prompt}; agreement {one.agreement:.2f}, threshold {explanation.threshold:.2f}; "
            f"found by {' and '.join(one.sources)}"
        )
    lines += [
        f"  or {one.instruction!r}: {one.same} of {count}, agreement {one.agreement:.2f}"
        for one in explanation.candidates[1:3]
    ]
    if explanation.updates:
        names: dict[str, int] = {}
        for path in explanation.updates:
            name = path.rpartition(".")[2]
            names[name] = names.get(name, 0) + 1
        touched = ", ".join(f"{name} ({number})" for name, number in names.items())
        lines.append(f"  changes {len(explanation.updates)} modules: {touched}")
    lines.append(f"  answers {explanation.num_changed} of {count} inputs otherwise than the base:")
    answers = zip(explanation.inputs, explanation.answers, explanation.base_answers, strict=True)
    changed = [row for row in answers if row[1] != row[2]]
    lines += [f"    {text}: {answer}   (base: {bare})" for text, answer, bare in changed[:3]]
    return lines


def _short(latent: tuple[float, ...]) -> list[float]:
    return [round(value, 5) for value in latent]


def reasoning_rows(inputs: list[str], reasoning: Reasoning) -> list[dict[str, Any]]:
    """One row an input, each with the induced instruction and the answers of `Reasoning`, by its
    names; `answer` is the one to take, `refined`."""
    instruction = reasoning.induction.instruction
    answers = zip(inputs, reasoning.by_latent, reasoning.refined, reasoning.in_prompt, strict=True)
    rows: list[dict[str, Any]] = [
        {
            "input": text,
            "answer": refined,
            "instruction": instruction,
            "by_latent": by_latent,
            "refined": refined,
            "in_prompt": in_prompt,
        }
        for text, by_latent, refined, in_prompt in answers
    ]
    for row, answer in zip(rows, reasoning.read or [], strict=False):
        row["read"] = answer
    return rows
