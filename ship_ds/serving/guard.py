"""What stands before every route: who may ask, how much, and what is counted.

Plain ASGI: a middleware of functions would hold back a stream, and would not see its client leave.
"""

import asyncio
import secrets
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ship_ds.serving.errors import RequestError
from ship_ds.serving.leaving import CLIENT_GONE
from ship_ds.serving.limits import Limits
from ship_ds.serving.metrics import Metrics

OPEN_PATHS = ("/", "/health")
"""What needs no key: a page that asks for it, and a probe."""
OPEN_FOLDER = "/page/"
"""Whose files need none either."""
UPLOAD_PATHS = ("/ship/v1/explain",)
"""What takes an adapter: a larger body than the others, and one at a time."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine, in a URL."""


class Guard:
    """Refuses what no route should see, and counts what each answered.

    Args:
        app: What is behind it.
        api_key: What clients have to send; None: nothing, and then they have to call this machine
            by a name of its own, which a page of somebody else's domain cannot.
        hosts: Further names of this machine.
        limits: Of a request's body.
        metrics: Counts requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        hosts: Collection[str],
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self.app, self.api_key, self.limits, self.metrics = app, api_key, limits, metrics
        self.hosts = {*LOOPBACK, *hosts}
        self._is_uploading = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self.app(scope, receive, send)
            return
        status, is_upload = 500, False

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(Request(scope))
                is_upload = scope["path"] in UPLOAD_PATHS and self._begin_upload()
                whole = await self._whole_body(scope, receive)
            except RequestError as error:
                await error.response()(scope, receive, counted)
                return
            if whole is None:
                status = CLIENT_GONE
                return
            await self.app(scope, whole, counted)
        finally:
            if is_upload:
                self._is_uploading = False
            # The route's own template, never what a client wrote.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if origin is not None and _netloc(origin) != host:
            raise RequestError(403, "origin: pages of other servers may not ask this one")
        if self.api_key is None:
            if _name(host) not in self.hosts:
                raise RequestError(
                    403,
                    "host: without a key this server answers to 127.0.0.1 and localhost alone "
                    "(--api-key)",
                    code="forbidden_host",
                )
            return
        # Not that of `request.url`, which older Starlettes read from what Host says.
        path = request.scope["path"]
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # As bytes: of texts it takes ASCII alone. Those of a header were read as Latin-1.
        sent = given.strip().encode("latin-1")
        is_right = secrets.compare_digest(sent, self.api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise RequestError(401, "authorization: expected 'Bearer ' and this server's API key")

    def _begin_upload(self) -> bool:
        if self._is_uploading:
            raise RequestError(429, "another adapter is being explained: try again when it is done")
        self._is_uploading = True
        return True

    async def _whole_body(self, scope: Scope, receive: Receive) -> Receive | None:
        """The body, read to its end before anything is done with it; None: the client left."""
        is_upload = scope["path"] in UPLOAD_PATHS
        most = self.limits.max_upload_bytes if is_upload else self.limits.max_body_bytes
        too_large = RequestError(413, f"the request has more than {most} bytes: send less")
        length = Request(scope).headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RequestError(
                408, f"the request did not arrive within {self.limits.body_seconds:g} s"
            ) from None
        body: Message | None = {
            "type": "http.request",
            "body": b"".join(parts),
            "more_body": False,
        }

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            first, body = body, None
            return first

        return replay


def _name(host: str) -> str:
    """ "localhost:8000" -> "localhost", "[::1]:8000" -> "::1"."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(origin: str) -> str | None:
    """ "http://localhost:8000" -> "localhost:8000"."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
