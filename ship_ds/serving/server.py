"""The server as a process: its socket, its signals, its end.

with listening("127.0.0.1", 8000) as listener:
    serve_ship(ship, limits, listener, ...)          # until SIGINT or SIGTERM
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ship_ds.console import log
from ship_ds.errors import UserError
from ship_ds.exit_codes import INTERRUPTED
from ship_ds.serving.errors import RequestError
from ship_ds.serving.guard import LOOPBACK
from ship_ds.serving.limits import Limits

if TYPE_CHECKING:  # they need torch, and a port in use is told before
    from ship_ds.api import Ship
    from ship_ds.serving.room import Room

_SECONDS_TO_FINISH = 5
"""Of answers that are being written when a signal comes."""
_SECONDS_BETWEEN_REQUESTS = 5
"""For which a connection that was answered is kept without a further byte."""


_NO_HTTP = (
    "request: is no HTTP/1.1: its first line, a header, a length or a chunk is malformed; the "
    "connection is closed"
)


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine reaches a server there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Args:
        host: An address or a name of this machine.
        port: 0 takes one that is free.

    Raises:
        UserError: The port is in use or not for this user, or the host is none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"serve: {host}:{port}: {reason}: choose another --port (0: a free one) or --host"
        ) from error


def address(listener: socket.socket) -> str:
    """Where clients find it: "http://127.0.0.1:8000"."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_ship(
    ship: "Ship",
    limits: Limits,
    listener: socket.socket,
    *,
    name: str,
    api_key: str | None,
    host: str,
) -> int:
    """Serve a run until a signal.

    Args:
        ship: the run.
        limits: of the server.
        listener: where clients come in.
        name: of the bare base among the models.
        api_key: that clients have to send; None: they need none.
        host: that was asked for, a name that requests may call the server by.

    Returns:
        The exit code, see `serve`; where the room still computes, this ends the process with it.
    """
    from ship_ds.serving.app import create_app
    from ship_ds.serving.room import Room

    room = Room(ship, limits)
    app = create_app(room, name=name, api_key=api_key, hosts=[host])
    code = serve(app, room, listener)
    if room.is_running:
        # It computes in torch, and Python's own end would abort in there.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def serve(app: FastAPI, room: "Room", listener: socket.socket) -> int:
    """Serve until a signal.

    Args:
        app: Over the room.
        room: Is started, and closed at the end.
        listener: Where clients come in.

    Returns:
        The exit code: 130 after SIGINT, 0 after SIGTERM.
    """
    server = Server(app, room.limits)
    room.start()
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        room.close()
    return INTERRUPTED if server.last_signal == signal.SIGINT else 0


class Connection(H11Protocol):
    """uvicorn's, which nobody holds without asking anything.

    uvicorn itself waits for ever for the first request of a connection, and for the rest of the
    head of one that has begun; its `limit_concurrency` keeps such connections and refuses the
    requests of others.

    Args:
        limits: How many connections there may be, and how long one may ask nothing.
        arguments: Of uvicorn.
    """

    def __init__(self, limits: Limits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.limits = limits
        self._silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            open_ones = f"{self.limits.max_connections} connections are open"
            transport.write(_refusal(RequestError(503, f"{open_ones}: try later")))
            transport.close()
            return
        self._wait_for_a_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._end_silence()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`. A head that comes byte by byte wins no time."""
        super().data_received(data)
        if self._is_answering:
            self._end_silence()

    def on_response_complete(self) -> None:
        """An answer is written: the next request may come."""
        super().on_response_complete()
        if not self._is_answering and not self.transport.is_closing():
            self._wait_for_a_request()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP: say so, unless an answer went out already, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_refusal(RequestError(400, _NO_HTTP)))
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_a_request(self) -> None:
        self._end_silence()
        self._silence = self.loop.call_later(self.limits.head_seconds, self.transport.close)

    def _end_silence(self) -> None:
        if self._silence is not None:
            self._silence.cancel()


def _refusal(error: RequestError) -> bytes:
    """An answer to a connection that is not read any more."""
    body = json.dumps(error.body()).encode()
    head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
    first = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
    return first.encode() + head.encode() + b"\r\n\r\n" + body


class _ToConsole(logging.Handler):
    """uvicorn's warnings, as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        log(self.format(record))


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready, and ends as the program's other verbs do.

    Args:
        app: What it serves.
        limits: Of its connections; None: the usual ones.
        is_quiet: Leaves the line out.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits | None = None, *, is_quiet: bool = False
    ) -> None:
        warnings = logging.getLogger("uvicorn")
        warnings.handlers, warnings.propagate = [_ToConsole()], False

        async def until_the_end(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            except asyncio.CancelledError:  # uvicorn would log it with its traceback
                if not self.should_exit:
                    raise

        super().__init__(
            uvicorn.Config(
                until_the_end,
                http=partial(Connection, limits or Limits()),  # type: ignore[arg-type]
                ws="none",
                timeout_keep_alive=_SECONDS_BETWEEN_REQUESTS,
                # uvicorn's own would close every handler of the process, whoever has set it up.
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=_SECONDS_TO_FINISH,
            )
        )
        self.is_quiet, self.last_signal = is_quiet, 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again at the end, and the process would die of it."""
        if self.is_quiet:
            yield  # in a thread of a test
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _end(self, number: int) -> None:
        # A second one does not wait for answers that are being written.
        self.force_exit = self.should_exit
        self.should_exit, self.last_signal = True, number

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if sockets and not self.is_quiet:
            where = address(sockets[0])
            print(f"{where}/v1: ready; Ctrl+C ends it", flush=True)
