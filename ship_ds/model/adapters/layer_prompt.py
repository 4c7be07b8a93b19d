"""Prompts in every block: z -> hidden states before each block's input, of which the block's own
frozen projections make keys and values (IAPT, Zhu et al. 2024, arXiv 2405.18203).

    z (+) block --trunk, head--> hidden states --the block's norm, k_proj, v_proj--> a prefix

What the block would compute at these places besides, their queries and their way through its MLP,
nobody reads: the next block has prompts of its own. So they are made into a prefix once a task, and
from there on this is the kind `prefix`, whose keys and values are drawn from what the base can say.
They stand at the positions right before the prompt's first, as real tokens would, and other parts
of a combination do not change them.

IAPT has a generator in each block: it reads the block's own states of the instruction, gathers them
by learned queries, and has a bottleneck with an activation of its own that is learned. Here the
encoder's last layer is read (with a query a block by `model.encoder.pooling` and
`latent: by_layer`), z is between, and trunk and head are one for all blocks, which a learned
embedding tells apart.

Letters: T tasks, U features of a group, P virtual tokens, H hidden size, R LoRA rank, X other
letters flattened.
"""

from collections.abc import Callable, Iterable
from typing import ClassVar

from torch import Tensor, nn

from ship_ds.config import LayerPromptHypernetworkConfig
from ship_ds.model.adapters.adapter import Target, num_products
from ship_ds.model.adapters.prefix import OneHeadHypernetwork
from ship_ds.model.adapters.soft_prompt import basis_of


class Projection(nn.Module):
    """Prompts of one place to its keys and values.

    A module of its own, with a tensor in and a tensor out: ZeRO-3 gathers a block when it is called
    as a whole, and here parts of it are. DeepSpeed takes weights that are read outside their module
    for those of the module that runs, and gathers them for its backward pass by a hook on its
    output; the hypernetwork has none that is a tensor.
    """

    def __init__(self, project: Callable[[str, Tensor], Tensor], place: str) -> None:
        super().__init__()
        self.project, self.place = project, place

    def forward(self, prompts_TPH: Tensor) -> Tensor:
        return self.project(self.place, prompts_TPH)


class LayerPromptHypernetwork(OneHeadHypernetwork):
    """A head that gives hidden states, whole or as P x R numbers for a learned matrix."""

    needs: ClassVar = ("adapters", "prefix", "projection")

    def __init__(
        self, config: LayerPromptHypernetworkConfig, latent_size: int, target: Target
    ) -> None:
        super().__init__()
        made = target.hidden_size if config.rank is None else config.rank
        head = nn.Linear(config.width, config.length * made)
        # States of about unit size: a norm comes next, and of small ones its gradient is large.
        nn.init.normal_(head.weight)
        nn.init.zeros_(head.bias)
        basis = basis_of(config.rank, target.hidden_size)
        self.add_places(config, latent_size, target)
        self.head, self.basis = head, basis
        assert target.project is not None
        self.projections = nn.ModuleList(Projection(target.project, place) for place in self.places)
        num_heads, head_size = target.heads
        self.products_of_place = config.length * target.hidden_size * 2 * num_heads * head_size

    def keys_and_values(self, made_TUX: Tensor) -> Iterable[Tensor]:
        """See `OneHeadHypernetwork`."""
        prompts_TUPH: Tensor = self.basis(made_TUX.unflatten(2, (self.prefix_length, -1)))
        places = zip(self.projections, prompts_TUPH.unbind(1), strict=True)
        return (project(prompts_TPH) for project, prompts_TPH in places)

    def num_products(self) -> int:
        """See `Hypernetwork`: the learned matrix is used once for each prompt."""
        num_prompts = len(self.places) * self.prefix_length
        return super().num_products() + num_prompts * num_products(self.basis)

    def products_of_base(self) -> int:
        """See `Hypernetwork`: a key and a value of each prompt."""
        return len(self.places) * self.products_of_place

    def head_modules(self) -> list[nn.Module]:
        return [self.head, self.basis]
