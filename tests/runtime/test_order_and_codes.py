"""What a failing evaluation or report costs: no step, and no exit code; a run of stubs."""

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ship_ds import train
from ship_ds.config import load_config
from ship_ds.data.task import Example, Splits, SplitTask, Task
from ship_ds.errors import UserError
from ship_ds.evaluation import dev_check
from ship_ds.evaluation.dev_check import DevCheck
from ship_ds.evaluation.measure import Outcome
from ship_ds.model.bitsandbytes_import import bitsandbytes
from ship_ds.model.nf4_linear import use_nf4_linears
from ship_ds.runtime import checkpoint, ranks
from ship_ds.runtime.agreement import Agreement
from ship_ds.runtime.stopping import Preempted, StopRequest
from tests.runtime.test_checkpoint import Engine
from tests.runtime.two_ranks import run_two_ranks


class StubEngine(Engine):
    def train(self) -> None: ...


class StubTrainer(train.Trainer):
    """The loop, the checkpoints and the end of a run of four steps around nothing."""

    def __init__(self, folder: Path, error: BaseException | None = None) -> None:
        overrides = [f"run.folder={folder}", "training.steps=4", "evaluation.every_steps=2"]
        self.config = load_config("quickstart-smoke", [*overrides, "checkpoint.every_steps=0"])
        self.folder = folder
        self.error = error
        self.evaluated: list[int] = []
        self.engine: Any = StubEngine(1000)
        self.stop = StopRequest(10)
        self.watchdog: Any = SimpleNamespace(start=lambda: None, stop=lambda: None)
        self.watch: Any = SimpleNamespace(seconds=0.0, tokens=0)
        self.monitor = self.profile = None
        self.prefetch: Any = SimpleNamespace(close=lambda: None)
        self.num_steps, self.num_bad_steps = 4, 0
        self.data_fingerprint, self.bases, self.outside = "data", {}, {}
        self.splits: Any = SimpleNamespace(seen=[])
        self.step, self.saved_step, self.saved_seconds, self.agreed = 0, None, 0.0, None
        self.owes_evaluation, self.num_evaluation_starts = False, 0
        good = checkpoint.newest_good_to_resume(folder / "checkpoints", print)
        if good is not None:
            self.restore_from(checkpoint.read_progress(good))

    def take_step(self) -> None:
        self.step += 1

    def evaluate(self) -> float:
        self.evaluated.append(self.step)
        if self.error is not None and self.step == 2:
            raise self.error
        return 0.5


def stub_model(roles: Sequence[torch.nn.Module] = ()) -> Any:
    return SimpleNamespace(roles=roles, device=torch.device("cpu"), eval=lambda: None, decodes=True)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 46 GiB")


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer takes itself for one of two; what it calls does not."""
    alone = {"rank": lambda: 0, "barrier": lambda: None, "sum_over_ranks": lambda values: values}
    monkeypatch.setattr(train, "ranks", SimpleNamespace(world_size=lambda: 2, **alone))


def saved(folder: Path, step: int) -> checkpoint.Progress:
    return checkpoint.read_progress(checkpoint.folder_of(folder / "checkpoints", step))


def test_a_failing_evaluation_costs_a_single_process_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = StubTrainer(tmp_path, OUT_OF_MEMORY)
    trainer.train()
    assert trainer.step == 4 and trainer.evaluated == [2, 4]
    line = capsys.readouterr().err.strip()
    assert line.startswith(
        "ship-ds: evaluation of step 2 failed (OutOfMemoryError: CUDA out of memory.): "
    )
    assert (saved(tmp_path, 2).owes_evaluation, saved(tmp_path, 2).dev_score) == (False, None)
    assert (saved(tmp_path, 4).owes_evaluation, saved(tmp_path, 4).dev_score) == (False, 0.5)


def test_a_run_goes_on_with_what_its_objectives_read_before(tmp_path: Path) -> None:
    trainer = StubTrainer(tmp_path)
    objectives = {"oracles": lambda training: "a" * 64, "task": lambda training: ""}
    model: Any = SimpleNamespace(
        objectives={name: SimpleNamespace(begin=begin) for name, begin in objectives.items()},
        prompts=SimpleNamespace(describe=dict),
    )
    trainer.outside = trainer.begin_objectives(model)
    trainer.train()
    assert saved(tmp_path, 4).outside == {"oracles": "a" * 64}
    other = StubTrainer(tmp_path)
    other.outside = {"oracles": "b" * 64}
    with pytest.raises(UserError, match="loss.oracles reads had the fingerprint aaaaaaaaaaaa and"):
        other.restore()


@pytest.mark.usefixtures("two_ranks")
def test_a_failing_evaluation_of_several_ranks_is_tried_twice_and_loses_no_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt in (1, 2):
        trainer = StubTrainer(tmp_path, OUT_OF_MEMORY)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train()
        assert trainer.step == 2 and trainer.evaluated == [2]
        assert saved(tmp_path, 2).num_evaluation_starts == attempt
        assert saved(tmp_path, 2).owes_evaluation
    trainer = StubTrainer(tmp_path, OUT_OF_MEMORY)
    trainer.train()
    assert trainer.step == 4 and trainer.evaluated == [4]
    assert "evaluation of step 2: begun 2 times, and each time the run" in capsys.readouterr().err
    assert not saved(tmp_path, 2).owes_evaluation and saved(tmp_path, 4).dev_score == 0.5


@pytest.mark.usefixtures("two_ranks")
def test_a_fault_that_does_not_come_again_is_made_up_for(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        StubTrainer(tmp_path, OUT_OF_MEMORY).train()
    trainer = StubTrainer(tmp_path)
    trainer.train()
    assert trainer.evaluated == [2, 4] and saved(tmp_path, 2).dev_score == 0.5


@pytest.mark.parametrize(("num_seen", "num_dev"), [(2, 3), (6, 1), (2, 0)])
def test_what_the_decoder_takes_from_z_is_logged_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_seen: int, num_dev: int
) -> None:
    """The mean gain of the first four seen and the first four dev tasks; nothing without any."""
    examples = tuple(Example(str(i), str(i)) for i in range(4))

    def tasks(part: str, number: int) -> tuple[SplitTask, ...]:
        return tuple(
            SplitTask(Task(f"{part}{i}", "k", examples), examples[:2], examples[2:])
            for i in range(number)
        )

    def measured(method: Any, direction: str, questions: Any, **more: Any) -> Outcome:
        row = {"instruction": "k", "said": "k", "exact_match": [0.0]}
        if direction != "reconstruction":
            return Outcome(["exact_match"], [row] * len(questions))
        gains = [1.0 if q.task.id.startswith("seen") else 5.0 for q in questions]
        rows = [{**row, "latent_gain": [gain]} for gain in gains]
        return Outcome(["exact_match", "latent_gain"], rows)

    monkeypatch.setattr(dev_check, "measure_over_ranks", measured)
    monkeypatch.setattr(dev_check, "Ship", lambda *args, **options: None)
    monkeypatch.setattr(dev_check, "ShipMethod", lambda setting: None)
    model: Any = SimpleNamespace(eval=lambda: None, decodes=True)
    splits = Splits(tasks("seen", num_seen), tasks("dev", num_dev), ())
    config = load_config("quickstart-smoke")
    found = dev_check.check_dev(model, config, splits, tmp_path, lambda: None)
    gains = {name: value for name, value in found.scalars.items() if "latent_gain" in name}
    assert gains == {"latent_gain/seen": 1.0} | ({"latent_gain/dev": 5.0} if num_dev else {})


def test_the_tasks_of_a_look_are_spread_over_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of one family often lie side by side: not the first ones alone."""
    examples = tuple(Example(str(i), str(i)) for i in range(4))
    tasks = tuple(
        SplitTask(Task(f"t{i}", "k", examples), examples[:2], examples[2:]) for i in range(12)
    )
    asked: list[str] = []

    def measured(method: Any, direction: str, questions: Any, **more: Any) -> Outcome:
        asked.extend(q.task.id for q in questions)
        row = {"instruction": "k", "said": "k", "exact_match": [0.0]}
        return Outcome(["exact_match"], [row] * len(questions))

    monkeypatch.setattr(dev_check, "measure_over_ranks", measured)
    monkeypatch.setattr(dev_check, "Ship", lambda *args, **options: None)
    monkeypatch.setattr(dev_check, "ShipMethod", lambda setting: None)
    model: Any = SimpleNamespace(eval=lambda: None, decodes=False)
    config = load_config("quickstart-smoke", ["evaluation.num_tasks=8"])
    dev_check.check_dev(model, config, Splits((), tasks, ()), tmp_path, lambda: None)
    assert asked == ["t0", "t1", "t3", "t4", "t6", "t7", "t9", "t10"]


def test_a_base_in_4_bits_is_dequantised_while_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, in the report and between steps, but not in the steps that come after."""
    base = torch.nn.ModuleList([bitsandbytes.nn.Linear4bit(64, 8, bias=False, quant_type="nf4")])
    use_nf4_linears(base.to("cpu"), torch.device("cpu"), "base")
    linear: Any = base[0]
    was_unpacked = []

    def answer(*arguments: Any) -> Any:
        was_unpacked.append(linear.unpacked is not None)
        return DevCheck() if len(was_unpacked) == 1 else {}

    monkeypatch.setattr(train, "check_dev", answer)
    monkeypatch.setattr(train.final_report, "measure_run", answer)
    monkeypatch.setattr(train.final_report, "show", lambda report: None)
    monkeypatch.setattr(train, "Ship", lambda *arguments, **options: None)
    trainer = StubTrainer(tmp_path)
    trainer.model = stub_model([torch.nn.Identity(), base])
    train.Trainer.evaluate(trainer)
    assert was_unpacked == [True] and linear.unpacked is None
    trainer.report()
    assert was_unpacked == [True, True]


def test_an_evaluation_that_a_signal_cuts_short_is_no_failure(tmp_path: Path) -> None:
    for _ in range(3):
        trainer = StubTrainer(tmp_path, Preempted())
        with pytest.raises(Preempted):
            trainer.train()
        assert trainer.evaluated == [2]
        assert saved(tmp_path, 2).num_evaluation_starts == 0 and saved(tmp_path, 2).owes_evaluation


@pytest.mark.parametrize(
    ("best_by", "dev_score", "logged"),
    [
        ("exact_match", 0.25, {"deduction/seen": 0.25, "deduction/dev": 0.25}),
        (
            "rouge_l",
            0.75,
            {
                "deduction/seen": 0.25,
                "deduction_rouge_l/seen": 0.75,
                "deduction/dev": 0.25,
                "deduction_rouge_l/dev": 0.75,
            },
        ),
        (
            "answer_loss",
            -1.5,
            {
                "deduction/seen": 0.25,
                "deduction_answer_loss/seen": 1.5,
                "deduction/dev": 0.25,
                "deduction_answer_loss/dev": 1.5,
            },
        ),
    ],
)
def test_a_checkpoint_is_scored_by_the_metric_of_the_config(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    best_by: str,
    dev_score: float,
    logged: dict[str, float],
) -> None:
    """It is logged, though the answers are lists, of which exact match alone is; where less is
    better, the checkpoint's score is the negative."""
    values = {"exact_match": [0.25], "rouge_l": [0.75], "answer_loss": [1.5]}
    outcome = Outcome([*values], [{**values, "instruction": "k", "said": "k"}])
    monkeypatch.setattr(dev_check, "measure_over_ranks", lambda *args, **options: outcome)
    monkeypatch.setattr(dev_check, "Ship", lambda *args, **options: None)
    monkeypatch.setattr(dev_check, "ShipMethod", lambda setting: None)
    looks: list[dict[str, float]] = []
    trainer = StubTrainer(tmp_path)
    trainer.config = load_config("quickstart-smoke", [f"evaluation.best_by={best_by}"])
    trainer.model = stub_model()
    examples = tuple(Example(str(i), str(i)) for i in range(4))
    task = SplitTask(Task("t", "k", examples), examples[:2], examples[2:])
    trainer.splits = Splits((task,), (task,), ())
    trainer.monitor = SimpleNamespace(  # type: ignore[assignment]
        evaluation=lambda step, scalars: looks.append(scalars), texts=lambda step, pairs: None
    )
    monkeypatch.setattr(StubTrainer, "evaluate", train.Trainer.evaluate)
    trainer.step = 4
    trainer.save()
    trainer.evaluate_saved_step()
    assert looks == [logged]
    assert (saved(tmp_path, 4).dev_score, saved(tmp_path, 4).best_by) == (dev_score, best_by)
    outcome.rows[0][best_by] = [float("nan")]
    assert trainer.evaluate() is None


def test_a_run_that_its_minutes_ended_trains_no_further_when_it_starts_again(
    tmp_path: Path,
) -> None:
    trainer = StubTrainer(tmp_path)
    trainer.config = load_config("quickstart-smoke", ["training.max_minutes=1"])
    trainer.watch.seconds = 60.5  # as the checkpoint brought it
    trainer.train()
    assert trainer.step == 0
    trainer.watch.seconds = 59.5
    trainer.train()
    assert trainer.step == 4


def test_a_checkpoint_comes_after_so_many_minutes_of_training(tmp_path: Path) -> None:
    """By the ranks' common clock, counted from the checkpoint before, also over a restart."""

    class Timed(StubTrainer):
        def __init__(self, seconds_of_steps: list[float]) -> None:
            super().__init__(tmp_path)
            overrides = ["checkpoint.every_minutes=1", "checkpoint.every_steps=0"]
            self.config = load_config("quickstart-smoke", overrides)
            self.num_steps, self.left = self.step + len(seconds_of_steps), seconds_of_steps
            self.saved: list[int] = []

        def take_step(self) -> None:
            super().take_step()
            seconds = self.seconds() + self.left.pop(0)
            self.watch.seconds = seconds + self.step / 100  # this rank's own, a little apart
            self.agreed = Agreement(False, seconds, [], torch.zeros(0))

        def save(self) -> None:
            super().save()
            self.saved.append(self.step)

    trainer = Timed([59.0, 1.0, 59.0, 30.0, 30.0, 20.0])
    trainer.train()
    assert trainer.saved == [2, 4]
    trainer.num_steps = 0
    trainer.save()  # as on the way out: 50 s after the one before, by the clock of all
    again = Timed([59.0, 1.0, 1.0])
    assert again.step == 6 and again.saved_seconds == again.seconds()
    again.train()
    assert again.saved == [8]


class Poisoned(StubTrainer):
    """A checkpoint and an evaluation are due at every second step; some steps are not finite, and
    it is asked to stop after one."""

    def __init__(self, folder: Path, bad: Sequence[int], stops_at: int | None = None) -> None:
        super().__init__(folder)
        overrides = ["evaluation.every_steps=2", "checkpoint.every_steps=2"]
        self.config = load_config("quickstart-smoke", [*overrides, "checkpoint.keep_last=9"])
        self.num_steps, self.bad, self.stops_at = 6, bad, stops_at

    def take_step(self) -> None:
        super().take_step()
        self.num_bad_steps = self.num_bad_steps + 1 if self.step in self.bad else 0
        self.agreed = Agreement(self.step == self.stops_at, 0.0, [], torch.zeros(0))


def steps_saved(folder: Path) -> list[int]:
    root = folder / "checkpoints"
    return [checkpoint.read_progress(path).step for path in checkpoint.checkpoints(root)]


@pytest.mark.parametrize(
    ("bad", "kept"),
    [((3, 4), [2, 5, 6]), ((2, 3, 4), [5, 6]), ((5, 6), [2, 4, 6]), ((3,), [2, 4, 6])],
)
def test_what_is_due_at_a_bad_step_waits_for_the_next_good_one(
    tmp_path: Path, bad: Sequence[int], kept: list[int]
) -> None:
    """Or for the end."""
    trainer = Poisoned(tmp_path, bad)
    trainer.train()
    assert steps_saved(tmp_path) == trainer.evaluated == kept


def test_so_does_a_checkpoint_alone(tmp_path: Path) -> None:
    trainer = Poisoned(tmp_path, (3, 4))
    trainer.config = load_config(
        "quickstart-smoke", ["evaluation.every_steps=0", "checkpoint.every_steps=2"]
    )
    trainer.train()
    assert steps_saved(tmp_path) == [5, 6] and trainer.evaluated == []


def test_a_run_that_is_asked_to_stop_within_bad_steps_goes_on_as_it_would_have(
    tmp_path: Path,
) -> None:
    trainer = Poisoned(tmp_path, (3, 4), stops_at=4)
    with pytest.raises(Preempted):
        trainer.train()
    assert trainer.evaluated == [2] and steps_saved(tmp_path) == [2, 4]
    assert saved(tmp_path, 4).num_bad_steps == 2 and saved(tmp_path, 4).owes_evaluation
    again = Poisoned(tmp_path, (3, 4))
    assert again.num_bad_steps == 2
    again.train()
    assert again.evaluated == [5, 6] and steps_saved(tmp_path) == [2, 4, 5, 6]


def test_an_evaluation_that_was_cut_off_within_bad_steps_costs_the_next_one_no_start(
    tmp_path: Path,
) -> None:
    """A version before began it there, twice, and was ended in it."""
    with pytest.raises(Preempted):
        Poisoned(tmp_path, (3, 4), stops_at=4).train()
    folder = checkpoint.folder_of(tmp_path / "checkpoints", 4)
    checkpoint.record_evaluation(folder, 2, None, True, "exact_match")
    again = Poisoned(tmp_path, (3, 4))
    assert again.num_evaluation_starts == 2
    again.train()
    assert again.evaluated == [5, 6]


def test_a_stop_that_is_agreed_on_after_the_last_step_is_heeded_by_every_rank(
    tmp_path: Path,
) -> None:
    class Asked(StubTrainer):
        def take_step(self) -> None:
            super().take_step()
            self.agreed = Agreement(self.step == 4, 0.0, [], torch.zeros(0))

    trainer = Asked(tmp_path)
    with pytest.raises(Preempted):
        trainer.train()
    assert trainer.step == trainer.saved_step == 4


def test_a_failing_report_leaves_a_finished_run_with_code_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class WithoutRoom(StubTrainer):
        def __init__(self, *_: object) -> None:
            super().__init__(tmp_path)

        def write_bundle(self) -> None: ...

        def report(self) -> None:
            raise OUT_OF_MEMORY

    monkeypatch.setattr(train, "Trainer", WithoutRoom)
    assert train.main(["--config", "quickstart-smoke"]) == 0
    line = capsys.readouterr().err.strip()
    assert line.startswith(
        "ship-ds: the final report failed (OutOfMemoryError: CUDA out of memory.); the run is"
    )
    assert f"`ship-ds evaluate --run {tmp_path}` measures it" in line and "\n" not in line
    assert "Tried to allocate 46 GiB" in (tmp_path / "report_failure.txt").read_text()


@pytest.mark.parametrize("cut_short", ["", "[]", '{"num_cut_off": "x"}'])
def test_a_report_that_is_cut_off_each_time_is_left_out(
    cut_short: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each start begins it from nothing, so a job shorter than the report would never end."""
    began = []

    class CutOff(StubTrainer):
        def __init__(self, *_: object) -> None:
            super().__init__(tmp_path)

        def write_bundle(self) -> None: ...

        def report(self) -> None:
            began.append(self.step)
            if len(began) != 5:
                raise SystemExit(75)  # as the thread does that hears the signals

    (tmp_path / "report_starts.json").write_text(cut_short)
    monkeypatch.setattr(train, "Trainer", CutOff)
    for _ in range(3):
        with pytest.raises(SystemExit):
            train.main(["--config", "quickstart-smoke"])
    capsys.readouterr()
    assert train.main(["--config", "quickstart-smoke"]) == 0 and len(began) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "the final report was begun 3 times and cut off each time" in line
    assert f"`ship-ds evaluate --run {tmp_path}` goes on where it stops" in line
    # Whoever asks again gets it, and what has ended counts for nothing.
    with pytest.raises(SystemExit):
        train.main(["--config", "quickstart-smoke"])
    assert train.main(["--config", "quickstart-smoke"]) == 0 and len(began) == 5
    assert not (tmp_path / "report_starts.json").exists()


LINKER = "Error building extension: ld: No space left on device"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError(LINKER),
            f"run.folder or TORCH_EXTENSIONS_DIR: DISK (RuntimeError: {LINKER}): ",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            "/a/b: DISK (OSError: [Errno 28] ",
        ),
        (RuntimeError("Error building extension: ld: no such file"), None),
        (UserError("a.yaml: as it is"), "a.yaml: as it is"),
    ],
)
@pytest.mark.parametrize("log_is_full", [False, True])
def test_a_full_disk_is_one_line_and_code_2_wherever_it_is_met(
    error: Exception,
    line: str | None,
    log_is_full: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    def write(_: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train, "Trainer", fail)
    if log_is_full:
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=write, flush=lambda: None))
    if line is None:
        with pytest.raises(RuntimeError, match="no such file"):
            train.main(["--config", "quickstart-smoke"])
        return
    assert train.main(["--config", "quickstart-smoke"]) == 2
    if not log_is_full:
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("ship-ds: " + line.replace("DISK", "its disk or quota is full"))


_REPORT_FAILS = """
import os, time
from ship_ds.runtime.after_training import failures_are_one_line
dist.barrier()  # or rank 1 may be gone before rank 0 is connected
with failures_are_one_line(root / "trace", "failed: {}".format):
    if number == 1:
        raise MemoryError("no room")
    time.sleep(600)  # as in a collective that rank 1 never enters
print("goes on")
os._exit(0)
"""


@pytest.mark.distributed
def test_a_rank_that_waits_for_one_whose_report_failed_ends_with_code_0(tmp_path: Path) -> None:
    waited, failed = run_two_ranks(_REPORT_FAILS, tmp_path)
    assert (waited.returncode, failed.returncode) == (0, 0), (waited.stderr, failed.stderr)
    assert failed.stderr == "ship-ds: failed: MemoryError: no room\n"
    assert "goes on" not in waited.stdout and waited.stderr == ""


@pytest.mark.parametrize(("local_rank", "visible", "index"), [("1", 1, "0"), ("3", 8, "3")])
def test_a_task_that_sees_its_own_gpu_alone_takes_it(
    local_rank: str, visible: int, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `--gpus-per-task=1`; DeepSpeed reads LOCAL_RANK as the number of a device."""
    chosen: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    ranks.choose_gpu()
    assert chosen == [int(index)] and ranks.os.environ["LOCAL_RANK"] == index
