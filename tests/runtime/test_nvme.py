"""What is on NVMe is there while a checkpoint is written; a real disk and DeepSpeed are in the soak
(tests/soak/test_nvme.py)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ship_ds.runtime import nvme


class Swapped:
    """As DeepSpeed's OptimizerStateSwapInfo: tensors whose data are in files between steps."""

    def __init__(self, folder: Path, values: dict[str, list[float]]) -> None:
        self.paths = [str(folder / name) for name in values]
        self.tensors = [torch.empty(0) for _ in values]
        self.length = len(next(iter(values.values())))
        for path, value in zip(self.paths, values.values(), strict=True):
            # files are aligned, so longer
            Path(path).write_bytes(torch.tensor([*value, *([7.0] * 100)]).numpy().tobytes())

    def get_compute_tensors(self) -> list[torch.Tensor]:
        return self.tensors

    def get_swap_paths(self) -> list[str]:
        return self.paths

    def numel(self) -> int:
        return self.length

    def dtype(self) -> torch.dtype:
        return torch.float32


class Engine:
    def __init__(self, optimizer: SimpleNamespace) -> None:
        self.optimizer = optimizer

    def zero_nvme_offload_optimizer(self) -> bool:
        return True


def test_swapped_tensors_are_there_and_gone_again_even_after_an_error(tmp_path: Path) -> None:
    values = {"weights.swp": [1.0, 2.0, 3.0], "moment.swp": [0.5, 0.25, 0.125]}
    swapped = Swapped(tmp_path, values)
    engine = Engine(
        SimpleNamespace(optimizer_swapper=SimpleNamespace(swap_params_info={"0_4": swapped}))
    )
    with pytest.raises(OSError, match="the disk is full"), nvme.map_swap_files(engine):
        assert [tensor.tolist() for tensor in swapped.tensors] == list(values.values())
        assert not engine.zero_nvme_offload_optimizer(), "or DeepSpeed copies the files as well"
        torch.save(swapped.tensors[1], tmp_path / "shard.pt")
        raise OSError("the disk is full")
    assert [tensor.numel() for tensor in swapped.tensors] == [
        0,
        0,
    ] and engine.zero_nvme_offload_optimizer()
    assert torch.load(tmp_path / "shard.pt", weights_only=True).tolist() == values["moment.swp"]
    assert (tmp_path / "shard.pt").stat().st_size < 5000


def test_without_nvme_nothing_is_mapped(tmp_path: Path) -> None:
    engine = Engine(SimpleNamespace(optimizer_swapper=None))
    with nvme.map_swap_files(engine):
        assert engine.zero_nvme_offload_optimizer()
