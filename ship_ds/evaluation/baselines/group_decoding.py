"""Group decoding (Sun et al. 2024, arXiv 2403.05789, section 3.2): one text grown under several
prompts at once."""

from collections.abc import Sequence

from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.inference.deduction import Ids
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.search import vote


def group_beams(
    base: FrozenBase,
    adapter: Adapter,
    prompts: Sequence[Sequence[Ids]],
    num_beams: int,
    max_new_tokens: int,
) -> list[list[str]]:
    """For each task the texts of a beam search scored by the mean over its prompts of
    log p(text | prompt), best first.

    Args:
        base: whose Task LLM writes.
        adapter: of one task, used in all rows.
        prompts: token ids of equally many prompts for each task.
        num_beams: texts a task.
        max_new_tokens: cuts a text off; such texts come after those that ended.
    """
    batch = base.batch([prompt for prompts_of_task in prompts for prompt in prompts_of_task], None)
    stream = base.task_llm.stream(adapter, batch)
    beams = vote(stream, len(prompts[0]), num_beams, base.prompts.eos_id, max_new_tokens)
    return [[base.prompts.text(beam.tokens) for beam in beams_of_task] for beams_of_task in beams]
