"""What a client is told when its request cannot be done: OpenAI's error body, for every status.

{"error": {"message": "model: 'x' is not ...", "type": "invalid_request_error",
           "param": "model", "code": "model_not_found"}}
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.responses import JSONResponse

from ship_ds.errors import UserError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_CODES = {
    401: "invalid_api_key",
    403: "forbidden_origin",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "overloaded",
}
_LONGEST = 1000
"""Letters of a message: it may quote what a client sent."""


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        message: One line for a person.
        param: The field that it is about.
        code: For a program; None: the usual one of this status.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status)

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        # Half a surrogate pair, which JSON can spell, is no text that could be sent back.
        message = self.message[:_LONGEST].encode("utf-8", "backslashreplace").decode()
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The same as a response."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
        return JSONResponse(self.body(), self.status, headers.get(self.status))


_PLACE = re.compile(r"([a-z_.]+)(?: (\d+)(?:, (input|target))?)?( and \d+)?(?:: | with )")
"""How a line of ours begins that names what is wrong: "example 2, target: ...", "input 1 with an
answer of 12 tokens: ...", "examples 1 and 2: ...", "instruction: ..."."""


@contextmanager
def naming_fields(**fields: str) -> Iterator[None]:
    """Whoever asks for something wrong in here is told which of his fields it is in.

    Args:
        fields: What our own lines call a thing, without the s of several, to the field that a
            request has it in: `naming_fields(example="ship_examples")`.

    Raises:
        RequestError: 400, in place of a UserError that begins with one of these.
    """
    try:
        yield
    except UserError as error:
        place = _PLACE.match(str(error))
        name = place and (fields.get(place[1]) or fields.get(place[1].removesuffix("s")))
        if place is None or name is None:
            raise
        param = name
        if place[2] and not place[4]:
            param += f"[{int(place[2]) - 1}]" + (f".{place[3]}" if place[3] else "")
        raise RequestError(400, str(error), param) from None
