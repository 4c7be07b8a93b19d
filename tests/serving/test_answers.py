"""What the official client gets: the run's own answers, whole and in streams."""

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from openai.types import CompletionChoice

from ship_ds.api import Ship
from ship_ds.data.task import Example
from ship_ds.model.batch import TokenBatch
from ship_ds.serving.limits import Limits
from tests.conftest import REPOSITORY
from tests.inference.conftest import KNOWN
from tests.serving.conftest import BASE, INPUT, Serve

pytestmark = pytest.mark.slow

INSTRUCTION = "add 2"
SYSTEM = {"role": "system", "content": INSTRUCTION}


def user(text: str = INPUT) -> dict[str, str]:
    return {"role": "user", "content": text}


def alone(ship: Ship, instruction: str | None, text: str = INPUT) -> str:
    """What the run answers by itself; an answer that does not end is what there is of it."""
    model, length = ship.model, ship.config.evaluation.max_new_tokens
    adapter = None
    if instruction is not None:
        adapter = model.adapt(model.encode([instruction]))
    batch = (
        model.task_batch([text], None, [instruction])
        if instruction is not None
        else model.collator.bare_questions([text], [None], model.device)
    )
    (row,) = model.task_llm.generate(adapter, batch, model.prompts.eos_id, length)
    return model.prompts.text(row)


def test_models_are_the_base_and_what_has_a_name(client: openai.OpenAI) -> None:
    (base,) = client.models.list().data
    assert (base.id, base.root, base.parent) == (BASE, BASE, None)
    assert client.models.retrieve(BASE).id == BASE
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        (f"ship:{INSTRUCTION}", [user()]),
        ("ship", [SYSTEM, user()]),
        ("ship", [{"role": "developer", "content": INSTRUCTION}, user()]),
        ("ship", [SYSTEM, {"role": "user", "content": [{"type": "text", "text": INPUT}]}]),
    ],
    ids=["in the name", "as the system's message", "as the developer's", "in parts"],
)
def test_a_chat_answers_as_the_instruction_says(
    client: openai.OpenAI,
    ship: Ship,
    model: str,
    messages: list[openai.types.chat.ChatCompletionMessageParam],
) -> None:
    answer = client.chat.completions.create(model=model, messages=messages)
    (choice,) = answer.choices
    assert choice.message.content == alone(ship, INSTRUCTION) != alone(ship, None)
    assert choice.finish_reason in ("stop", "length")
    assert answer.model_extra == {"ship_instruction": INSTRUCTION}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ship.model.question(INPUT, INSTRUCTION))
    assert 1 <= answer.usage.completion_tokens <= ship.config.evaluation.max_new_tokens
    assert answer.usage.total_tokens == (
        answer.usage.prompt_tokens + answer.usage.completion_tokens
    )


def test_finished_answers_are_those_of_the_api(client: openai.OpenAI, ship: Ship) -> None:
    wanted = ship.answer_many(KNOWN, [[INPUT]] * len(KNOWN))
    finished = [(text, row[0]) for text, row in zip(KNOWN, wanted, strict=True) if row[0]]
    assert len(finished) > 2
    for instruction, answer in finished:
        got = client.completions.create(model=f"ship:{instruction}", prompt=INPUT, temperature=0)
        assert (got.choices[0].text, got.choices[0].finish_reason) == (answer, "stop")


def test_the_base_answers_bare_or_as_its_prompt_says(client: openai.OpenAI, ship: Ship) -> None:
    got = client.completions.create(model=BASE, prompt=[INPUT, "1 2"])
    assert [one.text for one in got.choices] == [alone(ship, None), alone(ship, None, "1 2")]
    stated = client.chat.completions.create(model=BASE, messages=[SYSTEM, user()])
    shots = client.chat.completions.create(
        model=BASE, messages=[user("1 2"), {"role": "assistant", "content": "3 4"}, user()]
    )
    model = ship.model
    prompts = [model.prompts.task_prompt(INPUT), model.prompts.task_prompt(INPUT, INSTRUCTION)]
    assert stated.usage is not None and shots.usage is not None and got.usage is not None
    assert stated.usage.prompt_tokens == len(prompts[1])
    examples = [Example("1 2", "3 4")]
    prompts.append(model.prompts.task_prompt(INPUT, None, examples))
    assert shots.usage.prompt_tokens == len(prompts[2])
    for asked, prompt in ((got, prompts[0]), (stated, prompts[1]), (shots, prompts[2])):
        batch = TokenBatch.build([prompt], None, model.prompts.pad_id)
        num_new = ship.config.evaluation.max_new_tokens
        [ids] = model.task_llm.generate(None, batch, model.prompts.eos_id, num_new)
        answer = asked.choices[0]
        written = answer.text if isinstance(answer, CompletionChoice) else answer.message.content
        assert written == model.prompts.text(ids)


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI, ship: Ship) -> None:
    for model, instruction in ((f"ship:{INSTRUCTION}", INSTRUCTION), (BASE, None)):
        chunks = list(
            client.chat.completions.create(
                model=model,
                messages=[user()],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        *parts, last = chunks
        assert parts[0].choices[0].delta.role == "assistant"
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == alone(ship, instruction)
        assert parts[-1].choices[0].finish_reason in ("stop", "length")
        assert last.choices == [] and last.usage is not None and last.usage.completion_tokens > 0
        told = client.completions.create(model=model, prompt=INPUT, stream=True)
        assert "".join(chunk.choices[0].text for chunk in told) == text


def test_sampling_is_the_seeds_and_n_answers_differ(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        got = client.completions.create(
            model=f"ship:{INSTRUCTION}", prompt=INPUT, temperature=2, seed=seed, n=8
        )
        return [one.text for one in got.choices]

    assert ask(1) == ask(1) != ask(2)
    assert len(set(ask(1))) > 1
    greedy = client.completions.create(
        model=f"ship:{INSTRUCTION}", prompt=INPUT, temperature=2, top_p=1e-9, n=3
    )
    plain = client.completions.create(model=f"ship:{INSTRUCTION}", prompt=INPUT)
    assert {one.text for one in greedy.choices} == {plain.choices[0].text}


def test_a_stop_ends_the_answer_before_itself(client: openai.OpenAI, ship: Ship) -> None:
    wholes = {text: alone(ship, text) for text in KNOWN}
    text, whole = next(one for one in wholes.items() if len(set(one[1].split())) > 2)
    stop = next(word for word in whole.split() if word != whole.split()[0])
    model = f"ship:{text}"
    got = client.completions.create(model=model, prompt=INPUT, stop=["zzz", stop])
    assert got.choices[0].text == whole[: whole.index(stop)]
    assert got.choices[0].finish_reason == "stop"
    told = client.completions.create(model=model, prompt=INPUT, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in told) == got.choices[0].text


def test_max_tokens_cuts_an_answer_off(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model=f"ship:{INSTRUCTION}", messages=[user()], max_completion_tokens=2
    )
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None and got.usage.completion_tokens == 2


@torch.no_grad()
def test_log_probabilities_are_those_of_the_tokens(client: openai.OpenAI, ship: Ship) -> None:
    got = client.chat.completions.create(
        model=f"ship:{INSTRUCTION}", messages=[user()], logprobs=True, top_logprobs=3
    )
    assert got.choices[0].logprobs is not None
    content = got.choices[0].logprobs.content
    assert content and got.usage is not None
    assert len(content) in (got.usage.completion_tokens, got.usage.completion_tokens - 1)
    for one in content:
        assert one.logprob <= 0 and len(one.top_logprobs) == 3
        assert one.top_logprobs[0].token == one.token  # greedy
    model = ship.model
    adapter = model.adapt(model.encode([INSTRUCTION]), [INSTRUCTION])
    prompt = TokenBatch.build([model.question(INPUT)], None, model.prompts.pad_id)
    first_V = model.task_llm.stream(adapter, prompt).logits_EV[0].float().log_softmax(0)
    wanted = first_V.topk(3).values.tolist()
    assert [one.logprob for one in content[0].top_logprobs] == pytest.approx(wanted, abs=1e-4)
    old = client.completions.create(model=f"ship:{INSTRUCTION}", prompt=INPUT, logprobs=2)
    assert old.choices[0].logprobs is not None
    assert old.choices[0].logprobs.tokens == [one.token for one in content]


def test_many_instructions_at_once_answer_as_each_alone(serve: Serve, ship: Ship) -> None:
    served = serve()
    client = served.client()
    asked = KNOWN[:16]
    wanted = [alone(ship, instruction) for instruction in asked]
    assert len(set(wanted)) > 12  # else a mixture would not be seen

    def ask(instruction: str) -> str:
        got = client.completions.create(model=f"ship:{instruction}", prompt=INPUT)
        return got.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            assert list(pool.map(ask, asked)) == wanted
    rows = served.metric("ship_rows_a_forward_sum")
    assert rows > served.metric("ship_rows_a_forward_count")  # they did share forwards


def test_examples_are_induced_once_and_then_answered_by(serve: Serve, ship: Ship) -> None:
    served = serve()
    examples = [{"input": "3 7", "target": "5 9"}, {"input": "1", "target": "3"}]
    client = served.client()
    induced = ship.induce([("3 7", "5 9"), ("1", "3")])
    for _ in range(2):
        got = client.chat.completions.create(
            model="ship", messages=[user()], extra_body={"ship_examples": examples}
        )
        assert got.model_extra == {"ship_instruction": induced.instruction}
    assert served.metric("ship_made_adapters_total") == 1


def test_a_full_room_refuses_and_a_late_turn_is_told(serve: Serve) -> None:
    limits = Limits(max_waiting=1, wait_seconds=0.3)
    served = serve(limits)
    client = served.client()
    busy, free = threading.Event(), threading.Event()

    def hold(ship: Ship) -> None:
        busy.set()
        free.wait(20)

    # Not by `call`, which would count.
    with served.room._arrived:
        served.room._long.append(lambda: hold(served.room.ship))
        served.room._arrived.notify()
    assert busy.wait(5)
    try:
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(client.completions.create, model=BASE, prompt=INPUT)
            while not served.room.num_waiting:
                pass
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model=BASE, prompt=INPUT)
            with pytest.raises(openai.InternalServerError) as refused:
                late.result()
        assert refused.value.status_code == 503
    finally:
        free.set()
    assert client.completions.create(model=BASE, prompt=INPUT).choices


def test_a_long_call_keeps_no_answer_waiting(serve: Serve, ship: Ship) -> None:
    served = serve(Limits(wait_seconds=5))
    begun, answered = threading.Event(), threading.Event()
    passes = []

    def induce(ship: Ship) -> None:
        while not answered.is_set() and len(passes) < 2000:
            passes.append(ship.answer_bare(["1 2"]))
            begun.set()

    wanted = alone(ship, INSTRUCTION)
    undisturbed = ship.answer_bare(["1 2"])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(served.room.call(induce),))
    thread.start()
    assert begun.wait(20)
    got = served.client().completions.create(model=f"ship:{INSTRUCTION}", prompt=INPUT)
    answered.set()
    thread.join()
    assert got.choices[0].text == wanted
    assert len(passes) < 2000
    assert all(one == undisturbed for one in passes)


def test_what_the_page_shows_is_answered(
    serve: Serve, ship: Ship, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/serving.md: the program, and the body that curl sends."""
    served = serve()
    page = (REPOSITORY / "docs" / "serving.md").read_text()
    page = page.partition("## Instructions under vLLM")[0]
    (program,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "openai" in block
    )
    assert "http://127.0.0.1:8000" in program
    exec(program.replace("http://127.0.0.1:8000", served.url), {})
    assert (
        capsys.readouterr().out == alone(ship, "keep the numbers greater than 4", "3 9 5 2") + "\n"
    )
    (path, body), *others = re.findall(r"curl 127\.0\.0\.1:8000(\S+) .*?\n +-d '(.*?)'", page)
    assert not others
    loaded = httpx.post(f"{served.url}{path}", json=json.loads(body))
    assert loaded.json()["root"] == "ship:add 2 to every number"
