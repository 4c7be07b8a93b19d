"""The bundle: what a run leaves behind, one folder of safetensors and JSON that opens on a CPU
without DeepSpeed.

    RUN/bundle/
        ship.safetensors            every trained parameter of ShipModel, by name
        config.json                 the run's config
        prompt_format.json          how its prompts are rendered, with a hash
        bases.json                  fingerprints of the frozen models, which are not in the bundle
        known_instructions.json     of the tasks it was trained on
        probes.json                 inputs of these tasks, to try an adapter on
        manifest.json               size and SHA-256 of all of the above

Bundles of version 0.1.0 have no probes.json, older ones no bases.json and known_instructions.json.
The module imports torch where a function needs it, so that a command line may look at a bundle
first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ship_ds.adapter_files import BEFORE_THE_PROMPT
from ship_ds.config import Config, ModelConfig, parse_config, parts_of
from ship_ds.data.task import SplitTask
from ship_ds.errors import UserError
from ship_ds.files import Manifest, recover, refused_paths, whole_folder
from ship_ds.kinds import ADAPTERS
from ship_ds.parsing import read_json, read_json_object
from ship_ds.safetensors_header import refuse_pointer_file
from ship_ds.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from ship_ds.model.ship import ShipModel
    from ship_ds.prompt import PromptFormat

SHIP_WEIGHTS = "ship.safetensors"
_CONFIG, _PROMPT_FORMAT = "config.json", "prompt_format.json"
_BASES, _KNOWN, _PROBES = "bases.json", "known_instructions.json", "probes.json"
NUM_PROBES = 3


@dataclass(frozen=True)
class Bundle:
    """What a bundle says, beside its weights.

    Args:
        folder: Where it is.
        digest: SHA-256 of its weights; latents and adapters carry it, since they mean nothing to
            others.
        config: Of the run.
        prompt_format: Of every role's prompts, as training rendered them.
        bases: Fingerprint of each frozen model by its name in the config; empty where an early
            version did not write them.
        known_instructions: One wording of every task that was trained on: what induction tries
            first.
        probes: Inputs of these tasks; empty in a bundle of 0.1.0.
    """

    folder: Path
    digest: str
    config: Config
    prompt_format: Mapping[str, Any]
    bases: Mapping[str, str]
    known_instructions: tuple[str, ...]
    probes: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path, base: str | None = None) -> "Bundle":
        """Verify the bundle of a run, or in a folder of its own, and read all but its weights.

        Args:
            path: Of the run or the bundle.
            base: Where its base model is now; None: where its config says.

        Raises:
            UserError: There is none, a file of it is missing or damaged, or `base` is another
                model.
        """
        folder = bundle_folder(path)
        manifest = verify(folder)
        config, bases = read_config(folder), _read_texts(folder / _BASES, {})
        if base is not None:
            config, bases = rebased(config, bases, base)
        return cls(
            folder,
            manifest.files[SHIP_WEIGHTS].sha256,
            config,
            read_json_object(folder / _PROMPT_FORMAT),
            bases,
            tuple(_read_texts(folder / _KNOWN, [])),
            tuple(_read_texts(folder / _PROBES, [])),
        )

    def check_prompt_format(self, prompts: Mapping[str, "PromptFormat"]) -> None:
        """Compare with how prompts are rendered now.

        Args:
            prompts: By role, as `prompt.describe_roles` takes them.

        Raises:
            UserError: They would not be what training rendered.
        """
        from ship_ds.prompt import is_described

        if not is_described(self.prompt_format, prompts):
            raise UserError(
                f"{self.folder / _PROMPT_FORMAT}: the base model's tokenizer or this version gives "
                "another prompt format"
            )

    def load_into(self, model: "ShipModel") -> None:
        """Copy the trained weights into a model that was built from the same config, or from one
        whose hypernetwork combines the bundle's with other parts. These stay as they were drawn.

        Raises:
            UserError: Its trainable parameters have other names or shapes, or make another
                adapter; or its weights cannot be read, or are not all finite numbers.
        """
        import torch

        from ship_ds.model.objectives import trains_decoder
        from ship_ds.model.parameter_names import by_current_name

        state = by_current_name(_read_weights(self.folder / SHIP_WEIGHTS))
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        hypernetwork, other = self.config.model.hypernetwork, model.config.hypernetwork
        if key := _other_meaning(hypernetwork, other):
            raise UserError(
                f"{self.folder}: its weights were trained with model.hypernetwork.{key}="
                f"{json.dumps(getattr(hypernetwork, key))}: set that here too"
            )
        part = _part_of(hypernetwork, other)
        if part is not None:
            inside = f"{_HYPERNETWORK}parts.{part}."
            state = {_moved_inside(n, inside): one for n, one in state.items()}
            trainable = {
                n: p
                for n, p in trainable.items()
                if n.startswith(inside) or not n.startswith(_HYPERNETWORK)
            }
        # A run in which no objective weighs what it says trains no decoder: the other's is left
        # out, or stays as it was drawn.
        if not model.decodes:
            state = {n: one for n, one in state.items() if not n.startswith("decoder.")}
        elif not trains_decoder(self.config.loss.weights()):
            trainable = {n: p for n, p in trainable.items() if not n.startswith("decoder.")}
        if different := sorted(trainable.keys() ^ state.keys()):
            raise UserError(
                f"{self.folder / SHIP_WEIGHTS}: {different[0]} and {len(different) - 1} more names "
                "differ from the model in its config"
                + (
                    "; to start a combination from it, give one of "
                    "model.hypernetwork.parts the settings of its hypernetwork"
                    if len(parts_of(model.config.hypernetwork)) > 1
                    else ""
                )
            )
        for name, parameter in trainable.items():
            if parameter.shape != state[name].shape:
                raise UserError(
                    f"{self.folder / SHIP_WEIGHTS}: {name} is {tuple(state[name].shape)}, and the "
                    f"model in this config has {tuple(parameter.shape)}: give both the same "
                    "model section"
                )
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(state[name])


def _read_weights(path: Path) -> "dict[str, Tensor]":
    """The tensors of a bundle, all of finite numbers. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ship_ds.weights_folder import is_finite

    try:
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read: {error}; write the bundle again") from None
    for name, tensor in state.items():
        if not (tensor.is_floating_point() and is_finite(tensor)):
            raise UserError(
                f"{path}: {name} has values that are no finite numbers; write the bundle again, "
                "from a checkpoint of an earlier step"
            )
    return state


_HYPERNETWORK = "hypernetwork."
"""What the names of its parameters begin with."""


_MEANING = ("alpha", "normalises_latent")
"""Settings that change what a hypernetwork's weights make, and neither their names nor shapes."""


def _other_meaning(one: Section, other: Section) -> str | None:
    """The first of these settings in which two hypernetworks of one kind differ."""
    if type(one) is not type(other):
        return None
    keys = (key for key in _MEANING if hasattr(one, key))
    return next((key for key in keys if getattr(one, key) != getattr(other, key)), None)


def _part_of(one: Section, other: Section) -> int | None:
    """Which part of another hypernetwork's config one's is; None where it is no part of it."""
    parts = enumerate(parts_of(other))
    return next((i for i, part in parts if part is not other and part == one), None)


def _moved_inside(name: str, inside: str) -> str:
    """A parameter's name once the hypernetwork is the part that `inside` begins with."""
    return name.replace(_HYPERNETWORK, inside, 1) if name.startswith(_HYPERNETWORK) else name


def check_leaves(verb: str, folder: Path) -> None:
    """See that the adapters of a bundle's run have a file format, by its config alone.

    Args:
        verb: That asks.
        folder: The bundle.

    Raises:
        UserError: They have none.
    """
    hypernetwork = read_config(folder).model.hypernetwork
    why_not = ADAPTERS.implementation(hypernetwork).cannot_leave(hypernetwork)
    if why_not is not None:
        raise UserError(f"{verb}: {folder}: {why_not}")


def check_merges(verb: str, folder: Path) -> None:
    """See that the adapters of a bundle's run change weights, by its config alone.

    Args:
        verb: That asks.
        folder: The bundle.

    Raises:
        UserError: They stand before the prompt.
    """
    hypernetwork = read_config(folder).model.hypernetwork
    if ADAPTERS.implementation(hypernetwork).leaves in BEFORE_THE_PROMPT:
        raise UserError(
            f"{verb}: {folder}: adapters of this run stand before the prompt and change no weight, "
            "so that there is nothing to merge: leave --target out"
        )


def read_config(folder: Path) -> Config:
    """The config that a bundle was trained with. Raises UserError where it is none."""
    return parse_config(read_json_object(folder / _CONFIG), str(folder / _CONFIG))


def _read_texts(path: Path, default: Any) -> Any:
    """A list of texts, or texts by name, of the default's type. Raises UserError."""
    if not path.is_file():
        return default
    content = read_json(path)
    values = content.values() if isinstance(content, dict) else content
    if not isinstance(content, type(default)) or not all(isinstance(one, str) for one in values):
        raise UserError(f"{path}: expected texts alone; write the bundle again")
    return content


def write_bundle(
    folder: Path,
    state: "Mapping[str, Tensor]",
    config: Config,
    prompt_format: Mapping[str, Any],
    bases: Mapping[str, str],
    known: Sequence[str],
    probes: Sequence[str],
) -> None:
    """Write a bundle; one that is there already gives way when the new one is complete.

    Args:
        folder: Where to.
        state: Every trainable parameter of ShipModel by name. Each is asked for once, and let go
            when it is on the disk, so that a sharded state may gather them one at a time.
        config: Of the run.
        prompt_format: `prompt.describe_roles` of the three roles.
        bases: `frozen_bases` as training began.
        known: The instructions of the tasks that were trained on.
        probes: `probe_inputs` of these tasks.

    Raises:
        UserError: The disk is full; no half of a bundle is left.
    """
    from ship_ds.tensor_file import TensorFile

    with whole_folder(folder) as part:
        with TensorFile(part / SHIP_WEIGHTS, state) as file:
            for name in state:
                file.add(name, state[name])
        _write_json(part / _CONFIG, config.model_dump(mode="json"))
        _write_json(part / _PROMPT_FORMAT, prompt_format)
        _write_json(part / _BASES, dict(bases))
        _write_json(part / _KNOWN, list(known))
        _write_json(part / _PROBES, list(probes))
        Manifest.of(part).write(part)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def probe_inputs(seen: Sequence[SplitTask]) -> list[str]:
    """The first three distinct test inputs of the tasks that were trained on, or training inputs
    where none is tested: what an adapter of this run is tried on unless somebody says otherwise."""
    tested = dict.fromkeys(example.input for task in seen for example in task.test)
    inputs = tested or dict.fromkeys(example.input for task in seen for example in task.train)
    # an empty one tries little; it stays where there is no other
    return list(islice(filter(None, inputs), NUM_PROBES)) or list(inputs)[:1]


def frozen_bases(config: Config) -> dict[str, str]:
    """Fingerprint of each model that the run does not train whole, by its name in the config; see
    `WeightsFolder.fingerprint`."""
    prints: dict[str, str] = {}
    for name in _frozen_by_role(config.model).values():
        if name not in prints:
            prints |= fingerprints(name, name)
    return prints


def _frozen_by_role(model: ModelConfig) -> dict[str, str]:
    """The base of each role that is not trained whole, by the role."""
    roles = {"encoder": model.encoder, "decoder": model.decoder}
    tuned = {name: one.base for name, one in roles.items() if one.lora is not None}
    return {"task_llm": model.task_llm.base, **tuned}


_SETTINGS = " (config.json)"
"""After a base's name: the fingerprint of its settings. Version 0.1 has that of the weights
alone."""


def fingerprints(name: str, base: str) -> dict[str, str]:
    """Of weights and settings of the base in a folder, as that of `name`."""
    from ship_ds.config import base_folder
    from ship_ds.weights_folder import WeightsFolder, settings_fingerprint

    folder = base_folder(base)
    return {
        name: WeightsFolder(folder).fingerprint,
        name + _SETTINGS: settings_fingerprint(folder),
    }


def moved(old: Mapping[str, str], new: Mapping[str, str]) -> set[tuple[str, str]]:
    """(name then, name now) of each base that was there then, by its fingerprint and, where both
    say it, by that of its settings."""

    def is_same(then: str, now: str) -> bool:
        settings = {old.get(then + _SETTINGS), new.get(now + _SETTINGS)} - {None}
        return old[then] == new[now] and len(settings) < 2

    names = [[one for one in bases if not one.endswith(_SETTINGS)] for bases in (old, new)]
    return {(then, now) for then in names[0] for now in names[1] if is_same(then, now)}


def rebased(config: Config, bases: Mapping[str, str], base: str) -> tuple[Config, dict[str, str]]:
    """A bundle's config and fingerprints with the base, which is in another folder now, under that
    name.

    Args:
        config: As it was trained.
        bases: As it was trained.
        base: The folder now.

    Raises:
        UserError: It is no base of the run's.
    """
    now = fingerprints(base, base)
    # By its weights alone: what its settings are is told apart, and better, by `check_bases`.
    names = {then for then, _ in moved(bases, {base: now[base]})}
    if not names:
        expected = ", ".join(
            f"{name} with {one[:12]}" for name, one in bases.items() if not name.endswith(_SETTINGS)
        )
        raise UserError(
            f"--base {base}: has fingerprint {now[base][:12]}, and the run was trained around "
            f"{expected or 'bases whose fingerprints it does not say'}: give that model's folder"
        )
    values = config.model_dump()
    for role in ("task_llm", "encoder", "decoder"):
        if values["model"][role]["base"] in names:
            values["model"][role]["base"] = base
    renamed = {
        base + name.removeprefix(then) if then in names else name: one
        for name, one in bases.items()
        for then in (name.removesuffix(_SETTINGS),)
    }
    return parse_config(values, "--base"), renamed


def check_bases(folder: Path, bases: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare the frozen models with those that a bundle or checkpoint was trained around: under
    others of the same shape it would do other things, and nothing else would tell.

    Args:
        folder: Of the bundle or checkpoint, for the message.
        bases: Fingerprints as they are now, by name.
        expected: As they were.

    Raises:
        UserError: One is another model now.
    """
    for name in bases.keys() & expected.keys():
        if bases[name] != expected[name]:
            raise UserError(
                f"{folder}: trained around {name} with fingerprint {expected[name][:12]}, and this "
                f"one has {bases[name][:12]}: put that model back, or train again"
            )


def check_bases_of_roles(bundle: Bundle, model: ModelConfig, bases: Mapping[str, str]) -> None:
    """Compare the frozen models of a run that begins with a bundle's weights with those that these
    were trained around, role by role, in whatever folders they are.

    Args:
        bundle: Of the other run.
        model: Of this run.
        bases: `frozen_bases` of this run.

    Raises:
        UserError: That of a role is another model.
    """
    base_by_role = _frozen_by_role(model)
    for role, then in _frozen_by_role(bundle.config.model).items():
        for what in ("", _SETTINGS):
            old = bundle.bases.get(then + what)
            new = bases.get(base_by_role[role] + what) if role in base_by_role else None
            if old is not None and new is not None and old != new:
                key = f"model.{role}.base"
                raise UserError(
                    f"{bundle.folder}: trained around {key}={then}{what} with fingerprint "
                    f"{old[:12]}, and this run's {base_by_role[role]}{what} has {new[:12]}: set "
                    f"{key} to that model, or run.init_from to a run around this one"
                )


PROGRESS = "progress.json"
"""Of a checkpoint: the step, and all of the run that is no tensor."""


def check_checkpoint(folder: Path) -> None:
    """A checkpoint of a training run is in `folder`; one that a killed save has set aside is put
    back first. Raises UserError."""
    recover(folder)
    if not (folder / PROGRESS).is_file():
        raise UserError(f"{folder}: no checkpoint here; expected a folder RUN/checkpoints/step-N")


def bundle_folder(path: str | Path) -> Path:
    """The bundle inside a run's folder, or the folder itself; one that a killed write has set aside
    is put back first."""
    folder, inner = Path(path), Path(path) / "bundle"
    recover(folder)
    recover(inner)
    return inner if inner.is_dir() else folder


def verify(folder: Path, *, hashes: bool = True) -> Manifest:
    """The manifest of a bundle, whose files are all as it lists them.

    Args:
        folder: Of the bundle.
        hashes: Read every file; without, their sizes alone are compared.

    Raises:
        UserError: There is none, or a file is missing or damaged.
    """
    try:
        with refused_paths():
            manifest = Manifest.read(folder)
    except ValueError as error:
        raise UserError(
            f"{folder}: no bundle here ({error}); a finished run has one in RUN/bundle"
        ) from None
    for name in (SHIP_WEIGHTS, _CONFIG, _PROMPT_FORMAT):
        if name not in manifest.files:
            raise UserError(f"{folder}: no bundle here: its manifest does not list {name}")
    if reason := manifest.problem(folder, hashes=hashes):
        for path in filter(Path.is_file, map(folder.joinpath, manifest.files)):
            refuse_pointer_file(path)
        raise UserError(f"{folder}: {reason}; write the bundle again")
    return manifest
