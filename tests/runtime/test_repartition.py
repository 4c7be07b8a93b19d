"""Which shards an engine may take as they are, and how its Adam counts; real ranks are in
test_two_ranks.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ship_ds.errors import UserError
from ship_ds.runtime import checkpoint, repartition
from ship_ds.runtime.repartition import ShardOfRank, WholeParameters

SHAPES = {"first": (2, 3), "second": (3, 2)}


def write_shards(folder: Path, step: Any) -> None:
    """Of one rank under ZeRO-3, as DeepSpeed's: one sub-group of two matrices with as many
    elements."""
    folder.mkdir()
    state = {"step": step, "exp_avg": torch.full((12,), 0.5), "exp_avg_sq": torch.full((12,), 0.25)}
    inner = {"state": {0: state}, "param_groups": [{"params": [0]}]}
    optimiser = {
        "zero_stage": 3,
        "fp32_flat_groups": [torch.arange(12.0)],
        "optimizer_state_dict": inner,
    }
    torch.save(
        {"optimizer_state_dict": optimiser}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    shapes = [{name: torch.Size(shape) for name, shape in SHAPES.items()}]
    torch.save({"param_shapes": shapes}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def parameters(**shapes: tuple[int, ...]) -> dict[str, Any]:
    made = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    for name, parameter in made.items():
        parameter.ds_shape = torch.Size(shapes[name])  # type: ignore[attr-defined]
    return made


def test_a_shard_is_taken_as_it_is_only_in_the_engines_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parameters that change places leave every length as it was."""
    monkeypatch.setattr(repartition, "read", lambda folder: None)
    write_shards(tmp_path / "state", torch.tensor(2.0))
    own = parameters(**SHAPES)
    found = {}
    for order in (("first", "second"), ("second", "first")):
        optimiser = SimpleNamespace(fp16_groups=[[own[name] for name in order]])
        found[order[0]] = repartition.source(optimiser, own, tmp_path / "state")
    assert isinstance(found["first"], ShardOfRank) and isinstance(found["second"], WholeParameters)
    flat = torch.zeros(12)
    found["first"].fill(repartition.FP32_WEIGHTS, 0, [], flat)
    assert flat.tolist() == list(range(12)) and found["first"].num_steps == 2


@pytest.mark.parametrize("step", [torch.tensor(2.0), 2], ids=["torch's", "DeepSpeed's for the CPU"])
def test_steps_are_counted_as_the_engines_adam_counts_them(tmp_path: Path, step: Any) -> None:
    """Whoever wrote the checkpoint: fused AdamW takes no number, DeepSpeed's own Adam wants one."""
    write_shards(tmp_path / "state", step)
    own = parameters(**SHAPES)
    found = repartition.source(
        SimpleNamespace(fp16_groups=[list(own.values())]), own, tmp_path / "state"
    )
    flat = nn.Parameter(torch.zeros(12))
    adam = torch.optim.AdamW([flat], fused=True)
    adam.state[flat] = repartition._adam_state(
        SimpleNamespace(optimizer=adam), found.num_steps, flat
    )
    flat.grad = torch.ones(12)
    adam.step()
    assert float(adam.state[flat]["step"]) == 3
    others = repartition._adam_state(SimpleNamespace(optimizer=object()), found.num_steps, flat)
    assert type(others["step"]) is int and others["step"] == 2


def test_a_parameter_of_another_shape_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path / checkpoint.STATE, 1)
    same, others = parameters(**SHAPES), parameters(first=(2, 3), second=(2, 3))
    with pytest.raises(
        UserError, match="second and 0 more trainable parameters differ from this model's"
    ):
        checkpoint._check_same_parameters(others, tmp_path)
    checkpoint._check_same_parameters(same, tmp_path)
