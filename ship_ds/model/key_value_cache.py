"""Keys and values of what was read, in buffers with room for the tokens to come.

    cache = preallocated_cache(config, cuts_windows=True)
    for layer in cache.layers:
        layer.room = 64     # before the first token: one copy then, not 64

transformers' own cache grows by concatenation: each token copies all keys and values of all rows.
Here a token is written where it belongs, and rows that move take along only what differs: beams
of one prompt share its columns.

Letters: E sequences, G key-value heads, S padded length, F size of an attention head,
X other letters flattened.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class PreallocatedLayer(CacheLayerMixin):
    """One block's keys and values, (E, G, S, F) views of buffers.

    Attributes:
        window: how far back a token sees, itself included; None: to the beginning.
        room: tokens to come that the next buffers have place for.
    """

    is_sliding = False  # all tokens are kept: what a window hides, `update` leaves out

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window, self.room, self.length, self.num_rows = window, 0, 0, 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new tokens' keys and values written down; those that the tokens attend to."""
        start, num_new = self.length, key_states.shape[2]
        self.length += num_new
        self.num_rows = len(key_states)
        if self.buffers is None:
            # The prompts' own tensors serve until a token is added: often none is.
            self.buffers = key_states, value_states
            return self.buffers
        if self.length > self.buffers[0].shape[2]:
            capacity = max(self.length, start + self.room)
            self.buffers = tuple(self._larger(one, start, capacity) for one in self.buffers)  # type: ignore[assignment]
        keys, values = (buffer[: self.num_rows] for buffer in self.buffers)  # type: ignore[union-attr]
        keys[:, :, start : self.length] = key_states
        values[:, :, start : self.length] = value_states
        first = 0
        if self.window is not None and num_new == 1:
            first = max(0, self.length - self.window)
        return keys[:, :, first : self.length], values[:, :, first : self.length]

    def _larger(self, buffer: Tensor, length: int, capacity: int) -> Tensor:
        rows, heads, _, size = buffer.shape
        larger = buffer.new_empty(rows, heads, capacity, size)
        larger[:, :, :length] = buffer[:, :, :length]
        return larger

    def select(self, index_E: Tensor, shared: int, moved_X: Tensor | None) -> None:
        """Row e becomes what row index_E[e] was.

        Args:
            index_E: old rows.
            shared: leading columns that are equal in row e and row index_E[e] of the buffers,
                except in the rows of `moved_X`.
            moved_X: new rows whose leading columns have to move too; None: all.
        """
        if self.buffers is None:
            return
        if moved_X is None or len(index_E) > len(self.buffers[0]):
            self.buffers = tuple(self._gathered(one, index_E) for one in self.buffers)  # type: ignore[assignment]
        else:
            for buffer in self.buffers:
                self._move(buffer, index_E, shared, moved_X)
        self.num_rows = len(index_E)

    def _gathered(self, buffer: Tensor, index_E: Tensor) -> Tensor:
        _, heads, capacity, size = buffer.shape
        capacity = max(capacity, self.length + self.room)
        gathered = buffer.new_empty(len(index_E), heads, capacity, size)
        gathered[:, :, : self.length] = buffer[:, :, : self.length].index_select(0, index_E)
        return gathered

    def _move(self, buffer: Tensor, index_E: Tensor, shared: int, moved_X: Tensor) -> None:
        # Both are read before either is written: a row may be another one's source.
        suffix = buffer[:, :, shared : self.length].index_select(0, index_E)
        if len(moved_X):
            buffer[moved_X, :, :shared] = buffer[:, :, :shared].index_select(0, index_E[moved_X])
        buffer[: len(index_E), :, shared : self.length] = suffix

    def join(self, other: "PreallocatedLayer", length: int) -> None:
        """Take another layer's rows in, after these.

        Args:
            other: Of the same block.
            length: Columns that are kept, the last ones of each; a row that has fewer begins with
                zeros.
        """
        assert self.buffers is not None and other.buffers is not None
        self.room = max(self.room, other.room)
        joined = []
        for ours, theirs in zip(self.buffers, other.buffers, strict=True):
            ours = ours[: self.num_rows, :, : self.length]
            theirs = theirs[: other.num_rows, :, : other.length]
            joined.append(torch.cat([ending_at(one, length, 2) for one in (ours, theirs)]))
        self.buffers = joined[0], joined[1]
        self.num_rows += other.num_rows
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first `update` brings the tensors."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset of the first) for a mask that transformers makes: of all tokens."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of a row, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1


def ending_at(columns: Tensor, length: int, dimension: int) -> Tensor:
    """The last `length` columns, or all of them behind as many zeros as it takes.

    Zeros, since what attention hides is still multiplied: by a weight of zero.

    Args:
        columns: of any shape, such as keys (E, G, S, F).
        length: how many are wanted.
        dimension: of the columns, 2 in keys.

    Returns:
        `length` long in that dimension; a view where no zeros are put in.
    """
    have = columns.shape[dimension]
    if have >= length:
        return columns.narrow(dimension, have - length, length)
    shape = list(columns.shape)
    shape[dimension] = length - have
    return torch.cat([columns.new_zeros(shape), columns], dimension)


def preallocated_cache(config: PreTrainedConfig, cuts_windows: bool) -> Cache | None:
    """An empty cache for a model with this config; None where its blocks keep something other than
    keys and values of all tokens, or of a sliding window of them: transformers then makes its own.

    Args:
        config: of the transformers model.
        cuts_windows: whether a token of a block with a sliding window is given the window alone;
            else it is given all tokens, and its attention looks after the window.
    """
    layers = DynamicCache(config=config).layers
    if not layers or {type(one) for one in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return None
    windows = [getattr(one, "sliding_window", None) if cuts_windows else None for one in layers]
    return Cache(layers=[PreallocatedLayer(window) for window in windows])


def preallocated_layers(cache: Any) -> list[PreallocatedLayer]:
    """The layers of such a cache; none of another one."""
    layers: list[Any] = getattr(cache, "layers", [])
    return [one for one in layers if isinstance(one, PreallocatedLayer)]
