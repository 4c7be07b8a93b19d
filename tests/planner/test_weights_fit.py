"""A run that cannot hold its weights ends in one line, before any of them is made."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ship_ds.config import Config, load_config
from ship_ds.errors import UserError
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.planner import weights_fit
from ship_ds.planner.weights_fit import Memory, check_weights_fit
from ship_ds.runtime.deepspeed_config import read_deepspeed_config
from tests.conftest import environment

pytestmark = pytest.mark.slow

PLENTY = 10**13


def config(*overrides: str) -> Config:
    return load_config("quickstart-smoke", overrides)


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    """Parameters of the real model, by what they are."""
    run = config()
    ship = build_ship(run.model, LoadedWeights(torch.float32), run.loss)
    return {
        "trained": sum(one.numel() for one in ship.parameters() if one.requires_grad),
        "hypernetwork": sum(one.numel() for one in ship.hypernetwork.parameters()),
    }


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
    counts: dict[str, int], deepspeed: str, num_ranks: int, bytes_each: float
) -> None:
    run = config(f"training.deepspeed={deepspeed}")
    needed = int(num_ranks * bytes_each * counts["trained"])
    with pytest.raises(
        UserError, match=r"^model: .* of this machine would hold .* GB \("
    ) as caught:
        check_weights_fit(run, num_ranks, Memory(num_ranks, needed, None))
    assert f"hypernetwork {counts['hypernetwork']:,}" in str(caught.value)
    # the 4-bit Task LLM comes on top, a tenth at most
    check_weights_fit(run, num_ranks, Memory(num_ranks, int(1.1 * needed), None))


def test_on_gpus_the_host_holds_what_is_offloaded_alone(counts: dict[str, int]) -> None:
    trained = counts["trained"]
    run = config("training.deepspeed=zero2_bf16")
    check_weights_fit(run, 1, Memory(1, 0, 20 * trained))
    with pytest.raises(UserError, match="a GPU would hold"):
        check_weights_fit(run, 1, Memory(1, PLENTY, 16 * trained))
    offloaded = config("training.deepspeed=zero2_bf16_offload_optimiser")
    # trained weights, frozen ones in 4 bits, and no gradients, which leave as they come
    check_weights_fit(offloaded, 1, Memory(1, 12 * trained, 3 * trained))
    with pytest.raises(UserError, match="rank"):
        check_weights_fit(offloaded, 1, Memory(1, 12 * trained - 1, PLENTY))
    with pytest.raises(UserError, match="a GPU"):
        check_weights_fit(offloaded, 1, Memory(1, PLENTY, 2 * trained))


def test_what_lies_on_a_disk_takes_no_memory() -> None:
    check_weights_fit(config("training.deepspeed=zero3_offload_nvme"), 1, Memory(1, 0, PLENTY))


def test_a_file_with_less_optimiser_state_is_not_refused_for_more(
    counts: dict[str, int], tmp_path: Path
) -> None:
    values: dict[str, Any] = read_deepspeed_config("zero2_bf16")
    for key in ("bf16_optimizer_states", "bf16_master_weights_and_grads"):
        path = tmp_path / f"{key}.json"
        path.write_text(json.dumps(values | {"bf16": {"enabled": True, key: True}}))
        memory = Memory(1, PLENTY, 6 * counts["trained"])
        check_weights_fit(config(f"training.deepspeed={path}"), 1, memory)


def test_a_kind_that_cannot_be_made_without_weights_trains_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a plug-in's that reads a value as it is made."""
    monkeypatch.setattr(weights_fit, "build_whole", lambda *_: torch.zeros(1, device="meta").item())
    check_weights_fit(config(), 1, Memory(1, 0, None))
    assert "memory is not compared" in capsys.readouterr().err


def test_it_counts_what_a_machine_has_and_not_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others hold now may be gone when the run needs it, as after a requeue."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 80 * 10**9))
    monkeypatch.setattr(weights_fit, "host_bytes", lambda: 500)
    assert Memory.here(4) == Memory(4, 500, 80 * 10**9)


def test_this_machine_can_hold_the_embedded_model() -> None:
    check_weights_fit(config(), 1, Memory.here(1))


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
    assert "GB or more" in lines[0]
