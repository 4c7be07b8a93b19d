"""The bundle: what a run leaves behind, one folder of safetensors and config that opens on a CPU without DeepSpeed.

    ship = Ship.from_run("runs/quickstart")
    ship.answer("keep the numbers greater than 4", ["3 9 5"])
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ship_ds.config import Config, parse_config
from ship_ds.errors import UserError
from ship_ds.folder import refuse_existing, whole_folder
from ship_ds.model.backbone import load_tokenizer
from ship_ds.model.ship import ShipModel
from ship_ds.prompt import PromptFormat
from ship_ds.tensor_file import TensorFile

WEIGHTS, CONFIG, PROMPT, MANIFEST = "ship.safetensors", "config.json", "prompt_format.json", "manifest.json"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bundle(folder: Path, state: Mapping[str, Tensor], config: Config, prompt_format: Mapping[str, Any]) -> None:
    """state: every trainable parameter of ShipModel by name; each is asked for once, and let go when it is on disk.

    Raises UserError, leaving no bundle, when the disk is full."""
    with whole_folder(folder) as part:
        with TensorFile(part / WEIGHTS, state) as file:
            for name in state:
                file.add(name, state[name])
        (part / CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
        (part / PROMPT).write_text(json.dumps(prompt_format, indent=2) + "\n")
        names = (WEIGHTS, CONFIG, PROMPT)
        manifest = {name: {"bytes": (part / name).stat().st_size, "sha256": sha256(part / name)} for name in names}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def bundle_from_checkpoint(checkpoint_folder: Path, out: Path) -> None:
    """What the run would have left had it ended there. Raises UserError when the checkpoint is missing or damaged."""
    from ship_ds.runtime import checkpoint

    if not (checkpoint_folder / checkpoint.PROGRESS).is_file():
        raise UserError(f"{checkpoint_folder}: no checkpoint here; expected a folder RUN/checkpoints/step-N")
    refuse_existing(out)
    config = parse_config(checkpoint.read_progress(checkpoint_folder).config, str(checkpoint_folder / checkpoint.PROGRESS))
    state = checkpoint.trainable_state(checkpoint_folder)
    prompts = PromptFormat(load_tokenizer(config.model.task_llm.base))
    write_bundle(out, state, config, prompts.describe())


def bundle_folder(path: str | Path) -> Path:
    """The bundle inside a run folder, or the folder itself."""
    return Path(path) / "bundle" if (Path(path) / "bundle").is_dir() else Path(path)


def verify(folder: Path) -> None:
    """Raises UserError naming the first file that is missing or not what the manifest says."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no bundle here (no {MANIFEST}); a finished run has one in RUN/bundle")
    for name, expected in json.loads((folder / MANIFEST).read_text()).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            raise UserError(f"{path}: missing or not the file that {MANIFEST} lists; write the bundle again")


class Ship:
    """A trained SHIP, opened from its run or bundle folder; plain types in and out."""

    def __init__(self, model: ShipModel, config: Config, digest: str) -> None:
        self.model, self.config, self.digest = model, config, digest

    @classmethod
    def from_run(cls, path: str | Path, device: torch.device | str = "cpu") -> "Ship":
        """Raises UserError when the folder holds no good bundle, or one made under another prompt format."""
        folder = bundle_folder(path)
        verify(folder)
        config = parse_config(json.loads((folder / CONFIG).read_text()), str(folder / CONFIG))
        # The attention it was trained with may not run here; what it computes is the same.
        model = ShipModel(config.model.model_copy(update={"attention": "auto"}), device=device)
        if model.prompts.describe() != json.loads((folder / PROMPT).read_text()):
            raise UserError(f"{folder / PROMPT}: the base model's tokenizer or this version gives another prompt format")
        load_trainable(model, load_file(folder / WEIGHTS), folder / WEIGHTS)
        return cls(model.to(device).eval(), config, sha256(folder / WEIGHTS))

    @torch.no_grad()
    def answer(self, instruction: str, inputs: Sequence[str]) -> list[str | None]:
        """Answers without the instruction in the prompt; None where no end came within the configured length."""
        adapter = self.model.adapt(self.model.encode([instruction]))
        return self.model.answer(adapter, inputs, self.config.evaluation.max_new_tokens, [instruction] * len(inputs))

    @torch.no_grad()
    def answer_bare(self, inputs: Sequence[str]) -> list[str | None]:
        """What the Task LLM answers without any adapter."""
        return self.model.answer(None, inputs, self.config.evaluation.max_new_tokens)


def load_trainable(model: ShipModel, state: Mapping[str, Tensor], source: Path) -> None:
    """Every trainable parameter has to be there, and nothing else."""
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if own.keys() != state.keys():
        different = sorted(own.keys() ^ state.keys())
        raise UserError(f"{source}: {different[0]} and {len(different) - 1} more names differ from the model in its config")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
