"""Started once by torchrun with two ranks; runs every check that needs them and writes what it measured as JSON.

    torchrun --nproc-per-node 2 -m tests.runtime.worker FOLDER
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ship_ds.config import load_config
from ship_ds.model.ship import ShipBatch
from ship_ds.runtime import ranks
from ship_ds.train import Trainer

SHARDED = ["training.deepspeed=zero3_shard_all", "model.task_llm.shard=always"]


def trainer(folder: Path, *overrides: str) -> Trainer:
    return Trainer(load_config("quickstart-smoke", [f"run.folder={folder}", "evaluation.every_steps=0", *overrides]))


def each_rank_holds_half(folder: Path) -> dict[str, Any]:
    """Elements this rank holds at a step boundary beside the whole: trainable, optimiser state, 4-bit weights."""
    made = trainer(folder, *SHARDED)
    made.take_step()
    trainable = [p for p in made.model.parameters() if p.requires_grad]
    quantised = {n: p for n, p in made.model.named_parameters() if type(p).__name__ == "Params4bit"}
    states = made.engine.optimizer.optimizer.state.values()
    return {
        "trainable": [sum(p.ds_tensor.numel() for p in trainable), sum(p.ds_numel for p in trainable)],
        "optimiser": [sum(state["exp_avg"].numel() for state in states), sum(p.ds_numel for p in trainable)],
        "nf4": [sum(p.ds_tensor.numel() for p in quantised.values()), sum(p.ds_numel for p in quantised.values())],
        "still whole": [n for n, p in quantised.items() if p.numel()],
        "num_nf4": len(quantised),
    }


def base_is_untouched(folder: Path) -> dict[str, Any]:
    """Hashes of the gathered frozen parameters before and after ten steps with an evaluation between them."""
    made = trainer(folder, *SHARDED, "training.steps=10")

    def digest() -> str:
        found = hashlib.sha256()
        for name, parameter in made.model.named_parameters():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter]):
                    found.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    before = digest()
    for step in range(10):
        made.take_step()
        if step == 4:
            made.look()
    return {"before": before, "after": digest(), "steps": made.step}


def bad_step_is_skipped_everywhere(stage: str) -> Callable[[Path], dict[str, Any]]:
    def check(folder: Path) -> dict[str, Any]:
        """NaN noise on rank 1 alone, at step 2: nobody moves, and everyone goes on."""
        made = trainer(folder, f"training.deepspeed={stage}")
        collate = made.model.collate

        def poisoned(draws: Any, seed: int, step: int) -> ShipBatch:
            batch = collate(draws, seed, step)
            if step == 2 and ranks.rank() == 1:
                batch.noise_TZ.fill_(float("nan"))
            return batch

        made.model.collate = poisoned  # type: ignore[method-assign]
        moved, bad = [], []
        for _ in range(4):
            before = whole(made)
            made.take_step()
            moved.append(not torch.equal(before, whole(made)))
            bad.append(made.num_bad_steps)
        return {"moved": moved, "bad": bad, "finite": bool(whole(made).isfinite().all())}

    return check


def whole(made: Trainer) -> torch.Tensor:
    """One trainable matrix, gathered."""
    parameter = made.model.encoder.head[0].weight
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "each_rank_holds_half": each_rank_holds_half,
    "base_is_untouched": base_is_untouched,
    **{f"bad_step_{stage}": bad_step_is_skipped_everywhere(stage) for stage in ("zero1", "zero2", "zero3", "zero3_bf16")},
}


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    for name, check in CHECKS.items():
        found[name] = ranks.gather_objects(check(folder / name))
        if ranks.rank() == 0:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
