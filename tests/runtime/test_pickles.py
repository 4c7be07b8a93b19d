"""What a shard of DeepSpeed's may name."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from ship_ds.runtime.pickles import load_shard, shard_problem


class Got:
    """Pickled as Python 3.11.0 to 3.11.3 do a member of an enumeration: getattr(owner, name)."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, (self.owner, self.name)


def test_a_stage_is_read_however_python_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "shard.pt"
    torch.save({"old": Got(ZeroStageEnum, "gradients"), "new": ZeroStageEnum.weights}, path)
    assert shard_problem(path) is None
    assert load_shard(path) == {"old": ZeroStageEnum.gradients, "new": ZeroStageEnum.weights}


@pytest.mark.parametrize(("owner", "name"), [(LossScaler, "__init__"), (ZeroStageEnum, "__new__")])
def test_nothing_else_is_got_of_an_object(owner: Any, name: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.pt"
    torch.save({"hostile": Got(owner, name)}, path)
    with pytest.raises(pickle.UnpicklingError):
        load_shard(path)
