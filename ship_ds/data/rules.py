"""The generated world of the embedded default: rules over short lists of numbers, each with
instructions and examples.

A rule is a family with its parameters ("keep the numbers greater than 4") or two of them in a row.
`build_world` is a pure function of its config: the same seed gives the same rules, parts and
examples on every machine. Three properties make the world a fair test of instruction -> parameters:

- rules are distinct by behaviour: two that agree on 95 % of 500 fixed inputs are one, and only the
  first is kept;
- inputs are drawn around a rule's own parameters, so that a neighbouring rule (greater than 5)
  answers them wrongly;
- dev and unseen rules are parted before anything is trained, the tiny language model included, and
  an unseen rule is unseen for a named reason: its parameters, its pairing of two steps (one of
  which may be unseen too), or its whole family. It is no step of a seen composition either.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from ship_ds.data.describe import describe_splits
from ship_ds.data.source import TaskSource, TextLengths
from ship_ds.data.task import Example, Splits, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.section import Section

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

MAX_VALUE = 9
"""Of the numbers that rules are told apart by."""
MIN_LENGTH, MAX_LENGTH = 4, 6
"""Of the lists that rules are told apart by."""
SAME_RULE_AGREEMENT = 0.95
NUM_FIXED_INPUTS = 500

Numbers = tuple[int, ...]
Step = Callable[[Numbers], Numbers]


class RulesConfig(Section):
    """The generated world: `seed` fixes rules and split; the counts are per rule (examples) or in
    all (unseen, dev)."""

    kind: Literal["rules"] = "rules"
    seed: int = 0
    """Of the rules, their split and their examples."""
    train_examples: PositiveInt = 48
    """Of each rule, to train on."""
    test_examples: PositiveInt = 10
    """Of each rule, to test on."""
    more_compositions: int = Field(0, ge=0, le=200)
    """More seen compositions: at most so many beside the world's own of each pairing that no dev or
    unseen rule has."""
    num_seen: PositiveInt | None = None
    """Train on so many of the seen rules alone, drawn by `seed`; None: on all of them."""
    form: Literal["spaces", "brackets"] = "spaces"
    """How a list is written: `3 9 5`, or `[3, 9, 5]` as in BIG-bench's list functions. The embedded
    model reads the first alone."""
    min_length: int = Field(MIN_LENGTH, ge=0)
    """Numbers in the shortest input."""
    max_length: int = Field(MAX_LENGTH, ge=2, le=20)
    """Numbers in the longest input; an answer may have twice as many."""
    max_value: int = Field(MAX_VALUE, ge=MAX_VALUE, le=999)
    """The largest number of an input. Above 9, half of the inputs have numbers up to 9 all the
    same, which rules' own numbers are near to."""

    @model_validator(mode="after")
    def _lengths(self) -> "RulesConfig":
        if self.min_length > self.max_length:
            raise ValueError("min_length: above max_length; give a smaller one")
        return self


_DEFAULT = RulesConfig()


@dataclass(frozen=True)
class Family:
    """Rules that differ by parameters alone.

    The last template is held out: training never shows it. `hints(*parameters)` are values worth
    meeting in an input.
    """

    name: str
    parameters: tuple[Numbers, ...]
    apply: Callable[..., Numbers]
    templates: tuple[str, ...]
    hints: Callable[..., Numbers] = lambda *parameters: ()


@dataclass(frozen=True)
class Rule:
    """One behaviour with its wordings; `held_out` is the wording that training never shows. steps:
    the two of a composition."""

    family: str
    name: str
    apply: Step
    wordings: tuple[str, ...]
    held_out: str
    hints: Numbers
    steps: tuple["Rule", ...] = ()


def _singles(values: Sequence[int]) -> tuple[Numbers, ...]:
    return tuple((value,) for value in values)


def _thin(pairs: Sequence[Numbers], count: int) -> tuple[Numbers, ...]:
    """`count` of `pairs`, spread evenly after a fixed shuffle, so that every parameter value occurs
    in several."""
    shuffled = list(pairs)
    random.Random(len(pairs)).shuffle(shuffled)
    return tuple(sorted(shuffled[:count]))


def _replace_at(xs: Numbers, position: int, value: int) -> Numbers:
    return (*xs[: position - 1], value, *xs[position:]) if position <= len(xs) else xs


def _add_at(xs: Numbers, position: int, value: int) -> Numbers:
    return _replace_at(xs, position, xs[position - 1] + value) if position <= len(xs) else xs


def _swap(xs: Numbers, i: int, j: int) -> Numbers:
    if max(i, j) > len(xs):
        return xs
    swapped = list(xs)
    swapped[i - 1], swapped[j - 1] = swapped[j - 1], swapped[i - 1]
    return tuple(swapped)


def _rotate(xs: Numbers, count: int) -> Numbers:
    count = count % len(xs) if xs else 0
    return xs[count:] + xs[:count]


def _near(*values: int) -> Numbers:
    return tuple(
        v for value in values for v in (value - 1, value, value + 1) if 0 <= v <= MAX_VALUE
    )


_NONE: tuple[Numbers, ...] = ((),)
_VALUES = range(MAX_VALUE + 1)
_PLACES = range(1, 6)

FAMILIES: tuple[Family, ...] = (
    Family(
        "keep_greater",
        _singles(range(1, 8)),
        lambda xs, a: tuple(x for x in xs if x > a),
        (
            "keep the numbers greater than {a}",
            "remove all numbers up to {a}",
            "only numbers above {a} stay",
            "select every number larger than {a}",
            "filter for numbers that exceed {a}",
        ),
        lambda a: _near(a),
    ),
    Family(
        "keep_less",
        _singles(range(2, 9)),
        lambda xs, a: tuple(x for x in xs if x < a),
        (
            "keep the numbers less than {a}",
            "remove all numbers from {a} up",
            "only numbers below {a} stay",
            "select every number smaller than {a}",
            "filter for numbers under {a}",
        ),
        lambda a: _near(a),
    ),
    Family(
        "remove_value",
        _singles(_VALUES),
        lambda xs, a: tuple(x for x in xs if x != a),
        (
            "remove every {a}",
            "delete the number {a} wherever it occurs",
            "drop all {a} from the list",
            "keep everything except {a}",
            "take each {a} out",
        ),
        lambda a: (a, a),
    ),
    Family(
        "add",
        _singles(range(1, 15)),
        lambda xs, a: tuple(x + a for x in xs),
        (
            "add {a} to every number",
            "increase each number by {a}",
            "every number grows by {a}",
            "raise all numbers by {a}",
            "sum {a} and each number",
        ),
    ),
    Family(
        "distance",
        _singles(range(1, 10)),
        lambda xs, a: tuple(abs(x - a) for x in xs),
        (
            "give the distance of every number from {a}",
            "replace each number by how far it is from {a}",
            "write the difference between each number and {a}",
            "measure how far every number is from {a}",
            "distance from {a} for each number",
        ),
    ),
    Family(
        "at_most",
        _singles(range(2, 8)),
        lambda xs, a: tuple(min(x, a) for x in xs),
        (
            "cap every number at {a}",
            "replace numbers above {a} by {a}",
            "limit each number to at most {a}",
            "lower larger numbers to {a}",
            "cut numbers down to {a}",
        ),
        lambda a: _near(a),
    ),
    Family(
        "at_least",
        _singles(range(2, 8)),
        lambda xs, a: tuple(max(x, a) for x in xs),
        (
            "raise smaller numbers to {a}",
            "replace numbers below {a} by {a}",
            "make each number at least {a}",
            "lift every number under {a} to {a}",
            "numbers less than {a} become {a}",
        ),
        lambda a: _near(a),
    ),
    Family(
        "prepend",
        _singles(_VALUES),
        lambda xs, a: (a, *xs),
        (
            "put {a} at the front",
            "insert {a} before the first number",
            "start the list with {a}",
            "prepend {a} to the list",
            "place {a} at the start",
        ),
    ),
    Family(
        "append",
        _singles(_VALUES),
        lambda xs, a: (*xs, a),
        (
            "put {a} at the end",
            "insert {a} after the last number",
            "end the list with {a}",
            "append {a} to the list",
            "place {a} at the back",
        ),
    ),
    Family(
        "take_first",
        _singles(range(1, 5)),
        lambda xs, a: xs[:a],
        (
            "take the first {a} numbers",
            "keep only the first {a} elements",
            "give the leading {a} numbers",
            "the list up to element {a}",
            "return the first {a}",
        ),
    ),
    Family(
        "take_last",
        _singles(range(1, 5)),
        lambda xs, a: xs[-a:],
        (
            "take the last {a} numbers",
            "keep only the last {a} elements",
            "give the final {a} numbers",
            "the trailing {a} numbers",
            "return the last {a}",
        ),
    ),
    Family(
        "element_at",
        _singles(range(2, 5)),
        lambda xs, a: xs[a - 1 : a],
        (
            "give element {a}",
            "take only the number at position {a}",
            "keep just element {a}",
            "which number is at position {a}",
            "return the number at place {a}",
        ),
    ),
    Family(
        "remove_at",
        _singles(_PLACES),
        lambda xs, a: xs[: a - 1] + xs[a:],
        (
            "remove element {a}",
            "delete the number at position {a}",
            "drop element {a} from the list",
            "take out the number at position {a}",
            "leave out the element at place {a}",
        ),
    ),
    Family(
        "from_position",
        _singles(range(3, 5)),
        lambda xs, a: xs[a - 1 :],
        (
            "give the list from element {a} on",
            "keep everything from position {a}",
            "start at element {a}",
            "the rest from position {a} on",
            "return all from place {a}",
        ),
    ),
    Family(
        "drop_last",
        _singles(range(1, 4)),
        lambda xs, a: xs[:-a],
        (
            "drop the last {a} numbers",
            "remove {a} numbers from the end",
            "leave out the final {a} elements",
            "delete the trailing {a} numbers",
            "cut {a} elements off the end",
        ),
    ),
    Family(
        "replace_value",
        _thin([p for p in itertools.product(_VALUES, repeat=2) if p[0] != p[1]], 78),
        lambda xs, a, b: tuple(b if x == a else x for x in xs),
        (
            "replace {a} by {b}",
            "change every {a} to {b}",
            "write {b} instead of {a}",
            "turn each {a} into {b}",
            "swap all {a} for {b}",
        ),
        lambda a, b: (a, a),
    ),
    Family(
        "insert_at",
        tuple(itertools.product(range(2, 6), _VALUES)),
        lambda xs, a, b: (*xs[: a - 1], b, *xs[a - 1 :]),
        (
            "insert {b} at position {a}",
            "put {b} in as element {a}",
            "add {b} to the list at position {a}",
            "make {b} the new element {a}",
            "squeeze {b} in at place {a}",
        ),
    ),
    Family(
        "replace_at",
        tuple(itertools.product(_PLACES, _VALUES)),
        _replace_at,
        (
            "replace element {a} by {b}",
            "set position {a} to {b}",
            "change the number at position {a} to {b}",
            "write {b} over element {a}",
            "overwrite place {a} with {b}",
        ),
    ),
    Family(
        "swap",
        tuple(itertools.combinations(range(1, 6), 2)),
        _swap,
        (
            "swap elements {a} and {b}",
            "exchange positions {a} and {b}",
            "switch the numbers at positions {a} and {b}",
            "trade element {a} with element {b}",
            "elements {a} and {b} change places",
        ),
    ),
    Family(
        "keep_between",
        tuple((a, b) for a in range(1, 7) for b in range(a + 2, 9)),
        lambda xs, a, b: tuple(x for x in xs if a <= x <= b),
        (
            "keep the numbers from {a} to {b}",
            "only numbers between {a} and {b} stay",
            "select numbers at least {a} and at most {b}",
            "remove all numbers outside {a} to {b}",
            "filter for the range {a} to {b}",
        ),
        lambda a, b: _near(a, b),
    ),
    Family(
        "remove_between",
        tuple((a, b) for a in range(1, 8) for b in range(a + 1, 9)),
        lambda xs, a, b: tuple(x for x in xs if not a <= x <= b),
        (
            "remove the numbers from {a} to {b}",
            "delete numbers between {a} and {b}",
            "drop numbers at least {a} and at most {b}",
            "keep all numbers outside {a} to {b}",
            "leave out the range {a} to {b}",
        ),
        lambda a, b: _near(a, b),
    ),
    Family(
        "replace_greater",
        tuple((a, b) for a in range(3, 8) for b in _VALUES if b <= a),
        lambda xs, a, b: tuple(b if x > a else x for x in xs),
        (
            "replace numbers greater than {a} by {b}",
            "change every number above {a} to {b}",
            "write {b} for each number larger than {a}",
            "numbers above {a} become {b}",
            "swap numbers over {a} for {b}",
        ),
        lambda a, b: _near(a),
    ),
    Family(
        "replace_less",
        tuple((a, b) for a in range(2, 7) for b in _VALUES if b >= a),
        lambda xs, a, b: tuple(b if x < a else x for x in xs),
        (
            "replace numbers less than {a} by {b}",
            "change every number below {a} to {b}",
            "write {b} for each number smaller than {a}",
            "numbers below {a} become {b}",
            "swap numbers under {a} for {b}",
        ),
        lambda a, b: _near(a),
    ),
    Family(
        "add_at",
        tuple(itertools.product(_PLACES, range(1, 10))),
        _add_at,
        (
            "add {b} to element {a}",
            "increase the number at position {a} by {b}",
            "element {a} grows by {b}",
            "raise the number at place {a} by {b}",
            "sum {b} and element {a}",
        ),
    ),
    Family(
        "replace_even",
        _singles(_VALUES),
        lambda xs, a: tuple(a if x % 2 == 0 else x for x in xs),
        (
            "replace even numbers by {a}",
            "change every even number to {a}",
            "write {a} for each even number",
            "even numbers become {a}",
            "swap even numbers for {a}",
        ),
    ),
    Family(
        "replace_odd",
        _singles(_VALUES),
        lambda xs, a: tuple(a if x % 2 == 1 else x for x in xs),
        (
            "replace odd numbers by {a}",
            "change every odd number to {a}",
            "write {a} for each odd number",
            "odd numbers become {a}",
            "swap odd numbers for {a}",
        ),
    ),
    Family(
        "repeat_at",
        _singles(_PLACES),
        lambda xs, a: xs[:a] + xs[a - 1 :] if a <= len(xs) else xs,
        (
            "repeat element {a}",
            "write the number at position {a} 2 times",
            "double element {a} in place",
            "say element {a} 2 times",
            "give element {a} twice",
        ),
    ),
    Family(
        "to_front",
        _singles(range(2, 6)),
        lambda xs, a: xs[a - 1 : a] + xs[: a - 1] + xs[a:],
        (
            "move element {a} to the front",
            "bring the number at position {a} to the start",
            "element {a} goes first",
            "shift element {a} to the front",
            "place {a} moves to the front",
        ),
    ),
    Family(
        "to_end",
        _singles(range(1, 5)),
        lambda xs, a: xs[: a - 1] + xs[a:] + xs[a - 1 : a],
        (
            "move element {a} to the end",
            "bring the number at position {a} to the back",
            "element {a} goes last",
            "shift element {a} to the end",
            "place {a} moves to the end",
        ),
    ),
    Family(
        "reverse",
        _NONE,
        lambda xs: xs[::-1],
        (
            "reverse the list",
            "write the list backwards",
            "turn the order around",
            "from the last to the first",
            "flip the list",
        ),
    ),
    Family(
        "sort_up",
        _NONE,
        lambda xs: tuple(sorted(xs)),
        (
            "sort the list",
            "order the numbers from small to large",
            "sort ascending",
            "arrange from smallest to largest",
            "put the numbers in rising order",
        ),
    ),
    Family(
        "sort_down",
        _NONE,
        lambda xs: tuple(sorted(xs, reverse=True)),
        (
            "sort descending",
            "order the numbers from large to small",
            "sort from the top down",
            "arrange from largest to smallest",
            "put the numbers in falling order",
        ),
    ),
    Family(
        "keep_even",
        _NONE,
        lambda xs: tuple(x for x in xs if x % 2 == 0),
        (
            "keep the even numbers",
            "remove all odd numbers",
            "only even numbers stay",
            "select every even number",
            "filter for even numbers",
        ),
    ),
    Family(
        "keep_odd",
        _NONE,
        lambda xs: tuple(x for x in xs if x % 2 == 1),
        (
            "keep the odd numbers",
            "remove all even numbers",
            "only odd numbers stay",
            "select every odd number",
            "filter for odd numbers",
        ),
    ),
    Family(
        "largest",
        _NONE,
        lambda xs: (max(xs),) if xs else (),
        (
            "give the largest number",
            "take only the maximum",
            "which number is largest",
            "keep just the largest",
            "return the maximum",
        ),
    ),
    Family(
        "smallest",
        _NONE,
        lambda xs: (min(xs),) if xs else (),
        (
            "give the smallest number",
            "take only the minimum",
            "which number is smallest",
            "keep just the smallest",
            "return the minimum",
        ),
    ),
    Family(
        "repeat_each",
        _NONE,
        lambda xs: tuple(x for x in xs for _ in range(2)),
        (
            "repeat every number",
            "write each number 2 times",
            "double up each element",
            "say every number 2 times",
            "give each number twice",
        ),
    ),
    Family(
        "every_other",
        _NONE,
        lambda xs: xs[::2],
        (
            "keep every other number",
            "take every other element",
            "skip each next number",
            "only every other number stays",
            "pick alternate numbers",
        ),
    ),
)

UNSEEN_FAMILIES: tuple[Family, ...] = (
    Family(
        "rotate",
        _singles(range(2, 4)),
        _rotate,
        (
            "move the first {a} numbers to the end",
            "put the first {a} numbers after the last number",
            "rotate the list by {a}",
        ),
    ),
    Family(
        "ends",
        _NONE,
        lambda xs: (xs[0], xs[-1]) if xs else (),
        (
            "keep only the first and last number",
            "take both ends of the list",
            "return the two ends",
        ),
    ),
    Family(
        "repeat_list",
        _NONE,
        lambda xs: xs + xs,
        ("write the list 2 times", "append the list to the list", "repeat the whole list"),
    ),
)

_COMPOSED_FIRST = (
    "keep_greater",
    "keep_less",
    "remove_value",
    "add",
    "remove_at",
    "reverse",
    "keep_even",
    "keep_odd",
    "replace_value",
    "swap",
    "take_first",
    "take_last",
    "drop_last",
)
_COMPOSED_SECOND = (
    "add",
    "prepend",
    "append",
    "reverse",
    "remove_value",
    "take_first",
    "take_last",
    "remove_at",
)
_RULES_PER_PAIR = 15
_NUM_SEEN_PAIRS, _NUM_UNSEEN_PAIRS = 64, 8
_RULES_PER_UNSEEN_PAIR = 4
_NUM_DEV_PARAMETER, _NUM_UNSEEN_PARAMETER = 48, 84
_NUM_DEV_PAIRS = 2
JOINTS = (
    "{first} and then {second}",
    "first {first} then {second}",
    "{first} then {second}",
    "{first} and after that {second}",
    "begin with {first} and finish with {second}",
)


class RulesSource(TaskSource):
    """See `RulesConfig`."""

    config: RulesConfig

    def read(self, tokenizer: "PreTrainedTokenizerBase", log: Callable[[str], None]) -> Splits:
        """See `TaskSource.read`; nothing is cut, so that no tokenizer matters."""
        return build_world(self.config)

    def lengths(self) -> TextLengths:
        """Of the longest texts that the templates make. A bracket or comma is a token, and a
        pretrained model's tokenizer splits words and numbers."""
        if self.config.form == "spaces":
            longest = self.config.max_length
            return TextLengths(instruction=10, input=5 * longest, target=2 * longest)
        per_number = len(str(self.config.max_value)) + 2
        longest = per_number * self.config.max_length
        return TextLengths(instruction=32, input=longest + 2, target=2 * longest + 2)

    def describe(self) -> list[dict[str, Any]]:
        """One description."""
        return [describe_splits(build_world(self.config), "rules")]

    def clash(self, other: TaskSource) -> str | None:
        """See `TaskSource.clash`. A world of another seed parts rules otherwise: compositions are
        seen there whose steps or pairing are unseen here, in other words than these."""
        if not isinstance(other, RulesSource) or other.config.seed == self.config.seed:
            return None
        return (
            f"data.seed: generated rules of the seeds {self.config.seed} and {other.config.seed}: "
            "one world trains on what the other tests: give both one seed"
        )

    def conflict(self, bases: Sequence[str]) -> str | None:
        """See `TaskSource.conflict`."""
        if "embedded" not in bases:
            return None
        if self.config.form != "spaces" or self.config.max_value > MAX_VALUE:
            return (
                "data.form and data.max_value: the embedded model reads numbers up to 9 with "
                "spaces between them: leave both out, or give bases of your own"
            )
        if not self.config.seed:
            return None
        return (
            f"data.seed={self.config.seed}: the embedded model learnt the seen rules of seed 0, "
            "unseen ones of this seed among them: keep 0, or give bases of your own"
        )


def build_world(config: RulesConfig) -> Splits:
    """Every rule with its examples, parted into seen, dev and unseen. Raises UserError where fewer
    are seen than asked for."""
    seen_rules, dev, unseen = part_rules(config.seed)
    seen = list(seen_rules)
    if config.more_compositions:
        seen += other_compositions(config.seed, config.more_compositions)
        (seen,) = _distinct(seen, [seen])
    if config.num_seen is not None:
        if config.num_seen > len(seen):
            raise UserError(
                f"data.num_seen: {config.num_seen} of {len(seen)} seen rules: give "
                "fewer, or null for all"
            )
        seen = random.Random(config.seed).sample(seen, config.num_seen)
    return Splits(
        seen=tuple(_split_task(rule, "", config) for rule in seen),
        dev=tuple(_split_task(rule, kind, config) for rule, kind in dev),
        unseen=tuple(_split_task(rule, kind, config) for rule, kind in unseen),
    )


@lru_cache(maxsize=4)
def part_rules(
    seed: int,
) -> tuple[tuple[Rule, ...], tuple[tuple[Rule, str], ...], tuple[tuple[Rule, str], ...]]:
    """Seen rules, and dev and unseen ones with the kind that says why they are unseen."""
    rng = random.Random(f"parts {seed}")
    seen_pairs, dev_pairs, unseen_pairs = _draw_pairs(rng)
    singles = [_rule(family, parameters) for family in FAMILIES for parameters in family.parameters]
    composed = [rule for pair in seen_pairs for rule in _compose(pair, _RULES_PER_PAIR, rng)]
    groups = {
        "known": singles + composed,
        "dev composition": [
            rule for pair in dev_pairs for rule in _compose(pair, _RULES_PER_UNSEEN_PAIR, rng)
        ],
        "composition": [
            rule for pair in unseen_pairs for rule in _compose(pair, _RULES_PER_UNSEEN_PAIR, rng)
        ],
        "family": [
            _rule(family, parameters)
            for family in UNSEEN_FAMILIES
            for parameters in family.parameters
        ],
    }
    distinct = iter(
        _distinct([rule for rules in groups.values() for rule in rules], list(groups.values()))
    )
    known, dev_composition, composition, family = (next(distinct) for _ in groups)
    parameterised = [
        rule for rule in known if sum(other.family == rule.family for other in known) >= 8
    ]
    held = rng.sample(parameterised, _NUM_DEV_PARAMETER + _NUM_UNSEEN_PARAMETER)
    held_names = {rule.name for rule in held}
    known = [
        rule for rule in known if not {rule.name, *(step.name for step in rule.steps)} & held_names
    ]
    dev_held, unseen_held = held[:_NUM_DEV_PARAMETER], held[_NUM_DEV_PARAMETER:]
    return (
        tuple(known),
        (
            *((rule, "parameter") for rule in dev_held),
            *((rule, "composition") for rule in dev_composition),
        ),
        (
            *((rule, "parameter") for rule in unseen_held),
            *((rule, "composition") for rule in composition),
            *((rule, "family") for rule in family),
        ),
    )


def _draw_pairs(rng: random.Random) -> tuple[list[tuple[Family, Family]], ...]:
    """Seen, dev and unseen pairings of two families; every family in an unseen pairing is also in a
    seen one."""
    by_name = {family.name: family for family in FAMILIES}
    names = [
        pair for pair in itertools.product(_COMPOSED_FIRST, _COMPOSED_SECOND) if pair[0] != pair[1]
    ]
    rng.shuffle(names)
    pairs = [(by_name[first], by_name[second]) for first, second in names]
    ends = list(itertools.accumulate((_NUM_SEEN_PAIRS, _NUM_DEV_PAIRS, _NUM_UNSEEN_PAIRS)))
    return pairs[: ends[0]], pairs[ends[0] : ends[1]], pairs[ends[1] : ends[2]]


def _rule(family: Family, parameters: Numbers) -> Rule:
    names = dict(zip("ab", parameters, strict=False))
    wordings = tuple(template.format(**names) for template in family.templates)
    return Rule(
        family=family.name,
        name="_".join((family.name, *map(str, parameters))),
        apply=lambda xs: family.apply(xs, *parameters),
        wordings=wordings[:-1],
        held_out=wordings[-1],
        hints=family.hints(*parameters),
    )


def _compose(pair: tuple[Family, Family], count: int, rng: random.Random) -> list[Rule]:
    options = list(itertools.product(pair[0].parameters, pair[1].parameters))
    chosen = rng.sample(options, min(count, len(options)))
    return [
        _composed_rule(_rule(pair[0], first), _rule(pair[1], second))
        for first, second in sorted(chosen)
    ]


def _composed_rule(first: Rule, second: Rule) -> Rule:
    wordings = tuple(
        joint.format(first=first.wordings[i % 2], second=second.wordings[i // 2 % 2])
        for i, joint in enumerate(JOINTS)
    )
    return Rule(
        family=f"{first.family}+{second.family}",
        name=f"{first.name}+{second.name}",
        apply=lambda xs: second.apply(first.apply(xs)),
        wordings=wordings[:-1],
        held_out=wordings[-1],
        hints=first.hints + second.hints,
        steps=(first, second),
    )


def other_compositions(seed: int, per_pair: int) -> list[Rule]:
    """Compositions that are not among the rules of `part_rules`, at most `per_pair` of each
    pairing: what a base model may learn besides the seen ones, and what
    `RulesConfig.more_compositions` adds to these.

    None of them is paired like, behaves like, or has as a step a dev or an unseen rule.
    """
    seen, dev, unseen = part_rules(seed)
    held = [rule for rule, _ in dev + unseen]
    held_names = {rule.name for rule in held}
    names = held_names | {rule.name for rule in seen}
    held_pairs = {rule.family for rule, kind in dev + unseen if kind == "composition"}
    by_name = {family.name: family for family in FAMILIES}
    rng = random.Random(f"other compositions {seed}")
    rules = [
        rule
        for first, second in itertools.product(_COMPOSED_FIRST, _COMPOSED_SECOND)
        if first != second and f"{first}+{second}" not in held_pairs
        for rule in _compose((by_name[first], by_name[second]), per_pair, rng)
        if rule.name not in names and not {step.name for step in rule.steps} & held_names
    ]
    answers = behaviour([*held, *rules])
    of_held, of_rules = answers[: len(held)], answers[len(held) :]
    return [
        rule
        for rule, answers_of_rule in zip(rules, of_rules, strict=True)
        if (of_held == answers_of_rule).mean(axis=1).max() < SAME_RULE_AGREEMENT
    ]


def draw_wording(rule: Rule, rng: random.Random) -> str:
    """One of the rule's wordings; of a composition also such as put other wordings of its steps
    together."""
    if not rule.steps:
        return rng.choice(rule.wordings)
    first, second = (rng.choice(step.wordings) for step in rule.steps)
    return rng.choice(JOINTS[:-1]).format(first=first, second=second)


def fixed_inputs() -> list[Numbers]:
    """The inputs on which rules are told apart; drawn without hints, so that no rule is
    favoured."""
    rng = random.Random("fixed inputs")
    return [_draw_list(rng, (), _DEFAULT) for _ in range(NUM_FIXED_INPUTS)]


class _Codes:
    """Lists by number, and what a step makes of each: a list is met thousands of times, since
    compositions share their steps, and numbers are compared and hashed faster than lists."""

    def __init__(self) -> None:
        self._numbers: dict[Numbers, int] = {}
        self._lists: list[Numbers] = []
        self._steps: dict[str, dict[int, int]] = {}

    def number(self, xs: Numbers) -> int:
        """The number of a list; equal lists have one."""
        if xs not in self._numbers:
            self._numbers[xs] = len(self._lists)
            self._lists.append(xs)
        return self._numbers[xs]

    def after(self, step: Rule, numbers: Sequence[int]) -> list[int]:
        """The numbers of what the step answers."""
        known = self._steps.setdefault(step.name, {})
        for number in set(numbers) - known.keys():
            known[number] = self.number(step.apply(self._lists[number]))
        return [known[number] for number in numbers]


def behaviour(rules: Sequence[Rule]) -> "np.ndarray":
    """What each rule answers to each fixed input, as integers that are equal where the answers are;
    (rules, fixed inputs)."""
    # Here, and not above: a config is checked without it, in a third less time.
    import numpy as np

    codes = _Codes()
    inputs = [codes.number(xs) for xs in fixed_inputs()]
    answers = np.empty((len(rules), len(inputs)), dtype=np.int32)
    for rule, row in zip(rules, answers, strict=True):
        numbers = inputs
        for step in rule.steps or (rule,):
            numbers = codes.after(step, numbers)
        row[:] = numbers
    return answers


def _distinct(rules: list[Rule], groups: list[list[Rule]]) -> list[list[Rule]]:
    """`groups` without the rules that behave like an earlier one (or like leaving the list as it
    is)."""
    identity = Rule("", "identity", lambda xs: xs, (), "", ())
    answers = behaviour([identity, *rules])
    names = set()
    num_distinct = 1  # those are moved to the front: nothing is copied to be compared with
    for rule, row in zip(rules, answers[1:], strict=True):
        agreement = (answers[:num_distinct] == row).mean(axis=1)
        if agreement.max() < SAME_RULE_AGREEMENT:
            answers[num_distinct] = row
            num_distinct += 1
            names.add(rule.name)
    return [[rule for rule in group if rule.name in names] for group in groups]


def _draw_list(rng: random.Random, hints: Numbers, config: RulesConfig) -> Numbers:
    most = config.max_value
    if most > MAX_VALUE and rng.random() < 0.5:
        most = MAX_VALUE
    length = rng.randint(config.min_length, config.max_length)
    xs = [rng.randint(0, most) for _ in range(length)]
    for hint in rng.sample(hints, min(len(hints), rng.randint(1, 2))) if hints and xs else ():
        xs[rng.randrange(len(xs))] = hint
    return tuple(xs)


_DRAWS_EACH = 1000
"""Of an example; a rule of the default world takes 20 at most."""


def draw_examples(
    rule: Rule, count: int, rng: random.Random, config: RulesConfig = _DEFAULT
) -> list[Example]:
    """`count` examples with distinct inputs; an answer that is empty or equal to its input is
    redrawn 9 times in 10.

    Args:
        rule: What answers each input; numbers that it hints at are put into the inputs.
        count: How many.
        rng: Makes every draw.
        config: How long inputs are, how large their numbers, and how a list is written; its counts
            and its seed are not read.

    Raises:
        UserError: There are too few such inputs.
    """
    write = format_numbers if config.form == "spaces" else format_list
    examples: dict[Numbers, Example] = {}
    num_draws = 0
    while len(examples) < count:
        if num_draws == _DRAWS_EACH * count:
            raise UserError(
                f"data.max_length: {rule.name!r} has hardly {len(examples)} different inputs of at "
                f"most {config.max_length} numbers, and {count} are asked for: make it longer, or "
                "data.train_examples and data.test_examples fewer"
            )
        num_draws += 1
        xs = _draw_list(rng, rule.hints, config)
        ys = rule.apply(xs)
        if xs in examples or (ys in ((), xs) and rng.random() < 0.9):
            continue
        examples[xs] = Example(write(xs), write(ys))
    return list(examples.values())


def format_numbers(xs: Numbers) -> str:
    """(3, 9, 5) -> "3 9 5", as prompts show them."""
    return " ".join(map(str, xs))


def format_list(xs: Numbers) -> str:
    """(3, 9, 5) -> "[3, 9, 5]", as the list functions of BIG-bench have them."""
    return str(list(xs))


def _split_task(rule: Rule, kind: str, config: RulesConfig) -> SplitTask:
    rng = random.Random(f"examples {config.seed} {rule.name}")
    num_examples = config.train_examples + config.test_examples
    examples = tuple(draw_examples(rule, num_examples, rng, config))
    task = Task(
        rule.name, rule.wordings[0], examples, rule.wordings[1:], source="rules", family=rule.family
    )
    return SplitTask(
        task,
        examples[: config.train_examples],
        examples[config.train_examples :],
        (rule.held_out,),
        kind,
    )
