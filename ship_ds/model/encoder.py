"""The encoder: instruction -> posterior over z.

    last token's state, or what learned queries gather of all (pooling.py) -> MLP -> q(z | k)

Letters: E sequences, T tasks, S padded length, N packed tokens, H hidden size, Z latent size,
X other letters flattened.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ship_ds.config import AttentionPooling, LastPooling
from ship_ds.data.task import Reading
from ship_ds.errors import UserError
from ship_ds.flops import chunk_lengths
from ship_ds.model.adapters.adapter import num_products
from ship_ds.model.adapters.static_lora import StaticLora
from ship_ds.model.batch import TokenBatch
from ship_ds.model.drawing import keyed_generator
from ship_ds.model.pooling import LearnedQueries
from ship_ds.model.role import Role

_FIRST_LOG_VARIANCE = -5.0
"""Added to what the head gives, so that training starts with little noise (a deviation of 0.08)."""


@dataclass(frozen=True)
class Posterior:
    """q(z | k), diagonal Gaussian: mean_TZ and log_variance_TZ, in fp32.

    states_TSH: those that it was made of, where the encoder was told to give them.
    """

    mean_TZ: Tensor
    log_variance_TZ: Tensor
    states_TSH: Tensor | None = None

    def sample(self, noise_TZ: Tensor) -> Tensor:
        """z = mean + exp(log_variance / 2) * noise."""
        return self.mean_TZ + (self.log_variance_TZ / 2).exp() * noise_TZ


@dataclass(frozen=True, eq=False)
class Encoded:
    """A reading and what the encoder made of it, for whoever makes adapters of it more than once.

    mean_Z: its posterior's mean.
    states_SH: its tokens' states, of a kind that fuses them; None: of one that fuses none, or there
        was no room to keep them, and it is read again.
    """

    reading: str | Reading
    mean_Z: Tensor
    states_SH: Tensor | None

    def __bool__(self) -> bool:
        """As of the reading: an adapter of no text is of z alone."""
        return bool(self.reading)


def means_of(read: Sequence[Encoded]) -> Tensor:
    """Their posteriors' means, (T, Z), of one or more."""
    return torch.stack([one.mean_Z for one in read])


class Encoder(Role):
    """Hidden states of a language model, pooled -> MLP -> posterior.

    Attributes:
        pooling: None: the last token's state alone; of a text in chunks the mean of theirs.
        gives_states: whether `forward` gives the states of all tokens besides.
        gives_blocks: whether what came into each block stands behind these.
    """

    gives_states = False
    gives_blocks = False

    def __init__(
        self,
        lm: nn.Module,
        latent_size: int,
        pooling: LastPooling | AttentionPooling,
        adapter: StaticLora | None = None,
        *,
        chunk_tokens: int | None = None,
        checkpointing: bool = False,
        borrows: bool = False,
    ) -> None:
        """Make the head.

        Args:
            lm: a transformers model.
            latent_size: Z.
            pooling: what the head reads of the states.
            chunk_tokens: a text of more is read in chunks; None: in one piece.
            adapter, checkpointing, borrows: see `Role`.

        Raises:
            UserError: the pooling or the chunks do not fit the model.
        """
        super().__init__(lm, adapter, checkpointing=checkpointing, borrows=borrows)
        hidden_size = self.language_model.hidden_size
        self.chunk_tokens, context = chunk_tokens, self.language_model.context_length
        if chunk_tokens is not None and context is not None and chunk_tokens > context:
            raise UserError(
                f"model.encoder.chunk_tokens ({chunk_tokens}): the base reads at most {context} "
                "tokens: set that or less"
            )
        if not borrows:
            self.language_model.drop_output_layer()
        self.pooling: LearnedQueries | None = None
        if isinstance(pooling, AttentionPooling):
            self.pooling = LearnedQueries(hidden_size, pooling.num_queries, pooling.num_heads)
        width = hidden_size if self.pooling is None else self.pooling.width
        self.num_shares = 1
        if isinstance(pooling, AttentionPooling) and pooling.shares:
            self.num_shares = pooling.num_queries
            if latent_size % self.num_shares:
                raise UserError(
                    f"model.encoder.pooling.shares: model.latent_size ({latent_size}) must be a "
                    f"multiple of num_queries ({self.num_shares}): change one of them"
                )
            width, latent_size = hidden_size, latent_size // self.num_shares
        first, last = nn.Linear(width, 2 * hidden_size), nn.Linear(2 * hidden_size, 2 * latent_size)
        self.head = nn.Sequential(first, nn.SiLU(), last)
        # Means of about unit size over small noise: from torch's own initial scale, training first
        # has to lift every mean out of the noise, and neither half learns before.
        nn.init.normal_(first.weight, std=1 / math.sqrt(width))
        nn.init.normal_(last.weight[:latent_size], std=2 / math.sqrt(2 * hidden_size))

    def forward(
        self,
        batch: TokenBatch,
        embeddings_TSH: Tensor | None = None,
        *,
        without_states: bool = False,
    ) -> tuple[Tensor, ...]:
        """Mean and log-variance of q(z | k), (T, Z) each, in fp32; with `gives_states` also the
        states (T, S, H), zero in the padding.

        A plain tuple: ZeRO-3 looks for tensors in those alone.

        Args:
            batch: one instruction's prompt a row.
            embeddings_TSH: read in place of the batch's tokens (induction optimises them).
            without_states: leave the states out, which take much memory where nobody wants them.
        """
        gives_states = self.gives_states and not without_states
        pooled_TX, states = self._pooled(batch, embeddings_TSH, gives_states)
        # exp of the log-variance and the KL need fp32 whatever the engine's dtype.
        shares = pooled_TX.unflatten(1, (self.num_shares, -1))
        mean, raw = self.head(shares).float().chunk(2, dim=-1)
        posterior = mean.flatten(1), raw.flatten(1) + _FIRST_LOG_VARIANCE
        return (*posterior, states) if gives_states else posterior

    @property
    def state_width(self) -> int:
        """Numbers of a state that `forward` gives."""
        lm = self.language_model
        return lm.hidden_size * (1 + len(lm.blocks()) * self.gives_blocks)

    @property
    def state_bytes(self) -> int:
        """That a token's states take while they are given: as they were read, side by side, and in
        the rows of all texts."""
        return 3 * self.kept_state_bytes if self.gives_states else 0

    @property
    def kept_state_bytes(self) -> int:
        """That a token's states take once they were given."""
        return self.state_width * next(self.head.parameters()).element_size()

    @property
    def longest_text(self) -> int | None:
        """The most tokens that it can read; None: any number."""
        return self.language_model.context_length if self.chunk_tokens is None else None

    @property
    def head_products(self) -> int:
        """Multiplications that make one task's posterior of what was pooled."""
        return self.num_shares * num_products(self.head)

    def _pooled(
        self, batch: TokenBatch, embeddings_TSH: Tensor | None, gives_states: bool
    ) -> tuple[Tensor, Tensor]:
        """What the head reads, in its dtype, and the states that were read for it."""
        lm, dtype = self.language_model, next(self.head.parameters()).dtype
        needs_all = gives_states or self.pooling is not None
        rows = self._in_chunks(batch)
        if embeddings_TSH is not None and rows is not batch:
            embeddings_TSH = _laid_out(embeddings_TSH, batch, rows)
        read = lm.states if needs_all else lm.last_states
        if gives_states and self.gives_blocks:
            read = lm.states_of_blocks
        states = read(rows, embeddings_TSH, self.own_adapter, checkpointing=self.checkpointing)
        states = states.to(dtype)
        if not needs_all:
            last_TH = self._mean_of_chunks(states, batch, rows)
            return last_TH, last_TH
        states_TSH = states if rows is batch else _laid_out(states, rows, batch)
        size = lm.hidden_size  # behind them may stand the blocks'
        if self.pooling is not None:
            return self.pooling(states_TSH[..., :size], batch.real_ES), states_TSH
        # A causal model's last token has read all of its row.
        last = torch.arange(len(states), device=states.device), rows.lengths_E - 1
        last_EH = states[last][..., :size]
        return self._mean_of_chunks(last_EH, batch, rows), states_TSH

    def _in_chunks(self, batch: TokenBatch) -> TokenBatch:
        """What the language model reads of these texts: themselves, where none is long."""
        most = self.chunk_tokens
        return batch if most is None or max(batch.lengths) <= most else batch.in_chunks(most)

    def _mean_of_chunks(self, last_EH: Tensor, batch: TokenBatch, rows: TokenBatch) -> Tensor:
        """Of each text, (T, H), from the last state of each chunk."""
        if rows is batch:
            return last_EH
        assert self.chunk_tokens is not None
        counts = [len(chunk_lengths(length, self.chunk_tokens)) for length in batch.lengths]
        return torch.stack([of_text.mean(0) for of_text in last_EH.split(counts)])


def _laid_out(states_ESH: Tensor, rows: TokenBatch, others: TokenBatch) -> Tensor:
    """What stands in the rows of one batch, in those of another that has the same packed tokens:
    texts and their chunks."""
    return others.in_rows(states_ESH.flatten(0, 1).index_select(0, rows.packed.source_N))


def posterior_noise(seed: int, step: int, task_ids: list[str], latent_size: int) -> Tensor:
    """Standard normal noise, keyed by (seed, step, task id) alone.

    So a task's noise at a step is the same on any number of ranks, and no rank's generator moves.

    Args:
        seed: of the run.
        step: the global step.
        task_ids: of the batch, in its order.
        latent_size: Z.

    Returns:
        (T, Z), on the CPU.
    """
    return torch.stack(
        [_task_noise(f"{seed} {step} {task_id}", latent_size) for task_id in task_ids]
    )


def chances(seed: int, step: int, task_ids: list[str]) -> Tensor:
    """Numbers from [0, 1), keyed as the noise is.

    Args:
        seed: of the run.
        step: the global step.
        task_ids: of the batch, in its order; behind a word where a task has another draw.

    Returns:
        (T,), on the CPU.
    """
    drawn = [
        torch.rand((), generator=keyed_generator(f"chance {seed} {step} {task_id}"))
        for task_id in task_ids
    ]
    return torch.stack(drawn)


def _task_noise(key: str, latent_size: int) -> Tensor:
    return torch.randn(latent_size, generator=keyed_generator(key))
