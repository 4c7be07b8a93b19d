"""Where an exported adapter comes from: `ship.json` for programs and the model card for people,
beside the adapter."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ship_ds.errors import UserError

ORIGIN, CARD = "ship.json", "README.md"


@dataclass(frozen=True)
class Origin:
    """made_from: the instruction (or what else); bundle: SHA-256 of the bundle's weights;
    base_fingerprint: see WeightsFolder;
    probes: token ids the adapter was proved on; proof: largest logit differences there; adapter:
    SHA-256 of its weights."""

    made_from: str
    run: str
    bundle: str
    base: str
    base_fingerprint: str
    quantisation: str
    shape: str
    prompt_format: dict[str, Any]
    probes: list[list[int]]
    proof: dict[str, float]
    adapter: str

    def write(self, part: Path) -> None:
        (part / ORIGIN).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")
        (part / CARD).write_text(self.card())

    def card(self) -> str:
        # json.dumps keeps an instruction of several lines on one.
        return (
            f"---\nlibrary_name: peft\n---\n# An adapter made from an instruction\n\n"
            f"- instruction: {json.dumps(self.made_from, ensure_ascii=False)}\n"
            f"- base: {self.base} ({self.quantisation} in training), fingerprint "
            f"{self.base_fingerprint}\n"
            f"- run: {self.run}, weights sha256 {self.bundle}\n- {self.shape}\n- adapter weights "
            f"sha256: {self.adapter}\n"
            "- proved with `peft`: logits differ from the live hypernetwork's by "
            f"{self.proof['from_live']:.1e}, "
            f"from the bare base's by {self.proof['from_base']:.2f}\n"
            f"- prompt format: {json.dumps(self.prompt_format, ensure_ascii=False)}\n"
        )


def read_origin(folder: Path) -> Origin:
    """Raises UserError when the folder is no adapter of ours."""
    path = folder / ORIGIN
    if not path.is_file():
        raise UserError(
            f"{folder}: no {ORIGIN}; expected an adapter folder that `ship-ds deduce` "
            "or `ship-ds compose` wrote"
        )
    return Origin(**json.loads(path.read_text()))
