"""The LoRA that encoder and decoder train for themselves: one for all rows, made of parameters
instead of a latent.

A role is a language model and an adapter. The Task LLM's adapter is generated anew for each task;
the one here is what `tuning: {kind: lora}` asks for, and it acts through the same wrapped linears,
so that several roles can share one frozen base. What it computes, its first values and its dropout
are those of `peft`: to the bit, by test, where alpha / rank is a power of two.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ship_ds.config import LoraTuning
from ship_ds.model.adapters.adapter import Adapter, Sites
from ship_ds.model.adapters.segment_lora import LowRank


class LowRankUpdate(nn.Module):
    """scaling * B A x of one linear. A and B are submodules, whose forward ZeRO-3 gathers for."""

    def __init__(self, num_in: int, num_out: int, tuning: LoraTuning) -> None:
        super().__init__()
        self.scaling = tuning.alpha / tuning.rank
        self.dropout = nn.Dropout(tuning.dropout)
        # nn.Linear's own first values are LoRA's for A (Hu et al. 2021). `peft` draws both matrices
        # that way, then A once more: as many draws here give the same A from the same seed.
        self.lora_a = nn.Linear(num_in, tuning.rank, bias=False)
        self.lora_b = nn.Linear(tuning.rank, num_out, bias=False)
        self.lora_a.reset_parameters()
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The update for inputs x (..., number of inputs), in the dtype of A."""
        low_rank: Tensor = self.lora_a(self.dropout(x.to(self.lora_a.weight.dtype)))
        # Scaled between the two: `rank` numbers a token, where the update has `num_out`.
        update: Tensor = self.lora_b(low_rank * self.scaling)
        return update

    @property
    def is_at_hand(self) -> bool:
        """Whether the two matrices are all of it, and whole: dropout is not in force, and ZeRO-3,
        which gathers them for a module alone, holds no shares of them."""
        drops = self.training and self.dropout.p > 0
        return not drops and not hasattr(self.lora_a.weight, "ds_id")


class StaticLora(nn.Module):
    """The trained matrices of a role, registered below the module paths of its sites.

    A parameter is called `model.layers.0.self_attn.q_proj.lora_a.weight` here.
    """

    def __init__(self, sites: Sites, tuning: LoraTuning) -> None:
        """Draw the first values.

        Args:
            sites: the linears to adapt, in the order in which they draw.
            tuning: rank, scaling and dropout.
        """
        super().__init__()
        self._updates: dict[str, LowRankUpdate] = {}
        for path, (num_in, num_out) in sites.items():
            self._updates[path] = LowRankUpdate(num_in, num_out, tuning)
            _register(self, path, self._updates[path])

    def value(self) -> "StaticLoraAdapter":
        """What the role's language model is run under."""
        return StaticLoraAdapter(self._updates)


def _register(root: nn.Module, path: str, module: nn.Module) -> None:
    """Below `root` at a path of several names, through empty modules."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


@dataclass(frozen=True)
class StaticLoraAdapter(Adapter):
    """The same low-rank update of every row: y += scaling * B A x.

    updates: by the module path of the site.
    """

    updates: dict[str, LowRankUpdate]

    @property
    def num_tasks(self) -> int:
        """One, whatever the rows are."""
        return 1

    def is_low_rank(self) -> bool:
        """See `Adapter`."""
        return all(update.is_at_hand for update in self.updates.values())

    def factors_at(self, path: str) -> LowRank | None:
        """See `Adapter`. Not `low_rank`: a site's own function in Python takes a host longer than
        the operations of `delta`: 0.46 ms beside 0.35 of one core, forward and backward, for 40
        tokens of a 64 x 64 linear in bf16, whose products cost next to nothing (2026-11-27)."""
        update = self.updates.get(path)
        if update is None:
            return None
        return LowRank(update.lora_a.weight[None], update.lora_b.weight[None], update.scaling)

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        """See `Adapter`."""
        return self.updates[path](x) if path in self.updates else None

    def rows(self, index: Tensor) -> "StaticLoraAdapter":
        """Itself: every row has the same."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """A and B of each site, as other adapters of one task have them."""
        return {
            f"{path}.{half}": layer.weight[None]
            for path, update in self.updates.items()
            for half, layer in (("A", update.lora_a), ("B", update.lora_b))
        }
