"""The thread that owns the model: what comes and goes while it works, and its end."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from ship_ds.api import InductionConfig, Ship
from ship_ds.serving.decoding import Sampling, Source
from ship_ds.serving.errors import RequestError
from ship_ds.serving.page import _Events
from ship_ds.serving.protocol import ShipExample
from ship_ds.serving.room import Query, Room, Writing
from ship_ds.serving.server import Server, address, listening
from tests.serving.conftest import Serve

pytestmark = pytest.mark.slow


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

        rows = writing.begin([Query(Source(), [1], Leaving([Sampling(3), Sampling(3)]))])
        assert [row.is_cancelled for row in rows] == [True, True]

    asyncio.run(begun())


class Endless:
    """A call of the model's that goes from pass to pass until it is ended, or `over` is set."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.begun, self.over, self.ended = (threading.Event() for _ in range(3))

    def __call__(self, ship: Ship) -> None:
        self.begun.set()
        try:
            while not self.over.is_set():
                self.room._turn()
        finally:
            self.ended.set()


def test_a_long_call_ends_with_the_room(ship: Ship) -> None:
    room = Room(ship)
    endless = Endless(room)

    async def call_and_close() -> None:
        calling = asyncio.ensure_future(room.call(endless))
        await asyncio.to_thread(endless.begun.wait)
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
        endless.over.set()


def test_a_closed_room_runs_on_while_a_pass_does(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the server ends its process by force: Python's own end would abort within torch."""
    room, begun, over = Room(ship), threading.Event(), threading.Event()

    def long_pass(ship: Ship) -> None:
        begun.set()
        over.wait()

    async def call_and_close() -> None:
        calling = asyncio.ensure_future(room.call(long_pass))
        await asyncio.to_thread(begun.wait)
        room.close()
        assert room.is_running and not room.is_open
        over.set()
        await asyncio.wait_for(calling, 10)

    room.start()
    assert room.is_open
    join = room._thread.join
    monkeypatch.setattr(room._thread, "join", lambda timeout=None: None)  # five seconds
    try:
        asyncio.run(call_and_close())
    finally:
        over.set()
        join(10)
    assert not room.is_running


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


def test_a_server_leaves_the_handlers_of_others_alone() -> None:
    """absl's, which rouge_score brings, closes the stream that it writes to."""
    closed = []

    class Theirs(logging.NullHandler):
        def close(self) -> None:
            closed.append(self)
            super().close()

    theirs = Theirs()
    Server(lambda *_: None, is_quiet=True)  # type: ignore[arg-type, return-value]
    assert not closed
    theirs.close()


@pytest.mark.parametrize("begins", [True, False], ids=["in the stream", "before it"])
def test_a_client_that_leaves_a_stream_leaves_no_task(begins: bool) -> None:
    async def leave() -> None:
        task: asyncio.Future[Any] = asyncio.ensure_future(asyncio.Event().wait())
        gone, told = threading.Event(), asyncio.Event()

        async def receive() -> Message:
            if begins:
                await told.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if not begins:
                await asyncio.Event().wait()
            if message.get("body"):
                told.set()

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await _Events(task, asyncio.Queue(), gone)(scope, receive, send)
        await asyncio.wait([task], timeout=10)
        assert task.cancelled() and gone.is_set() and told.is_set() == begins
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(leave())


def test_a_long_call_ends_as_its_caller_leaves(ship: Ship) -> None:
    """At its next pass; the room goes on with the next one."""
    room = Room(ship)
    endless = Endless(room)

    async def call_and_leave() -> None:
        calling = asyncio.ensure_future(room.call(endless))
        await asyncio.to_thread(endless.begun.wait)
        assert await room.call(lambda ship: 1, is_short=True) == 1
        assert not endless.ended.is_set()
        calling.cancel()
        assert await asyncio.wait_for(room.call(lambda ship: 2), 10) == 2
        assert endless.ended.is_set() and room.num_waiting == 0

    room.start()
    try:
        asyncio.run(call_and_leave())
    finally:
        endless.over.set()
        room.close()


def test_an_induction_lets_others_go_on_before_each_pass(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a pass, where candidates are scored as where they are answered."""
    room, log, task_llm = Room(ship), list[str](), ship.model.task_llm
    turn, lm, hooks = room._turn, task_llm.language_model, list(task_llm._forward_pre_hooks)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            log.append(function.__name__)
            return function(*arguments, **options)

        return call

    def turned() -> None:
        if room._left is not None:  # of the long call, and not while the thread waits for it
            log.append("turn")
        turn()

    monkeypatch.setattr(room, "_turn", turned)
    for name in ("label_states", "stream", "logits"):
        monkeypatch.setattr(lm, name, counted(getattr(lm, name)))
    room.start()
    # A score goes through the module's own call, which says nothing of an answer.
    asks = InductionConfig(ranks_in_prompt=True, asks_task_llm=True)
    try:
        asyncio.run(room.call(lambda ship: ship.induce([("3 7", "5 9"), ("1", "3")], asks)))
    finally:
        room.close()
    assert list(task_llm._forward_pre_hooks) == hooks
    waits = [log[place - 1 : place] for place, name in enumerate(log) if name != "turn"]
    assert waits == [["turn"]] * len(waits)
    assert {"label_states", "stream"} <= set(log)


PAGE_CALLS = [
    ("GET", "/ship/v1/map", None),
    ("POST", "/ship/v1/describe", {"instruction": "add 2"}),
    ("POST", "/ship/v1/confidence", {"instruction": "add 2", "inputs": ["3 7"]}),
    ("POST", "/ship/v1/export", {"instruction": "add 2"}),
    ("POST", "/ship/v1/induce", {"examples": [{"input": "3", "target": "5"}]}),
    (
        "POST",
        "/v1/completions",
        {"model": "ship", "prompt": "3", "ship_examples": [{"input": "3", "target": "5"}]},
    ),
]


@pytest.mark.parametrize(("method", "path", "body"), PAGE_CALLS, ids=lambda value: str(value)[:20])
def test_who_leaves_the_queue_leaves_no_place_in_it(
    serve: Serve, method: str, path: str, body: object
) -> None:
    served, go_on, begun = serve(), threading.Event(), threading.Event()

    def held(ship: Ship) -> None:
        begun.set()
        go_on.wait(60)

    holding = threading.Thread(target=asyncio.run, args=(served.room.call(held),))
    holding.start()
    try:
        assert begun.wait(30)
        with pytest.raises(httpx.ReadTimeout):  # and closes the connection
            timeout = httpx.Timeout(30, read=0.5)
            with httpx.stream(method, served.url + path, json=body, timeout=timeout) as answer:
                for _ in answer.iter_bytes():
                    pass
        assert eventually(lambda: served.room.num_waiting == 1), "its place is kept"
    finally:
        go_on.set()
        holding.join()
    assert eventually(lambda: served.room.num_waiting == 0)
    assert not served.app.state.adapters._flights


def eventually(is_so: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until and not is_so():
        time.sleep(0.02)
    return is_so()


def test_what_several_wait_for_ends_with_the_last_of_them(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    room, adapters = served.room, served.app.state.adapters
    begun, ended = threading.Event(), threading.Event()

    def endless(pairs: object) -> None:
        begun.set()
        try:
            while True:
                room._turn()
        finally:
            ended.set()

    monkeypatch.setattr(room.ship, "induce", endless)
    examples = [ShipExample(input="3", target="5")]

    async def come_and_leave() -> None:
        tasks = [asyncio.ensure_future(adapters.make(None, examples)) for _ in range(2)]
        await asyncio.to_thread(begun.wait)
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        await asyncio.sleep(0.1)
        assert not ended.is_set() and len(adapters._flights) == 1
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        assert not adapters._flights  # who comes now is not handed what is being cancelled
        assert await asyncio.to_thread(ended.wait, 10)

    asyncio.run(come_and_leave())
    assert eventually(lambda: room.num_waiting == 0)
