"""Trains the recorded cases one after the other in one process and writes their losses as JSON.

    python -m tests.recorded_run FOLDER 40 one/lora/none one/reshape/hard
    torchrun --nproc-per-node 2 -m tests.recorded_run FOLDER 40 zero2/lora/none

A case is RANKS/ADAPTER/INSTRUCTION: `quickstart-smoke` for 40 steps without evaluations, started by
the entry point that a user starts; a smaller number takes the first steps of these alone.
FOLDER/losses.json then holds, by case, each row of `metrics.jsonl` that `SERIES` names, and
FOLDER/computer.json what the numbers depend on.

`tests/fixtures/recorded_losses.json` was written by version 0.1.0 with these very settings;
`tests/fixtures/recorded_bits.json` is this version's, of the cases that `make test` trains, and is
written anew where a change means to round otherwise: `computer` and `losses` of such folders.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ship_ds import train
from ship_ds.config import load_config
from ship_ds.runtime import ranks
from tests.conftest import REPOSITORY

SERIES = {
    "loss": "loss/total",
    "task": "loss/task",
    "reconstruction": "loss/reconstruction",
    "kl": "loss/kl",
    "norm": "optimiser/gradient_norm",
}
NUM_STEPS = 40
NUM_FIRST_STEPS = 12
"""That `make test` takes; `make soak` takes all."""
ONE_RANK = "one"
"""The other values of RANKS name the file of ds_configs/ that two ranks train with."""
TWO_RANKS = "zero3/lora/soft"
"""The case of two ranks that `make test` trains (runtime/test_two_ranks.py)."""
_LIBRARIES = ("torch", "deepspeed", "bitsandbytes", "transformers", "peft")
_COMPUTES_WITH = ("avx", "fma", "amx", "f16c")
"""Processor flags by which torch, oneDNN and MKL choose their kernels begin with these."""


def settings(case: str, folder: Path) -> list[str]:
    """The overrides of a case on top of quickstart-smoke."""
    launched, adapter, instruction = case.split("/")
    tiny_lm = json.loads((REPOSITORY / "ship_ds/assets/tiny_lm/config.json").read_text())
    adapters = {
        "lora": [],
        "soft_prompt": ["model.hypernetwork={kind: soft_prompt}"],
        "reshape": [
            "model.hypernetwork={kind: reshape, num_virtual_tokens: 2}",
            f"model.latent_size={2 * tiny_lm['hidden_size']}",
        ],
    }
    return [
        f"run.folder={folder}",
        f"training.steps={NUM_STEPS}",
        f"training.deepspeed={'zero2' if launched == ONE_RANK else launched}",
        "evaluation.every_steps=0",
        "evaluation.ends_with_report=false",
        "checkpoint.every_steps=0",
        f"model.task_llm.instruction={instruction}",
        *adapters[adapter],
    ]


def computer() -> dict[str, Any]:
    """What decides the last bit of a sum in fp32: the processor's kind, threads and libraries."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "vendor": next((x.split(":")[1].strip() for x in lines if x.startswith("vendor_id")), ""),
        "flags": " ".join(sorted(flag for flag in flags if flag.startswith(_COMPUTES_WITH))),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def train_case(case: str, folder: Path, num_steps: int) -> dict[str, list[float]]:
    """Train, and read the losses of the first so many steps.

    Returns:
        For each of `SERIES` that many numbers, in full precision.
    """
    arguments = settings(case, folder)
    if num_steps == NUM_STEPS:
        code = train.main(["--config", "quickstart-smoke", *arguments])
        assert code == 0, f"{case}: the run ended with code {code}"
    else:
        trainer = train.Trainer(load_config("quickstart-smoke", arguments))
        for _ in range(num_steps):
            trainer.take_step()
        ranks.barrier()  # rank 0 has written its rows
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == num_steps, f"{case}: {len(rows)} steps"
    return {series: [row[name] for row in rows] for series, name in SERIES.items()}


def main(folder: Path, num_steps: int, cases: list[str]) -> None:
    """Train every case and keep what it measured."""
    losses = {case: train_case(case, folder / case.replace("/", "-"), num_steps) for case in cases}
    if ranks.rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
        (folder / "computer.json").write_text(json.dumps(computer()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    ranks.exit_process(0)
