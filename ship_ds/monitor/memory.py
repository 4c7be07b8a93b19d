"""The most memory a block of code holds: its own pages, and pages of files that it maps, apart.

The kernel keeps a high-water mark of both together (VmHWM); a thread samples the two parts
(RssAnon, RssFile). Linux only.
"""

import threading
from types import TracebackType


def resident() -> dict[str, int]:
    """Bytes of this process by kind.

    Returns:
        RssAnon: its own pages, those that are swapped out included, or a machine short of memory
        would seem to need less. RssFile: pages of files that it maps. VmHWM: the kernel's
        high-water mark of both.
    """
    with open("/proc/self/status", encoding="utf-8") as file:
        rows = dict(line.split(":", 1) for line in file)
    num_bytes = {key: int(rows[key].split()[0]) * 1024 for key in (*_KINDS, "VmSwap")}
    num_bytes["RssAnon"] += num_bytes.pop("VmSwap")
    return num_bytes


_KINDS = ("RssAnon", "RssFile", "VmHWM")


class PeakMemory:
    """The most memory that the process holds inside a `with`, beyond what was there before.

    Attributes:
        anonymous: Bytes of its own pages.
        mapped: Bytes of pages of files that it maps.
    """

    anonymous = mapped = 0

    def __enter__(self) -> "PeakMemory":
        self._before, self._done = resident(), threading.Event()
        self._thread = threading.Thread(target=self._sample_until_done, daemon=True)
        self._thread.start()
        return self

    def _sample_until_done(self) -> None:
        while not self._done.wait(0.002):
            self._sample()

    def _sample(self) -> None:
        now = resident()
        self.anonymous = max(self.anonymous, now["RssAnon"] - self._before["RssAnon"])
        self.mapped = max(self.mapped, now["RssFile"] - self._before["RssFile"])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        # Once more here, for a block that ends before the thread's first sample.
        self._sample()
