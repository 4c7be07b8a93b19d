"""Seen, dev and unseen tasks, parted by rule and not by task; train and test examples parted within
a task.

Two tasks are one rule when a wording of one and a wording of the other are equal (list functions
repeat some) or have token sets with a Jaccard index of 0.8 or more (Super-NaturalInstructions has
many near copies).
"""

import itertools
import random
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from ship_ds.console import Log, no_log
from ship_ds.data.task import DataError, Example, Splits, SplitTask, Task
from ship_ds.data.words import is_punctuation, plain_words
from ship_ds.section import Section

SAME_RULE_JACCARD = 0.8
GroupedBy = Literal["rule", "dataset", "family"]


class HeldOutExample(Example):
    """An example that its format sets apart for testing: no split trains on it."""


def hold_out(example: Example) -> HeldOutExample:
    """The example as one that no training may see."""
    return HeldOutExample(example.input, example.target, example.references)


def not_held_out(task: Task) -> tuple[Example, ...]:
    """The examples that may be trained on, by their inputs."""
    held = {example.input for example in task.examples if isinstance(example, HeldOutExample)}
    return tuple(example for example in task.examples if example.input not in held)


class SplitConfig(Section):
    """The shares are of rules, but for `keeps_together`."""

    seed: int = 0
    """Of the draw of unseen and dev tasks, and of the test examples."""
    keeps_together: GroupedBy = "rule"
    """What no two parts share: rules; or, besides, the data sets that tasks were made of, by name
    (`Source` of Super-NaturalInstructions, whose tasks of one data set show like inputs), or their
    families (its `Categories`). Of these the shares are of tasks, as far as whole ones fit."""
    unseen_share: float = Field(0.1, ge=0, le=1)
    """Tasks that are never trained on; 1: all of them, and none is dev, as for a benchmark among
    the sources of a mixture; 0: none, as for a source of it that is trained on alone."""
    dev_share: float = Field(0.05, ge=0, lt=1)
    """Tasks that are never trained on and choose the best checkpoint; 0: none."""
    test_examples: PositiveInt = 5
    """Drawn for each task (files are often sorted), or the format's own; at least half of the
    inputs stay for training."""
    train_examples: PositiveInt | None = None
    """The first ones that are left; None: all."""

    @model_validator(mode="after")
    def _leaves_seen(self) -> "SplitConfig":
        if self.unseen_share < 1 <= self.unseen_share + self.dev_share:
            raise ValueError(
                "unseen_share and dev_share leave nothing to train on: lower them to a sum below 1"
            )
        return self


def split_tasks(tasks: Sequence[Task], config: SplitConfig, log: Log = no_log) -> Splits:
    """A pure function of tasks and config; each part has a rule, but one whose share is 0.

    No seen task trains on an input that it, or another one of its rule, is tested on.

    A task with a single input is trained on and never tested. So a rule that has such a task is a
    seen one, and the shares are of the other rules; where these are fewer than the parts, all are
    seen. Where all are to be unseen, tasks with a single input are left out.

    Args:
        tasks: as they were read, filtered and cut.
        config: how large the parts are, and what they keep together.
        log: takes one line for each thing that is left out within the seen tasks.

    Raises:
        DataError: every task could be tested, and they are fewer rules than parts; or fewer
            groups that `keeps_together` makes than parts have tasks that can all be tested.
    """
    if config.unseen_share == 1:
        tested = [_split_examples(task, config) for task in tasks if can_be_tested(task)]
        return Splits((), (), tuple(tested))
    keys = [together_key(task, config) for task in tasks]
    if config.keeps_together != "rule" and not any(keys):
        raise DataError(
            f"data.split.keeps_together={config.keeps_together}: no task says of which "
            f"{config.keeps_together} it is; leave it at rule"
        )
    every = rule_groups(tasks, together=keys)
    untested = [group for group in every if not all(can_be_tested(tasks[i]) for i in group)]
    groups = [group for group in every if all(can_be_tested(tasks[i]) for i in group)]
    shares = {"a seen": 1.0, "a dev": config.dev_share, "an unseen": config.unseen_share}
    *names, last = (name for name, share in shares.items() if share)
    num_parts = len(names) + 1
    part_names = f"{', '.join(names)} and {last} part" if names else f"{last} part"
    if len(groups) < num_parts and config.keeps_together != "rule":
        raise DataError(
            f"data.split.keeps_together={config.keeps_together}: leaves {len(groups)} groups of "
            f"tasks that can all be tested, too few for {part_names}; leave it at rule"
        )
    if len(groups) < num_parts and not untested:
        raise DataError(
            f"data: {len(tasks)} tasks are {len(groups)} distinct rules, too few for {part_names}; "
            "give more"
        )
    random.Random(f"split {config.seed}").shuffle(groups)
    if config.keeps_together == "rule":
        num_unseen, num_dev = _sizes(len(groups), config, num_parts)
        unseen_groups, dev_groups = groups[:num_unseen], groups[num_unseen:][:num_dev]
        rest = groups[num_unseen + num_dev :]
    else:
        unseen_groups, dev_groups, rest = _by_tasks(groups, config)
    parts = [*rest, *untested], dev_groups, unseen_groups
    seen, dev, unseen = (
        tuple(_split_examples(tasks[i], config) for i in sorted(i for group in part for i in group))
        for part in parts
    )
    if trains_on_tested(seen):
        rules = rule_groups([one.task for one in seen])
        seen = without_tested_inputs(seen, rules, log)
    return Splits(seen, dev, unseen)


def trains_on_tested(seen: Sequence[SplitTask]) -> bool:
    """Whether an input that one of the tasks is tested on is among what another one trains on."""
    tested = {example.input for one in seen for example in one.test}
    return any(example.input in tested for one in seen for example in one.train)


def without_tested_inputs(
    seen: Sequence[SplitTask], rules: Iterable[Collection[int]], log: Log
) -> tuple[SplitTask, ...]:
    """The tasks without the training examples whose input another task of their rule is tested on:
    near copies are often made of the same examples, each with test examples of its own draw.

    A task that would be left with nothing to train on stays as it is.

    Args:
        seen: the tasks.
        rules: places of the tasks that are one rule; a task may be in several.
        log: takes a line for each of the two, with how many they are.
    """
    tested: list[list[set[str]]] = [[] for _ in seen]
    for rule in rules:
        inputs = {example.input for i in rule for example in seen[i].test}
        for i in rule:
            tested[i].append(inputs)
    kept, num_left_out, num_as_they_were = [], 0, 0
    for one, sets in zip(seen, tested, strict=True):
        train = tuple(
            example for example in one.train if not any(example.input in held for held in sets)
        )
        if not train:
            num_as_they_were += 1
        elif len(train) < len(one.train):
            num_left_out += len(one.train) - len(train)
            one = replace(one, train=train)
        kept.append(one)
    if num_left_out:
        log(
            f"left out: training examples with a test input of a task of their rule: {num_left_out}"
        )
    if num_as_they_were:
        log(f"left as they are: tasks with no other training examples: {num_as_they_were}")
    return tuple(kept)


def _sizes(num_rules: int, config: SplitConfig, num_parts: int) -> tuple[int, int]:
    """Rules of unseen and of dev: at least one each where there is a share, and one left over; or
    none of either."""
    if num_rules < num_parts:
        return 0, 0
    has_dev = config.dev_share > 0
    num_unseen = num_dev = 0
    if config.unseen_share:
        size = max(1, round(config.unseen_share * num_rules))
        num_unseen = min(size, num_rules - 1 - has_dev)
    if has_dev:
        num_dev = min(max(1, round(config.dev_share * num_rules)), num_rules - num_unseen - 1)
    return num_unseen, num_dev


def _by_tasks(groups: Sequence[list[int]], config: SplitConfig) -> list[list[list[int]]]:
    """Unseen, dev and seen groups, which are of very different sizes: in their order each goes to
    the first part that has room for all of it, and where a part with a share has none, the smallest
    does."""
    size = sum(map(len, groups))
    # Rounded: 0.29 of 100 is a little less than 29.
    rooms = [round(config.unseen_share * size), round(config.dev_share * size), size]
    parts: list[list[list[int]]] = [[], [], []]
    for group in groups:
        place = next(i for i, room in enumerate(rooms) if len(group) <= room)
        rooms[place] -= len(group)
        parts[place].append(group)
    for part, share in zip(parts, (config.unseen_share, config.dev_share, 1.0), strict=True):
        largest = max(parts, key=len)
        if share and not part and len(largest) > 1:
            smallest = min(largest, key=len)
            largest.remove(smallest)
            part.append(smallest)
    return parts


def together_key(task: Task, config: SplitConfig) -> str:
    """What the task may not be parted from, beside its rule; "": nothing. Names are compared by
    their letters and digits: files spell one data set "roc_stories" and "rocstories"."""
    kind = config.keeps_together
    if kind == "rule":
        return ""
    name = "".join(filter(str.isalnum, getattr(task, kind).casefold()))
    # A data set and a category of one name are two things.
    return name and f"{kind} {name}"


def can_be_tested(task: Task) -> bool:
    """Whether it has an input to test on beside one to train on."""
    return len({example.input for example in task.examples}) > 1


def _split_examples(task: Task, config: SplitConfig) -> SplitTask:
    """Examples with equal inputs stay on one side, so that no test input was trained on. Both sides
    are in file order, and each test input is asked once."""
    inputs = list(dict.fromkeys(example.input for example in task.examples))
    if len(inputs) < 2:
        return SplitTask(task, task.examples[: config.train_examples], (), weight=task.weight)
    tested = {example.input for example in task.examples if isinstance(example, HeldOutExample)}
    if not tested:
        drawn = random.Random(f"test {config.seed} {task.id}").sample(
            inputs, min(config.test_examples, len(inputs) // 2)
        )
        tested = set(drawn)
    if not 0 < len(tested) < len(inputs):
        raise DataError(
            f"{task.source}: task {task.id!r} has {len(inputs)} distinct inputs, too "
            "few to train and to test on"
        )
    train = [example for example in task.examples if example.input not in tested]
    test = _by_input(example for example in task.examples if example.input in tested)
    return SplitTask(
        task,
        tuple(train[: config.train_examples]),
        test[: config.test_examples],
        weight=task.weight,
    )


def _by_input(examples: Iterable[Example]) -> tuple[Example, ...]:
    """One example an input: the first, with the answers of all as its references."""
    by_input: dict[str, list[Example]] = {}
    for example in examples:
        by_input.setdefault(example.input, []).append(example)
    # One that is alone stays as it was read: fingerprints are of what it looks like.
    return tuple(one[0] if len(one) == 1 else _merged(one) for one in by_input.values())


def _merged(examples: Sequence[Example]) -> Example:
    answers = tuple(dict.fromkeys(text for one in examples for text in one.answers))
    return replace(examples[0], references=answers if len(answers) > 1 else ())


def without_rules_of(
    tasks: Sequence[SplitTask], others: Sequence[SplitTask]
) -> tuple[SplitTask, ...]:
    """The tasks that are no rule of the others, in their order, by all wordings, also those that
    training never shows. The two may have been cut to other lengths."""
    groups = rule_groups(
        [_with_all_wordings(one) for one in (*others, *tasks)],
        cut_as=[True] * len(others) + [False] * len(tasks),
    )
    kept = sorted(i - len(others) for group in groups if min(group) >= len(others) for i in group)
    return tuple(tasks[i] for i in kept)


def is_near_copy(tasks: Sequence[Task], others: Sequence[SplitTask]) -> list[bool]:
    """Of each task whether it is one rule with one of the others, by all their wordings; unlike
    `without_rules_of` by no chain of tasks (`alike`). The two may have been cut to other lengths.
    """
    whole = [*others, *(SplitTask(task, (), ()) for task in tasks)]
    pairs = alike(whole, [i < len(others) for i in range(len(whole))])
    near = {max(pair) for pair in pairs}
    return [len(others) + i in near for i in range(len(tasks))]


def _with_all_wordings(one: SplitTask) -> Task:
    return replace(one.task, paraphrases=(*one.task.paraphrases, *one.held_out_paraphrases))


def rule_groups(
    tasks: Sequence[Task],
    cut_as: Sequence[Hashable] | None = None,
    together: Sequence[str] | None = None,
) -> list[list[int]]:
    """Indices of the tasks, grouped into rules, in order of their first task.

    Tasks whose wordings are equal or near copies are one rule, and so are tasks that a chain of
    such pairs joins: [[0, 2], [1], [3, 4]].

    Args:
        tasks: of one source or of several.
        cut_as: of each task with which others it was cut to one length; where two were cut to
            different ones, a wording that is the beginning of another one is its rule, too. None:
            all alike.
        together: of each task a name; those of one name are one group whatever their wordings. "":
            none.
    """
    # Here: scipy takes half a second to import, and most configs are only read.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    wordings = [_plain_wordings(task) for task in tasks]
    first_tasks: dict[frozenset[str], int] = {}
    pairs = [
        (i, first_tasks.setdefault(frozenset(words), i))
        for i, of_task in enumerate(wordings)
        for words in of_task
    ]
    similar = _similar([[words] for words in first_tasks])
    pairs += [(first_tasks[one], first_tasks[other]) for (_, one), (_, other) in similar]
    if cut_as is not None:
        pairs += _beginnings(wordings, cut_as)
    first_named: dict[str, int] = {}
    pairs += [(i, first_named.setdefault(name, i)) for i, name in enumerate(together or ()) if name]
    if not pairs:
        return []
    rows, columns = zip(*pairs, strict=True)
    size = len(tasks)
    graph = coo_array(([1] * len(pairs), (rows, columns)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(i)
    return list(groups.values())


def alike(tasks: Sequence[SplitTask], sources: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """Pairs of tasks of different sources that are one rule by a wording of each, held-out ones
    among them: without the chains of `rule_groups`. A pair may come again.

    Args:
        tasks: of several sources.
        sources: of each task its own, which may have cut instructions to a length of its own.
    """
    wordings = [_plain_wordings(_with_all_wordings(one)) for one in tasks]
    holders: dict[Hashable, dict[frozenset[str], list[int]]] = {}
    for i, source in enumerate(sources):
        for words in wordings[i]:
            holders.setdefault(source, {}).setdefault(frozenset(words), []).append(i)
    batches = list(holders.values())
    for (number, one), (other_number, other) in _similar(batches):
        yield from itertools.product(batches[number][one], batches[other_number][other])
    yield from _beginnings(wordings, sources)


def _plain_wordings(task: Task) -> list[list[str]]:
    return [plain_words(text) for text in (task.instruction, *task.paraphrases)]


_FEWEST_LEFT = 12
"""Words that a wording still has where it may be the beginning of another one."""


def _beginnings(
    wordings: Sequence[Sequence[Sequence[str]]], cut_as: Sequence[Hashable]
) -> list[tuple[int, int]]:
    """Pairs of tasks that were cut to different lengths, where a wording of one is the beginning of
    a wording of the other but for its last word, which may have been cut within."""
    # A mark of its own is a word where all is ASCII (`plain_words`), and what was cut away may hold
    # the only other letter.
    wordings = [[_without_marks(words) for words in of_task] for of_task in wordings]
    cut: dict[tuple[str, ...], dict[Hashable, list[int]]] = {}
    for i, of_task in enumerate(wordings):
        for words in of_task:
            if len(words) > _FEWEST_LEFT:
                cut.setdefault(tuple(words[:-1]), {}).setdefault(cut_as[i], []).append(i)
    return [
        (i, other)
        for i, of_task in enumerate(wordings)
        for words in of_task
        for length in range(_FEWEST_LEFT, len(words) + 1)
        for length_of, others in cut.get(tuple(words[:length]), {}).items()
        if length_of != cut_as[i]
        for other in others
    ]


def _without_marks(words: Sequence[str]) -> list[str]:
    return [word for word in words if not all(map(is_punctuation, word))]


_NumberedSet = tuple[int, frozenset[str]]


def _similar(
    batches: Sequence[Collection[frozenset[str]]],
) -> Iterator[tuple[_NumberedSet, _NumberedSet]]:
    """Pairs of sets of different batches with a Jaccard index J >= t, each with the number of its
    batch, without looking at every pair.

    Two such sets share one of their |x| - t|x| + 1 rarest tokens (prefix filtering, Bayardo et al.
    2007), so only those are looked up.
    """
    counts = Counter(word for batch in batches for words in batch for word in words)
    holders: dict[str, list[_NumberedSet]] = {}
    for number, batch in enumerate(batches):
        rarest = {
            words: sorted(words, key=lambda word: (counts[word], word))[
                : len(words) - int(SAME_RULE_JACCARD * len(words)) + 1
            ]
            for words in batch
        }
        for words in batch:
            for candidate in {
                candidate for word in rarest[words] for candidate in holders.get(word, ())
            }:
                other = candidate[1]
                common = len(words & other)
                if common >= SAME_RULE_JACCARD * (len(words) + len(other) - common):
                    yield (number, words), candidate
        for words in batch:
            for word in rarest[words]:
                holders.setdefault(word, []).append((number, words))
