"""The draws of a step are a function of (seed, step) alone, however many parts take them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ship_ds.config import load_config
from ship_ds.data.sampler import Epochs, ReadingDraw, StepSampler, TaskDraw, balanced
from ship_ds.data.task import Example, Reading, Splits, SplitTask, Task
from ship_ds.train import Trainer


def _task(index: int, num_examples: int = 12) -> SplitTask:
    examples = tuple(Example(f"{index} {i}", str(i)) for i in range(num_examples))
    return SplitTask(
        Task(f"t{index}", f"instruction {index}", examples, (f"paraphrase {index}",)), examples, ()
    )


def _sampler(num_tasks: int = 24, **changes: object) -> StepSampler:
    return replace(StepSampler([_task(i) for i in range(num_tasks)], 3, 8, 2, 4, 0.5), **changes)  # type: ignore[arg-type]


def _key(draw: TaskDraw) -> str:
    return draw.task_id


def test_a_step_is_the_same_in_any_order_and_any_process() -> None:
    first, again = _sampler(), _sampler()
    later = [first.draw_step(step) for step in range(6)]
    assert [again.draw_step(step) for step in reversed(range(6))] == later[::-1]


def test_seed_and_step_change_the_draws() -> None:
    step = _sampler().draw_step(0)
    assert step != _sampler(seed=4).draw_step(0)
    one_task = _sampler(1, tasks_per_step=1, examples_per_task=6)
    assert len({repr(one_task.draw_step(step)) for step in range(20)}) == 20


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 8])
def test_parts_together_are_the_step(num_parts: int) -> None:
    sampler = _sampler()
    ranks = [sampler.draw_rank(5, rank, num_parts) for rank in range(num_parts)]
    drawn = [draw for [batch] in ranks for draw in batch]
    assert sorted(drawn, key=_key) == sorted(sampler.draw_step(5), key=_key)


def test_accumulation_draws_the_step_once_and_as_more_ranks_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler, drawn = _sampler(), []
    as_four = [sampler.draw_rank(5, rank, 4)[0] for rank in range(4)]
    draw_step = StepSampler.draw_step
    monkeypatch.setattr(
        StepSampler, "draw_step", lambda self, step: drawn.append(step) or draw_step(self, step)
    )
    assert [sampler.draw_rank(5, rank, 2, accumulation=2) for rank in range(2)] == [
        as_four[:2],
        as_four[2:],
    ]
    assert drawn == [5, 5]


@pytest.mark.parametrize("num_tasks", [24, 20])
def test_an_epoch_meets_every_task_once(num_tasks: int) -> None:
    """20 tasks in steps of 8: the third epoch begins in the middle of a step, and counting stays
    even."""
    sampler = _sampler(num_tasks)
    counts = Counter(
        draw.task_id
        for step in range(5 * num_tasks // 8 // 5 * 5)
        for draw in sampler.draw_step(step)
    )
    epochs = sum(counts.values()) / num_tasks
    assert set(counts.values()) <= {int(epochs), int(epochs) + 1} and len(counts) == num_tasks
    if num_tasks == 24:
        first, second = (
            [draw.task_id for s in range(e * 3, e * 3 + 3) for draw in sampler.draw_step(s)]
            for e in (0, 1)
        )
        assert sorted(first) == sorted(second) and len(set(first)) == 24
        assert {draw.task_id for draw in sampler.draw_step(0)} != {
            draw.task_id for draw in sampler.draw_step(3)
        }


@pytest.mark.parametrize(
    ("alpha", "turns"), [(1.0, (1, 1, 1)), (0.5, (4, 8, 16)), (0.0, (4, 16, 64))]
)
def test_small_families_get_more_turns(alpha: float, turns: tuple[int, ...]) -> None:
    tasks = [
        replace(
            _task(i), task=replace(_task(i).task, family="a" if i < 16 else "b" if i < 20 else "c")
        )
        for i in range(21)
    ]
    counts = Counter(task.task.id for task in balanced(tasks, alpha))
    assert (counts["t0"], counts["t16"], counts["t20"]) == turns and len(counts) == 21


def test_families_are_met_in_proportion_to_a_power_of_their_size() -> None:
    sizes = range(1, 41)
    tasks = [
        replace(_task(n), task=replace(_task(n).task, family=str(n)))
        for n in sizes
        for _ in range(n)
    ]
    met = Counter(task.task.family for task in balanced(tasks, 0.7))
    for n in sizes:
        assert met[str(n)] / met["40"] == pytest.approx((n / 40) ** 0.7, rel=0.5 / 4)


def test_shown_examples_are_others_than_the_answered_and_at_most_so_many() -> None:
    numbers = set()
    for step in range(30):
        for draw in _sampler().draw_step(step):
            assert len(draw.answered) == 2 and not set(draw.answered) & set(draw.shown)
            assert len({*draw.answered, *draw.shown}) == 2 + len(draw.shown)
            numbers.add(len(draw.shown))
        assert len({len(draw.shown) for draw in _sampler().draw_step(step)}) == 1
    assert numbers == {0, 1, 2, 3, 4}


def test_half_of_the_draws_are_the_instruction_and_the_paraphrases_share_the_rest() -> None:
    task = replace(_task(0), task=replace(_task(0).task, paraphrases=("one", "two")))
    sampler = _sampler(tasks=[task])
    wordings = Counter(draw.wording for step in range(100) for draw in sampler.draw_step(step))
    assert wordings["instruction 0"] == pytest.approx(400, abs=50)
    assert wordings["one"] == pytest.approx(200, abs=50) and set(wordings) == {
        "instruction 0",
        "one",
        "two",
    }


def test_z_is_dropped_as_often_as_asked_and_never_with_the_examples() -> None:
    draws = [draw for step in range(100) for draw in _sampler().draw_step(step)]
    assert all(draw.shows_latent for draw in draws if not draw.shown)
    with_examples = [draw for draw in draws if draw.shown]
    dropped = sum(not draw.shows_latent for draw in with_examples) / len(with_examples)
    assert dropped == pytest.approx(0.5, abs=0.06)
    assert all(
        draw.shows_latent
        for step in range(20)
        for draw in _sampler(drop_latent=0.0).draw_step(step)
    )


def test_small_task_repeats_examples_and_shows_none() -> None:
    sampler = StepSampler([_task(0, 2)], 0, 1, 5, 4, 0.0)
    draw = sampler.draw_step(0)[0]
    assert len(draw.answered) == 5 and draw.shown == ()


def test_a_task_comes_its_weight_an_epoch() -> None:
    """After e epochs every task has come e times its weight, to less than one."""
    weights = [2.0] * 3 + [1.0] * 7 + [0.37] * 11 + [0.1] * 20
    tasks = [replace(_task(i), weight=weight) for i, weight in enumerate(weights)]
    sampler = _sampler(tasks=tasks)
    counts: Counter[str] = Counter()
    position = 0
    for epoch in range(1, 41):
        begin = Epochs(weights, 3)._begin(epoch)
        counts.update(sampler._task_at(p).id for p in range(position, begin))
        position = begin
        for task in tasks:
            assert abs(counts[task.id] - epoch * task.weight) < 1, (epoch, task.weight)
    assert position == pytest.approx(40 * sum(weights), abs=len(weights))
    assert [counts[f"t{i}"] for i in (0, 3)] == [80, 40]


def test_an_epoch_has_every_task_its_weight_wherever_it_begins() -> None:
    """Of 24 tasks an epoch is 24 draws where all weigh 1, and 48, each task twice, at 2."""
    for weight in (1, 2):
        sampler = _sampler(tasks=[replace(_task(i), weight=float(weight)) for i in range(24)])
        for start in (0, 24 * 1000, 24 * 10**7):
            counts = Counter(sampler._task_at(start + i).id for i in range(24 * weight))
            assert set(counts.values()) == {weight} and len(counts) == 24
    rare = Epochs([0.001] * 3, 0)
    assert sorted(rare.task_at(i) for i in range(3)) == [0, 1, 2]


def test_an_encoder_that_reads_examples_changes_nothing_else() -> None:
    plain = _sampler()
    reading = _sampler(reading=ReadingDraw(3, 0.5, 0.25))
    for step in range(4):
        without = [replace(draw, read=None) for draw in reading.draw_step(step)]
        assert without == plain.draw_step(step)
    assert all(draw.reading == Reading(draw.wording) for draw in plain.draw_step(0))


def test_what_the_encoder_reads() -> None:
    """Never the input of an example that is answered; as many for all tasks of a step; the
    instruction and the targets left out as often as asked for, the instruction never where nothing
    else is read."""
    sampler = _sampler(reading=ReadingDraw(3, 0.5, 0.25))
    steps = [sampler.draw_step(step) for step in range(100)]
    numbers = [{len(draw.reading.examples) for draw in step} for step in steps]
    assert {len(number) for number in numbers} == {1}
    assert set().union(*numbers) == {0, 1, 2, 3}
    draws = [draw for step in steps for draw in step]
    for draw in draws:
        read = draw.reading
        assert not {e.input for e in read.examples} & {e.input for e in draw.answered}
        assert read.instruction == draw.wording or (read.instruction is None and read.examples)
    shown = [draw.reading for draw in draws if draw.reading.examples]
    assert abs(sum(read.instruction is None for read in shown) / len(shown) - 0.5) < 0.07
    assert abs(sum(not read.states_targets for read in shown) / len(shown) - 0.25) < 0.07


def test_words_are_left_out_of_what_the_encoder_reads_alone() -> None:
    """In their order, as often as asked for, otherwise at each step; the wording that the decoder
    writes and all else stay."""
    long = " ".join(f"w{i}" for i in range(30))
    tasks = [replace(_task(i), task=replace(_task(i).task, instruction=long)) for i in range(4)]
    plain, noisy = (
        _sampler(tasks=tasks, tasks_per_step=4, reading=reading)
        for reading in (ReadingDraw(2), ReadingDraw(2, drop_words=0.3))
    )
    kept: list[str] = []
    for step in range(60):
        for before, after in zip(plain.draw_step(step), noisy.draw_step(step), strict=True):
            assert replace(after, read=None) == replace(before, read=None)
            assert after.reading.examples == before.reading.examples
            words = iter(after.wording.split())
            text = after.reading.instruction or ""
            assert text and all(word in words for word in text.split())
            kept += [text] if after.wording == long else []
    assert len(set(kept)) > 0.9 * len(kept)
    share = sum(len(text.split()) for text in kept) / (30 * len(kept))
    assert abs(share - 0.7) < 0.03
    short = _sampler(tasks=[_task(0)], tasks_per_step=1, reading=ReadingDraw(drop_words=0.9))
    assert all(short.draw_step(step)[0].reading.instruction for step in range(60))


def test_what_is_left_of_a_wording_keeps_its_lines() -> None:
    wording = "  w1 w2\n\nw3\tw4  w5\n- w6"
    one = replace(_task(0), task=replace(_task(0).task, instruction=wording, paraphrases=()))
    for share, num_texts in ((1e-9, 1), (0.5, 20)):
        sampler = _sampler(tasks=[one], tasks_per_step=1, reading=ReadingDraw(drop_words=share))
        found = [sampler.draw_step(step)[0].reading.instruction or "" for step in range(60)]
        assert len(set(found)) >= num_texts and (share == 0.5 or set(found) == {wording})
        for text in found:
            for before, after, gap in (("w1", "w2", " "), ("w3", "w4", "\t"), ("w4", "w5", "  ")):
                if before in text and after in text:
                    assert f"{before}{gap}{after}" in text
            first, rest = ({"w1", "w2"} & set(text.split()), {"w3", "w4"} & set(text.split()))
            assert ("\n\n" in text) >= bool(first and rest)


def test_a_task_without_an_example_to_spare_is_read_by_its_wording() -> None:
    tight = StepSampler([_task(0, 2)], 3, 1, 2, 0, 0.0, ReadingDraw(3, 0.5))
    assert all(tight.draw_step(step)[0].reading.examples == () for step in range(9))


def _labelled(*counts: int) -> SplitTask:
    """So many examples of each of two labels or three, sorted as in files."""
    examples = tuple(
        Example(f"{name} {i}", name)
        for name, count in zip(("no", "yes", "perhaps"), counts, strict=False)
        for i in range(count)
    )
    return SplitTask(Task("labelled", "instruction", examples, ("other",)), examples, ())


def _draws(sampler: StepSampler, num_steps: int, task_id: str = "labelled") -> list[TaskDraw]:
    drawn = [draw for step in range(num_steps) for draw in sampler.draw_step(step)]
    return [draw for draw in drawn if draw.task_id == task_id]


def _share_of_no(rows: Iterable[Sequence[Example]]) -> float:
    targets = [example.target for row in rows for example in row]
    return targets.count("no") / len(targets)


READS = ReadingDraw(3, drop_instruction=0.3, drop_targets=0.3)


def test_labels_are_balanced_where_it_is_asked_for_and_nothing_else_changes() -> None:
    """In what is answered, shown and read; all else of the draw, and other tasks, to the bit."""
    plain = _sampler(
        tasks=[_labelled(6, 24), _task(0)],
        tasks_per_step=1,
        examples_per_task=3,
        reading=READS,
    )
    even = replace(plain, balances_labels=True)
    for sampler, share in ((plain, 0.2), (even, 0.5)):
        draws = _draws(sampler, 800)
        for rows in (
            [draw.answered for draw in draws],
            [draw.shown for draw in draws],
            [draw.reading.examples for draw in draws],
        ):
            assert abs(_share_of_no(rows) - share) < 0.05
    for before, after in zip(_draws(plain, 200), _draws(even, 200), strict=True):
        times = Counter(example.target for example in after.answered)
        assert {times["no"], times["yes"]} == {1, 2}
        assert not set(after.reading.examples) & set(after.answered)
        for one, other in ((before.shown, after.shown), (before.answered, after.answered)):
            assert len(one) == len(other)
        for name in ("wording", "other_wording", "shows_latent"):
            assert getattr(before, name) == getattr(after, name)
        for name in ("instruction", "states_targets"):
            assert getattr(before.reading, name) == getattr(after.reading, name)
        assert len(before.reading.examples) == len(after.reading.examples)
    assert _draws(plain, 50, "t0") == _draws(even, 50, "t0") != []


@pytest.mark.parametrize(
    ("counts", "is_balanced"), [((2, 20), False), ((3, 20), True), ((2, 9, 9), True)]
)
def test_a_label_has_to_suffice_for_what_is_answered_and_shown(
    counts: tuple[int, ...], is_balanced: bool
) -> None:
    sampler = _sampler(tasks=[_labelled(*counts)], balances_labels=True)  # 2 answered, 4 shown
    assert bool(sampler.balanced_labels) is is_balanced


def test_a_task_whose_inputs_repeat_is_balanced_where_nothing_is_read() -> None:
    """No input that is answered is read: one answered "no" would leave none to read."""
    task = _labelled(8, 8)
    same = tuple(replace(e, input="x") if e.target == "no" else e for e in task.train)
    sampler = _sampler(tasks=[replace(task, train=same)], balances_labels=True)
    assert sampler.balanced_labels
    assert not replace(sampler, reading=READS).balanced_labels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "is_balanced"),
    [
        ((1, 21), False),
        ((2, 20), False),
        ((3, 19), False),
        ((4, 18), True),
        ((2, 20, 20), True),
        ((1, 20, 20), False),
        ((11, 11), True),
    ],
)
def test_what_the_encoder_reads_does_not_tell_the_labels_that_are_asked(
    counts: tuple[int, ...], is_balanced: bool
) -> None:
    """Were a label to run out, it would be asked where it is not read; nor do rounds of labels go
    over both. A task that is not balanced is drawn as ever."""
    plain = _sampler(
        tasks=[_labelled(*counts)],
        tasks_per_step=1,
        examples_per_task=3,
        max_shown=0,
        reading=READS,
    )
    sampler = replace(plain, balances_labels=True)
    assert bool(sampler.balanced_labels) is is_balanced
    if not is_balanced:
        assert _draws(sampler, 40) == _draws(plain, 40)
        return
    draws = _draws(sampler, 4800)
    for num_read in (1, 2, 3):
        by_times: dict[int, list[tuple[Example, ...]]] = {}
        for draw in draws:
            if len(read := draw.reading.examples) == num_read:
                times = sum(example.target == "no" for example in read)
                by_times.setdefault(times, []).append(draw.answered)
        for times, rows in by_times.items():
            assert len(rows) > 100
            share = _share_of_no(rows)
            assert abs(share - 1 / len(counts)) < 0.06, (num_read, times, share)


def test_a_run_draws_as_its_config_says(capsys: pytest.CaptureFixture[str]) -> None:
    """And its log says of how many tasks."""
    rare = replace(_task(0), train=_labelled(1, 9).train)
    run = SimpleNamespace(splits=Splits((_labelled(9, 9), rare, _task(1)), (), ()))
    for asked in (False, True):
        run.config = load_config("quickstart", [f"training.balances_labels={asked}"])
        sampler = Trainer.make_sampler(run)  # type: ignore[arg-type]
        assert list(sampler.balanced_labels) == (["labelled"] if asked else [])
        said = capsys.readouterr()
        line = "1 of 3 seen tasks have labels, and enough examples of each"
        assert (line in said.out + said.err) is asked


def test_another_wording_is_another_of_the_task_and_moves_nothing_else() -> None:
    """Of each wording the rest are met; a task with one wording has none."""
    one = _task(0)
    texts = ("a", "b", "c")
    three = replace(one, task=replace(one.task, instruction="a", paraphrases=texts[1:]))
    single = replace(one, task=replace(one.task, paraphrases=()))
    drawn = [
        draw
        for step in range(60)
        for draw in _sampler(1, tasks=[three], tasks_per_step=1).draw_step(step)
    ]
    assert {(draw.wording, draw.other_wording) for draw in drawn} == {
        (first, second) for first in texts for second in texts if first != second
    }
    for step in range(5):
        [plain] = _sampler(1, tasks=[single], tasks_per_step=1).draw_step(step)
        [pair] = _sampler(1, tasks_per_step=1).draw_step(step)
        assert plain.other_wording is None and pair.other_wording is not None
        assert plain.answered == pair.answered and plain.shown == pair.shown
