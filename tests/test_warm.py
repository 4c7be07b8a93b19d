"""A command in a process that has the libraries loaded is the command that a user starts."""

import subprocess
from pathlib import Path

import pytest

from tests import warm
from tests.conftest import REPOSITORY, environment, start, start_warm

pytestmark = pytest.mark.slow

ASKED = """
import os, sys
print(sys.argv[1:], os.environ.get("ASKED"), os.getcwd(), sys.path[0], __name__)
print("said", file=sys.stderr)
import atexit; atexit.register(print, "at exit")
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('a line')", 1),
        ("sys.exit(['no', 'code'])", 1),
        ("raise ValueError('why')", 1),
        ("import threading; threading.Timer(0.2, print, ['a thread ended']).start()", 0),
    ],
    ids=["nothing", "a code", "a line", "a list", "an error", "a thread"],
)
def test_a_program_sees_and_says_what_it_would_cold(end: str, code: int, tmp_path: Path) -> None:
    program = tmp_path / "asked.py"
    program.write_text(ASKED.format(end=end))
    cold, warmed = (begin([str(program), "a", "b c"], ASKED="yes") for begin in (start, start_warm))
    assert cold.returncode == warmed.returncode == code
    assert warmed.stdout == cold.stdout and "['a', 'b c'] yes" in cold.stdout
    assert warmed.stderr.splitlines()[-1] == cold.stderr.splitlines()[-1]


def test_a_module_is_run_as_the_program() -> None:
    done = start_warm(["-m", "ship_ds.cli", "train", "--config", "nowhere"])
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("ship-ds: nowhere: no such config file")


def test_its_process_has_all_that_the_server_loads(tmp_path: Path) -> None:
    """What the server cannot import it passes over in silence."""
    program = tmp_path / "loaded.py"
    program.write_text("import sys; sys.exit('tests.warm_server' not in sys.modules)")
    assert start_warm([str(program)]).returncode == 0


def test_what_it_leaves_behind_at_work_is_told(tmp_path: Path) -> None:
    program = tmp_path / "leaves.py"
    program.write_text("import subprocess; subprocess.Popen(['sleep', '600'])")
    with pytest.raises(AssertionError, match=r"ended without \['sleep'\]"):
        start_warm([str(program)])


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    program = tmp_path / "asleep.py"
    program.write_text(
        "import subprocess, time\n"
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
        "def waits(): time.sleep(600)\n"
        "waits()\n"
    )
    with pytest.raises(subprocess.TimeoutExpired) as late:
        warm.run([str(program)], 6, environment(), REPOSITORY)
    assert "in waits" in str(late.value.stderr)
    state = Path(f"/proc/{int(str(late.value.stdout))}/stat")
    # Whoever adopts what is left behind may let it lie as a zombie.
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
