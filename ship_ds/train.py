"""Train SHIP: build, loop, close.

    deepspeed --num_gpus 8 ship_ds/train.py --config RECIPE [section.key=value ...]
    torchrun --nproc-per-node 2 -m ship_ds.train --config quickstart
    python -m ship_ds.train --config quickstart-smoke          # one process

The same program runs the embedded default on two CPU cores and a 7B model on a cluster.

Letters: T tasks, Z latent size.
"""

import contextlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# First: it sets what torch's threads read while torch is loaded, and `deepspeed ship_ds/train.py`
# starts this file by itself.
import ship_ds  # noqa: F401
from ship_ds.allocator import use_scalable_malloc
from ship_ds.console import current_rank, log
from ship_ds.runtime import preflight, sign_of_life

if __name__ == "__main__":
    use_scalable_malloc()
    # First, since a rank may be stopped anywhere from here on.
    sign_of_life.OF_THIS_PROCESS.start(current_rank(os.environ))
    # Before torch is loaded, or one that is stopped in these seconds would never be killed.
    minutes = preflight.exit_on_bad_input(__doc__).training.hang_minutes
    sign_of_life.OF_THIS_PROCESS.limit = None if minutes is None else 60 * minutes

# isort: split
import torch
from torch import Tensor

from ship_ds.api import Ship
from ship_ds.bundle import (
    Bundle,
    check_bases,
    check_bases_of_roles,
    fingerprints,
    frozen_bases,
    probe_inputs,
    write_bundle,
)
from ship_ds.config import Config, OptimiserConfig, TrainingConfig, load_config
from ship_ds.data.sampler import ReadingDraw, StepSampler, balanced
from ship_ds.data.source import TaskSource, source_of
from ship_ds.data.task import Splits
from ship_ds.data.token_cache import tokenise_all
from ship_ds.errors import UserError, first_line
from ship_ds.evaluation import final_report
from ship_ds.evaluation.dev_check import check_dev
from ship_ds.evaluation.questions import warn_of_long_targets
from ship_ds.exit_codes import BAD_INPUT, PREEMPTED
from ship_ds.files import disk_full_error, write_json
from ship_ds.flops import MODEL_PARTS, flops_of_parts, peak_of
from ship_ds.inference.derived import keep_examples_of
from ship_ds.model import budget
from ship_ds.model.assemble import LoadedWeights, build_ship
from ship_ds.model.loading import check_models, load_tokenizer
from ship_ds.model.nf4_linear import unpack, unpacked
from ship_ds.model.objectives import Training
from ship_ds.model.ship import ShipModel
from ship_ds.model.sizes import step_rows
from ship_ds.model.step import ShipBatch
from ship_ds.monitor.machine import versions
from ship_ds.monitor.profile import StepProfile
from ship_ds.monitor.writer import Monitor, Stopwatch, memory_gigabytes, reset_peak_memory
from ship_ds.planner.weights_fit import Memory, check_weights_fit
from ship_ds.prompt import PromptFormat, check_tasks, describe_roles
from ship_ds.runtime import checkpoint, ranks, shards, start_log
from ship_ds.runtime.after_training import (
    MOST_REPORT_STARTS,
    begin_report,
    end_report,
    failures_are_one_line,
)
from ship_ds.runtime.agreement import Agreement, agree
from ship_ds.runtime.bad_input import say_bad_input
from ship_ds.runtime.deepspeed_config import read_deepspeed_config
from ship_ds.runtime.engine import (
    Engine,
    check_deepspeed_reads,
    engine_dtype,
    highest_rate,
    learning_rate,
    parts_per_step,
)
from ship_ds.runtime.precision import choose_precision
from ship_ds.runtime.prefetch import Prefetch
from ship_ds.runtime.run_lock import RunLock
from ship_ds.runtime.shared_disk import check_is_shared
from ship_ds.runtime.stopping import Preempted, StopRequest
from ship_ds.runtime.watchdog import Watchdog

_ACTIVE_NATS = 0.01
"""A latent unit is active when its KL, averaged over a step's tasks, is above this (Burda et al.
2016, section 4.3)."""
_MOST_EVALUATION_STARTS = 2
"""Of one step's evaluation, over restarts: a second one tells a fault of the machine from one that
comes again."""


@dataclass(frozen=True)
class StepLosses:
    """The losses of a whole step in nats, the same on every rank.

    terms: each objective's mean by name; total: their weighted sum. kl_Z: KL to the prior by
    dimension, mean over the step's tasks. num_tokens: of the whole step. flops: useful ones of the
    whole step by part of the model (flops.py).
    """

    total: float
    terms: dict[str, float]
    kl_Z: Tensor
    num_tokens: int
    flops: dict[str, float]


@dataclass(frozen=True)
class StepCounts:
    """What a step's batches hold, of one rank or of all; known on the host.

    terms: what each objective sums over, by name. num_tokens: of all three models, padding left
    out. flops: useful ones by part of the model (flops.py).
    """

    terms: dict[str, float]
    num_tasks: float
    num_tokens: float
    flops: dict[str, float]

    def flat(self) -> list[float]:
        """All of it in one row, which ranks can sum."""
        return [*self.terms.values(), self.num_tasks, self.num_tokens, *self.flops.values()]

    def of_flat(self, row: Sequence[float]) -> "StepCounts":
        """The counts with these names that stand in such a row."""
        values = iter(row)
        terms = {name: next(values) for name in self.terms}
        return StepCounts(
            terms, next(values), next(values), {part: next(values) for part in self.flops}
        )


class Trainer:
    """setup -> train -> close, the same on every rank; rank 0 alone writes."""

    def __init__(
        self, config: Config, stop: StopRequest | None = None, watchdog: Watchdog | None = None
    ) -> None:
        """Set up everything, and go on from the newest checkpoint of the run folder.

        The order matters: each comment says to what.

        Args:
            config: of the run.
            stop: what hears the signals that ask a run to end; None: one that hears none.
            watchdog: what ends a run that hangs; None: one that watches nothing.

        Raises:
            UserError: the config, the data or the run folder, with what to change.
        """
        self.folder = Path(config.run.folder)
        # Before the process group, where one rank that fails leaves the others waiting.
        preflight.check(config, os.environ)
        # Before anything is written, too: what these refuse leaves no folder.
        ranks.quiet_libraries()
        check_deepspeed_reads(config.optimiser, config.training)
        formats = check_models(config.model)
        self.stop = stop or StopRequest(config.training.grace_seconds)
        self.watchdog = watchdog or Watchdog(self.folder, None)
        self.watchdog.begin()
        with self.watchdog.meeting():
            ranks.start(config.training.threads, read_deepspeed_config(config.training.deepspeed))
        self.config = config = choose_precision(config)
        parts_per_step(config.training)  # raises where the ranks cannot divide a step
        # Before any weight is made: on a CPU nobody says what ended a process that took too much.
        memory = Memory.here(ranks.ranks_per_node())
        ranks.gather_results(lambda: check_weights_fit(config, ranks.world_size(), memory))
        self.lock = RunLock(self.folder)
        ranks.gather_results(lambda: self.lock.take() if ranks.rank() == 0 else None)
        check_is_shared(self.folder)
        # The same on all ranks: each makes the whole initial weights and keeps its share of them,
        # so that they do not depend on the number of ranks.
        torch.manual_seed(config.run.seed)
        source = source_of(config.data)
        self.read_data(source, formats)
        start = open_start(config, self.bases)
        model = self.build_model()
        self.outside = self.begin_objectives(model)
        # Before the engine: ranks other than 0 wait for the tokens, and under ZeRO-3 a rank that is
        # late holds up every gather of the others.
        if (folder := source.token_cache(self.folder)) is not None:
            cache_tokens(folder, model, self.splits)
        limit = config.evaluation.max_new_tokens
        warn_of_long_targets(self.splits.tasks, model.prompts, limit, log)
        # Before the engine too: from there on weights may be sharded, and the optimiser has copied
        # them in fp32.
        if start is not None:
            start.load_into(model)
        self.engine = Engine(
            model, config.optimiser, config.training, model.pretrained_parameters()
        )
        self.engine.train()
        # Another on each rank, after everything that has to be equal: dropout's masks differ.
        torch.manual_seed((config.run.seed << 16) + ranks.rank())
        self.model = self.engine.module
        self.sampler = self.make_sampler()
        self.prefetch = Prefetch(self.make_batches)
        self.agreed: Agreement | None = None
        self.flop_size = self.model.flop_size()
        self.num_steps = num_steps(config.training, self.splits)
        warn_of_long_warm_up(config.optimiser, self.num_steps)
        # Last, since a checkpoint brings the random generators, and they have to stay as it left
        # them. The monitor then knows which rows of its files will be written again.
        self.restore()
        self.monitor = self.open_monitor() if ranks.rank() == 0 else None
        self.profile = self.open_profile() if ranks.rank() == 0 else None

    def read_data(self, source: TaskSource, formats: Collection[PromptFormat]) -> None:
        """The tasks, and fingerprints of what a resume has to find again: data and frozen bases.

        Raises UserError for a task that one of the formats, of each base one, cannot spell.
        """
        self.bases = frozen_bases(self.config)
        self.splits = source.read(load_tokenizer(self.config.model.task_llm.base), log)
        check_tasks(formats, self.splits)
        self.data_fingerprint = source.fingerprint(self.splits)

    def build_model(self) -> ShipModel:
        """SHIP around its bases; a frozen 4-bit one is sharded while it loads, under ZeRO-3."""
        weights = LoadedWeights(
            engine_dtype(self.config.training),
            self.config.model.attention,
            elementwise=self.config.model.elementwise,
            shard=shards.sharder(self.config.training),
        )
        model = build_ship(self.config.model, weights, self.config.loss)
        counts = model.parameter_counts().items()
        log("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts))
        return model

    def begin_objectives(self, model: ShipModel) -> dict[str, str]:
        """Let the objectives open what they read as the run trains; its fingerprints by the names
        of those that read any."""
        base = fingerprints("the base", self.config.model.task_llm.base)
        training = Training(self.splits.seen, base, model.prompts.describe(), log)
        begun = {name: one.begin(training) for name, one in model.objectives.items()}
        return {name: fingerprint for name, fingerprint in begun.items() if fingerprint}

    def make_sampler(self) -> StepSampler:
        """Draws the tasks and examples of any step from its number alone, the same on all ranks."""
        training, decoder = self.config.training, self.config.model.decoder
        encoder = self.config.model.encoder
        if training.family_alpha < 1 and len({task.task.family for task in self.splits.seen}) == 1:
            log("training.family_alpha changes nothing: the tasks of these data are of no families")
        sampler = StepSampler(
            balanced(self.splits.seen, training.family_alpha),
            self.config.run.seed,
            training.tasks_per_step,
            training.examples_per_task,
            decoder.max_examples,
            decoder.drop_latent,
            ReadingDraw(
                encoder.max_examples,
                encoder.drop_instruction,
                encoder.drop_targets,
                encoder.drop_words,
            ),
            balances_labels=training.balances_labels,
        )
        if training.balances_labels:
            num, num_seen = len(sampler.balanced_labels), len(self.splits.seen)
            log(
                f"training.balances_labels: {num} of {num_seen} seen tasks have labels, and enough "
                "examples of each"
            )
        return sampler

    def open_monitor(self) -> Monitor:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", self.config.model_dump(mode="json"), indent=2)
        parts = {
            part: [task.id for task in getattr(self.splits, part)]
            for part in ("seen", "dev", "unseen")
        }
        write_json(self.folder / "splits.json", parts)
        start_log.append(self.folder, self.step)
        return Monitor(self.folder, self.num_steps, self.step)

    def open_profile(self) -> StepProfile | None:
        num_steps = self.config.training.profile
        return StepProfile(self.folder, num_steps) if num_steps else None

    def restore(self) -> None:
        """Start at step 0, or go on from the newest good checkpoint of the run folder."""
        self.watch = Stopwatch()
        self.step = 0
        self.num_bad_steps = 0
        self.owes_evaluation = False
        self.num_evaluation_starts = 0
        self.saved_step: int | None = None
        self.saved_seconds = 0.0
        good = checkpoint.newest_good_to_resume(self.folder / "checkpoints", log)
        if good is None:
            return
        then = checkpoint.read_progress(good)
        check_bases(good, self.bases, then.bases)
        checkpoint.check_outside(good, self.outside, then.outside)
        progress = checkpoint.load(
            self.engine,
            good,
            self.config.model_dump(mode="json"),
            self.data_fingerprint,
            log,
            self.bases,
        )
        self.restore_from(progress)
        log(f"resumed from {good}, after step {progress.step}")

    def restore_from(self, progress: checkpoint.Progress) -> None:
        """Stand where the newest checkpoint does."""
        self.step = self.saved_step = progress.step
        self.num_bad_steps = progress.num_bad_steps
        self.owes_evaluation = progress.owes_evaluation
        self.num_evaluation_starts = progress.num_evaluation_starts if self.owes_evaluation else 0
        self.watch.seconds, self.watch.tokens = progress.seconds, progress.tokens
        self.saved_seconds = progress.seconds

    def train(self) -> None:
        """Take every step that is left, saving and evaluating when it is due.

        Raises:
            Preempted: on every rank, everything saved, when any of them was asked to stop.
        """
        self.watchdog.start()
        try:
            # A run that was asked to stop within bad steps waits for a good one, as it did before.
            if self.owes_evaluation and not self.num_bad_steps:
                self.evaluate_saved_step()
            self.stop.raise_if_asked()
            while self.step < self.num_steps and self.spent_time() < 1:
                self.raise_if_agreed()
                self.take_step()
                self.owes_evaluation |= is_due(self.step, self.config.evaluation.every_steps)
                # Checkpoints within bad steps would push out those before them (keep_last), which
                # may be the last good ones; the next good step makes up for what was due.
                if self.num_bad_steps:
                    continue
                # Saved before it is evaluated, so that an evaluation that fails loses no step.
                if self.owes_evaluation or self.checkpoint_is_due():
                    self.save()
                if self.owes_evaluation:
                    self.evaluate_saved_step()
            # Of a run that ends with bad steps.
            if self.owes_evaluation:
                self.save()
                self.evaluate_saved_step()
            # After the last step too: what comes next ends only the ranks that were asked.
            self.raise_if_agreed()
        except Preempted:
            if self.step:
                self.save()
                log(f"asked to stop: saved after step {self.step}")
            else:
                log("asked to stop before the first step: there is nothing to save")
            raise
        finally:
            self.watchdog.stop()
            self.prefetch.close()
            if self.profile is not None:
                self.profile.close()

    def take_step(self) -> None:
        """Take the losses and gradients of the step's batches, let the optimiser step, and agree
        with the other ranks on what comes next."""
        self.watch.start()
        batches = self.prefetch.get(self.step)
        # None at the first step of a start.
        agreed = self.agreed or self.agree(batches)
        counts = self.count([]).of_flat(agreed.counts)
        self.prefetch_batches(self.step + 1)
        sums = self.losses_and_gradients(batches, counts)
        spent = self.share_of_minutes(agreed.seconds)
        lr = learning_rate(self.step, self.config.optimiser, self.num_steps, spent)
        self.engine.set_learning_rate(lr)
        skipped = self.engine.step()
        self.agreed = self.agree(self.prefetched(self.step + 1), sums)
        self.record_step(self.step_losses(self.agreed.sums, counts), lr)
        self.step += 1
        self.watchdog.record_step(self.step)
        self.count_bad_steps(skipped)
        if self.profile is not None:
            self.profile.step()

    def make_batches(self, step: int) -> list[ShipBatch]:
        """This rank's micro-batches of the global step."""
        draws = self.sampler.draw_rank(
            step, ranks.rank(), ranks.world_size(), self.config.training.accumulation
        )
        return [self.model.collate(part, self.config.run.seed, step) for part in draws]

    def prefetch_batches(self, step: int) -> None:
        """Begin to make the batches of the step to come, where there is one."""
        if step < self.num_steps:
            self.prefetch.begin(step)

    def prefetched(self, step: int) -> list[ShipBatch]:
        """The batches of the step to come; none after the last."""
        return self.prefetch.get(step) if step < self.num_steps else []

    def count(self, batches: Sequence[ShipBatch]) -> StepCounts:
        """What this rank's batches hold; zeros without any."""
        encoder = self.flop_size.encoder
        flops = [flops_of_parts(self.flop_size, step_rows(batch, encoder)) for batch in batches]
        return StepCounts(
            {
                name: sum(objective.count(batch) for batch in batches)
                for name, objective in self.model.objectives.items()
            },
            sum(batch.num_tasks for batch in batches),
            sum(batch.num_tokens for batch in batches),
            {part: sum(one[part] for one in flops) for part in MODEL_PARTS},
        )

    def agree(self, batches: Sequence[ShipBatch], sums: Tensor | None = None) -> Agreement:
        """Agree with the other ranks before a step: on the counts of its batches, on `sums` of the
        step before, and on whether to go on."""
        return agree(
            self.stop.is_asked,
            self.watch.seconds_so_far(),
            self.count(batches).flat(),
            torch.zeros(0, device=ranks.device()) if sums is None else sums,
        )

    def losses_and_gradients(self, batches: Sequence[ShipBatch], counts: StepCounts) -> Tensor:
        """Backward through the whole step; each objective is its sum over the count of the *whole*
        step, all ranks included.

        Args:
            batches: this rank's.
            counts: of the whole step.

        Returns:
            This rank's share of every objective's mean in nats, then of the KL by dimension (Z),
            in one float64 vector on the engine's device.
        """
        objectives, weights = self.model.objectives, self.weights()
        # An objective that has nothing to sum in a step divides nothing by one.
        divisors = {name: max(number, 1.0) for name, number in counts.terms.items()}
        shares = torch.zeros(
            len(objectives) + self.config.model.latent_size,
            dtype=torch.float64,
            device=ranks.device(),
        )
        for index, batch in enumerate(batches):
            sums = self.engine.forward(batch, is_last=index == len(batches) - 1)
            means = {name: sums.objectives[name] / divisors[name] for name in objectives}
            loss = sum(weights[name] * mean for name, mean in means.items())
            # The engine averages over ranks and micro-batches; the counts above already did.
            self.engine.backward(loss * ranks.world_size() * len(batches))
            terms = torch.stack([mean.detach().double() for mean in means.values()])
            shares += torch.cat([terms, sums.kl_TZ.sum(0).double() / counts.num_tasks])
        return shares

    def step_losses(self, sums: Tensor, counts: StepCounts) -> StepLosses:
        """The losses of a step from what the ranks' shares sum up to (see
        `losses_and_gradients`)."""
        objectives, weights = self.model.objectives, self.weights()
        means, kl_Z = sums[: len(objectives)], sums[len(objectives) :]
        terms = dict(zip(objectives, means.tolist(), strict=True))
        total = sum(weights[name] * term for name, term in terms.items())
        return StepLosses(total, terms, kl_Z.float(), int(counts.num_tokens), counts.flops)

    def weights(self) -> dict[str, float]:
        """Of the objectives, in force at this step."""
        return self.config.loss.weights_at(self.step, self.num_steps)

    def count_bad_steps(self, skipped: bool) -> None:
        """The ranks agreed on `skipped`. The step's examples are written down; too many in a row
        stop the run."""
        self.num_bad_steps = self.num_bad_steps + 1 if skipped else 0
        if not skipped:
            return
        step = self.step - 1
        path = self.folder / "bad_steps.jsonl"
        if ranks.rank() == 0:
            with path.open("a", encoding="utf-8") as file:
                for draw in self.sampler.draw_step(step):
                    file.write(json.dumps({"step": step, **asdict(draw)}) + "\n")
        log(
            f"step {step}: loss or gradient not finite on some rank: skipped on all of them; its "
            f"examples are in {path}"
        )
        if self.num_bad_steps >= self.config.training.max_bad_steps:
            raise UserError(
                f"training: not finite in {self.num_bad_steps} steps in a row; start with a lower "
                f"optimiser.lr in another run.folder, or look at {path} (training.max_bad_steps "
                "sets the number)"
            )

    def record_step(self, losses: StepLosses, lr: float) -> None:
        seconds = self.watch.stop(losses.num_tokens)
        if self.monitor is None:
            return
        scheduled = dict(self.config.loss.scheduled(self.step, self.num_steps))
        if self.config.model.task_llm.fading_steps:
            share = self.config.model.task_llm.stated_share(self.step)
            scheduled["instruction_in_prompt"] = share
        self.monitor.step(
            self.step,
            {
                "loss/total": losses.total,
                **{f"loss/{name}": term for name, term in losses.terms.items()},
                **{f"schedule/{name}": value for name, value in scheduled.items()},
                "latent/kl": float(losses.kl_Z.mean()),
                "latent/active_units": float((losses.kl_Z > _ACTIVE_NATS).sum()),
                "optimiser/lr": lr,
                "optimiser/gradient_norm": self.engine.gradient_norm(),
                "speed/tokens_per_second": losses.num_tokens / seconds,
                "speed/step_seconds": seconds,
                **self.utilisation(losses.flops, seconds),
                "memory/gigabytes": memory_gigabytes(),
            },
        )
        if self.step % 100 == 0:
            self.monitor.kl_per_dimension(self.step, losses.kl_Z)

    def utilisation(self, flops: Mapping[str, float], seconds: float) -> dict[str, float]:
        """Useful TFLOPs of the step by part, those of a rank in a second, and the share of the
        card's peak that they are, where flops.py knows the card."""
        a_second = sum(flops.values()) / seconds / ranks.world_size()
        peak = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        return {
            **({} if peak is None else {"speed/mfu": a_second / peak}),
            "speed/teraflops_per_second": a_second / 1e12,
            **{f"teraflops/{part}": value / 1e12 for part, value in flops.items()},
        }

    def evaluate_saved_step(self) -> None:
        """Evaluate the step that the newest checkpoint holds; training goes on if that fails.

        A single process writes one line and goes on. Of several ranks all end, since one that
        failed within a gather cannot go on with the others, and a restart begins again from the
        checkpoint; an evaluation that was begun twice and never ended is given up. An end by
        force within it, as by a lost node, counts as such a beginning.

        Raises:
            Preempted: between its parts; the step then still owes its evaluation.
        """
        advice = (
            "it is left out, and training goes on: lower evaluation.max_new_tokens or "
            "data.truncation, or look at the error"
        )
        if self.num_evaluation_starts >= _MOST_EVALUATION_STARTS:
            log(
                f"evaluation of step {self.step}: begun {self.num_evaluation_starts} times, and "
                f"each time the run ended in it: {advice}"
            )
            self.record_evaluation(self.num_evaluation_starts, None, is_owed=False)
            return
        # On every rank before any of them can fail.
        self.record_evaluation(self.num_evaluation_starts + 1, None, is_owed=True)
        ranks.barrier()
        try:
            dev_score = self.evaluate()
        except Preempted:
            self.record_evaluation(self.num_evaluation_starts - 1, None, is_owed=True)
            raise
        except Exception as error:
            if ranks.world_size() > 1:
                raise
            log(f"evaluation of step {self.step} failed ({first_line(error)}): {advice}")
            dev_score = None
        self.engine.train()
        reset_peak_memory()
        self.record_evaluation(self.num_evaluation_starts, dev_score, is_owed=False)

    def record_evaluation(self, num_starts: int, dev_score: float | None, is_owed: bool) -> None:
        """Write beside the newest checkpoint how far the evaluation of its step has come, for a run
        that goes on from it.

        Args:
            num_starts: how often the evaluation was begun.
            dev_score: of dev, once it has ended; None: there is none.
            is_owed: whether a run that goes on from there has to begin it again.
        """
        self.owes_evaluation = is_owed
        self.num_evaluation_starts = num_starts if is_owed else 0
        if ranks.rank() == 0:
            folder = checkpoint.folder_of(self.folder / "checkpoints", self.step)
            best_by = self.config.evaluation.best_by
            checkpoint.record_evaluation(folder, num_starts, dev_score, is_owed, best_by)

    def evaluate(self) -> float | None:
        """The score on dev that checkpoints are chosen by, more being better; None: there is none.

        Raises:
            Preempted: between the evaluation's parts.
        """
        with unpacked(self.model.roles, budget.bytes_to_unpack(self.model.device)):
            check = check_dev(
                self.model, self.config, self.splits, self.folder, self.stop.raise_if_asked
            )
        if self.monitor is not None:
            self.monitor.evaluation(self.step, check.scalars)
            if check.texts:
                self.monitor.texts(self.step, check.texts)
        return check.dev_score

    def save(self) -> None:
        """A checkpoint of this step, unless it is there already."""
        if self.step == self.saved_step:
            return
        progress = checkpoint.Progress(
            self.step,
            self.watch.seconds,
            self.watch.tokens,
            self.num_bad_steps,
            ranks.world_size(),
            self.config.model_dump(mode="json"),
            self.data_fingerprint,
            best_by=self.config.evaluation.best_by,
            owes_evaluation=self.owes_evaluation,
            known_instructions=self.known_instructions(),
            bases=self.bases,
            probes=probe_inputs(self.splits.seen),
            outside=self.outside,
        )
        checkpoint.save(self.engine, self.folder / "checkpoints", progress, self.config.checkpoint)
        self.saved_step, self.saved_seconds = self.step, self.seconds()
        self.num_evaluation_starts = 0  # of this step's evaluation none was begun

    def known_instructions(self) -> list[str]:
        return [task.task.instruction for task in self.splits.seen]

    def spent_time(self) -> float:
        """The share of training.max_minutes that is used, the same on every rank; 0 without a
        limit."""
        return self.share_of_minutes(self.seconds())

    def seconds(self) -> float:
        """Of training so far, the same on every rank."""
        # Before the first step of a start, what the checkpoint says, to every rank alike.
        return self.watch.seconds if self.agreed is None else self.agreed.seconds

    def checkpoint_is_due(self) -> bool:
        """By the steps, or by the time since the newest checkpoint; the same on every rank."""
        config = self.config.checkpoint
        every = config.every_steps
        # Also one that was due at a bad step.
        if every and self.step // every > (self.saved_step or 0) // every:
            return True
        minutes = config.every_minutes
        return minutes is not None and self.seconds() - self.saved_seconds >= 60 * minutes

    def share_of_minutes(self, seconds: float) -> float:
        """Of training.max_minutes; 0 without a limit."""
        limit = self.config.training.max_minutes
        return 0.0 if limit is None else seconds / (60 * limit)

    def raise_if_agreed(self) -> None:
        """Raises Preempted on every rank where the last step's end found any asked to stop."""
        if self.agreed is not None and self.agreed.is_asked_to_stop:
            raise Preempted

    def close(self) -> None:
        """Bundle, then the report, which may fail without the run failing."""
        self.save()
        self.stop.exit_on_signal()
        self.write_bundle()
        trace = self.folder / "report_failure.txt"
        if ranks.rank() == 0:
            trace.unlink(missing_ok=True)
        ranks.barrier()

        def describe(error: str) -> str:
            return (
                f"the final report failed ({error}); the run is complete, and {trace} has the "
                f"traceback: `ship-ds evaluate --run {self.folder}` measures it, and the command "
                "that trained it makes the report alone"
            )

        with failures_are_one_line(trace, describe):
            if self.monitor is not None:
                self.monitor.close()
            if self.config.evaluation.ends_with_report:
                if begin_report(self.folder):
                    self.report()
                else:
                    log(
                        f"the final report was begun {MOST_REPORT_STARTS} times and cut off each "
                        "time; it is left out, and the run is complete: `ship-ds evaluate --run "
                        f"{self.folder}` goes on where it stops, and a lower "
                        "evaluation.final_share takes less time"
                    )
        end_report(self.folder)

    def write_bundle(self) -> None:
        """RUN/bundle: what a user opens."""
        state = self.engine.gathered_state()
        if ranks.rank() == 0:
            write_bundle(
                self.folder / "bundle",
                state,
                self.config,
                describe_roles(vars(self.model.collator.prompts)),
                self.bases,
                self.known_instructions(),
                probe_inputs(self.splits.seen),
            )
            keep_examples_of(self.splits.seen, self.folder / "bundle")

    def report(self) -> None:
        """Ask the model that was trained, where it is: there is no room for a second one, nor do
        the ranks have its weights whole."""
        self.model.eval()
        # Nothing is trained after it.
        unpack(self.model.roles, budget.bytes_to_unpack(self.model.device))
        ship = Ship(self.model, self.config, digest="", known=self.known_instructions())
        share = self.config.evaluation.final_share
        seconds = None if share is None else share * self.watch.seconds
        report = final_report.measure_run(ship, self.splits, self.folder, seconds)
        report |= {
            "train_seconds": round(self.watch.seconds, 1),
            "tokens_per_second": round(self.watch.tokens / max(self.watch.seconds, 1e-9), 1),
            "steps": self.step,
            "world_size": ranks.world_size(),
            "seed": self.config.run.seed,
            "versions": versions(),
        }
        if ranks.rank() == 0:
            path = final_report.write(report, self.folder)
            final_report.show(report)
            print(f"report: {path}")


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens at this one; never for zero."""
    return every > 0 and step % every == 0


def num_steps(training: TrainingConfig, splits: Splits) -> int:
    """The run's steps; epochs count the examples that are answered, and of a task that has fewer
    than a step answers, each of their repetitions: or most of such tasks would never be met."""
    if training.steps is not None:
        return training.steps
    examples = sum(max(len(task.train), training.examples_per_task) for task in splits.seen)
    return math.ceil(
        (training.epochs or 0) * examples / (training.tasks_per_step * training.examples_per_task)
    )


def warn_of_long_warm_up(optimiser: OptimiserConfig, num_steps: int) -> None:
    """Log what the learning rate comes to, where it is not the one that was asked for."""
    highest = highest_rate(optimiser, num_steps)
    if optimiser.warmup_steps > num_steps / 10 and highest < optimiser.lr:
        log(
            f"optimiser.warmup_steps: {optimiser.warmup_steps} of {num_steps} steps: the learning "
            f"rate reaches {highest:.3g} at most, {highest / optimiser.lr:.0%} of optimiser.lr"
        )


def cache_tokens(folder: Path, model: ShipModel, splits: Splits) -> None:
    """Tokenise all texts once: rank 0 first, then the others load what it wrote. Every rank calls
    it.

    Args:
        folder: of the token cache.
        model: whose roles' prompt formats take the tokens from it.
        splits: the tasks whose texts they are.
    """
    tasks = splits.tasks
    for turn in (ranks.rank() == 0, ranks.rank() != 0):
        if turn:
            for prompts in {
                id(p): p for p in (model.prompts, model.encoder_prompts, model.decoder_prompts)
            }.values():
                prompts.remember(tokenise_all(prompts.texts(tasks), prompts.tokenizer, folder))
        ranks.barrier()


def open_start(config: Config, bases: Mapping[str, str]) -> Bundle | None:
    """The other run's bundle with whose weights this one begins, trained around the same bases;
    None: it begins anew. Raises UserError."""
    if config.run.init_from is None:
        return None
    bundle = Bundle.open(config.run.init_from)
    check_bases_of_roles(bundle, config.model, bases)
    return bundle


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the arguments say and return the exit code."""
    args = preflight.parsed(arguments, __doc__)
    config = None
    try:
        config = load_config(args.config, args.overrides)
        watchdog = Watchdog(Path(config.run.folder), config.training.hang_minutes)
        with StopRequest(config.training.grace_seconds) as stop, contextlib.closing(watchdog):
            trainer = Trainer(config, stop, watchdog)
            trainer.train()
            trainer.close()
            watchdog.deregister()
    except UserError as error:
        say_bad_input(str(error))
        if config is not None:
            RunLock(Path(config.run.folder)).leave_unused()
        return BAD_INPUT
    except Preempted:
        return PREEMPTED
    except Exception as error:
        full = disk_full_error(error)
        if full is None:
            raise
        place = getattr(full, "filename", None) or "run.folder or TORCH_EXTENSIONS_DIR"
        # It may be the disk that the log is on.
        say_bad_input(
            f"{place}: its disk or quota is full ({first_line(full)}): make room and start the "
            "same command again"
        )
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    ranks.run_program(main)
