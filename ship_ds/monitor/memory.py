"""The most memory a block of code holds: its own pages, and pages of files that it maps, apart.

The kernel keeps a high-water mark of both together (VmHWM); a thread samples the two parts
(RssAnon, RssFile). Linux only.
"""

import threading
from types import TracebackType


def resident() -> dict[str, int]:
    """Bytes of this process by kind: RssAnon, RssFile, VmHWM."""
    with open("/proc/self/status") as file:
        rows = dict(line.split(":", 1) for line in file)
    return {key: int(rows[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile", "VmHWM")}


class PeakMemory:
    """own, mapped: the largest seen while the block ran, in bytes beyond what was there when it
    began."""

    own = mapped = 0

    def __enter__(self) -> "PeakMemory":
        self._before, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self._look()

    def _look(self) -> None:
        now = resident()
        self.own = max(self.own, now["RssAnon"] - self._before["RssAnon"])
        self.mapped = max(self.mapped, now["RssFile"] - self._before["RssFile"])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()
