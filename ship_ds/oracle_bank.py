"""A bank of oracles on disk: for each task a LoRA of the Task LLM that was trained by gradient on
that task's examples alone.

    BANK/bank.json                  what they were trained for and on: `OracleBank`
    BANK/group-0000.safetensors     of the tasks of one group, in their order: the LoRA of each as a
                                    row of 16-bit numbers, and the loss before and after training
    BANK/spreads.safetensors        how far the oracles lie apart, by site
    BANK/manifest.json              sizes and hashes of all these

`ship-ds oracles` writes it (evaluation/oracle_training.py), and the objective `oracles` reads it
(model/oracles.py). Imports no torch: what does not fit a config is told before that is loaded.
"""

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt, ValidationError

from ship_ds.errors import UserError
from ship_ds.files import MANIFEST, Manifest, recover, refused_paths, sha256
from ship_ds.parsing import read_json_object
from ship_ds.section import Section, first_error

if TYPE_CHECKING:
    from ship_ds.data.task import SplitTask

BANK, SPREADS = "bank.json", "spreads.safetensors"
SETTING = "loss.oracles.bank"
"""Where a config names a bank."""


class OracleBank(Section):
    """What the oracles were trained for, and how."""

    version: Literal[1] = 1
    """Of the format."""
    made_for: dict[str, Any]
    """What a training has to have likewise: base, prompts, numbers of the LoRA."""
    trained: dict[str, Any]
    """Options of the training."""
    sites: dict[str, tuple[int, int]]
    """Module path -> (in, out) of the linears that each LoRA changes."""
    tasks: dict[str, str]
    """Id -> digest of the examples it was trained on, in the order of the rows."""
    group_size: PositiveInt
    """Tasks of a group; the last one may have fewer."""

    def groups(self) -> Iterator[tuple[str, list[str]]]:
        """The file and the tasks of each group."""
        ids = list(self.tasks)
        for number in range(math.ceil(len(ids) / self.group_size)):
            start = number * self.group_size
            yield f"group-{number:04d}.safetensors", ids[start : start + self.group_size]


def read_bank(folder: Path, key: str = SETTING) -> OracleBank:
    """The bank's description.

    Args:
        folder: of the bank.
        key: of the setting or option that names it, for messages.

    Raises:
        UserError: there is none, or it is none.
    """
    if not (folder / BANK).is_file():
        raise UserError(
            f"{key}: {folder}: no bank of oracles here (no {BANK}); `ship-ds oracles` makes one"
        )
    try:
        return OracleBank.model_validate(read_json_object(folder / BANK))
    except ValidationError as error:
        line = first_error(error).line
        raise UserError(f"{key}: {folder / BANK}: {line}; make the bank anew") from None


def check_bank(folder: Path, settings: Mapping[str, Any], targets: Collection[str] | None) -> None:
    """A bank is whole by its files' sizes, and of such a model by what its config says.

    Args:
        folder: Of the bank.
        settings: Setting of the config -> its value, of those that decide the oracles.
        targets: Names of the linears that the config's LoRA changes; None where the base alone
            tells.

    Raises:
        UserError: It is not there, cut short, or of other LoRAs.
    """
    # A kill as the bank was renamed leaves it under another name (files.py).
    recover(folder)
    bank = read_bank(folder)
    check_files(folder, hashes=False)
    check_made_for(folder, bank.made_for, settings)
    names = {path.rpartition(".")[2] for path in bank.sites}
    if targets is not None and set(targets) != names:
        raise _unlike(folder, "model.hypernetwork.targets", sorted(names), sorted(targets))


def check_files(folder: Path, *, hashes: bool = True) -> None:
    """Every file of a bank is there as it was written. Raises UserError."""
    try:
        with refused_paths():
            problem = Manifest.read(folder).problem(folder, hashes=hashes)
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        raise UserError(f"{SETTING}: {folder}: {problem}; make the bank anew, or copy it again")


def check_made_for(folder: Path, made_for: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """What a bank was made for is what is wanted.

    Args:
        folder: of the bank, for the message.
        made_for: what its description says (`OracleBank.made_for`).
        settings: what the run has, by the same keys; a key that is not here is not compared.

    Raises:
        UserError: it is not; the message names the first that differs.
    """
    for key, now in settings.items():
        if made_for.get(key) != now:
            raise _unlike(folder, key, made_for.get(key), now)


def _unlike(folder: Path, key: str, then: object, now: object) -> UserError:
    return UserError(
        f"{SETTING}: {folder}: made for {key}={_short(then)}, and this run has {_short(now)}: name "
        "a bank that `ship-ds oracles` made of this config"
    )


def _short(value: object) -> object:
    """A fingerprint by its first digits."""
    is_long = isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value)
    return value[:12] if is_long and isinstance(value, str) else value


def fingerprint(folder: Path) -> str:
    """Names a whole bank by all that its manifest lists."""
    return sha256(folder / MANIFEST)


def examples_digest(task: "SplitTask") -> str:
    """Names the examples that a task's oracle is trained on."""
    pairs = [(example.input, example.target) for example in task.train]
    return hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
