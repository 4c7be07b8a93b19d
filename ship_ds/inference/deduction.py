"""Answering for many tasks at once: under an adapter each, with the instruction in the prompt, or
by the bare base.

    answer_latents(model, latent_TZ, ["add 3", "reverse"], [["1 2"], ["3 4", "5"]], 20)
    -> [["4 5"], ["4 3", "5"]]

Everybody who wants answers in batches comes here. How many rows a batch has is what the free memory
allows (model/budget.py).

Letters: T tasks, Z latent size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

import torch
from torch import Tensor

from ship_ds.data.task import Example, Reading
from ship_ds.model import budget
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.batch import TokenBatch
from ship_ds.model.encoder import means_of
from ship_ds.model.generation import greedy
from ship_ds.model.search import beam_search
from ship_ds.model.ship import AnyReading, ShipModel
from ship_ds.model.task_llm import TaskLlm
from ship_ds.prompt import PromptFormat

AnswersByTask = list[list[str | None]]
"""One row a task, one answer an input; None where no end of sequence came in time, or a `CutOff`
for whoever scores what was written all the same (`keeps_cut_off`)."""
Ids = Sequence[int]
AdapterOf = Callable[[Sequence[int]], Adapter]
"""Numbers of tasks -> their adapters, or one adapter for all."""


@dataclass(frozen=True)
class Answerer:
    """Continues prompts by a Task LLM.

    Args:
        task_llm: the model.
        form: its prompt format.
        device: where it is.
        num_virtual_tokens: that its adapters put before each prompt.
        adapter_bytes: of one task's adapter.
        num_beams: 1 decodes greedily.
        keeps_cut_off: an answer that did not end in time is a `CutOff` in place of None.
    """

    task_llm: TaskLlm
    form: PromptFormat
    device: torch.device
    num_virtual_tokens: int = field(default=0, kw_only=True)
    adapter_bytes: int = field(default=0, kw_only=True)
    num_beams: int = field(default=1, kw_only=True)
    keeps_cut_off: bool = field(default=False, kw_only=True)

    def answers(
        self,
        questions: Sequence[Sequence[Ids]],
        max_new_tokens: int,
        adapter_of: AdapterOf | None = None,
    ) -> AnswersByTask:
        """Each task's answers.

        Args:
            questions: prompts as token ids, one list a task.
            max_new_tokens: cuts an answer off.
            adapter_of: makes the tasks' adapters; None: the bare base.
        """
        rows = self.rows(questions, max_new_tokens, adapter_of)
        text_of = self.form.written_text if self.keeps_cut_off else self.form.finished_text
        return [[text_of(row) for row in rows_of_task] for rows_of_task in rows]

    @torch.no_grad()
    def rows(
        self,
        questions: Sequence[Sequence[Ids]],
        max_new_tokens: int,
        adapter_of: AdapterOf | None = None,
    ) -> list[list[Sequence[int]]]:
        """What follows each prompt, as token ids.

        Args:
            questions: prompts as token ids, one list a task.
            max_new_tokens: cuts an answer off.
            adapter_of: makes the tasks' adapters; None: the bare base, whose rows belong to no
                task and so share batches by their lengths alone.
        """
        if adapter_of is None:
            alone = self._rows([[ids] for task in questions for ids in task], max_new_tokens, None)
            rows = (row for (row,) in alone)
            return [list(islice(rows, len(task))) for task in questions]
        return self._rows(questions, max_new_tokens, adapter_of)

    def _rows(
        self,
        questions: Sequence[Sequence[Ids]],
        max_new_tokens: int,
        adapter_of: AdapterOf | None,
    ) -> list[list[Sequence[int]]]:
        costs, is_greedy = self.task_llm.language_model.costs, self.num_beams == 1

        def row_bytes(width: int) -> int:
            return self.num_beams * costs.decoded_row(
                width, max_new_tokens, chooses_greedily=is_greedy
            )

        rows: list[list[Sequence[int]]] = [[()] * len(task) for task in questions]
        widths = [[self.num_virtual_tokens + len(ids) for ids in task] for task in questions]
        free = budget.bytes_free(self.device)
        task_bytes = self.adapter_bytes if adapter_of else 0
        for batch in budget.batches(widths, free, row_bytes, task_bytes):
            prompts = [ids for one in batch for ids in questions[one.task][one.start : one.stop]]
            adapter = adapter_of([one.task for one in batch]) if adapter_of else None
            continued = iter(self._continued(adapter, prompts, max_new_tokens))
            for one in batch:
                # Written by place: batches come by length, not in the order of the tasks.
                rows[one.task][one.start : one.stop] = islice(continued, one.stop - one.start)
        return rows

    def _continued(
        self, adapter: Adapter | None, prompts: Sequence[Ids], max_new_tokens: int
    ) -> Sequence[Sequence[int]]:
        num_virtual = 0 if adapter is None else self.num_virtual_tokens
        batch = TokenBatch.build(prompts, None, self.form.pad_id, num_virtual, self.device)
        stream = self.task_llm.stream(adapter, batch)
        if self.num_beams == 1:
            return greedy(stream, self.form.eos_id, max_new_tokens, self.form.other_ends)
        searches = beam_search(
            stream,
            self.num_beams,
            self.form.eos_id,
            max_new_tokens,
            other_ends=self.form.other_ends,
        )
        return [beams[0].tokens for beams in searches]


def answerer(
    model: ShipModel,
    num_beams: int = 1,
    *,
    readings: Sequence[AnyReading | None] = (),
    keeps_cut_off: bool = False,
) -> Answerer:
    """The model's own Task LLM under the adapters of its hypernetwork.

    Args:
        model: whose Task LLM answers.
        num_beams: 1 decodes greedily.
        readings: what the adapters fuse, where they do: they take memory.
        keeps_cut_off: see `Answerer`.
    """
    return Answerer(
        model.task_llm,
        model.prompts,
        model.device,
        num_virtual_tokens=model.num_virtual_tokens,
        adapter_bytes=model.adapter_bytes_of(readings),
        num_beams=num_beams,
        keeps_cut_off=keeps_cut_off,
    )


def bare_answerer(model: ShipModel, num_beams: int = 1, *, keeps_cut_off: bool = False) -> Answerer:
    """The model's own Task LLM without adapters.

    Args:
        model: whose Task LLM answers.
        num_beams: 1 decodes greedily.
        keeps_cut_off: see `Answerer`.
    """
    return Answerer(
        model.task_llm,
        model.prompts,
        model.device,
        num_beams=num_beams,
        keeps_cut_off=keeps_cut_off,
    )


def prompt_with_room(
    prompt: Callable[[Sequence[Example]], Ids],
    shown: Sequence[Example],
    model: ShipModel,
    max_new_tokens: int,
) -> Ids:
    """The prompt of as many of the examples as the bare Task LLM's context has room for beside what
    it will write; the last ones are left out first.

    Args:
        prompt: makes token ids of examples.
        shown: the examples, the most wanted first.
        model: whose Task LLM reads the prompt.
        max_new_tokens: that have to fit behind it.
    """
    context = model.task_llm.language_model.context_length
    whole = prompt(shown)
    if context is None or len(whole) + max_new_tokens <= context:
        return whole
    num_tokens = (len(prompt(shown[:count])) for count in range(1, len(shown)))
    # More examples are never fewer tokens, so the first that does not fit ends the count.
    num_fitting = sum(1 for _ in takewhile(lambda n: n + max_new_tokens <= context, num_tokens))
    return prompt(shown[:num_fitting])


def answer_latents(
    model: ShipModel,
    latent_TZ: Tensor,
    wordings: Sequence[str],
    inputs: Sequence[Sequence[str]],
    max_new_tokens: int,
    num_beams: int = 1,
    readings: Sequence[AnyReading] | None = None,
    *,
    keeps_cut_off: bool = False,
) -> AnswersByTask:
    """Each task's inputs answered under the adapter of its own latent.

    Args:
        model: makes adapters and answers.
        latent_TZ: one a task.
        wordings: an instruction a task; they matter to a Task LLM that reads them too.
        inputs: one row a task, of any length.
        max_new_tokens: cuts an answer off.
        num_beams: 1 decodes greedily.
        readings: what each latent was made of, for an adapter that fuses it, which reads it again
            unless it was `read_once`; None: the wordings.
        keeps_cut_off: see `Answerer`, as below.
    """
    read: Sequence[AnyReading] = wordings if readings is None else readings
    questions = [
        [model.question(text, wording) for text in texts]
        for wording, texts in zip(wordings, inputs, strict=True)
    ]
    return answerer(model, num_beams, readings=read, keeps_cut_off=keeps_cut_off).answers(
        questions,
        max_new_tokens,
        lambda tasks: model.adapt(latent_TZ[list(tasks)], [read[task] for task in tasks]),
    )


def answer_read(
    model: ShipModel,
    readings: Sequence[str | Reading],
    wordings: Sequence[str],
    inputs: Sequence[Sequence[str]],
    max_new_tokens: int,
    num_beams: int = 1,
    *,
    keeps_cut_off: bool = False,
) -> AnswersByTask:
    """Each task's inputs answered under the adapter of what the encoder reads of it, once.

    Args:
        model: makes adapters and answers.
        readings: what the encoder reads, one a task.
        wordings, inputs, max_new_tokens, num_beams, keeps_cut_off: see `answer_latents`.
    """
    if not readings:
        return []
    # Else an adapter that fuses the reading would run the encoder again for every batch.
    read = model.read_once(readings)
    return answer_latents(
        model,
        means_of(read),
        wordings,
        inputs,
        max_new_tokens,
        num_beams,
        read,
        keeps_cut_off=keeps_cut_off,
    )


def answer_under(
    model: ShipModel,
    adapter: Adapter,
    wording: str,
    inputs: Sequence[str],
    max_new_tokens: int,
    *,
    keeps_cut_off: bool = False,
) -> list[str | None]:
    """Inputs answered under one given adapter, of one task.

    Args:
        model: answers.
        adapter: of one task.
        wording: the instruction, for a Task LLM that reads it too.
        inputs: to be answered.
        max_new_tokens: cuts an answer off.
        keeps_cut_off: see `Answerer`.
    """
    questions = [[model.question(text, wording) for text in inputs]]
    answering = answerer(model, keeps_cut_off=keeps_cut_off)
    return answering.answers(questions, max_new_tokens, lambda tasks: adapter)[0]


def answer_stated(
    model: ShipModel,
    wordings: Sequence[str],
    inputs: Sequence[Sequence[str]],
    max_new_tokens: int,
    num_beams: int = 1,
    prompt: Callable[[str, str], tuple[int, ...]] | None = None,
    *,
    keeps_cut_off: bool = False,
) -> AnswersByTask:
    """The bare Task LLM's answers with each task's instruction in the prompt.

    Args:
        model: whose Task LLM answers.
        wordings: an instruction a task.
        inputs: one row a task, of any length.
        max_new_tokens: cuts an answer off.
        num_beams: 1 decodes greedily.
        prompt: of an input and an instruction, as ids; None: ours (`PromptFormat.task_prompt`).
        keeps_cut_off: see `Answerer`.
    """
    prompt = prompt or model.prompts.task_prompt
    questions = [
        [prompt(text, wording) for text in texts]
        for wording, texts in zip(wordings, inputs, strict=True)
    ]
    answering = bare_answerer(model, num_beams, keeps_cut_off=keeps_cut_off)
    return answering.answers(questions, max_new_tokens)


def answer_bare(
    model: ShipModel,
    inputs: Sequence[Sequence[str]],
    max_new_tokens: int,
    *,
    keeps_cut_off: bool = False,
) -> AnswersByTask:
    """The bare Task LLM's answers, with neither adapter nor instruction.

    Args:
        model: whose Task LLM answers.
        inputs: one row a task, of any length.
        max_new_tokens: cuts an answer off.
        keeps_cut_off: see `Answerer`.
    """
    questions = [[model.prompts.task_prompt(text) for text in texts] for texts in inputs]
    answering = bare_answerer(model, keeps_cut_off=keeps_cut_off)
    return answering.answers(questions, max_new_tokens)
