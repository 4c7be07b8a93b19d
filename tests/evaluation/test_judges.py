"""Judges of induced instructions; the endpoint's against a local server that speaks the
protocol."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

from ship_ds.api import Ship
from ship_ds.data.matching import exact_match
from ship_ds.data.rules import RulesConfig, build_world
from ship_ds.data.task import Example
from ship_ds.errors import UserError
from ship_ds.evaluation.config import EndpointConfig, JudgeName
from ship_ds.evaluation.endpoint import EndpointJudge
from ship_ds.evaluation.judges import (
    ExactMatchJudge,
    ExecutionJudge,
    PublishedExecutionJudge,
    RougeJudge,
    judges_of,
)
from ship_ds.evaluation.metrics import paper_score, rouge_l
from ship_ds.evaluation.questions import Question, ask
from ship_ds.inference.deduction import answer_stated
from ship_ds.inference.proposals import without_preamble


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return [ask(task, 5, 0) for task in build_world(RulesConfig(num_seen=24)).seen[:6]]


class Server(ThreadingHTTPServer):
    """Says yes where both instructions are the same; the first `num_failures` requests fail."""

    def __init__(self, num_failures: int = 0, status: int = 503) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.num_failures, self.status, self.requests = num_failures, status, list[dict[str, Any]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(
            {"path": self.path, "key": self.headers["Authorization"], **body}
        )
        if len(self.server.requests) <= self.server.num_failures:
            return self.reply(
                self.server.status, {"error": {"message": "overloaded", "type": "server_error"}}
            )
        lines = body["messages"][-1]["content"].splitlines()
        one, other = (line.partition(": ")[2] for line in lines[-2:])
        has_system = body["messages"][0]["role"] == "system"
        said = ("No.", "Yes.", "It is False.", "That is **True**.")[2 * has_system + (one == other)]
        self.say(said, body["model"])

    def say(self, text: str, model: str, ends: str = "stop") -> None:
        """Reply as a model that writes this. ends: why it writes no more."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": ends}
        self.reply(
            200,
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": model,
                "choices": [choice],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            },
        )

    def reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def serve(server: Server) -> Iterator[Server]:
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    yield from serve(Server())


@pytest.fixture
def shaky() -> Iterator[Server]:
    yield from serve(Server(num_failures=2))


@pytest.fixture
def closed() -> Iterator[Server]:
    yield from serve(Server(num_failures=99, status=401))


def test_endpoint_is_asked_once_a_question(
    server: Server, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    config = EndpointConfig(url=server.url, model="judge-1")
    induced = [questions[0].task.task.instruction, "something else"]
    for _ in range(2):
        judge = EndpointJudge(config, tmp_path)
        assert judge.columns(induced, questions[:2]) == {"judged_equivalence": [[True], [False]]}
    assert len(server.requests) == 2
    asked = server.requests[0]
    assert (asked["path"], asked["key"], asked["model"]) == (
        "/v1/chat/completions",
        "Bearer secret",
        "judge-1",
    )
    assert asked["temperature"] == 0 and induced[0] in asked["messages"][0]["content"]
    stored = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert sorted(kept["reply"]["choices"][0]["message"]["content"] for kept in stored) == [
        "No.",
        "Yes.",
    ]
    assert "secret" not in json.dumps(stored)


def test_published_prompts_are_the_authors_and_true_anywhere_is_a_yes(
    server: Server, questions: list[Question], tmp_path: Path
) -> None:
    judge = EndpointJudge(EndpointConfig(url=server.url, prompts="published"), tmp_path)
    true = questions[0].task.task.instruction
    assert judge.columns([true, "else"], questions[:2]) == {"judged_equivalence": [[True], [False]]}
    system, user = server.requests[0]["messages"]
    assert system["content"] == (
        "Here are two instructions described in natural language. \nPlease help me determine if "
        'these two instructions are equivalent.\nOnly return "True" or "False".'
    )
    assert user["content"] == f"transformation A: {true}\ntransformation B: {true}"
    of_lists = EndpointConfig(url=server.url, prompts="published-lists")
    EndpointJudge(of_lists, tmp_path).columns([true], questions[:1])
    assert "two transformations" in server.requests[-1]["messages"][0]["content"]


@pytest.mark.parametrize("prompts", ["strict", "published"])
def test_answers_are_judged_and_one_that_never_ended_is_wrong_unasked(
    prompts: Literal["strict", "published"],
    server: Server,
    questions: list[Question],
    tmp_path: Path,
) -> None:
    judge = EndpointJudge(EndpointConfig(url=server.url, prompts=prompts), tmp_path)
    question = questions[0]
    answers = [[None, "no", *(example.target for example in question.asked[2:])]]
    right = [[False, False, *[True] * (len(question.asked) - 2)]]
    assert judge.answer_columns(answers, [question]) == {"judged_right": right}
    assert len(server.requests) == len(question.asked) - 1
    asked = server.requests[0]["messages"][-1]["content"]
    assert question.task.task.instruction in asked and question.asked[1].input in asked


def test_judges_score_what_they_are_for() -> None:
    names: list[JudgeName] = ["execution", "rouge", "similarity", "endpoint"]
    assert judges_of("induction", names) == names
    for direction in ("deduction", "reasoning"):
        assert judges_of(direction, names) == ["similarity", "endpoint"]
    assert judges_of("reconstruction", names) == []


def test_endpoint_is_asked_again_by_another_model_name(
    server: Server, questions: list[Question], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        EndpointJudge(EndpointConfig(url=server.url, model=name), tmp_path).columns(
            ["x"], questions[:1]
        )
    assert [asked["model"] for asked in server.requests] == ["one", "two"]


def test_failures_are_retried(shaky: Server, questions: list[Question], tmp_path: Path) -> None:
    judge = EndpointJudge(EndpointConfig(url=shaky.url), tmp_path)
    assert judge.columns([questions[0].task.task.instruction], questions[:1]) == {
        "judged_equivalence": [[True]]
    }
    assert len(shaky.requests) == 3


def test_refusal_is_one_line_and_nothing_is_stored(
    closed: Server, questions: list[Question], tmp_path: Path
) -> None:
    judge = EndpointJudge(EndpointConfig(url=closed.url), tmp_path / "judged")
    with pytest.raises(UserError, match=r"the judge gave no answer: .*401") as caught:
        judge.columns(["x"], questions[:1])
    assert (
        "\n" not in str(caught.value)
        and len(closed.requests) == 1
        and not (tmp_path / "judged").exists()
    )


def test_any_wording_matches_exactly(questions: list[Question]) -> None:
    task = questions[0].task
    for wording in (*task.task.paraphrases, *task.held_out_paraphrases):
        assert ExactMatchJudge().columns([f" {wording} "], questions[:1]) == {
            "exact_match": [[True]]
        }
    assert ExactMatchJudge().columns([task.task.instruction + " twice"], questions[:1]) == {
        "exact_match": [[False]]
    }


def test_rouge_l_by_hand() -> None:
    """keep even numbers / keep the even numbers: common 3, precision 1, recall 3/4."""
    assert rouge_l("keep even numbers", ["keep the even numbers"]) == pytest.approx(6 / 7)
    assert rouge_l("keep even numbers", ["drop it", "keep even numbers"]) == 1.0
    assert rouge_l("", [""]) == 1.0 and rouge_l("反転", ["反転"]) == 1.0
    assert rouge_l(None, ["x"]) == 0.0 and rouge_l("a", ["b"]) == 0.0 and rouge_l("a", []) == 0.0


def test_rouge_judge_takes_the_best_wording(questions: list[Question]) -> None:
    held_out = questions[0].task.held_out_paraphrases[0]
    assert RougeJudge().columns([held_out], questions[:1]) == {"rouge_l": [[1.0]]}


@pytest.mark.parametrize(
    ("written", "instruction"),
    [
        ("to write the plural", "write the plural"),
        (': probably "write each word\'s plural form"', "write each word's plural form"),
        ("most likely: to add\nInput: 3", "add"),
        ('to write "yes" or "no"', "write yes or no"),
        ("total the numbers", "total the numbers"),
        ("", ""),
    ],
)
def test_of_what_is_written_the_published_way_the_instruction_is_taken(
    written: str, instruction: str
) -> None:
    assert without_preamble(written) == instruction


def test_published_execution_is_by_the_papers_prompt_and_metric(
    one_rank_run: Path, questions: list[Question]
) -> None:
    ship = Ship.from_run(one_rank_run)
    texts = [q.task.task.instruction for q in questions]
    inputs = [[example.input for example in q.checked] for q in questions]
    length = ship.config.evaluation.max_new_tokens
    prompt = ship.model.prompts.published_task_prompt
    answers = answer_stated(ship.model, texts, inputs, length, prompt=prompt)
    assert answers != answer_stated(ship.model, texts, inputs, length)
    # Of the first question the right answer is the first word of what the base says.
    checked = tuple(
        Example(one.input, (answer or "0").split()[0])
        for one, answer in zip(questions[0].checked, answers[0], strict=True)
    )
    task = replace(questions[0].task.task, paper_metric="contains")
    first = replace(questions[0], checked=checked, task=replace(questions[0].task, task=task))
    (column,) = PublishedExecutionJudge(ship).columns(texts, [first, *questions[1:]]).items()
    assert column[0] == "published_execution" and [len(row) for row in column[1]] == [10] * 6
    exact = [
        [exact_match(answer, one.answers) for answer, one in zip(row, q.checked, strict=True)]
        for row, q in zip(answers[1:], questions[1:], strict=True)
    ]
    assert column[1][1:] == exact
    by_metric = partial(paper_score, "contains")
    assert column[1][0] == [
        by_metric(answer, one.answers) for answer, one in zip(answers[0], checked, strict=True)
    ]
    assert sum(column[1][0]) > sum(
        exact_match(answer, one.answers) for answer, one in zip(answers[0], checked, strict=True)
    )


def test_execution_tells_the_true_instruction_from_another(
    one_rank_run: Path, questions: list[Question]
) -> None:
    judge = ExecutionJudge(Ship.from_run(one_rank_run))
    true = [q.task.task.instruction for q in questions]
    right, wrong = (
        judge.columns(texts, questions)["execution_accuracy"]
        for texts in (true, true[1:] + true[:1])
    )
    assert sum(map(sum, right)) >= 45 and sum(map(sum, wrong)) <= 15
    assert all(len(row) == 10 for row in right)
