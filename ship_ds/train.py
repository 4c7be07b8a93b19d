"""Train SHIP: build, loop, close.

    deepspeed --num_gpus 8 ship_ds/train.py --config RECIPE [section.key=value ...]
    torchrun --nproc-per-node 2 -m ship_ds.train --config quickstart
    python -m ship_ds.train --config quickstart-smoke          # one process

The same program runs the embedded default on two CPU cores and a 7B model on a cluster.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ship_ds.bundle import Ship, write_bundle
from ship_ds.config import Config, load_config
from ship_ds.data.rules import build_world
from ship_ds.data.sampler import StepSampler
from ship_ds.data.task import Splits
from ship_ds.errors import UserError
from ship_ds.evaluation import report as reports
from ship_ds.evaluation.deduction import deduction, reconstruction
from ship_ds.evaluation.metrics import score
from ship_ds.model.ship import ShipBatch, ShipModel
from ship_ds.monitor.writer import Monitor, Stopwatch
from ship_ds.runtime import engine as engines
from ship_ds.runtime import ranks

_ACTIVE_NATS = 0.01
"""A latent unit is active when its KL, averaged over a step's tasks, is above this (Burda et al. 2016, section 4.3)."""


class Trainer:
    """setup -> train -> close, the same on every rank; rank 0 alone writes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.run.folder)
        ranks.start(config.training.threads)
        self.parts = engines.parts_per_step(config.training)
        torch.manual_seed(config.run.seed)
        self.splits: Splits = build_world(config.data)
        model = ShipModel(config.model)
        self.engine = engines.build_engine(model, config.optimiser, config.training)
        self.model: ShipModel = self.engine.module
        self.sampler = StepSampler(
            self.splits.seen, config.run.seed, config.training.tasks_per_step, config.training.examples_per_task,
            config.model.decoder.max_examples, config.model.decoder.drop_latent,
        )
        self.watch = Stopwatch()
        self.num_bad_steps = 0
        self.monitor: Monitor | None = None
        if ranks.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
            self.monitor = Monitor(self.folder, config.training.steps, 0)

    def train(self) -> None:
        for step in range(self.config.training.steps):
            self.watch.start()
            batches = self.next_batches(step)
            sums, num_tokens = self.losses_and_gradients(batches)
            lr = engines.learning_rate(step, self.config.optimiser, self.config.training.steps)
            engines.set_learning_rate(self.engine, lr)
            self.engine.step()
            self.log(step, sums, lr, num_tokens)
            every = self.config.evaluation.every_steps
            if every and (step + 1) % every == 0:
                self.look(step + 1)
            if self.out_of_time():
                break

    def next_batches(self, step: int) -> list[ShipBatch]:
        """This rank's micro-batches of the global step."""
        accumulation = self.config.training.accumulation
        first = ranks.rank() * accumulation
        return [
            self.model.collate(self.sampler.draw_rank(step, first + part, self.parts), self.config.run.seed, step)
            for part in range(accumulation)
        ]

    def losses_and_gradients(self, batches: Sequence[ShipBatch]) -> tuple[dict[str, Any], int]:
        """Backward through the whole step; each loss is its sum over the count of the *whole* step, all ranks included."""
        counts = torch.tensor([
            [batch.answers.num_targets, batch.decoded.num_targets, len(batch.noise_TZ), batch.answers.num_tokens
             + batch.decoded.num_tokens + batch.instructions.num_tokens] for batch in batches
        ], dtype=torch.float64).sum(0)
        num_answer, num_text, num_tasks, num_tokens = ranks.sum_over_ranks(counts).tolist()
        weights = self.config.loss
        totals = torch.zeros(3, dtype=torch.float64)
        kl_Z = torch.zeros(self.config.model.latent_size)
        for index, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            sums = self.engine(batch)
            parts = (sums.task / num_answer, sums.reconstruction / num_text, sums.kl / num_tasks)
            loss = weights.task * parts[0] + weights.reconstruction * parts[1] + weights.kl * parts[2]
            # The engine averages over ranks and micro-batches; the counts above already did.
            self.engine.backward(loss * ranks.world_size() * len(batches))
            totals += torch.stack([part.detach().double().cpu() for part in parts])
            kl_Z += sums.kl_TZ.sum(0).cpu() / num_tasks
        task, text, kl = ranks.sum_over_ranks(totals).tolist()
        total = weights.task * task + weights.reconstruction * text + weights.kl * kl
        scalars = {"loss/total": total, "loss/task": task, "loss/reconstruction": text, "loss/kl": kl}
        self.check_finite(total)
        return {**scalars, "kl_Z": ranks.sum_over_ranks(kl_Z)}, int(num_tokens)

    def check_finite(self, loss: float) -> None:
        """Every rank has the same summed loss, so all of them stop together."""
        self.num_bad_steps = 0 if loss == loss and abs(loss) != float("inf") else self.num_bad_steps + 1
        if self.num_bad_steps >= self.config.training.max_bad_steps:
            raise UserError(
                f"training: the loss was not finite in {self.num_bad_steps} steps in a row; lower optimiser.lr or look at "
                "the data (training.max_bad_steps sets the number)"
            )

    def log(self, step: int, sums: dict[str, Any], lr: float, num_tokens: int) -> None:
        seconds = self.watch.stop(num_tokens)
        kl_Z = sums.pop("kl_Z")
        norm = self.engine.get_global_grad_norm()
        if self.monitor is None:
            return
        self.monitor.step(step, {
            **sums, "latent/active_units": float((kl_Z > _ACTIVE_NATS).sum()), "optimiser/lr": lr,
            "optimiser/gradient_norm": float(norm) if norm is not None else float("nan"),
            "speed/tokens_per_second": num_tokens / seconds, "speed/step_seconds": seconds,
        })
        if step % 100 == 0:
            self.monitor.kl_per_dimension(step, kl_Z)

    def look(self, step: int) -> None:
        """Deduction on a few seen and dev rules, and a few reconstructions; every rank takes part and calls as often."""
        config = self.config.evaluation
        self.model.eval()
        scalars = {}
        for part, tasks in (("seen", self.splits.seen), ("dev", self.splits.dev)):
            few = tasks[:: max(1, len(tasks) // config.num_tasks)][: config.num_tasks]
            rows = deduction(self.model, few, [t.task.instruction for t in few], config.examples_per_task, config.max_new_tokens)
            scalars[f"deduction/{part}"] = score(rows).value
        pairs: list[tuple[str, str]] = []
        reconstruction(self.model, self.splits.seen[:4] + self.splits.dev[:4], config.max_instruction_tokens,
                       lambda true, text: pairs.append((true, text)))
        self.model.train()
        if self.monitor is not None:
            self.monitor.evaluation(step, scalars)
            self.monitor.texts(step, pairs)

    def out_of_time(self) -> bool:
        limit = self.config.training.max_minutes
        mine = torch.tensor(float(limit is not None and self.watch.seconds > 60 * limit))
        return bool(ranks.sum_over_ranks(mine) > 0)

    def close(self) -> None:
        """Bundle, then the report from the bundle: what is measured is what a user opens."""
        state = engines.gathered_state(self.engine)
        if ranks.rank() == 0:
            write_bundle(self.folder / "bundle", state, self.config, self.model.prompts.describe())
        if self.monitor is not None:
            self.monitor.close()
        ranks.gather_objects(None)
        report = reports.evaluate(Ship.from_run(self.folder).model, self.splits, self.config.evaluation)
        report |= {
            "train_seconds": round(self.watch.seconds, 1),
            "tokens_per_second": round(self.watch.tokens / max(self.watch.seconds, 1e-9), 1),
            "world_size": ranks.world_size(), "seed": self.config.run.seed, "versions": reports.versions(),
        }
        if ranks.rank() == 0:
            path = reports.write(report, self.folder)
            reports.show(report)
            print(f"report: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe's name or a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    args = parser.parse_intermixed_args(arguments)
    try:
        trainer = Trainer(load_config(args.config, args.overrides))
        trainer.train()
        trainer.close()
    except UserError as error:
        print(f"ship-ds: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
