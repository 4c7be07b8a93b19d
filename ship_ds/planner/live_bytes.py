"""How many bytes of tensors are alive, and were at most: on the meta device what a GPU would hold.

    with LiveBytes(model.parameters()) as live:
        model(batch).backward()
    live.peak

A tensor on the meta device is made and dropped when a real one would be, so the peak of a forward
and backward pass can be counted without memory.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages as operations make them and Python or autograd drops them.

    Attributes:
        now: bytes alive at this moment.
        peak: the most there were.
        part: what new storages are put down to.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Start at zero.

        Args:
            known: what is not counted, such as the parameters.
        """
        super().__init__()
        self.now = self.peak = 0
        self.part: str | None = None
        self.alive: dict[int, tuple[int, str | None, weakref.ref[Any]]] = {}
        # held on to, so that no address of theirs comes twice
        self._known = {tensor.untyped_storage()._cdata: tensor for tensor in known}

    def by_part(self) -> dict[str | None, int]:
        """Bytes alive by the part during which they were made."""
        totals: dict[str | None, int] = {}
        for num_bytes, part, _ in self.alive.values():
            totals[part] = totals.get(part, 0) + num_bytes
        return totals

    def made_by(self, part: str, tensors: Iterable[Tensor]) -> int:
        """Bytes of those storages of the tensors that were made during a part and are alive."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors} & self.alive.keys()
        return sum(self.alive[key][0] for key in keys if self.alive[key][1] == part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive or key in self._known:
            return
        reference = weakref.ref(storage, partial(self._forget, key))
        self.alive[key] = (storage.nbytes(), self.part, reference)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, reference: Any) -> None:
        self.now -= self.alive.pop(key)[0]
