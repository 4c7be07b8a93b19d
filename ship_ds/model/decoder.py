"""The decoder: z and zero to six examples -> instruction.

Letters: T tasks, Z latent size, P virtual tokens, H hidden size, K labelled positions, X other
letters flattened.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ship_ds.model.adapters.static_lora import StaticLora
from ship_ds.model.batch import TokenBatch
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import Passage, Stream
from ship_ds.model.reshape import check_reshape
from ship_ds.model.role import Writer


class Decoder(Writer):
    """z -> MLP -> P soft tokens before [examples, "this task is to:", instruction].

    Where z is left out, learned tokens stand in their place.
    """

    def __init__(
        self,
        lm: nn.Module,
        latent_size: int,
        num_soft_tokens: int,
        fusion: Literal["mlp", "reshape"] = "mlp",
        adapter: StaticLora | None = None,
        *,
        checkpointing: bool = False,
        borrows: bool = False,
    ) -> None:
        """Make what turns z into soft tokens.

        Args:
            lm: a transformers model.
            latent_size: Z.
            num_soft_tokens: P.
            fusion: through an MLP, or z itself cut into P pieces.
            adapter, checkpointing, borrows: see `Role`.

        Raises:
            UserError: z cannot be cut so.
        """
        super().__init__(lm, adapter, checkpointing=checkpointing, borrows=borrows)
        hidden_size = self.language_model.hidden_size
        self.num_soft_tokens = num_soft_tokens
        self.before_token: Callable[[], None] | None = None
        """What a token waits for where ranks take turns (turns.py)."""
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
        self,
        latent_TZ: Tensor,
        shows_latent_T: Tensor | None,
        batch: TokenBatch,
        packed: bool = False,
        *,
        continues: bool = False,
    ) -> tuple[Tensor, Tensor] | Stream:
        """States (K, H) before the labels of the instructions, and the labels (K,); see
        `LanguageModel.label_states`.

        Args:
            latent_TZ: z of each row.
            shows_latent_T: see `soft_tokens`.
            batch: examples with the instruction as target.
            packed: without padding, where the model can.
            continues: give the `stream` instead. A flag, since ZeRO-3 gathers the learned tokens
                in this module's own forward alone, and another module would change the order of
                the parameters in 0.1.0's checkpoints.
        """
        soft_TPH = self.soft_tokens(latent_TZ, shows_latent_T)
        if continues:
            return self.language_model.stream(batch, self.own_adapter, soft=soft_TPH)
        states_KH = self.language_model.label_states(
            batch,
            self.own_adapter,
            soft=soft_TPH,
            packed=packed and self.language_model.packs,
            checkpointing=self.checkpointing,
        )
        return states_KH, batch.labels_K

    def passage(
        self, latent_TZ: Tensor, shows_latent_T: Tensor | None, batch: TokenBatch
    ) -> Passage:
        """What `forward` reads, for a pass of another role over the same base; not under ZeRO-3,
        which gathers the learned tokens in `forward` alone.

        Args:
            latent_TZ: z of each row.
            shows_latent_T: see `soft_tokens`.
            batch: examples with the instruction as target.
        """
        soft_TPH = self.soft_tokens(latent_TZ, shows_latent_T)
        return Passage(batch, self.own_adapter, soft=soft_TPH)

    def generate(
        self, latent_TZ: Tensor, prompts: TokenBatch, eos_id: int, max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy instructions as token ids, each up to and including its end of sequence.

        Args:
            latent_TZ: z of each row.
            prompts: examples, or none, without a target.
            eos_id: ends a row.
            max_new_tokens: cuts a row off.
        """
        return greedy(self.stream(latent_TZ, None, prompts), eos_id, max_new_tokens)

    def stream(
        self, latent_TZ: Tensor, shows_latent_T: Tensor | None, prompts: TokenBatch
    ) -> Stream:
        """The prompts read after each latent's soft tokens, about to write the instruction.

        Args:
            latent_TZ: z of each row.
            shows_latent_T: see `soft_tokens`.
            prompts: examples, or none, without a target.
        """
        # By way of `forward`: ZeRO-3 gathers a module's own parameters in there alone.
        stream: Stream = self(latent_TZ, shows_latent_T, prompts, continues=True)
        stream.before_token = self.before_token
        return stream
