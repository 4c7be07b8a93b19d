"""The application over an untrained run whose adapters do something, behind a real uvicorn."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI

from ship_ds.api import Ship
from ship_ds.serving.app import create_app
from ship_ds.serving.limits import Limits
from ship_ds.serving.room import Room
from ship_ds.serving.server import Server, address, listening
from tests.inference.conftest import random_bundle

BASE = "quickstart"
INPUT = "8 3 9 1 7 7 2 0 4 6 5 1"
"""To which sixteen instructions give sixteen answers."""


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("served") / BASE, 0.3, 12)


@pytest.fixture(scope="session")
def ship(bundle: Path) -> Ship:
    return Ship.from_run(bundle)


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    room: Room
    app: FastAPI

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "unused", "max_retries": 0, **options}
        )

    def metric(self, name: str, **labels: str) -> float:
        return self.room.metrics.registry.get_sample_value(name, labels) or 0.0


Serve = Callable[..., Served]


def started(ship: Ship, limits: Limits, **options: Any) -> tuple[Served, Callable[[], None]]:
    room = Room(ship, limits)
    app = create_app(room, name=BASE, **options)
    listener = listening("127.0.0.1", 0)
    server = Server(app, limits, is_quiet=True)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
    )
    room.start()
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def stop() -> None:
        server.should_exit = True
        thread.join(timeout=20)
        room.close()
        assert not thread.is_alive()

    return Served(address(listener), room, app), stop


@pytest.fixture
def serve(ship: Ship) -> Iterator[Serve]:
    """serve(Limits(...), api_key="...") -> a server of this test's own."""
    stops = []

    def begin(limits: Limits | None = None, **options: Any) -> Served:
        served, stop = started(ship, limits or Limits(), **options)
        stops.append(stop)
        return served

    yield begin
    for stop in stops:
        stop()


@pytest.fixture(scope="session")
def served(ship: Ship) -> Iterator[Served]:
    """One server that tests share; they leave no name registered."""
    running, stop = started(ship, Limits(max_body_bytes=100_000))
    yield running
    stop()


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return served.client()
