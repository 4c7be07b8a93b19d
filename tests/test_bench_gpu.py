"""The GPU benchmark where there is no GPU, and what it keeps of an earlier report."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tools import bench_gpu

REPORT = {"card": {"gpu": "a card"}, "versions": {"torch": "2.13.0"}}


def test_without_cuda_it_says_so_in_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", "--out", str(tmp_path / "gpu.json")])
    assert bench_gpu.main() == 0
    assert capsys.readouterr().out == "bench_gpu: no CUDA here, nothing was measured\n"
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize(("torch_version", "parts"), [("2.13.0", {"limits": {}}), ("2.14.0", {})])
def test_parts_of_another_version_do_not_stay(
    torch_version: str, parts: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**REPORT, "parts": {"limits": {}}}))
    report = {**REPORT, "versions": {"torch": torch_version}}
    assert bench_gpu._earlier_parts(path, report) == parts


def test_what_a_stopped_part_had_found_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_until_the_limit(command: list[str], **_: object) -> None:
        monkeypatch.setattr(bench_gpu, "_kept_in", Path(command[command.index("--out") + 1]))
        bench_gpu.keep({"first case": 1.5})
        raise subprocess.TimeoutExpired(command, 60, output="a line")

    monkeypatch.setattr(subprocess, "run", run_until_the_limit)
    assert bench_gpu.run_part("limits", 2) == {
        "first case": 1.5,
        "failed": ["stopped after 60 s", "a line"],
    }


def test_relative_error_is_one_where_the_difference_is_as_large_as_the_reference() -> None:
    reference = torch.tensor([1.0, 2.0, 2.0])
    assert bench_gpu.relative_error(reference, reference) == 0
    assert bench_gpu.relative_error(reference + torch.tensor([0.0, 0.0, 3.0]), reference) == 1
