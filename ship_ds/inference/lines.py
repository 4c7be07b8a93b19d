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
    Induction,
    Reasoning,
    WeightCandidate,
    WeightInduction,
)
from ship_ds.parsing import decode, parse_json, read_text, split_lines, trimmed, unicode_text

STDIN = "-"


def read_pairs(source: str) -> list[tuple[str, str]]:
    """Examples (input, target) of JSON lines.

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
    """`input` of each JSON line; a line that is no JSON object is an input as it stands."""
    inputs = []
    for number, line in _lines(source):
        row = _parsed(line, f"{_name(source)}: line {number}")
        is_object = isinstance(row, dict)
        inputs.append(_field(source, number, row, "input") if is_object else trimmed(line))
    return inputs


def _rows(source: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in _lines(source):
        row = _parsed(line, f"{_name(source)}: line {number}")
        if not isinstance(row, dict):
            raise read_error(
                _name(source),
                f"line {number}",
                'expected a JSON object {"input": ..., "target": ...}',
            )
        rows.append((number, row))
    return rows


def _lines(source: str) -> list[tuple[int, str]]:
    """Numbered from 1, without empty ones."""
    text = _stdin() if source == STDIN else read_text(Path(source))
    lines = [
        (number, line) for number, line in enumerate(split_lines(text), start=1) if line.strip()
    ]
    if not lines:
        raise UserError(f"{_name(source)}: is empty; give one JSON object a line")
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


def induction_row(induction: Induction | WeightInduction, num_candidates: int) -> dict[str, Any]:
    """The best candidates without their latents; `alternatives` are the other texts that fit every
    example."""
    row: dict[str, Any] = {"instruction": induction.instruction}
    if isinstance(induction, Induction):
        fitting = [candidate.instruction for candidate in induction.that_fit]
        row["alternatives"] = [text for text in fitting if text != induction.instruction]
        row["num_examples"] = induction.num_examples
    return row | {
        "candidates": [_candidate(c) for c in induction.candidates[:num_candidates]],
        "latent": _short(induction.latent),
    }


def _candidate(candidate: Candidate | WeightCandidate) -> dict[str, Any]:
    row = asdict(candidate)
    del row["latent"]
    # Infinity is no JSON number that another language reads, but rounding it would raise here.
    return {
        key: round(value, 4) if isinstance(value, float) and math.isfinite(value) else value
        for key, value in row.items()
    }


def _short(latent: tuple[float, ...]) -> list[float]:
    return [round(value, 5) for value in latent]


def reasoning_rows(inputs: list[str], reasoning: Reasoning) -> list[dict[str, Any]]:
    """One row an input, each with the induced instruction: `found` is the answer by the latent that
    induction found, `refined` by its text encoded again, `stated` with the text in the prompt."""
    instruction = reasoning.induction.instruction
    answers = zip(inputs, reasoning.by_latent, reasoning.refined, reasoning.in_prompt, strict=True)
    return [
        {
            "input": text,
            "instruction": instruction,
            "found": by_latent,
            "refined": refined,
            "stated": in_prompt,
        }
        for text, by_latent, refined, in_prompt in answers
    ]
