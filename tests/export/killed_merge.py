"""Merges, killed with SIGKILL at moments before and after writes, renames and publishing, and then
started again.

    python -m tests.export.killed_merge ADAPTER OUT        # prints a JSON row for each moment

Each merge is a fork of this process, which itself computes nothing, so that a start costs no
imports.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from ship_ds.export import merge
from ship_ds.tensor_file import TensorFile

PLACES = (
    (TensorFile, "_write"),
    (TensorFile, "_finish"),
    (merge.Merge, "_begin"),
    (merge.Merge, "_write_rest"),
    (merge, "publish"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
)

_STEP, _LAST = 11, 9


def kill_at(point: int, counter: Path) -> None:
    """Count the moments, into a file at the last one; kill this process at the one asked for. Zero:
    never."""
    count = 0

    def pass_by() -> None:
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        if not point:
            counter.write_text(str(count))

    def around(own: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            pass_by()
            out = own(*args, **kwargs)
            pass_by()
            return out

        return wrapped

    for holder, name in PLACES:
        setattr(holder, name, around(getattr(holder, name)))


def merge_in_child(adapter: Path, out: Path, point: int) -> bool:
    """Whether it was killed; another end than that or success is an error."""
    child = os.fork()
    if not child:
        try:
            kill_at(point, out.with_name("count"))
            merge.Merge(adapter, "original", shard_gigabytes=5e-5).run(out)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    return False


def digests(out: Path) -> dict[str, str]:
    skipped = ("merge.json", "plan.json")  # the first says how many shards a restart kept
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.iterdir())
        if p.name not in skipped
    }


def main(adapter: Path, out: Path) -> None:
    assert not merge_in_child(adapter, out, 0)
    wanted, part = digests(out), out.with_name(out.name + ".part")
    shutil.rmtree(out)
    total = int(out.with_name("count").read_text())
    # Writes are many and alike; the last moments, from the last shard on, are all different.
    for point in [*range(1, total - _LAST, _STEP), *range(total - _LAST, total + 1)]:
        assert merge_in_child(adapter, out, point)
        left = "whole" if out.exists() else "part" if part.exists() else "nothing"
        both, kept = out.exists() and part.exists(), 0
        if left != "whole":
            assert not merge_in_child(adapter, out, 0)
            kept = json.loads((out / "merge.json").read_text())["num_shards_kept"]
        same = digests(out) == wanted and not part.exists()
        print(
            json.dumps({"point": point, "left": left, "both": both, "kept": kept, "same": same}),
            flush=True,
        )
        shutil.rmtree(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
