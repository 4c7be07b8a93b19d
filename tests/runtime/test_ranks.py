"""Programs that joined a process group leave it: see `ranks.leave` for what happens to those that do not."""

from pathlib import Path

import pytest
import torch.distributed as dist

from ship_ds import cli, train
from ship_ds.errors import UserError
from ship_ds.evaluation import evaluate
from ship_ds.runtime import ranks


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ranks.SINGLE.items():
        monkeypatch.setenv(name, value)


def test_training_leaves_its_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: object) -> None:
        assert dist.is_initialized()
        raise UserError("as the real one would")

    monkeypatch.setattr(train, "build_world", refused)
    assert train.main(["--config", "quickstart-smoke", f"run.folder={tmp_path / 'run'}"]) == 2
    assert not dist.is_initialized()


def test_evaluation_leaves_its_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: object) -> None:
        assert dist.is_initialized()
        raise UserError("as the real one would")

    monkeypatch.setattr(evaluate, "evaluate", refused)
    assert cli.main(["evaluate", "--run", str(tmp_path), "--methods", "ship"]) == 2
    assert not dist.is_initialized()


def test_to_leave_twice_is_to_leave_once() -> None:
    ranks.start(None)
    ranks.leave()
    ranks.leave()
    ranks.start(None)
    ranks.leave()
    assert not dist.is_initialized()
