"""Losses, likelihoods and answers of the frozen base."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ship_ds.api import Ship
from ship_ds.config import LoraHypernetworkConfig, SoftPromptHypernetworkConfig, load_config
from ship_ds.data.task import Splits
from ship_ds.evaluation.baselines.frozen_base import FrozenBase, named_as_before
from ship_ds.evaluation.baselines.static_adapters import TaskLoras
from ship_ds.model.assemble import LoadedWeights, build_ship
from tests.export.models import make_base, make_ship


def awake_lora(base: FrozenBase, num_tasks: int) -> TaskLoras:
    """Every task's B different from zero and from the others'."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        lora = TaskLoras(base.sites, base.lora, num_tasks)
        for b_TOR in lora.b:
            b_TOR.normal_(std=0.05)
    return lora.requires_grad_(False)


def test_log_likelihood_is_that_of_a_chain_of_single_tokens(ship: Ship) -> None:
    base = FrozenBase.of_run(ship)
    adapter = awake_lora(base, 1)()
    prompts, targets = [base.prompts.task_prompt(x) for x in ("3 9 5", "1 2")], ["9 5", "1 2 3"]
    found = base.log_likelihoods(adapter, prompts, targets)
    for prompt, target, value in zip(prompts, targets, found.tolist(), strict=True):
        expected = 0.0
        ids = list(prompt)
        for token in base.prompts.target(target):
            logits = base.task_llm.lm(input_ids=torch.tensor([ids]), ship_adapter=adapter).logits[
                0, -1
            ]
            expected += float(logits.log_softmax(-1)[token])
            ids.append(token)
        assert value == pytest.approx(expected, abs=1e-3)


def test_answers_of_uneven_tasks_are_those_of_each_task_alone(
    ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = FrozenBase.of_run(ship)
    lora = awake_lora(base, 3)()
    rows = [["3 9 5", "8"], ["1 2", "4 4 8", "7"], ["6 0", "2 2"]]
    questions = [[base.prompts.task_prompt(x, "reverse the list") for x in row] for row in rows]

    batches: list[list[int]] = []

    def adapter_of(tasks: Sequence[int]) -> Any:
        batches.append(list(tasks))
        return lora.rows(torch.tensor(tasks))

    together = base.answer(questions, adapter_of)
    assert batches == [[0, 2], [1]], "tasks with equally many questions share a batch"
    monkeypatch.setattr("ship_ds.model.budget.bytes_free", lambda device: 1)
    assert together == base.answer(questions, adapter_of)
    assert batches[2:] == [[0], [0], [2], [2], [1], [1], [1]]
    assert [len(row) for row in together] == [2, 3, 2] and any(
        text for row in together for text in row
    )


def test_task_loss_has_the_gradient_of_the_task_alone(
    ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever pieces the memory cuts a step into."""
    base = FrozenBase.of_run(ship)
    rows = [task.train[:2] for task in splits.seen[:3]]

    def gradients(tasks: list[int]) -> Callable[[int], list[torch.Tensor]]:
        lora = awake_lora(base, 3)
        own = TaskLoras(base.sites, base.lora, len(tasks))
        own.load_state_dict({name: weight[tasks] for name, weight in lora.state_dict().items()})
        pieces = base.losses_per_task(
            lambda some: own().rows(torch.tensor(some)),
            [[base.prompts.task_prompt(e.input) for e in rows[t]] for t in tasks],
            [[e.target for e in rows[t]] for t in tasks],
        )
        for piece in pieces:
            piece.backward()
        return lambda row: [weight.grad[row] for weight in own.parameters()]  # type: ignore[index]

    alone = gradients([1])(0)
    for room in (1 << 30, 1):
        monkeypatch.setattr("ship_ds.model.budget.bytes_free", lambda device, room=room: room)
        for mine, own in zip(gradients([0, 1, 2])(1), alone, strict=True):
            torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-5)


def test_pieces_add_up_to_the_mean_over_all_targets(
    ship: Ship, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = FrozenBase.of_run(ship)
    rows = [task.train[: 1 + t] for t, task in enumerate(splits.seen[:3])]
    asked = [[base.prompts.task_prompt(e.input) for e in row] for row in rows]
    targets = [[e.target for e in row] for row in rows]
    adapter = awake_lora(base, 1)()
    flat = [ids for row in asked for ids in row], [text for row in targets for text in row]
    total = -float(base.log_likelihoods(adapter, *flat).sum())
    num_labels = sum(len(base.prompts.target(text)) for text in flat[1])
    for room, num_pieces in ((1 << 30, 3), (1, 6)):
        monkeypatch.setattr("ship_ds.model.budget.bytes_free", lambda device, room=room: room)
        pieces = list(base.losses(adapter, asked, targets))
        assert len(pieces) == num_pieces
        assert float(sum(pieces)) == pytest.approx(total / num_labels, rel=1e-4)


def test_run_without_lora_gets_a_base_with_lora_sites(ship: Ship) -> None:
    hypernetwork = SoftPromptHypernetworkConfig(num_virtual_tokens=2, width=8)
    config = ship.config.model_copy(
        update={"model": ship.config.model.model_copy(update={"hypernetwork": hypernetwork})}
    )
    soft = Ship(
        build_ship(config.model, LoadedWeights(device=torch.device("cpu"))).eval(),
        config,
        "untrained",
    )
    base = FrozenBase.of_run(soft)
    assert len(base.sites) == 7 * 4 and base.task_llm is not soft.model.task_llm
    question = base.prompts.task_prompt("3 9 5", "reverse the list")
    bare = TaskLoras(base.sites, base.lora)()
    assert base.answer([[question]], lambda _: bare)[0] == soft.model.answer(
        None, ["3 9 5"], soft.config.evaluation.max_new_tokens, ["reverse the list"]
    )
    assert base.fingerprint() != FrozenBase.of_run(ship).fingerprint()


def test_baselines_of_earlier_versions_are_found_again() -> None:
    """Their LoRA was named without what came later, which is named only where it is set."""
    lora = LoraHypernetworkConfig(rank=4, targets=("q_proj",))
    assert named_as_before(lora) == (
        "LoraHypernetworkConfig(kind='lora', rank=4, alpha=16, targets=('q_proj',), width=128, "
        "heads='per_module')"
    )
    other = lora.model_copy(update={"normalises_latent": True})
    assert named_as_before(other).endswith("heads='per_module', normalises_latent=True)")


def test_a_run_by_layer_gives_baselines_a_lora_over_all_of_z() -> None:
    """Whose hypernetworks read no z that could be cut into shares."""
    config = load_config("quickstart-smoke", ["model.hypernetwork={kind: lora, latent: by_layer}"])
    ship = Ship(build_ship(config.model, LoadedWeights()), config, "0" * 64)
    assert FrozenBase.of_run(ship).lora.latent == "whole"


@pytest.mark.parametrize(
    ("other", "is_own"), [({"kind": "block_fusion"}, True), ({"kind": "bottleneck"}, False)]
)
def test_a_run_whose_linears_are_the_loras_lends_its_own_task_llm(
    other: dict[str, object], is_own: bool, tmp_path: Path
) -> None:
    """Where another part changes linears, too, a copy without that one's; the LoRA is the run's."""
    lora = {"kind": "lora", "rank": 3, "width": 8, "targets": ["q_proj"]}
    ship = make_ship(make_base(tmp_path / "base"), kind="combination", parts=[lora, other])
    base = FrozenBase.of_run(ship)
    assert (base.task_llm is ship.model.task_llm) == is_own
    assert {path.rpartition(".")[2] for path in base.sites} == {"q_proj"} and base.lora.rank == 3
