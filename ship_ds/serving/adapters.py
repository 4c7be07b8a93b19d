"""What `model` may be: names and instructions to latents, and those kept.

    adapters = Adapters(room, "quickstart")
    await adapters.resolve("ship:reverse the list")     # its latent
    await adapters.resolve("quickstart")                # the bare base

An adapter is a function of its latent, a few hundred numbers, and of the text behind it; a batch
makes those of all its rows in one call of the hypernetwork. So latents are what is kept: ten
thousand take megabytes for a model of any size. No text of a client is ever taken for a path or an
address.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256

import torch

from ship_ds.api import Ship
from ship_ds.inference import checks
from ship_ds.serving import PREFIX
from ship_ds.serving.decoding import Source
from ship_ds.serving.errors import RequestError, naming_fields
from ship_ds.serving.protocol import ShipExample
from ship_ds.serving.room import Room

UNNAMED = "ship"
"""The model whose instruction, or examples, the request states elsewhere."""
Pairs = tuple[tuple[str, str], ...]
"""Inputs with their targets."""


@dataclass
class _Flight:
    """A source that is being made, and how many requests wait for it."""

    task: asyncio.Task[Source]
    num_waiting: int = 0


@dataclass
class _Registered:
    """An adapter with a name of its own."""

    source: Source
    created: int = field(default_factory=lambda: int(time.time()))


class Adapters:
    """The names of a server.

    Args:
        room: Where latents are made.
        base: What the bare base is called.
    """

    def __init__(self, room: Room, base: str) -> None:
        self.room, self.base, self.limits = room, base, room.limits
        self.created = int(time.time())
        self._bare = Source()
        self._named: dict[str, _Registered] = {}
        self._kept: OrderedDict[bytes, Source] = OrderedDict()
        self._num_bytes = 0
        self._flights: dict[bytes, _Flight] = {}

    def cards(self) -> list[dict[str, object]]:
        """The base and the registered adapters, as `/v1/models` lists them."""
        base = self._card(self.base, self.base, None, self.created)
        return [base, *(self._card_of(name) for name in self._named)]

    def card(self, name: str) -> dict[str, object]:
        """The card of one name. Raises RequestError, 404."""
        if name == self.base:
            return self.cards()[0]
        if name not in self._named:
            raise self._unknown(name)
        return self._card_of(name)

    def _card_of(self, name: str) -> dict[str, object]:
        one = self._named[name]
        return self._card(name, f"{PREFIX}{one.source.instruction}", self.base, one.created)

    def _card(self, name: str, root: str, parent: str | None, created: int) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "ship-ds",
            "root": root,
            "parent": parent,
        }

    async def resolve(
        self,
        model: str,
        instruction: str | None = None,
        examples: Sequence[ShipExample] | None = None,
    ) -> Source:
        """Who answers to a model's name. A known name wins over whatever it may spell.

        Args:
            model: As the request has it.
            instruction: Stated beside it, for the model `ship`.
            examples: Beside it.

        Raises:
            RequestError: 404, no such name; 400, it states its task twice or not at all, or the
                instruction or the examples cannot be read.
        """
        if model == self.base or model in self._named:
            if examples is not None:
                raise RequestError(
                    400,
                    f"ship_examples: goes with model {UNNAMED!r}, and {model[:80]!r} is a name",
                    "ship_examples",
                )
            return self._bare if model == self.base else self._named[model].source
        if model.startswith(PREFIX) and model != PREFIX:
            with naming_fields(instruction="model", example="ship_examples"):
                return await self.make(model.removeprefix(PREFIX), examples)
        if model not in (UNNAMED, PREFIX):
            raise self._unknown(model)
        if instruction is None and examples is None:
            raise RequestError(
                400,
                f"model: {UNNAMED!r} needs a system message that is the instruction, or "
                "ship_examples",
                "model",
            )
        with naming_fields(instruction="messages", example="ship_examples"):
            return await self.make(instruction, examples)

    def is_unnamed(self, model: str) -> bool:
        """Whether the task of this model stands elsewhere in the request."""
        return model in (UNNAMED, PREFIX) and model != self.base and model not in self._named

    def is_base(self, model: str) -> bool:
        """Whether it is the bare base."""
        return model == self.base

    def _unknown(self, model: str) -> RequestError:
        return RequestError(
            404,
            f"model: {model[:80]!r} is not known here: GET /v1/models lists the names, and "
            f'"{PREFIX}<instruction>" makes an adapter',
            "model",
            "model_not_found",
        )

    async def make(
        self, instruction: str | None, examples: Sequence[ShipExample] | None = None
    ) -> Source:
        """The source of an instruction, of examples, or of both; made once, however many ask, and
        not to its end where all of them leave.

        Args:
            instruction: What it is made of; None: of the examples alone.
            examples: Likewise; None: of the instruction alone.

        Raises:
            RequestError: See `Room.call`; or they cannot be read.
        """
        pairs = tuple((one.input, one.target) for one in examples) if examples else ()
        key = sha256(repr((instruction, pairs)).encode("utf-8", "backslashreplace")).digest()
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        joins = key in self._flights
        try:
            return await self._board(key, instruction, pairs)
        except RequestError as error:
            # It was late for who came first, and not yet for who came after.
            if not joins or error.status != 503 or not self.room.is_open:
                raise
        return await self._board(key, instruction, pairs)

    async def _board(self, key: bytes, instruction: str | None, pairs: Pairs) -> Source:
        """Wait for the source that is being made; where none is, begin."""
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(asyncio.ensure_future(self._fly(key, instruction, pairs)))
            flight.task.add_done_callback(partial(self._landed, key))
            self._flights[key] = flight
        flight.num_waiting += 1
        try:
            # Shielded: one who leaves takes the others' adapter not with him.
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting and not flight.task.done():
                flight.task.cancel()
                self._landed(key, flight.task)  # one who comes now starts another

    def _landed(self, key: bytes, task: "asyncio.Task[Source]") -> None:
        if key in self._flights and self._flights[key].task is task:
            del self._flights[key]
        if task.done() and not task.cancelled():
            task.exception()  # else a fault that nobody waits for any more would be logged

    async def _fly(self, key: bytes, instruction: str | None, pairs: Pairs) -> Source:
        make: Callable[[Ship, str | None, Pairs], Source] = _of_text
        if pairs:
            make = _read if _reads(self.room.ship, instruction, pairs) else _induced
        source = await self.room.call(
            lambda ship: make(ship, instruction, pairs), is_short=make is not _induced
        )
        self.room.metrics.made.inc()
        self._keep(key, source)
        return source

    def _keep(self, key: bytes, source: Source) -> None:
        self._kept[key] = source
        self._num_bytes += source.num_bytes
        while len(self._kept) > self.limits.max_cached or (
            self._num_bytes > self.limits.max_cached_bytes and len(self._kept) > 1
        ):
            _, oldest = self._kept.popitem(last=False)
            self._num_bytes -= oldest.num_bytes
        self.room.metrics.cached.set(len(self._kept))
        self.room.metrics.cached_bytes.set(self._num_bytes)

    async def register(
        self, name: str, instruction: str | None, examples: Sequence[ShipExample] | None
    ) -> dict[str, object]:
        """Give an adapter a name.

        Args:
            name: What `model` may then say.
            instruction: What the adapter is made of; None: of the examples alone.
            examples: What it is made of, beside the instruction or alone; None: of the instruction
                alone.

        Returns:
            Its card.

        Raises:
            RequestError: 400, the name is taken, is none, or they are too many; there is neither an
                instruction nor examples, or they cannot be read; 429 or 503, see `Room.call`.
        """
        self._check_name(name)
        if instruction is None and examples is None:
            raise RequestError(
                400, "instruction: is missing; give that, or examples", "instruction"
            )
        with naming_fields(instruction="instruction", example="examples"):
            source = await self.make(instruction, examples)
        self._check_name(name)  # somebody may have been faster
        self._named[name] = _Registered(source)
        return self._card_of(name)

    def _check_name(self, name: str) -> None:
        if name in (self.base, UNNAMED, PREFIX):
            raise RequestError(
                400, f"lora_name: {name!r} has a meaning of its own: choose another", "lora_name"
            )
        if not name.isprintable() or name != name.strip():
            raise RequestError(
                400, "lora_name: expected printable letters without spaces around", "lora_name"
            )
        if name in self._named:
            raise RequestError(
                400, f"lora_name: {name!r} is loaded already: unload it first", "lora_name"
            )
        if len(self._named) >= self.limits.max_names:
            raise RequestError(
                400,
                f"lora_name: {self.limits.max_names} adapters have names already (--max-names): "
                "unload one first",
                "lora_name",
            )

    def unregister(self, name: str) -> None:
        """Take a name away. Raises RequestError, 404."""
        if name not in self._named:
            raise RequestError(
                404,
                f"lora_name: {name[:80]!r} is not loaded",
                "lora_name",
                "model_not_found",
            )
        del self._named[name]


def _of_text(ship: Ship, instruction: str | None, _: Pairs) -> Source:
    assert instruction is not None
    checks.check_instruction(ship.model, instruction)
    return Source(instruction, ship.model.encode([instruction]).cpu(), instruction)


def _reads(ship: Ship, instruction: str | None, pairs: Pairs) -> bool:
    """Whether the encoder makes a latent of examples in one pass; with an instruction nothing else
    does."""
    encoder = ship.model.config.encoder
    reads_alone = encoder.reads_examples_alone and encoder.max_examples >= len(pairs)
    return instruction is not None or reads_alone


def _read(ship: Ship, instruction: str | None, pairs: Pairs) -> Source:
    read = ship.read(pairs, instruction)
    assert read.reading is not None  # as of everything that was read so
    return Source(read.instruction, torch.tensor([read.latent]), read.reading)


def _induced(ship: Ship, instruction: str | None, pairs: Pairs) -> Source:
    induced = ship.induce(pairs)
    # The latent that answers most may be another text's; what an adapter fuses has to be of the
    # latent's. Where descent found it there is none.
    reading = induced.latent_reading or induced.instruction
    return Source(induced.instruction, torch.tensor([induced.latent]), reading)
