"""Gradient descent to a latent that explains examples: on z itself, or on instruction embeddings
through the encoder.

Several restarts of several tasks run in one forward. The last example is held back where there are
at least two: each row keeps the point where the held-back loss was lowest, and a row whose
held-back loss has not fallen for some steps stops moving (arXiv 2502.02315, section 3.3).

Letters: C rows (task by restart), M examples, Z latent, N instruction tokens, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ship_ds.inference.scoring import Examples, answers_batch, losses_by_example, sum_per_example
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.batch import TokenBatch
from ship_ds.model.ship import ShipModel

NEUTRAL_INSTRUCTION = "Generate the output based on the given input."
_PATIENCE = 5
"""Steps without a lower held-back loss after which a row stops."""


@dataclass(frozen=True)
class Descent:
    """Where each row's held-back loss was lowest: the latent and that loss, in nats an example."""

    latent_CZ: Tensor
    loss_C: Tensor


def descend_on_latent(
    model: ShipModel,
    start_CZ: Tensor,
    wordings: Sequence[str],
    examples: Sequence[Examples],
    steps: int,
    lr: float,
    prior: float,
    hold_back: bool = True,
) -> Descent:
    """`direct`: Adam on z from `start_CZ`. prior: weight of |z|^2 / 2, the prior's negative
    log-density up to a constant."""
    return descend_on(
        start_CZ.to(model.device),
        _loss_of_examples(model, wordings, examples, hold_back),
        steps,
        lr,
        prior,
    )


def descend_on_instruction(
    model: ShipModel,
    start_NH: Sequence[Tensor],
    wordings: Sequence[str],
    examples: Sequence[Examples],
    steps: int,
    lr: float,
    prior: float,
) -> Descent:
    """`indirect`: Adam on the embeddings of the instruction that the encoder reads, one start a
    row."""
    prompt, place = neutral_prompt(model)
    batch = TokenBatch.build(
        [prompt] * len(start_NH), None, model.encoder_prompts.pad_id, device=model.device
    )
    with torch.no_grad():
        table_CSH = model.encoder.language_model.embed(batch)
    point_CNH = torch.stack(list(start_NH)).detach().to(model.device).clone().requires_grad_()

    def latent() -> Tensor:
        hidden = torch.cat(
            [
                table_CSH[:, : place.start],
                point_CNH.to(table_CSH.dtype),
                table_CSH[:, place.stop :],
            ],
            1,
        )
        mean_CZ: Tensor = model.encoder(batch, hidden)[0]
        return mean_CZ

    return _descend(
        point_CNH, latent, _loss_of_examples(model, wordings, examples, True), steps, lr, prior
    )


def neutral_prompt(model: ShipModel) -> tuple[tuple[int, ...], slice]:
    """What the encoder reads for the neutral instruction, and where in it the instruction's own
    tokens are."""
    prompt, empty = (
        model.encoder_prompts.encoder_prompt(text) for text in (NEUTRAL_INSTRUCTION, "")
    )
    before = next(
        (i for i, (a, b) in enumerate(zip(prompt, empty, strict=False)) if a != b), len(empty)
    )
    after = next(
        (i for i, (a, b) in enumerate(zip(prompt[::-1], empty[::-1], strict=False)) if a != b),
        len(empty),
    )
    after = min(after, len(empty) - before)
    return prompt, slice(before, len(prompt) - after)


@torch.no_grad()
def neutral_embeddings(model: ShipModel) -> Tensor:
    """(N, H): where `indirect` starts."""
    prompt, place = neutral_prompt(model)
    batch = TokenBatch.build([prompt], None, model.encoder_prompts.pad_id, device=model.device)
    return model.encoder.language_model.embed(batch)[0, place]


def descend_to_behaviour(
    model: ShipModel,
    start_CZ: Tensor,
    wordings: Sequence[str],
    adapter: Adapter,
    examples: Examples,
    steps: int,
    lr: float,
    prior: float,
) -> Descent:
    """Adam on z until its adapter answers as the given one: KL between their next-token
    distributions, nats an example.

    adapter: of one task; examples: inputs with the answers along which both are compared.
    """
    own = [examples] * len(start_CZ)
    batch, alone = answers_batch(model, wordings, own), answers_batch(model, wordings[:1], own[:1])
    with torch.no_grad():
        aims_KV = (
            model.task_llm(adapter, alone, 1)[0].float().log_softmax(-1).repeat(len(start_CZ), 1)
        )

    def loss(latent_CZ: Tensor) -> tuple[Tensor, Tensor]:
        logits_KV, _ = model.task_llm(model.hypernetwork(latent_CZ), batch, len(latent_CZ))
        gaps_KV = aims_KV.exp() * (aims_KV - logits_KV.float().log_softmax(-1))
        gap_C = sum_per_example(gaps_KV.sum(1), batch, len(latent_CZ)).mean(1)
        return gap_C, gap_C.detach()

    return descend_on(start_CZ.to(model.device), loss, steps, lr, prior)


def descend_on(
    start_CZ: Tensor,
    loss: Callable[[Tensor], tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    prior: float,
) -> Descent:
    """Adam on z; `loss` as in `_descend`."""
    point_CZ = start_CZ.detach().clone().requires_grad_()
    return _descend(point_CZ, lambda: point_CZ, loss, steps, lr, prior)


def _loss_of_examples(
    model: ShipModel, wordings: Sequence[str], examples: Sequence[Examples], hold_back: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The loss to descend on and the one that says when to stop, nats an example, (C,) each."""
    batch, num_examples = answers_batch(model, wordings, examples), len(examples[0])
    splits = hold_back and num_examples > 1
    fitted = slice(0, num_examples - 1 if splits else num_examples)
    held = slice(num_examples - 1 if splits else 0, num_examples)

    def loss(latent_CZ: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = model.task_llm(model.hypernetwork(latent_CZ), batch, len(latent_CZ))
        loss_CM = losses_by_example(logits, labels, batch, len(latent_CZ))
        return loss_CM[:, fitted].mean(1), loss_CM[:, held].mean(1).detach()

    return loss


def _descend(
    point: Tensor,
    latent: Callable[[], Tensor],
    loss: Callable[[Tensor], tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    prior: float,
) -> Descent:
    """Rows are independent: Adam's step on one does not depend on the others, and each keeps its
    own best point."""
    best_CZ = latent().detach().clone()
    best_C = torch.full((len(best_CZ),), torch.inf, device=best_CZ.device)
    stale_C = torch.zeros(len(best_CZ), device=best_CZ.device)
    optimiser = torch.optim.Adam([point], lr=lr)
    for step in range(steps + 1):
        latent_CZ = latent()
        fitted_C, held_C = loss(latent_CZ)
        better_C = (held_C < best_C) & (stale_C < _PATIENCE)
        best_CZ[better_C], best_C[better_C] = latent_CZ.detach()[better_C], held_C[better_C]
        stale_C = torch.where(better_C, 0, stale_C + 1)
        if step == steps or bool((stale_C >= _PATIENCE).all()):
            break
        (point.grad,) = torch.autograd.grad(
            fitted_C.sum() + prior * latent_CZ.square().sum() / 2, [point]
        )
        optimiser.step()
    return Descent(best_CZ, best_C)
