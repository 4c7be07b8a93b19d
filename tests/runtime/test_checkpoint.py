"""Full disks and damaged files: a clear line, the checkpoints before intact, and nothing half
written."""

import copy
import errno
import hashlib
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ship_ds.bundle import PROGRESS, check_checkpoint
from ship_ds.config import CheckpointConfig, load_config
from ship_ds.errors import LFS_POINTER, UserError
from ship_ds.export.bundling import bundle_from_checkpoint
from ship_ds.runtime import checkpoint


class Engine:
    """Writes `num_bytes` as DeepSpeed does."""

    module: torch.nn.Module = torch.nn.Linear(1, 1)

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.module.named_parameters())

    def save_shards(self, folder: Path, name: str) -> None:
        (folder / name).mkdir()
        torch.save(
            torch.zeros(self.num_bytes // 4),
            folder / name / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def progress(
    step: int, dev_score: float | None = None, best_by: str = "exact_match"
) -> checkpoint.Progress:
    return checkpoint.Progress(step, 0.0, 0, 0, 1, {}, "", dev_score, best_by)


def test_a_checkpoint_from_before_a_setting_existed_had_it_at_its_default(tmp_path: Path) -> None:
    config = load_config("quickstart-smoke", []).model_dump(mode="json")
    old = copy.deepcopy(config)
    del old["training"]["family_alpha"], old["optimiser"]["betas"], old["data"]["more_compositions"]
    made = checkpoint.Progress(4, 0.0, 0, 0, 1, old, "data")
    checkpoint.check_same_run(tmp_path, made, config, "data", {})
    config["training"]["family_alpha"] = 0.5
    with pytest.raises(
        UserError, match="training.family_alpha was 1.0 and is 0.5 now; set it back"
    ):
        checkpoint.check_same_run(tmp_path, made, config, "data", {})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.task.mean_over=answers", "loss.task.mean_over was tokens and is answers now"),
        ("loss.kl.free_bits=0.1", "loss.kl.free_bits was 0.0 and is 0.1 now"),
        ("loss.kl=0.5", "loss.kl.weight was 0.001 and is 0.5 now"),
        ("loss.distillation=0.5", "loss.distillation.temperature was None and is 1.0 now"),
    ],
)
def test_what_changed_of_an_objective_is_named_by_its_own_key(
    tmp_path: Path, override: str, message: str
) -> None:
    """Though one is written as a number, and the other as a section."""
    then = load_config("quickstart-smoke", []).model_dump(mode="json")
    now = load_config("quickstart-smoke", [override]).model_dump(mode="json")
    made = checkpoint.Progress(4, 0.0, 0, 0, 1, then, "data")
    with pytest.raises(UserError, match=message):
        checkpoint.check_same_run(tmp_path, made, now, "data", {})


def test_other_files_of_an_objective_are_refused_by_its_name(tmp_path: Path) -> None:
    """An objective that is new, or read nothing then, has nothing to be compared with."""
    then = {"oracles": "a" * 64}
    checkpoint.check_outside(tmp_path, {"oracles": "a" * 64, "other": "c"}, then)
    checkpoint.check_outside(tmp_path, {"oracles": "a" * 64}, {})
    with pytest.raises(UserError, match=r"what loss\.oracles reads had .* aaa.*has bbb.* now; put"):
        checkpoint.check_outside(tmp_path, {"oracles": "b" * 64}, then)


@pytest.mark.parametrize(("room", "num_bytes"), [(1_000_000, 9_000_000), (8_192, 0)])
def test_a_full_disk_leaves_the_checkpoint_before(
    small_disk: Path, room: int, num_bytes: int
) -> None:
    """Full while DeepSpeed writes its shards, and after that, with the generators."""
    root = small_disk / "checkpoints"
    first = checkpoint.save(Engine(1_000_000), root, progress(1), CheckpointConfig())
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
    with pytest.raises(
        UserError,
        match="the checkpoint of step 2 was not written; the ones before are intact. Make room",
    ):
        checkpoint.save(Engine(num_bytes), root, progress(2), CheckpointConfig())
    assert checkpoint.newest_good(root, print) == first
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001"]


def test_without_room_for_weights_and_moments_nothing_is_begun(small_disk: Path) -> None:
    class Large(Engine):
        module = torch.nn.Linear(600, 600)  # 12 bytes each: 4.3 MB on a disk of 3

        def save_shards(self, *args: object, **kwargs: object) -> None:
            raise AssertionError("this would fill the disk")

    root = small_disk / "checkpoints"
    first = checkpoint.save(Engine(1000), root, progress(1), CheckpointConfig())
    with pytest.raises(
        UserError,
        match=r"0\.00\d GB are free, at least 0\.004 GB are needed: the checkpoint of step 2 was",
    ):
        checkpoint.save(Large(0), root, progress(2), CheckpointConfig())
    assert checkpoint.newest_good(root, print) == first
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001"]


def test_an_error_that_is_not_the_disks_is_raised_as_it_is(tmp_path: Path) -> None:
    class Broken(Engine):
        def save_shards(self, *args: object, **kwargs: object) -> None:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.save(Broken(0), tmp_path, progress(1), CheckpointConfig())


def test_what_could_not_be_read_again_is_not_kept(tmp_path: Path) -> None:
    """A DeepSpeed whose shards hold another class fails at its first save, not at the resume."""

    class Newer(Engine):
        def save_shards(self, folder: Path, *args: object, **kwargs: object) -> None:
            (folder / "state").mkdir()
            torch.save(
                {"settings": CheckpointConfig()},
                folder / "state" / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            )

    checkpoint.save(Engine(1000), tmp_path, progress(1), CheckpointConfig())
    with pytest.raises(
        RuntimeError,
        match="names ship_ds.config.CheckpointConfig.* add it to ship_ds/runtime/pickles.py",
    ):
        checkpoint.save(Newer(0), tmp_path, progress(2), CheckpointConfig())
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        "state/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "rank-0.safetensors",
        "progress.json",
        "manifest.json",
    ],
)
def test_whatever_happened_to_the_newest_the_one_before_is_taken_and_saving_goes_on(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    config, said = CheckpointConfig(keep_last=1), []
    first = checkpoint.save(Engine(1000), tmp_path, progress(1), CheckpointConfig())
    second = checkpoint.save(Engine(1000), tmp_path, progress(3), CheckpointConfig())
    damage(second / name)
    assert (
        checkpoint.newest_good(tmp_path, [].append)
        == first
        == checkpoint.newest_good_to_resume(tmp_path, said.append)
    )
    assert (
        len(said) == 1 and "step-00000003: " in said[0] and "going on from step-00000001" in said[0]
    )
    # which then disagrees with some file
    assert name in said[0] or (damage, name) == (flip, "manifest.json")
    third = checkpoint.save(Engine(1000), tmp_path, progress(2), config)
    assert checkpoint.newest_good(tmp_path, said.append) == third and len(said) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step-00000002",
        "step-00000003.damaged",
    ]


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Let reads of a file of that name fail with that number from here on, as a disk does."""

    def begin(number: int, name: str) -> None:
        read_bytes, digest = Path.read_bytes, hashlib.file_digest

        def read(path: Path) -> bytes:
            if path.name == name:
                raise OSError(number, os.strerror(number), str(path))
            return read_bytes(path)

        def hashed(file: Any, algorithm: str) -> Any:
            if Path(file.name).name == name:
                raise OSError(number, os.strerror(number))  # which names no file
            return digest(file, algorithm)

        monkeypatch.setattr(Path, "read_bytes", read)
        monkeypatch.setattr(hashlib, "file_digest", hashed)

    return begin


@pytest.mark.parametrize("name", ["manifest.json", "rank-0.safetensors"])
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EIO, OSError),
        (errno.ESTALE, OSError),
        (errno.ETIMEDOUT, OSError),
        (errno.EACCES, UserError),
    ],
)
def test_what_cannot_be_read_now_is_no_damage(
    name: str,
    number: int,
    kind: type[Exception],
    tmp_path: Path,
    unreadable: Callable[[int, str], None],
) -> None:
    for step in (1, 2):
        checkpoint.save(Engine(1000), tmp_path, progress(step), CheckpointConfig())
    unreadable(number, name)
    with pytest.raises(kind, match=os.strerror(number)) as caught:
        checkpoint.newest_good_to_resume(tmp_path, print)
    assert str(tmp_path / "step-00000002" / name) in str(caught.value)
    assert sorted(path.name[-1] for path in checkpoint.checkpoints(tmp_path)) == ["1", "2"]


def test_saving_a_step_again_never_leaves_it_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkpoint.save(Engine(1000), tmp_path, progress(1), CheckpointConfig())
    assert checkpoint.save(Engine(1000), tmp_path, progress(1, 0.5), CheckpointConfig()) == first
    rename, names = Path.rename, []

    def killed_at_the_second(path: Path, target: Path) -> Path:
        names.append(path.name)
        if len(names) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(Engine(1000), tmp_path, progress(1, 0.7), CheckpointConfig())
    monkeypatch.undo()
    assert names == ["step-00000001", "step-00000001.part"] and not first.exists()
    assert (
        checkpoint.newest_good_to_resume(tmp_path, print) == first
        and checkpoint.read_progress(first).dev_score == 0.5
    )


def test_the_best_on_dev_is_kept_beside_the_newest_and_the_disk_cap_spares_both(
    tmp_path: Path,
) -> None:
    for step, score in enumerate((math.nan, 0.9, 0.3, None, 0.2), 1):
        checkpoint.save(
            Engine(100_000), tmp_path, progress(step, score), CheckpointConfig(keep_last=2)
        )
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["2", "4", "5"]
    checkpoint.save(
        Engine(100_000), tmp_path, progress(6), CheckpointConfig(keep_last=3, max_gigabytes=3e-4)
    )
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["2", "6"]


@pytest.mark.parametrize("cap", [None, 1e-6])
def test_the_last_one_before_bad_steps_is_kept_however_often_a_run_stops_within_them(
    cap: float | None, tmp_path: Path
) -> None:
    config = CheckpointConfig(keep_last=1, max_gigabytes=cap)
    for step, num_bad_steps in enumerate((0, 0, 1, 3, 7), 1):
        stopped = replace(progress(step), num_bad_steps=num_bad_steps)
        checkpoint.save(Engine(1000), tmp_path, stopped, config)
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["2", "5"]
    checkpoint.save(Engine(1000), tmp_path, progress(6), config)
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["6"]


@pytest.mark.parametrize("name", [PROGRESS, checkpoint.EVALUATION])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[]", "expected a JSON object, got list"),
        ("{", "line 1: not JSON"),
        (LFS_POINTER + "v1\n", "a Git LFS pointer"),
        ('{"dev_scores": 1}', "unknown key 'dev_scores'; "),
        ('{"step": "good"}', r"step: .*; "),
    ],
)
def test_what_is_beside_the_weights_in_another_form_is_one_line(
    name: str, content: str, line: str, tmp_path: Path
) -> None:
    folder = checkpoint.save(Engine(1000), tmp_path, progress(1), CheckpointConfig())
    checkpoint.record_evaluation(folder, 1)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=rf"step-00000001/{name}: {line}"):
        checkpoint.read_progress(folder)
    (folder / name).unlink()
    if name == checkpoint.EVALUATION:
        assert checkpoint.read_progress(folder) == progress(1)
    else:
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            checkpoint.read_progress(folder)


def test_a_bundle_of_a_checkpoint_with_an_empty_progress_is_one_line(tmp_path: Path) -> None:
    folder = checkpoint.save(Engine(1000), tmp_path, progress(1), CheckpointConfig())
    (folder / PROGRESS).write_text("{}")
    with pytest.raises(UserError, match=r"progress\.json: step: .*; name another checkpoint"):
        bundle_from_checkpoint(folder, tmp_path / "bundle")


def test_one_with_an_empty_progress_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(Engine(1000), tmp_path, progress(step), CheckpointConfig())
    (checkpoint.folder_of(tmp_path, 2) / PROGRESS).write_text("{}")
    said: list[str] = []
    good = checkpoint.newest_good_to_resume(tmp_path, said.append)
    assert good == checkpoint.folder_of(tmp_path, 1)
    assert "step-00000002: progress.json" in said[0] and "going on from step-00000001" in said[0]
    # And a later save, which asks all that are there for their scores, goes on.
    checkpoint.save(Engine(1000), tmp_path, progress(2), CheckpointConfig())


def test_scores_by_another_metric_make_no_checkpoint_the_best(tmp_path: Path) -> None:
    """The run went on with evaluation.best_by=rouge_l after step 2, whose exact match was high."""
    scores = ((0.1, "exact_match"), (0.9, "exact_match"), (0.3, "rouge_l"), (0.2, "rouge_l"))
    for step, (score, best_by) in enumerate(scores, 1):
        checkpoint.save(
            Engine(1000), tmp_path, progress(step, score, best_by), CheckpointConfig(keep_last=1)
        )
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["3", "4"]


def test_the_best_on_dev_is_by_the_metric_of_the_newest_that_has_a_score(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint there was scored on dev; name the one"):
        checkpoint.best_on_dev(tmp_path)
    scores = ((0.9, "exact_match"), (0.3, "rouge_l"), (0.4, "rouge_l"), (0.2, "rouge_l"))
    config = CheckpointConfig(keep_last=9)
    for step, (score, best_by) in enumerate(scores, 1):
        checkpoint.save(Engine(1000), tmp_path, progress(step, score, best_by), config)
    checkpoint.save(Engine(1000), tmp_path, progress(5), config)
    folder, then = checkpoint.best_on_dev(tmp_path)
    assert (folder.name[-1], then.step, then.dev_score, then.best_by) == ("3", 3, 0.4, "rouge_l")


def test_a_checkpoint_that_a_killed_save_set_aside_is_found(tmp_path: Path) -> None:
    """By whoever looks for the newest, not by the run alone."""
    checkpoint.save(Engine(1000), tmp_path, progress(1), CheckpointConfig())
    second = checkpoint.save(Engine(1000), tmp_path, progress(3), CheckpointConfig())
    second.rename(second.with_name(f"{second.name}.replaced"))
    assert checkpoint.newest_good(tmp_path, [].append) == second
    second.rename(second.with_name(f"{second.name}.replaced"))
    check_checkpoint(second)
    with pytest.raises(UserError, match="no checkpoint here"):
        check_checkpoint(tmp_path)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, states: dict[int, torch.Tensor]) -> None:
    """This rank's GPU is number 0 of one, and has a generator with this state."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: states[0])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state: states.__setitem__(0, state.clone())
    )


def test_generators_move_between_a_cpu_and_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stubs; a real GPU has not been tried."""
    said: list[str] = []
    state = {0: torch.arange(16, dtype=torch.uint8)}
    checkpoint._save_generators(tmp_path / "cpu")
    with monkeypatch.context() as on_gpu:
        pretend_gpu(on_gpu, state)
        checkpoint._load_generators(tmp_path / "cpu", said.append)
        assert said == [f"{tmp_path}: written without a GPU: dropout differs from here on"]
        checkpoint._save_generators(tmp_path / "gpu")
        state[0] = torch.zeros(16, dtype=torch.uint8)
        checkpoint._load_generators(tmp_path / "gpu", said.append)
        assert state[0].tolist() == list(range(16)) and len(said) == 1
    drawn = torch.rand(4)
    checkpoint._load_generators(tmp_path / "gpu", said.append)
    assert torch.equal(torch.rand(4), drawn) and len(said) == 1


def test_the_generator_of_this_ranks_gpu_is_taken_of_all_that_0_1_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {0: torch.arange(16, dtype=torch.uint8)}
    pretend_gpu(monkeypatch, state)
    checkpoint._save_generators(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    tensors["cuda0"], tensors["cuda1"] = tensors.pop("cuda"), torch.ones(16, dtype=torch.uint8)
    save_file(tensors, tmp_path / "old", metadata)
    state[0] = torch.zeros(16, dtype=torch.uint8)
    checkpoint._load_generators(tmp_path / "old", print)
    assert state[0].tolist() == list(range(16))
