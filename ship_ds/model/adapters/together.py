"""The adapters of several texts that one model reads end to end, in one pass.

Where Task LLM and decoder are the same base, a step reads the answers of T tasks, each under its
own LoRA, and after them the instructions, all under the decoder's. A pass over the base pays for
each of its kernels and each 4-bit weight once, where two passes pay twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.segment_lora import EndToEnd


def can_read_together(adapters: Sequence[Adapter | None]) -> bool:
    """Whether what these change is of low rank, everywhere: then `Together` says it."""
    return all(adapter is None or adapter.is_low_rank() for adapter in adapters)


@dataclass(frozen=True)
class Together(Adapter):
    """Low-rank adapters of texts that lie one after the other.

    parts: each text's (None: nothing), laid over its own tokens (`Adapter.over`), and how many
    these are.
    """

    parts: tuple[tuple[Adapter | None, int], ...]

    @property
    def num_tasks(self) -> int:
        raise NotImplementedError("each text has its own")

    def low_rank(self, path: str) -> EndToEnd | None:
        """What each part adds to its own tokens."""
        factors = tuple(
            (None if part is None else part.factors_at(path), num_tokens)
            for part, num_tokens in self.parts
        )
        return EndToEnd(factors) if any(one is not None for one, _ in factors) else None

    def rows(self, index: Tensor) -> "Together":
        raise NotImplementedError("texts are read together in training alone")

    def tensors(self) -> dict[str, Tensor]:
        """Those of each part, by its number."""
        return {
            f"{number}.{name}": tensor
            for number, (part, _) in enumerate(self.parts)
            if part is not None
            for name, tensor in part.tensors().items()
        }
