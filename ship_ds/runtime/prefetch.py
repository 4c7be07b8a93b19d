"""The next step's batches are made in a thread while the current step computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from ship_ds.runtime import ranks

Batches = TypeVar("Batches")


class Prefetch(Generic[Batches]):
    """Makes the batches of a step ahead of their use.

    Batches are a function of the step's number alone, so what is made ahead and never taken, as
    where a run is stopped, changes nothing: a resume makes it again. `get` waits for the thread,
    so it makes no batch while anything but a step runs (an evaluation uses the same tokenizers).
    """

    def __init__(self, make: Callable[[int], Batches]) -> None:
        """Start the thread.

        Args:
            make: the batches of a step, by its number.
        """
        self._make = make
        self._ahead: tuple[int, Future[Batches]] | None = None
        place = torch.get_num_threads(), ranks.device()
        self._pool = ThreadPoolExecutor(1, "batches", _set_up, place)

    def begin(self, step: int) -> None:
        """Begin to make the batches of this step, and forget those of another one."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = (step, self._pool.submit(self._make, step))

    def get(self, step: int) -> Batches:
        """The batches of this step, waited for where they are not there yet.

        Raises:
            Exception: whatever making them raised.
        """
        self.begin(step)
        assert self._ahead is not None
        return self._ahead[1].result()

    def close(self) -> None:
        """End the thread and let go of the batches that nobody took. `get` is no longer called."""
        self._pool.shutdown(cancel_futures=True)
        self._ahead = None


# Not a method: the thread holds on to it, and would hold whatever makes the batches.
def _set_up(threads: int, device: torch.device) -> None:
    """A new thread has torch's defaults, and neither this rank's GPU nor its threads."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
