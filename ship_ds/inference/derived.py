"""What is computed from a bundle once and kept in it, in a folder that its manifest does not list:

    RUN/bundle/derived/known.safetensors        posteriors of the known instructions
    RUN/bundle/derived/known_examples.safetensors
                                                words of the known tasks' examples
    RUN/bundle/derived/prompt_following.json    whether text in the prompt is followed
    RUN/bundle/derived/confidence_exact_match.json
                                                what agreement says of the dev tasks
    RUN/bundle/derived/lora_reader.safetensors  the reader of adapters
    RUN/bundle/derived/explaining_agreement.json
                                                from which agreement on a text says what one does

Each file says of which weights and in which numbers it was made, or of which tasks where no weights
have a part in it; one of others is made again. Where
the folder cannot be written it is computed every time.

Letters: C candidates, Z latent size.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from ship_ds.data.task import SplitTask
from ship_ds.files import whole_file, write_json
from ship_ds.inference.analogies import share_in_slots
from ship_ds.inference.confidence import Calibration
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.example_index import ExampleIndex
from ship_ds.inference.explaining import Threshold
from ship_ds.inference.lora_reader import LoraReader
from ship_ds.inference.prompt_following import PromptFollowing
from ship_ds.model.adapters.adapter import Sites

_Measured = TypeVar("_Measured", Calibration, PromptFollowing, Threshold)

_FOLDER, _KNOWN, _INDEX = "derived", "known.safetensors", "known_examples.safetensors"
# The second one by what it counts as right: `confidence.json` of earlier versions compared texts.
_FOLLOWING, _CALIBRATION = "prompt_following.json", "confidence_exact_match.json"
_READER, _THRESHOLD = "lora_reader.safetensors", "explaining_agreement.json"


@dataclass(frozen=True)
class Derived:
    """The folder of a bundle's derived values.

    Args:
        bundle: The bundle's folder.
        digest: Of its weights.
        dtype: In which numbers they compute, such as "float32".
    """

    bundle: Path
    digest: str
    dtype: str

    @property
    def _made_of(self) -> dict[str, str]:
        return {"bundle": self.digest, "dtype": self.dtype}

    def _metadata(self, instructions: Sequence[str]) -> dict[str, str]:
        return self._made_of | {"texts": json.dumps(list(instructions))}

    def posteriors(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Means and log-variances of these instructions, (C, Z) each; None where they are not
        kept."""
        path = self.bundle / _FOLDER / _KNOWN
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            if file.metadata() == self._metadata(instructions):
                return file.get_tensor("mean"), file.get_tensor("log_variance")
        return None

    def keep_posteriors(
        self, instructions: Sequence[str], mean_CZ: Tensor, log_variance_CZ: Tensor
    ) -> None:
        """Keep the posteriors of the known instructions, where the disk lets us.

        Args:
            instructions: The known ones, in the order of the rows.
            mean_CZ: The posteriors' means.
            log_variance_CZ: Their log-variances.
        """
        tensors = {"mean": mean_CZ, "log_variance": log_variance_CZ}
        metadata = self._metadata(instructions)
        # shared: two programs may ask one bundle at the same moment.
        with (
            suppress(OSError, SafetensorError),
            whole_file(self.bundle / _FOLDER / _KNOWN, shared=True) as part,
        ):
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, part, metadata)

    def example_index(self, instructions: Sequence[str]) -> ExampleIndex | None:
        """The known tasks by their examples; None where it is not kept, or of other tasks."""
        path = self.bundle / _FOLDER / _INDEX
        # The last three: a file that somebody else wrote.
        with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
            index = ExampleIndex.of_arrays(load_arrays(path), metadata)
            if index is not None and set(index.instructions) <= set(instructions):
                return index
        return None

    def keep_example_index(self, index: ExampleIndex) -> None:
        """Keep it, where the disk lets us."""
        with (
            suppress(OSError, SafetensorError),
            whole_file(self.bundle / _FOLDER / _INDEX, shared=True) as part,
        ):
            save_arrays(index.arrays(), part, index.metadata())

    def following(self) -> PromptFollowing | None:
        """What was measured of text in the prompt; None where it is not kept."""
        return self._kept(_FOLLOWING, PromptFollowing)

    def keep_following(self, following: PromptFollowing) -> None:
        """Keep it, where the disk lets us."""
        self._keep(_FOLLOWING, following)

    def calibration(self) -> Calibration | None:
        """What agreement says of the dev tasks; None where it is not kept."""
        return self._kept(_CALIBRATION, Calibration)

    def keep_calibration(self, calibration: Calibration) -> None:
        """Keep it, where the disk lets us."""
        self._keep(_CALIBRATION, calibration)

    def threshold(self) -> Threshold | None:
        """From which agreement on a text says what an adapter does; None where it is not kept."""
        return self._kept(_THRESHOLD, Threshold)

    def keep_threshold(self, threshold: Threshold) -> None:
        """Keep it, where the disk lets us."""
        self._keep(_THRESHOLD, threshold)

    def reader(self, sites: Sites, latent_size: int) -> LoraReader | None:
        """The reader of adapters of these sites; None where it is not kept."""
        with torch.random.fork_rng(devices=[]):  # what it draws is overwritten, and moves no draw
            reader = LoraReader(sites, latent_size)
        # RuntimeError: of a version whose reader has other layers.
        with suppress(OSError, SafetensorError, RuntimeError):
            path = self.bundle / _FOLDER / _READER
            with safe_open(path, "pt") as file:
                if file.metadata() != self._made_of:
                    return None
            reader.load_state_dict(load_file(path))
            return reader.requires_grad_(False).eval()
        return None

    def keep_reader(self, reader: LoraReader) -> None:
        """Keep it, where the disk lets us."""
        with (
            suppress(OSError, SafetensorError),
            whole_file(self.bundle / _FOLDER / _READER, shared=True) as part,
        ):
            save_file(reader.state_dict(), part, self._made_of)

    def _kept(self, name: str, made: type[_Measured]) -> _Measured | None:
        # KeyError and TypeError: of a version that kept other numbers.
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads((self.bundle / _FOLDER / name).read_text(encoding="utf-8"))
            if kept.pop("made_of") == self._made_of:
                return made(**kept)
        return None

    def _keep(self, name: str, measured: Calibration | PromptFollowing | Threshold) -> None:
        with suppress(OSError):
            row = asdict(measured) | {"made_of": self._made_of}
            write_json(self.bundle / _FOLDER / name, row, shared=True)


def keep_examples_of(seen: Sequence[SplitTask], bundle: Path) -> None:
    """Keep, beside a bundle that was just written, what an induction by default asks of the
    examples of its tasks: where the bundle is used, the data may not be.

    Args:
        seen: The tasks that were trained on.
        bundle: Its folder.
    """
    share = share_in_slots([task.task.instruction for task in seen])
    if InductionConfig().searches_by_examples(share):
        # Neither weights nor dtype have a part in it.
        Derived(bundle, "", "").keep_example_index(ExampleIndex.of_tasks(seen))
