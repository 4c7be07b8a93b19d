"""Where an instruction lies among the known ones."""

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.errors import UserError
from ship_ds.inference import latents
from ship_ds.inference.bank import Bank
from ship_ds.inference.latents import Surroundings, nearest_known


def test_a_known_instruction_is_its_own_nearest(ship: Ship) -> None:
    nearest = nearest_known(ship.bank, ship.model.encode(["add 3"])[0], 3)
    assert nearest[0].instruction == "add 3" and nearest[0].distance < 1e-2
    assert [n.distance for n in nearest] == sorted(n.distance for n in nearest)


def test_the_known_are_familiar_and_a_latent_far_from_all_is_not(ship: Ship) -> None:
    surroundings = Surroundings.of(ship.bank)
    shares = surroundings.familiarities(ship.model, ship.bank, ship.known)
    assert len(shares) == len(ship.known) and ship.familiarities(ship.known) == shares
    assert sum(one.is_far for one in shares) <= 2
    assert sorted(round(one.isolation * len(shares)) for one in shares)[-1] >= len(shares) - 2
    text = "numbers numbers numbers after after list sort the front and then give"
    [far] = surroundings.familiarities(ship.model, ship.bank, [text])
    assert far.isolation == 1.0 and far.is_far


def test_many_are_encoded_some_at_a_time_and_looked_at_before(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which they came; and what cannot be read is said of any of them."""
    at_once = [one.isolation for one in ship.familiarities(ship.known)]
    monkeypatch.setattr(latents, "_NUM_ENCODED", 3)
    some_at_a_time = [one.isolation for one in ship.familiarities(ship.known)]
    # Texts of a batch round otherwise than alone, and latents as near as these are then change
    # places: 2 of 961 in a trained run.
    assert len(ship.known) > 3 and max(at_once) - min(at_once) > 0.5
    assert some_at_a_time == pytest.approx(at_once, abs=0.25)
    with pytest.raises(UserError, match="'quux' is not in the base model's vocabulary"):
        ship.familiarities([ship.known[0], "quux"])


def test_of_very_many_known_ones_some_are_compared_with_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    latent_CZ = torch.tensor([[0.0], [1.0], [1.5], [4.0], [4.25], [9.0]])
    bank = Bank(tuple("abcdef"), latent_CZ, torch.zeros(6, 1))
    assert Surroundings.of(bank).distance_C.tolist() == [0.25, 0.25, 0.5, 0.5, 1.0, 4.75]
    monkeypatch.setattr(latents, "_NUM_COMPARED", 3)
    # The first, third and fifth.
    assert Surroundings.of(bank).distance_C.tolist() == [0.25, 0.5, 1.0]
