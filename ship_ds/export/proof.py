"""What software that knows nothing of us computes: logits of a base model with a PEFT folder on it.

Letters: S padded length, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.lora_folder import ADAPTER_CONFIG
from ship_ds.model.encoder_decoder import start_token

Prompts = Sequence[Sequence[int]]
"""Token ids of each."""


@dataclass(frozen=True)
class Proof:
    """Largest absolute logit differences of an exported adapter, over the probes.

    Args:
        from_live: From the live hypernetwork's adapter.
        from_base: From the bare base.
    """

    from_live: float
    from_base: float


class PeftBase:
    """A base model, in evaluation mode, that `peft` loads adapter folders on, one after another."""

    def __init__(self, base: nn.Module, device: torch.device) -> None:
        self.base, self.device = base.eval().to(device), device
        self._model: Any = None
        self._config = ""
        self._bare: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def under(self, folder: Path, prompts: Prompts) -> list[Tensor]:
        """Logits (S, V) of each prompt under a folder's adapter."""
        self._load(folder)
        return [_logits(self._model, ids, self.device) for ids in prompts]

    @torch.no_grad()
    def bare(self, prompts: Prompts) -> list[Tensor]:
        """Logits (S, V) of each prompt without any adapter; computed once."""
        for ids in map(tuple, prompts):
            if ids not in self._bare:
                if self._model is None:
                    self._bare[ids] = _logits(self.base, ids, self.device)
                else:
                    with self._model.disable_adapter():
                        self._bare[ids] = _logits(self._model, ids, self.device)
        return [self._bare[tuple(ids)] for ids in prompts]

    def _load(self, folder: Path) -> None:
        """Folders with the same config share the modules that the first one's load put in;
        injection takes longest."""
        from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTuner

        config = (folder / ADAPTER_CONFIG).read_text(encoding="utf-8")
        if config == self._config:
            # A key that matches nothing leaves the last adapter's weights in place, and then the
            # comparison with the live one fails.
            set_peft_model_state_dict(
                self._model, load_peft_weights(str(folder), device=str(self.device))
            )
            return
        if self._model is not None and isinstance(self._model.base_model, BaseTuner):
            self._model.unload()
        self._model = PeftModel.from_pretrained(
            self.base,
            str(folder),
            # Else it raises the adapter of a 16-bit base to fp32, and rounds otherwise than we do.
            autocast_adapter_dtype=False,
        ).eval()
        self._config = config


def _logits(model: nn.Module, ids: Sequence[int], device: torch.device) -> Tensor:
    """Those of virtual tokens come first and are left out. A model of two stacks reads the prompt,
    and is asked for the prompt's own tokens as its answer."""
    ids_1S = torch.tensor([list(ids)], device=device)
    tokens = {"input_ids": ids_1S}
    settings: Any = model.config
    if settings.is_encoder_decoder:
        start = start_token(settings)
        tokens["decoder_input_ids"] = ids_1S.roll(1, 1).index_fill(1, ids_1S.new_zeros(1), start)
    logits_SV: Tensor = model(**tokens, use_cache=False).logits[0]
    return logits_SV[-len(ids) :]


def largest_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Of any two elements in the same place; NaN when either side has one, so that a comparison
    with the result fails."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(left, right, strict=True)]).max())
