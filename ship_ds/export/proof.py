"""What software that knows nothing of us computes: logits of a base model with a PEFT folder on it.

Letters: S padded length, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.adapter_files import ADAPTER_CONFIG
from ship_ds.model.encoder_decoder import start_token

PromptIds = Sequence[Sequence[int]]
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
        self._models: list[Any] = []  # of `peft`, one around the other
        self._configs: list[str] = []
        self._bare: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def under(self, folders: Sequence[Path], prompts: PromptIds) -> list[Tensor]:
        """Logits (S, V) of each prompt under an adapter: its folders of `peft`, see
        `Origin.paths`."""
        model = self.load(folders)
        return [_logits(model, ids, self.device) for ids in prompts]

    @torch.no_grad()
    def bare(self, prompts: PromptIds) -> list[Tensor]:
        """Logits (S, V) of each prompt without any adapter; computed once."""
        for ids in map(tuple, prompts):
            if ids not in self._bare:
                with ExitStack() as disabled:
                    for model in self._models:
                        disabled.enter_context(model.disable_adapter())
                    outermost = self._models[-1] if self._models else self.base
                    self._bare[ids] = _logits(outermost, ids, self.device)
        return [self._bare[tuple(ids)] for ids in prompts]

    def load(self, folders: Sequence[Path]) -> Any:
        """The model of `peft` under an adapter, until the next one is loaded.

        Folders with the same configs share the modules that the first ones' load put in; injection
        takes longest."""
        from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTuner

        configs = [(one / ADAPTER_CONFIG).read_text(encoding="utf-8") for one in folders]
        pairs = zip(configs, self._configs, strict=False)
        num_kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        while len(self._models) > num_kept:
            model = self._models.pop()
            if isinstance(model.base_model, BaseTuner):
                model.unload()
        self._configs = configs[:num_kept]
        for model, folder in zip(self._models, folders, strict=False):
            # A key that matches nothing leaves the last adapter's weights in place, and then the
            # comparison with the live one fails.
            weights = load_peft_weights(str(folder), device=str(self.device))
            set_peft_model_state_dict(model, weights)
        for folder in folders[num_kept:]:
            inner = self._models[-1].get_base_model() if self._models else self.base
            model = PeftModel.from_pretrained(
                inner,
                str(folder),
                # Else it raises the adapter of a 16-bit base to fp32, and rounds otherwise than we
                # do.
                autocast_adapter_dtype=False,
            )
            self._models.append(model.eval())
            self._configs.append(configs[len(self._configs)])
        return self._models[-1]


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
