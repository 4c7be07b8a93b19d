"""Ranks that share a model's weights take its passes in turn: two threads stand for two ranks, and
every module's call for the gather that ZeRO-3 hangs on it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from ship_ds.api import Ship
from ship_ds.config import FlowPriorConfig, MixturePriorConfig
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import answer_latents, answer_stated
from ship_ds.inference.induction import induce_many
from ship_ds.inference.scoring import losses_of_texts
from ship_ds.kinds import PRIORS
from ship_ds.model.drawing import keyed_generator
from ship_ds.model.turns import in_turn
from tests.export.models import make_ship
from tests.inference.test_induction import QUICK, behaviour

pytestmark = pytest.mark.slow


class TwoRanks:
    """Sums over two threads."""

    def __init__(self) -> None:
        self.barrier, self.given = Barrier(2, timeout=60), [torch.zeros(0), torch.zeros(0)]

    def sum_of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add(values: Tensor) -> Tensor:
            self.given[rank] = values
            self.barrier.wait()
            total = self.given[0] + self.given[1]
            self.barrier.wait()
            return total

        return add


def calls_of(ship: Ship) -> list[str]:
    """Names of the modules with weights of their own that will be called, in order: for each of
    them ZeRO-3 gathers, and the others hold nothing."""
    names: list[str] = []
    for part in ("encoder", "prior", "hypernetwork", "task_llm", "decoder"):
        for name, module in getattr(ship.model, part).named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(
                    lambda *_, name=f"{part} {name}": names.append(name)
                )
    return names


def deduces(ship: Ship) -> Any:
    texts = ["add 3", "remove every 5", "take the first 2"]
    latent_TZ = ship.model.encode(texts)
    inputs = [["1 2 3", "9"], ["5 5 1"], ["7 8", "2 2 2 2"]]
    return answer_latents(ship.model, latent_TZ, texts, inputs, 6)


def reconstructs(ship: Ship) -> Any:
    return ship.model.decode(ship.model.encode(["add 3", "take the first 2"]), 8)


def states(ship: Ship) -> Any:
    return answer_stated(ship.model, ["add 3"], [["1 2"]], 3)


def scores_texts(ship: Ship) -> Any:
    texts = ["add 3", "take the first 2", "remove every 5"]
    return losses_of_texts(ship.model, ship.model.encode(texts), texts)


def induces(ship: Ship) -> Any:
    bank = InductionConfig.model_validate({**QUICK, "method": "bank", "tries_all_known": True})
    task = behaviour(ship, "add 3", ["1 2", "3", "4 5 6", "7 7", "8 1", "9 9 9"], 2)
    return induce_many(ship.model, ship.bank, [task], bank)


def draws(ship: Ship) -> Any:
    prior = ship.model.prior
    drawn = [prior.sample(2, keyed_generator(str(index))) for index in range(3)]
    return [*(one.tolist() for one in drawn), prior.mean(1).tolist(), reconstructs(ship)]


def take_turns(ships: Sequence[Ship], works: Sequence[Callable[[Ship], Any]]) -> list[str]:
    """The calls of a rank's modules: each of two ranks gets of its work what it gets alone, by the
    same ones."""
    alone = [work(ship) for work, ship in zip(works, ships, strict=True)]
    ranks, calls = TwoRanks(), [calls_of(ship) for ship in ships]

    def run(rank: int) -> Any:
        # Gradients are off in the main thread's tests alone.
        with torch.no_grad(), in_turn(ships[rank].model, ranks.sum_of(rank)):
            return works[rank](ships[rank])

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, (0, 1))) == alone
    assert calls[0] == calls[1]
    for ship in ships:
        assert ship.model.task_llm.before_pass is None and ship.model.prior.before_pass is None
    return calls[0]


@pytest.mark.parametrize(
    "works", [(deduces, reconstructs), (induces, states), (deduces, scores_texts)]
)
def test_ranks_with_other_work_make_the_same_passes(bundle: Path, works: Any) -> None:
    assert len(take_turns([Ship.from_run(bundle), Ship.from_run(bundle)], works)) > 100


@pytest.mark.parametrize(
    "hypernetwork",
    [
        {"kind": "layer_prompt", "length": 2},
        {"kind": "combination", "parts": [{"kind": "lora", "rank": 2}, {"kind": "block_fusion"}]},
    ],
    ids=["layer_prompt", "block_fusion"],
)
def test_keys_by_the_bases_projections_wait_for_their_turn(hypernetwork: dict[str, Any]) -> None:
    """One rank deduces, the other states the instruction and makes none."""
    ships = [make_ship("embedded", **hypernetwork) for _ in range(2)]
    assert len(take_turns(ships, (deduces, states))) > 100


@pytest.mark.parametrize("config", [MixturePriorConfig(num_components=2), FlowPriorConfig()])
def test_a_prior_with_weights_waits_for_its_turn(bundle: Path, config: Any) -> None:
    """One rank draws, the other reconstructs."""
    ships = [Ship.from_run(bundle), Ship.from_run(bundle)]
    for ship in ships:
        torch.manual_seed(0)
        ship.model.prior = PRIORS.implementation(config)(config, ship.model.config.latent_size)
    calls = take_turns(ships, (draws, reconstructs))
    assert sum(name.startswith("prior") for name in calls) >= 4 * 3


def test_a_rank_that_fails_leaves_no_other_waiting(bundle: Path) -> None:
    ranks, ships = TwoRanks(), [Ship.from_run(bundle), Ship.from_run(bundle)]

    def fails(ship: Ship) -> Any:
        ship.model.encode(["add 3"])
        raise torch.OutOfMemoryError("no room")

    def run(rank: int) -> Any:
        with torch.no_grad(), in_turn(ships[rank].model, ranks.sum_of(rank)):
            return (fails, deduces)[rank](ships[rank])

    with ThreadPoolExecutor(2) as threads:
        failed, done = (threads.submit(run, rank) for rank in (0, 1))
        assert done.result() == deduces(Ship.from_run(bundle))
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            failed.result()
