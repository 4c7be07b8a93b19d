"""The thread that owns the model: what comes and goes while it works, and its end."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from ship_ds.api import Ship
from ship_ds.serving.decoding import Sampling, Source
from ship_ds.serving.errors import RequestError
from ship_ds.serving.page import _told
from ship_ds.serving.room import Question, Room, Writing
from ship_ds.serving.server import Server, address, listening


@pytest.mark.parametrize("queue", ["_short", "_long"])
def test_a_call_that_is_taken_back_as_its_turn_comes(ship: Ship, queue: str) -> None:
    room = Room(ship)

    class Emptied(deque[Callable[[], None]]):
        """Holds a call when it is looked at, and none when it is taken."""

        def __bool__(self) -> bool:
            return True

        def popleft(self) -> Callable[[], None]:
            room._is_closed = True
            return super().popleft()

    setattr(room, queue, Emptied())
    room._thread = threading.current_thread()
    room._work()


def test_rows_that_are_made_while_their_client_leaves_are_cancelled() -> None:
    async def begun() -> None:
        writing = Writing()

        class Leaving(list[Sampling]):
            def __iter__(self):  # type: ignore[no-untyped-def]
                writing.cancel()
                return super().__iter__()

        rows = writing.begin([Question(Source(), [1], Leaving([Sampling(3), Sampling(3)]))])
        assert [row.is_cancelled for row in rows] == [True, True]

    asyncio.run(begun())


def test_a_long_call_ends_with_the_room(ship: Ship) -> None:
    room = Room(ship)
    begun, over = threading.Event(), threading.Event()

    def endless(ship: Ship) -> None:
        begun.set()
        while not over.is_set():
            room._turn()

    async def call_and_close() -> None:
        calling = asyncio.ensure_future(room.call(endless))
        await asyncio.to_thread(begun.wait)
        await asyncio.to_thread(room.close)
        with pytest.raises(RequestError, match="ends"):
            await asyncio.wait_for(calling, 10)

    room.start()
    since = time.monotonic()
    try:
        asyncio.run(call_and_close())
        assert not room.is_running
        assert time.monotonic() - since < 4
    finally:
        over.set()


def test_a_stream_that_the_end_cuts_off_is_no_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.Event().wait()

    server, listener = Server(endless, is_quiet=True), listening("127.0.0.1", 0)
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    with httpx.stream("GET", address(listener), timeout=20) as told:
        assert next(told.iter_bytes(1)) == b"x"
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
    said = capfd.readouterr().err
    assert "graceful shutdown exceeded" in said and "Traceback" not in said


def test_a_client_that_leaves_a_stream_leaves_no_task() -> None:
    async def leave() -> None:
        task: asyncio.Future[Any] = asyncio.ensure_future(asyncio.Event().wait())
        told = _told(task, asyncio.Queue(), threading.Event())
        assert await anext(told) == ": \n\n"
        listening = asyncio.ensure_future(anext(told))
        await asyncio.sleep(0.05)
        listening.cancel()
        await asyncio.gather(listening, task, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(leave())
