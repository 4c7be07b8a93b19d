"""Useful FLOPs of a micro-step of SHIP and of its parts: a formula of sizes and token counts.

    size = model.flop_size()                                  # model/sizes.py; once a run
    parts = flops_of_parts(size, rows_of_step)                # {"encoder": 1.2e12, ...}
    utilisation = sum(parts.values()) / seconds / PEAKS["H100"]
    query_flops(size.task_llm, 30, 5, under_adapter=True)    # one answer, without gradients

What counts is what the mathematics asks for, so that a program gains nothing by doing more:

- a product of N rows with an I x O matrix takes 2 N I O operations; its input's gradient as many
  again, where anything before it is trained; its matrix's gradient as many again, where the matrix
  is trained or generated. A frozen matrix therefore counts two passes and a trained one three;
- attention takes 4 S S A F operations a layer and sequence of S tokens, and its gradients twice
  that. The whole square counts, as in PaLM (Chowdhery et al. 2022, appendix B) and in torch's own
  counter, although a causal kernel skips half of it;
- logits count where there is a label, nowhere else;
- padding, recomputed blocks, dequantisation, norms, activations, softmax, the loss and the
  optimiser count nothing.

A frozen embedding has no gradient to pass on, so the matrices that read it (queries, keys, values
of the first block) count no gradient of their input, unless soft tokens stand before the prompt. Of
adapters in the last blocks alone this holds for the first of these, and the blocks below have no
gradient at all. Where a static or generated LoRA leaves out the queries or keys of that block, the
formula counts a little more than is needed: parts of one attention. A sparse delta counts one
product a weight that moves, its input's gradient too. tests/test_flops.py compares it with
`torch.utils.flop_counter.FlopCounterMode`, to the last operation. Imports no torch.

Letters: S padded length, A attention heads, F size of an attention head, N packed tokens,
I inputs of a linear, O outputs of a linear.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 products of a card with fp32 sums, operations a second, from the makers' data sheets
(SXM versions where there are several), by a part of the name that CUDA gives."""


def peak_of(device_name: str) -> float | None:
    """Operations a second of a card by the name that CUDA gives; None for one not in the table."""
    # Whole words: "NVIDIA L40" is no L4.
    return next((PEAKS[name] for name in PEAKS if re.search(rf"\b{name}\b", device_name)), None)


@dataclass(frozen=True)
class Rows:
    """What the formula needs to know of a batch of sequences.

    num_tokens: without padding. sum_of_squares: of the lengths. num_labels: logits that are read.
    read_squares, written_squares: of the lengths before the targets, and of the targets'.
    """

    num_tokens: int
    sum_of_squares: int
    num_labels: int
    read_squares: int = 0
    written_squares: int = 0

    @classmethod
    def of(
        cls, lengths: Sequence[int], num_labels: int, written: Sequence[int] | None = None
    ) -> "Rows":
        """Of sequences of these lengths.

        Args:
            lengths: tokens of each, virtual ones included and padding left out.
            num_labels: logits that are read; with `written`, the sum of that.
            written: tokens of each one's target; None: not told, as a model of one stack needs it
                not.
        """
        read_squares = written_squares = 0
        if written:
            pairs = zip(lengths, written, strict=True)
            read_squares = sum((length - target) ** 2 for length, target in pairs)
            written_squares = sum(target * target for target in written)
        squares = sum(length * length for length in lengths)
        return cls(sum(lengths), squares, num_labels, read_squares, written_squares)

    @property
    def read(self) -> "Rows":
        """What comes before the targets alone."""
        return Rows(self.num_tokens - self.num_labels, self.read_squares, 0)

    @property
    def written(self) -> "Rows":
        """The targets alone: their first token is read in the place of a start token."""
        return Rows(self.num_labels, self.written_squares, self.num_labels)

    @property
    def crossing_pairs(self) -> int:
        """Of a target's token and one before it."""
        return (self.sum_of_squares - self.read_squares - self.written_squares) // 2


@dataclass(frozen=True)
class StepRows:
    """The rows of a micro-step: what encoder, Task LLM and decoder read, and how many tasks.

    fused_pairs: tokens that the Task LLM reads times those of their task that the encoder reads.
    fused_written: the same of its targets' tokens.
    """

    encoder: Rows
    task_llm: Rows
    decoder: Rows
    num_tasks: int
    fused_pairs: int = 0
    fused_written: int = 0


@dataclass(frozen=True)
class Matrices:
    """Multiplications of one token with some matrices: the sum of I x O.

    reading_embeddings: those of them whose input is the embedding, or is made of it below all that
    is generated.
    """

    total: int = 0
    reading_embeddings: int = 0

    def flops(self, num_tokens: int, has_gradient: bool, is_trained: bool) -> int:
        """Of the forward and the gradients.

        Args:
            num_tokens: rows of the product.
            has_gradient: whether the embeddings have a gradient.
            is_trained: whether the matrices have one.
        """
        inputs = self.total if has_gradient else self.total - self.reading_embeddings
        return 2 * num_tokens * (self.total + inputs + self.total * is_trained)


def chunk_lengths(length: int, most: int) -> list[int]:
    """Lengths of the fewest chunks of at most `most` tokens that hold a text, which differ by one
    at most."""
    count = -(-length // most)
    return [(length + place) // count for place in range(count)]


@dataclass(frozen=True)
class RoleSize:
    """A language model in a role.

    blocks: matrices of its blocks. low_rank: of its static LoRA, or of the generated one.
    attention: A F summed over layers. output: V H; 0 where states are read and no logits.
    is_trained: whether its own matrices are. embeddings_have_gradient: they are trained, or soft
    tokens stand before the prompt. head: of the MLP between it and z, which is trained and runs
    once a task. pooling: of learned queries that gather from all states, for each token. after:
    what adapters make of outputs, for each token. prefix: keys that each query meets besides.
    attention_below: of `attention`, what is below all that is generated. chunk_tokens: a longer
    text is read in chunks of at most so many, each by itself; 0: in one piece.
    """

    blocks: Matrices
    low_rank: Matrices
    attention: int
    output: int
    is_trained: bool
    embeddings_have_gradient: bool
    head: int = 0
    pooling: int = 0
    after: int = 0
    prefix: int = 0
    attention_below: int = 0
    chunk_tokens: int = 0

    def chunks(self, length: int) -> list[int]:
        """Tokens of the pieces in which a text of that length is read."""
        return chunk_lengths(length, self.chunk_tokens or length)

    def model_flops(self, rows: Rows, more_pairs: int = 0) -> int:
        """Of blocks, attention and logits; more_pairs: of a token and a key, besides those of the
        rows and of the prefix."""
        blocks = self.blocks.flops(rows.num_tokens, self.embeddings_have_gradient, self.is_trained)
        pairs = rows.sum_of_squares + self.prefix * rows.num_tokens + more_pairs
        attention = 4 * (3 * self.attention - 2 * self.attention_below) * pairs
        return (
            blocks + attention + Matrices(self.output).flops(rows.num_labels, True, self.is_trained)
        )

    def low_rank_flops(self, rows: Rows) -> int:
        """Of the LoRA, and of what is made of outputs; their matrices always have a gradient."""
        after = Matrices(self.after).flops(rows.num_tokens, True, True)
        return after + self.low_rank.flops(rows.num_tokens, self.embeddings_have_gradient, True)

    def head_flops(self, rows: Rows, num_tasks: int) -> int:
        """Of what is between the language model and z: pooling and MLP."""
        pooling = Matrices(self.pooling).flops(rows.num_tokens, True, True)
        return pooling + Matrices(self.head).flops(num_tasks, True, True)

    def fused_pairs(self, rows: StepRows) -> int:
        """Of a token and a fused state, where states are fused."""
        return rows.fused_pairs

    def query_flops(
        self, num_read: int, num_new: int, under_adapter: bool, num_fused: int = 0
    ) -> int:
        """Operations of one query, without gradients; see the function of this name.

        Args:
            num_read: tokens of the prompt, an adapter's virtual ones included; at least one.
            num_new: of the answer, its end included; at least one. The last one is not read again.
            under_adapter: whether what was generated is applied to each token.
            num_fused: keys of its adapter, beside those of a prefix.
        """
        pairs = num_read**2 + sum(num_read + new for new in range(1, num_new))
        pairs += (self.prefix + num_fused) * under_adapter * (num_read + num_new - 1)
        return (
            self._token_flops(num_read + num_new - 1, under_adapter)
            + 4 * self.attention * pairs
            + 2 * self.output * num_new
        )

    def _token_flops(self, num_tokens: int, under_adapter: bool) -> int:
        """Of all products with a token, without gradients."""
        adapter = (self.low_rank.total + self.after) * under_adapter
        return 2 * (self.blocks.total + adapter) * num_tokens


@dataclass(frozen=True)
class TwoStacks(RoleSize):
    """A language model that reads with one stack and writes with another.

    The fields are of what runs over a prompt's tokens: the reading stack, and the keys and values
    of cross-attention. writing: what runs over an answer's, whose `prefix` is met by its own tokens
    and by cross-attention, each.
    """

    writing: RoleSize = field(kw_only=True)

    def model_flops(self, rows: Rows, more_pairs: int = 0) -> int:
        """Of both stacks; more_pairs: of a written token and a key that cross-attention meets."""
        crossing = rows.crossing_pairs + self.writing.prefix * rows.num_labels + more_pairs
        return super().model_flops(rows.read) + self.writing.model_flops(rows.written, crossing)

    def low_rank_flops(self, rows: Rows) -> int:
        """Of both stacks."""
        return super().low_rank_flops(rows.read) + self.writing.low_rank_flops(rows.written)

    def fused_pairs(self, rows: StepRows) -> int:
        """Cross-attention alone meets them."""
        return rows.fused_written

    def query_flops(
        self, num_read: int, num_new: int, under_adapter: bool, num_fused: int = 0
    ) -> int:
        """The prompt is read once; each new token meets those before it and the prompt."""
        writing, read = self.writing, self._token_flops(num_read, under_adapter)
        pairs = num_read**2 + self.prefix * under_adapter * num_read
        crossing = num_new * (num_read + (2 * writing.prefix + num_fused) * under_adapter)
        written = sum(range(1, num_new + 1)) + crossing
        return (
            read
            + writing._token_flops(num_new, under_adapter)
            + 4 * (self.attention * pairs + writing.attention * written)
            + 2 * writing.output * num_new
        )


@dataclass(frozen=True)
class ShipSize:
    """The roles, and the multiplications that make the adapter of one task out of z.

    of_base: those of them with the Task LLM's frozen matrices, which hypernetwork leaves out.
    of_state: those of each of the encoder's states, where they are fused; base_of_state: likewise,
    with the Task LLM's frozen matrices. fuses: keys that the Task LLM meets for each.
    """

    encoder: RoleSize
    task_llm: RoleSize
    decoder: RoleSize
    hypernetwork: int
    of_base: int = 0
    of_state: int = 0
    base_of_state: int = 0
    fuses: int = 0


MODEL_PARTS = ("encoder", "hypernetwork", "adapters", "task_llm", "decoder")
"""The keys of `flops_of_parts`, in its order."""


def flops_of_parts(size: ShipSize, rows: StepRows) -> dict[str, int]:
    """Operations of forward and backward, by part; their sum is the step's.

    Args:
        size: of the model.
        rows: of the micro-step.
    """
    encoder, decoder, task_llm = size.encoder, size.decoder, size.task_llm
    return {
        "encoder": encoder.model_flops(rows.encoder)
        + encoder.low_rank_flops(rows.encoder)
        + encoder.head_flops(rows.encoder, rows.num_tasks),
        "hypernetwork": Matrices(size.hypernetwork).flops(rows.num_tasks, True, True)
        + Matrices(size.of_base).flops(rows.num_tasks, True, False)
        + Matrices(size.of_state).flops(rows.encoder.num_tokens, True, True)
        + Matrices(size.base_of_state).flops(rows.encoder.num_tokens, True, False),
        "adapters": task_llm.low_rank_flops(rows.task_llm),
        "task_llm": task_llm.model_flops(rows.task_llm, task_llm.fused_pairs(rows) * size.fuses),
        "decoder": decoder.model_flops(rows.decoder)
        + decoder.low_rank_flops(rows.decoder)
        + decoder.head_flops(rows.decoder, rows.num_tasks),
    }


def query_flops(
    task_llm: RoleSize, num_read: int, num_new: int, under_adapter: bool, num_fused: int = 0
) -> int:
    """Operations of one query, without gradients: its prompt is read once, and keys and values are
    kept while the answer grows.

    Args:
        task_llm: what answers.
        num_read: tokens of the prompt, an adapter's virtual ones included; at least one.
        num_new: of the answer, its end included; at least one. The last one is not read again.
        under_adapter: whether what was generated is applied to each token.
        num_fused: keys of its adapter, beside those of a prefix.
    """
    return task_llm.query_flops(num_read, num_new, under_adapter, num_fused)


def deduction_flops(size: ShipSize, num_read: int) -> int:
    """Operations that make the adapter of one instruction, without gradients: encoder and
    hypernetwork, once.

    Args:
        size: of the model.
        num_read: tokens that the encoder reads.
    """
    encoder = size.encoder
    products = encoder.blocks.total + encoder.low_rank.total + encoder.pooling
    products += size.of_state + size.base_of_state
    once = encoder.head + size.hypernetwork + size.of_base
    squares = sum(chunk**2 for chunk in encoder.chunks(num_read))
    return 2 * (products * num_read + once) + 4 * encoder.attention * squares
