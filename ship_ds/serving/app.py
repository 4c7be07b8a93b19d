"""The application: routes over a room.

    room = Room(ship)
    app = create_app(room, name="quickstart")

Whoever serves the application starts the room and closes it.

Letters: Z latent size.
"""

import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ship_ds import __version__
from ship_ds.api import Ship
from ship_ds.console import log
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.inference import checks
from ship_ds.section import first_error
from ship_ds.serving.adapters import Adapters
from ship_ds.serving.answers import ChatShape, Shape, events, whole
from ship_ds.serving.decoding import AnswerPart, Sampling, Source
from ship_ds.serving.errors import RequestError, naming_fields
from ship_ds.serving.guard import Guard
from ship_ds.serving.leaving import CLIENT_GONE, ClientGoneError, unless_gone
from ship_ds.serving.metrics import CONTENT_TYPE_LATEST
from ship_ds.serving.page import page_router
from ship_ds.serving.protocol import (
    Asked,
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    Message,
    UnloadRequest,
    Writes,
)
from ship_ds.serving.room import Query, Room, Writing

_MOST_NAMED_FIELDS = 100
"""Fields that the log names: a client can make up any number."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 405, 408, 413, 429, 500, 503)
}


def create_app(
    room: Room,
    *,
    name: str = "base",
    api_key: str | None = None,
    hosts: Collection[str] = (),
) -> FastAPI:
    """The server's application.

    Args:
        room: Where the model is.
        name: What the bare base is called among the models.
        api_key: What clients have to send; None: nothing.
        hosts: Names under which clients may call it where there is no key, beside those of this
            machine.

    Returns:
        An application whose every error has OpenAI's body.
    """
    app = FastAPI(
        title="ship-ds serve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    app.state.room = room
    app.state.adapters = Adapters(room, name)
    app.include_router(_Routes(room, app.state.adapters).router)
    app.include_router(page_router(room, name))
    app.add_middleware(
        Guard, api_key=api_key, hosts=hosts, limits=room.limits, metrics=room.metrics
    )
    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(ClientGoneError)
    async def client_gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(UserError)
    async def unreadable(request: Request, error: UserError) -> Response:
        return RequestError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        response = RequestError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return RequestError(500, "a fault of the server; its log has more").response()


def _invalid(error: RequestValidationError) -> RequestError:
    """The first thing that is wrong: "messages[0].content: ..."."""
    first = first_error(error)
    if first.kind == "json_invalid":
        return RequestError(400, "the body is no JSON", code="invalid_json")
    # Before the field's own name is "body" or its like; behind it pydantic puts the branch of a
    # union that it tried, such as "list[constrained-str]".
    place = [one for one in first.location[1:] if not set("-[(") & set(str(one))]
    names = [f"[{one}]" if isinstance(one, int) else f".{one}" for one in place]
    param = "".join(names[:3]).removeprefix(".")[:80] or None
    return RequestError(400, f"{param or 'body'}: {first}", param, first.kind)


class _Routes:
    """OpenAI's routes, and those of vLLM for adapters."""

    def __init__(self, room: Room, adapters: Adapters) -> None:
        self.room, self.adapters, self.metrics = room, adapters, room.metrics
        self._named_fields: set[str] = set()
        self.router = APIRouter()
        routes: dict[str, Callable[..., Any]] = {
            "/health": self.health,
            "/metrics": self.show_metrics,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
        }
        for path, route in routes.items():
            self.router.add_api_route(path, route, methods=["GET"], response_model=None)
        routes = {
            "/v1/completions": self.complete,
            "/v1/chat/completions": self.chat,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
        }
        for path, route in routes.items():
            self.router.add_api_route(path, route, methods=["POST"], response_model=None)

    async def health(self) -> dict[str, str]:
        """That the server runs, its model too."""
        if not self.room.is_running:
            raise RequestError(503, "the model does not run: start the server again")
        return {"status": "ok"}

    async def show_metrics(self) -> Response:
        """What it counts, for Prometheus."""
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> dict[str, Any]:
        """The bare base, and adapters that have names."""
        return {"object": "list", "data": self.adapters.cards()}

    async def model(self, name: str) -> dict[str, Any]:
        """One of them."""
        return self.adapters.card(name)

    async def load(self, asked: LoadRequest, request: Request) -> Response:
        """Give the adapter of an instruction, or of examples, a name."""
        self._notice(asked)
        made = self.adapters.register(asked.lora_name, asked.instruction, asked.examples)
        return JSONResponse(await unless_gone(request, made))

    async def unload(self, asked: UnloadRequest) -> dict[str, str]:
        """Take a name away."""
        self._notice(asked)
        self.adapters.unregister(asked.lora_name)
        return {"status": "unloaded", "lora_name": asked.lora_name}

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        """Answers to inputs."""
        self._notice(asked)
        return await self._answer(
            asked,
            request,
            Shape,
            asked.logprobs,
            asked.max_tokens,
            None,
            lambda ship, source: [
                _ids(ship, source, what, text) for what, text in asked.named_prompts
            ],
            len(asked.named_prompts),
        )

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """The answer to the last message."""
        self._notice(asked)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise RequestError(400, "top_logprobs: needs logprobs", "top_logprobs")
        is_base = self.adapters.is_base(asked.model)
        turns = _turns(asked.messages, is_base, self.adapters.is_unnamed(asked.model))
        return await self._answer(
            asked,
            request,
            ChatShape,
            (asked.top_logprobs or 0) if asked.logprobs else None,
            asked.max_completion_tokens or asked.max_tokens,
            None if is_base else turns.system,
            lambda ship, source: [_ids(ship, source, "messages", turns.text, turns)],
            1,
        )

    def _notice(self, asked: Asked) -> None:
        """Name fields that are let be in the log, each once."""
        for name in asked.unknown():
            if name not in self._named_fields and len(self._named_fields) < _MOST_NAMED_FIELDS:
                self._named_fields.add(name)
                log(f"serve: a request has the field {name[:64]!r}, which changes nothing here")

    async def _answer(
        self,
        asked: Writes,
        request: Request,
        shape: type[Shape],
        top_logprobs: int | None,
        max_tokens: int | None,
        instruction: str | None,
        prompts: Callable[[Ship, Source], list[Sequence[int]]],
        num_prompts: int,
    ) -> Response:
        since = time.monotonic()
        num_choices = asked.n or 1
        if num_prompts * num_choices > self.room.limits.max_rows_per_request:
            raise RequestError(
                400,
                f"n: {num_prompts} prompts with {num_choices} answers each are more than "
                f"{self.room.limits.max_rows_per_request}",
                "n",
            )
        sampling = Sampling(
            self._num_new(max_tokens),
            asked.temperature or 0.0,
            1.0 if asked.top_p is None else asked.top_p,
            asked.seed,
            asked.stops,
            top_logprobs,
        )

        def questions(ship: Ship, source: Source) -> list[Query]:
            return [
                Query(
                    source,
                    ids,
                    [_fitting(ship, source, ids, sampling, max_tokens is None)] * num_choices,
                )
                for ids in prompts(ship, source)
            ]

        begun = self._begin(asked, instruction, questions, since)
        source, writing, pieces, first = await unless_gone(request, begun)
        words = shape(asked.model, source, self.room.ship.digest, top_logprobs is not None)
        if asked.stream:
            options = asked.stream_options
            content = events(first, pieces, writing, words, bool(options and options.include_usage))
            return _Stream(content, writing)
        try:
            return JSONResponse(await unless_gone(request, whole(first, pieces, writing, words)))
        finally:
            writing.cancel()

    async def _begin(
        self,
        asked: Writes,
        instruction: str | None,
        questions: Callable[[Ship, Source], list[Query]],
        since: float,
    ) -> tuple[Source, Writing, AsyncIterator[tuple[int, AnswerPart]], tuple[int, AnswerPart]]:
        """Everything up to the first piece: what goes wrong until then has a status."""
        source = await self.adapters.resolve(asked.model, instruction, asked.ship_examples)
        writing = await self.room.write(lambda ship: questions(ship, source))
        try:
            pieces = aiter(writing)
            first = await anext(pieces)
        except BaseException:
            writing.cancel()
            raise
        self.metrics.seconds_to_first_token.observe(time.monotonic() - since)
        return source, writing, pieces, first

    def _num_new(self, asked: int | None) -> int:
        most = self.room.limits.max_new_tokens
        if asked is not None and asked > most:
            raise RequestError(
                400, f"max_tokens: {asked} is more than this server's {most}", "max_tokens"
            )
        return asked or min(most, self.room.ship.config.evaluation.max_new_tokens)


class _Stream(StreamingResponse):
    """Events. However it ends, and even where it never began, nothing is written on for nobody."""

    def __init__(self, content: AsyncIterator[bytes], writing: Writing) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self.writing = writing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.writing.cancel()


class _Turns(BaseModel):
    """What the messages of a chat mean.

    text: the input. system: the instruction, where a message states it. shots: earlier turns, as
    examples.
    """

    text: str
    system: str | None
    shots: list[tuple[str, str]]


def _turns(messages: Sequence[Message], is_base: bool, is_unnamed: bool) -> _Turns:
    """The last message is the input. Before it the bare base takes an instruction and examples,
    the model `ship` an instruction, and a named adapter nothing: it was trained on the input
    alone."""
    *before, last = messages
    if last.role != "user":
        raise RequestError(400, "messages: the last one has to be the user's", "messages")
    system = None
    if before and before[0].role in ("system", "developer"):
        if not (is_base or is_unnamed):
            raise RequestError(
                400,
                "messages: an adapter was trained on inputs alone, and a system message would "
                "change its prompt: leave it out, or ask the model 'ship', whose instruction it is",
                "messages",
            )
        system, before = before[0].text, before[1:]
    roles = [message.role for message in before]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise RequestError(
            400,
            "messages: expected at most one system message, then turns of user and assistant, "
            "then the user's",
            "messages",
        )
    if before and not is_base:
        raise RequestError(
            400,
            "messages: an adapter answers one input, and earlier turns would change its prompt: "
            "send the last message alone",
            "messages",
        )
    shots = [(x.text, y.text) for x, y in zip(before[::2], before[1::2], strict=True)]
    return _Turns(text=last.text, system=system, shots=shots)


def _ids(
    ship: Ship, source: Source, what: str, text: str, turns: _Turns | None = None
) -> Sequence[int]:
    """A prompt, in the run's own format."""
    model = ship.model
    with naming_fields(prompt="prompt", message="messages"):
        checks.check_text(model.prompts, text, what)
        if source.latent_1Z is not None:
            return model.question(text, source.instruction)
        if turns is None:
            return model.prompts.task_prompt(text)
        for stated in (turns.system or "", *(one for shot in turns.shots for one in shot)):
            checks.check_text(model.prompts, stated, what)
    return model.prompts.task_prompt(text, turns.system, [Example(x, y) for x, y in turns.shots])


def _fitting(
    ship: Ship, source: Source, ids: Sequence[int], sampling: Sampling, is_default: bool
) -> Sampling:
    """How the prompt is answered within the model's context: a length that the client did not ask
    for gives way. Raises RequestError where that is not enough."""
    limit = ship.model.task_llm.language_model.context_length
    before = ship.model.num_before(source.reading) if source.latent_1Z is not None else 0
    num_read, num_new = before + len(ids), sampling.max_new_tokens
    if limit is None or num_read + num_new <= limit:
        return sampling
    if not is_default:
        raise RequestError(
            400,
            f"max_tokens: the prompt's {num_read} tokens and an answer of {num_new} are more than "
            f"the model's {limit}: shorten one",
            "max_tokens",
            "context_length_exceeded",
        )
    if num_read >= limit:
        raise RequestError(
            400,
            f"the prompt's {num_read} tokens leave no room in the model's {limit}: shorten it",
            code="context_length_exceeded",
        )
    return replace(sampling, max_new_tokens=limit - num_read)
