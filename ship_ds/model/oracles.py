"""Oracles: the generated LoRA of a task is to do what one does that was trained by gradient on that
task's examples, as TAGI (Liao et al. 2024, arXiv 2406.12382) and Text-to-LoRA (Charakorn et al.
2025, arXiv 2506.06105, section 3.2) have it.

    ship-ds oracles --config RECIPE --out BANK
    loss: {oracles: {weight: 0.1, bank: BANK}}

Letters: T tasks, J sites of a group, R LoRA rank, I inputs of a linear, O outputs of a linear,
Z latent size, X other letters flattened.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from ship_ds.config import OraclesConfig
from ship_ds.data.sampler import TaskDraw
from ship_ds.errors import UserError
from ship_ds.model.adapters.adapter import Sites
from ship_ds.model.adapters.lora import LoraAdapter
from ship_ds.model.batch import OnDevice
from ship_ds.model.objectives import Objective, Training
from ship_ds.model.step import Outputs, Parts, ShipBatch
from ship_ds.oracle_bank import (
    SETTING,
    SPREADS,
    OracleBank,
    check_files,
    check_made_for,
    examples_digest,
    fingerprint,
    read_bank,
)

if TYPE_CHECKING:
    from ship_ds.model.collate import Collator

ROWS = "oracles_TX"
"""Of a group's file."""
SITE_SPREADS = "spreads"
"""Of the bank's, by site, in the order of `RowLayout.paths`."""
DTYPE = torch.bfloat16
"""Of the rows: half of what fp32 takes. The rounding is a five-hundredth of a number."""


@dataclass(frozen=True)
class RowLayout:
    """Where A and B of each site lie in the row of a task: sites of one shape are a group, of which
    A comes first, as J x R x I numbers, and then B, as J x O x R.

    groups: the sites of each shape (in, out).
    """

    rank: int
    groups: Mapping[tuple[int, int], tuple[str, ...]]

    @classmethod
    def of(cls, sites: Sites, rank: int) -> "RowLayout":
        """For LoRAs of these sites, in whatever order these come: two models of one base need not
        list them in the same one."""
        groups: dict[tuple[int, int], tuple[str, ...]] = {}
        for path, shape in sorted(sites.items()):
            groups[shape] = (*groups.get(shape, ()), path)
        return cls(rank, groups)

    @property
    def paths(self) -> list[str]:
        """Every site, in the order of the groups."""
        return [path for paths in self.groups.values() for path in paths]

    @property
    def num_numbers(self) -> int:
        """Of a row."""
        return self.rank * sum(sum(shape) * len(paths) for shape, paths in self.groups.items())

    def row(self, lora: LoraAdapter) -> Tensor:
        """The LoRAs of T tasks, (T, X)."""
        halves = [
            torch.stack([lora.factors[path][half] for path in paths], 1).flatten(1)
            for paths in self.groups.values()
            for half in (0, 1)
        ]
        return torch.cat(halves, 1)

    def factors(self, rows_TX: Tensor) -> Iterator[tuple[tuple[str, ...], Tensor, Tensor]]:
        """The sites of each group with their A (J, T, R, I) and B (J, T, O, R), views of rows."""
        start = 0
        for (num_in, num_out), paths in self.groups.items():
            shapes = (len(paths), self.rank, num_in), (len(paths), num_out, self.rank)
            halves = []
            for shape in shapes:
                half_TX = rows_TX[:, start : (start := start + _product(shape))]
                halves.append(half_TX.view(-1, *shape).transpose(0, 1))
            yield paths, halves[0], halves[1]


def _product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def squared_distances(
    made: tuple[Tensor, Tensor], aims: tuple[Tensor, Tensor], scalings: tuple[float, float]
) -> Tensor:
    """|s B A - s' B' A'|^2 of each site and task, (J, T), by products of R x R numbers: no update
    is ever formed.

    Both are one LoRA of twice the rank, with the sign in its B, so that all three inner products
    take two matrix products.

    Args:
        made: A (J, T, R, I) and B (J, T, O, R).
        aims: of the other one.
        scalings: of both.
    """
    a = torch.cat([made[0].float(), aims[0].float()], 2)
    b = torch.cat([made[1].float() * scalings[0], aims[1].float() * -scalings[1]], 3)
    squared_JT: Tensor = ((b.mT @ b) * (a @ a.mT)).sum((2, 3))
    return squared_JT


@dataclass(frozen=True)
class OracleRows(OnDevice):
    """The oracles of a micro-batch's tasks.

    rows_TX: see `RowLayout`; zeros of a task without. has_one_T: 1 where a task has an oracle, else
    0. spreads: of each site. count: tasks that have one.
    """

    rows_TX: Tensor
    has_one_T: Tensor
    spreads: Tensor
    count: int


class OpenBank:
    """The rows of a bank, read from the mapped files as they are asked for.

    places: task id -> the group's rows and the row in them.
    """

    def __init__(self, folder: Path, bank: OracleBank, known: Mapping[str, str]) -> None:
        """Open all files.

        Args:
            folder: of the bank.
            bank: its description.
            known: id -> digest of the examples of the tasks that may be asked for; others have no
                oracle, nor has one that was trained on other examples.
        """
        self.places: dict[str, tuple[Tensor, int]] = {}
        for file, ids in bank.groups():
            rows_TX = mapped(folder / file, ROWS)
            self.places |= {
                one: (rows_TX, row)
                for row, one in enumerate(ids)
                if known.get(one) == bank.tasks[one]
            }
        self.spreads = mapped(folder / SPREADS, SITE_SPREADS).clone()

    def rows(self, ids: Sequence[str], num_numbers: int) -> OracleRows:
        """The oracles of these tasks, on the host."""
        rows_TX = torch.zeros(len(ids), num_numbers, dtype=DTYPE, device="cpu")
        has_one = [one in self.places for one in ids]
        for row_X, one in zip(rows_TX, ids, strict=True):
            if one in self.places:
                group_TX, row = self.places[one]
                row_X.copy_(group_TX[row])
        has_one_T = torch.tensor(has_one, dtype=torch.float32, device="cpu")
        return OracleRows(rows_TX, has_one_T, self.spreads, sum(has_one))


def mapped(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, backed by the file's pages until it is copied."""
    with torch.device("cpu"), safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


class OracleDistance(Objective):
    """The squared distance of the generated update B A from the oracle's, in units of the oracles'
    mean squared distance from their mean, averaged over the sites: predicting the mean oracle
    costs 1, as where Charakorn et al. (2025) standardise their targets.

    Of the updates and not of A and B, which TAGI and the baselines here compare: other factors of
    one update are no distance, and where the generated A starts does not matter.

    A task without an oracle is left out of sum and count.
    """

    def __init__(self, config: OraclesConfig) -> None:
        super().__init__(config)
        self.folder = Path(config.bank)
        self.bank: OpenBank | None = None

    def meet(self, parts: Parts) -> None:
        """Remember the sites of the LoRA."""
        sites, ranks = parts.task_llm.sites(), parts.hypernetwork.lora_ranks()
        self.sites = {path: sites[path] for path in ranks}
        self.layout = RowLayout.of(self.sites, max(ranks.values()))

    def begin(self, training: Training) -> str:
        """Open the bank.

        Raises:
            UserError: it is damaged, of another base, prompt format or other linears, or has no
                task of the run.
        """
        bank = read_bank(self.folder)
        check_files(self.folder)
        check_made_for(self.folder, bank.made_for, made_for(training.base, training.prompts))
        if bank.sites != dict(self.sites):
            raise UserError(
                f"{SETTING}: {self.folder}: its oracles change {len(bank.sites)} linears, and "
                f"this run's {len(self.sites)} others: name a bank that `ship-ds oracles` made "
                "of this config"
            )
        known = {task.id: examples_digest(task) for task in training.tasks}
        self.bank = OpenBank(self.folder, bank, known)
        training.log(self._in_words(bank, known))
        return fingerprint(self.folder)

    def _in_words(self, bank: OracleBank, known: Mapping[str, str]) -> str:
        assert self.bank is not None
        num_others = len((known.keys() & bank.tasks.keys()) - self.bank.places.keys())
        why = f" (of {num_others} one that was trained on other examples)" if num_others else ""
        if not self.bank.places:
            raise UserError(
                f"{SETTING}: {self.folder}: no seen task of this run has an oracle there{why}: "
                "name a bank that `ship-ds oracles` made of these data"
            )
        return (
            f"loss.oracles: {len(self.bank.places)} of {len(known)} seen tasks have an oracle{why}"
        )

    def prepare(
        self, draws: Sequence[TaskDraw], collator: "Collator", device: torch.device
    ) -> OracleRows:
        """The rows of the draws' tasks."""
        assert self.bank is not None, "a training begins before it makes batches"
        ids = [draw.task_id for draw in draws]
        return self.bank.rows(ids, self.layout.num_numbers).to(device)

    def prepare_shapes(self, batch: ShipBatch) -> OracleRows:
        """A row a task."""
        tasks, device = batch.num_tasks, batch.noise_TZ.device
        return OracleRows(
            torch.zeros(tasks, self.layout.num_numbers, dtype=DTYPE, device=device),
            torch.ones(tasks, device=device),
            torch.ones(len(self.sites), device=device),
            tasks,
        )

    def count(self, batch: ShipBatch) -> int:
        """Tasks with an oracle."""
        return int(batch.extras["oracles"].count)

    def sum(self, outputs: Outputs) -> Tensor:
        """Over tasks with an oracle."""
        aims: OracleRows = outputs.batch.extras["oracles"]
        within = outputs.adapter.lora_within()
        assert within is not None, "the config refuses it (why_no_oracles)"
        made = within.lora
        scalings = made.scaling, made.scaling
        squared = []
        for paths, *aim in self.layout.factors(aims.rows_TX):
            pairs = zip(*(made.factors[path] for path in paths), strict=True)
            a_JTRI, b_JTOR = (torch.stack(half) for half in pairs)
            squared.append(squared_distances((a_JTRI, b_JTOR), (aim[0], aim[1]), scalings))
        in_spreads = torch.cat(squared) / aims.spreads[:, None]
        return (in_spreads.mean(0) * aims.has_one_T).sum()


def made_for(base: Mapping[str, str], prompts: Mapping[str, Any]) -> dict[str, Any]:
    """What oracles are of, beside a config's settings.

    Args:
        base: fingerprints of the Task LLM's base.
        prompts: the description of its prompt format.
    """
    return {**base, "the prompt format": prompts["hash"]}
