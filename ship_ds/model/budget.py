"""How many rows go through a language model at once: the memory that is free says it.

    costs = lm.costs                                            # bytes, of this very model
    bytes_free(device) // costs.decoded_row(300, 64)            # -> 61 rows of 300 + 64 tokens

    for batch in batches([[9, 7], [30, 4]], free, row_bytes):   # tasks with rows of these widths
        batch                                                   # [Piece(1, 0, 2), Piece(0, 0, 2)]

Longer rows come first and rows of like length together, so that little is padded. What a row
answers does not depend on the others in its batch.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SHARE_OF_GPU = 0.8
"""Of what is free: the rest is for the allocator's fragments and for weights being gathered."""
_SHARE_OF_MACHINE = 0.25
"""Of what is available: other programs want to live too."""
_MOST_ON_CPU = 1 << 30
"""A CPU gains nothing from larger batches: what it works on does not fit its caches anyway."""


@dataclass(frozen=True)
class Costs:
    """What a language model needs beside its weights, in bytes.

    Args:
        cache: keys and values of one token, in all blocks.
        working: one token's states in a block's feed-forward part, without gradients.
        attending: one token's states in its attention.
        repeated: one token's keys and values once more for every attention head, where attention
            wants them so.
        kept: one token's states that all blocks keep for the backward pass.
        scores: a pair of tokens of one row, in the mask or the scores of attention.
        logits: of one position, in the model's own dtype.
        float_logits: of one position, in fp32.
    """

    cache: int
    working: int
    attending: int
    repeated: int
    kept: int
    scores: int
    logits: int
    float_logits: int

    def decoded_row(self, width: int, new_tokens: int, *, chooses_greedily: bool = True) -> int:
        """A row that is read and then continued.

        Args:
            width: tokens of the prompt.
            new_tokens: at most.
            chooses_greedily: else probabilities of all tokens are made in fp32, several at once.
        """
        choice = self.logits + (0 if chooses_greedily else 4 * self.float_logits)
        choice = max(choice, (width + new_tokens) * self.repeated)
        return bytes_of_row(self.cache, width, new_tokens, self.reading(width), choice)

    def scored_row(self, width: int, num_labels: int) -> int:
        """A row whose labels are scored without gradients: logits, picked, in fp32, and their
        log-probabilities."""
        label = 2 * self.logits + 2 * self.float_logits
        return max(self.reading(width), num_labels * label)

    def trained_row(self, width: int, num_labels: int) -> int:
        """A row through which gradients go."""
        label = 2 * self.logits + 4 * self.float_logits
        return width * (self.kept + width * self.scores) + num_labels * label

    def reading(self, width: int) -> int:
        """A row on its way through a block: its attention, and then its feed-forward part."""
        return width * max(self.working, self.attending + width * self.scores)


def bytes_of_row(
    kv_bytes_per_token: int, width: int, new_tokens: int, reading: int = 0, logits: int = 0
) -> int:
    """The most bytes that one decoded row needs at a time.

    Reading the prompt, and then choosing one token after the other, are two moments: the states of
    the first are gone in the second.

    Args:
        kv_bytes_per_token: of the cache.
        width: tokens of the prompt.
        new_tokens: at most.
        reading: bytes of the prompt's states in a block.
        logits: bytes by which a token is chosen.
    """
    return max(
        width * kv_bytes_per_token + reading, (width + new_tokens) * kv_bytes_per_token + logits
    )


@dataclass(frozen=True)
class Piece:
    """Rows start to stop - 1 of a task."""

    task: int
    start: int
    stop: int


def batches(
    widths: Sequence[Sequence[int]],
    bytes_free: int,
    row_bytes: Callable[[int], int],
    task_bytes: int = 0,
) -> Iterator[list[Piece]]:
    """All rows of all tasks in batches that fit, the longest first.

    The tasks of a batch have equally many rows: an adapter's products want equal parts where
    prompts are padded. A task that does not fit alone is cut.

    Args:
        widths: tokens of each row, one list a task.
        bytes_free: for a batch.
        row_bytes: what a row of this width needs, in a batch of such rows.
        task_bytes: what each task needs besides.
    """
    for size in sorted({len(row) for row in widths} - {0}):
        tasks = [t for t, row in enumerate(widths) if len(row) == size]
        tasks.sort(key=lambda t: max(widths[t]), reverse=True)
        while tasks:
            row = max(1, row_bytes(max(widths[tasks[0]])))
            count = bytes_free // (size * row + task_bytes)
            if count:
                yield [Piece(t, 0, size) for t in tasks[:count]]
                tasks = tasks[count:]
                continue
            rows = max(1, (bytes_free - task_bytes) // row)
            for start in range(0, size, rows):
                yield [Piece(tasks[0], start, min(size, start + rows))]
            tasks = tasks[1:]


def row_batches(
    widths: Sequence[int], bytes_free: int, row_bytes: Callable[[int], int]
) -> Iterator[list[int]]:
    """As `batches`, for rows that belong to no task: their numbers, the longest first.

    Args:
        widths: tokens of each row.
        bytes_free: for a batch.
        row_bytes: what a row of this width needs, in a batch of such rows.
    """
    for batch in batches([[width] for width in widths], bytes_free, row_bytes):
        yield [piece.task for piece in batch]


def bytes_free(device: torch.device) -> int:
    """Bytes that a batch on this device may take.

    On a GPU most of what is free, the allocator's own reserve included; on a CPU a share of what
    the machine or its container has left, which the ranks of the node share.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE_OF_GPU * (free + reserve))
    share = _SHARE_OF_MACHINE * _available() / ranks_on_node(os.environ)
    return min(_MOST_ON_CPU, int(share))


def bytes_to_keep(device: torch.device) -> int:
    """Bytes that may lie on this device beside batches, so that something is not computed again: on
    a GPU a quarter of what a batch may take, on a CPU as much again."""
    free = bytes_free(device)
    return free // 4 if device.type == "cuda" else free


def bytes_to_unpack(device: torch.device) -> int:
    """Bytes that the dequantised weights of a 4-bit base may take while it answers
    (nf4_linear.unpack): none on a GPU, whose memory is for the batches."""
    return bytes_to_keep(device) if device.type == "cpu" else 0


def bytes_beside_kept(device: torch.device) -> int:
    """Bytes that a batch may take where the results of several fill `bytes_to_keep` up."""
    free = bytes_free(device)
    return free - bytes_to_keep(device) if device.type == "cuda" else free


def ranks_on_node(environment: Mapping[str, str]) -> int:
    """Processes of this run on this machine, as torchrun, deepspeed or srun name them; 1 where
    none of them started it."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if environment.get(name, "").isdecimal():
            return max(1, int(environment[name]))
    return 1


def _available(root: Path = Path("/")) -> int:
    """Bytes that the kernel can give, and no more than the limits of this process's container, or
    of its job, leave."""
    available = _meminfo(root, "MemAvailable")
    for group, limit in _limits(root):
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        stat = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        # Files that were read and may be forgotten count as used.
        forgettable = sum(int(row.split()[1]) for row in stat if row.startswith("inactive_file "))
        available = min(available, limit - used + forgettable)
    return max(0, available)


def host_bytes(root: Path = Path("/")) -> int:
    """All that this process could ever have of the machine, swap included, whoever has it now."""
    swap = _meminfo(root, "SwapTotal")
    return swap + min([_meminfo(root, "MemTotal"), *(limit for _, limit in _limits(root))])


def _meminfo(root: Path, name: str) -> int:
    rows = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{name}:"))


def _limits(root: Path) -> Iterator[tuple[Path, int]]:
    """The folder of each control group that this process is in and that has a limit, in bytes."""
    for name in _groups(root):
        group = root / "sys/fs/cgroup" / name
        path = group / "memory.max"
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        if text.isdecimal():
            yield group, int(text)


def _groups(root: Path) -> list[str]:
    """The control groups (version 2) that this process is in: "a/b" -> ["a/b", "a", ""]."""
    names = root / "proc/self/cgroup"
    lines = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    group = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    parts = group.split("/") if group else []
    return ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
