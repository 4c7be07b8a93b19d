"""Writes of a bundle over an older one, killed with SIGKILL at every moment around a step.

    python -m tests.killed_publish OLD NEW OUT     # prints how many moments there were

Leaves OUT/0/bundle, OUT/1/bundle, ...: what was there after the kill at that moment, and at 0 the
write that nobody killed. Each write is a fork of this process, which never imports torch.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from ship_ds import files

STEPS = ((files, "sync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"))


def kill_at(moment: int, counter: Path) -> None:
    """Count the moments before and after each step, and kill this process at one; zero: at none."""
    count = 0

    def reached() -> None:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        if not moment:
            counter.write_text(str(count))

    def around(step: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            reached()
            result = step(*args, **kwargs)
            reached()
            return result

        return wrapped

    for holder, name in STEPS:
        setattr(holder, name, around(getattr(holder, name)))


def write_in_child(old: Path, new: Path, run: Path, moment: int) -> None:
    """Put a copy of `new` over a copy of `old` in RUN/bundle."""
    shutil.copytree(old, run / "bundle")
    child = os.fork()
    if not child:
        kill_at(moment, run / "count")
        with files.whole_folder(run / "bundle") as part:
            for path in new.iterdir():
                shutil.copyfile(path, part / path.name)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert was_killed if moment else status == 0


def main(old: Path, new: Path, out: Path) -> None:
    write_in_child(old, new, out / "0", 0)
    count = int((out / "0" / "count").read_text())
    for moment in range(1, count + 1):
        write_in_child(old, new, out / str(moment), moment)
    print(count)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
