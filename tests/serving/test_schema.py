"""Whatever fits the server's own description of itself, and whatever does not: no answer of 5xx."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from ship_ds.api import Ship
from ship_ds.serving.app import create_app
from ship_ds.serving.limits import Limits
from ship_ds.serving.room import Room
from tests.serving.conftest import BASE, Served, started

pytestmark = pytest.mark.slow

MODES = pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())


@pytest.fixture(scope="module")
def quick(ship: Ship) -> Iterator[Served]:
    """Answers are short here: hundreds are asked for."""
    served, stop = started(ship, Limits(max_new_tokens=8, max_rows_per_request=8))
    yield served
    stop()


def check_every_operation(served: Served, mode: GenerationMode, num_examples: int) -> int:
    """Send what schemathesis makes up; how many answers there were."""
    config = schemathesis.Config.from_dict({"generation": {"allow-x00": True}})
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json", config=config)
    counts: dict[str, int] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        counts[operation.label] = 0

        @settings(
            max_examples=num_examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: schemathesis.Case) -> None:
            response = case.call(timeout=60)
            assert response.status_code < 500, (case.body, response.text)
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            counts[case.operation.label] += 1

        try:
            send()
        except Exception as error:
            # An operation without parameters has no wrong ones.
            if "Unsatisfiable" not in type(error).__name__ and "unsatisf" not in str(error).lower():
                raise
    asked = {label: count for label, count in counts.items() if "POST" in label}
    assert len(asked) == 9 and min(asked.values()) >= num_examples // 2, counts
    return sum(counts.values())


@MODES
def test_no_request_ends_in_a_fault(quick: Served, mode: GenerationMode) -> None:
    check_every_operation(quick, mode, 15)


@pytest.mark.soak
@MODES
def test_no_request_ends_in_a_fault_500_times(quick: Served, mode: GenerationMode) -> None:
    check_every_operation(quick, mode, 500)


_FIELDS = ("model", "prompt", "n", "max_tokens", "temperature", "top_p", "seed", "stop", "stream",
           "logprobs", "ship_examples", "stream_options", "tools", "echo")  # fmt: skip
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.dictionaries(st.sampled_from(_FIELDS) | st.text(), _ANYTHING, max_size=4),
    model=st.sampled_from(["ship:add 2", BASE, "ship", "ship:"]) | st.text(),
)
def test_any_json_is_answered_or_refused(
    quick: Served, changes: dict[str, object], model: str
) -> None:
    body = {"model": model, "prompt": "3 7", **changes}
    response = httpx.post(
        f"{quick.url}/v1/completions",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert response.status_code < 500, (body, response.text)
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def hostile_name(number: int) -> str:
    """Long, never the same; every fourth can be read and makes an adapter."""
    if number % 4 == 0:
        return "ship:add " + "and remove every 3 " * (number % 20) + " ".join(str(number))
    return f"ship:{'../' * (number % 200)}{number}{'é' * (number % 900)}\u202e"


def growth(ship: Ship, num_names: int) -> int:
    """Bytes that a server gains by that many names, the first half left out."""
    from starlette.testclient import TestClient

    room = Room(ship, Limits(max_cached=100))
    room.start()
    client = TestClient(create_app(room, name=BASE), base_url="http://127.0.0.1")
    at_half = 0
    for number in range(num_names):
        if number == num_names // 2:
            at_half = resident_bytes()
        body = {"model": hostile_name(number), "prompt": "1", "max_tokens": 1}
        wanted = 200 if number % 4 == 0 else 400
        assert client.post("/v1/completions", json=body).status_code == wanted
        assert client.get(f"/v1/models/{number}").status_code == 404
    room.close()
    assert room.metrics.registry.get_sample_value("ship_cached_adapters") == 100
    return resident_bytes() - at_half


@pytest.mark.slow
def test_hostile_names_leave_nothing_behind(ship: Ship) -> None:
    assert growth(ship, 500) < 8 << 20


@pytest.mark.soak
def test_ten_thousand_hostile_names_leave_nothing_behind(ship: Ship) -> None:
    assert growth(ship, 10_000) < 16 << 20
