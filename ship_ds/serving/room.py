"""The one thread that owns the model.

    room = Room(ship)
    room.start()
    text = await room.call(lambda ship: ship.decode(latent))
    async for number, piece in await room.write(questions):
        ...

Nothing else touches the model, its tokenizers included: neither is made for several threads. The
thread runs functions that requests hand it, and between them, and between the passes of a long one,
it lets every answer that is being written grow by a token.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Event, Thread, current_thread
from typing import TypeVar

from ship_ds.api import Ship
from ship_ds.serving.decoding import AnswerPart, AnswerWriter, Row, Sampling, Source
from ship_ds.serving.errors import RequestError
from ship_ds.serving.limits import Limits
from ship_ds.serving.metrics import Metrics

_Result = TypeVar("_Result")
_CALLS_BEFORE_A_TOKEN = 0.05
"""Seconds for which short functions run before the answers that are being written go on."""
_TEXTS_REMEMBERED = 256
"""Whose token ids a server keeps; training, which chooses its texts, keeps more."""


class _ClosedError(BaseException):
    """The room has closed. No `except Exception` of what is running keeps it."""


class _LeftError(BaseException):
    """Nobody waits any more for what is running."""


@dataclass(frozen=True)
class Query:
    """A prompt that is to be continued.

    Args:
        source: Whose adapter it is under.
        ids: The prompt.
        samplings: One an answer.
    """

    source: Source
    ids: Sequence[int]
    samplings: Sequence[Sampling]


class Writing:
    """Answers that are being written: (number of the answer, what is new of it), until all are
    done. Who stops listening has to call `cancel`.

    Attributes:
        prompt_tokens: Of all questions.
        num_answers: Of all questions.
    """

    def __init__(self) -> None:
        self.prompt_tokens = self.num_answers = 0
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, AnswerPart | RequestError]] = asyncio.Queue()
        self._rows: list[Row] = []
        self._is_left = False

    def begin(self, questions: Sequence[Query]) -> list[Row]:
        """The rows that are to be written, on the model's thread."""
        for question in questions:
            self.prompt_tokens += len(question.ids)
            for choice, sampling in enumerate(question.samplings):
                number = len(self._rows)
                row = Row(question.source, question.ids, sampling, self._emitter(number), choice)
                self._rows.append(row)
        self.num_answers = len(self._rows)
        if self._is_left:  # meanwhile, and `cancel` has not seen all of them
            self.cancel()
        return self._rows

    def _emitter(self, number: int) -> Callable[[AnswerPart | RequestError], None]:
        def emit(piece: AnswerPart | RequestError) -> None:
            with suppress(RuntimeError):  # the loop has closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (number, piece))

        return emit

    async def __aiter__(self) -> AsyncIterator[tuple[int, AnswerPart]]:
        """Raises RequestError where an answer could not be written."""
        num_open = self.num_answers
        while num_open:
            number, piece = await self._pieces.get()
            if isinstance(piece, RequestError):
                raise piece
            yield number, piece
            num_open -= piece.finish_reason is not None

    def cancel(self) -> None:
        """Let the answers that are not done go."""
        self._is_left = True
        for row in self._rows:
            row.is_cancelled = True


class Room:
    """Runs functions on the thread that owns the model, and writes answers there.

    Args:
        ship: The run.
        limits: How many may wait, and how long.
        metrics: Of the server; None: of this room alone.
    """

    def __init__(
        self, ship: Ship, limits: Limits | None = None, metrics: Metrics | None = None
    ) -> None:
        self.ship, self.limits, self.metrics = ship, limits or Limits(), metrics or Metrics()
        self.decoder = AnswerWriter(ship.model, self.limits, self.metrics)
        self._num_calls = 0
        self._short: deque[Callable[[], None]] = deque()
        self._long: deque[Callable[[], None]] = deque()
        self._arrived = Condition()
        self._is_turning = self._is_closed = False
        self._left: Event | None = None
        """Whether the caller of the long function that runs has left."""
        self._release: Callable[[], None] = lambda: None
        # Asked for when they are read: a number that was set may be older than another thread's.
        self.metrics.waiting.set_function(lambda: self.num_waiting)
        self.metrics.running.set_function(lambda: self.decoder.num_running)
        self._thread = Thread(target=self._work, name="model", daemon=True)
        for prompts in vars(ship.model.collator.prompts).values():
            prompts.forget_beyond(_TEXTS_REMEMBERED)

    def start(self) -> None:
        """Let the thread begin."""
        self._release = self.ship.model.task_llm.wait_before_passes(self._turn)
        self._thread.start()

    def close(self) -> None:
        """Let the thread end: a long function at its next pass, and that is not waited for."""
        with self._arrived:
            self._is_closed = True
            self._arrived.notify()
        self._thread.join(timeout=5)
        self._release()

    @property
    def is_running(self) -> bool:
        """Whether the thread is there; it may be, in a long pass, when the room is closed."""
        return self._thread.is_alive()

    @property
    def is_open(self) -> bool:
        """Whether a call may still have its turn."""
        return self.is_running and not self._is_closed

    @property
    def num_waiting(self) -> int:
        """Calls that have not returned, and requests of which no answer has begun."""
        return self._num_calls + self.decoder.num_waiting_requests

    async def call(self, function: Callable[[Ship], _Result], *, is_short: bool = False) -> _Result:
        """What `function(ship)` returns, or raises, on the thread that owns the model.

        A caller that is cancelled before its turn takes the function back. A long function that is
        running then ends at its next pass through the Task LLM, a short one at its end.

        Args:
            function: Gets the run. The answers that are being written go on before each pass that
                it makes through the Task LLM, and wait else.
            is_short: It takes milliseconds: it may run before a pass of another one.

        Raises:
            RequestError: 429, too many calls wait already; 503, its turn did not come in time.
        """
        if self.num_waiting >= self.limits.max_waiting:
            raise RequestError(429, f"{self.num_waiting} requests are waiting already: try later")
        future: Future[_Result] = Future()
        left = Event()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if not is_short:
                self._left = left
            try:
                future.set_result(function(self.ship))
            except _ClosedError:
                future.set_exception(RequestError(503, "the server ends"))
            except BaseException as error:
                future.set_exception(error)
            finally:
                if not is_short:
                    self._left = None

        self._num_calls += 1
        with self._arrived:
            (self._short if is_short else self._long).append(run)
            self._arrived.notify()
        timer = asyncio.get_running_loop().call_later(self.limits.wait_seconds, future.cancel)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RequestError(
                503, f"the model had no time for this within {self.limits.wait_seconds:g} s"
            ) from None
        finally:
            timer.cancel()
            left.set()
            self._num_calls -= 1
            with suppress(ValueError):  # or those who left would fill the queue
                (self._short if is_short else self._long).remove(run)

    async def write(self, questions: Callable[[Ship], Sequence[Query]]) -> Writing:
        """Answers to what `questions(ship)` asks; errors as of `call`.

        Args:
            questions: Makes the prompts, and refuses those that cannot be read.
        """
        writing = Writing()

        def begin(ship: Ship) -> None:
            self.decoder.submit(writing.begin(questions(ship)))

        try:
            await self.call(begin, is_short=True)
        except BaseException:
            writing.cancel()  # where it began as its caller left
            raise
        return writing

    def _work(self) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(self._has_work)
            try:
                self._turn()
            except _ClosedError:
                return
            if (run := _next(self._long)) is not None:
                run()

    def _has_work(self) -> bool:
        return bool(self._is_closed or self._short or self._long or not self.decoder.is_idle)

    def _turn(self) -> None:
        """What is short, and then a token for each answer. A long function comes here before each
        of its passes through the Task LLM; the turn's own passes do, too."""
        if self._is_turning or current_thread() is not self._thread:
            return
        if self._is_closed:
            raise _ClosedError
        if self._left is not None and self._left.is_set():
            raise _LeftError
        self._is_turning = True
        try:
            until = time.monotonic() + _CALLS_BEFORE_A_TOKEN
            while time.monotonic() < until and (run := _next(self._short)) is not None:
                run()
            if not self.decoder.is_idle:
                self.decoder.turn()
        finally:
            self._is_turning = False


def _next(queue: deque[Callable[[], None]]) -> Callable[[], None] | None:
    """The first of them, taken out. Not looked for before: who waits for one takes it back."""
    try:
        return queue.popleft()
    except IndexError:
        return None
