"""Where an exported adapter comes from, beside it in its folder: `ship.json` for programs and the
model card for people."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

from ship_ds.adapter_files import Leaves, paths_of
from ship_ds.errors import UserError
from ship_ds.files import write_json, write_text
from ship_ds.parsing import as_dataclass, read_json_object

if TYPE_CHECKING:
    from ship_ds.weights_folder import WeightsFolder

ORIGIN, CARD = "ship.json", "README.md"


def _with(*names: str) -> AfterValidator:
    """That a dictionary has these keys."""

    def check(values: dict[str, Any]) -> dict[str, Any]:
        for name in names:
            if name not in values:
                raise ValueError(f"has no {name!r}")
        return values

    return AfterValidator(check)


@dataclass(frozen=True)
class Tuning:
    """What training on examples did to a generated adapter.

    Args:
        start: Where it began.
        steps: Of the training.
        lr: Learning rate.
        seed: Of the order of examples.
        num_examples: That were trained on.
        num_held_out: That were not.
        held_out_loss: On these before and after, in nats a token.
    """

    start: str
    steps: int
    lr: float
    seed: int
    num_examples: int
    num_held_out: int
    held_out_loss: tuple[float, float]


@dataclass(frozen=True)
class Origin:
    """What an adapter was made from, and what was proved of it.

    Args:
        made_from: The instruction, or in words what else.
        run: The run's folder, as its config names it.
        bundle: SHA-256 of the bundle's weights.
        base: The base model, as the config names it.
        base_fingerprint: Of the base model; see `WeightsFolder.fingerprint`.
        quantisation: Of the base model in training.
        shape: The adapter's kind and sizes in words.
        prompt_format: `PromptFormat.describe()`.
        probes: Token ids of the prompts on which the adapter was proved.
        proof: The fields of `Proof` there.
        adapter: SHA-256 of the adapter's weights; see `weights_digest`.
        tuning: What training on examples did to it afterwards; None: it is as it was generated.
        confidence: The share of samples of the instruction's posterior that answer the probes as
            this adapter does (`agreement`), from which share on dev tasks were mostly answered
            rightly (`threshold`), and how well that parts them (`auc`); None: not asked for.
        base_settings: Fingerprint of the base's config.json; see `settings_fingerprint`. Empty in
            an adapter of version 0.1.
        folders: Names of the folders of `peft` inside this one, in the order in which they are
            loaded, one around the other; empty: it is one itself.
    """

    made_from: str
    run: str
    bundle: str
    base: str
    base_fingerprint: str
    quantisation: str
    shape: str
    prompt_format: dict[str, Any]
    probes: list[list[int]]
    proof: Annotated[dict[str, float], _with("from_live", "from_base")]
    adapter: str
    tuning: Tuning | None = None
    confidence: Annotated[dict[str, float | None], _with("agreement", "threshold")] | None = None
    base_settings: str = ""
    folders: tuple[Leaves, ...] = ()

    def paths(self, folder: Path) -> list[Path]:
        """The folders of `peft` of the adapter in `folder`, in the order in which they are
        loaded."""
        return paths_of(folder, self.folders)

    def other_than(self, base: "WeightsFolder") -> Literal["weights", "settings"] | None:
        """In what a folder is another base than the adapter's; None: it is that one."""
        # Here: it brings torch, and a command line reads an origin first.
        from ship_ds.weights_folder import settings_fingerprint

        if base.fingerprint != self.base_fingerprint:
            return "weights"
        if self.base_settings and settings_fingerprint(base.folder) != self.base_settings:
            return "settings"
        return None

    def write(self, folder: Path) -> None:
        """Write both files into the adapter's folder."""
        write_json(folder / ORIGIN, asdict(self), indent=2)
        write_text(folder / CARD, self.card())

    def card(self) -> str:
        """The model card, in Markdown."""
        # json.dumps keeps an instruction of several lines on one.
        return (
            f"---\nlibrary_name: peft\n---\n# An adapter made from an instruction\n\n"
            f"- instruction: {json.dumps(self.made_from, ensure_ascii=False)}\n"
            f"- base: {self.base} ({self.quantisation} in training), fingerprint "
            f"{self.base_fingerprint}\n"
            f"- run: {self.run}, weights sha256 {self.bundle}\n- {self.shape}\n- adapter weights "
            f"sha256: {self.adapter}\n{self._tuned()}{self._confidence()}"
            "- proved with `peft`: logits differ from the live hypernetwork's by "
            f"{self.proof['from_live']:.1e}, "
            f"from the bare base's by {self.proof['from_base']:.2f}\n"
            f"- prompt format: {json.dumps(self.prompt_format, ensure_ascii=False)}\n"
            f"{self._asking()}{self._loading()}"
        )

    def _asking(self) -> str:
        """A line of the card; empty where the format says no sample."""
        samples = self.prompt_format.get("samples")
        if not isinstance(samples, dict) or "input" not in samples:
            return ""
        return (
            f"- ask with {json.dumps(samples['input'], ensure_ascii=False)}, the input in the "
            "place of `3 1`, and no special tokens added to it\n"
        )

    def _loading(self) -> str:
        """How it is loaded: the folder, or those that it is together."""
        if not self.folders:
            return (
                "\nAround `base`, the transformers model:\n\n"
                '    model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n'
            )
        first, *others = self.folders
        lines = [
            "",
            f"It is in {len(self.folders)} folders of `peft`, each one a part that does little "
            "alone; around `base`, the transformers model:",
            "",
            f'    model = PeftModel.from_pretrained(base, "THIS_FOLDER/{first}")',
            *(
                "    model = PeftModel.from_pretrained(model.get_base_model(), "
                f'"THIS_FOLDER/{one}")'
                for one in others
            ),
        ]
        return "".join(f"{line}\n" for line in lines)

    def _confidence(self) -> str:
        """A line of the card; empty where nothing was asked."""
        if self.confidence is None or self.confidence["agreement"] is None:
            return ""
        threshold = self.confidence["threshold"]
        least = "" if threshold is None else f"; below {threshold:.2f} most dev tasks went wrong"
        return (
            f"- confidence: {self.confidence['agreement']:.2f} of the samples around it answer its "
            f"probes alike{least}\n"
        )

    def _tuned(self) -> str:
        """A line of the card; empty where nothing was trained afterwards."""
        if self.tuning is None:
            return ""
        before, after = self.tuning.held_out_loss
        return (
            f"- then trained by gradient on {self.tuning.num_examples} examples: "
            f"{self.tuning.steps} steps; loss of {self.tuning.num_held_out} held-out ones "
            f"from {before:.3f} to {after:.3f} nats a token\n"
        )


def read_origin(folder: Path) -> Origin:
    """The origin of an adapter of ours.

    Raises:
        UserError: The folder has none, or not one of this form.
    """
    path = folder / ORIGIN
    if not path.is_file():
        raise UserError(
            f"{folder}: no {ORIGIN}; expected an adapter folder that `ship-ds deduce` "
            "or `ship-ds compose` wrote"
        )
    return as_dataclass(Origin, read_json_object(path), path, "export the adapter again")
