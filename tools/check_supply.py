"""How many tasks of `ship-ds supply` are right, where the instructions are those of the generated
world: each answer is compared with what the world's own functions make of the input.

    python -m tools.check_supply tasks.jsonl

An instruction that is no wording of the world's grammar is counted as one that means nothing here.
"""

import sys
from functools import partial
from itertools import product
from pathlib import Path

from ship_ds.data.matching import exact_match
from ship_ds.data.readers import read_tasks
from ship_ds.data.rules import FAMILIES, JOINTS, MAX_VALUE, Family, Numbers, Step
from ship_ds.data.task import Task

_PARAMETERS = range(MAX_VALUE + 6)
"""A little beyond those of the world: what is new may well have others."""


def _apply(family: Family, values: Numbers, xs: Numbers) -> Numbers:
    return family.apply(xs, *values)


def _both(first: Step, second: Step, xs: Numbers) -> Numbers:
    return second(first(xs))


def steps() -> dict[str, Step]:
    """Every wording of every family with any parameters."""
    found: dict[str, Step] = {}
    for family in FAMILIES:
        count = len(family.parameters[0])
        for values in product(_PARAMETERS, repeat=count):
            letters = dict(zip("abcd", values, strict=False))
            for template in family.templates:
                found.setdefault(template.format(**letters), partial(_apply, family, values))
    return found


def meanings(text: str, known: dict[str, Step]) -> list[Step]:
    """What the text may mean: a step, or two in a row in each way that it can be cut."""
    found = [known[text]] if text in known else []
    for joint in JOINTS:
        before, between, after = joint.replace("{first}", "|").replace("{second}", "|").split("|")
        if not (text.startswith(before) and text.endswith(after) and between in text):
            continue
        inner = text[len(before) : len(text) - len(after)]
        start = inner.find(between)
        while start >= 0:
            first, second = inner[:start], inner[start + len(between) :]
            if first in known and second in known:
                found.append(partial(_both, known[first], known[second]))
            start = inner.find(between, start + 1)
    return found


def share_right(task: Task, meant: list[Step]) -> float:
    """Of the task's answers, by the meaning that most of them have."""

    def right(step: Step) -> float:
        hits = []
        for example in task.examples:
            numbers = tuple(map(int, example.input.split()))
            try:
                expected = " ".join(map(str, step(numbers)))
            except (IndexError, ValueError, ZeroDivisionError):
                expected = ""
            hits.append(exact_match(example.target, [expected]))
        return sum(hits) / len(hits)

    return max(map(right, meant))


def main() -> None:
    """Print the counts."""
    known = steps()
    tasks = read_tasks(Path(sys.argv[1]), "jsonl")
    found = [(task, meanings(task.instruction, known)) for task in tasks]
    shares = [share_right(task, meant) for task, meant in found if meant]
    print(f"{len(tasks)} tasks, {len(shares)} of them in the world's words")
    if shares:
        whole = sum(share == 1 for share in shares)
        mean = sum(shares) / len(shares)
        print(f"{whole} with every answer right; {mean:.3f} of the answers on average")
    for task, meant in found:
        verdict = f"{share_right(task, meant):.2f}" if meant else "  no"
        print(f"{verdict}  {task.instruction}")


if __name__ == "__main__":
    main()
