"""Bundles out of ZeRO-3 shards of any world size: exact, verified, and never the whole state in
memory."""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ship_ds.errors import UserError
from ship_ds.monitor.memory import PeakMemory
from ship_ds.runtime.checkpoint import trainable_state
from ship_ds.tensor_file import TensorFile


def write_shards(folder: Path, state: dict[str, Tensor], world_size: int) -> None:
    """As DeepSpeed's ZeRO-3 lays them out: every parameter padded and cut in equal parts, each
    rank's parts end to end."""
    (folder / "state").mkdir(parents=True)
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in state.items())]
    for rank in range(world_size):
        parts = []
        for tensor in state.values():
            size = math.ceil(tensor.numel() / world_size)
            flat = torch.nn.functional.pad(
                tensor.flatten(), (0, size * world_size - tensor.numel())
            )
            parts.append(flat[rank * size : (rank + 1) * size])
        names = folder / "state" / f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(
            {
                "module": {},
                "buffer_names": [],
                "param_shapes": shapes,
                "shared_params": {},
                "ds_version": "0.19.8",
            },
            f"{names}_model_states.pt",
        )
        torch.save(
            {
                "optimizer_state_dict": {
                    "zero_stage": 3,
                    "partition_count": world_size,
                    "fp32_flat_groups": [torch.cat(parts)],
                    "optimizer_state_dict": {},
                }
            },
            f"{names}_optim_states.pt",
        )
    write_manifest(folder)


def write_manifest(folder: Path) -> None:
    manifest = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*.pt")
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_parameters_come_back_from_any_number_of_ranks(world_size: int, tmp_path: Path) -> None:
    state = {f"w{i}": torch.randn(7 + i, 5) for i in range(4)} | {"scalar": torch.randn(1)}
    write_shards(tmp_path / "step", state, world_size)
    found = trainable_state(tmp_path / "step")
    assert list(found) == list(state) and all(found[name].equal(state[name]) for name in state)


@pytest.mark.slow
def test_one_parameter_at_a_time_is_in_memory(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {f"w{i}": torch.empty(2**21).uniform_(generator=generator) for i in range(24)}
    write_shards(tmp_path / "step", state, 3)
    wanted, num_bytes = state["w23"].clone(), sum(tensor.nbytes for tensor in state.values())
    state.clear()
    with PeakMemory() as peak:
        found = trainable_state(tmp_path / "step")
        with TensorFile(tmp_path / "out.safetensors", found) as file:
            for name in found:
                file.add(name, found[name])
    assert peak.anonymous < num_bytes / 3
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert opened.get_tensor("w23").equal(wanted)


def test_a_missing_shard_is_one_line(tmp_path: Path) -> None:
    write_shards(tmp_path / "step", {"w": torch.randn(8)}, 2)
    (tmp_path / "step" / "state" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt is missing"):
        trainable_state(tmp_path / "step")


class Marker:
    """What an untrusted checkpoint would run as it is opened."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("opened",)


def test_a_shard_that_names_other_code_is_refused_before_it_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "step", {"w": torch.randn(4)}, 2)
    shard = tmp_path / "step" / "state" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save(torch.load(shard) | {"marker": Marker()}, shard)
    write_manifest(tmp_path / "step")
    with pytest.raises(
        UserError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt names .*print"
    ):
        trainable_state(tmp_path / "step")
    assert "opened" not in capsys.readouterr().out


def legacy(path: Path) -> None:
    torch.save({"w": torch.randn(2)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "write",
    [
        legacy,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 and no zip"),
    ],
    ids=["legacy", "empty", "broken zip"],
)
def test_a_shard_that_torch_cannot_look_into_is_refused_by_name(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    write_shards(tmp_path / "step", {"w": torch.randn(4)}, 1)
    write(tmp_path / "step" / "state" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    write_manifest(tmp_path / "step")
    with pytest.raises(
        UserError, match=r"rank_0_mp_rank_00_optim_states\.pt is not a file that torch\.save writes"
    ):
        trainable_state(tmp_path / "step")


def test_a_shard_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "step", {"w": torch.randn(4)}, 1)
    torch.save({}, tmp_path / "step" / "state" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(
        UserError, match=r"rank_1_mp_rank_00_optim_states\.pt is not in manifest\.json"
    ):
        trainable_state(tmp_path / "step")
