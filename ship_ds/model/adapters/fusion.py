"""Instruction fusion (HINT, Ivison et al. 2023, arXiv 2212.10315): every state that the encoder's
last layer gives of the instruction becomes a key and a value of every block, beside z.

    state of token p --+
                       +--> MLP -> features of p --head of block l--> key and value of p in block l
    z -----------------+

In HINT, an encoder-decoder, the decoder's cross-attention meets the encoded instruction beside the
encoded input, and so it does where the Task LLM is a T5. A decoder-only model has no such place, so
its blocks meet it as they meet their own past. It is computed once a task; a query pays for the
attention to it and for no product of it.

Without the states (a latent that no text stands behind) nothing is seen: training leaves them out
of some tasks (`drop`), so that the rest of a combination learns to do without.

Letters: T tasks, S padded length, H hidden size, Z latent size, D hypernetwork width, G key-value
heads, P virtual tokens, F size of an attention head.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ship_ds.config import FusionHypernetworkConfig
from ship_ds.model.adapters.adapter import Export, States, Target, num_products
from ship_ds.model.adapters.prefix import PrefixAdapter, prefix_exports, read_prefix_adapter
from ship_ds.model.adapters.trunk import TrunkHypernetwork


class FusionHypernetwork(TrunkHypernetwork):
    """States and z -> keys and values of every block, or of every cross-attention where there is
    one, as many as there are states."""

    needs: ClassVar = ("adapters", "prefix")
    leaves: ClassVar = "prefix"
    fuses = 1

    def __init__(self, config: FusionHypernetworkConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        num_heads, head_size = target.heads
        self.drop, self.places, self.shape = config.drop, target.fusing, (2, num_heads, head_size)
        heads = [nn.Linear(config.width, 2 * num_heads * head_size) for _ in self.places]
        for head in heads:
            # Small keys, as torch draws them, take no more than their share of the attention, and
            # the values say nothing yet.
            nn.init.zeros_(head.weight.chunk(2)[1])
            nn.init.zeros_(head.bias)
        self.add_trunk(latent_size, config, ())
        self.from_state = nn.Linear(target.state_size, config.width)
        # States of a last layer are normed: a state weighs as much as z.
        nn.init.normal_(self.from_state.weight, std=1 / math.sqrt(target.state_size))
        self.heads = nn.ModuleList(heads)

    def forward(self, latent_TZ: Tensor, read: States | None = None) -> PrefixAdapter:
        from_latent_T1D = self.project(latent_TZ)
        if read is None:  # the same modules run, as ZeRO-3's ranks in turn need it
            read = self._nothing(latent_TZ)
        last_TSH = read.states_TSH[..., : self.from_state.in_features]
        from_state_TSD = self.from_state(last_TSH.to(from_latent_T1D.dtype))
        features_TSD = self.run_trunk(from_latent_T1D + from_state_TSD)
        made = (head(features_TSD).unflatten(2, self.shape) for head in self.heads)
        states = [one.permute(0, 2, 3, 1, 4) for one in made]  # (T, 2, G, P, F)
        seen_TP = read.real_TS
        if read.chance_T is not None:
            seen_TP = seen_TP & (read.chance_T >= self.drop)[:, None]
        return PrefixAdapter(dict(zip(self.places, states, strict=True)), seen_TP)

    def _nothing(self, latent_TZ: Tensor) -> States:
        num_tasks, device = len(latent_TZ), latent_TZ.device
        states_TSH = torch.zeros(num_tasks, 1, self.from_state.in_features, device=device)
        return States(states_TSH, torch.zeros(num_tasks, 1, dtype=torch.bool, device=device))

    def num_products(self) -> int:
        """See `Hypernetwork`: what z alone asks for."""
        return num_products(self.from_latent)

    def products_of_state(self) -> int:
        """See `Hypernetwork`."""
        return sum(map(num_products, (self.from_state, self.trunk, self.heads)))

    def head_modules(self) -> list[nn.Module]:
        return [self.heads]

    def exports(self, adapter: PrefixAdapter) -> list[Export]:
        """See `Hypernetwork`: a prefix as long as the instruction."""
        return prefix_exports(adapter)

    def read(self, folder: Path, lm: Any) -> PrefixAdapter:
        """See `Hypernetwork`: of any length."""
        _, *heads = self.shape
        device = self.from_state.weight.device
        return read_prefix_adapter(folder, lm, self.places, (heads[0], heads[1]), device)
