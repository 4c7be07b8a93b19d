"""Clients that go away before they have their answer."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

_Result = TypeVar("_Result")
CLIENT_GONE = 499
"""nginx's status of a request whose client left; nobody reads it but the metrics."""


class ClientGoneError(Exception):
    """Nobody reads the answer to this request any more."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """What `work` returns.

    Raises:
        ClientGoneError: The client left before, and the work was cancelled.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
