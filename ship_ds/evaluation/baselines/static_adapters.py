"""Adapters that are themselves the trained weights, for one task or for many at once.

Letters: T tasks, R LoRA rank, I inputs of a linear, O outputs of a linear, P virtual tokens,
H hidden size.
"""

import math

import torch
from torch import Tensor, nn

from ship_ds.config import LoraHypernetworkConfig
from ship_ds.model.adapters.adapter import Sites
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.adapters.soft_prompt import SoftPrompt


class TaskLoras(nn.Module):
    """The LoRAs of T tasks, started as `peft` does (A uniform, B zero), with the same A for
    all, so that distances between them are of what they learnt."""

    def __init__(self, sites: Sites, config: LoraHypernetworkConfig, num_tasks: int = 1) -> None:
        super().__init__()
        self.paths, self.scaling = list(sites), config.alpha / config.rank
        self.a = nn.ParameterList()
        self.b = nn.ParameterList()
        for num_in, num_out in sites.values():
            bound = 1 / math.sqrt(num_in)
            first_RI = torch.empty(config.rank, num_in).uniform_(-bound, bound)
            self.a.append(first_RI.repeat(num_tasks, 1, 1))
            self.b.append(torch.zeros(num_tasks, num_out, config.rank))

    @torch.no_grad()
    def start_at(self, adapter: LoraAdapter) -> None:
        """Copy the factors of an adapter of one task, of the same sites and rank, into every
        task's."""
        for path, a_TRI, b_TOR in zip(self.paths, self.a, self.b, strict=True):
            from_a_1RI, from_b_1OR = adapter.factors[path]
            a_TRI.copy_(from_a_1RI.expand_as(a_TRI))
            b_TOR.copy_(from_b_1OR.expand_as(b_TOR))

    def forward(self) -> LoraAdapter:
        factors = {
            path: (a_TRI, b_TOR)
            for path, a_TRI, b_TOR in zip(self.paths, self.a, self.b, strict=True)
        }
        return LoraAdapter(factors, self.scaling)


class StaticSoftPrompt(nn.Module):
    """The soft prompts of T tasks, all started from the same prompt_PH."""

    def __init__(self, prompt_PH: Tensor, num_tasks: int = 1) -> None:
        super().__init__()
        self.prompt_TPH = nn.Parameter(prompt_PH.detach().float().repeat(num_tasks, 1, 1))

    def forward(self) -> SoftPrompt:
        return SoftPrompt(self.prompt_TPH)
