"""One line from rank 0 alone, without torch."""

import logging
import subprocess
import sys

import pytest

from ship_ds.console import current_rank, log, no_log
from ship_ds.errors import UserError
from ship_ds.monitor.progress import ProgressLine


def test_a_line_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log("saved")
    assert capsys.readouterr() == ("", "ship-ds: saved\n")


def test_a_name_with_ends_of_lines_stays_on_one(capsys: pytest.CaptureFixture[str]) -> None:
    log("a\r\nb\nc")
    assert capsys.readouterr() == ("", "ship-ds: a b c\n")
    assert str(UserError("a\r\nb\u2028c\n")) == "a b c"


def test_no_log_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    no_log("saved")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_other_ranks_are_silent_before_the_process_group_is_there(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "1")
    log("saved")
    assert capsys.readouterr().err == ""


def test_the_launchers_rank_counts_before_that_of_slurm() -> None:
    # torchrun under `srun`: every rank of a node has the same SLURM_PROCID
    assert current_rank({"RANK": "3", "SLURM_PROCID": "0"}) == 3
    assert current_rank({}) == 0


def test_imports_no_torch() -> None:
    code = "import sys; from ship_ds.console import log; log('a'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bitsandbytes_notice_of_a_missing_kernel_is_dropped_and_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "offline")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_a_log_of_the_callers_own_is_told_of_each_part() -> None:
    """It may end the work there."""
    lines: list[str] = []
    with ProgressLine("induction", 2, "part", lines.append) as progress:
        for part in ("the decoder proposes", "testing"):
            progress.begin(part)
            progress.done(1)
    assert lines == ["the decoder proposes", "testing"]


class Clock:
    """Seconds that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("ship_ds.monitor.progress.time.perf_counter", lambda: self.now)


def test_a_line_comes_every_ten_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with ProgressLine("report", 4) as progress:
        for clock.now in (1, 11, 12, 13):
            progress.done(1)
        progress.begin("the rest")
        progress.done(0)
    assert capsys.readouterr().err == (
        "ship-ds: report: 2 of 4 tasks, 11 s\n"
        "ship-ds: report: 4 of 4 tasks, 13 s\n"
        "ship-ds: report: the rest: 4 of 4 tasks, 13 s\n"
    )


def test_what_ends_before_the_quiet_seconds_is_not_spoken_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    for seconds in ((1, 9), (1, 10), (11, 12)):
        with ProgressLine("encoding", 2, "instruction", quiet_seconds=10) as progress:
            begun = clock.now
            for second in seconds:
                clock.now = begun + second
                progress.done(1)
        print("--", file=sys.stderr)
    assert capsys.readouterr().err == (
        "--\n"
        "ship-ds: encoding: 2 of 2 instructions, 10 s\n"
        "--\n"
        "ship-ds: encoding: 1 of 2 instructions, 11 s\n"
        "ship-ds: encoding: 2 of 2 instructions, 12 s\n"
        "--\n"
    )


def test_a_bar_waits_as_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with ProgressLine("encoding", 2, "instruction", quiet_seconds=10) as progress:
        progress.done(2)
    assert capsys.readouterr().err == ""
    with ProgressLine("encoding", 2, "instruction") as progress:
        progress.done(2)
    assert "2/2" in capsys.readouterr().err
