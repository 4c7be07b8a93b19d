"""The recipes for real models train two steps and report on random models of the same
architectures, 64 wide; every other setting as shipped."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ship_ds.model.loading import load_tokenizer
from tests.conftest import start

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 256, **SMALL},
    "qwen2": {"hidden_size": 64, "intermediate_size": 320, **SMALL},
}


def make_base(folder: Path, architecture: str) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer("embedded")
    settings = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), **ARCHITECTURES[architecture]
    )
    AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tasks(path: Path) -> None:
    """Forty tasks of fifteen examples: list rules that differ by a number."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(40):
            lists = [[draw.randrange(10) for _ in range(4)] for _ in range(15)]
            examples = [
                {
                    "input": " ".join(map(str, numbers)),
                    "target": " ".join(str(one + number % 7) for one in numbers),
                }
                for numbers in lists
            ]
            task = {"id": str(number), "instruction": f"add {number}", "examples": examples}
            file.write(json.dumps(task) + "\n")


@pytest.mark.soak
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recipe", ["lora-8b", "lora-8b-fused", "lora-8b-24gb", "lora-70b"])
def test_two_steps_of_a_recipe(recipe: str, architecture: str, tmp_path: Path) -> None:
    make_base(tmp_path / "base", architecture)
    make_tasks(tmp_path / "tasks.jsonl")
    run = tmp_path / "run"
    done = start(
        [
            *("-m", "ship_ds.train", "--config", recipe),
            f"run.folder={run}",
            f"model.task_llm.base={tmp_path / 'base'}",
            f"data.path={tmp_path / 'tasks.jsonl'}",
            *("training.epochs=null", "training.steps=2", "evaluation.every_steps=1"),
        ]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/total"] for row in rows if "loss/total" in row]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    assert "deduction" in json.loads((run / "report.json").read_text())
