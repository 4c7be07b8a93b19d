"""Several kinds of adapter at once, all made from the same z: HINT (Ivison et al. 2023, arXiv
2212.10315) generates bottleneck adapters and prefixes together.

    model.hypernetwork={kind: combination, parts: [{kind: bottleneck}, {kind: prefix, length: 4}]}

HINT whole has the encoder's states beside them (fusion.py), and its layer queries in the encoder:

    model.encoder.pooling={kind: attention, num_queries: L, shares: true}
    parts: [{kind: bottleneck, latent: by_layer}, {kind: prefix, latent: by_layer}, {kind: fusion}]

Letters: T tasks, E sequences, Z latent size, R LoRA rank, I inputs of a linear, O outputs of a
linear, G key-value heads, P virtual tokens, F size of an attention head.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.adapter_files import (
    ADAPTER_CONFIG,
    BEFORE_THE_PROMPT,
    PEFT_TYPES,
    Leaves,
    check_folder,
)
from ship_ds.config import CombinationConfig
from ship_ds.errors import UserError
from ship_ds.kinds import ADAPTERS
from ship_ds.model.adapters.adapter import (
    NO_SUM,
    Adapter,
    Export,
    Hypernetwork,
    LoraWithin,
    States,
    Target,
    build_hypernetwork,
)
from ship_ds.model.adapters.segment_lora import LowRank
from ship_ds.model.adapters.sites import is_target
from ship_ds.model.attention import Prefix
from ship_ds.model.language_model import Feature
from ship_ds.origin import ORIGIN, read_origin
from ship_ds.parsing import read_json_object


@dataclass(frozen=True)
class CombinedAdapter(Adapter):
    """What each part does, done together: sums at linears, one after another before the prompt."""

    parts: tuple[Adapter, ...]

    @property
    def num_tasks(self) -> int:
        return self.parts[0].num_tasks

    def low_rank(self, path: str) -> LowRank | None:
        """One of all ranks side by side; None where a part adds what is none of low rank."""
        if not self._adds_products_alone():
            return None
        factors = [one for part in self.parts if (one := part.factors_at(path)) is not None]
        return reduce(_side_by_side, factors) if factors else None

    def _adds_products_alone(self) -> bool:
        return all(type(part).delta is Adapter.delta for part in self.parts)

    def is_low_rank(self) -> bool:
        """See `Adapter`."""
        return self._adds_products_alone() and all(part.is_low_rank() for part in self.parts)

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        """See `Adapter`."""
        return _sum(part.delta(path, x) for part in self.parts)

    def after(self, path: str, y: Tensor) -> Tensor | None:
        """See `Adapter`: each part reads the output as it was before the others."""
        return _sum(part.after(path, y) for part in self.parts)

    def virtual_tokens(self) -> Tensor | None:
        """See `Adapter`."""
        tokens = [one for part in self.parts if (one := part.virtual_tokens()) is not None]
        return torch.cat(tokens, 1) if tokens else None

    def prefix(self, path: str, num_rows: int) -> Prefix | None:
        """See `Adapter`."""
        prefixes = [one for part in self.parts if (one := part.prefix(path, num_rows)) is not None]
        if not prefixes:
            return None
        keys, values, seen = zip(*prefixes, strict=True)
        all_seen = None
        if any(one is not None for one in seen):
            all_seen = torch.cat([_seen(*one) for one in zip(keys, seen, strict=True)], 1)
        return torch.cat(keys, 2), torch.cat(values, 2), all_seen

    def beside(self, other: Adapter) -> "CombinedAdapter | None":
        """See `Adapter`: where every part can."""
        assert isinstance(other, CombinedAdapter)
        made = [one.beside(its) for one, its in zip(self.parts, other.parts, strict=True)]
        parts = [one for one in made if one is not None]
        return CombinedAdapter(tuple(parts)) if len(parts) == len(made) else None

    def _each(self, change: Callable[[Adapter], Adapter]) -> "CombinedAdapter":
        return CombinedAdapter(tuple(map(change, self.parts)))

    def rows(self, index: Tensor) -> "CombinedAdapter":
        return self._each(lambda part: part.rows(index))

    def over(self, offsets: Tensor | None) -> "CombinedAdapter":
        return self._each(lambda part: part.over(offsets))

    def for_rows(self, counts: Sequence[int]) -> "CombinedAdapter":
        """See `Adapter`."""
        return self._each(lambda part: part.for_rows(counts))

    def prepared(self, dtype: torch.dtype) -> "CombinedAdapter":
        return self._each(lambda part: part.prepared(dtype))

    def lora_within(self) -> LoraWithin | None:
        """See `Adapter`: the others stay around another one."""
        loras = [
            (place, lora)
            for place, part in enumerate(self.parts)
            if (lora := part.as_lora()) is not None
        ]
        if len(loras) != 1:
            return None
        [(place, lora)] = loras
        before, after = self.parts[:place], self.parts[place + 1 :]
        return LoraWithin(lora, lambda other: CombinedAdapter((*before, other, *after)))

    def tensors(self) -> dict[str, Tensor]:
        """Those of each part, by its number."""
        return {
            f"{number}.{name}": tensor
            for number, part in enumerate(self.parts)
            for name, tensor in part.tensors().items()
        }

    def update_norms(self) -> dict[str, float]:
        """See `Adapter`; where several parts change one linear the sum of theirs, which is as much
        at most."""
        norms: Counter[str] = Counter()
        for part in self.parts:
            norms.update(part.update_norms())
        return dict(norms)

    def distance(self, other: Adapter) -> Tensor:
        """The mean of the distances of what both have and can be compared: a folder may hold one
        part alone, and fused states have no distance.

        Raises:
            UserError: There is nothing of the sort.
        """
        assert isinstance(other, CombinedAdapter)
        distances = []
        for theirs in other.parts:
            # What can be read back has one part of a kind; see `cannot_leave`.
            for part in (one for one in self.parts if type(one) is type(theirs)):
                with suppress(UserError):
                    distances.append(part.distance(theirs))
        return torch.stack(distances).mean(0) if distances else super().distance(other)


@dataclass(frozen=True)
class CombinedExport(Export):
    """A folder of `peft` for each part. None lies in the outer folder, where a program that loads
    one adapter alone would take a part of them for the whole."""

    names: tuple[Leaves, ...]
    parts: tuple[Export, ...]

    def folders(self) -> tuple[Leaves, ...]:
        """See `Export`."""
        return self.names

    def live(self) -> CombinedAdapter:
        """See `Export`."""
        return CombinedAdapter(tuple(part.live() for part in self.parts))

    def write(self, part: Path, base: str, lm: Any) -> None:
        """See `Export`."""
        for name, export in zip(self.names, self.parts, strict=True):
            (part / name).mkdir()
            export.write(part / name, base, lm)

    def shape(self) -> str:
        """See `Export`."""
        return "; ".join(part.shape() for part in self.parts)

    def padded(self, rank: int) -> "CombinedExport":
        """See `Export`: of the part that changes linears."""
        first, *others = self.parts
        return replace(self, parts=(first.padded(rank), *others))


def _side_by_side(left: LowRank, right: LowRank) -> LowRank:
    """The sum of two products as one; each one's scaling goes into its B."""
    b = torch.cat([left.b_TOR * left.scaling, right.b_TOR * right.scaling], 2)
    return replace(left, a_TRI=torch.cat([left.a_TRI, right.a_TRI], 1), b_TOR=b, scaling=1.0)


def _seen(keys_EGPF: Tensor, seen_EP: Tensor | None) -> Tensor:
    """Which of these keys are seen, where None is all."""
    if seen_EP is not None:
        return seen_EP
    rows, _, length, _ = keys_EGPF.shape
    return torch.ones(rows, length, dtype=torch.bool, device=keys_EGPF.device)


def _sum(terms: Any) -> Tensor | None:
    added = [one for one in terms if one is not None]
    return reduce(torch.add, added) if added else None


class Combination(Hypernetwork):
    """A hypernetwork of each part, side by side."""

    def __init__(self, config: CombinationConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        self.why_not = self.cannot_leave(config)
        parts = [
            build_hypernetwork(part, latent_size, _target_of(target, part)) for part in config.parts
        ]
        self.parts = nn.ModuleList(parts)
        self.num_virtual_tokens = sum(part.num_virtual_tokens for part in parts)
        self.prefix_length = sum(part.prefix_length for part in parts)
        self.packs = all(part.packs for part in parts)  # type: ignore[misc]
        self.fuses = sum(part.fuses for part in parts)
        self.stands_before = any(part.stands_before for part in parts)
        self.fuses_blocks = any(part.fuses_blocks for part in parts)

    def _hypernetworks(self) -> list[Hypernetwork]:
        return [part for part in self.parts if isinstance(part, Hypernetwork)]

    @classmethod
    def check(cls, config: CombinationConfig, latent_size: int, target: Target) -> None:
        """See `Hypernetwork`: each part."""
        for part in config.parts:
            ADAPTERS.implementation(part).check(part, latent_size, _target_of(target, part))

    @staticmethod
    def targets(config: CombinationConfig) -> tuple[str, ...]:
        """See `Hypernetwork`: those of all parts, each once."""
        return tuple(dict.fromkeys(name for part in config.parts for name in _targets(part)))

    @classmethod
    def features(cls, config: CombinationConfig) -> tuple[Feature, ...]:
        """See `Hypernetwork`."""
        features = [
            one for part in config.parts for one in ADAPTERS.implementation(part).features(part)
        ]
        return tuple(dict.fromkeys(features))

    @classmethod
    def without_shares(cls, config: CombinationConfig) -> CombinationConfig:
        """See `Hypernetwork`: of each part."""
        parts = [ADAPTERS.implementation(part).without_shares(part) for part in config.parts]
        return config.model_copy(update={"parts": tuple(parts)})

    @classmethod
    def num_last_blocks(cls, config: CombinationConfig) -> int:
        """See `Hypernetwork`: of the part that changes most."""
        return max(ADAPTERS.implementation(part).num_last_blocks(part) for part in config.parts)

    def forward(self, latent_TZ: Tensor, read: States | None = None) -> CombinedAdapter:
        # By keywords, as ShipModel calls it.
        of_z, of_states = {"latent_TZ": latent_TZ}, {"latent_TZ": latent_TZ, "read": read}
        parts = self._hypernetworks()
        return CombinedAdapter(tuple(part(**(of_states if part.fuses else of_z)) for part in parts))

    def num_products(self) -> int:
        """See `Hypernetwork`."""
        return sum(part.num_products() for part in self._hypernetworks())

    def products_of_base(self) -> int:
        """See `Hypernetwork`."""
        return sum(part.products_of_base() for part in self._hypernetworks())

    def ranks(self) -> Mapping[str, int]:
        """See `Hypernetwork`."""
        ranks: dict[str, int] = {}
        for part in self._hypernetworks():
            for path, rank in part.ranks().items():
                ranks[path] = ranks.get(path, 0) + rank
        return ranks

    def lora_ranks(self) -> Mapping[str, int]:
        """See `Hypernetwork`."""
        ranks = [one for part in self._hypernetworks() if (one := part.lora_ranks())]
        return ranks[0] if len(ranks) == 1 else {}

    def products_of_state(self) -> int:
        """See `Hypernetwork`."""
        return sum(part.products_of_state() for part in self._hypernetworks())

    def base_products_of_state(self) -> int:
        """See `Hypernetwork`."""
        return sum(part.base_products_of_state() for part in self._hypernetworks())

    def products_after(self) -> dict[str, int]:
        """See `Hypernetwork`."""
        added: Counter[str] = Counter()
        for part in self._hypernetworks():
            added.update(part.products_after())
        return dict(added)

    def head_modules(self) -> list[nn.Module]:
        return [head for part in self._hypernetworks() for head in part.head_modules()]

    @classmethod
    def cannot_leave(cls, config: CombinationConfig) -> str | None:
        """See `Hypernetwork`: `peft` loads a kind that changes linears, and around the whole model
        one that stands before the prompt; a second one of either it does not."""
        kinds = [ADAPTERS.implementation(part) for part in config.parts]
        reasons = [
            one
            for kind, part in zip(kinds, config.parts, strict=True)
            if (one := kind.cannot_leave(part)) is not None
        ]
        if reasons:
            return str(reasons[0])
        places = sorted(kind.leaves in BEFORE_THE_PROMPT for kind in kinds)
        if places != [False, True] or any(kind.leaves is None for kind in kinds):
            return (
                "adapters of this run leave in folders of peft where they are of two kinds, one "
                "that changes linears (lora, sparse, scatter) and one that stands before the "
                "prompt (prefix, layer_prompt, fusion, block_fusion, soft_prompt, reshape); "
                "`ship-ds answer` applies them"
            )
        return None

    @classmethod
    def cannot_sum(cls, config: CombinationConfig) -> str | None:
        """See `Hypernetwork`."""
        return NO_SUM

    def reads(self) -> bool:
        """See `Hypernetwork`: what leaves in folders is read from them."""
        return self.why_not is None and all(part.reads() for part in self._hypernetworks())

    def read(self, folder: Path, lm: Any) -> CombinedAdapter:
        """See `Hypernetwork`: folders side by side, as this kind leaves, all that its ship.json
        names; or one of `peft` alone, by whomever, of what a part leaves as."""
        if not self.reads():
            return super().read(folder, lm)  # type: ignore[return-value]  # it raises
        parts = {part.leaves: part for part in self._hypernetworks() if part.leaves is not None}
        known = " and ".join(parts)
        names: list[Leaves] = [name for name in parts if (folder / name).is_dir()]
        if (folder / ORIGIN).is_file():
            names = list(read_origin(folder).folders)
        elif (folder / ADAPTER_CONFIG).is_file():
            names = []
        elif not names:
            raise UserError(
                f"{folder}: no {ADAPTER_CONFIG}, and no folder of {known} in it: expected an "
                "adapter's folder"
            )
        paths = {name: folder / name for name in names} or {_leaves_as(folder): folder}
        for name, path in paths.items():
            if name not in parts:
                raise UserError(f"{path}: is of {name}, and this run's adapters are of {known}")
            check_folder(path, name)
        read = CombinedAdapter(tuple(parts[name].read(path, lm) for name, path in paths.items()))
        if self.num_virtual_tokens and read.virtual_tokens() is None:
            # Their places before every prompt would be there, and empty.
            raise UserError(
                f"{folder}: has no virtual tokens, which this run's adapters have besides: give "
                f"the folder that has both, {known}"
            )
        return read

    def exports(self, adapter: CombinedAdapter) -> list[Export]:
        """See `Hypernetwork`: a folder of each part, side by side."""
        if self.why_not is not None:
            raise UserError(f"deduce: {self.why_not}")
        parts = zip(self._hypernetworks(), adapter.parts, strict=True)
        # What peft puts around the whole model is loaded last.
        ordered = sorted(parts, key=lambda pair: pair[0].leaves in BEFORE_THE_PROMPT)
        made = [part.exports(its) for part, its in ordered]
        names = tuple(part.leaves for part, _ in ordered if part.leaves is not None)
        return [CombinedExport(names, one) for one in zip(*made, strict=True)]


def _leaves_as(folder: Path) -> Leaves:
    """What a single folder of `peft` says that it is. Raises UserError where it is none of them."""
    path = folder / ADAPTER_CONFIG
    peft_type = read_json_object(path).get("peft_type")
    for name, known_type in PEFT_TYPES.items():
        if known_type == peft_type:
            return name
    raise UserError(
        f"{path}: peft_type is {peft_type!r}; expected one of {', '.join(PEFT_TYPES.values())}"
    )


def _targets(part: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = ADAPTERS.implementation(part).targets(part)
    return names


def _target_of(target: Target, part: Any) -> Target:
    """The Task LLM as a part sees it: with the linears that it changes."""
    names = _targets(part)
    sites = {p: size for p, size in target.sites.items() if is_target(p, names)}
    return replace(target, sites=sites)
