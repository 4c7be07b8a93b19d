"""How induction searches: the settings of `ship-ds induce` and `ship-ds reason`.

Imports no torch, so that a wrong one is told at once.
"""

from collections.abc import Sequence
from typing import Literal

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
from ship_ds.section import Section

Method = Literal["direct", "indirect", "bank", "propose", "union"]


class InductionConfig(Section):
    """How induction searches; `--set key=value` changes one of them."""

    method: Method = "union"
    """Where instructions are looked for; union: in proposals, known ones and analogies."""
    num_known: PositiveInt = 24
    """Known instructions that the bank hands on to be tested."""
    tries_all_known: bool = False
    """Whether the bank tries every adapter it has on the first example, where it has 200 at most,
    instead of walking to those that fit."""
    walk: Literal["brief", "thorough"] = "thorough"
    """How many known adapters the bank tries on its way to those that fit (bank.py)."""
    asks_decoder: bool = True
    """Whether the decoder has a part in `union`; without, the known instructions, what follows from
    them by analogy and splices are all there is: what the decoder is worth shows beside it."""
    analogies: bool = True
    """Whether `union` looks, beside the known instructions, among those that follow from them by
    analogy (analogies.py). Execution accuracy in the prompt and through the encoder of the
    quickstart's 55 dev rules, seed 0: without them, by the brief walk (bank.py), 0.740 and 0.655;
    with them, by the thorough one, 0.771 and 0.684; about 100 s each in all, once."""
    num_views: PositiveInt = 4
    """Choices and orders of the examples that the decoder proposes from."""
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
    """Refinements of tasks that no candidate explains wholly."""
    num_edited: PositiveInt = 3
    """Best candidates whose texts are edited in a round."""
    num_edits: PositiveInt = 16
    """Changes of each of them that are tested."""
    num_parents: PositiveInt = 60
    """Best on the screening examples, whose texts are spliced in a round."""
    num_splices: NonNegativeInt = 160
    """With 60 parents. Execution accuracy in the prompt of the quickstart's 55 dev rules, seed 0:
    64 of 24 parents 0.707, 160 of 60 0.740, 320 of 100 0.715; once each, differences that 55 rules
    hardly tell from noise."""
    num_refined: PositiveInt = 2
    """Best candidates whose latents are refined by gradient in a round."""
    refine_steps: NonNegativeInt = 10
    """Of gradient descent on a latent in a round; zero: none."""
    refine_lr: PositiveFloat = 0.05
    """Of that descent."""
    steps: PositiveInt = 60
    """Of `direct` and `indirect`, at most."""
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

    def with_overrides(self, overrides: Sequence[str]) -> "InductionConfig":
        """The same settings with some of them changed.

        Args:
            overrides: such as ["num_rounds=0", "temperature=0.7"].

        Raises:
            UserError: an unknown key or a wrong value; the message names it.
        """
        try:
            return type(self).model_validate(overridden(self.model_dump(), overrides))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                known = ", ".join(type(self).model_fields)
                raise UserError(f"--set {key}: unknown key; there are {known}") from None
            message = first["msg"].removeprefix("Value error, ")
            raise UserError(f"--set {key + ': ' if key else ''}{message}") from None
