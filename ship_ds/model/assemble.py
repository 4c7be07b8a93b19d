"""SHIP put together once, from real weights or from shapes alone.

    build_ship(config.model, LoadedWeights(torch.bfloat16, "auto", device))     # trains and answers
    build_ship(config.model, MetaWeights(torch.bfloat16))                       # planner/shapes.py

The order in which the parts are made is part of the behaviour: each draws its first weights from
torch's generator, and a run repeats bit for bit from its seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import torch
from torch import nn

from ship_ds.config import LossConfig, ModelConfig, TaskLlmConfig, TrainedRoleConfig
from ship_ds.errors import UserError
from ship_ds.kinds import ADAPTERS, PRIORS
from ship_ds.model.adapters.adapter import Hypernetwork, Sites, Target, build_hypernetwork
from ship_ds.model.adapters.sites import sites_anywhere, sites_in_each_block, wrap
from ship_ds.model.adapters.static_lora import StaticLora
from ship_ds.model.attention import Choice, this_machine
from ship_ds.model.collate import Collator, Prompts
from ship_ds.model.decoder import Decoder
from ship_ds.model.elementwise import ElementwiseMode
from ship_ds.model.encoder import Encoder
from ship_ds.model.language_model import language_model
from ship_ds.model.loading import (
    Quantisation,
    freeze,
    load_lm,
    load_prompts,
    stored_bytes,
)
from ship_ds.model.objectives import build_objectives, trains_decoder
from ship_ds.model.priors import Prior
from ship_ds.model.ship import ShipModel
from ship_ds.model.step import Parts
from ship_ds.model.streaming import Shard
from ship_ds.model.task_llm import TaskLlm
from ship_ds.prompt import PromptFormat


class Weights(Protocol):
    """Where the language models of a config come from."""

    def language_model(self, base: str, quantisation: Quantisation, sharded: bool) -> nn.Module:
        """The base, a transformers model.

        Args:
            base: a model folder, or "embedded"; of shapes also the name of a published one.
            quantisation: "nf4" puts its linears in 4 bits; "none" leaves them as they are.
            sharded: ZeRO-3 will partition it, so it may do so while loading.

        Raises:
            UserError: there is no such base, or it cannot be made.
        """

    def prompts(self, base: str, system_message: str | None) -> PromptFormat | None:
        """The prompt format with this base's tokenizer; None where there is none."""

    def shards(self, config: TaskLlmConfig) -> bool:
        """Whether ZeRO-3 partitions the Task LLM over the ranks instead of leaving it whole."""


@dataclass(frozen=True)
class LoadedWeights:
    """Weights from model folders.

    dtype: of the language models. device: where the model will run; the weights are on the CPU
    until `to` or the engine moves them. shard: for frozen 4-bit bases, while they load
    (streaming.py). elementwise: how norms, rotary embeddings and SwiGLU are computed in training.
    """

    dtype: torch.dtype = torch.float32
    attention: Choice = "auto"
    device: torch.device | None = None
    shard: Shard | None = None
    elementwise: ElementwiseMode = "eager"

    def language_model(self, base: str, quantisation: Quantisation, sharded: bool) -> nn.Module:
        """See `Weights`: of the folder, by `load_lm`."""
        device = self.device or this_machine()
        shard = self.shard if sharded else None
        return load_lm(
            base, quantisation, self.dtype, self.attention, device, shard, self.elementwise
        )

    def prompts(self, base: str, system_message: str | None) -> PromptFormat:
        """The format with the folder's tokenizer."""
        return load_prompts(base, system_message)

    def shards(self, config: TaskLlmConfig) -> bool:
        """As the config says; `auto` goes by the size, known before anything is loaded."""
        return config.shards(lambda: stored_bytes(config.base, config.quantisation, self.dtype))


def build_ship(config: ModelConfig, weights: Weights, loss: LossConfig | None = None) -> ShipModel:
    """The whole model.

    Args:
        config: the run's `model` section.
        weights: real ones, or shapes.
        loss: the run's `loss` section, which names the objectives; None: the paper's three.

    Raises:
        UserError: a base or target that is not there, sizes that do not fit, a kernel that cannot
            run on the device.
    """
    prompts = [
        weights.prompts(role.base, config.system_message)
        for role in (config.task_llm, config.encoder, config.decoder)
    ]
    if config.encoder.max_examples and prompts[1] is not None:
        prompts[1].reads_examples = True
    sharded = weights.shards(config.task_llm)
    task_lm = freeze(
        weights.language_model(config.task_llm.base, config.task_llm.quantisation, sharded)
    )
    port = language_model(task_lm)
    kind: type[Hypernetwork] = ADAPTERS.implementation(config.hypernetwork)
    for reason in filter(None, map(port.missing, kind.features(config.hypernetwork))):
        raise UserError(reason)
    sites = sites_in_each_block(task_lm, kind.targets(config.hypernetwork))
    target = Target.of(port, sites)
    kind.check(config.hypernetwork, config.latent_size, target)
    borrows = config.backbone == "shared"
    if borrows:
        tuned = _share(task_lm, sites, (config.encoder, config.decoder))
    else:
        wrap(task_lm, sites)
        tuned = [_tuned(role, weights) for role in (config.encoder, config.decoder)]
    # Both LoRAs are drawn before both heads, as 0.1.0 did.
    (encoder_lm, encoder_lora), (decoder_lm, decoder_lora) = tuned
    encoder = Encoder(
        encoder_lm,
        config.latent_size,
        config.encoder.pooling,
        encoder_lora,
        chunk_tokens=config.encoder.chunk_tokens,
        checkpointing=config.encoder.checkpointing,
        borrows=borrows,
    )
    decoder = Decoder(
        decoder_lm,
        config.latent_size,
        config.decoder.num_soft_tokens,
        config.decoder.fusion,
        decoder_lora,
        checkpointing=config.decoder.checkpointing,
        borrows=borrows,
    )
    reads_shares = kind.without_shares(config.hypernetwork) != config.hypernetwork
    if encoder.num_shares > 1 and reads_shares:
        num_blocks = len(target.blocks)
        if encoder.num_shares != num_blocks:
            raise UserError(
                f"model.encoder.pooling.num_queries ({encoder.num_shares}): with shares and "
                f"model.hypernetwork.latent=by_layer it has to be {num_blocks}, a query for each "
                "block of the Task LLM: change it"
            )
    read_by = encoder.language_model
    target = replace(target, state_size=read_by.hidden_size, state_blocks=len(read_by.blocks()))
    hypernetwork = build_hypernetwork(config.hypernetwork, config.latent_size, target)
    encoder.gives_states = hypernetwork.fuses > 0
    encoder.gives_blocks = hypernetwork.fuses_blocks
    prior: Prior = PRIORS.implementation(config.prior)(config.prior, config.latent_size)
    task_llm = TaskLlm(task_lm, config.task_llm.checkpointing, sites)
    parts = Parts(encoder, prior, hypernetwork, task_llm, decoder)
    loss = loss or LossConfig()
    objectives = build_objectives(loss.objectives())
    for objective in objectives.values():
        objective.meet(parts)
    return ShipModel(
        config,
        parts,
        objectives,
        _collator(config, prompts, parts),
        sharded,
        trains_decoder(loss.weights()),
    )


def _collator(
    config: ModelConfig, prompts: list[PromptFormat | None], parts: Parts
) -> Collator | None:
    known = [one for one in prompts if one is not None]
    if len(known) < len(prompts):
        return None
    return Collator(
        Prompts(*known),
        config.task_llm.instruction,
        config.latent_size,
        parts.hypernetwork.num_virtual_tokens,
        config.decoder.num_soft_tokens,
        parts.encoder.longest_text,
        config.task_llm.stated_share,
        config.decoder.drop_tokens,
    )


def _share(
    lm: nn.Module, sites: Sites, roles: Sequence[TrainedRoleConfig]
) -> list[tuple[nn.Module, StaticLora | None]]:
    """Encoder and decoder as LoRAs over the Task LLM's base, which is wrapped for all three.

    Args:
        lm: the frozen base.
        sites: of the Task LLM.
        roles: what to train over it.
    """
    tunings = [role.lora for role in roles if role.lora is not None]
    sites_of_roles = [sites_anywhere(lm, tuning.targets) for tuning in tunings]
    wrap(lm, chain(sites, *sites_of_roles))
    return [
        (lm, StaticLora(sites, tuning))
        for sites, tuning in zip(sites_of_roles, tunings, strict=True)
    ]


def _tuned(config: TrainedRoleConfig, weights: Weights) -> tuple[nn.Module, StaticLora | None]:
    """The language model of encoder or decoder, and the LoRA that is trained over it, if any."""
    lm = weights.language_model(config.base, config.quantisation, True)
    if config.lora is not None:
        sites = sites_anywhere(freeze(lm), config.lora.targets)
        wrap(lm, sites)
        return lm, StaticLora(sites, config.lora)
    if config.checkpointing:
        wrap(lm, ())
    return lm, None
