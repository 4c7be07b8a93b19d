"""Gradient descent to a latent that explains examples: on z itself, or on instruction embeddings
through the encoder.

A row is one descent: several starts of several tasks run in one forward. The last example is held
back where there are at least two: each row keeps the point where the held-back loss was lowest, and
a row whose held-back loss has not fallen for some steps stops moving (arXiv 2502.02315, section
3.3).

Letters: C candidates, H hidden size, K labelled positions, M examples of a task, S padded length,
V vocabulary, Z latent size.
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


@dataclass(frozen=True)
class Schedule:
    """How a descent goes and when it stops.

    Args:
        steps: at most.
        lr: of Adam.
        prior_weight: of z's negative log-density under the prior, beside the mean loss of an
            example.
        min_steps: before a row may stop.
        patience: steps without a lower held-back loss after which it does.
    """

    steps: int
    lr: float
    prior_weight: float
    min_steps: int = 0
    patience: int = 5


@dataclass(frozen=True)
class Descent:
    """Where each row's held-back loss was lowest.

    Args:
        latent_CZ: the points.
        loss_C: that loss, in nats an example.
    """

    latent_CZ: Tensor
    loss_C: Tensor


def descend_on_latent(
    model: ShipModel,
    start_CZ: Tensor,
    wordings: Sequence[str],
    examples: Sequence[Examples],
    schedule: Schedule,
    hold_back: bool = True,
) -> Descent:
    """`direct`: Adam on z.

    Args:
        model: answers the examples.
        start_CZ: one start a row.
        wordings: an instruction a row, for a Task LLM that reads it too.
        examples: of each row, equally many.
        schedule: of steps.
        hold_back: whether the last example decides when to stop instead of being descended on.
    """
    loss = _loss_of_examples(model, wordings, examples, hold_back)
    return descend_on(model, start_CZ, loss, schedule)


def descend_on_instructions(
    model: ShipModel,
    texts: Sequence[str],
    examples: Sequence[Examples],
    schedule: Schedule,
    offsets: Sequence[Tensor | None] = (),
) -> Descent:
    """`indirect`: Adam on the embeddings of the instruction that the encoder reads, in fp32.

    Args:
        model: encodes, and answers the examples.
        texts: where each row starts, of whatever length.
        examples: of each row, equally many.
        schedule: of steps.
        offsets: (S, H) a row, added to the embeddings of its own tokens before the first step;
            None: nothing.
    """
    prompts = [model.encoder_prompts.encoder_prompt(text) for text in texts]
    places = [instruction_span(model, prompt) for prompt in prompts]
    batch = TokenBatch.build(prompts, None, model.encoder_prompts.pad_id, device=model.device)
    with torch.no_grad():
        prompt_CSH = model.encoder.language_model.embed(batch)
    # What stays, the template and the padding, is multiplied by zero.
    moves_CS = torch.zeros(prompt_CSH.shape[:2], device=model.device)
    moved_CSH = torch.zeros_like(prompt_CSH, dtype=torch.float32)
    for row, place in enumerate(places):
        moves_CS[row, place] = 1
    for row, offset_SH in enumerate(offsets):
        if offset_SH is not None:
            moved_CSH[row, places[row]] = offset_SH.to(moved_CSH)
    moved_CSH.requires_grad_()

    def latent() -> Tensor:
        hidden = prompt_CSH + (moves_CS[..., None] * moved_CSH).to(prompt_CSH.dtype)
        mean_CZ: Tensor = model.encoder(batch, hidden)[0]
        return mean_CZ

    loss = _loss_of_examples(model, [""] * len(texts), examples, True)
    return _descend(model, moved_CSH, latent, loss, schedule)


def instruction_span(model: ShipModel, prompt: Sequence[int]) -> slice:
    """Where in an encoder's prompt the instruction's own tokens are: what it does not share with
    the prompt of an empty instruction."""
    empty = model.encoder_prompts.encoder_prompt("")
    before = _num_shared(prompt, empty)
    # The ends may not reach into what the beginnings share already.
    after = min(_num_shared(prompt[::-1], empty[::-1]), len(empty) - before)
    return slice(before, len(prompt) - after)


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with; `second` is the shorter one."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), len(second))


@torch.no_grad()
def neutral_embeddings(model: ShipModel) -> Tensor:
    """The neutral instruction's embeddings, (S, H): where `indirect` starts."""
    prompt = model.encoder_prompts.encoder_prompt(NEUTRAL_INSTRUCTION)
    batch = TokenBatch.build([prompt], None, model.encoder_prompts.pad_id, device=model.device)
    return model.encoder.language_model.embed(batch)[0, instruction_span(model, prompt)]


def descend_to_behaviour(
    model: ShipModel,
    start_CZ: Tensor,
    wordings: Sequence[str],
    adapter: Adapter,
    examples: Examples,
    schedule: Schedule,
) -> Descent:
    """Adam on z until its adapter answers as a given one: KL between their next-token
    distributions, nats an example.

    Args:
        model: makes adapters and answers.
        start_CZ: one start a row.
        wordings: as in `descend_on_latent`.
        adapter: the given one, of one task.
        examples: inputs with the answers along which both are compared.
        schedule: of steps.
    """
    repeated = [examples] * len(start_CZ)
    batch = answers_batch(model, wordings, repeated)
    once = answers_batch(model, wordings[:1], repeated[:1])
    with torch.no_grad():
        log_probs_KV = model.task_llm.score(adapter, once, 1)[0].float().log_softmax(-1)
    target_KV = log_probs_KV.repeat(len(start_CZ), 1)

    def loss(latent_CZ: Tensor) -> tuple[Tensor, Tensor]:
        logits_KV, _ = model.task_llm.score(model.hypernetwork(latent_CZ), batch, len(latent_CZ))
        kl_KV = target_KV.exp() * (target_KV - logits_KV.float().log_softmax(-1))
        kl_C = sum_per_example(kl_KV.sum(1), batch, len(latent_CZ)).mean(1)
        return kl_C, kl_C.detach()

    return descend_on(model, start_CZ, loss, schedule)


Loss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(latent_CZ) -> the loss to descend on, and the one that says when to stop, (C,) each."""


def descend_on(
    model: ShipModel,
    start_CZ: Tensor,
    loss: Loss,
    schedule: Schedule,
) -> Descent:
    """Adam on z by any loss.

    Args:
        model: says on which device.
        start_CZ: a latent each, kept as it is.
        loss: of the latents as they are.
        schedule: how many steps, and how large.
    """
    point_CZ = start_CZ.detach().to(model.device).clone().requires_grad_()
    return _descend(model, point_CZ, lambda: point_CZ, loss, schedule)


def _loss_of_examples(
    model: ShipModel, wordings: Sequence[str], examples: Sequence[Examples], hold_back: bool
) -> Loss:
    """The mean loss of an example in nats."""
    batch, num_examples = answers_batch(model, wordings, examples), len(examples[0])
    holds_back = hold_back and num_examples > 1
    fitted = slice(0, num_examples - 1 if holds_back else num_examples)
    held_back = slice(num_examples - 1 if holds_back else 0, num_examples)

    def loss(latent_CZ: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = model.task_llm.score(model.hypernetwork(latent_CZ), batch, len(latent_CZ))
        loss_CM = losses_by_example(logits, labels, batch, len(latent_CZ))
        return loss_CM[:, fitted].mean(1), loss_CM[:, held_back].mean(1).detach()

    return loss


def _descend(
    model: ShipModel,
    point: Tensor,
    latent: Callable[[], Tensor],
    loss: Loss,
    schedule: Schedule,
) -> Descent:
    """Adam on `point`, from which `latent` makes z.

    Rows are independent: Adam's step on one does not depend on the others, and each keeps its own
    best point.
    """
    best_CZ = latent().detach().clone()
    best_C = torch.full((len(best_CZ),), torch.inf, device=best_CZ.device)
    stale_C = torch.zeros(len(best_CZ), device=best_CZ.device)
    optimiser = torch.optim.Adam([point], lr=schedule.lr)
    # One more look than there are steps: the point after the last step counts too.
    for step in range(schedule.steps + 1):
        latent_CZ = latent()
        fitted_C, held_back_C = loss(latent_CZ)
        has_stopped_C = (stale_C >= schedule.patience) & (step > schedule.min_steps)
        better_C = (held_back_C < best_C) & ~has_stopped_C
        best_CZ[better_C] = latent_CZ.detach()[better_C]
        best_C[better_C] = held_back_C[better_C]
        stale_C = torch.where(better_C, 0, stale_C + 1)
        may_stop = step >= schedule.min_steps
        if step == schedule.steps or (may_stop and bool((stale_C >= schedule.patience).all())):
            break
        # A sum over rows: the gradient of each is that of its own loss.
        total = fitted_C.sum() - schedule.prior_weight * model.prior.log_density(latent_CZ).sum()
        # Not backward(), which would leave gradients in the model's parameters.
        (point.grad,) = torch.autograd.grad(total, [point])
        optimiser.step()
    return Descent(best_CZ, best_C)
