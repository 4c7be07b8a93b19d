"""The settings of `ship-ds evaluate`. Imports no torch, so that a wrong option is told at once."""

from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from ship_ds.errors import UserError
from ship_ds.evaluation import ENDPOINT_URL
from ship_ds.section import Section, first_error

METHOD_NAMES = (
    "ship",
    "ship_indirect",
    "ship_direct",
    "ship_rounds",
    "ship_one_pass",
    "ship_confidence",
    "search_without_decoder",
    "nearest_known",
    "retrieval",
    "prompting",
    "icl",
    "sft",
    "prompt_tuning",
    "tagi",
    "itd",
    "instruction_induction",
    "text_to_lora",
    "lora_per_task",
    "adapter_sum",
    "read_own_adapter",
    "read_trained_lora",
    "explain",
    "random_decode",
    "bare_base",
    "shuffled_instruction",
    "neighbour_instruction",
    "majority_label",
)
"""In the order of the tables; methods/__init__.py has the class of each."""
Direction = Literal["deduction", "induction", "reasoning", "reconstruction"]
JudgeName = Literal["execution", "published-execution", "rouge", "similarity", "endpoint"]
BudgetName = Literal["minutes", "examples", "until_dev_stops"]
Part = Literal["seen", "dev", "unseen", "unseen_paraphrase"]
"""Of the rules; the last one is the seen rules in a wording that training never shows."""


class EndpointConfig(Section):
    """A server that speaks OpenAI's /chat/completions; its key is read from OPENAI_API_KEY, where
    it needs one."""

    url: str = ENDPOINT_URL
    """Where /chat/completions is found."""
    model: str = "default"
    """Name of the model that the server is asked for."""
    prompts: Literal["strict", "published", "published-lists"] = "strict"
    """What it is asked: strictly, by our own words, or by those of SHIP's authors, for texts as for
    answers."""
    retries: int = 5
    """Of a request that failed, each after a longer wait."""
    timeout_seconds: float = 60
    """For one reply."""


class HarnessConfig(Section):
    """What `ship-ds evaluate` measures; its options have the same names."""

    methods: tuple[str, ...] = Field(METHOD_NAMES, min_length=1)
    """SHIP, baselines and controls by name."""
    parts: tuple[Part, ...] = Field(("seen", "unseen"), min_length=1)
    """Of the tasks: those that SHIP was trained on, those it was tuned by, and new ones."""
    directions: tuple[Direction, ...] = Field(get_args(Direction), min_length=1)
    """In which the methods are asked, each in those that it has."""
    num_tasks: PositiveInt = 120
    """Of each part at most, evenly spaced."""
    num_shown: tuple[PositiveInt, ...] = Field((5,), min_length=1)
    """Examples shown in induction and reasoning; the first is the report's own, the others are
    beside it."""
    budget: BudgetName = "minutes"
    """What each baseline may spend on its training: equal minutes; as many answered examples as the
    run was trained on; or as long as its score on dev rises. No such score tells how many oracle
    LoRAs `tagi` and `text_to_lora` need: those then get their share of the run's examples."""
    minutes: PositiveFloat = 5
    """Of each baseline, with `budget: minutes`. How far they lead depends on the machine."""
    patience: PositiveInt = 4
    """Looks at dev in a row without a gain that end a training, with `budget: until_dev_stops`."""
    num_looks: NonNegativeInt = 4
    """At dev during the training of a baseline, for its learning curve; their time is not counted.
    With `budget: until_dev_stops` there is one a round over the seen tasks instead."""
    judges: tuple[JudgeName, ...] = ("execution", "rouge")
    """What scores an induced instruction: do its answers match (execution, and as the paper of
    instruction induction has it, published-execution), do its words (rouge), does its meaning by a
    sentence encoder (similarity), does a language model call it the same (endpoint); the last two
    score answers as well."""
    endpoint: EndpointConfig = EndpointConfig()
    """The judge behind an endpoint, where it is one of `judges`."""
    seed: int = 0
    """Of the examples that are shown, and of the baselines."""
    changes: tuple[str, ...] = ()
    """Settings of methods that are not their default: "sft.lr=1e-3", "tagi.oracles.steps=80",
    "ship.num_rounds=0"."""

    @field_validator("methods")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in METHOD_NAMES:
                raise ValueError(
                    f"there is no method {name!r}; there are {', '.join(METHOD_NAMES)}"
                )
        return names

    @field_validator("changes")
    @classmethod
    def _of_known_methods(cls, changes: tuple[str, ...]) -> tuple[str, ...]:
        for change in changes:
            name, dot, rest = change.partition(".")
            if name not in METHOD_NAMES or not dot or "=" not in rest:
                raise ValueError(f"{change}: a change has the form METHOD.key=value")
        return changes

    def changes_of(self, method: str) -> list[str]:
        """Those of one method, without its name."""
        whose = (change.partition(".") for change in self.changes)
        return [rest for name, _, rest in whose if name == method]

    @classmethod
    def from_options(
        cls,
        *,
        methods: str = "all",
        parts: str = "seen,unseen",
        num_tasks: int = 120,
        num_shown: str = "5",
        minutes: float = 5,
        judge: str = "execution,rouge",
        endpoint: str = ENDPOINT_URL,
        endpoint_model: str = "default",
        endpoint_prompts: str = "strict",
        seed: int = 0,
        budget: str = "minutes",
        patience: int = 4,
        num_looks: int = 4,
        changes: Sequence[str] = (),
        directions: str = "all",
    ) -> "HarnessConfig":
        """The settings that the options of `ship-ds evaluate` ask for; lists have commas in them.

        Args:
            methods: names, or "all".
            parts: of the tasks, by name.
            num_tasks: of a part, at most.
            num_shown: how many examples are shown, several with commas.
            minutes: of training, for each baseline.
            judge: names, or "none".
            endpoint, endpoint_model, endpoint_prompts: of the judge that is asked over HTTP.
            seed: of the draw of tasks and examples.
            budget: what ends a baseline's training.
            patience, num_looks: see `budgets.UntilDevStops` and `DevCurve`.
            changes: NAME.KEY=VALUE, of a method's settings.
            directions: names, or "all".

        Raises:
            UserError: one of them is wrong; the message names the option.
        """
        values = {
            "methods": METHOD_NAMES if methods == "all" else _listed(methods),
            "parts": _listed(parts),
            "directions": get_args(Direction) if directions == "all" else _listed(directions),
            "num_shown": _listed(num_shown),
            "judges": () if judge == "none" else _listed(judge),
            "num_tasks": num_tasks,
            "budget": budget,
            "minutes": minutes,
            "patience": patience,
            "num_looks": num_looks,
            "changes": tuple(changes),
            "seed": seed,
            "endpoint": {"url": endpoint, "model": endpoint_model, "prompts": endpoint_prompts},
        }
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = first_error(error)
            # --endpoint and its likes are a section of their own
            place = first.location[: 2 if first.location[0] == "endpoint" else 1]
            option = "-".join(map(str, place)).replace("_", "-").replace("judges", "judge")
            option = option.replace("changes", "set")
            raise UserError(f"--{option}: {first.text}") from None


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
