"""How a program that joined a process group ends: see `ranks.exit_process`."""

from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_leaving_flushes_and_takes_nothing_down(tmp_path: Path) -> None:
    """-E: PYTHONUNBUFFERED would do the flushing."""
    (tmp_path / "leaves.py").write_text(_PROGRAM.format(end="ranks.exit_process(3)"))
    (tmp_path / "exits.py").write_text(_PROGRAM.format(end="raise SystemExit(3)"))
    leaves, exits = (start(["-E", str(tmp_path / name)]) for name in ("leaves.py", "exits.py"))
    assert leaves.returncode == exits.returncode == 3, leaves.stderr
    assert leaves.stdout.endswith("said at exit\n")
    assert "taken down" in exits.stderr and "taken down" not in leaves.stderr
