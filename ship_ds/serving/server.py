"""The server as a process: its socket, its signals, its end.

with listening("127.0.0.1", 8000) as listener:
    serve(app, room, listener)          # until SIGINT or SIGTERM
"""

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from ship_ds.errors import UserError
from ship_ds.serving.guard import LOOPBACK

if TYPE_CHECKING:  # it needs torch, and a port in use is told before
    from ship_ds.serving.room import Room

_SECONDS_TO_FINISH = 5
"""Of answers that are being written when a signal comes."""
_INTERRUPTED = 130


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


def serve(app: FastAPI, room: "Room", listener: socket.socket) -> int:
    """Serve until a signal.

    Args:
        app: Over the room.
        room: Is started, and closed at the end.
        listener: Where clients come in.

    Returns:
        The exit code: 130 after SIGINT, 0 after SIGTERM.
    """
    server = Server(app)
    room.start()
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        room.close()
    return _INTERRUPTED if server.last_signal == signal.SIGINT else 0


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready, and ends as the program's other verbs do.

    Args:
        app: What it serves.
        is_quiet: Leaves the line out.
    """

    def __init__(self, app: ASGIApp, is_quiet: bool = False) -> None:
        async def until_the_end(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            except asyncio.CancelledError:  # uvicorn would log it with its traceback
                if not self.should_exit:
                    raise

        super().__init__(
            uvicorn.Config(
                until_the_end,
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
