"""What a run costs beside its scores: its steps, its sizes, and the FLOPs of a query.

A query is a question and its answer, as long as those of the tasks that are asked are on average;
its FLOPs are by the formula of flops.py. An adapter is made once of an instruction, and a query
under it costs the same however long that is; in the prompt it is read again by every query.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean, median
from typing import Any

import torch

from ship_ds.config import lora_of
from ship_ds.data.task import SplitTask
from ship_ds.errors import UserError
from ship_ds.evaluation.baselines.trained import TrainedMethod, costs_of
from ship_ds.evaluation.harness import Harness, Run
from ship_ds.flops import ShipSize, deduction_flops, query_flops
from ship_ds.model.batch import TokenBatch
from ship_ds.model.ship import ShipModel
from ship_ds.parsing import read_json_lines

INSTRUCTION_TOKENS = (16, 256, 4096)


def training_costs(run: Run) -> dict[str, Any]:
    """Steps, minutes of the steps alone, and the median seconds of a step, from metrics.jsonl.

    Raises:
        UserError: it is not there.
    """
    log = run.folder / "metrics.jsonl"
    if not log.is_file():
        raise UserError(f"{log}: missing: it says how many steps the run took, and how long")
    seconds = [row["speed/step_seconds"] for row in read_json_lines(log)]
    return {
        "steps": len(seconds),
        "minutes": round(sum(seconds) / 60, 4),
        "seconds_a_step": round(median(seconds), 4),
    }


def sizes(model: ShipModel) -> dict[str, Any]:
    """Parameters that are trained, and numbers of the adapter that is generated for a task."""
    # Of an instruction of one token, where the adapter is as long as that.
    one_token = TokenBatch.of_lengths(1, 1, 0, device=model.device)
    adapter = model.adapt_read(torch.zeros(1, model.config.latent_size), one_token)
    return {
        "trained_parameters": model.parameter_counts()["trained"],
        "adapter_numbers": sum(tensor.numel() for tensor in adapter.tensors().values()),
    }


def query_costs(model: ShipModel, tasks: Sequence[SplitTask]) -> dict[str, Any]:
    """GFLOPs by the instruction's tokens: `query_gigaflops` under the adapter,
    `prompt_query_gigaflops` of the bare Task LLM with the instruction in its prompt,
    `deduction_gigaflops` of making the adapter, once; `bare_query_gigaflops` of the bare Task LLM
    alone. Where the adapter is a plain LoRA, as the baselines' is then, `lora_query_gigaflops` and
    `lora_prompt_query_gigaflops` of one without the instruction and with it.

    Args:
        model: the run's.
        tasks: whose questions and answers give the lengths.

    Raises:
        UserError: they have no test examples.
    """
    prompts, size = model.prompts, model.flop_size()
    asked = list(chain.from_iterable(task.test for task in tasks))
    if not asked:
        raise UserError("--parts: no task of these parts has test examples; name others")
    question = round(fmean(len(prompts.task_prompt(example.input)) for example in asked))
    answer = round(fmean(len(prompts.target(example.target)) for example in asked))
    # Some runs state the instruction in the prompt under the adapter, too.
    is_stated = model.config.task_llm.instruction != "none"

    def under_adapter(num_tokens: int) -> int:
        num_read = model.num_virtual_tokens + question + num_tokens * is_stated
        num_fused = num_tokens * size.fuses
        return query_flops(size.task_llm, num_read, answer, under_adapter=True, num_fused=num_fused)

    def in_prompt(num_tokens: int) -> int:
        return query_flops(size.task_llm, question + num_tokens, answer, under_adapter=False)

    def made_once(num_tokens: int) -> int:
        return deduction_flops(size, num_tokens)

    def bare(num_tokens: int) -> int:
        return in_prompt(0)

    def under_lora(num_tokens: int) -> int:
        return under_lora_in_prompt(0)

    def under_lora_in_prompt(num_tokens: int) -> int:
        return query_flops(size.task_llm, question + num_tokens, answer, under_adapter=True)

    columns = {
        "query_gigaflops": under_adapter,
        "prompt_query_gigaflops": in_prompt,
        "deduction_gigaflops": made_once,
        "bare_query_gigaflops": bare,
    }
    if _is_plain_lora(model, size):
        columns["lora_query_gigaflops"] = under_lora
        columns["lora_prompt_query_gigaflops"] = under_lora_in_prompt
    return {
        "question_tokens": question,
        "answer_tokens": answer,
        **{
            name: {str(count): flops(count) / 1e9 for count in INSTRUCTION_TOKENS}
            for name, flops in columns.items()
        },
    }


def _is_plain_lora(model: ShipModel, size: ShipSize) -> bool:
    """Whether all that is added to the Task LLM are products of the LoRA that baselines have."""
    lora, task_llm = lora_of(model.config.hypernetwork), size.task_llm
    added = task_llm.after, task_llm.prefix, size.fuses, model.num_virtual_tokens
    if lora is None or any(added):
        return False
    return task_llm.low_rank.total == lora.rank * sum(map(sum, model.task_llm.sites().values()))


_QUERY_OF = {
    "prompting": "prompt_query_gigaflops",
    "bare_base": "bare_query_gigaflops",
    "sft": "lora_prompt_query_gigaflops",
    "tagi": "lora_query_gigaflops",
    "text_to_lora": "lora_query_gigaflops",
    "lora_per_task": "lora_query_gigaflops",
}
_MAKES_A_LORA = ("tagi", "text_to_lora", "lora_per_task")


def method_costs(harness: Harness, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a method beside SHIP: its training, and the FLOPs of a query.

    Args:
        harness: that measured it.
        name: of the method.
        facts: of the run that it was measured with.
    """
    method, costs = harness.methods[name], dict[str, Any]()
    if issubclass(method, TrainedMethod):
        costs |= costs_of(method, harness.method_folder(name), harness.budget)
    # Shots and other words make another prompt.
    is_longer = method.states_instruction and harness.config.changes_of(name)
    if not is_longer and (column := _QUERY_OF.get(name, "")) in facts:
        costs["query_gigaflops"] = facts[column]
        if name in _MAKES_A_LORA:
            costs["adapter_numbers"] = facts["adapter_numbers"]
    return costs
