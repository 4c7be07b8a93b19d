"""A lock that a killed build left behind is removed aloud; one process builds at a time."""

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from ship_ds.errors import UserError
from ship_ds.runtime import compiled_ops
from ship_ds.runtime.deepspeed_config import read_deepspeed_config


def test_a_lock_left_behind_is_removed_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    said: list[str] = []
    compiled_ops.build([], said.append)
    assert not lock.exists() and said == [
        f"{lock}: left behind by a process that was killed while it compiled; removed"
    ]


def _hold(path: Path, seconds: float) -> None:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (path.parent / "held").touch()
        time.sleep(seconds)


def test_a_build_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    other = multiprocessing.get_context("fork").Process(
        target=_hold, args=(tmp_path / "ship_ds.lock", 1.0)
    )
    other.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    left = tmp_path / "deepspeed_shm_comm" / "lock"
    left.parent.mkdir()
    left.touch()
    started = time.monotonic()
    compiled_ops.build([], print)
    assert time.monotonic() - started > 0.5
    other.join()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_stops_what_compiles_alone(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", refuse)
    compiled_ops.build([], print)
    with pytest.raises(UserError) as caught:
        compiled_ops.build(["CPUAdamBuilder"], print)
    assert str(caught.value) == (
        f"TORCH_EXTENSIONS_DIR: {tmp_path}: its disk has no locks ({os.strerror(number)}): "
        "set it to a folder on a disk that has them"
    )


def test_a_machine_without_a_compiler_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch 2.13's words: the command, then what the shell says of it."""

    class Failing:
        name = "deepspeed_shm_comm"

        def is_compatible(self) -> bool:
            return True

        def load(self, verbose: bool) -> None:
            raise RuntimeError(
                "Error building extension 'deepspeed_shm_comm': [1/3] /no/c++ -MMD -c shm.cpp\n"
                "FAILED: [code=127] shm.o \n/no/c++ -MMD -c shm.cpp\n"
                "/bin/sh: 1: /no/c++: not found\nninja: build stopped: subcommand failed.\n"
            )

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(type(get_accelerator()), "create_op_builder", lambda self, name: Failing())
    with pytest.raises(UserError) as caught:
        compiled_ops.build(["ShareMemCommBuilder"], print)
    assert str(caught.value) == (
        "DeepSpeed's deepspeed_shm_comm: cannot be compiled: /bin/sh: 1: /no/c++: not found: "
        "install a C++ compiler such as g++, or set CXX to one"
    )


def test_nvme_asks_for_libaio_and_says_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Incompatible:
        def is_compatible(self) -> bool:
            return False

    asks = {
        name: compiled_ops.needed(read_deepspeed_config(f"zero3_offload_{name}"))
        for name in ("nvme", "cpu")
    }
    assert "AsyncIOBuilder" in asks["nvme"] and "AsyncIOBuilder" not in asks["cpu"]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(
        type(get_accelerator()), "create_op_builder", lambda self, name: Incompatible()
    )
    compiled_ops.build(["CPUAdamBuilder"], print)
    with pytest.raises(
        UserError, match="offload to NVMe needs libaio with its headers: install libaio-dev"
    ):
        compiled_ops.build(["AsyncIOBuilder"], print)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_op_of_inference_is_left_out_on_cpus_alone(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the name by which DeepSpeed asks for it; of a machine with GPUs no table is made."""
    name = get_accelerator().create_op_builder("ShareMemCommBuilder").NAME
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {name: True}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    compiled_ops.skip_inference_op()
    assert deepspeed.ops.__compatible_ops__ == {name: has_gpu}
