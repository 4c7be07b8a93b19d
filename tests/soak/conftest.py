"""Tasks in a file, which runs can be killed while they read and tokenise."""

import json
from pathlib import Path

import pytest

from ship_ds.data.rules import RulesConfig, build_world


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty tasks of the generated world as JSONL."""
    splits = build_world(RulesConfig(train_examples=12, test_examples=3, num_seen=40))
    path = tmp_path_factory.mktemp("data") / "tasks.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "id": task.id,
                    "instruction": task.task.instruction,
                    "examples": [
                        {"input": e.input, "target": e.target} for e in (*task.train, *task.test)
                    ],
                }
            )
            + "\n"
            for task in splits.seen
        )
    )
    return path
