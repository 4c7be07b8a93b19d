"""How a program that joined a process group ends (`ranks.exit_process`), and how values get from
rank to rank as text."""

import errno
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ship_ds.errors import UserError
from ship_ds.runtime import ranks
from tests.conftest import start

_PROGRAM = """
import atexit, os
atexit.register(print, "at exit")  # runs last, after logging has flushed what it writes to
from ship_ds.runtime import ranks

class Watch:
    def __del__(self, write=os.write):  # by then the module's own names are gone
        write(2, b"taken down")

ranks.start(1)
watch = Watch()
print("said", end=" ")
{end}
"""


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """A program that ends itself no longer hears them, and it ends in the tests' own process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.slow
def test_leaving_flushes_and_takes_nothing_down(tmp_path: Path) -> None:
    """-E: PYTHONUNBUFFERED would do the flushing. And a group on CPUs needs no compiler."""
    (tmp_path / "leaves.py").write_text(_PROGRAM.format(end="ranks.exit_process(3)"))
    (tmp_path / "exits.py").write_text(_PROGRAM.format(end="raise SystemExit(3)"))
    without = {"CXX": "/no/c++", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    leaves, exits = (
        start(["-E", str(tmp_path / name)], **without) for name in ("leaves.py", "exits.py")
    )
    assert leaves.returncode == exits.returncode == 3, leaves.stderr
    assert leaves.stdout.endswith("said at exit\n")
    assert "taken down" in exits.stderr and "taken down" not in leaves.stderr
    assert not list((tmp_path / "ops").glob("deepspeed_*"))


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("[pair.cc:553] Connection closed by peer [127.0.0.1]:14209. This is typically", True),
        ("[pair.cc:537] Read error [127.0.0.1]:2: Connection reset by peer", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_rank_whose_peer_has_ended_adds_one_line(
    text: str, is_lost: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise RuntimeError(text)

    codes: list[int] = []
    monkeypatch.setattr(ranks, "exit_process", codes.append)
    monkeypatch.setattr(ranks, "refuse_other_writers", lambda: None)
    ranks.run_program(main)
    said = capsys.readouterr().err
    assert codes == [1] and ("Traceback" in said) is not is_lost
    assert said.startswith("ship-ds: rank 0: another rank has ended") is is_lost
    assert f"RuntimeError: {text}" in said  # gloo's, or it could be any rank and any reason


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (RuntimeError("Connection closed by peer"), 1),
        (RuntimeError("of its own"), 1),
    ],
)
def test_a_log_on_a_full_disk_does_not_keep_a_process_from_its_end(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class End(Exception):  # noqa: N818
        """In the place of the process's."""

    def main() -> int:
        raise error

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def end(code: int) -> None:
        raise End(code)

    monkeypatch.setattr(ranks, "refuse_other_writers", lambda: None)
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ranks.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(ranks.os, "_exit", end)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, SimpleNamespace(write=fail, flush=fail))
    with pytest.raises(End) as found:
        ranks.run_program(main)
    assert found.value.args == (code,)


@pytest.mark.slow
def test_interrupts_from_the_keyboard_are_a_line_and_code_130(tmp_path: Path) -> None:
    """The second comes while the process is ending."""
    program = tmp_path / "interrupted.py"
    # On a busy machine the signal may come after the call that sends it.
    wait = "    import time\n    time.sleep(60)\n"
    end = f"def main():\n    os.kill(os.getpid(), 2)\n{wait}"
    end += "atexit.register(os.kill, os.getpid(), 2)\nranks.run_program(main)"
    # What a script starts in the background ignores the signal, and so do these tests then.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program.write_text(heard + _PROGRAM.format(end=end))
    done = start([str(program)])
    assert done.returncode == 130 and done.stderr.splitlines()[-1].startswith(
        "ship-ds: interrupted"
    )
    assert "Traceback" not in done.stderr


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What this rank sends; the second rank of two always sends the same."""
    sent: list[torch.Tensor] = []

    def all_gather(received: list[torch.Tensor], own: torch.Tensor) -> None:
        sent.append(own)
        for one in received:
            one.copy_(own)

    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    return sent


@pytest.mark.parametrize(
    ("variables", "refuses"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, True),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1"}, True),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}, False),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "-1"}, False),
        ({"SLURM_GPUS_ON_NODE": "0"}, False),
        ({}, False),
    ],
)
def test_gpus_that_slurm_gives_and_torch_does_not_see_are_said(
    variables: dict[str, str], refuses: bool
) -> None:
    """Or hours of eight cards pass on processors."""
    if not refuses:
        ranks.refuse_unseen_gpus(variables)
        return
    with pytest.raises(UserError, match=r"Slurm gives 8 GPU\(s\) here, and torch .* sees none"):
        ranks.refuse_unseen_gpus(variables)


@pytest.mark.parametrize(
    "gather", [ranks.gather_objects, lambda v: ranks.gather_results(lambda: v)]
)
def test_a_number_that_is_none_arrives_as_it_was(gather: Any, gathered: list[torch.Tensor]) -> None:
    value = {"loss": [math.nan, math.inf, -math.inf, 0.1], "name": "\u00e9"}
    for rank, arrived in enumerate(gather(value)):
        assert math.isnan(arrived["loss"].pop(0)), rank
        assert arrived == {"loss": [math.inf, -math.inf, 0.1], "name": "\u00e9"}


def test_a_result_that_cannot_be_sent_is_said_to_all_ranks(gathered: list[torch.Tensor]) -> None:
    """They would wait for it."""
    with pytest.raises(Exception, match="Unable to serialize"):
        ranks.gather_results(lambda: torch.zeros(1))
    assert "Unable to serialize" in bytes(gathered[-1].tolist()).decode()
