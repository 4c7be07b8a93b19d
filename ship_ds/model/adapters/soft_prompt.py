"""Soft prompts (Lester et al. 2021): z -> embeddings before every prompt, by an MLP or as they are.

Letters: T tasks, Z latent size, P virtual tokens, H hidden size, R LoRA rank,
X other letters flattened.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ship_ds.config import ReshapeHypernetworkConfig, SoftPromptHypernetworkConfig
from ship_ds.errors import UserError
from ship_ds.lora_folder import read_soft_prompt, write_soft_prompt
from ship_ds.model.adapters.adapter import Adapter, Export, Hypernetwork, Target, num_products
from ship_ds.model.reshape import check_reshape


@dataclass(frozen=True)
class SoftPrompt(Adapter):
    """Embeddings that precede the prompt (Lester et al. 2021): prompt_TPH."""

    prompt_TPH: Tensor

    @property
    def num_tasks(self) -> int:
        return len(self.prompt_TPH)

    def virtual_tokens(self) -> Tensor | None:
        return self.prompt_TPH

    def rows(self, index: Tensor) -> "SoftPrompt":
        return SoftPrompt(self.prompt_TPH[index])

    def beside(self, other: Adapter) -> "SoftPrompt":
        assert isinstance(other, SoftPrompt)
        return SoftPrompt(torch.cat([self.prompt_TPH, other.prompt_TPH]))

    def tensors(self) -> dict[str, Tensor]:
        """The embeddings."""
        return {"prompt": self.prompt_TPH}

    def distance(self, other: Adapter) -> Tensor:
        """By the embeddings."""
        assert isinstance(other, SoftPrompt)
        difference_TPH = self.prompt_TPH - other.prompt_TPH
        norm = other.prompt_TPH.square().sum().clamp(min=1e-12)
        return difference_TPH.square().sum((1, 2)) / norm


@dataclass(frozen=True)
class SoftPromptExport(Export):
    """A prompt-tuning folder of `peft`."""

    prompt_PH: Tensor

    def live(self) -> SoftPrompt:
        """See `Export`."""
        return SoftPrompt(self.prompt_PH[None])

    def write(self, part: Path, base: str, lm: Any) -> None:
        """See `Export`."""
        write_soft_prompt(part, self.prompt_PH, base, lm.config)

    def shape(self) -> str:
        """See `Export`."""
        return f"soft prompt, {self.prompt_PH.shape[0]} virtual tokens"


def read_prompt(folder: Path, shape: tuple[int, int], device: torch.device) -> SoftPrompt:
    """A prompt-tuning folder of `peft` as the adapter of one task.

    Args:
        folder: as `peft` or `ship-ds deduce` writes it.
        shape: the run's virtual tokens and its base's hidden size.
        device: where the embeddings go.

    Raises:
        UserError: it is none, or has another shape.
    """
    prompt_PH = read_soft_prompt(folder)
    if tuple(prompt_PH.shape) != shape:
        raise UserError(
            f"{folder}: prompt_embeddings: {prompt_PH.shape[0]} virtual tokens of "
            f"{prompt_PH.shape[1]} numbers, and this run's have {shape[0]} of {shape[1]} "
            "(model.hypernetwork.num_virtual_tokens)"
        )
    return SoftPrompt(prompt_PH[None].to(device))


def basis_of(rank: int | None, hidden_size: int) -> nn.Module:
    """What makes virtual tokens of the numbers that a head gives of each: of R numbers by a learned
    matrix (R, H), with which they are as large as whole ones; None: they are whole."""
    if rank is None:
        return nn.Identity()
    basis = nn.Linear(rank, hidden_size, bias=False)
    nn.init.normal_(basis.weight, std=1 / math.sqrt(rank))
    return basis


class SoftPromptHypernetwork(Hypernetwork):
    """z -> MLP -> P embeddings before the prompt, whole or as the product of P x R numbers and a
    learned matrix R x H (Decomposed Prompt Tuning, Xiao et al. 2023, arXiv 2310.10094)."""

    leaves: ClassVar = "prompt"

    def __init__(
        self, config: SoftPromptHypernetworkConfig, latent_size: int, target: Target
    ) -> None:
        super().__init__()
        hidden_size = target.hidden_size
        self.num_virtual_tokens: int = config.num_virtual_tokens
        self.hidden_size = hidden_size
        made = hidden_size if config.rank is None else config.rank
        self.layers = nn.Sequential(
            nn.Linear(latent_size, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.num_virtual_tokens * made),
        )
        self.basis = basis_of(config.rank, hidden_size)

    def forward(self, latent_TZ: Tensor) -> SoftPrompt:
        made_TX = self.layers(latent_TZ.to(next(self.layers.parameters()).dtype))
        return SoftPrompt(self.basis(made_TX.unflatten(1, (self.num_virtual_tokens, -1))))

    def head_modules(self) -> list[nn.Module]:
        return [self.layers[-1], self.basis]

    def num_products(self) -> int:
        """See `Hypernetwork`."""
        return num_products(self.layers) + self.num_virtual_tokens * num_products(self.basis)

    def exports(self, adapter: SoftPrompt) -> list[Export]:
        """See `Hypernetwork`."""
        return [SoftPromptExport(prompt_PH) for prompt_PH in adapter.prompt_TPH]

    def read(self, folder: Path, lm: Any) -> SoftPrompt:
        """See `read_prompt`."""
        device = next(self.layers.parameters()).device
        return read_prompt(folder, (self.num_virtual_tokens, self.hidden_size), device)


class ReshapeHypernetwork(Hypernetwork):
    """z itself, cut into P embeddings before the prompt: the published "p-tuning" fusion (arXiv
    2502.02315). No weights."""

    leaves: ClassVar = "prompt"

    def __init__(self, config: ReshapeHypernetworkConfig, latent_size: int, target: Target) -> None:
        super().__init__()
        self.num_virtual_tokens: int = config.num_virtual_tokens
        self.hidden_size = target.hidden_size

    @classmethod
    def check(cls, config: ReshapeHypernetworkConfig, latent_size: int, target: Target) -> None:
        """See `Hypernetwork`."""
        check_reshape(
            "model.hypernetwork.num_virtual_tokens",
            config.num_virtual_tokens,
            latent_size,
            target.hidden_size,
        )

    def forward(self, latent_TZ: Tensor) -> SoftPrompt:
        return SoftPrompt(latent_TZ.unflatten(1, (self.num_virtual_tokens, -1)))

    def exports(self, adapter: SoftPrompt) -> list[Export]:
        """See `Hypernetwork`."""
        return [SoftPromptExport(prompt_PH) for prompt_PH in adapter.prompt_TPH]

    def read(self, folder: Path, lm: Any) -> SoftPrompt:
        """See `read_prompt`."""
        shape = self.num_virtual_tokens, self.hidden_size
        return read_prompt(folder, shape, next(lm.parameters()).device)

    def latent_of(self, adapter: SoftPrompt) -> Tensor:
        """The prompt is z."""
        return adapter.prompt_TPH[0].flatten()
