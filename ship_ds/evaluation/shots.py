"""Training examples of a task beside its instruction in each prompt: what a reference of
`ship_one_pass` is given, so that both know the same and one pays for it in every query."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ship_ds.api import Ship
from ship_ds.data.task import Example
from ship_ds.evaluation.questions import READ_DRAW
from ship_ds.inference.deduction import Ids, prompt_with_room


class TakesShots:
    """A method whose recipe has `num_examples`.

    A class with such a recipe says in its row that it sees examples, and how many: the harness
    makes one where the number is set (`--set prompting.num_examples=3`).
    """

    about: ClassVar[str]
    sees_labels: ClassVar[bool]
    recipe: ClassVar[Any]

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        count = cls.recipe.num_examples
        if count:
            cls.sees_labels = True
            cls.about = f"{cls.about}, and up to {count} of the task's training examples after it"


def settings_of_shots(count: int) -> dict[str, Any]:
    """What a cell of a method with so many shots depends on. Empty without, so that cells from
    before there were any stay valid."""
    return {"num_examples": count, "draw": READ_DRAW} if count else {}


def prompt_with_shots(
    ship: Ship, text: str, instruction: str, shots: Sequence[Example], target: str = ""
) -> Ids:
    """What the bare Task LLM reads before it answers.

    Args:
        ship: the run.
        text: the input.
        instruction: before the shots.
        shots: of which the last ones are left out first, where the context has no room for all.
        target: what is scored after the prompt; there is room for it, and for an answer.

    Returns:
        Token ids.
    """
    prompts = ship.model.prompts
    num_written = max(ship.config.evaluation.max_new_tokens, len(prompts.target(target)))
    return prompt_with_room(
        lambda some: prompts.task_prompt(text, instruction, some), shots, ship.model, num_written
    )
