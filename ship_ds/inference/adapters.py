"""From an adapter to an instruction: which latent makes a LoRA like this one, and what does the
decoder read out of it.

With inputs the latent has to answer as the adapter does; without, its weight updates have to lie
near the adapter's. The updates B A are never formed: |B A|^2 and products of two are sums over
rank-by-rank matrices.

Letters: C candidates, R rank, I in, O out, Z latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.inference.bank import Bank, encode_all
from ship_ds.inference.gradient import descend_on, descend_to_behaviour
from ship_ds.inference.induction import (
    Induction,
    InductionConfig,
    Say,
    induce_many,
    silent,
    widened,
)
from ship_ds.inference.proposals import beams, key_of, sampled
from ship_ds.lora_folder import read_lora
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.adapters.sites import AdaptedLinear
from ship_ds.model.backbone import base_folder
from ship_ds.model.ship import ShipModel
from ship_ds.origin import ORIGIN, read_origin
from ship_ds.weights_folder import WeightsFolder


@dataclass(frozen=True)
class WeightCandidate:
    """distance: |update - the adapter's|^2 / |the adapter's|^2, over all sites; 1 is as far as
    doing nothing."""

    instruction: str
    distance: float
    latent: tuple[float, ...]
    origin: str


@dataclass(frozen=True)
class WeightInduction:
    """What an adapter's weights say, without inputs. latent_distance: that of the latent found,
    before it became text."""

    instruction: str
    candidates: tuple[WeightCandidate, ...]
    latent: tuple[float, ...]
    latent_distance: float


def read_adapter(model: ShipModel, folder: Path) -> LoraAdapter:
    """A PEFT LoRA folder as an adapter of one task. Raises UserError when it is no such folder or
    of another base."""
    lora = read_lora(folder)
    _check_origin(model, folder)
    sites = {m.path: m.base for m in model.task_llm.modules() if isinstance(m, AdaptedLinear)}
    for path, (a_RI, b_OR) in lora.factors.items():
        _check_site(folder, path, a_RI, b_OR, sites)
    factors = {
        path: (a_RI.float()[None].to(model.device), b_OR.float()[None].to(model.device))
        for path, (a_RI, b_OR) in lora.factors.items()
    }
    return LoraAdapter(factors, lora.scaling)


def _check_origin(model: ShipModel, folder: Path) -> None:
    """Our own adapters say which weights they were made for; one of the same shapes would pass
    every other check."""
    if not (folder / ORIGIN).is_file():
        return
    origin, base = read_origin(folder), model.config.task_llm.base
    if WeightsFolder(base_folder(base)).fingerprint != origin.base_fingerprint:
        raise UserError(
            f"{folder}: made for {origin.base} with fingerprint {origin.base_fingerprint[:12]}, "
            f"which is not this run's {base}: "
            "an adapter of another base model"
        )


def _check_site(
    folder: Path, path: str, a_RI: Tensor, b_OR: Tensor, sites: dict[str, torch.nn.Module]
) -> None:
    if path not in sites:
        raise UserError(
            f"{folder}: adapts {path}, which is none of the {len(sites)} linears that this run "
            "adapts: "
            "an adapter of another base model, or of modules outside model.hypernetwork.targets"
        )
    base: Any = sites[path]
    if (a_RI.shape[1], b_OR.shape[0]) != (base.in_features, base.out_features):
        raise UserError(
            f"{folder}: {path} is {a_RI.shape[1]} -> {b_OR.shape[0]} and this run's base has "
            f"{base.in_features} -> "
            f"{base.out_features} there: an adapter of another base model"
        )


def induce_from_behaviour(
    model: ShipModel,
    bank: Bank,
    adapter: LoraAdapter,
    inputs: Sequence[str],
    config: InductionConfig,
    max_new_tokens: int,
    seed: int = 0,
    say: Say = silent,
) -> Induction:
    """From what the adapter answers to `inputs`: candidates as for examples, and a latent with the
    same distributions."""
    said = [""] * len(inputs)
    answers = model.answer(adapter, inputs, max_new_tokens, said)
    examples = [Example(x, y) for x, y in zip(inputs, answers, strict=True) if y is not None]
    if not examples:
        raise UserError(
            f"induce: under this adapter none of {len(inputs)} answers ends within "
            f"{max_new_tokens} tokens"
        )
    say(f"the adapter answers {len(examples)} of {len(inputs)} inputs")
    induction = induce_many(model, bank, [examples], config, seed, say)[0]
    start_CZ = torch.tensor(
        [induction.latent, *(c.latent for c in induction.candidates[: config.num_refined])]
    )
    wordings = [induction.instruction] * len(start_CZ)
    say("matching its distributions")
    found = descend_to_behaviour(
        model, start_CZ, wordings, adapter, examples, config.steps, config.direct_lr, config.prior
    )
    return widened(model, induction, examples, found.latent_CZ, config, seed)


def induce_from_weights(
    model: ShipModel, bank: Bank, adapter: LoraAdapter, config: InductionConfig, seed: int = 0
) -> WeightInduction:
    """From the weights alone: the nearest known latents, descent from them, and the texts read
    there, by distance."""
    known_C = _distances(model, bank.latent_CZ, adapter)
    nearest = known_C.topk(min(config.num_restarts, len(bank)), largest=False).indices
    start_CZ = torch.cat(
        [torch.zeros(1, model.config.latent_size, device=model.device), bank.latent_CZ[nearest]]
    )

    def loss(latent_CZ: Tensor) -> tuple[Tensor, Tensor]:
        made = model.hypernetwork(latent_CZ)
        distance_C = relative_distance(made, adapter)
        return distance_C, distance_C.detach()

    found = descend_on(start_CZ, loss, config.steps, config.direct_lr, 0.0)
    read = beams(
        model, [()] * len(start_CZ), found.latent_CZ, config.num_beams, config.max_new_tokens
    )
    read += sampled(
        model,
        [()] * len(start_CZ),
        found.latent_CZ,
        max(1, config.num_samples),
        config.temperature,
        [key_of(seed, "weights", i) for i in range(len(start_CZ))],
        config.max_new_tokens,
    )
    origins = {text: "decoded" for row in read for text in row if text}
    origins |= {bank.instructions[c]: "known" for c in nearest.tolist()}
    candidates = _by_distance(model, origins, adapter)
    if not candidates:
        raise UserError(
            "induce: the decoder wrote no instruction that ends, and the bundle knows "
            "none; train it longer"
        )
    best = int(found.loss_C.argmin())
    latent = tuple(found.latent_CZ[best].tolist())
    return WeightInduction(
        candidates[0].instruction, tuple(candidates), latent, float(found.loss_C[best])
    )


def _by_distance(
    model: ShipModel, origins: dict[str, str], adapter: LoraAdapter
) -> list[WeightCandidate]:
    latent_CZ = encode_all(model, list(origins))
    distances = _distances(model, latent_CZ, adapter).tolist()
    rows = zip(origins.items(), distances, latent_CZ.tolist(), strict=True)
    return sorted(
        (
            WeightCandidate(text, distance, tuple(latent), origin)
            for (text, origin), distance, latent in rows
        ),
        key=lambda candidate: candidate.distance,
    )


@torch.no_grad()
def _distances(model: ShipModel, latent_CZ: Tensor, adapter: LoraAdapter) -> Tensor:
    pieces = [
        relative_distance(model.hypernetwork(piece), adapter) for piece in latent_CZ.split(64)
    ]
    return torch.cat(pieces) if pieces else torch.zeros(0, device=latent_CZ.device)


def relative_distance(made: LoraAdapter, adapter: LoraAdapter) -> Tensor:
    """|updates of `made` - those of `adapter`|^2 / |those of `adapter`|^2 over all sites, (C,);
    `adapter` has one task."""
    total = norm = torch.zeros(())
    for path, (a_CRI, b_COR) in made.factors.items():
        total = total + made.scaling**2 * _inner(a_CRI, b_COR, a_CRI, b_COR)
        if path in adapter.factors:
            a_1RI, b_1OR = adapter.factors[path]
            own = adapter.scaling**2 * _inner(a_1RI, b_1OR, a_1RI, b_1OR)
            both = made.scaling * adapter.scaling * _inner(a_CRI, b_COR, a_1RI, b_1OR)
            total, norm = total + own - 2 * both, norm + own
    return total / norm.clamp(min=1e-12)


def _inner(a_CRI: Tensor, b_COR: Tensor, other_a_CRI: Tensor, other_b_COR: Tensor) -> Tensor:
    """<B A, B' A'> = sum of (B^T B') * (A A'^T), (C,)."""
    return ((b_COR.mT @ other_b_COR) * (a_CRI @ other_a_CRI.mT)).sum((1, 2))
