"""Shared by the tests: runs of the smoke recipe, each trained once a session; that of two ranks as
a user starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha1
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from ship_ds.files import sha256
from tests import warm

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 240
TRAIN = ("-m", "ship_ds.train")


def environment(**variables: str) -> dict[str, str]:
    """The repository's own op cache and no hub; a program that is aborted shows where it was."""
    return {
        **os.environ,
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
        "TORCH_EXTENSIONS_DIR": os.environ.get(
            "TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".build" / "torch_extensions")
        ),
        **variables,
    }


def start(
    arguments: Sequence[str], timeout: int = TIMEOUT_SECONDS, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a python command from the repository to its end, with these environment variables too.

    A command that takes too long, and all that it started, is ended, and the test fails with the
    stack of each: a hang that was seen once on another machine cannot be asked later.
    """
    # -X: a test may pass -E, which ignores the variable.
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", *arguments],
        cwd=REPOSITORY,
        env=environment(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            time.sleep(2)  # a stack is written in much less
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            pytest.fail(
                f"{arguments}: not done after {timeout} s\n{stdout[-2000:]}\n{stderr[-8000:]}"
            )
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def start_warm(
    arguments: Sequence[str], timeout: int = TIMEOUT_SECONDS, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The same in a process that has the libraries loaded (warm.py), for what need not be fresh."""
    try:
        return warm.run(arguments, timeout, environment(**variables), REPOSITORY)
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"{late}\n{late.stdout[-2000:]}\n{late.stderr[-8000:]}")


def free_port() -> str:
    """A port of this machine that nobody listens on, for ranks to meet at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def train_smoke(folder: Path, *launcher: str) -> Path:
    """By that launcher and its program, or as `python -m ship_ds.train`."""
    arguments = ["--config", "quickstart-smoke", f"run.folder={folder}"]
    done = start([*launcher, *arguments]) if launcher else start_warm([*TRAIN, *arguments])
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def train_each(*starts: Sequence[str], **variables: str) -> str:
    """Train as each of these argument lists says, in one process (starts.py); what was said."""
    return _train_in_one_process([{"arguments": list(one)} for one in starts], variables)


def train_and_go_on(folder: Path, arguments: Sequence[str], **variables: str) -> None:
    """Train four steps into FOLDER and then, as after a crash, the last two once more from the
    checkpoint before them; the first rows are in `starts.FIRST` there."""
    steps = ["training.steps=4", "checkpoint.every_steps=2"]
    whole = ["--config", "quickstart-smoke", f"run.folder={folder}", *steps, *arguments]
    starts = [{"arguments": whole}, {"crashed": str(folder), "arguments": whole}]
    said = _train_in_one_process(starts, variables)
    # One that started over would repeat the steps as well, and one from the end has none to repeat.
    assert "after step 2\n" in said, said[-2000:]


def _train_in_one_process(starts: Sequence[dict[str, Any]], variables: dict[str, str]) -> str:
    done = start_warm(["-m", "tests.starts", json.dumps(starts)], timeout=400, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


# A test of a run takes as long as the run, and is in the run's tier.
_TIERS = {
    "two_rank_run": pytest.mark.distributed,
    "one_rank_run": pytest.mark.slow,
    "pooled_run_folder": pytest.mark.slow,
    "smollm2": pytest.mark.slow,
}


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of `-m gpu`: the others are written for CPU ranks, and a
    rank that sees a GPU takes it."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put each test that asks for a run above into its tier; others say theirs themselves. Put
    them in order, for several processes that take a file each. Of the soak tests keep the share
    that SHARD names: 2/10 is the second, twelfth, ... of them."""
    for item in items:
        for name in _TIERS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(_TIERS[name])
    # First what takes longest, so that at the end no process works on one such file alone.
    long_files = {
        item.path
        for item in items
        if item.get_closest_marker("distributed") or item.get_closest_marker("slurm")
    }
    items.sort(key=lambda item: item.path not in long_files)
    number, _, num_shards = os.environ.get("SHARD", "1/1").partition("/")
    soak = [item for item in items if item.get_closest_marker("soak")]
    others = set(soak) - set(soak[int(number) - 1 :: int(num_shards)])
    items[:] = [item for item in items if item not in others]


def once(factory: pytest.TempPathFactory, name: str, train: Callable[[Path], object]) -> Path:
    """A run that the test processes share: the first that asks trains it, the others wait."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each process has a folder of its own in it
    folder = root / name
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            train(folder / "run")
            (folder / "done").touch()
    return folder / "run"


@pytest.fixture(scope="session")
def two_rank_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By DeepSpeed's launcher; runs that others start are compared with it to the bit."""
    return once(tmp_path_factory, "two_ranks", train_two_ranks)


def train_two_ranks(folder: Path) -> Path:
    launcher = (
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        "2",
        "--master_port",
        free_port(),
    )
    return train_smoke(folder, *launcher, "ship_ds/train.py")


@pytest.fixture(scope="session")
def one_rank_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "one_rank", train_smoke)


@pytest.fixture(scope="session")
def pooled_run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one rank (pooled_run.py), with what went on from its middle beside it in `again`."""
    return once(tmp_path_factory, "pooled", train_pooled)


def train_pooled(folder: Path) -> None:
    again = folder.with_name("again")
    done = start_warm(["-m", "tests.pooled_run", str(folder), str(again)], timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "after step 2\n" in done.stderr


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, Any]]]:
    return lambda folder: [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as `ship-ds base smollm2` makes it. Reading the GGUF takes most of a
    minute on one core, so the folder stays in .build/ for as long as what makes it is the same."""
    pytest.importorskip("gguf")
    makers = [REPOSITORY / "ship_ds" / name for name in ("gguf_base.py", "smollm2.py", "wheels.py")]
    key = [*(sha256(maker) for maker in makers), version("transformers"), version("torch")]
    folder = REPOSITORY / ".build" / f"smollm2-{sha1(repr(key).encode()).hexdigest()[:12]}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            done = start_warm(["-m", "ship_ds.cli", "base", "smollm2", "--out", str(folder)])
            assert done.returncode == 0, done.stderr[-4000:]
    return folder
