"""The page at `/`, and what it asks beside OpenAI's calls.

    GET  /                       the page; its files are under /page/
    GET  /ship/v1/run            what is served, and what the page may send
    GET  /ship/v1/map            the known instructions in a plane
    POST /ship/v1/describe       instruction -> text of its latent, nearest known ones, place
    POST /ship/v1/confidence     instruction, inputs -> how many adapters around it agree
    POST /ship/v1/induce         examples -> candidates; a stream of events
    POST /ship/v1/explain        an adapter's two files -> what it does; a stream of events
    POST /ship/v1/export         instruction -> its PEFT folder as a zip

A stream has lines of progress, {"progress": "..."}, then {"result": ...} or an error, each a
server-sent event; a client that goes away ends the work at its next pass through the Task LLM or
line of progress.

Nothing that a client sends is a name of a file: uploads and exports are in a folder of their own in
the system's temporary one, for this user alone, which is gone before the answer is sent.

Letters: C candidates, Z latent size.
"""

import asyncio
import binascii
import json
import tempfile
import threading
import zipfile
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from ship_ds.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ship_ds.api import Candidate, Explained, Explanation, Ship
from ship_ds.console import Log
from ship_ds.console import log as log_to_console
from ship_ds.data.task import spread
from ship_ds.errors import UserError
from ship_ds.export.deduce import export_one
from ship_ds.export.requests import Request, slug
from ship_ds.serving.errors import RequestError, naming_fields
from ship_ds.serving.leaving import unless_gone
from ship_ds.serving.protocol import RequestExamples, Text
from ship_ds.serving.room import Room

if TYPE_CHECKING:
    from sklearn.decomposition import PCA

MAX_ADAPTER_BYTES = 32 << 20
_MAX_CONFIG_BYTES = 64 << 10
_MAX_INPUTS, _MAX_POINTS = 16, 2000
_NUM_CANDIDATES = 6
_SECONDS_BEFORE_A_STREAM = 0.2
"""What is wrong with a request is told with its status, if it is found so soon; else in the
stream."""
_SECONDS_BETWEEN_BEATS = 1.0

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_Instruction = Annotated[Text, Field(min_length=1)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class InstructionAsked(_Asked):
    """An instruction alone."""

    instruction: _Instruction


class ConfidenceAsked(_Asked):
    """An instruction, and inputs to answer."""

    instruction: _Instruction
    inputs: list[Text] = Field(min_length=1, max_length=_MAX_INPUTS)


class InductionAsked(_Asked):
    """Examples to find an instruction for."""

    examples: RequestExamples


class ExplanationAsked(_Asked):
    """The two files of an adapter in base64, and inputs that it is to be watched on."""

    config: str = Field(min_length=1, max_length=_MAX_CONFIG_BYTES * 4 // 3 + 4)
    weights: str = Field(min_length=1, max_length=MAX_ADAPTER_BYTES * 4 // 3 + 4)
    inputs: list[Text] = Field(default=[], max_length=_MAX_INPUTS)


class RunAnswer(BaseModel):
    """What is served, and what may be sent."""

    model: str
    base: str
    kind: str
    num_known: int
    examples: list[str]
    probes: list[str]
    reads_adapters: bool
    max_inputs: int = _MAX_INPUTS
    max_new_tokens: int
    max_adapter_bytes: int = MAX_ADAPTER_BYTES


class PointAnswer(BaseModel):
    """A known instruction in the plane."""

    instruction: str
    x: float
    y: float


class MapAnswer(BaseModel):
    """The known instructions in the plane, and the share of their variance that it holds."""

    points: list[PointAnswer]
    explained: float


class NearestAnswer(BaseModel):
    """A known instruction and how far its latent is."""

    instruction: str
    distance: float


class DescriptionAnswer(BaseModel):
    """What is known of an instruction without answering any input."""

    reconstruction: str | None
    nearest: list[NearestAnswer]
    is_far: bool
    warning: str | None
    place: tuple[float, float] | None


class ConfidenceAnswer(BaseModel):
    """How many adapters around the instruction's answer alike."""

    agreement: float
    by_input: list[float]
    threshold: float | None
    is_low: bool
    warning: str | None


class CandidateAnswer(BaseModel):
    """An instruction and how it explains the examples."""

    instruction: str
    num_right: int
    num_right_in_prompt: int | None
    most_right: int
    loss: float
    origin: str


class InductionAnswer(BaseModel):
    """Candidates, best first."""

    num_examples: int
    candidates: list[CandidateAnswer]


class EvidenceAnswer(BaseModel):
    """An instruction and what speaks for it."""

    instruction: str
    evidence: str
    origin: str


class ExplanationAnswer(BaseModel):
    """What an adapter does: an instruction, or None; `evidence` names the figure of the candidates,
    and `about` says what it is."""

    instruction: str | None
    evidence: str
    about: str
    candidates: list[EvidenceAnswer]


@dataclass(frozen=True)
class Plane:
    """The two directions in which the latents of known instructions vary most.

    Principal components and not t-SNE, since a new instruction has a place in them, too.

    Args:
        points: A place for each of at most 2,000 known instructions.
        explained: Share of the variance of all dimensions.
        axes: Places others.
    """

    points: tuple[tuple[str, float, float], ...]
    explained: float
    axes: "PCA"

    @classmethod
    def of(cls, ship: Ship) -> "Plane | None":
        """That of a run; None where it knows fewer than three instructions."""
        from sklearn.decomposition import PCA

        if len(set(ship.known)) < 3 or ship.config.model.latent_size < 2:
            return None
        latent_CZ = ship.bank.latent_CZ.float().cpu().numpy()
        axes = PCA(2, svd_solver="full").fit(latent_CZ)
        places = axes.transform(latent_CZ).tolist()
        chosen = spread(range(len(places)), _MAX_POINTS)
        points = tuple((ship.bank.instructions[i], places[i][0], places[i][1]) for i in chosen)
        return cls(points, float(axes.explained_variance_ratio_.sum()), axes)

    def place(self, latent: Sequence[float]) -> tuple[float, float]:
        """Where a latent of Z numbers lies."""
        x, y = self.axes.transform([list(latent)])[0].tolist()
        return x, y


class _Planes:
    """The plane of the run, made when it is first asked for, on the model's thread."""

    def __init__(self) -> None:
        self.made = False
        self.plane: Plane | None = None

    def of(self, ship: Ship) -> Plane | None:
        if not self.made:
            self.plane, self.made = Plane.of(ship), True
        return self.plane


def page_router(room: Room, name: str) -> APIRouter:
    """The routes of the page.

    Args:
        room: Where the model is.
        name: What the bare base is called among the models.
    """
    router = APIRouter()
    _add_files(router)
    _add_questions(router, room, name)
    _add_jobs(router, room)
    return router


def _add_files(router: APIRouter) -> None:
    """The page itself and the files that it names: read once, so that no request names a file."""
    folder = files("ship_ds.serving") / "page"
    for item in folder.iterdir():
        kind = _TYPES.get(Path(item.name).suffix)
        if kind is None:
            continue
        path = "/" if item.name == "index.html" else f"/page/{item.name}"
        router.add_api_route(path, _file(item.read_bytes(), kind), include_in_schema=False)


def _file(content: bytes, kind: str) -> Callable[[], Response]:
    def answer() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return answer


def _add_questions(router: APIRouter, room: Room, name: str) -> None:
    planes = _Planes()

    @router.get("/ship/v1/run")
    async def run() -> RunAnswer:
        return await room.call(
            lambda ship: _run(ship, name, room.limits.max_new_tokens), is_short=True
        )

    @router.get("/ship/v1/map")
    async def map_of_latents(request: HttpRequest) -> MapAnswer:
        plane = await unless_gone(request, room.call(planes.of))
        if plane is None:
            return MapAnswer(points=[], explained=0.0)
        points = [PointAnswer(instruction=text, x=x, y=y) for text, x, y in plane.points]
        return MapAnswer(points=points, explained=plane.explained)

    @router.post("/ship/v1/describe")
    async def describe(asked: InstructionAsked, request: HttpRequest) -> DescriptionAnswer:
        # Short once bank and plane are there.
        described = room.call(
            lambda ship: _description(ship, asked.instruction, planes), is_short=planes.made
        )
        return await unless_gone(request, described)

    @router.post("/ship/v1/confidence")
    async def confidence(asked: ConfidenceAsked, request: HttpRequest) -> ConfidenceAnswer:
        return await unless_gone(request, room.call(lambda ship: _confidence(ship, asked)))


def _add_jobs(router: APIRouter, room: Room) -> None:
    @router.post("/ship/v1/induce")
    async def induce(asked: InductionAsked) -> Response:
        pairs = [(one.input, one.target) for one in asked.examples]
        return await _events(room, lambda ship, log: _induction(ship, pairs, log))

    @router.post("/ship/v1/explain")
    async def explain(asked: ExplanationAsked) -> Response:
        inputs = asked.inputs
        files = {
            ADAPTER_CONFIG: _bytes(asked.config, "config"),
            ADAPTER_WEIGHTS: _bytes(asked.weights, "weights"),
        }
        # Emptied at the end: a call that is taken back waits in the room's queue for its turn.
        return await _events(
            room, lambda ship, log: _explanation(ship, files, inputs, log), files.clear
        )

    @router.post(
        "/ship/v1/export", response_class=Response, responses={200: {"content": {_ZIP: {}}}}
    )
    async def export(asked: InstructionAsked, request: HttpRequest) -> Response:
        file = await unless_gone(request, room.call(lambda ship: _export(ship, asked.instruction)))
        headers = {"Content-Disposition": 'attachment; filename="adapter.zip"'}
        return StreamingResponse(_pieces(file), media_type=_ZIP, headers=headers)


def _run(ship: Ship, name: str, most_new_tokens: int) -> RunAnswer:
    model, base = ship.config.model, str(ship.config.model.task_llm.base)
    return RunAnswer(
        model=name,
        base=Path(base).name,
        kind=model.hypernetwork.model_dump()["kind"],
        num_known=len(set(ship.known)),
        examples=list(ship.known[:1]),
        probes=list(ship.probes),
        reads_adapters=ship.model.hypernetwork.reads(),
        max_new_tokens=min(most_new_tokens, ship.config.evaluation.max_new_tokens),
    )


def _description(ship: Ship, instruction: str, planes: _Planes) -> DescriptionAnswer:
    with naming_fields(instruction="instruction"):
        latent = ship.encode(instruction)
    familiarity, plane = ship.familiarity(instruction), planes.of(ship)
    nearest = ship.nearest_known(latent) if ship.known else []
    return DescriptionAnswer(
        reconstruction=ship.decode(latent) if ship.model.decodes else None,
        nearest=[NearestAnswer(**vars(one)) for one in nearest],
        is_far=familiarity is not None and familiarity.is_far,
        warning=None if familiarity is None else familiarity.warning,
        place=None if plane is None else plane.place(latent),
    )


def _confidence(ship: Ship, asked: ConfidenceAsked) -> ConfidenceAnswer:
    with naming_fields(instruction="instruction", input="inputs"):
        confidence = ship.confidence(asked.instruction, asked.inputs)
    return ConfidenceAnswer(
        agreement=confidence.agreement,
        by_input=list(confidence.by_input),
        threshold=confidence.calibration.threshold if confidence.calibration else None,
        is_low=confidence.is_low,
        warning=confidence.warning,
    )


def _induction(ship: Ship, pairs: Sequence[tuple[str, str]], log: Log) -> InductionAnswer:
    with naming_fields(example="examples"):
        induction = ship.induce(pairs, log=log)
    return InductionAnswer(
        num_examples=induction.num_examples,
        candidates=[_candidate(one) for one in induction.candidates[:_NUM_CANDIDATES]],
    )


def _candidate(one: Candidate) -> CandidateAnswer:
    return CandidateAnswer(
        instruction=one.instruction,
        num_right=one.num_right,
        num_right_in_prompt=one.num_right_in_prompt,
        most_right=one.most_right,
        loss=one.loss,
        origin=one.origin,
    )


def explain_adapter(
    ship: Ship, files: Mapping[str, bytes], inputs: Sequence[str], log: Log
) -> ExplanationAnswer:
    """What an uploaded adapter does.

    Args:
        ship: The run.
        files: Of the two names of a PEFT folder.
        inputs: What the adapter is asked; none: inputs of the run's own.
        log: Takes a line of progress.

    Raises:
        UserError: The files are no adapter of this run's base, or the run is not ready to explain
            one.
    """
    with tempfile.TemporaryDirectory(prefix="ship-ds-") as outer:
        folder = Path(outer) / "adapter"
        folder.mkdir()
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            (folder / name).write_bytes(files[name])
        if not ship.is_ready_to_explain:
            raise UserError(
                "explain: this run has no reader of adapters yet, which takes minutes to train, "
                "once: start the server with --prepare, or run `ship-ds explain` first"
            )
        try:
            explanation = ship.explain(folder, inputs, log=log)
        except UserError as error:
            # The folder's name on the server is nothing to the one who sent the files.
            raise UserError(
                str(error).replace(f"{folder}/", "").replace(str(folder), "it")
            ) from None
    return _answer(explanation)


_NAMED_FILES = {ADAPTER_CONFIG: "config", ADAPTER_WEIGHTS: "weights"}


def _explanation(
    ship: Ship, files: Mapping[str, bytes], inputs: Sequence[str], log: Log
) -> ExplanationAnswer:
    """The same, with a request's names for what is wrong."""
    with naming_fields(**_NAMED_FILES, input="inputs"):
        return explain_adapter(ship, files, inputs, log)


def _answer(explanation: Explanation) -> ExplanationAnswer:
    def evidence(one: Explained) -> EvidenceAnswer:
        same = f"{one.same} of {len(explanation.inputs)}"
        origin = ", ".join(one.sources)
        return EvidenceAnswer(instruction=one.instruction, evidence=same, origin=origin)

    return ExplanationAnswer(
        instruction=explanation.instruction,
        evidence="Same answers",
        about=f"Of the adapter's answers to {len(explanation.inputs)} inputs, those that the "
        f"text's own adapter gives, too. From an agreement of {explanation.threshold:.2f} on it "
        f"says what the adapter does; the best one has {explanation.agreement:.2f}.",
        candidates=[evidence(one) for one in explanation.candidates[:_NUM_CANDIDATES]],
    )


def _bytes(text: str, param: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            400, f"{param}: is not base64; send the file's bytes so", param
        ) from None


_ZIP = "application/zip"


def _export(ship: Ship, instruction: str) -> IO[bytes]:
    """The instruction's PEFT folder, proved, as a zip in a file without a name, which is gone when
    it is closed."""
    with naming_fields(instruction="instruction"):
        confidence = ship.confidence(instruction)
    request = Request("adapter", instruction, confidence=confidence.summary())
    with tempfile.TemporaryDirectory(prefix="ship-ds-") as outer:
        folder = Path(outer) / "adapter"
        export_one(ship, request, folder, ship.probes)
        file = tempfile.TemporaryFile(prefix="ship-ds-")  # noqa: SIM115 (its reader closes it)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(filter(Path.is_file, folder.rglob("*"))):
                archive.write(path, f"{slug(instruction)}/{path.relative_to(folder)}")
    file.seek(0)
    return file


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while piece := file.read(1 << 16):
            yield piece


class _GoneError(Exception):
    """The client does not wait for this any more."""


async def _events(
    room: Room,
    work: Callable[[Ship, Log], BaseModel],
    ended: Callable[[], None] = lambda: None,
) -> Response:
    """A stream of what `work` tells, and of its result.

    Args:
        room: Where the model is.
        work: Gets the run, and what takes a line of progress.
        ended: Is called when nobody works or waits any more.

    Raises:
        UserError: What the work finds wrong at once; later it is an event.
    """
    loop, lines, closed = asyncio.get_running_loop(), asyncio.Queue[str](), threading.Event()

    def log(text: str) -> None:
        if closed.is_set():
            raise _GoneError
        loop.call_soon_threadsafe(lines.put_nowait, text)

    task = asyncio.ensure_future(room.call(lambda ship: work(ship, log)))
    task.add_done_callback(lambda _: ended())
    await asyncio.wait({task}, timeout=_SECONDS_BEFORE_A_STREAM)
    if task.done() and (error := task.exception()):
        raise error
    return _Events(task, lines, closed)


class _Events(StreamingResponse):
    """What is told of a task. However it ends, and even where it never began, nobody works on."""

    def __init__(
        self,
        task: "asyncio.Future[BaseModel]",
        lines: "asyncio.Queue[str]",
        closed: threading.Event,
    ) -> None:
        super().__init__(_event_texts(task, lines), media_type="text/event-stream")
        self.task, self.closed = task, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.closed.set()
            self.task.cancel()


async def _event_texts(
    task: "asyncio.Future[BaseModel]", lines: "asyncio.Queue[str]"
) -> AsyncIterator[str]:
    waiting: asyncio.Future[str] | None = None
    try:
        while not task.done():
            # A beat, so that a connection through a proxy stays and one that is gone is noticed.
            yield ": \n\n"
            waiting = asyncio.ensure_future(lines.get())
            both: set[asyncio.Future[Any]] = {task, waiting}
            await asyncio.wait(
                both,
                timeout=_SECONDS_BETWEEN_BEATS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if waiting.done():
                yield _event({"progress": waiting.result()})
            waiting.cancel()
        yield _event({"result": (await task).model_dump()})
    except UserError as error:
        yield _event(RequestError(400, str(error)).body())
    except RequestError as error:
        yield _event(error.body())
    except Exception as error:
        log_to_console(f"serve: {type(error).__name__} in a stream: {error}")
        yield _event(RequestError(500, "a fault of the server; its log has more").body())
    finally:
        if waiting is not None:
            waiting.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
