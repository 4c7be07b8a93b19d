"""Whether a run's Task LLM follows an instruction that stands in its prompt.

Induction ranks candidates by both ways in which a text is used, through the encoder and in the
prompt. A small base may not follow text at all: what it then answers tells candidates apart by
chance, at half the cost of the search; and the text that it writes when it is asked for one is
seldom right. So it is measured, once a run, on tasks of its training:

    measure(model, splits.seen).follows     # then both, else by the encoder, and it is not asked

Letters: C candidates, M examples of a task.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ship_ds.data.task import SplitTask, spread
from ship_ds.inference.scoring import fit_in_prompt, fit_of_latents
from ship_ds.model.encoder import means_of
from ship_ds.model.ship import ShipModel

_NUM_TASKS, _NUM_EXAMPLES = 16, 2


@dataclass(frozen=True)
class PromptFollowing:
    """How training examples are answered with their instruction and without.

    Args:
        loss_stated: of an example in nats, the instruction in the prompt.
        loss_bare: of an example in nats, without it.
        right_stated: examples answered exactly with the instruction in the prompt.
        right_encoded: examples answered exactly under the instruction's adapter.
        num_examples: how many there are.
    """

    loss_stated: float
    loss_bare: float
    right_stated: int
    right_encoded: int
    num_examples: int

    @property
    def follows(self) -> bool:
        """Whether text in the prompt lowers the loss, and gives half as many right answers as the
        adapters do, or more: a base that is told what to do and guesses has a lower loss too."""
        return self.loss_stated < self.loss_bare and 2 * self.right_stated >= self.right_encoded

    def __str__(self) -> str:
        """What was measured, for people."""
        return (
            f"of {self.num_examples} training examples the Task LLM answers {self.right_stated} "
            f"with their instruction in its prompt ({self.loss_stated:.1f} nats each; without any "
            f"{self.loss_bare:.1f}) and {self.right_encoded} under its adapter"
        )


def measure_prompt_following(model: ShipModel, seen: Sequence[SplitTask]) -> PromptFollowing | None:
    """How the model answers a few examples of tasks that it was trained on; None where no task has
    two of them.

    Args:
        model: with its trained weights.
        seen: the tasks, of which up to 16 are taken, evenly spaced.
    """
    with_enough = [task for task in seen if len(task.train) >= _NUM_EXAMPLES]
    if not with_enough:
        return None
    tasks = spread(with_enough, _NUM_TASKS)
    texts = [task.task.instruction for task in tasks]
    examples = [task.train[:_NUM_EXAMPLES] for task in tasks]
    stated = fit_in_prompt(model, texts, examples)
    bare = fit_in_prompt(model, [None] * len(tasks), examples)
    read = model.read_once(texts)
    encoded = fit_of_latents(model, means_of(read), texts, examples, read)
    return PromptFollowing(
        float(stated.loss_CM.mean()),
        float(bare.loss_CM.mean()),
        int(stated.right_CM.sum()),
        int(encoded.right_CM.sum()),
        stated.right_CM.numel(),
    )
