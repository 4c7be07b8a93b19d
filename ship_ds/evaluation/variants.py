"""What `ship-ds compare` compares: variants of a config, each trained once for every seed.

A name on the command line is a recipe or a config file, and then one variant, or a file of several:

    config: quickstart
    seeds: [0, 1]
    variants:
      lora: {}
      soft-prompt: {model.hypernetwork: {kind: soft_prompt}}
      no-reconstruction: {loss.reconstruction: 0}

Everything is parsed and looked at before anything is trained. Imports no torch.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ship_ds.bundle import verify
from ship_ds.config import Config, flat, load_config, parse_config, read_values
from ship_ds.errors import UserError
from ship_ds.files import recover
from ship_ds.parsing import read_json_lines, read_json_object
from ship_ds.runtime import preflight
from ship_ds.runtime.deepspeed_config import AUTO_CONFIGS
from ship_ds.section import Section, first_error

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=.*", re.DOTALL)
_LABEL = re.compile(r"\w[\w.-]*")
_NO_REPORT = "evaluation.ends_with_report=false"
"""The report that a training ends with would be measured again by the harness."""


class VariantsFile(Section):
    """Several variants of one config, and how often each is trained."""

    config: str
    """The recipe or YAML file that all of them start from."""
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    """Each variant is trained once with each; None: with the config's own run.seed."""
    variants: dict[str, dict[str, Any] | None] = Field(min_length=1)
    """By label: settings that it has otherwise, as `section.key: value`."""


@dataclass(frozen=True)
class Variant:
    """A config under a label, which is the name of its folder. overrides: after those of all."""

    label: str
    source: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class VariantRun:
    """One training of a variant. overrides: every one that its command has."""

    label: str
    seed: int
    source: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"

    def train_command(self, num_ranks: int) -> list[str]:
        """What a user would start: the program itself, or torchrun with it."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        several = [*launcher, str(num_ranks)] if num_ranks > 1 else []
        program = ["-m", "ship_ds.train", "--config", self.source, *self.overrides]
        return [sys.executable, *several, *program]

    @property
    def is_trained(self) -> bool:
        """Whether its training came to its end, where the bundle is written.

        Raises:
            UserError: there is a bundle, and a file of it is missing or cut.
        """
        bundle = self.folder / "bundle"
        recover(bundle)
        if not bundle.is_dir():
            return False
        verify(bundle, hashes=False)
        return True


def parse_names(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names, and the overrides among them, such as training.lr=1e-3, which are for all variants."""
    names = [text for text in arguments if not _OVERRIDE.fullmatch(text)]
    return names, [text for text in arguments if _OVERRIDE.fullmatch(text)]


def read_variants(names: Sequence[str]) -> list[Variant]:
    """The variants that the names stand for, in their order.

    Raises:
        UserError: a file is missing or wrong, or two variants have one label.
    """
    variants = [variant for name in names for variant in _read_name(name)]
    labels: set[str] = set()
    for variant in variants:
        if not _LABEL.fullmatch(variant.label):
            raise UserError(
                f"{variant.source}: {variant.label!r}: a variant's label becomes a folder's name: "
                "use letters, digits, '.', '_' and '-'"
            )
        if variant.label in labels:
            raise UserError(
                f"compare: two variants are called {variant.label!r}; give each its own label in a "
                "file of variants"
            )
        labels.add(variant.label)
    return variants


def _read_name(name: str) -> Iterator[Variant]:
    values = read_values(name)
    if "variants" not in values:
        yield Variant(Path(name).stem if Path(name).is_file() else name, name)
        return
    # A number is a label, too; JSON has texts alone for keys.
    if isinstance(values["variants"], dict):
        values["variants"] = {str(key): value for key, value in values["variants"].items()}
    try:
        file = VariantsFile.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name}: {first_error(error).line}") from None
    for label, settings in file.variants.items():
        # JSON is YAML, as which the value of an override is read.
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in (settings or {}).items())
        yield Variant(label, file.config, overrides, file.seeds)


def plan(
    variants: Sequence[Variant],
    common: Sequence[str],
    out: Path,
    minutes: float | None,
    seeds: Sequence[int] | None,
) -> list[VariantRun]:
    """Every training, in the order of the table: a variant's seeds side by side.

    Args:
        variants: in their order.
        common: overrides of all of them; a variant's own come after these.
        out: where each has its folder, OUT/LABEL/seed-N.
        minutes: of each training; None: as their configs say.
        seeds: of each variant, in place of a file's and of a config's own.

    Raises:
        UserError: a config is wrong, or they do not all train for the same time.
    """
    trials = [
        trial for variant in variants for trial in _trials(variant, common, out, minutes, seeds)
    ]
    limits = {trial.config.training.max_minutes for trial in trials}
    if len(limits) > 1 or None in limits:
        values = sorted("null" if limit is None else f"{limit:g}" for limit in limits)
        raise UserError(
            f"--minutes: give it, since all are compared at equal time and training.max_minutes is "
            f"{' and '.join(values)} in their configs"
        )
    return trials


def _trials(
    variant: Variant,
    common: Sequence[str],
    out: Path,
    minutes: float | None,
    seeds: Sequence[int] | None,
) -> Iterator[VariantRun]:
    settings = [_NO_REPORT, *common, *variant.overrides]
    if minutes is not None:
        settings.append(f"training.max_minutes={minutes:g}")
    run_seeds = seeds if seeds is not None else variant.seeds
    if run_seeds is None:
        run_seeds = (_load(variant, settings).run.seed,)
    for seed in run_seeds:
        folder = out / variant.label / f"seed-{seed}"
        overrides = (*settings, f"run.seed={seed}", f"run.folder={json.dumps(str(folder))}")
        yield VariantRun(variant.label, seed, variant.source, overrides, _load(variant, overrides))


def _load(variant: Variant, overrides: Sequence[str]) -> Config:
    try:
        return load_config(variant.source, overrides)
    except UserError as error:
        raise UserError(f"{variant.label}: {error}") from None


def check(trials: Iterable[VariantRun], num_ranks: int, environment: Mapping[str, str]) -> None:
    """Refuse whatever would stop one of the trainings later, as far as it can be known.

    Args:
        trials: the trainings, whose folders may hold what an earlier call left.
        num_ranks: processes of each training.
        environment: the variables of this process.

    Raises:
        UserError: the first that is found; the message begins with the variant's label.
    """
    for trial in trials:
        training = trial.config.training
        try:
            _check_stored(trial, num_ranks)
            preflight.check_division(training.tasks_per_step, num_ranks, training.accumulation)
            preflight.check(trial.config, environment)
        except UserError as error:
            raise UserError(f"{trial.label}: {error}") from None


def _check_stored(trial: VariantRun, num_ranks: int) -> None:
    """What an earlier call left in the trial's folder is of this very trial."""
    path, starts = trial.folder / "config.json", trial.folder / "starts.jsonl"
    if path.is_file():
        stored = parse_config(read_json_object(path), str(path))
        then, now = (flat(config.model_dump(mode="json")) for config in (stored, trial.config))
        for key in sorted((then.keys() | now.keys()) - {"run.folder"}):
            # The Trainer writes which file it was.
            is_chosen = key == "training.deepspeed" and then[key] in AUTO_CONFIGS.get(now[key], ())
            if then.get(key) != now.get(key) and not is_chosen:
                raise UserError(
                    f"{trial.folder}: {key} was {then.get(key)} and is {now.get(key)} now; "
                    "set it back, or name another --out"
                )
    if starts.is_file():
        for row in read_json_lines(starts):
            if (before := row["world_size"]) != num_ranks:
                raise UserError(
                    f"{trial.folder}: was trained by {before} rank(s); give --nproc {before}, or "
                    "name another --out"
                )


def commands(trials: Sequence[VariantRun], num_ranks: int) -> list[str]:
    """What trains each, as a shell takes it, in the order in which they are started."""
    return [shlex.join(trial.train_command(num_ranks)) for trial in in_turn(trials)]


def in_turn(trials: Sequence[VariantRun]) -> list[VariantRun]:
    """As they are trained: every variant with its first seed, then with its second, so that a
    comparison that is cut short has something of each."""
    turns: dict[str, int] = {}
    order: list[tuple[int, VariantRun]] = []
    for trial in trials:
        turn = turns[trial.label] = turns.get(trial.label, -1) + 1
        order.append((turn, trial))
    return [trial for _, trial in sorted(order, key=lambda pair: pair[0])]
