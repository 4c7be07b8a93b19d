"""Batches made ahead, and what the ranks agree on, in one process."""

import threading
import weakref

import pytest
import torch

from ship_ds.runtime.agreement import agree
from ship_ds.runtime.prefetch import Prefetch


def test_the_next_step_is_made_while_this_one_runs_and_each_is_made_once() -> None:
    made: list[tuple[int, str]] = []
    began = threading.Event()

    def make(step: int) -> str:
        made.append((step, threading.current_thread().name))
        began.set()
        return f"batches of {step}"

    prefetch = Prefetch(make)
    assert prefetch.get(3) == "batches of 3"
    began.clear()
    prefetch.begin(4)
    assert began.wait(10), "made though nobody waits for it"
    assert prefetch.get(4) == prefetch.get(4) == "batches of 4"
    assert prefetch.get(7) == "batches of 7"
    assert [step for step, _ in made] == [3, 4, 7]
    assert all(name.startswith("batches") for _, name in made)


def test_what_goes_wrong_in_the_thread_is_raised_where_it_is_used() -> None:
    def make(step: int) -> None:
        raise ValueError(f"step {step}")

    prefetch = Prefetch(make)
    prefetch.begin(1)
    with pytest.raises(ValueError, match="step 1"):
        prefetch.get(1)


def test_the_thread_has_the_ranks_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of torch in the thread itself: what a new one has by itself depends on the build."""
    told: list[tuple[int, str]] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(
        torch,
        "set_num_threads",
        lambda number: told.append((number, threading.current_thread().name)),
    )
    assert Prefetch(lambda step: step).get(7) == 7
    [(number, name)] = told
    assert number == 3 and name.startswith("batches")


def test_a_closed_one_has_no_thread_and_no_batches() -> None:
    prefetch = Prefetch(lambda step: torch.zeros(step))
    batches = weakref.ref(prefetch.get(1))
    prefetch.close()
    assert batches() is None
    with pytest.raises(RuntimeError):
        prefetch.begin(2)


def test_an_agreement_keeps_counts_and_sums_apart() -> None:
    agreed = agree(True, 0.25, [3, 2.0, 70], torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert (agreed.is_asked_to_stop, agreed.seconds) == (True, 0.25)
    assert agreed.counts == [3.0, 2.0, 70.0] and agreed.sums.tolist() == [0.1, 0.2]
    assert not agree(False, 0.0, [], torch.zeros(0)).is_asked_to_stop
