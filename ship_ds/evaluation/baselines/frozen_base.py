"""The run's frozen Task LLM as every baseline meets it: the same weights, 4-bit format, prompt
format and LoRA sites as SHIP.

Letters: E sequences, T tasks, K labelled positions, V vocabulary, S padded length, H hidden size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ship_ds.api import Ship
from ship_ds.config import ALL_LINEAR, Config, LoraHypernetworkConfig, TaskLlmConfig, lora_of
from ship_ds.inference.deduction import AdapterOf, Answerer, AnswersByTask, Ids
from ship_ds.inference.scoring import scored_batches
from ship_ds.kinds import ADAPTERS
from ship_ds.model import budget
from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.sites import wrap_sites
from ship_ds.model.batch import TokenBatch
from ship_ds.model.budget import Piece
from ship_ds.model.loading import freeze, load_lm, load_prompts
from ship_ds.model.nf4_linear import unpack
from ship_ds.model.step import Predictions
from ship_ds.model.task_llm import TaskLlm
from ship_ds.prompt import PromptFormat


class FrozenBase:
    """Losses and answers of the frozen base under an adapter. Nothing of it is ever trained."""

    def __init__(
        self,
        config: Config,
        prompts: PromptFormat,
        task_llm: TaskLlm,
        lora: LoraHypernetworkConfig,
        device: torch.device,
        packs: bool,
    ) -> None:
        """Made by `of_run` or `of_config`.

        Args:
            config: of the run.
            prompts: the Task LLM's format.
            task_llm: with the LoRA's sites.
            lora: its rank and scaling, and how a hypernetwork makes it.
            device: where all of it is.
            packs: whether batches are laid out without padding.
        """
        self.config, self.prompts = config, prompts
        self.device, self.packs = device, packs
        self.task_llm, self.lora = task_llm, lora
        self.sites = self.task_llm.sites()
        self.hidden_size = self.task_llm.language_model.hidden_size

    @classmethod
    def of_run(cls, ship: Ship) -> "FrozenBase":
        """That of a run, which it goes on using."""
        task_llm, lora = _with_lora_sites(ship)
        model = ship.model
        return cls(ship.config, model.prompts, task_llm, lora, model.device, model.packs)

    @classmethod
    def of_config(
        cls, config: Config, lora: LoraHypernetworkConfig, device: torch.device, dtype: torch.dtype
    ) -> "FrozenBase":
        """That of a run which need not be trained yet; nothing but the Task LLM is loaded.

        Args:
            config: of the run.
            lora: whose sites the base gets.
            device: where it runs.
            dtype: of its weights.

        Raises:
            UserError: the base cannot be loaded, or a block of it lacks a target.
        """
        settings = config.model.task_llm
        task_llm = _loaded(settings, lora, device, dtype)
        prompts = load_prompts(settings.base, config.model.system_message)
        return cls(config, prompts, task_llm, lora, device, task_llm.language_model.packs)

    def batch(
        self, prompts: Sequence[Ids], targets: Sequence[str] | None, num_virtual_tokens: int = 0
    ) -> TokenBatch:
        """Prompts with targets on the base's device.

        Args:
            prompts: token ids.
            targets: texts with the labels; None where they are to be generated.
            num_virtual_tokens: places for an adapter's embeddings before each prompt.
        """
        labels = None if targets is None else [self.prompts.target(text) for text in targets]
        return TokenBatch.build(
            prompts, labels, self.prompts.pad_id, num_virtual_tokens, self.device
        )

    def label_logits(
        self, adapter: Adapter, batch: TokenBatch, num_tasks: int
    ) -> tuple[Tensor, Tensor]:
        """Logits (K, V) and labels (K,); the batch's rows are task-major under `num_tasks`
        adapters.

        Args:
            adapter: of the T tasks, in the order of their rows.
            batch: prompts with targets, equally many of each task.
            num_tasks: T.

        Returns:
            Logits (K, V), through which the adapter's gradient goes, and labels (K,).
        """
        return self.task_llm.score(adapter, batch, num_tasks, self.packs)

    def pieces(
        self,
        prompts: Sequence[Sequence[Ids]],
        targets: Sequence[Sequence[str]],
        num_virtual_tokens: int = 0,
        task_bytes: int = 0,
    ) -> Iterator[tuple[list[Piece], TokenBatch]]:
        """A training step's rows in batches that the memory has room for, with what each keeps for
        the backward pass.

        Args:
            prompts: token ids, one row of prompts a task.
            targets: of each prompt.
            num_virtual_tokens: places for an adapter's embeddings before each prompt.
            task_bytes: of a task's adapter and its gradient, where each has its own.

        Yields:
            Which rows of which tasks, and their batch.
        """
        labels = [[len(self.prompts.target(text)) for text in row] for row in targets]
        most, costs = max(map(max, labels)), self.task_llm.language_model.costs
        widths = [
            [num_virtual_tokens + len(ids) + count for ids, count in zip(*rows, strict=True)]
            for rows in zip(prompts, labels, strict=True)
        ]
        free = budget.bytes_free(self.device)
        for parts in budget.batches(
            widths, free, lambda width: costs.trained_row(width, most), task_bytes
        ):
            yield (
                parts,
                self.batch(_rows(prompts, parts), _rows(targets, parts), num_virtual_tokens),
            )

    def losses(
        self,
        adapter: Adapter | AdapterOf,
        prompts: Sequence[Sequence[Ids]],
        targets: Sequence[Sequence[str]],
        num_virtual_tokens: int = 0,
    ) -> Iterator[Tensor]:
        """The mean over all target tokens in nats, in pieces that add up to it.

        Args:
            adapter: one for all rows; or what makes those of some tasks, anew for each piece, whose
                backward pass takes its graph with it.
            prompts: see `pieces`, as the rest.
            targets: of each prompt.
            num_virtual_tokens: before each prompt.
        """
        num_labels = sum(len(self.prompts.target(text)) for row in targets for text in row)
        for _, summed in self._summed(adapter, prompts, targets, num_virtual_tokens):
            yield summed / num_labels

    def losses_per_task(
        self,
        adapter: Adapter | AdapterOf,
        prompts: Sequence[Sequence[Ids]],
        targets: Sequence[Sequence[str]],
        num_virtual_tokens: int = 0,
    ) -> Iterator[Tensor]:
        """The sum over tasks of each one's nats an example, in pieces: a task's gradient is what it
        would be without the others.

        Args:
            adapter: one for all rows; or what makes those of some tasks, anew for each piece, whose
                backward pass takes its graph with it.
            prompts: token ids, one row of prompts a task.
            targets: of each prompt.
            num_virtual_tokens: places for an adapter's embeddings before each prompt.

        Yields:
            Scalars that add up to the sum.
        """
        for parts, summed in self._summed(adapter, prompts, targets, num_virtual_tokens):
            # The tasks of a piece have equally many rows (budget.batches).
            yield summed / len(prompts[parts[0].task])

    def _summed(
        self,
        adapter: Adapter | AdapterOf,
        prompts: Sequence[Sequence[Ids]],
        targets: Sequence[Sequence[str]],
        num_virtual_tokens: int,
    ) -> Iterator[tuple[list[Piece], Tensor]]:
        """Sums of token losses."""
        task_bytes = 0 if isinstance(adapter, Adapter) else self.adapter_bytes
        for parts, batch in self.pieces(prompts, targets, num_virtual_tokens, task_bytes):
            tasks = [part.task for part in parts]
            made = adapter if isinstance(adapter, Adapter) else adapter(tasks)
            scored = self.task_llm(made, batch, made.num_tasks, self.packs)
            yield parts, Predictions(self.task_llm.language_model, *scored).sum_cross_entropy()

    @torch.no_grad()
    def log_likelihoods(
        self, adapter: Adapter, prompts: Sequence[Ids], targets: Sequence[str]
    ) -> Tensor:
        """log p(target | prompt) of each row in nats, (E,), end of sequence included; one adapter
        for all rows.

        Args:
            adapter: of one task.
            prompts: token ids of each row.
            targets: text of each row.

        Returns:
            (E,) in fp32, without gradient.
        """
        labels = [self.prompts.target(text) for text in targets]
        lm, pad_id = self.task_llm.language_model, self.prompts.pad_id
        log_likelihood_E = torch.zeros(len(targets), device=self.device)
        for rows, batch in scored_batches(lm, prompts, labels, pad_id, self.device):
            logits_KV, labels_K = self.task_llm.score(adapter, batch, 1)
            losses_K = torch.nn.functional.cross_entropy(
                logits_KV.float(), labels_K, reduction="none"
            )
            rows_K = torch.tensor(rows, device=self.device)[batch.label_row_K]
            log_likelihood_E.index_add_(0, rows_K, -losses_K)
        return log_likelihood_E

    def generate(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[str | None]:
        """The bare base's greedy texts; None where no end came in time."""
        return self._answerer(keeps_cut_off=False).answers([prompts], max_new_tokens)[0]

    def answer(
        self,
        questions: Sequence[Sequence[Ids]],
        adapter_of: AdapterOf,
        num_virtual_tokens: int = 0,
    ) -> AnswersByTask:
        """Each task's answers.

        Args:
            questions: prompts as token ids, one row a task.
            adapter_of: the adapter of some tasks, by their places in `questions`.
            num_virtual_tokens: that the adapter puts before each prompt.
        """
        max_new_tokens = self.config.evaluation.max_new_tokens
        return self._answerer(num_virtual_tokens).answers(questions, max_new_tokens, adapter_of)

    def _answerer(self, num_virtual_tokens: int = 0, keeps_cut_off: bool = True) -> Answerer:
        return Answerer(
            self.task_llm,
            self.prompts,
            self.device,
            num_virtual_tokens=num_virtual_tokens,
            adapter_bytes=self.adapter_bytes,
            keeps_cut_off=keeps_cut_off,
        )

    @property
    def adapter_bytes(self) -> int:
        """Of one task's LoRA in fp32, and of what decoding makes of it."""
        num_numbers = self.lora.rank * sum(sum(shape) for shape in self.sites.values())
        return 2 * torch.float32.itemsize * num_numbers

    @torch.no_grad()
    def read(self, wordings: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The bare base's last hidden states (T, S, H) of each instruction, right-padded, and True
        where they are real (T, S)."""
        batch = self.batch([self.prompts.encoder_prompt(text) for text in wordings], None)
        hidden_TSH = self.task_llm.language_model.hidden(batch)
        return hidden_TSH.float(), batch.real_ES

    def fingerprint(self) -> str:
        """Names the base: its settings, prompt format and a few values of every weight (hashing 70B
        would take minutes)."""
        settings, prompts = self.config.model.task_llm, self.prompts.describe()
        named = f"({settings!r}, {named_as_before(self.lora)}, {prompts!r})"
        digest = hashlib.sha256(named.encode())
        for path, weight in self.task_llm.named_parameters():
            name = path.removeprefix("lm.")
            digest.update(
                name.encode() + weight.detach().flatten()[:256].float().cpu().numpy().tobytes()
            )
        return digest.hexdigest()[:16]


def named_as_before(lora: LoraHypernetworkConfig) -> str:
    """The section as the first version wrote it, and what is set of what came later: what earlier
    versions trained is found again.

    The order is written out, since that of the fields moves when a base class takes one of them.
    """
    first = ("kind", "rank", "alpha", "targets", "width", "heads")
    later = [
        name
        for name, field in type(lora).model_fields.items()
        if name not in first and getattr(lora, name) != field.default
    ]
    named = ", ".join(f"{name}={getattr(lora, name)!r}" for name in (*first, *later))
    return f"{type(lora).__name__}({named})"


def _rows(by_task: Sequence[Sequence[Any]], parts: Sequence[Piece]) -> list[Any]:
    """The rows of these pieces, one after the other."""
    return list(chain.from_iterable(by_task[part.task][part.start : part.stop] for part in parts))


def _with_lora_sites(ship: Ship) -> tuple[TaskLlm, LoraHypernetworkConfig]:
    """The run's own Task LLM and LoRA, where nothing else changes its linears; else a second copy
    with that LoRA's sites, or with the default one's."""
    config = ship.config.model
    kind, run_lora = ADAPTERS.implementation(config.hypernetwork), lora_of(config.hypernetwork)
    if run_lora is not None:
        # The baselines' hypernetworks read no z that could be cut into shares.
        lora = run_lora.model_copy(update={"latent": "whole"})
        if kind.targets(config.hypernetwork) == run_lora.targets:
            return ship.model.task_llm, lora
    else:
        lora = LoraHypernetworkConfig()
        names = {path.rpartition(".")[2] for path in ship.model.task_llm.linears()}
        if not names >= {*lora.targets}:  # a base with other names, such as a T5
            lora = lora.model_copy(update={"targets": (ALL_LINEAR,)})
    return _loaded(config.task_llm, lora, ship.model.device, ship.dtype), lora


def _loaded(
    settings: TaskLlmConfig, lora: LoraHypernetworkConfig, device: torch.device, dtype: torch.dtype
) -> TaskLlm:
    """The frozen base with the LoRA's sites."""
    lm = freeze(load_lm(settings.base, settings.quantisation, dtype, "auto", device))
    wrap_sites(lm, lora.targets)
    task_llm = TaskLlm(lm, settings.checkpointing).to(device)
    # As the run's own, or equal minutes would not be equal steps.
    unpack([task_llm], budget.bytes_to_unpack(device))
    return task_llm
