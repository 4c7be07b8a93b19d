"""The page and the trace of a profile."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._C._autograd import DeviceType

from ship_ds.monitor.profile import StepProfile, operation_kind, page


def test_a_profile_leaves_a_page_and_a_trace_and_ends_by_itself(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, 2)
    for _ in range(6):
        torch.ones(64, 64) @ torch.ones(64, 64)
        profile.step()
    profile.close()
    [trace] = (tmp_path / "tensorboard").glob("rank-0.*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2, "the recorded steps alone"
    text = (tmp_path / "profile.md").read_text()
    assert "# Profile of 2 steps" in text and "| `aten::mm` | " in text


def test_times_and_calls_are_those_of_one_step() -> None:
    """A kernel's own event is no second time of the operation that launched it."""
    events = [
        SimpleNamespace(device_type=device, key=key, self_cpu_time_total=microseconds, count=count)
        for device, key, microseconds, count in (
            (DeviceType.CPU, "aten::mm", 6000, 4),
            (DeviceType.CPU, "gloo:all_reduce", 1000, 2),
            (DeviceType.CPU, "aten::_local_scalar_dense", 1000, 6),
            (DeviceType.CUDA, "sm90_gemm", 5000, 4),
        )
    ]
    text = page(events, 2)
    assert "| `aten::mm` | 3.00 | 75.0 % | 2 |" in text
    assert "| matrix products | 3.00 | 75.0 % |" in text
    assert "| between ranks | 0.50 | 12.5 % |" in text
    assert "4.0 ms of operations a step on rank 0; the host waits for a value 3 times" in text


def test_a_run_that_is_too_short_leaves_no_page(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, 5)
    profile.step()
    profile.close()
    assert not (tmp_path / "profile.md").exists()


def test_a_run_that_ends_early_divides_by_the_steps_it_took(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, 5)
    for _ in range(4):
        torch.ones(64, 64) @ torch.ones(64, 64)
        profile.step()
    profile.close()
    text = (tmp_path / "profile.md").read_text()
    assert "# Profile of 2 steps" in text
    [row] = [line for line in text.splitlines() if line.startswith("| `aten::mm` |")]
    assert row.endswith(" 1 |")


def test_kinds() -> None:
    assert operation_kind("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert operation_kind("aten::_fused_adamw_") == "optimiser"
    assert operation_kind("aten::silu") == "everything else"
