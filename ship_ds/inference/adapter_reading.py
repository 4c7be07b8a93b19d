"""From an adapter to an instruction: which latent makes an adapter like this one, and what does the
decoder read out of it.

With inputs the latent has to answer as the adapter does; without, its weight updates have to lie
near the adapter's.

Letters: C candidates, Z latent size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ship_ds.config import base_folder
from ship_ds.console import Log, no_log
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.inference.bank import Bank
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import answer_under
from ship_ds.inference.gradient import Schedule, descend_on, descend_to_behaviour
from ship_ds.inference.induction import induce_many, with_latents_decoded
from ship_ds.inference.proposals import draw_seed, likeliest_texts, sample_texts
from ship_ds.inference.results import Induction, WeightCandidate, WeightInduction
from ship_ds.model import budget
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.ship import ShipModel
from ship_ds.origin import ORIGIN, read_origin
from ship_ds.weights_folder import WeightsFolder


def read_adapter(model: ShipModel, folder: Path) -> Adapter:
    """A PEFT folder as an adapter of one task, of the kind that the model's hypernetwork makes.

    Args:
        model: whose Task LLM it adapts.
        folder: as `peft` or `ship-ds deduce` writes it.

    Raises:
        UserError: it is no such folder, of another base, or of a kind that cannot be read back.
    """
    _check_origin(model, folder)
    return model.hypernetwork.read(folder)


def _check_origin(model: ShipModel, folder: Path) -> None:
    """Our own adapters say which weights they were made for; one of the same shapes would pass
    every other check."""
    if not (folder / ORIGIN).is_file():
        return
    origin, base = read_origin(folder), model.config.task_llm.base
    if WeightsFolder(base_folder(base)).fingerprint != origin.base_fingerprint:
        raise UserError(
            f"{folder}: made for {origin.base} with fingerprint {origin.base_fingerprint[:12]}, "
            f"which is not this run's {base}: an adapter of another base model"
        )


def induce_from_behaviour(
    model: ShipModel,
    bank: Bank,
    adapter: Adapter,
    inputs: Sequence[str],
    config: InductionConfig,
    max_new_tokens: int,
    seed: int = 0,
    log: Log = no_log,
) -> Induction:
    """The instruction that explains an adapter's answers.

    Args:
        model: with its trained weights.
        bank: the known instructions.
        adapter: of one task.
        inputs: what it answers.
        config: how to search.
        max_new_tokens: of an answer.
        seed: of every draw.
        log: takes a line of progress.

    Returns:
        Candidates as for examples, with those read out of a latent whose adapter has the same
        distributions over next tokens.

    Raises:
        UserError: none of the answers ends.
    """
    answers = answer_under(model, adapter, "", inputs, max_new_tokens)
    examples = [Example(x, y) for x, y in zip(inputs, answers, strict=True) if y is not None]
    if not examples:
        raise UserError(
            f"induce: under this adapter none of {len(inputs)} answers ends within "
            f"{max_new_tokens} tokens"
        )
    log(f"the adapter answers {len(examples)} of {len(inputs)} inputs")
    induction = induce_many(model, bank, [examples], config, seed, log)[0]
    best = induction.candidates[: config.num_refined]
    start_CZ = torch.tensor([induction.latent, *(candidate.latent for candidate in best)])
    wordings = [induction.instruction] * len(start_CZ)
    log("matching its distributions")
    descent = descend_to_behaviour(
        model,
        start_CZ,
        wordings,
        adapter,
        examples,
        Schedule(config.steps, config.direct_lr, config.prior),
    )
    return with_latents_decoded(model, induction, examples, descent.latent_CZ, config, seed)


def induce_from_weights(
    model: ShipModel, bank: Bank, adapter: Adapter, config: InductionConfig, seed: int = 0
) -> WeightInduction:
    """The instruction whose adapter lies nearest a given one, by the weights alone.

    Args:
        model: with its trained weights.
        bank: the known instructions.
        adapter: of one task.
        config: how to search.
        seed: of every draw.

    Returns:
        The nearest known instructions, and those read out of the latents to which descent leads
        from there and from the prior's mean.

    Raises:
        UserError: there is neither.
    """
    known_C = _distances(model, bank.latent_CZ, adapter)
    nearest = known_C.topk(min(config.num_restarts, len(bank)), largest=False).indices
    start_CZ = torch.cat([model.prior.mean(1).to(model.device), bank.latent_CZ[nearest]])

    def loss(latent_CZ: Tensor) -> tuple[Tensor, Tensor]:
        distance_C = model.hypernetwork(latent_CZ).distance(adapter)
        return distance_C, distance_C.detach()

    # The weights alone say where z has to go: the prior has no part in it.
    descent = descend_on(model, start_CZ, loss, Schedule(config.steps, config.direct_lr, 0.0))
    origins = dict.fromkeys(_decoded(model, descent.latent_CZ, config, seed), "decoded")
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
