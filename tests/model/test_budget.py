"""Rows at once: the budget's arithmetic, and what it says of memory against what is measured."""

from pathlib import Path

import pytest
import torch

from ship_ds.model import budget
from ship_ds.model.batch import TokenBatch
from ship_ds.model.budget import Piece, batches, bytes_of_row, ranks_on_node
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import language_model
from ship_ds.planner.live_bytes import LiveBytes
from tests.model.models import tiny_lm


def test_a_row_costs_its_heavier_moment() -> None:
    # 10 bytes a token, 100 + 20 tokens
    assert bytes_of_row(10, 100, 20) == 1_200
    # reading 1,000 + 5,000 bytes is more than continuing: 1,200 + 50
    assert bytes_of_row(10, 100, 20, reading=5_000, logits=50) == 6_000
    assert bytes_of_row(10, 100, 20, reading=100, logits=50) == 1_250


def test_batches_hold_every_row_once_the_longest_first_and_cut_what_does_not_fit() -> None:
    widths = [[3, 4], [9, 2], [5, 5], [1], [7] * 7]
    made = list(batches(widths, 60, lambda width: 3 * width, task_bytes=2))
    assert made[:3] == [
        [Piece(3, 0, 1)],
        [Piece(1, 0, 2)],
        [Piece(2, 0, 2)],
    ]
    # two rows of 21 bytes beside 2 of the task
    assert made[4:] == [[Piece(4, 0, 2)], [Piece(4, 2, 4)], [Piece(4, 4, 6)], [Piece(4, 6, 7)]]
    rows = [(p.task, row) for batch in made for p in batch for row in range(p.start, p.stop)]
    assert sorted(rows) == [(t, row) for t, own in enumerate(widths) for row in range(len(own))]


def test_ranks_of_a_node_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks_on_node({}) == 1 and ranks_on_node({"LOCAL_WORLD_SIZE": "8"}) == 8
    assert ranks_on_node({"LOCAL_SIZE": "2"}) == ranks_on_node({"SLURM_NTASKS_PER_NODE": "2"}) == 2
    monkeypatch.setattr(budget, "_available", lambda: 800)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert budget.bytes_free(torch.device("cpu")) == 200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert budget.bytes_free(torch.device("cpu")) == 50


def test_a_container_or_a_job_has_what_its_limit_leaves(tmp_path: Path) -> None:
    for name, text in {
        "proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 10 kB\nSwapTotal: 2 kB\n",
        "proc/self/cgroup": "0::/slurm/job_1\n",
        "sys/fs/cgroup/slurm/job_1/memory.max": "max\n",
        "sys/fs/cgroup/slurm/memory.max": "9000\n",
        "sys/fs/cgroup/slurm/memory.current": "7000\n",
        "sys/fs/cgroup/slurm/memory.stat": "anon 4000\ninactive_file 3000\nactive_file 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert budget._available(tmp_path) == 9000 - 7000 + 3000
    assert budget.host_bytes(tmp_path) == 9000 + 2048
    (tmp_path / "sys/fs/cgroup/slurm/memory.max").write_text("max\n")
    assert budget._available(tmp_path) == 10 * 1024
    assert budget.host_bytes(tmp_path) == 101 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("width,new", [(100, 8), (30, 90), (4, 120)])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@torch.no_grad()
def test_decoding_needs_what_the_costs_say(family: str, width: int, new: int) -> None:
    lm = language_model(model := tiny_lm(family))
    prompts = TokenBatch.of_lengths(16, width, 0, device="cpu")
    with LiveBytes(model.parameters()) as measured:
        greedy(lm.stream(prompts), -1, new)
    assert 16 * lm.costs.decoded_row(width, new) == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_scoring_needs_what_the_costs_say(family: str) -> None:
    lm = language_model(model := tiny_lm(family))
    batch = TokenBatch.of_lengths(16, 70, 30, device="cpu")
    with LiveBytes(model.parameters()) as measured:
        logits, labels = lm.score(batch)
        torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    assert 16 * lm.costs.scored_row(100, 30) == pytest.approx(measured.peak, rel=0.1)


def test_what_is_kept_leaves_room_for_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU what lies there already is not free; on a CPU a batch takes a small part anyway."""
    monkeypatch.setattr(budget, "bytes_free", lambda device: 1000)
    assert budget.bytes_to_keep(torch.device("cuda")) == 250
    assert budget.bytes_to_unpack(torch.device("cuda")) == 0
    assert budget.bytes_beside_kept(torch.device("cuda")) == 750
    assert budget.bytes_to_keep(torch.device("cpu")) == 1000
    assert budget.bytes_beside_kept(torch.device("cpu")) == 1000
