"""Whole supplies by a run with random heads: what is written, resumed, and read again."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ship_ds.api import Ship
from ship_ds.cli.supplying import supply as verb
from ship_ds.console import no_log
from ship_ds.data.readers import read_tasks
from ship_ds.data.task import Example, Splits, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.evaluation.config import EndpointConfig
from ship_ds.supply.answers import TaskLlmTeacher
from ship_ds.supply.config import ProposeConfig, parse_settings
from ship_ds.supply.journal import Journal, SupplyPart, journal_of
from ship_ds.supply.make import make
from ship_ds.supply.proposers import DecoderProposer
from tests.evaluation.test_judges import Handler, Server, serve

pytestmark = pytest.mark.slow

EASY = {
    "propose": [
        "num_at_once=6",
        "max_rounds=4",
        "min_examples=5",
        "num_inputs=6",
        "min_cycle=0",
        "min_agreement=0",
        "max_rouge=1",
    ],
    "compress": ["tolerance=1", "num_examples=3"],
    "chains": ["num_at_once=4", "num_inputs=8"],
    "disagreement": ["num_at_once=3", "num_inputs=4", "num_dropped=4"],
    "answers": ["num_at_once=3", "num_inputs=4", "relabels=true"],
}


def supply(
    ship: Ship,
    kind: str,
    out: Path,
    data: Path,
    changes: list[str],
    url: str = "http://127.0.0.1:1/v1",
    num_tasks: int | None = 8,
) -> dict[str, int]:
    config = parse_settings(kind, changes)
    endpoint = EndpointConfig(url=url, model="writer", retries=0)
    return make(ship, config, kind, out, data, num_tasks, 0, endpoint, no_log)


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The bundle's own data are those of this: none, or tasks of these wordings."""

    def hold(
        seen: Sequence[Sequence[str]] = (),
        unseen: Sequence[Sequence[str]] = (),
        examples: tuple[Example, ...] = (),
    ) -> None:
        made = [
            tuple(
                SplitTask(Task(f"own {k[0]}", k[0], ()), examples, (), tuple(k[1:])) for k in part
            )
            for part in (seen, unseen)
        ]
        monkeypatch.setattr(
            "ship_ds.supply.known.parts_of", lambda ship: Splits(made[0], (), made[1])
        )

    hold()
    return hold


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Writer(Server):
    """Proposes instructions, one of them known and one with a word that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = Says


class Says(Handler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        said = "1. reverse the list\n- add 3\n\n2) frobnicate\nput 7 at the end\nsort the numbers"
        self.say(said, body["model"])


@pytest.fixture
def writer() -> Iterator[Server]:
    yield from serve(Writer())


def by_rule(wording: str, text: str) -> str:
    """An answer that always ends: backwards, and a digit that tells wordings apart. Of a chain the
    first step is what the tasks of the file have as targets."""
    words = text.split()
    before, _, last = wording.rpartition(" and then ")
    words = [words[0], words[2]] if before else words
    return " ".join([*reversed(words), str(len(last) % 10)])


@pytest.fixture
def answers_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run with random heads seldom ends an answer."""

    def answers(
        model: Any, latents: Any, wordings: Any, inputs: Any, *more: Any, **how: Any
    ) -> Any:
        return [[by_rule(k, x) for x in row] for k, row in zip(wordings, inputs, strict=True)]

    for place in ("supply.propose", "inference.confidence", "inference.deduction", "api"):
        monkeypatch.setattr(f"ship_ds.{place}.answer_latents", answers)


@pytest.fixture(params=["sort the numbers"])
def induces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every search ends with this instruction; of 16 letters, as three of the proposed ones."""
    monkeypatch.setattr(
        "ship_ds.supply.propose.induce_many",
        lambda model, bank, shown, *more: [SimpleNamespace(instruction=request.param)] * len(shown),
    )


def killed_after(count: int) -> Callable[[Journal, SupplyPart], None]:
    add, calls = Journal.add, list[int]()

    def dies(journal: Journal, part: SupplyPart) -> None:
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(1)
        add(journal, part)

    return dies


@pytest.mark.usefixtures("answers_by_rule")
@pytest.mark.parametrize("kind", ["compress", "chains", "answers"])
def test_a_kill_costs_one_part_and_no_byte(
    kind: str, ship: Ship, tasks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    counts = supply(ship, kind, whole, tasks_file, EASY[kind])
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed_after(1))
        with pytest.raises(KeyboardInterrupt):
            supply(ship, kind, cut, tasks_file, EASY[kind])
    journal = tmp_path / "cut.jsonl.journal"
    assert not cut.exists() and len(rows(journal)) == 2
    with journal.open("a") as file:
        file.write('{"counts": {"kept": 1')  # as a kill within a write leaves it
    with pytest.raises(UserError, match="begun with another --num-tasks"):
        supply(ship, kind, cut, tasks_file, EASY[kind], num_tasks=9)
    assert supply(ship, kind, cut, tasks_file, EASY[kind]) == counts
    assert cut.read_bytes() == whole.read_bytes() and not journal.exists()
    read = read_tasks(whole)
    assert [task.id for task in read] == [row["id"] for row in rows(whole)]
    assert all(row["origin"]["how"] == kind for row in rows(whole))


def test_a_kill_while_disagreement_is_measured(
    ship: Ship, tasks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the run's own answers, which change as words go."""
    test_a_kill_costs_one_part_and_no_byte("disagreement", ship, tasks_file, tmp_path, monkeypatch)


def test_disagreement_is_a_weight_that_the_reader_takes(
    ship: Ship, tasks_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "weighted.jsonl"
    supply(ship, "disagreement", out, tasks_file, EASY["disagreement"])
    written, tasks = rows(out), read_tasks(out)
    assert len({task.weight for task in tasks}) > 1
    assert sum(task.weight for task in tasks) == pytest.approx(8, abs=1e-2)
    order = sorted(range(8), key=lambda i: written[i]["origin"]["disagreement"])
    assert [tasks[i].weight for i in order] == sorted(task.weight for task in tasks)
    assert [task.instruction for task in tasks] == [t.instruction for t in read_tasks(tasks_file)][
        :8
    ]


@pytest.mark.usefixtures("answers_by_rule", "induces")
def test_decoder_s_proposals_go_through_every_filter_and_are_the_same_again(
    ship: Ship, tasks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained decoder writes words at random, which this test does not need to be good."""
    texts = ["reverse the list", "add 3", "frobnicate", "put 7 at the end", "reverse the list"]
    monkeypatch.setattr(
        "ship_ds.supply.proposers.sample_texts", lambda *arguments: [[text] for text in texts]
    )
    changes = [*EASY["propose"], f"num_at_once={len(texts)}", "max_rounds=1"]
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    counts = [supply(ship, "propose", out, tasks_file, changes) for out in outs]
    assert counts[0] == counts[1] and outs[0].read_bytes() == outs[1].read_bytes()
    assert (counts[0]["proposed"], counts[0]["repeated"]) == (5, 1)
    assert (counts[0]["unreadable"], counts[0]["known"]) == (1, 1)
    for row in rows(outs[0]):
        origin = row["origin"]
        assert origin["by"] == "decoder" and ("around" in origin or origin["from"] == "prior")
        answers = ship.answer(row["instruction"], [e["input"] for e in row["examples"]])
        assert answers == [e["target"] for e in row["examples"]]


@pytest.mark.usefixtures("answers_by_rule", "induces")
@pytest.mark.parametrize("induces", ["add 1"], indirect=True)
def test_a_cycle_that_does_not_hold_is_counted(
    ship: Ship, tasks_file: Path, tmp_path: Path, writer: Server
) -> None:
    changes = [*EASY["propose"], "by=endpoint", "max_rounds=1", "min_cycle=0.1"]
    with pytest.raises(UserError, match="no task was kept .*cycle 3"):
        supply(ship, "propose", tmp_path / "none.jsonl", tasks_file, changes, writer.url)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]  # nor a journal


@pytest.mark.usefixtures("answers_by_rule", "induces")
def test_an_endpoint_proposes_and_is_asked_once(
    ship: Ship, tasks_file: Path, tmp_path: Path, writer: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*EASY["propose"], "by=endpoint", "max_rounds=2", "min_cycle=1"]
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed_after(1))
        with pytest.raises(KeyboardInterrupt):
            supply(ship, "propose", out, tasks_file, changes, writer.url)
    assert not out.exists() and len(writer.requests) == 2
    counts = supply(ship, "propose", out, tasks_file, changes, writer.url)
    assert counts == {"proposed": 10, "repeated": 5, "unreadable": 1, "known": 1, "kept": 3}
    assert len(writer.requests) == 2  # the reply of the round that was lost is kept
    made = {row["instruction"]: row for row in rows(out)}
    assert list(made) == ["reverse the list", "put 7 at the end", "sort the numbers"]
    origin = made["put 7 at the end"]["origin"]
    assert (origin["by"], origin["model"], origin["cycle"]) == ("endpoint", "writer", 1.0)
    first = out.read_bytes()
    out.unlink()
    supply(ship, "propose", out, tasks_file, changes, writer.url)
    assert len(writer.requests) == 2 and out.read_bytes() == first


@pytest.mark.usefixtures("answers_by_rule", "induces")
def test_held_out_rules_and_known_wordings_are_no_proposals(
    ship: Ship, tasks_file: Path, tmp_path: Path, writer: Server, parts: Callable[..., None]
) -> None:
    parts(seen=[["foo", "put 7 at the end"]], unseen=[["bar", "reverse the list"], ["add 3"]])
    changes = [*EASY["propose"], "by=endpoint", "max_rounds=1"]
    out = tmp_path / "out.jsonl"
    counts = supply(ship, "propose", out, tasks_file, changes, writer.url)
    assert (counts["held out"], counts["known"], counts["kept"]) == (2, 1, 1)
    assert [row["instruction"] for row in rows(out)] == ["sort the numbers"]
    assert counts["held-out rules of --data"] == 1


@pytest.mark.usefixtures("answers_by_rule")
@pytest.mark.parametrize("kind", ["chains", "compress", "disagreement"])
def test_held_out_rules_are_nowhere(
    kind: str, ship: Ship, tasks_file: Path, tmp_path: Path, parts: Callable[..., None]
) -> None:
    before = supply(ship, kind, tmp_path / "all.jsonl", tasks_file, EASY[kind], num_tasks=None)
    secret = rows(tmp_path / "all.jsonl")[0]
    wording = secret["origin"].get("wording", secret["instruction"])
    parts(unseen=[["bar", wording]])
    out = tmp_path / "out.jsonl"
    counts = supply(ship, kind, out, tasks_file, EASY[kind], num_tasks=None)
    assert wording not in [
        text for row in rows(out) for text in (row["instruction"], *row.get("paraphrases", ()))
    ]
    left_out = counts.get("held out", 0) + counts.get("held-out rules of --data", 0)
    assert left_out > before.get("held out", 0)


def written(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "unlabelled.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


ASKED = ["quux", "1 2 6 4", "4 7 5 3 9", "1 2 6 4", "3 4 8 1", "9 9 1 2"]
"""One that cannot be read, one twice, one that has a label, and one too many."""


def test_the_bare_base_answers_inputs_without_a_label(
    ship: Ship, tmp_path: Path, parts: Callable[..., None]
) -> None:
    """As the instruction in its prompt says, which is what it was trained on; labels stay."""
    data = written(
        tmp_path,
        {
            "id": "both",
            "instruction": "reverse the list",
            "inputs": ASKED,
        }
        | {
            "examples": [{"input": "3 4 8 1", "target": "9"}],
            "paraphrases": ["turn the list around"],
        },
        {"id": "alone", "instruction": "put 7 at the end", "inputs": []},
        {"id": "labelled", "instruction": "add 3", "examples": [{"input": "1", "target": "4"}]},
        {"id": "strange", "instruction": "frobnicate", "inputs": ["1 2 6 4"]},
        {"id": "secret", "instruction": "sort the numbers", "inputs": ["1 2 6 4"]},
        {"id": "words", "instruction": "add 2 to every number", "inputs": ["quux", "1 2 6 4"]},
    )
    lent = (Example("8 1 3 6", ""), Example("2 5 9 4", ""))
    parts(seen=[["put 7 at the front"]], unseen=[["bar", "sort the numbers"]], examples=lent)
    out = tmp_path / "out.jsonl"
    changes = ["min_examples=2", "num_inputs=2"]
    counts = supply(ship, "answers", out, data, changes, num_tasks=None)
    assert counts == {
        "inputs": 5,
        "inputs left for another time": 3,
        "answered": 2,
        "unreadable": 1,
        "labelled already (relabels=true answers them anew)": 1,
        "too few answers": 1,
        "held-out rules of --data": 1,
    }
    both, alone = rows(out)
    pairs = [[(e["input"], e["target"]) for e in row["examples"]] for row in (both, alone)]
    assert pairs[0] == [("3 4 8 1", "9"), ("1 2 6 4", "4 6 2 1"), ("4 7 5 3 9", "9 3 5 7 4")]
    assert sorted(pairs[1]) == [("2 5 9 4", "2 5 9 4 7"), ("8 1 3 6", "8 1 3 6 7")]
    assert both["paraphrases"] == ["turn the list around"] and "inputs" not in alone
    assert both["inputs"] == ["quux", "9 9 1 2"]
    by = {"how": "answers", "by": "task_llm", "run": ship.digest[:12]}
    assert both["origin"] == by
    assert alone["origin"] == by | {"inputs_of": "own put 7 at the front"}


def test_labels_go_where_all_is_answered_anew(ship: Ship, tmp_path: Path) -> None:
    examples = [
        {"input": text, "target": "9"} for text in ("3 4 1 8", "5 1 6 2", "2 2 8 9 6", "7 1 3 5")
    ]
    data = written(tmp_path, {"id": "a", "instruction": "reverse the list", "examples": examples})
    out = tmp_path / "out.jsonl"
    supply(ship, "answers", out, data, ["relabels=true", "num_inputs=3"])
    (row,) = rows(out)
    kept, *answered = row["examples"]
    assert kept in examples and len(answered) == 3 and "inputs" not in row, "one was not asked"
    assert all(e["target"].split() == e["input"].split()[::-1] for e in answered)
    assert len({e["input"] for e in row["examples"]}) == 4


def test_a_labelled_task_that_gets_no_answer_is_counted_apart(
    ship: Ship, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [{"input": "3 4 1 8", "target": "8 1 4 3"}, {"input": "5 1", "target": "1 5"}]
    task = {"id": "a", "instruction": "reverse the list", "examples": labels}
    data = written(tmp_path, task | {"inputs": [" 3 4 1 8\n", "2 9 4 1"]})
    asked: list[Sequence[Sequence[str]]] = []

    def answer(teacher: Any, instructions: Sequence[str], inputs: Any) -> list[list[None]]:
        asked.append(inputs)
        return [[None] * len(texts) for texts in inputs]

    monkeypatch.setattr(TaskLlmTeacher, "answer", answer)
    out = tmp_path / "out.jsonl"
    counts = supply(ship, "answers", out, data, [])
    assert asked == [[["2 9 4 1"]]], "white space makes no other input"
    assert counts["not answered, labels kept"] == 1 and "answered" not in counts
    assert rows(out)[0]["examples"] == labels


def test_answers_that_are_all_alike_go_and_labels_keep_them(ship: Ship, tmp_path: Path) -> None:
    row = {"instruction": "take the first 1 numbers", "inputs": ["3 4 1 8", "3 1 6 2"]}
    labels = [{"input": "3 9 9 9", "target": "3"}]
    data = written(tmp_path, {"id": "a", **row}, {"id": "b", **row, "examples": labels})
    out = tmp_path / "out.jsonl"
    counts = supply(ship, "answers", out, data, [])
    assert (counts["trivial"], counts["answered"]) == (1, 1)
    assert [one["id"] for one in rows(out)] == ["b"]


def test_what_the_task_llm_cannot_answer_within_its_context_is_not_asked(
    ship: Ship, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the instruction before it, which under an adapter is not there."""
    prompts = ship.model.prompts
    long, short = " ".join(["3 1"] * 8), "3 1 4 5"
    least = len(prompts.task_prompt(long, "reverse the list")) + 6
    kind = type(ship.model.task_llm.language_model)
    monkeypatch.setattr(kind, "context_length", property(lambda lm: least - 1))
    row = {"instruction": "reverse the list", "inputs": [long, short]}
    out = tmp_path / "out.jsonl"
    supply(ship, "answers", out, written(tmp_path, {"id": "a", **row}), ["min_examples=1"])
    (made,) = rows(out)
    assert [one["input"] for one in made["examples"]] == [short] and made["inputs"] == [long]


def test_a_journal_knows_inputs_and_one_without_a_part_is_nobodys(
    ship: Ship, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"id": "a", "instruction": "reverse the list", "inputs": ["3 1 4 5", "6 2 2 1"]}
    other = {"id": "b", "instruction": "reverse the list", "inputs": ["7 1 4 5", "1 8 8 2"]}
    out, changes = tmp_path / "out.jsonl", ["num_at_once=1"]
    with pytest.raises(UserError, match="the teacher gave no answer: .*, or set by=task_llm"):
        supply(ship, "answers", out, written(tmp_path, first, other), [*changes, "by=endpoint"])
    assert not journal_of(out).exists()
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed_after(0))
        with pytest.raises(KeyboardInterrupt):
            supply(ship, "answers", out, written(tmp_path, first), changes)
    assert len(rows(journal_of(out))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed_after(1))
        with pytest.raises(KeyboardInterrupt):
            supply(ship, "answers", out, written(tmp_path, first, other), changes)
    other["inputs"] = ["7 1 4 6"]
    with pytest.raises(UserError, match="begun with another --data"):
        supply(ship, "answers", out, written(tmp_path, first, other), changes)


UNREAD = [{"input": "quux", "target": "4"}, {"input": " ".join(["3 1"] * 300), "target": "4 1"}]
"""A word that the embedded model has none for, and more tokens than it reads."""


@pytest.mark.usefixtures("answers_by_rule", "induces")
@pytest.mark.parametrize("kind", ["chains", "compress", "disagreement", "propose"])
def test_inputs_that_cannot_be_read_are_passed_over(
    ship: Ship, tasks_file: Path, tmp_path: Path, kind: str
) -> None:
    """One of a thousand inputs ended the whole supply, or was answered beyond the context."""
    lines = rows(tasks_file)
    spoilt = written(tmp_path, *({**one, "examples": UNREAD + one["examples"]} for one in lines))
    found = []
    for data in (tasks_file, spoilt):
        counts = supply(ship, kind, tmp_path / f"{data.stem}.jsonl", data, EASY[kind])
        found.append((counts, rows(tmp_path / f"{data.stem}.jsonl")))
    (plain, whole), (counts, around) = found
    assert whole and counts == plain
    if kind == "propose":  # other inputs are drawn of a longer list
        asked = [one["input"] for row in around for one in row["examples"]]
        assert asked and not {one["input"] for one in UNREAD} & set(asked)
        return
    for row in around:  # what is written of a task is all of it
        row["examples"] = [one for one in row["examples"] if one not in UNREAD]
    assert around == whole


def test_tasks_without_labels_are_counted_as_such(ship: Ship, tmp_path: Path) -> None:
    data = written(tmp_path, {"id": "a", "instruction": "add 3", "inputs": ["1 2"]})
    with pytest.raises(UserError, match="no task was kept .no labels 1"):
        supply(ship, "compress", tmp_path / "out.jsonl", data, [])
    bare = {"id": "b", "instruction": "reverse the list", "inputs": []}
    given = {"id": "c", "instruction": "add 1", "examples": [{"input": "1", "target": "2"}]}
    with pytest.raises(UserError, match="(?=.*no inputs 1)(?=.*no labels 1)"):
        supply(ship, "chains", tmp_path / "out.jsonl", written(tmp_path, bare, given), [])


class Teaches(Handler):
    """Turns the last line around; of three words it never comes to an end."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        words = body["messages"][-1]["content"].splitlines()[-1].split()
        ends = "length" if len(words) == 3 else "stop"
        self.say(f" {' '.join(words[::-1])}\n", body["model"], ends)


@pytest.fixture
def teacher() -> Iterator[Server]:
    server = Server()
    server.RequestHandlerClass = Teaches
    yield from serve(server)


def test_an_endpoint_answers_each_input_once(ship: Ship, tmp_path: Path, teacher: Server) -> None:
    data = written(
        tmp_path,
        {"id": "a", "instruction": "reverse the list", "inputs": ["1 2", "3 4 5", "6 7"]},
    )
    out = tmp_path / "out.jsonl"
    counts = supply(ship, "answers", out, data, ["by=endpoint"], teacher.url)
    assert counts["inputs without an answer that ends"] == 1 and counts["answered"] == 1
    (row,) = rows(out)
    assert row["examples"] == [
        {"input": "1 2", "target": "2 1"},
        {"input": "6 7", "target": "7 6"},
    ]
    assert row["origin"] == {"how": "answers", "by": "endpoint", "model": "writer"}
    asked = teacher.requests[0]
    assert asked["messages"][0]["content"] == "reverse the list\n\n1 2"
    assert asked["max_tokens"] == ship.config.evaluation.max_new_tokens
    out.unlink()
    supply(ship, "answers", out, data, ["by=endpoint"], teacher.url)
    assert len(teacher.requests) == 3


def test_no_inputs_anywhere_is_one_line(ship: Ship, tmp_path: Path) -> None:
    data = written(tmp_path, {"id": "a", "instruction": "reverse the list", "inputs": []})
    with pytest.raises(UserError, match="no task was kept .*without an input that can be read 1"):
        supply(ship, "answers", tmp_path / "out.jsonl", data, [])
    strange = {"id": "b", "instruction": "frobnicate", "inputs": ["1 2 6 4", "3 1 4 5"]}
    alone = {"id": "a", "instruction": "reverse the list", "inputs": []}
    none_lent = "(?=.*unreadable 1)(?=.*without an input that can be read 1)"
    with pytest.raises(UserError, match=none_lent):
        supply(ship, "answers", tmp_path / "out.jsonl", written(tmp_path, strange, alone), [])
    with pytest.raises(UserError, match="--data: no task has an input to answer; give some"):
        supply(ship, "propose", tmp_path / "out.jsonl", data, EASY["propose"])


def test_test_rows_of_a_format_are_not_written(ship: Ship, tmp_path: Path) -> None:
    """Nor what else has their inputs."""
    for file, texts in (("train", "3 1,4 2,5 1,6 1"), ("test", "6 1,7 1")):
        lines = [
            {"inputs_pretokenized": f"add 3 {text} .", "targets_pretokenized": file}
            for text in texts.split(",")
        ]
        folder = tmp_path / "p3"
        folder.mkdir(exist_ok=True)
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.jsonl"
    said: list[str] = []
    config = parse_settings("disagreement", EASY["disagreement"])
    make(ship, config, "disagreement", out, folder, None, 0, EndpointConfig(), said.append)
    (row,) = rows(out)
    assert [one["input"] for one in row["examples"]] == ["3 1", "4 2", "5 1"]
    assert any("3 test examples of its format are left out" in line for line in said)


def test_an_instruction_of_the_same_words_is_not_shortened(ship: Ship, tmp_path: Path) -> None:
    examples = [{"input": f"{i} 1", "target": f"{i}"} for i in range(4)]
    row = {"id": "t", "instruction": "reverse\n the  list", "examples": examples}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    changes = ["min_words=3", "tolerance=1"]
    with pytest.raises(UserError, match="nothing to drop 1"):
        supply(ship, "compress", tmp_path / "out.jsonl", tmp_path / "a.jsonl", changes)


def test_all_tasks_get_a_weight_also_those_that_cannot_be_measured(
    ship: Ship, tmp_path: Path
) -> None:
    """More tasks than a kind makes of itself."""
    data, out = tmp_path / "many.jsonl", tmp_path / "out.jsonl"
    examples = [{"input": f"{i} 1", "target": f"{i}"} for i in range(4)]
    texts = ["frobnicate this", "reverse", *["add 3"] * 64]
    lines = [
        {"id": f"t{i}", "instruction": text, "examples": examples} for i, text in enumerate(texts)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = ["num_inputs=1", "num_dropped=1", "num_at_once=33"]
    supply(ship, "disagreement", out, data, changes, num_tasks=None)
    assert [task.id for task in read_tasks(out)] == [line["id"] for line in lines]
    assert [task.weight for task in read_tasks(out)[:2]] == [1.0, 1.0]
    assert rows(out)[0]["origin"]["disagreement"] is None


def test_the_journal_knows_tasks_by_what_they_are(
    ship: Ship, tasks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, moved, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "out.jsonl"
    data.write_bytes(tasks_file.read_bytes())
    kind = "compress"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed_after(1))
        with pytest.raises(KeyboardInterrupt):
            supply(ship, kind, out, data, EASY[kind])
    data.write_bytes(tasks_file.read_bytes().replace(b' 3"', b' 4"'))
    with pytest.raises(UserError, match="begun with another --data"):
        supply(ship, kind, out, data, EASY[kind])
    moved.write_bytes(tasks_file.read_bytes())
    supply(ship, kind, out, moved, EASY[kind], url="http://127.0.0.1:2/v1")
    assert out.exists()


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"counts": {}, "taks": []}', '{"counts": 3}'])
def test_a_damaged_journal_is_one_line(line: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    journal_of(out).write_text(json.dumps({"kind": "compress"}) + "\n" + line + "\n")
    with (
        pytest.raises(UserError, match="journal: damaged; remove it"),
        Journal.opened(out, {"kind": "compress"}),
    ):
        pass


def test_a_kill_before_the_journal_goes(
    ship: Ship, tasks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "drop", lambda journal: None)
        supply(ship, "compress", out, tasks_file, EASY["compress"])
    first = out.read_bytes()
    assert journal_of(out).exists()
    supply(ship, "compress", out, tasks_file, EASY["compress"])
    assert out.read_bytes() == first and not journal_of(out).exists()


def test_an_endpoint_that_nothing_asks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="by=endpoint"):
        verb("propose", tmp_path, tmp_path / "o.jsonl", endpoint="http://127.0.0.1:1/v1")


@pytest.mark.usefixtures("answers_by_rule", "induces")
def test_answers_that_samples_do_not_give_are_left_out(
    ship: Ship, tasks_file: Path, tmp_path: Path, writer: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ship_ds.supply.propose.agreement",
        lambda model, posterior, texts, inputs, *more, **how: [[0.5] * len(x) for x in inputs],
    )
    changes = [*EASY["propose"], "by=endpoint", "max_rounds=1", "min_agreement=0.6"]
    with pytest.raises(UserError, match="disagreement 3"):
        supply(ship, "propose", tmp_path / "none.jsonl", tasks_file, changes, writer.url)


def test_latents_lie_between_two_known_instructions(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def texts(model: Any, shown: Any, latent_TZ: Any, *more: Any) -> list[list[str]]:
        seen.append(latent_TZ)
        return [["x"]] * len(latent_TZ)

    monkeypatch.setattr("ship_ds.supply.proposers.sample_texts", texts)
    config = ProposeConfig(prior_share=0, between_share=1, spread=0, num_at_once=8)
    known = ["reverse the list", "add 3"]
    made = DecoderProposer(ship, config).propose(known, 0, 0)
    a, b = ship.bank_of(known).latent_CZ
    way = ((seen[0] - a) @ (b - a)) / ((b - a) @ (b - a))
    assert all("towards" in one.origin for one in made)
    assert ((way > 0.01) & (way < 0.99)).any()
    assert seen[0].sub(a + way[:, None] * (b - a)).abs().max() < 1e-4


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with (
        Journal.opened(out, {"kind": "x"}),
        pytest.raises(UserError, match="another process writes it"),
        Journal.opened(out, {"kind": "x"}),
    ):
        pass
