"""The heads of a hypernetwork of LoRAs: the trunk's features -> A and B of a group of sites.

Each head says how many embeddings its sites need. One factor starts at exactly zero, B where
nothing else is said, the other one as `peft` starts A.

Letters: T tasks, D hypernetwork width, J sites of a group, U features of a group, R LoRA rank,
I inputs of a linear, O outputs of a linear, X other letters flattened.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ship_ds.model.adapters.adapter import Sites

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module path -> (a_TRI, b_TOR)."""
Factor = Literal["a", "b"]


class LoraHead(nn.Module, ABC):
    """Makes the factors of one group of sites; made from (width, rank, those sites, the factor that
    starts at zero)."""

    num_embeddings: int
    """How many embeddings tell the group's features apart."""
    places: Sequence[str]
    """Module path of a site that each feature is of, U of them."""

    @staticmethod
    def groups(sites: Sites) -> list[Sites]:
        """All sites parted into those that one head serves: here, those of one (in, out) shape."""
        return [
            {path: sites[path] for path in sites if sites[path] == shape}
            for shape in sorted(set(sites.values()))
        ]

    def units(self, embeddings_JD: Tensor) -> Tensor:
        """What each feature stands for, (U, D), from the group's embeddings."""
        return embeddings_JD

    @property
    def num_features(self) -> int:
        """U."""
        return self.num_embeddings

    def products_of_factors(self) -> int:
        """Multiplications that make one task's A and B of what its linears gave. For FLOPs."""
        return 0

    @abstractmethod
    def factors(self, features_TUD: Tensor) -> Factors:
        """A and B of each of the group's sites, from the features (T, U, D).

        Not `forward`: of a module that is called ZeRO-3 looks for the weights once more for each
        tensor that it returned, two a site. The linears inside are called.
        """


class ShapeHead(LoraHead):
    """`per_module`: all ranks of A and B of a site from one feature; shared by the sites of one
    shape."""

    def __init__(self, width: int, rank: int, sites: Sites, zero: Factor) -> None:
        super().__init__()
        self.paths, self.num_embeddings = list(sites), len(sites)
        self.places = self.paths
        self.rank, (self.num_in, self.num_out) = rank, next(iter(sites.values()))
        self.to_a = nn.Linear(width, rank * self.num_in)
        self.to_b = nn.Linear(width, rank * self.num_out)
        started, bound = _zero_one(self, zero, rank, self.num_in)
        nn.init.normal_(started.weight, std=0.2 * bound)
        nn.init.uniform_(started.bias, -bound, bound)

    def factors(self, features_TUD: Tensor) -> Factors:
        a_TJRI = self.to_a(features_TUD).unflatten(2, (self.rank, self.num_in))
        b_TJOR = self.to_b(features_TUD).unflatten(2, (self.num_out, self.rank))
        return _by_path(self.paths, a_TJRI, b_TJOR)


class LayerHead(LoraHead):
    """`per_layer`: A and B of every module of one layer from one feature; no layer shares it, so it
    is the largest."""

    def __init__(self, width: int, rank: int, sites: Sites, zero: Factor) -> None:
        super().__init__()
        self.num_embeddings, self.places = 1, list(sites)[:1]
        self.parts = nn.ModuleList(
            ShapeHead(width, rank, {path: shape}, zero) for path, shape in sites.items()
        )

    @staticmethod
    def groups(sites: Sites) -> list[Sites]:
        layers: dict[str, dict[str, tuple[int, int]]] = {}
        for path, shape in sites.items():
            layer = re.match(r".*?\.\d+(?=\.)", path)
            layers.setdefault(layer[0] if layer else "", {})[path] = shape
        return list(layers.values())

    def factors(self, features_TUD: Tensor) -> Factors:
        made: Factors = {}
        for part in self.parts:
            assert isinstance(part, ShapeHead)
            made |= part.factors(features_TUD)
        return made


class RankHead(LoraHead):
    """`per_rank`: one row of A and one column of B from one feature, which a learned rank embedding
    tells apart; smallest."""

    def __init__(self, width: int, rank: int, sites: Sites, zero: Factor) -> None:
        super().__init__()
        self.paths, self.num_embeddings, self.rank = list(sites), len(sites), rank
        self.places = [path for path in sites for _ in range(rank)]
        num_in, num_out = next(iter(sites.values()))
        self.rank_embedding = nn.Embedding(rank, width)
        self.to_a = nn.Linear(width, num_in)
        self.to_b = nn.Linear(width, num_out)
        started, bound = _zero_one(self, zero, rank, num_in)
        # All variance is in the weight: a bias, shared by the ranks, would make them alike.
        nn.init.normal_(started.weight, std=bound / math.sqrt(3))
        nn.init.zeros_(started.bias)

    @property
    def num_features(self) -> int:
        return self.num_embeddings * self.rank

    def units(self, embeddings_JD: Tensor) -> Tensor:
        """Before the trunk: behind it, two linear maps would give all ranks the same dependence on
        z."""
        ranks_RD = self.rank_embedding(torch.arange(self.rank, device=embeddings_JD.device))
        return (embeddings_JD[:, None] + ranks_RD).flatten(0, 1)

    def factors(self, features_TUD: Tensor) -> Factors:
        a_TJRI = self.to_a(features_TUD).unflatten(1, (-1, self.rank))
        b_TJOR = self.to_b(features_TUD).unflatten(1, (-1, self.rank)).transpose(2, 3)
        return _by_path(self.paths, a_TJRI, b_TJOR)


class CoreHead(LoraHead):
    """A and B of each site are learned, one for all tasks, and z gives what stands between them: B
    times the core is the task's B (Zhyper, Abdalla et al. 2025, arXiv 2510.19733). A site's feature
    becomes R or R x R numbers in place of R x (I + O)."""

    def __init__(self, width: int, rank: int, sites: Sites, zero: Factor) -> None:
        super().__init__()
        assert zero == "b", "the config refuses the other"
        self.paths, self.num_embeddings = list(sites), len(sites)
        self.places = self.paths
        self.rank, (self.num_in, self.num_out) = rank, next(iter(sites.values()))
        # Modules, as `Hypernetwork` says why; a row is a site's whole matrix.
        self.a = nn.Embedding(len(sites), rank * self.num_in)
        self.b = nn.Embedding(len(sites), rank * self.num_out)
        self.to_core = nn.Linear(width, self.core_size(rank))
        nn.init.uniform_(self.a.weight, -1 / math.sqrt(self.num_in), 1 / math.sqrt(self.num_in))
        # Not zero beside a core that is: neither would ever get a gradient. And so large that a
        # task's B moves as fast as one that is generated, of which Adam moves each number as far as
        # one of the core.
        nn.init.normal_(self.b.weight, std=math.sqrt(rank / self.core_size(rank)))
        _zero(self.to_core)

    @staticmethod
    @abstractmethod
    def core_size(rank: int) -> int:
        """Numbers of a core."""

    @abstractmethod
    def times_core(self, b_JOR: Tensor, core_TJX: Tensor) -> Tensor:
        """B of each site times its task's core, (T, J, O, R)."""

    def factors(self, features_TUD: Tensor) -> Factors:
        sites = torch.arange(len(self.paths), device=features_TUD.device)
        a_JRI = self.a(sites).unflatten(1, (self.rank, self.num_in))
        b_JOR = self.b(sites).unflatten(1, (self.num_out, self.rank))
        a_TJRI = a_JRI.expand(len(features_TUD), -1, -1, -1)
        return _by_path(self.paths, a_TJRI, self.times_core(b_JOR, self.to_core(features_TUD)))


class DiagonalHead(CoreHead):
    """`diagonal`: a weight of each rank."""

    @staticmethod
    def core_size(rank: int) -> int:
        return rank

    def times_core(self, b_JOR: Tensor, core_TJX: Tensor) -> Tensor:
        return b_JOR * core_TJX[:, :, None]


class SquareHead(CoreHead):
    """`square`: a matrix between the ranks of A and those of B."""

    @staticmethod
    def core_size(rank: int) -> int:
        return rank * rank

    def times_core(self, b_JOR: Tensor, core_TJX: Tensor) -> Tensor:
        return b_JOR @ core_TJX.unflatten(2, (self.rank, self.rank))

    def products_of_factors(self) -> int:
        return self.num_embeddings * self.num_out * self.rank**2


def _by_path(paths: list[str], a_TJRI: Tensor, b_TJOR: Tensor) -> Factors:
    """Each site's A and B. The gradient of unbind is one stack; that of indexing would be a tensor
    of all sites for every one of them."""
    return dict(zip(paths, zip(a_TJRI.unbind(1), b_TJOR.unbind(1), strict=True), strict=True))


def _zero_one(
    head: "ShapeHead | RankHead", zero: Factor, rank: int, num_in: int
) -> tuple[nn.Linear, float]:
    """Set what makes one factor to zero.

    Returns:
        What makes the other, to be drawn, and the bound of that factor's numbers as `peft` draws
        them: 1 / sqrt(inputs of the linear that the factor is), I of A and R of B.
    """
    if zero == "b":
        _zero(head.to_b)
        return head.to_a, 1 / math.sqrt(num_in)
    _zero(head.to_a)
    return head.to_b, 1 / math.sqrt(rank)


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


HeadClass = (
    type[ShapeHead] | type[LayerHead] | type[RankHead] | type[DiagonalHead] | type[SquareHead]
)
HEADS: Mapping[str, HeadClass] = {
    "per_module": ShapeHead,
    "per_layer": LayerHead,
    "per_rank": RankHead,
    "diagonal": DiagonalHead,
    "square": SquareHead,
}
