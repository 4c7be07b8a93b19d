"""Answers to inputs without labels: of the run's bare Task LLM that reads the instruction in its
prompt, or of an endpoint.

Distillation by the teacher's own words (sequence-level knowledge distillation, Kim and Rush 2016,
arXiv 1606.07947): the teacher answers once, and whoever trains on the file meets its answers as any
other targets, beside `loss.distillation` where its next tokens are to be met, too. Instructions
without a single input take those of the known task whose latent is nearest.

Letters: Z latent size.
"""

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ship_ds.api import Ship
from ship_ds.console import Log
from ship_ds.data.readers.jsonl import row_of
from ship_ds.data.task import Example, Task
from ship_ds.errors import UserError
from ship_ds.evaluation.endpoint import ChatEndpoint
from ship_ds.inference import checks
from ship_ds.inference.bank import Bank
from ship_ds.inference.deduction import AnswersByTask, bare_answerer
from ship_ds.inference.latents import nearest_known
from ship_ds.monitor.progress import ProgressLine
from ship_ds.supply.config import AnswersConfig
from ship_ds.supply.filters import agreed, is_trivial
from ship_ds.supply.journal import Journal, SupplyPart
from ship_ds.supply.known import Known, inputs_of, is_readable


class Teacher(ABC):
    """Answers inputs as an instruction says."""

    origin: Mapping[str, Any]

    @abstractmethod
    def answer(self, instructions: Sequence[str], inputs: Sequence[Sequence[str]]) -> AnswersByTask:
        """The inputs of each instruction."""


class TaskLlmTeacher(Teacher):
    """The run's Task LLM without an adapter, with the instruction in its prompt: the teacher of
    `loss.distillation`."""

    def __init__(self, ship: Ship) -> None:
        self.ship, self.origin = ship, {"by": "task_llm", "run": ship.digest[:12]}

    def answer(self, instructions: Sequence[str], inputs: Sequence[Sequence[str]]) -> AnswersByTask:
        """See `Teacher`."""
        prompt = self.ship.model.prompts.task_prompt
        questions = [
            [prompt(text, instruction) for text in texts]
            for instruction, texts in zip(instructions, inputs, strict=True)
        ]
        length = self.ship.config.evaluation.max_new_tokens
        return bare_answerer(self.ship.model).answers(questions, length)


class EndpointTeacher(Teacher):
    """A model behind an OpenAI-compatible endpoint, asked each input by itself."""

    def __init__(self, endpoint: ChatEndpoint, max_tokens: int) -> None:
        self.endpoint, self.max_tokens = endpoint, max_tokens
        self.origin = {"by": "endpoint", "model": endpoint.config.model}

    def answer(self, instructions: Sequence[str], inputs: Sequence[Sequence[str]]) -> AnswersByTask:
        """See `Teacher`."""
        return [
            [self._one(f"{instruction}\n\n{text}") for text in texts]
            for instruction, texts in zip(instructions, inputs, strict=True)
        ]

    def _one(self, asked: str) -> str | None:
        messages = [{"role": "user", "content": asked}]
        reply = self.endpoint.finished_reply(messages, max_tokens=self.max_tokens)
        return None if reply is None else reply.strip()


class ToAnswer(NamedTuple):
    """What a task's teacher is asked.

    rest: inputs of the task that are left for another time. inputs_of: the task that they are of,
    where it is another.
    """

    task: Task
    inputs: list[str]
    rest: list[str]
    inputs_of: str | None


def answer_tasks(
    ship: Ship,
    teacher: Teacher,
    known: Known,
    num_tasks: int | None,
    config: AnswersConfig,
    seed: int,
    journal: Journal,
    log: Log,
) -> None:
    """Add to the journal each task with the teacher's answers.

    Args:
        ship: whose prompts the answers are for, and whose latents say what is near.
        teacher: answers.
        known: the tasks.
        num_tasks: that are looked at; None: all.
        config: see there.
        seed: of the draws of inputs.
        journal: that is gone on with.
        log: takes lines of progress.
    """
    tasks, size = known.tasks[:num_tasks], config.num_at_once
    work = _Work(ship, teacher, known, config, seed)
    with ProgressLine("supply", len(tasks), log=log) as progress:
        progress.done(min(len(tasks), size * len(journal.parts)))
        for start in range(size * len(journal.parts), len(tasks), size):
            progress.begin("answers")
            journal.add(work.part(tasks[start : start + size]))
            progress.done(len(tasks[start : start + size]))


class _Work:
    def __init__(
        self, ship: Ship, teacher: Teacher, known: Known, config: AnswersConfig, seed: int
    ) -> None:
        self.ship, self.teacher, self.config, self.seed = ship, teacher, config, seed
        self.lenders = known.lenders(ship)

    def part(self, tasks: Sequence[Task]) -> SupplyPart:
        counts: Counter[str] = Counter()
        rows = []
        asked = self.asked(tasks, counts)
        answers = self.teacher.answer(
            [one.task.instruction for one in asked], [one.inputs for one in asked]
        )
        for one, row in zip(asked, answers, strict=True):
            # The teacher answers once, so that all of its samples agree.
            answered = agreed(one.inputs, row, [1.0] * len(row), 1.0)
            counts["inputs"] += len(one.inputs)
            counts["inputs without an answer that ends"] += len(one.inputs) - len(answered)
            # Asked anew, an input has no other label; what was left for another time keeps its own.
            kept = tuple(
                example
                for example in one.task.examples
                if not self.config.relabels or example.input not in one.inputs
            )
            examples = tuple(dict.fromkeys((*kept, *answered)))
            if len(examples) < self.config.min_examples:
                counts["too few answers"] += 1
            elif not kept and len(examples) > 1 and is_trivial(examples):
                counts["trivial"] += 1
            else:
                counts["answered" if answered else "not answered, labels kept"] += 1
                rows.append(self.row(one, examples))
        return SupplyPart(dict(counts), rows)

    def row(self, one: ToAnswer, examples: tuple[Example, ...]) -> dict[str, Any]:
        origin = {"how": "answers", **self.teacher.origin}
        origin |= {} if one.inputs_of is None else {"inputs_of": one.inputs_of}
        return row_of(replace(one.task, examples=examples, inputs=tuple(one.rest)), origin)

    def asked(self, tasks: Sequence[Task], counts: Counter[str]) -> list[ToAnswer]:
        """Of the tasks, those that have something to ask; `counts` takes the others."""
        to_answer = []
        for task in tasks:
            if not is_readable(self.ship, task.instruction):
                counts["unreadable"] += 1
                continue
            lender, has_none = task, not task.inputs and not task.examples
            if has_none and self.lenders:
                lender = self.nearest(task.instruction)
            texts = self.unlabelled(lender, task)
            readable = [text for text in texts if self.can_read(task.instruction, text)]
            inputs = readable[: self.config.num_inputs]
            done = {*inputs, *(example.input for example in task.examples)}
            rest = [] if has_none else [text for text in texts if text not in done]
            if inputs:
                counts["inputs left for another time"] += len(rest)
                to_answer.append(ToAnswer(task, inputs, rest, lender.id if has_none else None))
            elif task.examples and not texts:
                counts["labelled already (relabels=true answers them anew)"] += 1
            else:
                counts["without an input that can be read"] += 1
        return to_answer

    def unlabelled(self, lender: Task, task: Task) -> list[str]:
        """Inputs that a teacher may be asked: those without a label; of another task, or with
        relabels, all."""
        if lender is task and not self.config.relabels:
            labelled = {example.input for example in task.examples}
            return [text for text in dict.fromkeys(task.inputs) if text not in labelled]
        texts = inputs_of(lender, len(lender.examples) + len(lender.inputs))
        # By the instruction, not by its place: the draw does not depend on the tasks before it.
        random.Random(f"answers {self.seed} {task.instruction}").shuffle(texts)
        return texts

    def can_read(self, instruction: str, text: str) -> bool:
        """Whether the Task LLM can read and answer the input, with the instruction and without."""
        model, length = self.ship.model, self.ship.config.evaluation.max_new_tokens
        try:
            checks.check_inputs(model, [text], length, instruction)
            checks.check_length(
                len(model.prompts.task_prompt(text, instruction)) + length,
                model.task_llm.language_model.context_length,
                "input",
                "Task LLM",
            )
        except UserError:
            return False
        return True

    @torch.no_grad()
    def nearest(self, instruction: str) -> Task:
        """The known task with inputs whose latent is nearest."""
        (latent_Z,) = self.ship.model.encode([instruction])
        return self.lenders[nearest_known(self.bank, latent_Z, 1)[0].instruction]

    @cached_property
    def bank(self) -> Bank:
        return self.ship.bank_of(list(self.lenders))
