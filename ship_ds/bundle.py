"""The bundle: what a run leaves behind, one folder of safetensors and config that opens on a CPU
without DeepSpeed.

    ship = Ship.from_run("runs/quickstart")
    ship.answer("keep the numbers greater than 4", ["3 9 5"])
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ship_ds.config import Config, LoraTuning, parse_config
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.files import Manifest, recover, refuse_existing, sha256, whole_folder
from ship_ds.inference import checks
from ship_ds.inference.adapters import (
    WeightInduction,
    induce_from_behaviour,
    induce_from_weights,
    read_adapter,
)
from ship_ds.inference.bank import Bank, encode_all
from ship_ds.inference.deduction import answer_latents
from ship_ds.inference.induction import Induction, InductionConfig, Say, induce_many, silent
from ship_ds.inference.latents import Familiarity, Neighbour, Surroundings, nearest_known
from ship_ds.inference.reasoning import Reasoning, reason_many
from ship_ds.model.adapters import Adapter
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.backbone import base_folder, load_tokenizer
from ship_ds.model.ship import ShipModel
from ship_ds.prompt import PromptFormat
from ship_ds.tensor_file import TensorFile
from ship_ds.weights_folder import WeightsFolder

WEIGHTS, CONFIG, PROMPT = "ship.safetensors", "config.json", "prompt_format.json"
BASES = "bases.json"
"""Fingerprints of the frozen models, which are not in the bundle: under others of the same shape it
would do other things."""
KNOWN = "known_instructions.json"
"""One wording of every rule the run was trained on: what induction looks among first."""


Pair = tuple[str, str]
"""(input, target)."""


@dataclass(frozen=True)
class Deduction:
    """An instruction's latent and adapter. familiarity: how it lies among the known instructions;
    None where none are known."""

    instruction: str
    latent: tuple[float, ...]
    adapter: Adapter
    familiarity: Familiarity | None


def write_bundle(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Config,
    prompt_format: Mapping[str, Any],
    bases: Mapping[str, str],
    known: Sequence[str],
) -> None:
    """state: every trainable parameter of ShipModel by name; each is asked for once, and let go
    when it is on disk.
    bases: `frozen_bases` as training began. known: the instructions of the seen tasks.

    Raises UserError, leaving no bundle, when the disk is full."""
    with whole_folder(folder) as part:
        with TensorFile(part / WEIGHTS, state) as file:
            for name in state:
                file.add(name, state[name])
        (part / CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
        (part / PROMPT).write_text(json.dumps(prompt_format, indent=2) + "\n")
        (part / BASES).write_text(json.dumps(dict(bases), indent=2) + "\n")
        (part / KNOWN).write_text(json.dumps(list(known), indent=0, ensure_ascii=False) + "\n")
        Manifest.of(part).write(part)


def frozen_bases(config: Config) -> dict[str, str]:
    """Fingerprint of each model that the run did not train whole, by its name in the config (see
    WeightsFolder)."""
    model = config.model
    names = [
        model.task_llm.base,
        *(
            role.base
            for role in (model.encoder, model.decoder)
            if isinstance(role.tuning, LoraTuning)
        ),
    ]
    return {name: WeightsFolder(base_folder(name)).fingerprint for name in names}


def bundle_from_checkpoint(checkpoint_folder: Path, out: Path) -> None:
    """What the run would have left had it ended there. Raises UserError when the checkpoint is
    missing or damaged."""
    from ship_ds.runtime import checkpoint

    recover(checkpoint_folder)
    if not (checkpoint_folder / checkpoint.PROGRESS).is_file():
        raise UserError(
            f"{checkpoint_folder}: no checkpoint here; expected a folder RUN/checkpoints/step-N"
        )
    refuse_existing(out)
    progress = checkpoint.read_progress(checkpoint_folder)
    config = parse_config(progress.config, str(checkpoint_folder / checkpoint.PROGRESS))
    state = checkpoint.trainable_state(checkpoint_folder)
    prompts = PromptFormat(load_tokenizer(config.model.task_llm.base))
    check_bases(checkpoint_folder, frozen_bases(config), progress.bases)
    write_bundle(
        out, state, config, prompts.describe(), progress.bases, progress.known_instructions
    )


def bundle_folder(path: str | Path) -> Path:
    """The bundle inside a run folder, or the folder itself; one that a killed write has set aside
    is put back first."""
    folder, inner = Path(path), Path(path) / "bundle"
    recover(folder)
    recover(inner)
    return inner if inner.is_dir() else folder


def verify(folder: Path) -> None:
    """Raises UserError naming the first file that is missing or not what the manifest says."""
    try:
        manifest = Manifest.read(folder)
    except ValueError as error:
        raise UserError(
            f"{folder}: no bundle here ({error}); a finished run has one in RUN/bundle"
        ) from None
    if reason := manifest.problem(folder):
        raise UserError(f"{folder}: {reason}; write the bundle again")


def read_bases(folder: Path) -> dict[str, str]:
    """Empty for a bundle of an earlier version, which does not say what it was trained around."""
    found: dict[str, str] = (
        json.loads((folder / BASES).read_text()) if (folder / BASES).is_file() else {}
    )
    return found


def check_bases(folder: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """found: the frozen models as they are now. Raises UserError where one is not what the bundle
    or checkpoint expects."""
    for name in found.keys() & expected.keys():
        if found[name] != expected[name]:
            raise UserError(
                f"{folder}: trained around {name} with fingerprint {expected[name][:12]}, and this "
                f"one has {found[name][:12]}: "
                "put that model back, or train again"
            )


class Ship:
    """A trained SHIP, opened from its run or bundle folder; plain types in, frozen dataclasses out.

    Every method raises UserError, one line, for text that the models cannot read.
    """

    def __init__(
        self, model: ShipModel, config: Config, digest: str, known: Sequence[str] = ()
    ) -> None:
        self.model, self.config, self.digest, self.known = model, config, digest, tuple(known)

    @classmethod
    def from_run(cls, path: str | Path, device: torch.device | str = "cpu") -> "Ship":
        """Raises UserError when the folder holds no good bundle, or one made under another prompt
        format."""
        folder = bundle_folder(path)
        verify(folder)
        config = parse_config(json.loads((folder / CONFIG).read_text()), str(folder / CONFIG))
        check_bases(folder, frozen_bases(config), read_bases(folder))
        # The attention it was trained with may not run here; what it computes is the same.
        model = build_ship(config.model, LoadedWeights(device=torch.device(device)), config.loss)
        if model.prompts.describe() != json.loads((folder / PROMPT).read_text()):
            raise UserError(
                f"{folder / PROMPT}: the base model's tokenizer or this version gives "
                "another prompt format"
            )
        load_trainable(model, load_file(folder / WEIGHTS), folder / WEIGHTS)
        # Bundles of earlier versions know no instructions.
        known = json.loads((folder / KNOWN).read_text()) if (folder / KNOWN).is_file() else []
        return cls(model.to(device).eval(), config, sha256(folder / WEIGHTS), known)

    @cached_property
    def bank(self) -> Bank:
        """The known instructions, encoded when they are first asked for."""
        return Bank.build(self.model, self.known)

    @cached_property
    def _surroundings(self) -> Surroundings:
        return Surroundings.of(self.model, self.bank)

    @property
    def _length(self) -> int:
        return self.config.evaluation.max_new_tokens

    @torch.no_grad()
    def deduce(self, instruction: str) -> Deduction:
        """The adapter that the hypernetwork makes of an instruction, with a warning where that is
        far from training."""
        checks.check_instruction(self.model, instruction)
        latent_1Z = self.model.encode([instruction])
        familiarity = (
            self._surroundings.familiarity(self.model, self.bank, instruction)
            if len(self.known) > 1
            else None
        )
        return Deduction(
            instruction, tuple(latent_1Z[0].tolist()), self.model.adapt(latent_1Z), familiarity
        )

    def answer(
        self, instruction: str, inputs: Sequence[str], num_beams: int = 1
    ) -> list[str | None]:
        """Answers without the instruction in the prompt; None where no end came within the
        configured length."""
        return self.answer_many([instruction], [inputs], num_beams)[0]

    def answer_many(
        self, instructions: Sequence[str], inputs: Sequence[Sequence[str]], num_beams: int = 1
    ) -> list[list[str | None]]:
        """Each instruction's own inputs, all in the same batches."""
        for instruction, own in zip(instructions, inputs, strict=True):
            checks.check_instruction(self.model, instruction)
            checks.check_inputs(self.model, own, self._length)
        latent_TZ = encode_all(self.model, instructions)
        return answer_latents(self.model, latent_TZ, instructions, inputs, self._length, num_beams)

    @torch.no_grad()
    def answer_bare(self, inputs: Sequence[str]) -> list[str | None]:
        """What the Task LLM answers without any adapter."""
        return self.model.answer(None, inputs, self._length)

    def induce(
        self,
        examples: Sequence[Pair],
        config: InductionConfig | None = None,
        seed: int = 0,
        say: Say = silent,
    ) -> Induction:
        """The instruction that explains (input, target) pairs, with the other candidates; one pair
        is enough to start."""
        shown = self._examples(examples)
        return induce_many(self.model, self.bank, [shown], self._induction(config), seed, say)[0]

    def induce_from_adapter(
        self,
        folder: str | Path,
        inputs: Sequence[str] = (),
        config: InductionConfig | None = None,
        seed: int = 0,
        say: Say = silent,
    ) -> Induction | WeightInduction:
        """What a PEFT LoRA folder does, by its answers to `inputs`, or by its weights where there
        are none."""
        checks.check_inputs(self.model, inputs, self._length)
        adapter = read_adapter(self.model, Path(folder))
        if not inputs:
            return induce_from_weights(
                self.model, self.bank, adapter, self._induction(config), seed
            )
        return induce_from_behaviour(
            self.model, self.bank, adapter, inputs, self._induction(config), self._length, seed, say
        )

    def reason(
        self,
        examples: Sequence[Pair],
        inputs: Sequence[str],
        config: InductionConfig | None = None,
        num_rounds: int = 1,
        seed: int = 0,
        say: Say = silent,
    ) -> Reasoning:
        """Induce, encode again, answer."""
        shown = self._examples(examples)
        checks.check_inputs(self.model, inputs, self._length)
        settings = self._induction(config)
        return reason_many(
            self.model, self.bank, [shown], [inputs], settings, self._length, num_rounds, seed, say
        )[0]

    def encode(self, instruction: str) -> tuple[float, ...]:
        """The posterior mean."""
        checks.check_instruction(self.model, instruction)
        return tuple(self.model.encode([instruction])[0].tolist())

    def decode(self, latent: Sequence[float]) -> str:
        """The instruction that the decoder reads out of z alone."""
        if len(latent) != self.config.model.latent_size:
            raise UserError(
                f"latent: has {len(latent)} numbers and this run's has "
                f"{self.config.model.latent_size}"
            )
        return self.model.decode(
            torch.tensor([latent], device=self.model.device), self._induction(None).max_new_tokens
        )[0]

    def nearest_known(self, latent: Sequence[float], count: int = 5) -> list[Neighbour]:
        return nearest_known(self.bank, torch.tensor(latent, device=self.model.device), count)

    def _induction(self, config: InductionConfig | None) -> InductionConfig:
        return config or InductionConfig(
            max_new_tokens=self.config.evaluation.max_instruction_tokens
        )

    def _examples(self, pairs: Sequence[Pair]) -> list[Example]:
        examples = [Example(x, y) for x, y in pairs]
        checks.check_examples(self.model, examples)
        return examples


def load_trainable(model: ShipModel, state: Mapping[str, Tensor], source: Path) -> None:
    """Every trainable parameter has to be there, and nothing else."""
    own = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if own.keys() != state.keys():
        different = sorted(own.keys() ^ state.keys())
        raise UserError(
            f"{source}: {different[0]} and {len(different) - 1} more names differ from "
            "the model in its config"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
