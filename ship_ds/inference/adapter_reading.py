"""Adapters of anybody: the folder's value, and which latents make an adapter like it.

With answers a latent has to answer as the adapter does; by the weights alone its updates have to
lie near the adapter's. What is made of both is in explaining.py.

Letters: C candidates, O outputs of a linear, I inputs of a linear, Z latent size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ship_ds.config import base_folder
from ship_ds.errors import UserError
from ship_ds.inference.bank import Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.gradient import Schedule, descend_on
from ship_ds.inference.proposals import likeliest_texts, sample_texts
from ship_ds.inference.results import WeightCandidate, WeightInduction
from ship_ds.lora_folder import Lora, factored
from ship_ds.model import budget
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.lora import adapter_of_lora
from ship_ds.model.adapters.sites import sizes, weight_of
from ship_ds.model.drawing import draw_seed
from ship_ds.model.ship import ShipModel
from ship_ds.origin import ORIGIN, read_origin
from ship_ds.parsing import read_json_object
from ship_ds.weights_folder import WeightsFolder

_AT_ONCE = 64
"""Known adapters that are made together; more take memory and save no time."""
_ROUNDING = 2.0**-7
"""Of a weight's norm: what saving in 16 bits may have changed."""


def read_adapter(model: ShipModel, folder: Path) -> Adapter:
    """A PEFT folder as an adapter of one task, of the kind that the model's hypernetwork makes.

    Linears that it changes and the run's own adapters do not are made ready for it.

    Args:
        model: whose Task LLM it adapts.
        folder: as `peft` or `ship-ds deduce` writes it.

    Raises:
        UserError: it is no such folder, of another base, or of a kind that cannot be read back.
    """
    _check_origin(model, folder)
    return model.read_adapter(folder)


def _check_origin(model: ShipModel, folder: Path) -> None:
    """Our own adapters say which weights they were made for, of a part in the folder around it; one
    of the same shapes would pass every other check."""
    if not (folder / ORIGIN).is_file():
        folder = folder.resolve()
        around = folder.parent
        if not (around / ORIGIN).is_file() or folder.name not in read_origin(around).folders:
            return
        folder = around
    origin, base = read_origin(folder), model.config.task_llm.base
    other = origin.other_than(WeightsFolder(base_folder(base)))
    if other is not None:
        raise UserError(
            f"{folder}: made for {origin.base} with fingerprint {origin.base_fingerprint[:12]}, "
            f"which has other {other} than this run's {base}: an adapter of another base model"
        )


def read_merged(model: ShipModel, folder: Path) -> Adapter:
    """A merged model minus the run's base, as an adapter of one task.

    A run in 4 bits computes with other weights than lie in its base's folder; which of the two was
    merged into is the nearer one.

    Args:
        model: of a run whose adapters are LoRAs.
        folder: of a model that transformers loads, of the base's architecture, in 16 or 32 bits.

    Raises:
        UserError: it is none, it has changed more than linears of blocks, or nothing.
    """
    linears = model.task_llm.linears()
    if model.adapt(model.prior.mean(1).to(model.device)).as_lora() is None:
        raise UserError(
            f"{folder}: a merged model is read as a LoRA, and this run's adapters are of another "
            "kind; it needs a run with model.hypernetwork.kind=lora"
        )
    merged, base = WeightsFolder(folder), WeightsFolder(base_folder(model.config.task_llm.base))
    _check_plain(folder)
    _check_same_tensors(folder, merged, base)

    def deltas(path: str) -> tuple[Tensor, Tensor]:
        """(O, I): from the base in its folder, and from what the run computes with."""
        after, before = (one.read(f"{path}.weight").float() for one in (merged, base))
        computed_OI = weight_of(linears[path]).to(after.device)
        if isinstance(linears[path], Conv1D):
            after, before = after.T, before.T  # a Conv1D lies the other way round
        return after - before, after - computed_OI

    squares = [0.0, 0.0]
    for name in base.entries:
        path, after = name.removesuffix(".weight"), merged.read(name).float()
        if not bool(after.isfinite().all()):
            raise UserError(f"{folder}: {name} has values that are no finite numbers")
        if path in linears:
            for place, delta_OI in enumerate(deltas(path)):
                squares[place] += float(delta_OI.square().sum())
            continue
        before = base.read(name).float()
        if (after - before).norm() > _ROUNDING * before.norm():
            raise UserError(
                f"{folder}: {name} is another one than the base's, and only changes of linears in "
                "the blocks can be explained"
            )
    # One matrix at a time, read again: all differences of a large model are twice its size.
    nearer = squares.index(min(squares))
    factors = {
        path: factored(delta_OI)
        for path in linears
        if f"{path}.weight" in base.entries and bool((delta_OI := deltas(path)[nearer]).any())
    }
    if not factors:
        raise UserError(f"{folder}: every weight is the base's: nothing was merged into it")
    adapter = adapter_of_lora(folder, Lora(factors, 1.0), sizes(linears), model.device)
    model.task_llm.make_ready(factors)
    return adapter


def _check_plain(folder: Path) -> None:
    path = folder / "config.json"
    if "quantization_config" in read_json_object(path):
        raise UserError(
            f"{path}: expected a model in 16 or 32 bits, not quantised; merge again with "
            "--target dequantised"
        )


def _check_same_tensors(folder: Path, merged: WeightsFolder, base: WeightsFolder) -> None:
    for name in dict.fromkeys([*base.entries, *merged.entries]):
        theirs, ours = merged.entries.get(name), base.entries.get(name)
        if theirs is None or ours is None or theirs.shape != ours.shape:
            there, here = (one.shape if one else "absent" for one in (theirs, ours))
            raise UserError(
                f"{folder}: {name} is {there} there and {here} in this run's base: a model of "
                "another base"
            )


def induce_from_weights(
    model: ShipModel,
    bank: Bank,
    adapter: Adapter,
    config: InductionConfig,
    seed: int = 0,
    read_CZ: Tensor | None = None,
    known_C: Tensor | None = None,
) -> WeightInduction:
    """The instruction whose adapter lies nearest a given one, by the weights alone.

    Args:
        model: with its trained weights.
        bank: the known instructions.
        adapter: of one task.
        config: how to search.
        seed: of every draw.
        read_CZ: latents that were read off the adapter in another way (lora_reader.py).
        known_C: distances of the known instructions' adapters, where they are known already.

    Returns:
        The nearest known instructions, and those read out of the latents to which descent leads
        from there, from the prior's mean and from those read otherwise; and of these themselves.

    Raises:
        UserError: there is neither.
    """
    if known_C is None:
        known_C = _distances(model, bank.latent_CZ, adapter)
    nearest = known_C.topk(min(config.num_restarts, len(bank)), largest=False).indices
    starts = [model.prior.mean(1).to(model.device), bank.latent_CZ[nearest].to(model.device)]
    exact_Z = model.hypernetwork.latent_of(adapter)
    if exact_Z is not None:
        starts.append(exact_Z[None].to(model.device))
    if read_CZ is not None:
        starts.append(read_CZ.to(model.device))
    start_CZ = torch.cat(starts)

    def loss(latent_CZ: Tensor) -> tuple[Tensor, Tensor]:
        distance_C = model.hypernetwork(latent_CZ).distance(adapter)
        return distance_C, distance_C.detach()

    # The weights alone say where z has to go: the prior has no part in it.
    descent = descend_on(model, start_CZ, loss, Schedule(config.steps, config.direct_lr, 0.0))
    origins = dict.fromkeys(_decoded(model, descent.latent_CZ, config, seed), "decoded")
    if read_CZ is not None:
        origins |= dict.fromkeys(_decoded(model, read_CZ, config, seed), "read")
    origins |= {bank.instructions[c]: "known" for c in nearest.tolist()}
    candidates = _by_distance(model, origins, adapter)
    if not candidates:
        raise UserError(
            "induce: the decoder wrote no instruction that ends, and the bundle knows "
            "none; train it longer"
        )
    best = int(descent.loss_C.argmin())
    return WeightInduction(
        candidates[0].instruction,
        tuple(candidates),
        tuple(descent.latent_CZ[best].tolist()),
        float(descent.loss_C[best]),
    )


@torch.no_grad()
def known_distances(model: ShipModel, bank: Bank, adapters: Sequence[Adapter]) -> list[Tensor]:
    """How far the adapter of each known instruction is from each of these, (C,) each: to make them
    is what takes long, and they are made once for all.

    Args:
        model: with its trained weights.
        bank: the known instructions.
        adapters: of one task each.

    Returns:
        Of each adapter a tensor (C,), in the order of the bank (`Adapter.distance`).

    Raises:
        UserError: adapters of this kind have no distance.
    """
    pieces = [
        [made.distance(adapter) for adapter in adapters]
        for made in map(model.adapt, bank.latent_CZ.split(_AT_ONCE))
    ]
    return [torch.cat(row) for row in zip(*pieces, strict=True)]


def _decoded(model: ShipModel, latent_CZ: Tensor, config: InductionConfig, seed: int) -> list[str]:
    """Texts that the decoder reads out of the latents, without examples; none of a run without."""
    if not model.decodes:
        return []
    shown = [()] * len(latent_CZ)
    beams = likeliest_texts(model, shown, latent_CZ, config.num_beams, config.max_new_tokens)
    samples = sample_texts(
        model,
        shown,
        latent_CZ,
        max(1, config.num_samples),
        config.temperature,
        [draw_seed(seed, "weights", i) for i in range(len(latent_CZ))],
        config.max_new_tokens,
    )
    return [text for texts in (*beams, *samples) for text in texts if text]


def _by_distance(
    model: ShipModel, origins: Mapping[str, str], adapter: Adapter
) -> list[WeightCandidate]:
    """Each text's candidate, nearest first."""
    latent_CZ = model.encode(list(origins))
    distances = _distances(model, latent_CZ, adapter).tolist()
    rows = zip(origins.items(), distances, latent_CZ.tolist(), strict=True)
    candidates = [
        WeightCandidate(text, distance, tuple(latent), origin)
        for (text, origin), distance, latent in rows
    ]
    return sorted(candidates, key=lambda candidate: candidate.distance)


@torch.no_grad()
def _distances(model: ShipModel, latent_CZ: Tensor, adapter: Adapter) -> Tensor:
    """How far each latent's adapter is from the given one, (C,)."""
    if not len(latent_CZ):
        return torch.zeros(0, device=latent_CZ.device)
    at_once = max(1, budget.bytes_free(model.device) // model.adapter_bytes)
    pieces = [model.adapt(some_CZ).distance(adapter) for some_CZ in latent_CZ.split(at_once)]
    return torch.cat(pieces)
