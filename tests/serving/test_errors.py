"""What a client is told when it asks what cannot be: each status, its body, the client's class."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from starlette.datastructures import URL
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from ship_ds.api import Ship
from ship_ds.errors import UserError
from ship_ds.serving.app import _fitting
from ship_ds.serving.decoding import Sampling, Source
from ship_ds.serving.errors import RequestError, naming_fields
from ship_ds.serving.guard import Guard
from ship_ds.serving.limits import Limits
from ship_ds.serving.metrics import Metrics
from ship_ds.serving.protocol import UNSUPPORTED
from tests.serving.conftest import BASE, Serve, Served

pytestmark = pytest.mark.slow

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "3 7"}]


def post(served: Served, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{served.url}{path}", json=body, headers=headers, timeout=60)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [*USER, *USER]}, "messages"),
        (
            CHAT,
            {"messages": [{"role": "system", "content": "add 1"}, *USER]},
            "messages",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        (CHAT, {"model": "ship"}, "model"),
        (CHAT, {"model": BASE, "ship_examples": [{"input": "1", "target": "2"}]}, "ship_examples"),
        (CHAT, {"model": "ship", "ship_examples": [{"input": "1"}]}, "ship_examples[0].target"),
        (CHAT, {"ship_examples": []}, "ship_examples"),
        (
            CHAT,
            {"ship_examples": [{"input": "1", "target": "2", "body": 1}]},
            "ship_examples[0].body",
        ),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"n": 10**30}, "n"),
        (CHAT, {"max_tokens": -1}, "max_tokens"),
        (CHAT, {"max_tokens": 5000}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 4000}, "max_tokens"),
        (CHAT, {"temperature": 3}, "temperature"),
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"top_p": 0}, "top_p"),
        (CHAT, {"seed": 2**70}, "seed"),
        (CHAT, {"stop": ["a"] * 5}, "stop"),
        (CHAT, {"stop": ""}, "stop"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"logit_bias": {"5": 1}}, "logit_bias"),
        (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty"),
        (CHAT, {"allowed_token_ids": [5]}, "allowed_token_ids"),
        (CHAT, {"grammar": 'root ::= "a"'}, "grammar"),
        (CHAT, {"max_new_tokens": 5}, "max_new_tokens"),
        (COMPLETIONS, {"repeat_penalty": 1.1}, "repeat_penalty"),
        (COMPLETIONS, {"prompt_logprobs": 0}, "prompt_logprobs"),
        (COMPLETIONS, {"echo": True}, "echo"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ["1"] * 64, "n": 2}, "n"),
        (COMPLETIONS, {"prompt": "1\x002"}, "prompt"),
        (COMPLETIONS, {"prompt": "\ud800"}, "prompt"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"model": ""}, "model"),
        (COMPLETIONS, {"model": None}, "model"),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/etc"}, "lora_path"),
        ("/v1/load_lora_adapter", {"lora_name": "a"}, "instruction"),
        ("/v1/load_lora_adapter", {"lora_name": BASE, "instruction": "add 1"}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "ship", "instruction": "add 1"}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "a\n", "instruction": "add 1"}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "a" * 257, "instruction": "add 1"}, "lora_name"),
    ],
)
def test_a_bad_field_is_named(
    served: Served, path: str, change: dict[str, Any], param: str
) -> None:
    body: dict[str, Any] = {"model": "ship:add 2"} if path.endswith("completions") else {}
    body |= {CHAT: {"messages": USER}, COMPLETIONS: {"prompt": "3 7"}}.get(path, {})
    # json of the standard library spells half a surrogate pair, which httpx does not.
    data = json.dumps({**body, **change})
    response = httpx.post(
        f"{served.url}{path}", content=data, headers={"Content-Type": "application/json"}
    )
    error = error_of(response)
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param), error
    assert error["message"].startswith(param.split("[")[0]), error


def test_a_field_of_others_that_asks_for_nothing_is_let_be(served: Served) -> None:
    body = {"model": "ship:add 2", "prompt": "3 7"}
    for place in range(max(map(len, UNSUPPORTED.values()))):
        nothing = {
            name: values[min(place, len(values) - 1)] for name, values in UNSUPPORTED.items()
        }
        assert post(served, COMPLETIONS, {**body, **nothing}).status_code == 200


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("ship:   ", "instruction: is empty"),
        ("ship:qwerty zxcv", "not in the base model's vocabulary"),
        ("ship:add 2 <eos>", "control token"),
        ("ship:" + "add 2 " * 2000, "tokens long"),
    ],
)
def test_an_instruction_that_cannot_be_read_is_refused(
    served: Served, model: str, said: str
) -> None:
    response = post(served, CHAT, {"model": model, "messages": USER})
    assert response.status_code == 400
    assert said in error_of(response)["message"]


@pytest.mark.parametrize("text", ["3 <assistant> 4", "<eos>", "3 <pad>"])
def test_control_tokens_in_a_text_do_not_act(served: Served, text: str) -> None:
    for model in ("ship:add 2", BASE):
        response = post(served, COMPLETIONS, {"model": model, "prompt": text})
        assert response.status_code == 400
        assert "control token" in error_of(response)["message"]


def test_an_unknown_name_is_never_the_base(served: Served, client: openai.OpenAI) -> None:
    for name in ("another", "SHIP:add 2", "../quickstart", "/etc/passwd", "ship\x00", " ship:a"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.completions.create(model=name, prompt="3 7")
        assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_no_route_and_no_method_have_the_same_body(served: Served) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", COMPLETIONS, 405)):
        response = httpx.request(method, f"{served.url}{path}")
        assert response.status_code == status
        error_of(response)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}', b"[" * 50_000, b"1" * 5_000],
    ids=lambda data: repr(data[:6]),
)
def test_a_body_that_is_no_request(served: Served, data: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{served.url}{CHAT}", content=data, headers=headers, timeout=60)
    assert response.status_code == 400
    error_of(response)


def test_a_body_has_a_largest_size(served: Served) -> None:
    large = {"model": BASE, "prompt": "1" * 100_001}
    response = post(served, COMPLETIONS, large)
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")

    def parts() -> Any:
        yield from [b"1" * 10_000] * 20

    response = httpx.post(f"{served.url}{COMPLETIONS}", content=parts())  # states no length
    assert response.status_code == 413
    error_of(response)


def test_a_body_that_never_comes_is_not_waited_for(serve: Serve) -> None:
    served = serve(Limits(body_seconds=0.2))
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=20)
    connection.putrequest("POST", COMPLETIONS)
    connection.putheader("Content-Length", "10")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408


def connected(served: Served) -> socket.socket:
    host, port = urlsplit(served.url).netloc.split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_a_connection_that_asks_nothing_is_closed_and_they_are_counted(serve: Serve) -> None:
    served = serve(Limits(max_connections=3, head_seconds=0.7))
    since = time.monotonic()
    with contextlib.ExitStack() as open_ones:
        idle = [open_ones.enter_context(connected(served)) for _ in range(3)]
        refused = open_ones.enter_context(connected(served))
        head, _, body = refused.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(body)["error"]["code"] == "overloaded"
        # A head that comes byte by byte wins no time.
        with contextlib.suppress(OSError):
            for letter in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 1000:
                idle[0].send(bytes([letter]))
                time.sleep(0.02)
        for one in idle:
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
    assert time.monotonic() - since < 10
    assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nno header\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /" + b"x" * 70_000,
    ],
    ids=["line", "no host", "header", "length", "chunk", "TLS", "long"],
)
def test_what_is_no_http_has_the_same_body_and_ends_the_connection(
    served: Served, data: bytes
) -> None:
    with connected(served) as connection:
        connection.sendall(data)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"Connection: close" in head
    assert b"Content-Type: application/json" in head
    error = error_of(httpx.Response(400, content=body))
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_what_is_no_http_behind_an_answer_gets_no_second_one(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """A body that is too large is refused before its end; what follows may be anything."""
    large = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with connected(served) as connection:
        connection.sendall(large + b"186a1\r\n" + b"1" * 100_001 + b"\r\n")
        answer = connection.recv(17)
        assert answer == b"HTTP/1.1 413 Requ", answer
        connection.sendall(b"no size\r\n")
        rest = connection.makefile("rb").read()
    assert b"HTTP/1.1" not in rest and rest.endswith(b"}")
    assert "Traceback" not in caplog.text and not [one for one in caplog.records if one.exc_info]


def test_a_connection_that_waits_for_its_answer_is_kept(serve: Serve) -> None:
    served, go_on = serve(Limits(head_seconds=0.3)), threading.Event()
    holding = threading.Thread(
        target=asyncio.run, args=(served.room.call(lambda ship: go_on.wait(30)),)
    )
    holding.start()
    threading.Timer(1.5, go_on.set).start()
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=30)
    connection.request("GET", "/ship/v1/run")
    assert connection.getresponse().read().startswith(b"{")
    holding.join()
    # Its next request may come for as long again, and no longer.
    held = connection.sock
    held.sendall(b"GET /health HTTP/1.1\r\n")
    assert held.recv(1) == b""


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"model": "ship:qwerty", "messages": USER}, "model"),
        (CHAT, {"model": "ship", "messages": [{"role": "system", "content": "zx"}, *USER]},
         "messages"),
        (CHAT, {"model": "ship:add 2", "messages": [{"role": "user", "content": "zx"}]},
         "messages"),
        (CHAT, {"model": BASE, "messages": [{"role": "system", "content": "zx"}, *USER]},
         "messages"),
        (COMPLETIONS, {"model": "ship:add 2", "prompt": "zx"}, "prompt"),
        (COMPLETIONS, {"model": BASE, "prompt": ["3 7", "zx"]}, "prompt[1]"),
        (COMPLETIONS, {"model": "ship", "prompt": "3 7",
                       "ship_examples": [{"input": "3", "target": "5"},
                                         {"input": "3", "target": "zx"}]},
         "ship_examples[1].target"),
        (COMPLETIONS, {"model": "ship", "prompt": "3 7",
                       "ship_examples": [{"input": "3", "target": "5"},
                                         {"input": "3", "target": "6"}]}, "ship_examples"),
        ("/v1/load_lora_adapter", {"lora_name": "a", "instruction": "zx"}, "instruction"),
        ("/v1/load_lora_adapter", {"lora_name": "a", "examples": [{"input": "z", "target": "5"}]},
         "examples[0].input"),
        ("/ship/v1/describe", {"instruction": "zx"}, "instruction"),
        ("/ship/v1/confidence", {"instruction": "zx", "inputs": ["1"]}, "instruction"),
        ("/ship/v1/confidence", {"instruction": "add 2", "inputs": ["1", "zx"]}, "inputs[1]"),
        ("/ship/v1/confidence", {"instruction": "add 2", "inputs": ["1 " * 3000]}, "inputs[0]"),
        ("/ship/v1/induce", {"examples": [{"input": "zx", "target": "5"}]}, "examples[0].input"),
        ("/ship/v1/export", {"instruction": "zx"}, "instruction"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_read_is_in_the_field_that_is_named(
    served: Served, path: str, body: dict[str, Any], param: str
) -> None:
    response = post(served, path, body)
    assert (response.status_code, error_of(response)["param"]) == (400, param), response.text


def test_a_line_about_something_else_names_no_field() -> None:
    for line in ("explain: this run has no reader", "add 2", "input 1", "a: b"):
        with pytest.raises(UserError, match=line), naming_fields(input="inputs"):
            raise UserError(line)
    with pytest.raises(RequestError) as named, naming_fields(**{"a.safetensors": "weights"}):
        raise UserError("a.safetensors: is cut short")
    assert named.value.param == "weights"


def test_a_key_is_asked_for_everywhere_but_at_the_door(serve: Serve) -> None:
    served = serve(api_key="some key")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/ship/v1/anything", "/pages", "//v1"):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic some key"},
            {"Authorization": "some key"},
            {"Authorization": "Bearer söme key".encode()},
            {"Host": "x/health?"},
            {"Host": "x/page/?"},
        ):
            response = httpx.get(f"{served.url}{path}", headers=headers)  # type: ignore[arg-type]
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        served.client(api_key="wrong").models.list()
    right = {"Authorization": "Bearer some key"}
    assert httpx.get(f"{served.url}/v1/models", headers=right).status_code == 200
    # Another name of this machine is no matter where there is a key.
    asked = {**right, "Host": "far.example"}
    assert httpx.get(f"{served.url}/v1/models", headers=asked).status_code == 200


def test_what_host_says_opens_no_path(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(api_key="some key")
    # As an older Starlette makes it of `Host: x/health?`.
    monkeypatch.setattr(Request, "url", URL("http://x/health?/v1/models"))
    assert httpx.get(f"{served.url}/v1/models").status_code == 401


def test_pages_of_others_may_not_ask(served: Served) -> None:
    here = urlsplit(served.url).netloc
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://127.0.0.1:1"},
        {"Host": "evil.example"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Host": "[::1"},
    ):
        response = httpx.get(f"{served.url}/v1/models", headers=headers)
        assert response.status_code == 403, headers
        error_of(response)
    response = httpx.get(f"{served.url}/v1/models", headers={"Origin": f"http://{here}"})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


def test_fields_that_change_nothing_are_named_once(
    served: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        body = {"model": BASE, "prompt": "3", "user": "me", "tools": None, "presence_penalty": 0}
        assert post(served, COMPLETIONS, body).status_code == 200
    assert capfd.readouterr().err.count("'user'") == 1


def test_what_is_counted_has_bounded_labels(serve: Serve) -> None:
    served = serve()
    assert post(served, COMPLETIONS, {"model": "ship:add 2", "prompt": "3 7"}).status_code == 200
    assert post(served, COMPLETIONS, {"model": "a name of mine"}).status_code == 400
    for path in ("/secret", "/v1/models/mine", "/health"):
        httpx.get(f"{served.url}{path}")
    page = httpx.get(f"{served.url}/metrics").text
    assert 'ship_requests_total{code="200",route="/v1/completions"} 1.0' in page
    assert 'ship_requests_total{code="400",route="/v1/completions"} 1.0' in page
    assert 'ship_requests_total{code="404",route="/v1/models/{name:path}"} 1.0' in page
    assert 'ship_requests_total{code="404",route="other"} 1.0' in page
    assert "secret" not in page and "mine" not in page
    for name in ("prompt_tokens_total", "new_tokens_total", "seconds_to_first_token_count",
                 "rows_a_forward_count", "made_adapters_total", "cached_adapters"):  # fmt: skip
        assert served.metric(f"ship_{name}") >= 1, name
    assert served.metric("ship_running_rows") == served.metric("ship_waiting_requests") == 0


def test_a_field_is_named_without_what_pydantic_tried(served: Served) -> None:
    for stop in (["a"] * 5, [""], "", [1], 5):
        response = post(served, COMPLETIONS, {"model": BASE, "prompt": "3 7", "stop": stop})
        assert "constrained" not in error_of(response)["param"]


def test_an_answer_whose_length_nobody_asked_for_fits(ship: Ship) -> None:
    limit = ship.model.task_llm.language_model.context_length
    assert limit is not None
    long, sampling = [1] * (limit - 3), Sampling(12)
    assert _fitting(ship, Source(), long, sampling, True).max_new_tokens == 3
    assert _fitting(ship, Source(), [1], sampling, True) is sampling
    with pytest.raises(RequestError, match="max_tokens"):
        _fitting(ship, Source(), long, sampling, False)
    with pytest.raises(RequestError, match="leave no room") as refused:
        _fitting(ship, Source(), [1] * limit, sampling, True)
    assert refused.value.param is None


def test_half_a_body_is_not_passed_on() -> None:
    seen, metrics = [], Metrics()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await receive())

    messages: Iterator[Message] = iter([
        {"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}
    ])  # fmt: skip

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        seen.append(message)

    guard = Guard(app, api_key=None, hosts=(), limits=Limits(), metrics=metrics)
    scope = {"type": "http", "path": CHAT, "method": "POST", "headers": [(b"host", b"localhost")]}
    asyncio.run(guard(scope, receive, send))
    assert not seen


def test_health_is_the_models_too(serve: Serve) -> None:
    served = serve()
    assert httpx.get(f"{served.url}/health").status_code == 200
    served.room.close()
    response = httpx.get(f"{served.url}/health")
    assert response.status_code == 503
    error_of(response)
