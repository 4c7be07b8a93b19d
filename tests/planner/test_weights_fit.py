"""A run that cannot hold its weights ends in one line, before any of them is made."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ship_ds.config import Config, load_config
from ship_ds.errors import UserError
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.planner.weights_fit import FreeMemory, check_weights_fit
from tests.conftest import environment

pytestmark = pytest.mark.slow

PLENTY = 10**13


def config(*overrides: str) -> Config:
    return load_config("quickstart-smoke", overrides)


def counts(of: Config) -> tuple[int, int]:
    """Trained parameters of the real model, all and those of the hypernetwork."""
    ship = build_ship(of.model, LoadedWeights(torch.float32), of.loss)
    trained = sum(one.numel() for one in ship.parameters() if one.requires_grad)
    return trained, sum(one.numel() for one in ship.hypernetwork.parameters())


@pytest.mark.parametrize(
    ("deepspeed", "num_ranks", "bytes_each"),
    [
        # weights, gradients, and master copy with two moments
        ("zero2", 2, 4 + (4 + 12) / 2),
        ("zero1", 4, 4 + 4 + 12 / 4),
        ("zero2_bf16", 2, 2 + (2 + 12) / 2),
    ],
)
def test_the_ranks_of_a_cpu_share_its_memory(
    deepspeed: str, num_ranks: int, bytes_each: float
) -> None:
    run = config(f"training.deepspeed={deepspeed}")
    needed = int(num_ranks * bytes_each * counts(run)[0])
    with pytest.raises(
        UserError, match=r"^model: .* of this machine would hold .* GB free \("
    ) as e:
        check_weights_fit(run, num_ranks, FreeMemory(num_ranks, needed, None))
    assert f"hypernetwork {counts(run)[1]:,}" in str(e.value)
    # the 4-bit Task LLM comes on top, a tenth at most
    check_weights_fit(run, num_ranks, FreeMemory(num_ranks, int(1.1 * needed), None))


def test_on_gpus_the_host_holds_what_is_offloaded_and_what_is_made_there_first() -> None:
    run = config("training.deepspeed=zero2_bf16")
    trained, made = counts(run)
    check_weights_fit(run, 1, FreeMemory(1, 4 * made, 20 * trained))
    with pytest.raises(UserError, match="rank"):
        check_weights_fit(run, 1, FreeMemory(1, 4 * made - 1, 20 * trained))
    with pytest.raises(UserError, match="a GPU"):
        check_weights_fit(run, 1, FreeMemory(1, PLENTY, 16 * trained))
    offloaded = config("training.deepspeed=zero2_bf16_offload_optimiser")
    with pytest.raises(UserError, match="rank"):
        check_weights_fit(offloaded, 1, FreeMemory(1, 12 * trained - 1, PLENTY))
    check_weights_fit(offloaded, 1, FreeMemory(1, 12 * trained, PLENTY))


def test_what_lies_on_a_disk_takes_no_memory() -> None:
    run = config("training.deepspeed=zero3_offload_nvme")
    check_weights_fit(run, 1, FreeMemory(1, 4 * counts(run)[1], PLENTY))


def test_this_machine_has_room_for_the_embedded_model() -> None:
    check_weights_fit(config(), 1, FreeMemory.here())


def test_a_latent_of_a_hundred_million_is_one_line(tmp_path: Path) -> None:
    """It was killed by the kernel, after a minute of making numbers."""
    overrides = ["model.latent_size=100000000", f"run.folder={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "ship_ds.train", "--config", "quickstart-smoke", *overrides],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and "model.latent_size" in lines[0], done.stderr
    assert "GB free" in lines[0]
