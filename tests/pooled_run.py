"""Trains four steps as HINT does, as a user's command does, with every weight sharded, and writes
what the trained model encodes: an NF4 encoder that reads examples too, a learned query for each
share of z, bottlenecks (of learned factors with a core between them) and prefixes made of them, the
encoder's states fused, no decoder; what stands between the matrix products compiled.

    python -m tests.pooled_run FOLDER [AGAIN]

FOLDER is the run's, which goes on where there are checkpoints; AGAIN is made of what a crash would
have left of it, and goes on from there in the same process.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ship_ds.config import Config, load_config
from ship_ds.model.elementwise import EAGER, ElementwiseMode, compiled
from ship_ds.runtime import ranks
from ship_ds.train import Trainer
from tests.starts import crash

WORDINGS = ["reverse the list", "put 7 at the front", "keep the numbers greater than 4"]
LATENTS = "latents.json"
LOSSES = ("loss/total", "loss/task", "loss/reconstruction", "loss/kl", "optimiser/gradient_norm")


def config_of(folder: Path | str, elementwise: ElementwiseMode = "compiled") -> Config:
    """No dropout, so that two ranks take the steps of one."""
    tuning = "{kind: lora, rank: 4, dropout: 0}"
    pooling = "{kind: attention, num_queries: 4, shares: true}"
    prefix = "{kind: prefix, latent: by_layer, length: 3}"
    bottleneck = "{kind: bottleneck, latent: by_layer, heads: diagonal}"
    parts = f"[{bottleneck}, {prefix}, {{kind: fusion, width: 32}}]"
    return load_config(
        "quickstart-smoke",
        [
            f"run.folder={folder}",
            "training.steps=4",
            "training.deepspeed=zero3_shard_all",  # no parameter is too small to be sharded
            "optimiser.warmup_steps=0",
            "loss.reconstruction=0",
            f"model.elementwise={elementwise}",
            "evaluation.every_steps=0",
            "evaluation.ends_with_report=false",
            "checkpoint.every_steps=2",
            f"model.encoder={{quantisation: nf4, tuning: {tuning}, checkpointing: true, "
            f"pooling: {pooling}, max_examples: 2, drop_instruction: 0.5, drop_targets: 0.3}}",
            f"model.hypernetwork={{kind: combination, parts: {parts}}}",
        ],
    )


def train(folder: Path, elementwise: ElementwiseMode = "compiled") -> None:
    trainer = Trainer(config_of(folder, elementwise))
    # A run that did not listen to model.elementwise would differ by nothing else.
    expected = compiled() if elementwise == "compiled" else EAGER
    kernels = [one.kernels for one in trainer.model.modules() if hasattr(one, "kernels")]
    assert kernels and all(one is expected for one in kernels)
    trainer.train()
    trainer.close()
    trainer.model.eval()
    latents = trainer.model.encode(WORDINGS).tolist()
    if ranks.rank() == 0:
        (folder / LATENTS).write_text(json.dumps(latents))


def losses(folder: Path) -> list[list[float]]:
    """What has to repeat of each step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    return [[row[name] for name in LOSSES] for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    folder, *others = map(Path, arguments or sys.argv[1:])
    train(folder)
    for again in others:
        # A test process that found the first try failed tries again.
        shutil.copytree(folder, again, dirs_exist_ok=True)
        crash(again)
        train(again)
    return 0


if __name__ == "__main__":
    ranks.run_program(main)
