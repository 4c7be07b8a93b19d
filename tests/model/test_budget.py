"""Rows at once: the budget's arithmetic, and what it says of memory against what is measured."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ship_ds.model import budget
from ship_ds.model.batch import TokenBatch
from ship_ds.model.budget import Piece, batches, bytes_of_row, ranks_on_node, rows_at_once
from ship_ds.model.generation import greedy
from ship_ds.model.language_model import language_model
from tests.model.models import tiny_lm


def test_rows_fill_the_free_bytes_and_are_one_at_least() -> None:
    # 10 bytes a token, 100 + 20 tokens: 1,200 bytes a row
    assert rows_at_once(12_000, 10, 100, 20) == 10
    assert rows_at_once(100, 10, 100, 20) == 1
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
        "proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 10 kB\n",
        "proc/self/cgroup": "0::/slurm/job_1\n",
        "sys/fs/cgroup/slurm/job_1/memory.max": "max\n",
        "sys/fs/cgroup/slurm/memory.max": "9000\n",
        "sys/fs/cgroup/slurm/memory.current": "7000\n",
        "sys/fs/cgroup/slurm/memory.stat": "anon 4000\ninactive_file 3000\nactive_file 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert budget._available(tmp_path) == 9000 - 7000 + 3000
    (tmp_path / "sys/fs/cgroup/slurm/memory.max").write_text("max\n")
    assert budget._available(tmp_path) == 10 * 1024


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside that live at a time, by their storages; a model's
    weights are none of them, though views of them are made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.weights = {one.untyped_storage()._cdata for one in model.parameters()}
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._sweep()
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = storage._cdata in self.storages or storage._cdata in self.weights
                if not known and storage.nbytes():
                    reference = torch.multiprocessing.reductions.StorageWeakRef(storage)
                    self.storages[storage._cdata] = (reference, storage.nbytes())
        self.live = sum(size for _, size in self.storages.values())
        self.peak = max(self.peak, self.live)
        return out

    def _sweep(self) -> None:
        gone = [key for key, (one, _) in self.storages.items() if one.expired()]
        for key in gone:
            del self.storages[key]


@pytest.mark.parametrize("width,new", [(100, 8), (30, 90), (4, 120)])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@torch.no_grad()
def test_decoding_needs_what_the_costs_say(family: str, width: int, new: int) -> None:
    lm = language_model(model := tiny_lm(family))
    prompts = TokenBatch.of_lengths(16, width, 0, device="cpu")
    with LiveBytes(model) as measured:
        greedy(lm.stream(prompts), -1, new)
    assert 16 * lm.costs.decoded_row(width, new) == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_scoring_needs_what_the_costs_say(family: str) -> None:
    lm = language_model(model := tiny_lm(family))
    batch = TokenBatch.of_lengths(16, 70, 30, device="cpu")
    with LiveBytes(model) as measured:
        logits, labels = lm.score(batch)
        torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    assert 16 * lm.costs.scored_row(100, 30) == pytest.approx(measured.peak, rel=0.1)
