"""How a program that joined a process group ends: see `ranks.leave`."""

from pathlib import Path

from tests.conftest import start

_PROGRAM = """
import atexit, sys
from ship_ds.runtime import ranks

class Watch:
    def __del__(self):
        sys.stderr.write("taken down")

ranks.start(1)
watch = Watch()
atexit.register(print, "at exit")
print("said", end=" ")
ranks.leave(3)
"""


def test_leaving_flushes_and_takes_nothing_down(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(_PROGRAM)
    done = start([str(tmp_path / "program.py")], timeout=120)
    assert done.returncode == 3, done.stderr
    assert done.stdout.endswith("said at exit\n") and "taken down" not in done.stderr
