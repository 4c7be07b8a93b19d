"""What is shown and asked."""

from dataclasses import replace

from ship_ds.data.task import Example, SplitTask, Task, spread
from ship_ds.evaluation.questions import another_instruction, ask, warn_of_long_targets
from ship_ds.model.loading import load_prompts


def task(name: str, num_train: int, num_test: int) -> SplitTask:
    examples = [Example(str(i), str(i)) for i in range(num_train + num_test)]
    return SplitTask(
        Task(name, f"do {name}", tuple(examples)),
        tuple(examples[:num_train]),
        tuple(examples[num_train:]),
    )


def test_shown_examples_are_never_asked() -> None:
    question = ask(task("a", 20, 3), 5, 0)
    assert len(question.shown) == 5 and set(question.shown) <= set(task("a", 20, 3).train)
    assert question.asked == task("a", 20, 3).test
    assert question.checked[:3] == question.asked and len(question.checked) == 10
    assert not set(question.checked) & set(question.shown)


def test_targets_that_no_answer_can_reach_are_one_line() -> None:
    """By the shortest right answer of each, its end included; training examples do not count."""
    form, lines = load_prompts("embedded", None), list[str]()
    long = Example("1", "1 2 3 4 5 6", ("1 2 3 4 5 6", "1 2 3 4"))
    short = task("short", 2, 2)
    tasks = [replace(task("long", 2, 2), test=(long, *short.test)), replace(short, train=(long,))]
    needed = min(len(form.target(text)) for text in long.answers)
    warn_of_long_targets(tasks, form, needed, lines.append)
    assert not lines
    warn_of_long_targets(tasks, form, needed - 1, lines.append)
    [line] = lines
    assert "1 of 5 test examples, of 1 tasks" in line and "most of them of long;" in line
    assert line.endswith(f"{needed} is enough for all")
    warn_of_long_targets([], form, 1, lines.append)


def test_test_examples_are_enough_where_there_are_ten() -> None:
    question = ask(task("a", 20, 12), 5, 0)
    assert question.checked == question.asked and len(question.asked) == 12


def test_too_few_examples_give_what_there_is() -> None:
    question = ask(task("a", 4, 2), 5, 0)
    assert len(question.shown) == 4 and question.checked == question.asked


def test_draw_depends_on_seed_and_task_alone_and_grows() -> None:
    one = ask(task("a", 20, 3), 5, 0).shown
    assert ask(task("a", 20, 3), 5, 0).shown == one
    assert ask(task("a", 20, 3), 2, 0).shown == one[:2]
    assert ask(task("a", 20, 3), 5, 1).shown != one != ask(task("b", 20, 3), 5, 0).shown


def test_another_instruction_is_a_seen_tasks_and_never_the_tasks_own() -> None:
    """Of a seen and of an unseen task, by the seed; with one seen task there is no other."""
    seen = [task(name, 2, 1) for name in "abc"]
    drawn = {another_instruction(seen[0], seen, seed) for seed in range(30)}
    assert drawn == {"do b", "do c"}
    unseen = {another_instruction(task("x", 2, 1), seen, seed) for seed in range(30)}
    assert unseen == {"do a", "do b", "do c"}
    assert another_instruction(seen[0], seen[:1], 0) == "do a"


def test_another_instruction_has_other_words_where_two_tasks_say_the_same() -> None:
    """Tasks whose draw was of other words have the same draw as without that."""
    seen = [task(name, 2, 1) for name in "abc"]
    twin = replace(task("d", 2, 1), task=replace(seen[0].task, id="d"))
    before = [another_instruction(seen[1], [*seen, twin], seed) for seed in range(30)]
    drawn = {another_instruction(twin, [*seen, twin], seed) for seed in range(30)}
    assert drawn == {"do b", "do c"} and set(before) == {"do a", "do c"}
    assert another_instruction(twin, [seen[0], twin], 0) == "do a"


def test_spread_is_even() -> None:
    tasks = [task(str(i), 1, 1) for i in range(10)]
    assert [t.id for t in spread(tasks, 5)] == ["0", "2", "4", "6", "8"] and spread(
        tasks, 99
    ) is tasks
