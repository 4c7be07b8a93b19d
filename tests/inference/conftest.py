"""A bundle whose adapters do something without any training: random heads, so each instruction has
behaviour of its own."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.bundle import frozen_bases, write_bundle
from ship_ds.config import load_config
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.prompt import describe_roles

KNOWN = [
    f"{start} {number}"
    for number in range(1, 7)
    for start in ("add", "remove every", "take the first", "remove element")
]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("random") / "bundle")


def random_bundle(folder: Path, spread: float = 0.05, max_new_tokens: int = 6) -> Path:
    """A bundle whose adapters differ the more, the larger the spread of the heads' weights is."""
    config = load_config(
        "quickstart-smoke",
        [f"evaluation.max_new_tokens={max_new_tokens}", "evaluation.max_instruction_tokens=8"],
    )
    torch.manual_seed(0)
    model = build_ship(config.model, LoadedWeights())
    with torch.no_grad():
        last = cast(torch.nn.Linear, model.encoder.head[-1])
        last.weight.mul_(20)  # or all instructions would have nearly one latent
        for head in cast(Any, model.hypernetwork).heads:
            head.to_b.weight.normal_(std=spread)
    state = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    write_bundle(
        folder,
        state,
        config,
        describe_roles(vars(model.collator.prompts)),
        frozen_bases(config),
        KNOWN,
        [],
    )
    return folder


@pytest.fixture(scope="session")
def ship(bundle: Path) -> Ship:
    return Ship.from_run(bundle)


@pytest.fixture(scope="session")
def inputs() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [
        " ".join(map(str, torch.randint(0, 10, (5,), generator=generator).tolist()))
        for _ in range(12)
    ]
