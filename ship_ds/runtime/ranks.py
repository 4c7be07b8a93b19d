"""Ranks of a run: started by deepspeed, torchrun or srun, or a single process."""

import atexit
import contextlib
import itertools
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from pydantic_core import to_json
from torch import Tensor

from ship_ds.console import log, log_from_any_rank
from ship_ds.errors import UserError, first_line
from ship_ds.exit_codes import INTERRUPTED
from ship_ds.files import refuse_other_writers
from ship_ds.runtime import compiled_ops
from ship_ds.threads import RankThreads, too_many_threads

_KNOWN_NOTICES = (
    "Setting accelerator to CPU",
    # an adapter leaves the hypernetwork; its linears have hooks of their own
    "A module has unknown inputs or outputs type",
)
SINGLE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def is_launched() -> bool:
    """Whether deepspeed, torchrun or srun started this process as one of several ranks."""
    return "WORLD_SIZE" in os.environ or slurm_ranks(os.environ) is not None


_WAIT = timedelta(hours=6)
"""For the slowest rank before training: rank 0 reads and tokenises the data first. Later the
watchdog is quicker."""


def start(threads: int | None, deepspeed_config: Mapping[str, Any] | None = None) -> None:
    """Compile the ops that this config of DeepSpeed asks for, then join the process group.

    A process started by none of the launchers is a group of one.

    Tensors on the CPU travel by gloo, those on a GPU by NCCL.
    """
    quiet_libraries()
    import deepspeed

    if "WORLD_SIZE" not in os.environ:
        os.environ.update(slurm_ranks(os.environ) or SINGLE)
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        choose_gpu()
    else:
        refuse_unseen_gpus(os.environ)
    ops = compiled_ops.needed(deepspeed_config or {})
    # Each node has a folder of compiled ops, and rank 0 sees one of them alone.
    compiled_ops.build(ops, log_from_any_rank)
    compiled_ops.skip_inference_op()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=_WAIT)
    log_threads()


def choose_gpu() -> None:
    """Make this rank's GPU the current one.

    A task that Slurm binds to one GPU sees that one alone, whatever its local rank is. DeepSpeed
    reads LOCAL_RANK by itself as the number of a device, so it is written back.
    """
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)


def refuse_unseen_gpus(environment: Mapping[str, str]) -> None:
    """See that a job which Slurm has given GPUs does not train on processors: every node's ranks
    ask, since torch may see the cards of one and not those of another.

    Args:
        environment: of a process in which torch sees no GPU.

    Raises:
        UserError: there are GPUs, and nobody hides them (CUDA_VISIBLE_DEVICES).
    """
    count = environment.get("SLURM_GPUS_ON_NODE", "0")
    # Slurm itself hides those of a step that asked for none: "NoDevFiles" in its older versions.
    is_hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    if not count.isdecimal() or int(count) == 0 or is_hidden:
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for processors alone"
    raise UserError(
        f"{os.uname().nodename}: Slurm gives {count} GPU(s) here, and torch {torch.__version__}, "
        f"built {built}, sees none: install torch for the driver's CUDA, or hand the GPUs to the "
        "container (apptainer: --nv); CUDA_VISIBLE_DEVICES=-1 trains on processors"
    )


def exit_process(code: int) -> NoReturn:
    """End this program, which may have `start`ed: everything is flushed, and the interpreter is not
    taken down.

    gloo's threads may still hold a finished collective and its Python objects; to drop them while
    the interpreter is taken down aborts the process ("terminate called without an active
    exception", pytorch/pytorch#179291), and a run that is done would count as crashed.
    `destroy_process_group` does not wait for those threads while DeepSpeed holds the groups.
    """
    _ignore_interrupts()
    if dist.is_initialized():
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a program and end the process with its code; an exception is printed and is code 1, an
    interrupt from the keyboard is a line and 130, and the end of another rank a line and 1.

    An exception that leaves the program would take the interpreter down, which may wait for ever
    for a process group whose other ranks are still at work (see `exit_process`).
    """
    refuse_other_writers()
    try:
        code = main()
    except KeyboardInterrupt:
        code = say_interrupted()
    except Exception as error:
        code = 1
        # A log on a full disk does not keep this process from its end.
        with contextlib.suppress(OSError):
            if has_lost_a_peer(error):
                # Who ended has said why, and where this rank waited for it says little.
                log_from_any_rank(
                    f"rank {rank()}: another rank has ended, or the network to it: see what it "
                    f"says ({first_line(error)})"
                )
            else:
                sys.excepthook(*sys.exc_info())
    exit_process(code)


def say_interrupted() -> int:
    """One line for who ended a training from the keyboard, and the exit code; a further interrupt
    is ignored."""
    _ignore_interrupts()
    # A log on a full disk does not keep this process from its end.
    with contextlib.suppress(OSError):
        log("interrupted: the same command goes on from the newest checkpoint, where there is one")
    return INTERRUPTED


def _ignore_interrupts() -> None:
    """This process is about to end, and a second interrupt would add a trace of whatever it is
    leaving. A handler, since children would inherit SIG_IGN."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: None)


def has_lost_a_peer(error: Exception) -> bool:
    """Whether gloo says so; NCCL leaves it to its watchdog, which ends the process by itself."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


_LOST = ("Connection closed by peer", "Connection reset by peer")


def quiet_libraries() -> None:
    """Keep the terminal for what a user can act on: no progress bar a model loaded, no notice that
    repeats at every step."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: not record.getMessage().startswith(_KNOWN_NOTICES)
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # peft 0.21 asks for it under its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    # Of peft's SHiRA, whose places were checked as they were read or drawn.
    warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")


def log_threads() -> None:
    """Log one line where a node of this run has fewer cores than threads; every rank calls it."""
    here = RankThreads.of_this_process(torch.get_num_threads())
    if (line := too_many_threads(gather_objects(here, RankThreads))) is not None:
        log(line)


def device_of_rank(name: str) -> str:
    """What `--device` means on this rank: of several, "auto" and "cuda" are this rank's own GPU.
    Where there is none, what was asked for stays, to be refused."""
    has_own = world_size() > 1 and torch.cuda.is_available()
    return str(device()) if has_own and name in ("auto", "cuda") else name


def device() -> torch.device:
    """This rank's own: its GPU, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str] | None:
    """What torch wants to know, from the variables that `srun` sets for every task; None outside
    `srun`.

    The port follows the job id, so that two jobs on a node do not meet; MASTER_ADDR and MASTER_PORT
    can be set beforehand. A single task needs no node's name, which may resolve nowhere.
    """
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NODELIST" not in environment:
        return None
    num_ranks = environment["SLURM_STEP_NUM_TASKS"]
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": num_ranks,
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or (
            SINGLE["MASTER_ADDR"]
            if num_ranks == "1"
            else slurm_nodes(environment["SLURM_STEP_NODELIST"], environment)[0]
        ),
        "MASTER_PORT": environment.get("MASTER_PORT", str(slurm_port(environment))),
    }


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port by the job's id, and another one after each requeue, in case the first was taken; all
    below those that Linux hands out by itself (32768 and more)."""
    number = 31 * int(environment["SLURM_JOB_ID"])
    number += 7919 * int(environment.get("SLURM_RESTART_COUNT", "0"))
    return _FIRST_PORT + number % _NUM_PORTS


_FIRST_PORT, _NUM_PORTS = 10_007, 22_003


def slurm_nodes(compact: str, environment: Mapping[str, str]) -> list[str]:
    """ "node[1-2]" -> ["node1", "node2"]; `slurm/train.sh` has asked already, since a container has
    no `scontrol`."""
    if "SHIP_DS_NODES" in environment:
        return environment["SHIP_DS_NODES"].split()
    try:
        return subprocess.run(
            ["scontrol", "show", "hostnames", compact], capture_output=True, text=True, check=True
        ).stdout.split()
    # In a container that was not started by slurm/train.sh; one that has `scontrol` may lack its
    # slurm.conf.
    except (OSError, subprocess.CalledProcessError):
        return expanded_nodes(compact)


def expanded_nodes(compact: str) -> list[str]:
    """ "gpu[08-10],login" -> ["gpu08", "gpu09", "gpu10", "login"]."""
    nodes: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", compact):
        parts = [
            [name for one in part[1:-1].split(",") for name in _numbers(one)]
            if part.startswith("[")
            else [part]
            for part in re.findall(r"\[[^\]]*\]|[^\[]+", item)
        ]
        nodes += ["".join(names) for names in itertools.product(*parts)]
    return nodes


def _numbers(text: str) -> list[str]:
    first, _, last = text.partition("-")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]


def rank() -> int:
    """This process among all of the run; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_per_node() -> int:
    """How many ranks share a machine; 1, with a line, where the machines have different numbers of
    them. Every rank calls it."""
    counts = set(Counter(gather_objects(platform.node())).values())
    if len(counts) > 1:
        log(f"nodes have {min(counts)} to {max(counts)} ranks: nothing is shared within a node")
        return 1
    return counts.pop()


def first_on_this_node() -> int:
    """The first of the ranks that share this rank's machine. Every rank calls it."""
    return gather_objects(platform.node()).index(platform.node())


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's values, the same on all."""
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: Any, kind: Any = Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank.

    They travel as JSON: torch's own function sends pickles, and whoever reaches the group's port
    could then run code on every rank.

    Args:
        value: of this rank.
        kind: its type, where JSON alone would lose it, such as a dataclass.
    """
    return [value] if world_size() == 1 else _gather(_written(value), kind)


def _written(value: Any) -> bytes:
    # By the value's own types, whatever it stands in, or NaN would go as null.
    return to_json(value, inf_nan_mode="constants")


def _read(text: bytes, kind: Any) -> Any:
    return TypeAdapter(kind).validate_python(json.loads(text))


def _gather(sent: bytes, kind: Any) -> list[Any]:
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(sent)]))
    longest = max(int(length) for length in lengths)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(texts, torch.frombuffer(bytearray(sent.ljust(longest)), dtype=torch.uint8))
    return [_read(text.numpy().tobytes(), kind) for text in texts]


def gather_results(work: Callable[[], Any], kind: Any = Any) -> list[Any]:
    """As `gather_objects`, of what each rank's work returns; where it fails on one rank, it ends on
    all of them, and none waits for what will not come.

    Args:
        work: what this rank does.
        kind: of what it returns.

    Raises:
        RankError: on the other ranks, in one line what went wrong on one.
        UserError: likewise, for what a user can mend.
    """
    if world_size() == 1:
        return [work()]
    try:
        sent = _written(_Answer(work()))
    except Exception as error:
        # The others wait for this rank's result, which may also be one that cannot be written.
        failed: _Answer[Any] = _Answer(None, first_line(error), isinstance(error, UserError))
        _gather(_written(failed), _Answer[kind])
        raise
    answers = _gather(sent, _Answer[kind])
    for number, one in enumerate(answers):
        if one.failure is not None:
            raise (UserError if one.is_users else RankError)(f"rank {number}: {one.failure}")
    return [one.result for one in answers]


class RankError(RuntimeError):
    """Another rank could not do its share."""


_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Answer(Generic[_Result]):
    """A rank's result, or why it has none."""

    result: _Result | None
    failure: str | None = None
    is_users: bool = False
