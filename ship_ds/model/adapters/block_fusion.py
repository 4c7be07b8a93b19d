"""Instruction fusion by the base's own attention: what came into each block of the encoder as it
read the instruction becomes, by the Task LLM's norm and projections of the block of that number, a
key and a value there.

    encoder, block l --what comes in--> Task LLM, block l: norm, k_proj, v_proj --> a prefix

HINT (Ivison et al. 2023, arXiv 2212.10315) lets a T5's cross-attention, which was pretrained to
meet encoded text, meet the encoded instruction. A decoder-only model was pretrained to meet its own
past: so here the instruction stands where it would in the prompt, right before it, as the encoder
read it. With an encoder that is the base itself (its LoRA starts at nothing) a fresh one answers as
if the instruction were in the prompt with its keys and values kept; what is learned is how to read
it. It has no weights of its own. A query pays for the attention to these keys and for no product.

Letters: T tasks, S padded length, H hidden size, Z latent size, G key-value heads, P virtual
tokens, F size of an attention head, X other letters flattened.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ship_ds.config import BlockFusionHypernetworkConfig
from ship_ds.errors import UserError
from ship_ds.model.adapters.adapter import Export, Hypernetwork, States, Target
from ship_ds.model.adapters.layer_prompt import Projection
from ship_ds.model.adapters.prefix import PrefixAdapter, prefix_exports, read_prefix_adapter


class BlockFusionHypernetwork(Hypernetwork):
    """States of the encoder's blocks -> keys and values of the Task LLM's."""

    needs: ClassVar = ("adapters", "prefix", "projection")
    leaves: ClassVar = "prefix"
    fuses = 1
    fuses_blocks = True
    stands_before = True

    def __init__(
        self, config: BlockFusionHypernetworkConfig, latent_size: int, target: Target
    ) -> None:
        super().__init__()
        ours = len(target.blocks), target.hidden_size
        theirs = target.state_blocks, target.state_size
        if ours != theirs:
            raise UserError(
                f"model.hypernetwork.kind=block_fusion: the Task LLM has {ours[0]} blocks of width "
                f"{ours[1]} and the encoder {theirs[0]} of {theirs[1]}: give both one base, by "
                "model.encoder.base"
            )
        self.drop, self.places, self.state_size = config.drop, target.blocks, target.state_size
        assert target.project is not None
        self.projections = nn.ModuleList(Projection(target.project, one) for one in self.places)
        self.heads = num_heads, head_size = target.heads
        self.products_of_place = target.hidden_size * 2 * num_heads * head_size

    def forward(self, latent_TZ: Tensor, read: States | None = None) -> PrefixAdapter:
        if read is None:  # the same modules run, as ZeRO-3's ranks in turn need it
            read = self._nothing(latent_TZ)
        num_places, length = len(self.places), read.real_TS.shape[1]
        # The last one read stands right before the prompt, however much padding a batch has: the
        # projections put what they are given at positions -S to -1.
        padding_T1 = length - read.real_TS.sum(1, keepdim=True)
        places_S = torch.arange(length, device=padding_T1.device)
        to_right_TS, to_left_TS = ((places_S + sign * padding_T1) % length for sign in (-1, 1))
        blocks_TSX = read.states_TSH[..., self.state_size :]
        blocks_TSX = blocks_TSX.gather(1, to_right_TS[..., None].expand_as(blocks_TSX))
        made = {}
        states = blocks_TSX.unflatten(2, (num_places, -1)).unbind(2)
        for place, project, states_TSH in zip(self.places, self.projections, states, strict=True):
            pair = project(states_TSH)  # (T, 2, G, P, F)
            index = to_left_TS[:, None, None, :, None].expand_as(pair)
            made[place] = pair.gather(3, index)
        seen_TP = read.real_TS
        if read.chance_T is not None:
            seen_TP = seen_TP & (read.chance_T >= self.drop)[:, None]
        return PrefixAdapter(made, seen_TP)

    def _nothing(self, latent_TZ: Tensor) -> States:
        num_tasks, device = len(latent_TZ), latent_TZ.device
        width = (1 + len(self.places)) * self.state_size
        states_TSX = torch.zeros(num_tasks, 1, width, device=device)
        return States(states_TSX, torch.zeros(num_tasks, 1, dtype=torch.bool, device=device))

    def base_products_of_state(self) -> int:
        """See `Hypernetwork`: a key and a value in each block."""
        return len(self.places) * self.products_of_place

    def exports(self, adapter: PrefixAdapter) -> list[Export]:
        """See `Hypernetwork`: a prefix as long as the instruction."""
        return prefix_exports(adapter)

    def read(self, folder: Path, lm: Any) -> PrefixAdapter:
        """See `Hypernetwork`: of any length."""
        return read_prefix_adapter(folder, lm, self.places, self.heads, lm.device)
