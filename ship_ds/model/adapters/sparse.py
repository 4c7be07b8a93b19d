"""Sparse deltas: some weights of chosen linears move, each by a number of its own (Sparse High Rank
Adapters, Bhardwaj et al. 2024, arXiv 2406.13175; SHIP's "delta" fusion, arXiv 2502.02315).

    y += delta x        delta (O, I) is zero but for some places, the same ones for every task

    sparse      z -> the numbers, by the trunk of a LoRA and a head; at first zero
    scatter     z itself is the numbers, spread over the linears by their sizes

The places are drawn by a generator that goes by a linear's module path and sizes, so that every
rank and every start has the same ones and no file needs them: order[(o + shift[x]) % I] is the
input of output o's x-th weight. Inputs and outputs have equally many each, up to one.

In training a task's delta is multiplied as it is, zeros and all, some outputs at a time. Where it
has more numbers than its few tokens have to pick, as while an answer grows, they pick.

Letters: T tasks, N packed tokens, I inputs of a linear, O outputs of a linear, J sites of a group,
D hypernetwork width, Z latent size, X other letters flattened.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ship_ds.config import ScatterHypernetworkConfig, SparseHypernetworkConfig
from ship_ds.errors import UserError
from ship_ds.lora_folder import SparseUpdate, read_sparse, write_sparse
from ship_ds.model.adapters.adapter import (
    Adapter,
    Export,
    Hypernetwork,
    Sites,
    Target,
    num_products,
)
from ship_ds.model.adapters.lora_heads import LoraHead
from ship_ds.model.adapters.segments import Segments, TaskEnds, segments_of_whole
from ship_ds.model.adapters.trunk import TrunkHypernetwork
from ship_ds.model.drawing import keyed_generator

_AT_ONCE = 2**25
"""Numbers of the deltas of all tasks that are written out at once, or of weights that are picked,
at most: 64 MB in 16 bits."""


@dataclass(frozen=True)
class SparseAdapter(Adapter):
    """Changes of single weights, of T tasks.

    values: module path -> (T, weights of an output, O); see `laid_out`. columns: module path ->
    (weights of an output, O), their inputs. ends: where each task's tokens end; None: every task
    has equally many.
    """

    values: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    ends: TaskEnds | None = None

    @property
    def num_tasks(self) -> int:
        return len(next(iter(self.values.values())))

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        """See `Adapter`."""
        if path not in self.values:
            return None
        columns_XO, x_NI = self.columns[path], x.flatten(0, -2).contiguous()
        values_TXO = self.values[path].to(x.dtype)
        written_out = len(values_TXO) * columns_XO.shape[1] * x.shape[-1]
        num_picked = len(x_NI) * columns_XO.numel()
        # With gradients never: those of picking are sums in no fixed order on a GPU.
        if num_picked < min(written_out, _AT_ONCE) and not torch.is_grad_enabled():
            out_NO = _picked(x_NI, values_TXO, columns_XO, self.ends)
        else:
            products = segments_of_whole(x_NI, columns_XO.shape[1], len(values_TXO), self.ends)
            out_NO = _SparseProduct.apply(products, x_NI, values_TXO, columns_XO)
        return out_NO.unflatten(0, x.shape[:-1])

    def rows(self, index: Tensor) -> "SparseAdapter":
        values = {path: values_TXO[index] for path, values_TXO in self.values.items()}
        return replace(self, values=values, ends=None)

    def beside(self, other: Adapter) -> "SparseAdapter":
        assert isinstance(other, SparseAdapter)
        values = {path: torch.cat([one, other.values[path]]) for path, one in self.values.items()}
        return replace(self, values=values, ends=None)

    def over(self, offsets: Tensor | None) -> "SparseAdapter":
        return replace(self, ends=None if offsets is None else TaskEnds(offsets))

    def for_rows(self, counts: Sequence[int]) -> "SparseAdapter":
        """See `Adapter`."""
        device = next(iter(self.values.values())).device
        return replace(self, ends=TaskEnds.of_rows(counts, device))

    def prepared(self, dtype: torch.dtype) -> "SparseAdapter":
        values = {path: values_TXO.to(dtype) for path, values_TXO in self.values.items()}
        return replace(self, values=values)

    def tensors(self) -> dict[str, Tensor]:
        """The numbers of each site."""
        return dict(self.values)

    def update_norms(self) -> dict[str, float]:
        """See `Adapter`."""
        return {path: float(values_TXO.norm()) for path, values_TXO in self.values.items()}

    def distance(self, other: Adapter) -> Tensor:
        """By the numbers: the places are the same."""
        assert isinstance(other, SparseAdapter)
        total = norm = torch.zeros(())
        for path, values_TXO in self.values.items():
            theirs_1XO = other.values[path]
            total = total + (values_TXO - theirs_1XO).square().sum((1, 2))
            norm = norm + theirs_1XO.square().sum()
        return total / norm.clamp(min=1e-12)


def laid_out(values: Tensor, num_outputs: int) -> Tensor:
    """Numbers (..., X), the first weight of every output before the second ones, as (..., weights
    of an output, O): where some outputs have one weight less, a last one stays zero, at a place of
    its own."""
    padded = nn.functional.pad(values, (0, -values.shape[-1] % num_outputs))
    return padded.unflatten(-1, (-1, num_outputs))


def _picked(x_NI: Tensor, values_TXO: Tensor, columns_XO: Tensor, ends: TaskEnds | None) -> Tensor:
    """Each token times the weights of its task's delta, (N, O); memory for one number a weight and
    token."""
    if ends is not None:
        token_N = torch.arange(len(x_NI), device=x_NI.device)
        ends_T = ends.among(len(x_NI)).offsets_T
        values_TXO = values_TXO[torch.searchsorted(ends_T, token_N, right=True)]
    inputs = x_NI.index_select(1, columns_XO.flatten())
    inputs = inputs.view(len(values_TXO), -1, *columns_XO.shape)
    return inputs.mul_(values_TXO[:, None]).sum(2).flatten(0, 1)


class _SparseProduct(torch.autograd.Function):
    """Each token times its task's delta, (N, O), with gradients. Kept for the backward pass are the
    tokens and the numbers alone: a delta is written out once more."""

    @staticmethod
    def forward(
        ctx: Any, products: Segments, x_NI: Tensor, values_TXO: Tensor, columns_XO: Tensor
    ) -> Tensor:
        ctx.products = products
        ctx.save_for_backward(x_NI, values_TXO, columns_XO)
        out_NO = x_NI.new_empty(len(x_NI), columns_XO.shape[1])
        for outputs in _pieces(x_NI, values_TXO):
            delta_TIO = _written_out(x_NI, values_TXO, columns_XO, outputs)
            out_NO[:, outputs] = products.times(x_NI, delta_TIO)
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, values_TXO, columns_XO = ctx.saved_tensors
        _, wants_x, wants_values, _ = ctx.needs_input_grad
        grad_NI = torch.zeros_like(x_NI) if wants_x else None
        grad_TXO = torch.empty_like(values_TXO) if wants_values else None
        for outputs in _pieces(x_NI, values_TXO):
            own_NO = grad_NO[:, outputs].contiguous()
            if grad_NI is not None:
                delta_TIO = _written_out(x_NI, values_TXO, columns_XO, outputs)
                ctx.products.add_times(grad_NI, own_NO, delta_TIO.mT)
                del delta_TIO
            if grad_TXO is not None:
                whole_TIO = ctx.products.outer(x_NI, own_NO)
                places = columns_XO[:, outputs].expand(len(whole_TIO), -1, -1)
                grad_TXO[:, :, outputs] = whole_TIO.gather(1, places)
        return None, grad_NI, grad_TXO, None


def _pieces(x_NI: Tensor, values_TXO: Tensor) -> Iterator[slice]:
    """The outputs whose deltas are written out at once; a multiple of 8 of them, as grouped
    products take them."""
    num_tasks, _, num_outputs = values_TXO.shape
    size = max(8, _AT_ONCE // (num_tasks * x_NI.shape[1]) // 8 * 8)
    for start in range(0, num_outputs, size):
        yield slice(start, min(start + size, num_outputs))


def _written_out(x_NI: Tensor, values_TXO: Tensor, columns_XO: Tensor, outputs: slice) -> Tensor:
    """The deltas' rows of some outputs, transposed: (T, I, those outputs)."""
    values_TXO, columns_XO = values_TXO[:, :, outputs], columns_XO[:, outputs]
    num_tasks, _, num_outputs = values_TXO.shape
    whole_TIO = values_TXO.new_zeros(num_tasks, x_NI.shape[1], num_outputs)
    return whole_TIO.scatter_(1, columns_XO.expand(num_tasks, -1, -1), values_TXO)


def draw_columns(path: str, size: tuple[int, int], count: int) -> Tensor:
    """The inputs of the weights that move, (weights of an output, O), on the CPU.

    More of them begin with the same ones.

    Args:
        path: module path of the linear.
        size: its inputs and outputs.
        count: of weights, of I x O at most.
    """
    num_in, num_out = size
    generator = keyed_generator(f"sparse {path} {num_in} {num_out}")
    order_I, shift_I = (torch.randperm(num_in, generator=generator, device="cpu") for _ in "ab")
    shift_X1 = shift_I[: math.ceil(count / num_out), None]
    return order_I[(torch.arange(num_out, device="cpu") + shift_X1) % num_in]


def places_of(columns_XO: Tensor, count: int) -> Tensor:
    """Output and input of each of `count` weights, (2, X), in the order of their numbers."""
    output_X = torch.arange(count, device=columns_XO.device) % columns_XO.shape[1]
    return torch.stack([output_X, columns_XO.flatten()[:count]])


def sites_of_last_blocks(target: Target, num_blocks: int | None) -> Sites:
    """The sites in the last blocks of each stack; None: in all.

    Raises:
        UserError: a stack has fewer.
    """
    if num_blocks is None:
        return target.sites
    stacks: dict[str, list[str]] = {}
    for block in target.blocks:
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    fewest = min(map(len, stacks.values()))
    if num_blocks > fewest:
        raise UserError(
            f"model.hypernetwork.num_blocks ({num_blocks}): the Task LLM has {fewest} blocks in a "
            "row: give no more than these, or null for all"
        )
    last = tuple(f"{block}." for blocks in stacks.values() for block in blocks[-num_blocks:])
    return {path: size for path, size in target.sites.items() if path.startswith(last)}


@dataclass(frozen=True)
class SparseExport(Export):
    """A SHiRA folder of `peft`: values are module path -> (X,), in the order of `places_of`;
    columns as an adapter's."""

    values: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    sites: Sites

    def live(self) -> SparseAdapter:
        """See `Export`."""
        sizes = {path: size[1] for path, size in self.sites.items()}
        values = {path: laid_out(one[None], sizes[path]) for path, one in self.values.items()}
        return SparseAdapter(values, self.columns)

    @property
    def rank(self) -> int:
        """`peft`'s r, one for all: a folder has r (I + O) weights of each linear."""
        return max(math.ceil(len(one) / sum(self.sites[p])) for p, one in self.values.items())

    def write(self, part: Path, base: str, lm: Any) -> None:
        """See `Export`. Raises UserError where `peft` takes no such adapter."""
        modules = lm.named_modules()
        others = {path.removesuffix(".base") for path, m in modules if isinstance(m, Conv1D)}
        if transposed := others & self.values.keys():
            raise UserError(
                f"deduce: peft's SHiRA takes no Conv1D, which {type(lm).__name__}'s "
                f"{min(transposed)} is; `ship-ds answer` applies this run's adapters"
            )
        entries = {path: self._entries(path) for path in self.values}
        write_sparse(part, SparseUpdate(entries, _shapes(self.sites)), self.rank, base, lm.config)

    def _entries(self, path: str) -> tuple[Tensor, Tensor]:
        """Places and numbers, with zeros at further places up to as many as `peft` has."""
        size, values_X = self.sites[path], self.values[path]
        count = self.rank * sum(size)
        if count > math.prod(size):
            raise UserError(
                f"deduce: peft's SHiRA has r x (in + out) weights of each linear, with one r for "
                f"all, here {self.rank}, and {path} ({size[0]} -> {size[1]}) has not so many; "
                "`ship-ds answer` applies this run's adapters"
            )
        places = places_of(draw_columns(path, size, count), count)
        return places, nn.functional.pad(values_X, (0, count - len(values_X)))

    def shape(self) -> str:
        """See `Export`."""
        count = sum(map(len, self.values.values()))
        return f"sparse delta (SHiRA), {count} weights of {len(self.values)} linears"

    @classmethod
    def summed(
        cls, parts: Sequence[tuple[float, Any]], rank: int | None
    ) -> tuple[Export, int, float]:
        """Exact: the places are the same. Raises UserError where a rank is asked for."""
        first = parts[0][1]
        if rank is not None:
            raise UserError(
                f"--rank {rank}: {first.shape()}: a sum changes the same weights as its parts, and "
                "there is nothing to compress; leave it out"
            )
        values = {
            path: torch.stack([weight * one.values[path] for weight, one in parts]).sum(0)
            for path in first.values
        }
        return replace(first, values=values), first.rank, 0.0


def _shapes(sites: Sites) -> dict[str, tuple[int, int]]:
    """Module path -> (O, I), as weights lie."""
    return {path: (num_out, num_in) for path, (num_in, num_out) in sites.items()}


class DeltaHypernetwork(Hypernetwork):
    """What makes the numbers of chosen weights, by whatever way."""

    leaves: ClassVar = "shira"

    def add_places(self, sites: Sites, counts: Mapping[str, int]) -> None:
        """Draw the places. A subclass calls it once.

        Args:
            sites: those that change.
            counts: how many weights of each.
        """
        self.sites, self.counts = sites, counts
        for number, path in enumerate(sites):
            # Where the parameters are made: for the planner that is the meta device.
            columns_XO = draw_columns(path, sites[path], counts[path]).to(torch.empty(0).device)
            self.register_buffer(f"columns_{number}", columns_XO, persistent=False)

    def columns(self) -> dict[str, Tensor]:
        """Module path -> inputs of the weights of each output."""
        return {path: self.get_buffer(f"columns_{n}") for n, path in enumerate(self.sites)}

    @abstractmethod
    def forward(self, latent_TZ: Tensor) -> SparseAdapter:
        """See `Hypernetwork`."""

    @staticmethod
    def targets(config: Any) -> tuple[str, ...]:
        """See `Hypernetwork`."""
        names: tuple[str, ...] = config.targets
        return names

    def products_after(self) -> Mapping[str, int]:
        """See `Hypernetwork`: one a weight, however it is computed."""
        return self.counts

    def exports(self, adapter: SparseAdapter) -> list[Export]:
        """See `Hypernetwork`."""
        values = self.numbers(adapter)
        return [
            SparseExport({p: one[task] for p, one in values.items()}, adapter.columns, self.sites)
            for task in range(adapter.num_tasks)
        ]

    def numbers(self, adapter: SparseAdapter) -> dict[str, Tensor]:
        """Module path -> (T, X), without the zeros of `laid_out`."""
        return {p: adapter.values[p].flatten(1)[:, :count] for p, count in self.counts.items()}

    def adapter(self, values: Mapping[str, Tensor]) -> SparseAdapter:
        """The value of numbers (T, X) of each site."""
        laid = {path: laid_out(values[path], self.sites[path][1]) for path in self.sites}
        return SparseAdapter(laid, self.columns())

    def read(self, folder: Path, lm: Any) -> SparseAdapter:
        """See `Hypernetwork`: of this run's places, in whatever order."""
        update = read_sparse(folder, _shapes(self.sites).get)
        values = {path: torch.zeros(1, count) for path, count in self.counts.items()}
        values |= {path: self._read_values(folder, update, path) for path in update.entries}
        device = self.get_buffer("columns_0").device
        return self.adapter({path: one.to(device) for path, one in values.items()})

    def _read_values(self, folder: Path, update: SparseUpdate, path: str) -> Tensor:
        """The numbers (1, X) of one linear."""
        delta_OI = update.delta(path)
        columns_XO = draw_columns(path, self.sites[path], self.counts[path])
        values_1X = delta_OI[tuple(places_of(columns_XO, self.counts[path]))][None]
        if values_1X.count_nonzero() < delta_OI.count_nonzero():
            raise UserError(
                f"{folder}: {path}: changes weights that this run's adapters leave as they are: "
                "it was made by another run, with other places"
            )
        return values_1X


class SparseHypernetwork(DeltaHypernetwork, TrunkHypernetwork):
    """z and the learned embedding of a site -> MLP -> its numbers, by one linear for the sites of
    one shape: as many as a LoRA of that rank has, R (I + O) a linear (SHiRA)."""

    def __init__(self, config: SparseHypernetworkConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        sites = sites_of_last_blocks(target, config.num_blocks)
        self.add_places(sites, {path: _count(path, sites[path], config.rank) for path in sites})
        self.groups = [list(group) for group in LoraHead.groups(sites)]
        heads = [nn.Linear(config.width, self.counts[group[0]]) for group in self.groups]
        for head in heads:
            # Step 0 is the base model. The features are not zero, so these get a gradient.
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.add_trunk(latent_size, config, [len(group) for group in self.groups])
        self.heads = nn.ModuleList(heads)

    def forward(self, latent_TZ: Tensor) -> SparseAdapter:
        from_latent_T1D = self.project(latent_TZ)
        values: dict[str, Tensor] = {}
        for number, (paths, head) in enumerate(zip(self.groups, self.heads, strict=True)):
            places_JD = self.embeddings(number, len(paths), latent_TZ.device)
            values_TJX = head(self.run_trunk(from_latent_T1D + places_JD))
            laid = laid_out(values_TJX, self.sites[paths[0]][1])
            values |= zip(paths, laid.unbind(1), strict=True)
        return SparseAdapter({path: values[path] for path in self.sites}, self.columns())

    def head_modules(self) -> list[nn.Module]:
        return list(self.heads)

    def num_products(self) -> int:
        """See `Hypernetwork`: trunk and head run once for each site."""
        pairs = zip(self.groups, self.heads, strict=True)
        of_sites = (len(paths) * (num_products(self.trunk) + num_products(h)) for paths, h in pairs)
        return num_products(self.from_latent) + sum(of_sites)


def _count(path: str, size: tuple[int, int], rank: int) -> int:
    """R (I + O). Raises UserError where the linear has fewer weights."""
    count = rank * sum(size)
    if count > math.prod(size):
        raise UserError(
            f"model.hypernetwork.rank ({rank}): that is {count} weights, and {path} has "
            f"{math.prod(size)}: give at most {math.prod(size) // sum(size)}, or other targets"
        )
    return count


class ScatterHypernetwork(DeltaHypernetwork):
    """z itself, spread over the linears by their sizes: the published "delta" fusion (arXiv
    2502.02315). No weights."""

    def __init__(self, config: ScatterHypernetworkConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        sites = sites_of_last_blocks(target, config.num_blocks)
        counts = self._counts(sites, latent_size)
        self.scale = config.scale
        self.add_places({path: sites[path] for path in counts}, counts)

    @staticmethod
    def _counts(sites: Sites, latent_size: int) -> dict[str, int]:
        return weights_per_site(
            latent_size, {path: math.prod(size) for path, size in sites.items()}
        )

    @classmethod
    def check(cls, config: ScatterHypernetworkConfig, latent_size: int, target: Target) -> None:
        """See `Hypernetwork`."""
        cls._counts(sites_of_last_blocks(target, config.num_blocks), latent_size)

    def forward(self, latent_TZ: Tensor) -> SparseAdapter:
        parts = (self.scale * latent_TZ).split(list(self.counts.values()), 1)
        return self.adapter(dict(zip(self.counts, parts, strict=True)))

    def latent_of(self, adapter: SparseAdapter) -> Tensor:
        """The numbers are z."""
        return torch.cat(list(self.numbers(adapter).values()), 1)[0] / self.scale


def weights_per_site(latent_size: int, num_weights: Mapping[str, int]) -> dict[str, int]:
    """How many numbers of z each linear gets, by its size: those without any are left out.

    Raises:
        UserError: there are more numbers than weights.
    """
    total = sum(num_weights.values())
    if latent_size > total:
        raise UserError(
            f"model.latent_size ({latent_size}): z is put on weights of the Task LLM, and the "
            f"chosen linears have {total}: give at most these, or more num_blocks or targets"
        )
    counts: dict[str, int] = {}
    done = before = 0
    for path, size in num_weights.items():
        before += size
        # Of the sum so far, so that the roundings make up for each other and all is used.
        counts[path] = latent_size * before // total - done
        done += counts[path]
    return {path: count for path, count in counts.items() if count}
