"""Arithmetic on latents, how far an instruction is from training, and the distance of low-rank
updates."""

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.inference.adapters import relative_distance
from ship_ds.inference.latents import (
    Surroundings,
    combine,
    interpolate,
    nearest_known,
    sample_prior,
)
from ship_ds.model.adapters.lora import LoraAdapter


def test_arithmetic_on_instructions(ship: Ship) -> None:
    first, second = ship.model.encode(["add 3", "remove every 5"])
    line = interpolate(first, second, 3)
    torch.testing.assert_close(line, torch.stack([first, (first + second) / 2, second]))
    torch.testing.assert_close(
        combine(ship.model, {"add 3": 1.0, "remove every 5": -0.5}), first - second / 2
    )


def test_prior_samples_are_standard_normal_and_repeat(ship: Ship) -> None:
    drawn = sample_prior(ship.model, 500, 1)
    assert drawn.shape == (500, ship.config.model.latent_size) and torch.equal(
        drawn, sample_prior(ship.model, 500, 1)
    )
    assert abs(float(drawn.mean())) < 0.02 and float(drawn.std()) == pytest.approx(1, abs=0.02)


def test_a_known_instruction_is_its_own_nearest(ship: Ship) -> None:
    found = nearest_known(ship.bank, ship.model.encode(["add 3"])[0], 3)
    assert found[0].instruction == "add 3" and found[0].distance < 1e-2
    assert [n.distance for n in found] == sorted(n.distance for n in found)


def test_the_known_are_familiar_and_a_latent_far_from_all_is_not(ship: Ship) -> None:
    around = Surroundings.of(ship.model, ship.bank)
    shares = [around.familiarity(ship.model, ship.bank, text) for text in ship.known]
    assert sum(found.is_far for found in shares) <= 2
    assert sorted(round(found.loneliness * len(shares)) for found in shares)[-1] >= len(shares) - 2
    far = around.familiarity(
        ship.model,
        ship.bank,
        "numbers numbers numbers after after list sort the front and then give",
    )
    assert far.loneliness == 1.0 and far.is_far


def test_weight_distance_is_that_of_the_whole_matrices() -> None:
    generator = torch.Generator().manual_seed(0)

    def lora(num_tasks: int, rank: int, scaling: float, paths: str) -> LoraAdapter:
        return LoraAdapter(
            {
                path: (
                    torch.randn(num_tasks, rank, 7, generator=generator),
                    torch.randn(num_tasks, 5, rank, generator=generator),
                )
                for path in paths
            },
            scaling,
        )

    made, aim = lora(3, 2, 0.5, "ab"), lora(1, 4, 2.0, "b")
    wholes = [made.factors[path][1] @ made.factors[path][0] * 0.5 for path in "ab"]
    target = aim.factors["b"][1] @ aim.factors["b"][0] * 2.0
    expected = (
        wholes[0].square().sum((1, 2)) + (wholes[1] - target).square().sum((1, 2))
    ) / target.square().sum()
    torch.testing.assert_close(relative_distance(made, aim), expected)
    assert float(relative_distance(aim, aim)) == pytest.approx(0, abs=1e-5)
