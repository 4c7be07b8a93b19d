"""What evaluation and the report at the end of a run hold, counted on the meta device.

Nothing is trained there, so what counts beside the weights is a batch: the adapters, the keys and
values of prompts and answers, one layer's work, and logits. How many tasks are answered at once is
chosen by the memory that is free (model/budget.py), down to one row of one task: a plan refuses a
run where that does not fit.

Letters: T tasks, Z latent size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ship_ds.config import EvaluationConfig
from ship_ds.loss import sum_cross_entropy
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.batch import TokenBatch
from ship_ds.model.budget import SHARE_OF_GPU
from ship_ds.model.language_model import LanguageModel, Stream
from ship_ds.planner.activations import Workload, extrapolated
from ship_ds.planner.live_bytes import LiveBytes
from ship_ds.planner.shapes import Shapes

RECONSTRUCTION = "reconstruction"


@dataclass(frozen=True)
class PlannedPass:
    """One way in which evaluation runs a language model: `rows` sequences, each of `width` tokens
    before `new_tokens` of answer; `num_bytes` at the heaviest moment, beside the weights."""

    name: str
    rows: int
    width: int
    new_tokens: int
    num_bytes: int


def passes(
    shapes: Shapes,
    work: Workload,
    config: EvaluationConfig,
    num_tasks: int = 1,
    rows_of_task: int = 1,
) -> list[PlannedPass]:
    """Those that a run makes; none where it evaluates nothing.

    Args:
        shapes: of the model.
        work: how long texts are.
        config: the run's `evaluation` section.
        num_tasks: that are answered at once.
        rows_of_task: inputs of each of them.
    """
    # a micro-batch's tasks say nothing of evaluation's: plans that differ by them count once
    return list(_count(shapes, replace(work, tasks=1), config, num_tasks, rows_of_task))


@lru_cache(maxsize=16)
def _count(
    shapes: Shapes, work: Workload, config: EvaluationConfig, num_tasks: int, rows_of_task: int
) -> list[PlannedPass]:
    if shapes.shallow:
        two, four = (_count(few, work, config, num_tasks, rows_of_task) for few in shapes.shallow)
        return [
            replace(more, num_bytes=_grown(shapes, few, more))
            for few, more in zip(two, four, strict=True)
        ]
    counted: list[PlannedPass] = []
    if config.every_steps or config.ends_with_report:
        counted += [
            _answers(shapes, work, config, num_tasks, rows_of_task),
            _reconstruction(shapes, config),
        ]
    if config.ends_with_report:
        counted += [
            _answers_to_prompts(shapes, work, config, num_tasks * rows_of_task),
            _losses(shapes, work, num_tasks, rows_of_task),
        ]
    return counted


def _grown(shapes: Shapes, few: PlannedPass, more: PlannedPass) -> int:
    part = "decoder" if more.name == RECONSTRUCTION else "task LLM"
    return extrapolated(shapes, part, few.num_bytes, more.num_bytes)


def _answers(
    shapes: Shapes, work: Workload, config: EvaluationConfig, num_tasks: int, rows_of_task: int
) -> PlannedPass:
    """SHIP's own, each task's under its adapter."""
    ship, rows = shapes.ship, num_tasks * rows_of_task
    width = work.answer_length(shapes) - work.target_tokens
    virtual = ship.num_virtual_tokens

    def read() -> Stream:
        prompts = TokenBatch.of_lengths(rows, width - virtual, 0, virtual, ship.device)
        return ship.task_llm.stream(_adapter(shapes, work, num_tasks), prompts)

    num_bytes = _peak_of_answers(shapes, ship.task_llm.language_model, read, config.max_new_tokens)
    return PlannedPass("answers under adapters", rows, width, config.max_new_tokens, num_bytes)


def _answers_to_prompts(
    shapes: Shapes, work: Workload, config: EvaluationConfig, rows: int
) -> PlannedPass:
    """The bare base's with the instruction in the prompt, a control of the report."""
    task_llm = shapes.ship.task_llm
    width = work.instruction_tokens + work.input_tokens

    def read() -> Stream:
        prompts = TokenBatch.of_lengths(rows, width, 0, 0, shapes.ship.device)
        return task_llm.stream(None, prompts)

    num_bytes = _peak_of_answers(shapes, task_llm.language_model, read, config.max_new_tokens)
    return PlannedPass("answers to prompts", rows, width, config.max_new_tokens, num_bytes)


def _reconstruction(shapes: Shapes, config: EvaluationConfig) -> PlannedPass:
    """The decoder writes after the soft tokens and a few words of prompt."""
    num_soft, decoder = shapes.config.decoder.num_soft_tokens, shapes.ship.decoder
    new_tokens = config.max_instruction_tokens

    def read() -> Stream:
        prompts = TokenBatch.of_lengths(1, _DECODER_PROMPT, 0, num_soft, shapes.ship.device)
        return decoder.stream(_latents(shapes, 1), None, prompts)

    num_bytes = _peak_of_answers(shapes, decoder.language_model, read, new_tokens)
    return PlannedPass(RECONSTRUCTION, 1, num_soft + _DECODER_PROMPT, new_tokens, num_bytes)


def _losses(shapes: Shapes, work: Workload, num_tasks: int, rows_of_task: int) -> PlannedPass:
    """How well adapters explain examples, for the report's control `nearest_known`."""
    ship, rows = shapes.ship, num_tasks * rows_of_task
    width = work.answer_length(shapes) - work.target_tokens
    virtual = ship.num_virtual_tokens
    with counting(shapes) as live:
        batch = TokenBatch.of_lengths(
            rows, width - virtual, work.target_tokens, virtual, ship.device
        )
        adapter = _adapter(shapes, work, num_tasks)
        sum_cross_entropy(*ship.task_llm.score(adapter, batch, num_tasks))
    return PlannedPass("losses of examples", rows, width, work.target_tokens, live.peak)


_DECODER_PROMPT = 16
"""Tokens around z in the decoder's prompt: the template's words, about."""


def _adapter(shapes: Shapes, work: Workload, num_tasks: int) -> Adapter:
    """Made of z, and of instructions as long as they may be where a kind fuses them."""
    ship, latent_TZ = shapes.ship, _latents(shapes, num_tasks)
    if not ship.hypernetwork.fuses:
        return ship.adapt(latent_TZ)
    read = TokenBatch.of_lengths(num_tasks, work.read_length(shapes), 0, 0, ship.device)
    return ship.adapt_read(latent_TZ, read)


def _latents(shapes: Shapes, num_tasks: int) -> torch.Tensor:
    return torch.zeros(num_tasks, shapes.config.latent_size, device=shapes.ship.device)


def _peak_of_answers(
    shapes: Shapes, lm: LanguageModel, read: Callable[[], Stream], new_tokens: int
) -> int:
    """While the prompts are read, or with the keys and values of all new tokens."""
    with counting(shapes) as live:
        stream = read()
        grown = stream.num_rows * new_tokens * lm.costs.cache
        at_the_end = live.now + grown
    return max(live.peak, at_the_end)


def rows_answered(shapes: Shapes, one: PlannedPass, bytes_free: int) -> int:
    """Rows that evaluation will answer at once on a GPU with so much left, at least one.

    Args:
        shapes: of the model.
        one: the answers to plan.
        bytes_free: beside the weights and the optimiser's state.
    """
    costs = shapes.ship.task_llm.language_model.costs
    row = costs.decoded_row(one.width, one.new_tokens)
    return max(1, int(SHARE_OF_GPU * bytes_free) // row)


@contextmanager
def counting(shapes: Shapes) -> Iterator[LiveBytes]:
    """What is alive beside the weights, without gradients."""
    ship = shapes.ship
    weights = (p for module in shapes.parts.values() for p in module.parameters())
    ship.eval()
    try:
        with torch.no_grad(), LiveBytes([*weights, *ship.buffers()]) as live:
            yield live
    finally:
        ship.train()
