"""The decoder: z and zero to six examples -> instruction.

Letters: T tasks, Z latent size, P virtual tokens, H hidden size, K labelled positions,
V vocabulary, X other letters flattened.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import Stream, language_model
from ship_ds.model.reshape import check_reshape


class Decoder(nn.Module):
    """z -> MLP -> P soft tokens before [examples, "this task is to:", instruction].

    Where z is left out, learned tokens stand in their place.
    """

    def __init__(
        self,
        lm: nn.Module,
        hidden_size: int,
        latent_size: int,
        num_soft_tokens: int,
        fusion: Literal["mlp", "reshape"] = "mlp",
    ) -> None:
        super().__init__()
        self.lm, self.language_model = lm, language_model(lm)
        self.num_soft_tokens = num_soft_tokens
        # Soft tokens start as large as token embeddings: from near zero, each RMSNorm multiplies
        # the gradient by a thousand.
        spread = self.language_model.embedding_spread
        self.from_latent: nn.Module
        if fusion == "reshape":
            check_reshape(
                "model.decoder.num_soft_tokens", num_soft_tokens, latent_size, hidden_size
            )
            self.from_latent = nn.Identity()
        else:
            last = nn.Linear(2 * hidden_size, num_soft_tokens * hidden_size)
            nn.init.normal_(last.weight, std=spread / math.sqrt(2 * hidden_size))
            nn.init.normal_(last.bias, std=spread)
            first = nn.Linear(latent_size, 2 * hidden_size)
            nn.init.normal_(first.weight, std=2 / math.sqrt(latent_size))
            self.from_latent = nn.Sequential(first, nn.SiLU(), last)
        self.without_latent = nn.Parameter(spread * torch.randn(num_soft_tokens * hidden_size))

    def soft_tokens(self, latent_TZ: Tensor, shows_latent_T: Tensor | None = None) -> Tensor:
        """What stands before each prompt, (T, P, H).

        Args:
            latent_TZ: z of each row.
            shows_latent_T: where false, the learned tokens; None: z everywhere.
        """
        soft_TX = self.from_latent(latent_TZ.to(self.without_latent.dtype))
        if shows_latent_T is not None:
            soft_TX = torch.where(shows_latent_T[:, None], soft_TX, self.without_latent)
        return soft_TX.unflatten(1, (self.num_soft_tokens, -1))

    def forward(
        self, latent_TZ: Tensor, shows_latent_T: Tensor, batch: TokenBatch, packed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Label logits (K, V) and labels (K,) of the instructions.

        Args:
            latent_TZ: z of each row.
            shows_latent_T: see `soft_tokens`.
            batch: examples with the instruction as target.
            packed: without padding, where the model can.
        """
        soft_TPH = self.soft_tokens(latent_TZ, shows_latent_T)
        packed = packed and self.language_model.missing("packing") is None
        return self.language_model.score(batch, soft=soft_TPH, packed=packed)

    def generate(
        self,
        latent_TZ: Tensor,
        prompts: TokenBatch,
        eos_id: int,
        max_new_tokens: int,
        any_unfinished: Callable[[bool], bool] = bool,
    ) -> list[list[int]]:
        """Greedy instructions as token ids, each up to and including its end of sequence."""
        return greedy(self.stream(latent_TZ, None, prompts), eos_id, max_new_tokens, any_unfinished)

    def stream(
        self, latent_TZ: Tensor, shows_latent_T: Tensor | None, prompts: TokenBatch
    ) -> Stream:
        """The prompts read after each latent's soft tokens, about to write the instruction."""
        return self.language_model.stream(prompts, soft=self.soft_tokens(latent_TZ, shows_latent_T))
