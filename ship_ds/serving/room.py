"""The one thread that owns the model.

    room = Room(ship, limits)
    room.start()
    text = await room.call(lambda ship: ship.decode(latent))

Nothing else touches the model, its tokenizers included: neither is made for several threads. The
thread does one of two things in turn: it runs functions that requests hand it, and between them it
lets every answer that is being written grow by a token.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from ship_ds.api import Ship
from ship_ds.serving.errors import RequestError
from ship_ds.serving.limits import Limits

Result = TypeVar("Result")
_CALLS_BEFORE_A_TOKEN = 0.05
"""Seconds for which functions run before the answers that are being written go on."""


class Room:
    """Runs functions on the thread that owns the model.

    Args:
        ship: The run.
        limits: How many may wait, and how long.
    """

    def __init__(self, ship: Ship, limits: Limits | None = None) -> None:
        self.ship, self.limits = ship, limits or Limits()
        self.num_waiting = 0
        """Calls that have not begun."""
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Let the thread begin."""
        self._thread.start()

    def close(self) -> None:
        """Let the thread end after what it is at; a long function is not waited for."""
        self._calls.put(None)
        self._thread.join(timeout=5)

    async def call(self, function: Callable[[Ship], Result]) -> Result:
        """What `function(ship)` returns, or raises, on the thread that owns the model.

        A caller that is cancelled before its turn takes the function back; one that is running
        goes on to its end.

        Args:
            function: Gets the run. The answers that are being written wait while it runs.

        Raises:
            RequestError: 429, too many calls wait already; 503, its turn did not come in time.
        """
        if self.num_waiting >= self.limits.max_waiting:
            raise RequestError(429, f"{self.num_waiting} requests are waiting already: try later")
        future: Future[Result] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self.ship))
                except BaseException as error:
                    future.set_exception(error)

        self.num_waiting += 1
        self._calls.put(run)
        timer = asyncio.get_running_loop().call_later(self.limits.wait_seconds, future.cancel)
        waiting = asyncio.wrap_future(future)
        try:
            return await waiting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RequestError(
                503, f"the model had no time for this within {self.limits.wait_seconds:g} s"
            ) from None
        finally:
            timer.cancel()
            self.num_waiting -= 1

    def _work(self) -> None:
        while True:
            until = time.monotonic() + _CALLS_BEFORE_A_TOKEN
            while time.monotonic() < until:
                try:
                    call: Any = self._calls.get()
                except Empty:
                    break
                if call is None:
                    return
                call()
