"""How induction searches: the settings of `ship-ds induce` and `ship-ds reason`.

Imports no torch, so that a wrong one is told at once.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from ship_ds.config import overridden
from ship_ds.errors import UserError
from ship_ds.section import Section, first_error

InductionMethod = Literal["direct", "indirect", "bank", "propose", "union"]
InductionPreset = Literal["ours", "published", "published-refined"]
"""Numbers of `direct` and `indirect`: ours, those of the authors' code, and these with one descent
more from the text that was induced, which is ours."""

DESCENTS = ("direct", "indirect")
GRAMMATICAL = 0.5
"""Share of a bank's instructions in slots from which on they count as made by a grammar."""
_PUBLISHED: dict[str, Any] = {
    "steps": 400,
    "min_steps": 100,
    "patience": 1,
    "direct_lr": 1e-2,
    "indirect_lr": 1e-2,
    "prior": 0.0,
    "num_restarts": 1,
    "starts_from_draw": True,
    "num_shown": 1,
    "num_beams": 1,
    "num_samples": 0,
}
_LANGUAGE: dict[str, Any] = {
    "num_at_once": 8,
    "asks_task_llm": True,
    "analogies": False,
    "num_known": 12,
    "num_views": 4,
    "num_beams": 2,
    "num_samples": 2,
    "temperature": 0.7,
    "num_finalists": 8,
    "num_rounds": 1,
    "num_edits": 0,
    "num_splices": 0,
    "num_neighbours": 2,
    "refine_steps": 0,
}

_INDEXED: dict[str, Any] = {"num_views": 2, "num_rounds": 0}
"""Where known instructions are found by their tasks' examples, too: what the decoder writes is less
of what is tested. Of 16 dev tasks of one run of SmolLM2 a round took a third of the time and chose
another text for two, which answered one more of five examples and was no nearer to the true one."""
_OF_A_ROUND = {"num_neighbours", "num_refined", "refine_steps", "refine_lr", "num_edited"}
_OF_A_ROUND |= {"num_edits", "num_parents", "num_splices"}
"""Settings of rounds alone: who gives one wants a round."""


class InductionConfig(Section):
    """How induction searches; `--set key=value` changes one of them."""

    method: InductionMethod = "union"
    """Where instructions are looked for; union: in proposals, known ones and analogies."""
    num_known: PositiveInt = 24
    """Known instructions that the bank hands on to be tested."""
    by_examples: bool = True
    """Whether `union`, among instructions that people wrote, takes the known ones whose tasks have
    examples like the given ones, by their words (example_index.py), instead of those that the
    decoder finds likely, and lets that count for a text beside what it answers. Where the run's
    data are at hand, or were read when it ended; `ship-ds explain`, whose inputs are those of other
    tasks, does not look there."""
    tries_all_known: bool = False
    """Whether the bank tries every adapter it has on the first example, where it has 2,000 at most,
    instead of walking to those that fit."""
    asks_decoder: bool = True
    """Whether the decoder has a part in `union`; without, the known instructions, what follows from
    them by analogy and splices are all there is: what the decoder is worth shows beside it."""
    num_at_once: PositiveInt = 64
    """Tasks that are searched for together; progress is shown after each part of their search."""
    asks_task_llm: bool = False
    """Whether the bare Task LLM, shown the examples, proposes an instruction too. On by itself
    among instructions that people wrote, where it follows text in its prompt
    (prompt_following.py)."""
    ranks_in_prompt: bool = True
    """Whether candidates are tested as text in the prompt too, beside the encoder's adapters. Off
    by itself where the run's Task LLM does not follow text in its prompt (prompt_following.py)."""
    num_neighbours: NonNegativeInt = 0
    """Known instructions nearest to each of the best candidates that a round tests."""
    analogies: bool = True
    """Whether `union` looks, beside the known instructions, among those that follow from them by
    analogy (analogies.py). Execution accuracy in the prompt and through the encoder of the
    quickstart's 55 dev rules, seed 0: without them, by the brief walk (bank.py), 0.740 and 0.655;
    with them, by the thorough one, 0.771 and 0.684; about 100 s each in all, once."""
    num_views: PositiveInt = 4
    """Choices and orders of the examples that the decoder proposes from."""
    num_read: NonNegativeInt = 2
    """Choices of the examples that the encoder makes latents of, where it was trained to without an
    instruction beside them: what the decoder writes of these is proposed, and the known
    instructions nearest to them. `direct` starts from the first of them. Zero: none."""
    num_samples: NonNegativeInt = 6
    """Proposals sampled from each view."""
    num_beams: PositiveInt = 4
    """Beams of each view."""
    temperature: PositiveFloat = 1.0
    """Of the sampled proposals; below 1 they are closer to the likeliest one."""
    num_screened: PositiveInt = 2
    """Examples on which all candidates are tested; the rest see only the best of these."""
    num_finalists: PositiveInt = 12
    """Candidates that are tested on every example."""
    num_rounds: NonNegativeInt = 2
    """Refinements of tasks that no candidate explains wholly. By itself one among instructions that
    people wrote, and none where these are found by their tasks' examples and nothing of a round was
    set."""
    num_edited: PositiveInt = 3
    """Best candidates whose texts are edited in a round."""
    num_edits: NonNegativeInt = 16
    """Changes of each of them that are tested."""
    num_parents: PositiveInt = 60
    """Best on the screening examples, whose texts are spliced in a round."""
    num_splices: NonNegativeInt = 160
    """With 60 parents. Execution accuracy in the prompt of the quickstart's 55 dev rules, seed 0:
    64 of 24 parents 0.707, 160 of 60 0.740, 320 of 100 0.715; once each, differences that 55 rules
    hardly tell from noise."""
    num_refined: PositiveInt = 2
    """Best candidates whose latents are refined by gradient in a round, and decoded again."""
    refine_steps: NonNegativeInt = 10
    """Of gradient descent on a latent in a round; zero: the latent is decoded as it is, which words
    the candidate anew."""
    refine_lr: PositiveFloat = 0.05
    """Of that descent."""
    steps: PositiveInt = 60
    """Of `direct` and `indirect`, at most."""
    min_steps: NonNegativeInt = 0
    """Of both, before a rise of the held-back example's loss may end a descent."""
    patience: PositiveInt = 5
    """Steps of both without a lower held-back loss after which a descent ends."""
    num_shown: NonNegativeInt = 0
    """Examples that the decoder reads beside the latents of both, as far as it was trained to."""
    starts_from_draw: bool = False
    """Whether `direct` starts from a draw of the prior; else from its mean first, or from what the
    encoder makes of the examples (`num_read`)."""
    num_text_starts: NonNegativeInt = 0
    """Further descents of both, each from the best text so far, by a quarter of the steps."""
    num_restarts: PositiveInt = 3
    """Starting points of `direct` and `indirect`."""
    direct_lr: PositiveFloat = 0.05
    """Of `direct`, which descends on z."""
    indirect_lr: PositiveFloat = 1e-2
    """Of `indirect`, which descends on an instruction's embeddings."""
    prior: NonNegativeFloat = Field(1e-3)
    """Weight of z's negative log-density under the prior beside the mean loss of an example."""
    max_new_tokens: PositiveInt = 40
    """Of an instruction that is written."""

    @classmethod
    def of_preset(
        cls, preset: InductionPreset, method: InductionMethod, **more: Any
    ) -> "InductionConfig":
        """The search by a preset's numbers; a preset other than "ours" is of the two descents.

        `published` has the numbers of the authors' code (forangel2014/VaiBot at b6794ed, main.py):
        Adam at 1e-2, at least 100 steps, until the held-back example's loss rises; from one start,
        the neutral instruction or a draw of N(0, I); and one greedy text, which the decoder writes
        beside an example, as their commands ask it to. What differs: ours holds an example back
        that is not descended on, as the paper says, and keeps the best point, where theirs descends
        on that very example; a rise is one above the best loss here and above the last one there;
        400 steps are the end here; and their `direct` adds 1e-3 of the mean absolute number of z.

        Args:
            preset: by name.
            method: where instructions are looked for.
            more: other settings.

        Raises:
            UserError: the preset is not of this method.
        """
        if preset == "ours":
            return cls.model_validate({"method": method, **more})
        if method not in DESCENTS:
            raise UserError(
                f"--preset {preset}: is of --method direct and indirect; --method {method} is not "
                "the authors'"
            )
        refined = {"num_text_starts": 1} if preset == "published-refined" else {}
        return cls.model_validate({"method": method, **_PUBLISHED, **refined, **more})

    def searches_by_examples(self, share_in_slots: float) -> bool:
        """Whether the search asks which known tasks have examples like the given ones, in a bank
        with this share of its texts in slots (`analogies.share_in_slots`): words say little of a
        task where all have the same few."""
        return self.method == "union" and self.by_examples and share_in_slots < GRAMMATICAL

    def suited_to(self, share_in_slots: float, has_index: bool = False) -> "InductionConfig":
        """The search for a bank: what changes and joins texts of a grammar gives nothing on the
        instructions that people write, whose models are large besides.

        Args:
            share_in_slots: see `analogies.share_in_slots`.
            has_index: whether the bank knows the examples of its tasks.

        Returns:
            The same for a grammar; else with the numbers of `_LANGUAGE` where none was given.
        """
        if self.method != "union" or share_in_slots >= GRAMMATICAL:
            return self
        numbers = _LANGUAGE | (_INDEXED if has_index else {})
        if self.model_fields_set & _OF_A_ROUND:
            numbers = numbers | {"num_rounds": _LANGUAGE["num_rounds"]}
        return self.model_copy(
            update={k: v for k, v in numbers.items() if k not in self.model_fields_set}
        )

    def with_overrides(self, overrides: Sequence[str]) -> "InductionConfig":
        """The same settings with some of them changed.

        Args:
            overrides: such as ["num_rounds=0", "temperature=0.7"].

        Raises:
            UserError: an unknown key or a wrong value; the message names it.
        """
        try:
            return type(self).model_validate(
                overridden(self.model_dump(exclude_unset=True), overrides)
            )
        except ValidationError as error:
            line = first_error(error).line_beside(type(self).model_fields)
            raise UserError(f"--set {line}") from None
