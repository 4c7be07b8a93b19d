"""The bundle with random heads that inference is tested with, and tasks whose instructions it
knows."""

import json
from pathlib import Path

import pytest

from ship_ds.api import Ship
from tests.inference.conftest import KNOWN, random_bundle


@pytest.fixture(scope="session")
def ship(tmp_path_factory: pytest.TempPathFactory) -> Ship:
    return Ship.from_run(random_bundle(tmp_path_factory.mktemp("supply") / "bundle", 0.3))


@pytest.fixture(scope="session")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of the words that the bundle knows; the targets of `remove every` are right."""
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "id": f"t{number}",
                    "instruction": text,
                    "examples": [
                        {"input": f"{i} {number} {9 - i} 3", "target": f"{i} {9 - i}"}
                        for i in range(10)
                    ],
                }
            )
            + "\n"
            for number, text in enumerate(KNOWN)
        )
    )
    return path
