"""What a rank that ends with bad input leaves for whoever started the ranks."""

import errno
import io
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ship_ds import train
from ship_ds.exit_codes import BAD_INPUT
from ship_ds.runtime.bad_input import VARIABLE, say_bad_input


def test_the_first_rank_leaves_its_line_and_all_say_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bytes of a file's name that are no text."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    left = tmp_path / "bad-input-0"
    monkeypatch.setenv(VARIABLE, str(left))
    for rank in ("3", "4"):
        monkeypatch.setenv("RANK", rank)
        say_bad_input(f"/data\udcff:\n not for rank {rank}")
    assert left.read_text() == (
        f"ship-ds: rank 3 on {platform.node()}: /data\\udcff:  not for rank 3\n"
    )
    assert [line[-1] for line in said.getvalue().splitlines()] == ["3", "4"]


@pytest.mark.parametrize("place", [None, "", "/nowhere/line", "/dev/full"])
def test_a_line_that_cannot_be_left_keeps_no_process_from_its_end(
    place: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.delenv(VARIABLE, raising=False)
    if place is not None:
        monkeypatch.setenv(VARIABLE, place)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=fail, flush=fail))
    say_bad_input("no room")


def test_a_training_that_is_refused_leaves_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "line"))
    assert train.main(["--config", "quikstart"]) == BAD_INPUT
    [said] = capsys.readouterr().err.splitlines()
    assert (tmp_path / "line").read_text().endswith(said[len("ship-ds: ") :] + "\n")
