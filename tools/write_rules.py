"""Rules of the generated world as a file of our JSONL: for teachers, mixtures and other programs.

    python -m tools.write_rules --out rules.jsonl more_compositions=4
    python -m tools.write_rules --out new.jsonl --without more_compositions=4 --unlabelled \
        more_compositions=200

Arguments are settings of `data`, kind: rules. Seen rules alone are written, with the examples that
training has; dev and unseen ones never. `--unlabelled` writes instructions alone.
"""

import argparse
import json
import sys
from pathlib import Path

from ship_ds.config import overridden
from ship_ds.data.readers.jsonl import row_of
from ship_ds.data.rules import RulesConfig, build_world
from ship_ds.data.task import Task
from ship_ds.files import write_text


def seen(settings: list[str]) -> dict[str, Task]:
    """The seen rules of a world by their instruction, with training examples alone."""
    splits = build_world(RulesConfig.model_validate(overridden({}, settings)))
    return {
        one.task.instruction: Task(
            one.id,
            one.task.instruction,
            one.train,
            one.task.paraphrases,
            family=one.task.family,
        )
        for one in splits.seen
    }


def main(arguments: list[str]) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        help="a setting of the world whose rules are left out",
    )
    parser.add_argument(
        "--unlabelled", action="store_true", help="instructions alone, without inputs and targets"
    )
    parser.add_argument("settings", nargs="*")
    asked = parser.parse_args(arguments)
    tasks = seen(asked.settings)
    if asked.without:
        left_out = seen(asked.without)
        tasks = {text: task for text, task in tasks.items() if text not in left_out}
    rows = [
        row_of(task, {"how": "generated", "settings": asked.settings}) for task in tasks.values()
    ]
    if asked.unlabelled:
        rows = [{**row, "examples": [], "inputs": []} for row in rows]
    write_text(asked.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{asked.out}: {len(rows)} rules")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
