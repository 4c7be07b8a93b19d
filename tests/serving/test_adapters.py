"""Names: registered ones, cached ones, many at once; and that no text is taken for a place."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from ship_ds.api import Ship
from ship_ds.inference.results import Induction
from ship_ds.serving.adapters import Adapters, _induced
from ship_ds.serving.errors import RequestError
from ship_ds.serving.limits import Limits
from ship_ds.serving.room import Room
from tests.serving.conftest import BASE, INPUT, Serve, Served

pytestmark = pytest.mark.slow


def load(served: Served, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/load_lora_adapter", json=body, timeout=60)


def unload(served: Served, name: str) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/unload_lora_adapter", json={"lora_name": name})


def test_a_registered_name_answers_and_is_listed(served: Served, client: openai.OpenAI) -> None:
    card = load(served, lora_name="plus", instruction="add 2").json()
    try:
        assert (card["id"], card["root"], card["parent"]) == ("plus", "ship:add 2", BASE)
        assert [one.id for one in client.models.list()] == [BASE, "plus"]
        named = client.completions.create(model="plus", prompt=INPUT)
        made = client.completions.create(model="ship:add 2", prompt=INPUT)
        assert named.choices[0].text == made.choices[0].text
        assert load(served, lora_name="plus", instruction="add 3").status_code == 400
    finally:
        assert unload(served, "plus").status_code == 200
    assert unload(served, "plus").status_code == 404
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="plus", prompt=INPUT)


def test_a_known_name_wins_over_what_it_spells(served: Served, client: openai.OpenAI) -> None:
    load(served, lora_name="ship:add 2", instruction="remove every 3")
    try:
        named = client.completions.create(model="ship:add 2", prompt=INPUT)
        assert named.model_extra == {"ship_instruction": "remove every 3"}
    finally:
        unload(served, "ship:add 2")
    assert client.completions.create(model="ship:add 2", prompt=INPUT).model_extra == {
        "ship_instruction": "add 2"
    }


def test_names_have_an_end(serve: Serve) -> None:
    served = serve(Limits(max_names=2))
    codes = [load(served, lora_name=str(n), instruction="add 2").status_code for n in range(3)]
    assert codes == [200, 200, 400]


class CountingRoom(Room):
    """Counts what is made."""

    num_made = 0

    async def call(self, function: Callable[[Ship], Any], **options: Any) -> Any:
        self.num_made += 1
        await asyncio.sleep(0.05)
        return await super().call(function, **options)


def room(ship: Ship, **limits: Any) -> CountingRoom:
    made = CountingRoom(ship, Limits(**limits))
    made.start()
    return made


def test_who_asks_at_once_shares_one_making(ship: Ship) -> None:
    counted = room(ship)
    adapters = Adapters(counted, BASE)

    async def ask() -> None:
        asked = [asyncio.ensure_future(adapters.resolve("ship:add 2")) for _ in range(20)]
        await asyncio.sleep(0.01)
        asked[0].cancel()  # takes nothing from the others
        sources = await asyncio.gather(*asked[1:])
        assert len({id(source) for source in sources}) == counted.num_made == 1
        failing = [adapters.resolve("ship:qwerty") for _ in range(5)]
        errors = await asyncio.gather(*failing, return_exceptions=True)
        assert [getattr(error, "param", None) for error in errors] == ["model"] * 5
        assert counted.num_made == 2
        with pytest.raises(RequestError):  # not remembered: it may have been a passing fault
            await adapters.resolve("ship:qwerty")

    asyncio.run(ask())
    counted.close()


def test_who_joins_late_is_not_late_with_the_first(ship: Ship) -> None:
    counted = room(ship, wait_seconds=1.0)
    adapters, free = Adapters(counted, BASE), threading.Event()
    with counted._arrived:
        counted._long.append(lambda: free.wait(20) and None)  # not by `call`, which would count
        counted._arrived.notify()

    async def ask() -> None:
        first = asyncio.ensure_future(adapters.resolve("ship:add 2"))
        await asyncio.sleep(0.6)
        second, third = (asyncio.ensure_future(adapters.resolve("ship:add 2")) for _ in range(2))
        with pytest.raises(RequestError, match="no time"):
            await first
        free.set()
        assert await second is await third
        assert counted.num_made == 2

    asyncio.run(ask())
    counted.close()


def test_the_least_recently_used_is_forgotten(ship: Ship) -> None:
    counted = room(ship, max_cached=2)
    adapters = Adapters(counted, BASE)

    async def ask(*numbers: int) -> int:
        for number in numbers:
            await adapters.resolve(f"ship:add {number}")
        return counted.num_made

    assert asyncio.run(ask(1, 2, 1, 3, 1)) == 3
    assert asyncio.run(ask(2)) == 4
    assert counted.metrics.registry.get_sample_value("ship_cached_adapters") == 2
    counted.close()


def test_what_is_kept_has_a_size(ship: Ship) -> None:
    counted = room(ship, max_cached_bytes=1)
    adapters = Adapters(counted, BASE)

    async def ask() -> None:
        for number in range(1, 6):
            await adapters.resolve(f"ship:add {number}")

    asyncio.run(ask())
    assert counted.metrics.registry.get_sample_value("ship_cached_adapters") == 1
    counted.close()


def test_a_late_registration_does_not_replace_an_earlier_one(ship: Ship) -> None:
    counted = room(ship)
    adapters = Adapters(counted, BASE)

    async def register() -> None:
        both = [adapters.register("a", f"add {number}", None) for number in (1, 2)]
        first, second = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(first, dict) and isinstance(second, RequestError)

    asyncio.run(register())
    counted.close()


def test_a_client_that_leaves_frees_its_rows(serve: Serve) -> None:
    served = serve()
    before = threading.Event()

    def slow(*_: Any) -> None:
        before.set()
        time.sleep(0.05)

    model = served.room.ship.model
    eos = model.prompts.eos_id
    model.task_llm.before_pass = slow
    try:
        body = {"model": BASE, "prompt": INPUT, "max_tokens": 60, "stream": True}
        model.prompts.eos_id = -1  # no answer ends by itself
        for is_stream in (True, False):
            body["stream"] = is_stream
            before.clear()
            asked = httpx.Client(timeout=1.0 if not is_stream else 20)
            try:
                if is_stream:
                    with asked.stream("POST", f"{served.url}/v1/completions", json=body) as told:
                        next(told.iter_lines())
                else:
                    asked.post(f"{served.url}/v1/completions", json=body)
            except httpx.ReadTimeout:
                pass
            asked.close()
            left = time.monotonic()
            assert before.is_set()
            while not served.room.decoder.is_idle:
                assert time.monotonic() - left < 1.5  # of the three seconds that all would take
                time.sleep(0.01)
    finally:
        model.task_llm.before_pass, model.prompts.eos_id = None, eos


def test_no_field_is_opened_as_file_or_address(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    client = httpx.Client(base_url=served.url, timeout=60)
    client.get("/health")  # connected before connections are watched
    client.post("/v1/completions", json={"model": "ship:add 1", "prompt": "1"})
    touched: list[Any] = []
    # Python's own events, whoever asks: pathlib opens by another function than `open`.
    watched = {"open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo"}

    def hear(event: str, arguments: Any) -> None:
        if event in watched:
            touched.append((event, arguments))

    sys.addaudithook(hear)  # there is no taking it back
    for name in ("stat", "lstat"):  # which have no event
        real = getattr(os, name)

        def spied(path: Any, *rest: Any, real: Any = real, **options: Any) -> Any:
            touched.append(("stat", path))
            return real(path, *rest, **options)

        monkeypatch.setattr(os, name, spied)
    places = ("/etc/passwd", "../../etc/passwd", "http://127.0.0.1:1/x", "file:///etc/passwd", ".")
    for place in places:
        for path, body in (
            ("/v1/completions", {"model": place, "prompt": place}),
            ("/v1/completions", {"model": f"ship:{place}", "prompt": "1"}),
            ("/v1/completions", {"model": BASE, "prompt": place, "stop": place, "user": place}),
            (
                "/v1/chat/completions",
                {"model": BASE, "messages": [{"role": "user", "content": place}]},
            ),
            (
                "/v1/chat/completions",
                {
                    "model": "ship",
                    "ship_examples": [{"input": place, "target": place}],
                    "messages": [{"role": "user", "content": "1"}],
                },
            ),
            (
                "/v1/chat/completions",
                {
                    "model": BASE,
                    "messages": [
                        {
                            "role": "user",
                            "content": [{"type": "image_url", "image_url": {"url": place}}],
                        }
                    ],
                },
            ),
            ("/v1/load_lora_adapter", {"lora_name": place, "lora_path": place}),
            ("/v1/load_lora_adapter", {"lora_name": place, "instruction": place}),
            ("/v1/unload_lora_adapter", {"lora_name": place}),
        ):
            assert client.post(path, json=body).status_code in (200, 400, 404)
        client.get(f"/v1/models/{place}")
    heard = list(touched)
    watched.clear()
    assert not [one for one in heard if any(place in repr(one) for place in places[:4])]
    assert not [one for one in heard if one[0].startswith("socket.")], heard


def test_an_induced_adapter_fuses_the_text_that_its_latent_is_of(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which need not be the one that the search names; where descent found it, there is none."""
    for reading in ("add 2", ""):
        found = Induction("add 3", (), (0.5, 0.25), 1, 1, reading)
        monkeypatch.setattr(Ship, "induce", lambda *rest, found=found: found)
        source = _induced(ship, None, [("1", "4")])
        assert source.latent_1Z is not None and source.latent_1Z.tolist() == [[0.5, 0.25]]
        assert (source.instruction, source.reading) == ("add 3", reading or "add 3")
