"""The port of adapter kinds: an adapter's value, the hypernetwork that makes it, its way out.

An adapter is an explicit value. It travels as a keyword argument through the transformers model
into every block, and a checkpointed block's recomputation sees the very adapter that its forward
saw: the block hands it to its linear layers inside the checkpointed function, so nothing depends on
what is current when the backward pass runs (on CUDA in another thread).

A new kind is one file with three classes, and its config class in the table `kinds.ADAPTERS`.

Letters: T tasks, S padded length, I inputs of a linear, O outputs of a linear, P virtual tokens, H
hidden size, Z latent size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ship_ds.adapter_files import BEFORE_THE_PROMPT, Leaves
from ship_ds.errors import UserError
from ship_ds.kinds import ADAPTERS
from ship_ds.model.adapters.segment_lora import Addition, LowRank
from ship_ds.model.adapters.segments import TaskEnds
from ship_ds.model.attention import Prefix
from ship_ds.model.language_model import Feature, LanguageModel
from ship_ds.section import Section

if TYPE_CHECKING:
    from ship_ds.model.adapters.lora import LoraAdapter

Sites = Mapping[str, tuple[int, int]]
"""Module path -> (in, out) of each linear that adapters change."""
NO_SUM = (
    "a sum of such adapters means nothing; it needs a run with model.hypernetwork.kind=lora, "
    "sparse or scatter"
)
NO_FORMAT = "adapters of this run's kind have no file format; `ship-ds answer` applies them"


class Adapter(ABC):
    """The adapters of T tasks. What a kind does not do keeps its default: nothing."""

    @property
    @abstractmethod
    def num_tasks(self) -> int:
        """T, or how many rows it was expanded to."""

    def low_rank(self, path: str) -> Addition | None:
        """What is added to the output of the linear at module `path`, where it is of low rank; the
        site adds it in place. None: nothing, or no such thing."""
        return None

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        """What is added to the output of the linear at module `path` for input x (..., I), its
        tokens task-major; None: nothing. A kind with `low_rank` needs no other."""
        low_rank = self.factors_at(path)
        return None if low_rank is None else low_rank.delta(x)

    def is_low_rank(self) -> bool:
        """Whether `factors_at` says all that this changes inside the blocks. By the methods that a
        kind has of its own: who adds another one that acts in there adds it here."""
        kind = type(self)
        methods = kind.delta, kind.after, kind.prefix
        return methods == (Adapter.delta, Adapter.after, Adapter.prefix)

    def factors_at(self, path: str) -> LowRank | None:
        """The factors of what is added at a linear, as one matrix product of low rank; None: none.

        `low_rank` says so to a site, which then runs the product's own function. A kind for which a
        site is quicker without (the static LoRA) has factors all the same."""
        low_rank = self.low_rank(path)
        assert low_rank is None or isinstance(low_rank, LowRank)
        return low_rank

    def after(self, path: str, y: Tensor) -> Tensor | None:
        """What is added to the output y (..., O) of the linear at module `path` where it is made of
        that very output, all else added already; tokens as in `delta`. None: nothing."""
        return None

    def virtual_tokens(self) -> Tensor | None:
        """Embeddings put before every prompt, (T, P, H); None: none."""
        return None

    def prefix(self, path: str, num_rows: int) -> Prefix | None:
        """What every row attends to besides in the block at module `path`, or at another of
        `LanguageModel.attentions`; None: nothing."""
        return None

    @abstractmethod
    def rows(self, index: Tensor) -> "Adapter":
        """The adapter whose row e is this one's row index[e]; it reorders and compacts a batch."""

    def beside(self, other: "Adapter") -> "Adapter | None":
        """The tasks of another one of the kind after these, every task with equally many tokens;
        None: the kind cannot."""
        return None

    def over(self, offsets: Tensor | None) -> "Adapter":
        """The same for tokens laid end to end, task t ending at offsets[t]; None: every task has
        equally many tokens."""
        return self

    def for_rows(self, counts: Sequence[int]) -> "Adapter":
        """The same for rows of which task t has counts[t], one after another. A linear meets one
        token of each, but one that reads a cache of latents meets every row's: a kind whose
        products go by `TaskEnds` takes `TaskEnds.of_rows`, which know of both."""
        device = next(iter(self.tensors().values())).device
        ends = TaskEnds.of_rows(counts, device)
        return self.over(None if ends is None else ends.offsets_T)

    def prepared(self, dtype: torch.dtype) -> "Adapter":
        """The same for many forwards without gradients in a model of this dtype: what `delta` would
        make of its tensors at each call is made once."""
        return self

    def as_lora(self) -> "LoraAdapter | None":
        """The same as a plain LoRA; None: it is none."""
        return None

    def lora_within(self) -> "LoraWithin | None":
        """The one LoRA that it is or has as a part; None: it has none, or several."""
        lora = self.as_lora()
        return None if lora is None else LoraWithin(lora, lambda other: other)

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that was generated, by name; its first dimension is T."""

    def update_norms(self) -> dict[str, float]:
        """Module path -> Frobenius norm of what is added to the weight there, of an adapter of one
        task; of kinds that change no weights an empty one."""
        return {}

    def distance(self, other: "Adapter") -> Tensor:
        """|each task of this - other|^2 / |other|^2, (T,), with gradient.

        The norms are of what the two do, not of how that is written.

        Args:
            other: of the same kind and of one task.

        Raises:
            UserError: the kind has no such measure.
        """
        raise UserError("explain: adapters of this run's kind cannot be compared by their weights")


Around = Callable[["LoraAdapter"], Adapter]
"""A LoRA -> the adapter that it is a part of."""


class LoraWithin(NamedTuple):
    """The LoRA in an adapter, and what makes an adapter like it around another LoRA."""

    lora: "LoraAdapter"
    around: Around


class Export(ABC):
    """One task's adapter on its way out."""

    def folders(self) -> tuple[Leaves, ...]:
        """Folders of `peft` that `write` makes inside its own, in the order in which they are
        loaded, one around the other; empty: the folder itself is one."""
        return ()

    @abstractmethod
    def live(self) -> Adapter:
        """As the Task LLM applies it, for one task."""

    @abstractmethod
    def write(self, part: Path, base: str, lm: Any) -> None:
        """The files that `peft` reads, into an existing folder.

        Args:
            part: the folder.
            base: the base model's folder, as the files name it.
            lm: the base, a transformers model.
        """

    @abstractmethod
    def shape(self) -> str:
        """For the model card: kind and size in words."""

    def padded(self, rank: int) -> "Export":
        """The same function at a higher rank. Raises UserError for a kind without ranks."""
        raise UserError(f"--pad-to: {self.shape()}: has no rank; leave it out")

    @classmethod
    def summed(
        cls, parts: Sequence[tuple[float, "Export"]], rank: int | None
    ) -> tuple["Export", int, float]:
        """The weighted sum of several, of `rank` or exact.

        Returns:
            The sum, its rank, and what a lower rank lost of it: the Frobenius norm of the
            difference over that of the exact sum.

        Raises:
            UserError: a sum of this kind means nothing.
        """
        raise UserError(f"compose: {parts[0][1].shape()}: {NO_SUM}")


@dataclass(frozen=True)
class Target:
    """The Task LLM as hypernetworks see it, and the encoder's states where one reads them.

    sites: its wrapped linears. blocks: module paths. hidden_size: of its embeddings. heads:
    key-value heads and the size of one. state_size: of the encoder's states. state_blocks: how
    many blocks it has. attentions: where a
    prefix is met, and in which block. fusing: those where the encoder's states are. project: see
    `LanguageModel.keys_and_values`; it has the frozen weights, and a hypernetwork has them not
    among its own.
    """

    sites: Sites
    hidden_size: int
    blocks: tuple[str, ...] = ()
    heads: tuple[int, int] = (0, 0)
    state_size: int = 0
    state_blocks: int = 0
    attentions: Mapping[str, str] = field(default_factory=dict)
    fusing: tuple[str, ...] = ()
    project: Callable[[str, Tensor], Tensor] | None = None

    @classmethod
    def of(cls, lm: LanguageModel, sites: Sites) -> "Target":
        """A language model with these sites."""
        return cls(
            sites,
            lm.hidden_size,
            tuple(lm.blocks()),
            lm.key_value_heads,
            attentions=lm.attentions(),
            fusing=lm.fusing(),
            project=lm.keys_and_values,
        )


@dataclass(frozen=True)
class States:
    """What the encoder gives of all that it read, for a kind that fuses it.

    Args:
        states_TSH: of each task's text by the last layer, H numbers; where a kind `fuses_blocks`,
            what came into each block stands behind them, (1 + blocks) x H numbers.
        real_TS: True where a position is no padding.
        chance_T: in training a number from [0, 1) for each task, drawn anew at each step, by which
            a kind leaves states out; None: it leaves out none.
    """

    states_TSH: Tensor
    real_TS: Tensor
    chance_T: Tensor | None = None


class Hypernetwork(nn.Module, ABC):
    """z -> adapter; made from (config, latent_size, target).

    Its parameters belong into submodules with tensors in and out, such as nn.Linear. Under ZeRO-3
    the hooks that gather a parameter for the backward pass hang on a module's output tensors, and
    an adapter is none: a parameter of the hypernetwork itself would be empty there.
    """

    num_virtual_tokens: int = 0
    """Places that its adapters take before each prompt."""
    prefix_length: int = 0
    """Keys that every query of the Task LLM meets besides. For FLOPs."""
    needs: ClassVar[tuple[Feature, ...]] = ("adapters",)
    """What it needs of a language model; see `LanguageModel.missing`."""
    packs: ClassVar[bool] = True
    """Whether its adapters can be applied to a batch without padding."""
    fuses: int = 0
    """Keys that a query meets for each of the encoder's `States`, where it makes adapters of these
    besides; `forward` then takes them as a second argument; None there: of z alone."""
    stands_before: bool = False
    """Whether these keys stand at places before the prompt, which count towards the context."""
    fuses_blocks: bool = False
    """Whether it wants what came into each of the encoder's blocks among them."""
    leaves: ClassVar[Leaves | None] = None
    """What its folder is for `peft`, among those of a combination too; None: it cannot leave in
    one."""

    @staticmethod
    def targets(config: Any) -> tuple[str, ...]:
        """Names of the Task LLM's linears that its adapters change."""
        return ()

    @classmethod
    def features(cls, config: Any) -> tuple[Feature, ...]:
        """What adapters of this config need of a language model; see `LanguageModel.missing`."""
        return cls.needs

    @classmethod
    def check(cls, config: Any, latent_size: int, target: Target) -> None:
        """See that the three go together.

        Asked before encoder and decoder are made, so of a target that knows nothing of the
        encoder's states: their heads grow with the latent, and one of a mistyped size fills the
        memory. Asked once more, of the whole target, before the hypernetwork is made.

        Args:
            config: the kind's section, of `model.hypernetwork` or of a part of a combination.
            latent_size: Z.
            target: the Task LLM.

        Raises:
            UserError: they do not.
        """

    @classmethod
    def without_shares(cls, config: Any) -> Any:
        """The config with which every place reads all of z; the same one where no place reads a
        share. By the section's `latent`, where it has one."""
        if getattr(config, "latent", None) != "by_layer":
            return config
        return config.model_copy(update={"latent": "whole"})

    @classmethod
    def num_last_blocks(cls, config: Any) -> int:
        """How many blocks, counted from the last, its adapters change, and none below them; 0: this
        does not depend on how many there are. By the section's `num_blocks`, where it has one."""
        return getattr(config, "num_blocks", None) or 0

    @abstractmethod
    def forward(self, latent_TZ: Tensor) -> Adapter:
        """The adapters of T latents. Called by keyword: `hypernetwork(latent_TZ=latent_TZ)`."""

    def num_products(self) -> int:
        """Multiplications that make one task's adapter: here, each linear used once. For FLOPs."""
        return num_products(self)

    def products_of_base(self) -> int:
        """Multiplications of one task's adapter with the Task LLM's own matrices, frozen as they
        are. For FLOPs."""
        return 0

    def ranks(self) -> Mapping[str, int]:
        """Module path -> rank of the product that its adapters add there. For FLOPs."""
        return {}

    def lora_ranks(self) -> Mapping[str, int]:
        """Module path -> rank of the LoRA that `Adapter.lora_within` finds in its adapters; empty:
        they have none."""
        return self.ranks() if self.leaves == "lora" else {}

    def products_of_state(self) -> int:
        """Multiplications that make an adapter of one of the encoder's states more. For FLOPs."""
        return 0

    def base_products_of_state(self) -> int:
        """Those of them with the Task LLM's own matrices, frozen as they are, which
        `products_of_state` leaves out. For FLOPs."""
        return 0

    def products_after(self) -> Mapping[str, int]:
        """Module path -> multiplications of one token with what is added there and has no rank,
        such as by `Adapter.after`. For FLOPs."""
        return {}

    @classmethod
    def cannot_leave(cls, config: Any) -> str | None:
        """Why adapters of this config have no file format; None: they have one."""
        return NO_FORMAT if cls.exports is Hypernetwork.exports else None

    @classmethod
    def cannot_sum(cls, config: Any) -> str | None:
        """Why adapters of this config cannot be added up, as far as the kind tells; the rest is
        told by `Export.summed`."""
        return NO_SUM if cls.leaves in BEFORE_THE_PROMPT else cls.cannot_leave(config)

    def exports(self, adapter: Any) -> list[Export]:
        """Each task's adapter on its way out. Raises UserError for a kind without a format."""
        raise UserError(f"deduce: {NO_FORMAT}")

    def read(self, folder: Path, lm: Any) -> Adapter:
        """The value of a folder that `peft` or `ship-ds deduce` wrote, by whomever it was trained.

        Args:
            folder: of one adapter.
            lm: the base, a transformers model, wrapped or not.

        Raises:
            UserError: it is damaged, of another kind or of another base.
        """
        raise UserError(
            f"{folder}: adapters of this run's kind cannot be read back; it needs a run with "
            "model.hypernetwork.kind=lora, prefix, layer_prompt, soft_prompt, reshape, sparse or "
            "scatter, or a combination that leaves in folders of peft"
        )

    def reads(self) -> bool:
        """Whether `read` reads anything."""
        return type(self).read is not Hypernetwork.read

    def latent_of(self, adapter: Any) -> Tensor | None:
        """The latent (Z,) whose adapter this is, where it can be told without a search."""
        return None

    def head_modules(self) -> list[nn.Module]:
        """Where most of the weights are; the rest is the trunk."""
        return []


def num_products(module: nn.Module) -> int:
    """Multiplications of one row with every linear of a module: the sum of I x O."""
    linears = (one for one in module.modules() if isinstance(one, nn.Linear))
    return sum(linear.in_features * linear.out_features for linear in linears)


def build_hypernetwork(config: Section, latent_size: int, target: Target) -> Hypernetwork:
    """The hypernetwork of the config's kind.

    Args:
        config: its section, `model.hypernetwork`.
        latent_size: Z.
        target: the Task LLM.
    """
    kind = ADAPTERS.implementation(config)
    kind.check(config, latent_size, target)
    hypernetwork: Hypernetwork = kind(config, latent_size, target)
    return hypernetwork
