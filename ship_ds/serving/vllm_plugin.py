"""A plugin of vLLM: the model `ship:<instruction>` of a request is the adapter of that instruction,
made when it is first asked for.

    export SHIP_DS_RUN=runs/quickstart VLLM_ALLOW_RUNTIME_LORA_UPDATING=true VLLM_PLUGINS=ship_ds
    vllm serve MODEL --enable-lora --max-lora-rank 16 --max-loras 8

vLLM loads plugins in all of its processes and asks resolvers in one. So `register` imports neither
torch nor the models; the first request opens the run, beside vLLM's own copy of the base. vLLM asks
one name at a time, on the loop that answers everybody: what takes time runs on a thread of its own.

vLLM never forgets a name that it has resolved, and reads the folder again whenever the adapter has
left its memory. So folders stay as long as the process, and how many there may be is bounded.
"""

import asyncio
import logging
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ship_ds.errors import UserError
from ship_ds.files import disk_error
from ship_ds.serving import PREFIX

if TYPE_CHECKING:
    from ship_ds.api import Ship

RUN, FOLDER, DEVICE = "SHIP_DS_RUN", "SHIP_DS_ADAPTERS", "SHIP_DS_DEVICE"
"""Of the environment: the run; where adapters are written, a temporary folder by default; where the
run's own models compute, `cpu` by default."""
MOST, LONGEST, MOST_PENDING = (
    "SHIP_DS_MAX_ADAPTERS",
    "SHIP_DS_MAX_CHARACTERS",
    "SHIP_DS_MAX_PENDING",
)
"""Of the environment: adapters that a process makes at most (1,000), characters of an instruction
(4,096), instructions that wait at once (32). What is beyond is unknown, a 404."""
_DEFAULTS = {MOST: 1000, LONGEST: 4096, MOST_PENDING: 32}

_log = logging.getLogger("vllm.ship_ds")  # under vLLM's own, which has its handler


def register() -> None:
    """For the entry point `vllm.general_plugins`: offer the resolver, where SHIP_DS_RUN is set."""
    if not os.environ.get(RUN):
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class Resolver(InstructionResolver, LoRAResolver):
        """Of vLLM's own class, which is here by now."""

    try:
        LoRAResolverRegistry.register_resolver("ship_ds", Resolver.from_environment(os.environ))
    except UserError as error:  # vLLM goes on without a plugin that raises, and says nothing
        _log.error("%s", error)


class InstructionResolver:
    """Names to vLLM's LoRA requests.

    Args:
        run: The run's folder.
        folder: Where adapters are written; None: a temporary one, gone with the process.
        device: Where the run's models compute.
        max_adapters: How many a process makes.
        max_characters: Of an instruction.
        max_pending: Instructions that are made or wait, at once.
    """

    def __init__(
        self,
        run: Path,
        folder: Path | None = None,
        device: str = "cpu",
        *,
        max_adapters: int = _DEFAULTS[MOST],
        max_characters: int = _DEFAULTS[LONGEST],
        max_pending: int = _DEFAULTS[MOST_PENDING],
    ) -> None:
        self.run, self.device = run, device
        self.max_adapters, self.max_characters = max_adapters, max_characters
        self.max_pending, self._num_pending = max_pending, 0
        self._folder, self._made = folder, set[str]()
        self._opened: dict[str, Ship] = {}
        # One: the models are not made for several threads.
        self._thread = ThreadPoolExecutor(1, "ship_ds")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Any:
        """The resolver that the variables ask for.

        Raises:
            UserError: One of them is no number.
        """
        folder = environment.get(FOLDER)
        numbers = [_number(environment, name) for name in (MOST, LONGEST, MOST_PENDING)]
        return cls(
            Path(environment[RUN]),
            Path(folder) if folder else None,
            environment.get(DEVICE, "cpu"),
            max_adapters=numbers[0],
            max_characters=numbers[1],
            max_pending=numbers[2],
        )

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """vLLM's request of an adapter; None: the name is none of ours, or nothing can be made of
        it, which the log says.

        Args:
            base_model_name: What `vllm serve` was given.
            lora_name: The request's `model`.
        """
        instruction = lora_name.removeprefix(PREFIX)
        if instruction == lora_name or len(instruction) > self.max_characters:
            return None
        # The text names no path: it may be anything.
        key = sha256(instruction.encode("utf-8", "backslashreplace")).hexdigest()
        if self._num_pending >= self.max_pending:
            _log.warning("%s: %d wait already (%s)", key[:12], self._num_pending, MOST_PENDING)
            return None
        self._num_pending += 1
        try:
            loop = asyncio.get_running_loop()
            folder = await loop.run_in_executor(
                self._thread, self._make, base_model_name, instruction, key
            )
        except UserError as error:
            _log.warning("%s: %s", key[:12], error)
            return None
        except OSError as error:
            advice = f"no adapter was made; {FOLDER} has to be a folder with room, writable here"
            place = self._folder or Path(FOLDER)
            _log.warning("%s: %s", key[:12], disk_error(place, error, advice))
            return None
        finally:
            self._num_pending -= 1
        from vllm.lora.request import LoRARequest

        # vLLM puts a number of its own in place of the 1.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))

    def _make(self, base_model_name: str, instruction: str, key: str) -> Path:
        """The adapter's folder, written and proved unless it is there."""
        ship = self._ship(base_model_name)
        # Of this very run: a folder that is kept may hold another one's.
        folder = self._root / f"{ship.digest[:16]}-{key}"
        if not folder.exists():
            if len(self._made) >= self.max_adapters:
                raise UserError(f"{len(self._made)} adapters were made already ({MOST})")
            from ship_ds.export.deduce import export_one
            from ship_ds.export.requests import Request
            from ship_ds.inference.checks import check_instruction

            check_instruction(ship.model, instruction)
            # Several API servers may share the folder and make one adapter at once.
            with tempfile.TemporaryDirectory(prefix=".part-", dir=self._root) as scratch:
                made = Path(scratch) / folder.name
                export_one(ship, Request(key, instruction), made, ship.probes)
                _publish(made, folder)
        self._made.add(key)
        return folder

    def _ship(self, base_model_name: str) -> "Ship":
        """The run around the folder that vLLM serves, which its config may know by another path."""
        from ship_ds.api import Ship

        if base_model_name not in self._opened:
            self._check_base(base_model_name)
            self._opened[base_model_name] = Ship.from_run(
                self.run, self.device, base=base_model_name
            )
        return self._opened[base_model_name]

    @cached_property
    def _root(self) -> Path:
        """Made when it is first needed, in the process that needs it."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            return self._folder
        self._temporary = tempfile.TemporaryDirectory(prefix="ship-ds-")
        return Path(self._temporary.name)

    def _check_base(self, name: str) -> None:
        """Raises UserError where vLLM serves another model than the run's adapters are for."""
        from ship_ds.bundle import Bundle, check_bases, fingerprints
        from ship_ds.kinds import ADAPTERS

        bundle = Bundle.open(self.run)
        if ADAPTERS.implementation(bundle.config.model.hypernetwork).leaves != "lora":
            raise UserError(
                f"{self.run}: its adapters are no LoRAs, and vLLM serves no others by name; "
                "`ship-ds serve` serves this run's"
            )
        base = bundle.config.model.task_llm.base
        if not Path(name).is_dir():
            raise UserError(
                f"{name}: is no folder, and {self.run} was trained around {base}: serve that folder"
            )
        check_bases(bundle.folder, fingerprints(base, name), bundle.bases)


def _publish(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, str(_DEFAULTS[name]))
    if not text.isdecimal() or not 1 <= int(text[:9]) == int(text):
        raise UserError(f"{name}={text}: expected a number from 1 on")
    return int(text)
