"""What is wrong with a verb's input, as far as it can be told without torch.

Loading torch, transformers and a model takes many seconds; a missing folder or a mistyped number
is told before. Each check raises UserError, and those of the library stay as they are: what opens
a bundle compares every hash, this only looks whether the files are there. What reads a config is
imported inside them, since a mistyped verb needs none.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ship_ds.adapter_files import ADAPTER_CONFIG, PEFT_TYPES, check_weights
from ship_ds.errors import UserError
from ship_ds.files import Manifest, refuse_existing

if TYPE_CHECKING:
    from ship_ds.config import Config


def check_positive(option: str, value: float) -> None:
    """A number above zero; "nan" and "inf" are floats, too."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{option}: {value:g}: expected a number above zero")


def check_share(option: str, value: float) -> None:
    """A number between zero and one."""
    if not 0 < value < 1:
        raise UserError(f"{option}: {value:g}: expected a share between 0 and 1")


def check_exists(folder: Path) -> None:
    """Somebody's run or adapter is there at all."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that is there")


def check_explained(folder: Path, is_merged: bool) -> None:
    """An adapter's config, or a merged model's, is there; or those of its parts."""
    name = "config.json" if is_merged else ADAPTER_CONFIG
    inside = () if is_merged else PEFT_TYPES
    places = [folder, *(folder / one for one in inside)]
    there = [path for path in places if (path / name).is_file()]
    for path in () if is_merged else there:
        check_weights(path)
    if not there:
        other = "give it to --merged if it is a merged model" if not is_merged else ""
        raise UserError(
            f"{folder}: no {'merged model' if is_merged else 'adapter'} here (no {name})"
            + (f"; {other}" if other else "")
        )


def check_new(folder: Path) -> None:
    """Nothing is there yet where the result is to go."""
    refuse_existing(folder)


def check_run(path: Path, base: str | None = None) -> Path:
    """The bundle of a run, or the path itself where it is one.

    Every file of it has its size, and the models that it was trained around are there; `base` says
    where they are now.
    """
    from ship_ds.bundle import bundle_folder, verify
    from ship_ds.runtime import preflight

    folder = bundle_folder(path)
    verify(folder, hashes=False)
    model = read_run_config(folder).model
    if base is not None:
        preflight.check_base("--base", base)
        return folder
    bases = {getattr(model, role).base: role for role in ("decoder", "encoder", "task_llm")}
    for one, role in bases.items():
        try:
            preflight.check_base(f"{folder}: model.{role}.base", one)
        except UserError as error:
            raise UserError(f"{error}; if it is elsewhere now, say where by --base") from None
    return folder


def read_run_config(bundle: Path) -> "Config":
    """The config that a bundle was trained with."""
    from ship_ds import bundle as bundles

    return bundles.read_config(bundle)


def check_makes_lora(bundle: Path) -> None:
    """The run's adapters are LoRAs, or have one as a part, which `tune` trains on."""
    from ship_ds.config import lora_of

    if lora_of(read_run_config(bundle).model.hypernetwork) is None:
        raise UserError(
            f"tune: {bundle}: this run's adapters are no LoRAs; it needs a run with "
            "model.hypernetwork.kind=lora, or a combination with one"
        )


def check_has_file_format(verb: str, bundle: Path) -> None:
    """The run's adapters have a file format."""
    from ship_ds import bundle as bundles

    bundles.check_leaves(verb, bundle)


def check_sums(bundle: Path) -> None:
    """The run's adapters can be added up."""
    from ship_ds.kinds import ADAPTERS

    hypernetwork = read_run_config(bundle).model.hypernetwork
    why_not = ADAPTERS.implementation(hypernetwork).cannot_sum(hypernetwork)
    if why_not is not None:
        raise UserError(f"compose: {bundle}: {why_not}")


def check_latents(file: Path, bundle: Path) -> None:
    """Saved latents are of this very bundle."""
    from ship_ds.bundle import SHIP_WEIGHTS
    from ship_ds.export.requests import load_latents

    weights = Manifest.read(bundle).files[SHIP_WEIGHTS]
    load_latents(file, weights.sha256, read_run_config(bundle).model.latent_size)


def weighted_parts(texts: Sequence[str]) -> list[tuple[float, str]]:
    """["0.5", "reverse the list", ...] -> [(0.5, "reverse the list"), ...]."""
    if len(texts) % 2:
        raise UserError(f"--part {texts[-1]}: {_PART}")
    return [(_weight(w), text) for w, text in zip(texts[::2], texts[1::2], strict=True)]


_PART = 'expected a weight and an instruction: --part 0.5 "reverse the list"'


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--part {text}: {_PART}")
    return weight


def check_adapter(folder: Path, base: str | None) -> None:
    """An adapter that we exported, and its base."""
    from ship_ds.origin import read_origin

    check_base_option(read_origin(folder).base if base is None else base)


def check_base_option(base: str | None) -> None:
    """A model's folder, as the preflight of a training run asks for it."""
    if base is not None:
        from ship_ds.runtime import preflight

        preflight.check_base("--base", base)


def check_source(path: Path, base: str | None = None) -> None:
    """What `convert` starts from: a run with a bundle or checkpoints, or a checkpoint."""
    from ship_ds.bundle import SHIP_WEIGHTS, bundle_folder, check_checkpoint

    check_exists(path)
    # A checkpoint has a manifest as well.
    folder = bundle_folder(path)
    if folder != path or (folder / SHIP_WEIGHTS).is_file():
        check_run(path, base)
    elif not (path / "checkpoints").is_dir():
        check_checkpoint(path)
