"""`ship-ds supply`: a kind, its journal, and the file that is written."""

from collections import Counter
from pathlib import Path
from typing import Any

from ship_ds.api import Ship
from ship_ds.console import Log
from ship_ds.errors import UserError
from ship_ds.evaluation.config import EndpointConfig
from ship_ds.evaluation.endpoint import ChatEndpoint
from ship_ds.supply.answers import EndpointTeacher, TaskLlmTeacher, Teacher, answer_tasks
from ship_ds.supply.chains import make_chains
from ship_ds.supply.compress import compress_tasks
from ship_ds.supply.config import (
    AnswersConfig,
    ChainsConfig,
    CompressConfig,
    DisagreementConfig,
    ProposeConfig,
    SupplyConfig,
)
from ship_ds.supply.disagreement import measure_disagreement, weighted_by_disagreement
from ship_ds.supply.journal import Journal
from ship_ds.supply.known import Known, known_tasks
from ship_ds.supply.propose import propose
from ship_ds.supply.proposers import (
    DecoderProposer,
    EndpointProposer,
    Proposer,
    TaskLlmProposer,
)

_MOST_NEW = 64
"""Tasks that are written by a kind that makes new ones."""


def make(
    ship: Ship,
    config: SupplyConfig,
    kind: str,
    out: Path,
    data: Path | None,
    num_tasks: int | None,
    seed: int,
    endpoint: EndpointConfig,
    log: Log,
) -> Counter[str]:
    """How many things met what end; the file is then there.

    Args:
        ship: the run.
        config: of the kind.
        kind: as a user names it.
        out: the file to write.
        data: tasks to start from; None: the run's own.
        num_tasks: to write or to look at, at most; None: 64 to write, all to look at.
        seed: of every draw.
        endpoint: for proposals and answers by one.
        log: takes lines of progress.

    Raises:
        UserError: nothing was kept, the tasks cannot be read, or the journal is another one's.
    """
    known = known_tasks(ship, data, log)
    asked: dict[str, Any] = {
        "kind": kind,
        "--set": config.model_dump(mode="json"),
        "--run": ship.digest,
        "--data": known.fingerprint,
        "--num-tasks": num_tasks,
        "--seed": seed,
    }
    if getattr(config, "by", "") == "endpoint":
        asked["--endpoint"] = [endpoint.url, endpoint.model]
    with Journal.opened(out, asked) as journal:
        if journal.parts:
            log(f"{out}: going on after {len(journal.parts)} parts, {len(journal.tasks)} tasks")
        _work(ship, config, out, known, num_tasks, seed, endpoint, journal, log)
        counts = journal.counts
        if known.left_out:
            counts["held-out rules of --data"] = known.left_out
        if not journal.tasks:
            # Or the same file with another --set would be refused as begun by other settings.
            journal.drop()
            ends = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UserError(f"{out}: no task was kept ({ends}); lower a bound by --set")
        if isinstance(config, DisagreementConfig):
            journal.finish(weighted_by_disagreement(journal.tasks, config.floor))
        else:
            journal.finish()
    return counts


def _work(
    ship: Ship,
    config: SupplyConfig,
    out: Path,
    known: Known,
    num_tasks: int | None,
    seed: int,
    endpoint: EndpointConfig,
    journal: Journal,
    log: Log,
) -> None:
    most = _MOST_NEW if num_tasks is None else num_tasks
    if isinstance(config, ProposeConfig):
        proposer = _proposer(ship, config, out, endpoint)
        propose(ship, proposer, known, config, most, seed, journal, log)
    elif isinstance(config, DisagreementConfig):
        measure_disagreement(ship, known.tasks[:num_tasks], config, seed, journal, log)
    elif isinstance(config, CompressConfig):
        compress_tasks(ship, known, num_tasks, config, journal, log)
    elif isinstance(config, ChainsConfig):
        make_chains(ship, known, config, most, seed, journal, log)
    elif isinstance(config, AnswersConfig):
        teacher = _teacher(ship, config, out, endpoint)
        answer_tasks(ship, teacher, known, num_tasks, config, seed, journal, log)


def _teacher(ship: Ship, config: AnswersConfig, out: Path, endpoint: EndpointConfig) -> Teacher:
    if config.by == "task_llm":
        return TaskLlmTeacher(ship)
    whole = _endpoint(endpoint, out, "the teacher", "set by=task_llm")
    return EndpointTeacher(whole, ship.config.evaluation.max_new_tokens)


def _proposer(ship: Ship, config: ProposeConfig, out: Path, endpoint: EndpointConfig) -> Proposer:
    if config.by == "decoder":
        if not ship.model.decodes:
            raise UserError("--set by=decoder: this run trained no decoder; try by=task_llm")
        return DecoderProposer(ship, config)
    if config.by == "task_llm":
        return TaskLlmProposer(ship, config)
    return EndpointProposer(_endpoint(endpoint, out, "the proposer", "set by=decoder"), config)


def _endpoint(config: EndpointConfig, out: Path, who: str, instead: str) -> ChatEndpoint:
    """It keeps its replies beside the file."""
    return ChatEndpoint(config, out.with_name(out.name + ".replies"), who, instead)
