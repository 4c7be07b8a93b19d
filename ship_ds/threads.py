"""Threads that let others work: how OpenMP's threads wait, and whether there are cores for them.

A thread that waits for the others of its group spins on its core, for milliseconds and longer. On
an idle machine that saves a little; beside another job it takes the very core that the awaited
thread needs, and a second of work becomes ten. So they sleep instead. torch's OpenMP reads this
as it is loaded: `wait_asleep` has to come before. Imports no torch.
"""

import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_WAITING = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
"""GNU's OpenMP, in torch's own builds, knows the first; Intel's waits 200 ms before it sleeps, and
the second ends that."""
_OTHERS = ("GOMP_SPINCOUNT", "KMP_LIBRARY")
"""With these a user says the same; they win."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def wait_asleep(environment: MutableMapping[str, str]) -> None:
    """Let the threads of this process, and of those that it starts, sleep while they wait.

    Args:
        environment: What a user set there on this matter stays as it is.
    """
    if not any(name in environment for name in (*_WAITING, *_OTHERS)):
        environment.update(_WAITING)


@dataclass(frozen=True)
class RankThreads:
    """What one process computes with.

    Args:
        host: Name of its node.
        threads: How many it computes with.
        cores: Numbers of those that it may run on.
        quota: How many cores' time its container gets; None without a limit.
    """

    host: str
    threads: int
    cores: frozenset[int]
    quota: float | None

    @classmethod
    def of_this_process(cls, threads: int) -> "RankThreads":
        """Ask the system for the rest."""
        return cls(os.uname().nodename, threads, frozenset(os.sched_getaffinity(0)), _quota())


def _quota() -> float | None:
    """ "200000 100000" is two cores, "max 100000" no limit."""
    try:
        allowed, period = _QUOTA.read_text(encoding="utf-8").split()
        return int(allowed) / int(period)
    except (OSError, ValueError):
        return None


def too_many_threads(ranks: Sequence[RankThreads]) -> str | None:
    """One line about the first node with fewer cores than threads; None where all have enough.

    Args:
        ranks: Every process of the run; those of a node may share its cores or have their own.
    """
    for host in dict.fromkeys(rank.host for rank in ranks):
        here = [rank for rank in ranks if rank.host == host]
        threads = sum(rank.threads for rank in here)
        cores = len(frozenset().union(*(rank.cores for rank in here)))
        quotas = [rank.quota for rank in here if rank.quota is not None]
        cores = min([cores, *(max(1, int(quota)) for quota in quotas)])
        if threads > cores:
            each = max(1, cores // len(here))
            return (
                f"{threads} threads of {len(here)} process(es) share {cores} core(s) of {host} and "
                f"wait for each other: OMP_NUM_THREADS={each}, or training.threads={each} in a "
                "run's config"
            )
    return None
