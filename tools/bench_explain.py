r"""What `ship-ds explain` says of adapters that gradient descent made, beside controls.

    python -m tools.bench_explain --run runs/quickstart --out tools/results/explain.json

Adapters of seen and unseen tasks, each trained on the task's own training examples: LoRAs of the
harness (evaluation/baselines/oracles.py), of the run's own modules and rank, around its 4-bit base;
and LoRAs by `peft` around the base as it lies in its folder, with rank, alpha, scaling and modules
drawn at random, saved and read back. Controls: random adapters whose update of every module has the
norm of the trained one's; and the text of another task's adapter.

A text's execution is the share of right answers to the task's test examples, with the text in the
prompt or through encoder and hypernetwork, the better of both; the adapter's own is its share.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ship_ds.api import Ship
from ship_ds.config import base_folder
from ship_ds.console import log
from ship_ds.data.task import SplitTask, spread
from ship_ds.evaluation.baselines.frozen_base import FrozenBase
from ship_ds.evaluation.baselines.oracles import OracleRecipe, draw, train_group
from ship_ds.evaluation.baselines.static_adapters import TaskLoras
from ship_ds.evaluation.harness import Run
from ship_ds.files import write_json
from ship_ds.inference.adapter_reading import read_adapter
from ship_ds.inference.config import InductionConfig
from ship_ds.inference.deduction import answer_latents, answer_stated, answer_under
from ship_ds.inference.explaining import explain_many, noise_like
from ship_ds.inference.results import Explanation
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.monitor.machine import describe_machine, versions

RECIPE = OracleRecipe(steps=80)
EXAMPLES, PEFT_LR = 16, 1e-2
ENOUGH = 0.9
"""Of the adapter's own execution, that a text which names the task has."""


def trained_by_harness(ship: Ship, tasks: Sequence[SplitTask], seed: int) -> list[LoraAdapter]:
    """A LoRA for each task, all in one batch."""
    base = FrozenBase.of_run(ship)
    torch.manual_seed(seed)
    first = TaskLoras(base.sites, base.lora)
    examples = {task.id: task.train for task in tasks}
    group = train_group(base, first, examples, RECIPE, EXAMPLES, seed, "LoRAs by gradient")
    return [group.rows(torch.tensor([row])) for row in range(len(tasks))]


def trained_by_peft(ship: Ship, task: SplitTask, folder: Path, seed: int) -> dict[str, Any]:
    """A LoRA that `peft` made, trained and saved; returns what was drawn."""
    from peft import LoraConfig, get_peft_model

    rng = random.Random(f"{seed} {task.id}")
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in ship.model.task_llm.sites()))
    drawn: dict[str, Any] = {
        "r": rng.choice([2, 4, 8, 16]),
        "lora_alpha": rng.choice([8, 16, 32]),
        "use_rslora": rng.random() < 0.5,
        "target_modules": sorted(rng.sample(names, rng.randint(2, len(names)))),
    }
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_folder(ship.config.model.task_llm.base))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **drawn))
    trained = [one for one in model.parameters() if one.requires_grad]
    optimiser, form = torch.optim.AdamW(trained, lr=PEFT_LR), ship.model.prompts
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEFT_LR, total_steps=RECIPE.steps)
    for step in range(RECIPE.steps):
        rows = draw(task.train, EXAMPLES, f"{seed} peft {step} {task.id}")
        loss = _loss(model, form, rows)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
    model.save_pretrained(str(folder))
    return drawn | {"last_loss": round(float(loss), 4)}


def _loss(model: Any, form: Any, rows: Sequence[Any]) -> Tensor:
    """Cross-entropy of the targets, by transformers' own labels."""
    prompts = [form.task_prompt(row.input) for row in rows]
    targets = [form.target(row.target) for row in rows]
    longest = max(len(a) + len(b) for a, b in zip(prompts, targets, strict=True))
    ids = torch.full((len(rows), longest), form.pad_id)
    labels, real = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        whole = [*prompt, *target]
        ids[row, : len(whole)] = torch.tensor(whole)
        labels[row, len(prompt) : len(whole)] = torch.tensor(list(target))
        real[row, : len(whole)] = 1
    loss: Tensor = model(input_ids=ids, attention_mask=real, labels=labels).loss
    return loss


def explained(ship: Ship, adapters: Sequence[Adapter]) -> list[Explanation]:
    """As `Ship.explain`, of many at once."""
    inputs = ship.inputs_to_try()
    length = ship.config.evaluation.max_new_tokens
    search = InductionConfig(max_new_tokens=ship.config.evaluation.max_instruction_tokens)
    return explain_many(
        ship.model,
        ship.bank,
        adapters,
        [inputs] * len(adapters),
        ship.searching(search, log),
        length,
        ship.explaining_threshold(log).value,
        ship.lora_reader(log),
        log=log,
    )


def executions(
    ship: Ship, tasks: Sequence[SplitTask], texts: Sequence[str | None]
) -> list[dict[str, float]]:
    """Share of right answers of each text to its task's test examples, both ways; 0 of none."""
    length, model = ship.config.evaluation.max_new_tokens, ship.model
    said = [text or "" for text in texts]
    inputs = [[example.input for example in task.test] for task in tasks]
    stated = answer_stated(model, said, inputs, length)
    through = answer_latents(model, model.encode(said), said, inputs, length)
    return [
        {
            "in_prompt": _right(in_prompt, task) if text else 0.0,
            "through_encoder": _right(by_adapter, task) if text else 0.0,
        }
        for text, task, in_prompt, by_adapter in zip(texts, tasks, stated, through, strict=True)
    ]


def _right(answers: Sequence[str | None], task: SplitTask) -> float:
    pairs = zip(answers, task.test, strict=True)
    return fmean(float(answer in example.answers) for answer, example in pairs)


def measured(
    ship: Ship, sort: str, tasks: Sequence[SplitTask], adapters: Sequence[Adapter]
) -> list[dict[str, Any]]:
    """One row an adapter."""
    length = ship.config.evaluation.max_new_tokens
    found = explained(ship, adapters)
    named = [one.instruction for one in found]
    # The next task's text: a control that knows what the run can say, and not of which adapter.
    others = executions(ship, tasks, [*named[1:], *named[:1]])
    own_text = executions(ship, tasks, [task.task.instruction for task in tasks])
    rows = []
    for task, adapter, one, text, other, reference in zip(
        tasks, adapters, found, executions(ship, tasks, named), others, own_text, strict=True
    ):
        inputs = [example.input for example in task.test]
        own = _right(answer_under(ship.model, adapter, "", inputs, length), task)
        best, swapped = max(text.values()), max(other.values())
        rows.append(
            {
                "sort": sort,
                "task": task.task.instruction,
                "said": one.instruction,
                "best": one.candidates[0].instruction if one.candidates else None,
                "sources": list(one.candidates[0].sources) if one.candidates else [],
                "agreement": round(one.agreement, 4),
                "own": own,
                "text": text,
                "own_instruction": reference,
                "enough": one.instruction is not None and own > 0 and best >= ENOUGH * own,
                "enough_in_prompt": text["in_prompt"] >= ENOUGH * own > 0,
                "shuffled_enough": own > 0 and swapped >= ENOUGH * own,
            }
        )
        log(f"{sort}: {task.task.instruction!r} -> {one.instruction!r}, {one.agreement:.2f}")
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By sort: how many, and the shares that the targets are about."""
    found = {}
    for sort in dict.fromkeys(row["sort"] for row in rows):
        of_sort = [row for row in rows if row["sort"] == sort]
        found[sort] = {
            "count": len(of_sort),
            "none": fmean(row["said"] is None for row in of_sort),
            "exact": fmean(row["said"] == row["task"] for row in of_sort),
            "own": fmean(row["own"] for row in of_sort),
            "text": fmean(max(row["text"].values()) for row in of_sort),
            "enough": fmean(row["enough"] for row in of_sort),
            "enough_in_prompt": fmean(row["enough_in_prompt"] for row in of_sort),
            "shuffled_enough": fmean(row["shuffled_enough"] for row in of_sort),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-unseen", type=int, default=20)
    parser.add_argument("--num-seen", type=int, default=6)
    parser.add_argument("--num-peft", type=int, default=10, help="of the unseen tasks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run = Run.open(options.run, log)
    ship = run.ship
    ship.explaining_threshold(log)
    unseen = spread([task for task in run.splits.unseen if task.test], options.num_unseen)
    seen = spread([task for task in run.splits.seen if task.test], options.num_seen)
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []

    def write(seconds: float) -> None:
        write_json(
            options.out,
            {
                "command": f"python -m tools.bench_explain --run runs/quickstart --num-unseen "
                f"{options.num_unseen} --num-seen {options.num_seen} --num-peft "
                f"{options.num_peft} --seed {options.seed}",
                "machine": describe_machine(),
                "versions": versions(),
                "examples_answered_in_training": run.num_answered,
                "threshold": vars(ship.explaining_threshold(log)),
                "seconds": round(seconds, 1),
                "summary": summary(rows),
                "rows": rows,
            },
            indent=1,
        )

    loras = trained_by_harness(ship, unseen, options.seed)
    rows += measured(ship, "harness, unseen", unseen, loras)
    write(time.perf_counter() - started)
    noise = [noise_like(one, task.id) for one, task in zip(loras, unseen, strict=True)]
    rows += measured(ship, "noise", unseen, noise)
    write(time.perf_counter() - started)
    chosen = spread(unseen, options.num_peft)
    with tempfile.TemporaryDirectory() as place:
        adapters, drawn = [], []
        for number, task in enumerate(chosen):
            folder = Path(place) / str(number)
            drawn.append(trained_by_peft(ship, task, folder, options.seed + number))
            adapters.append(read_adapter(ship.model, folder))
    by_peft = measured(ship, "peft, unseen", chosen, adapters)
    rows += [row | {"peft": one} for row, one in zip(by_peft, drawn, strict=True)]
    write(time.perf_counter() - started)
    if seen:
        rows += measured(ship, "harness, seen", seen, trained_by_harness(ship, seen, options.seed))
        write(time.perf_counter() - started)


if __name__ == "__main__":
    main()
