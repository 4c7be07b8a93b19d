"""SHIP (Sun et al. 2025, arXiv 2502.02315): encoder, prior, hypernetwork, Task LLM and decoder in
one module, for one engine. model/assemble.py puts it together.

Letters: T tasks, E sequences, S padded length, H hidden size, Z latent size, K labelled positions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.config import ModelConfig
from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import Reading
from ship_ds.flops import ShipSize
from ship_ds.model import budget
from ship_ds.model.adapters.adapter import Adapter, States
from ship_ds.model.adapters.together import can_read_together
from ship_ds.model.batch import TokenBatch
from ship_ds.model.collate import Collator
from ship_ds.model.encoder import Encoded, Posterior
from ship_ds.model.objectives import Objective
from ship_ds.model.sizes import size_of
from ship_ds.model.step import Outputs, Parts, Predictions, ShipBatch, StepSums
from ship_ds.model.task_llm import TaskLlm
from ship_ds.prompt import PromptFormat

_USUAL_LENGTH = 128
"""Tokens of an instruction, where memory is shared out before it is known."""

AnyReading = str | Reading | Encoded
"""What an adapter is made of: a text, what else the encoder reads, or either as it was read."""


class ShipModel(nn.Module):
    """All of SHIP. The Task LLM is a submodule only when it is to be sharded; a replicated one
    stays outside the engine, which would copy or broadcast it."""

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts,
        objectives: Mapping[str, Objective],
        collator: Collator | None,
        shards_task_llm: bool,
        decodes: bool = True,
    ) -> None:
        """Register the parts; assemble.build_ship makes them.

        Args:
            config: the run's `model` section.
            parts: encoder, prior, hypernetwork, Task LLM and decoder.
            objectives: by name, in the order in which the loss adds them up.
            collator: makes batches of texts; None without tokenizers (a plan's model).
            shards_task_llm: whether ZeRO-3 partitions the Task LLM over the ranks.
            decodes: whether a decoder is trained; one that is not stays as it was drawn, frozen.
        """
        super().__init__()
        self.decodes = decodes
        if not decodes:
            parts.decoder.requires_grad_(False)
        self.config = config
        self.objectives = dict(objectives)
        self._parts = [parts]  # in a list, since a module's attribute would be registered twice
        self._collator = collator
        self.plans_shards = False
        """Whether a plan, whose parameters have shapes alone, stands for ZeRO-3."""
        self._outside = [] if shards_task_llm else [parts.task_llm]
        # The order of registration is the order of the parameters in the optimiser's state: it
        # stays as in 0.1.0, whose checkpoints go on.
        if shards_task_llm:
            self.sharded_task_llm = parts.task_llm
        self.encoder = parts.encoder
        self.decoder = parts.decoder
        self.hypernetwork = parts.hypernetwork
        self.prior = parts.prior
        self.objective_modules = nn.ModuleDict(
            {name: one for name, one in objectives.items() if isinstance(one, nn.Module)}
        )

    @property
    def task_llm(self) -> TaskLlm:
        """The frozen Task LLM, wherever it is held."""
        return self._parts[0].task_llm

    @property
    def roles(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Encoder, Task LLM and decoder, which may share a base: `modules()` of this model lacks a
        Task LLM that is not sharded."""
        return self.encoder, self.task_llm, self.decoder

    def pretrained_parameters(self) -> set[str]:
        """Names of the parameters of encoder's and decoder's language models and of the LoRAs over
        them; what is left starts from random numbers: hypernetwork, the MLPs around z, prior."""
        roles = {"encoder": self.encoder, "decoder": self.decoder}
        return {
            f"{role}.{part}.{name}"
            for role, module in roles.items()
            for part in ("lm", "adapter")
            if getattr(module, part, None) is not None
            for name, _ in getattr(module, part).named_parameters()
        }

    @property
    def collator(self) -> Collator:
        """What makes batches of texts."""
        assert self._collator is not None, "a model of shapes alone reads no text"
        return self._collator

    @property
    def prompts(self) -> PromptFormat:
        """The Task LLM's prompt format."""
        return self.collator.prompts.task_llm

    @property
    def encoder_prompts(self) -> PromptFormat:
        """The encoder's prompt format."""
        return self.collator.prompts.encoder

    @property
    def decoder_prompts(self) -> PromptFormat:
        """The decoder's prompt format."""
        return self.collator.prompts.decoder

    @property
    def outside(self) -> list[nn.Module]:
        """What is no part of the engine: a Task LLM that every rank holds whole."""
        return list(self._outside)

    def _apply(self, fn: Any, recurse: bool = True) -> "ShipModel":
        """Moves and casts reach the Task LLM outside too."""
        for module in self._outside:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        """Where the trained parts are."""
        return next(self.encoder.head.parameters()).device

    @property
    def num_virtual_tokens(self) -> int:
        """Places that an adapter's virtual tokens take before each prompt of the Task LLM."""
        return self.hypernetwork.num_virtual_tokens

    @property
    def packs(self) -> bool:
        """Whether batches are laid out without padding, which lies in attention alone."""
        return self.task_llm.language_model.packs and self.hypernetwork.packs

    def collate(self, draws: Sequence[TaskDraw], seed: int, step: int) -> ShipBatch:
        """The batch of a micro-step, with what the objectives prepare for themselves.

        Args:
            draws: this rank's tasks of the micro-step; each has equally many examples to answer.
            seed: of the run.
            step: the global step.

        Raises:
            UserError: see `Collator.step` and `Objective.prepare`.
        """
        batch = self.collator.step(draws, seed, step, self.device)
        for name, objective in self.objectives.items():
            extra = objective.prepare(draws, self.collator, self.device)
            if extra is not None:
                batch = batch.with_extra(name, extra)
        return batch if self.decodes else replace(batch, decodes=False)

    def question(self, text: str, wording: str | None = None) -> tuple[int, ...]:
        """The ids before an answer, without virtual tokens, in the form of
        `model.task_llm.instruction`."""
        return self.collator.question(text, wording)

    def task_batch(
        self,
        inputs: Sequence[str],
        targets: Sequence[str] | None,
        wordings: Sequence[str | None],
    ) -> TokenBatch:
        """What the Task LLM reads under an adapter, a row an input.

        Args:
            inputs: what is asked, those of a task side by side.
            targets: one an input; None: to be answered.
            wordings: one an input; None among them: no instruction.

        Raises:
            UserError: see `Collator.answers`.
        """
        return self.collator.answers(inputs, targets, wordings, self.device)

    def forward(self, batch: ShipBatch) -> StepSums:
        """One sample of z feeds both halves: the adapter (VIB) and, where a decoder is trained, the
        reconstruction (VAE)."""
        packed = self.hypernetwork.packs  # each language model knows whether it can
        posterior = Posterior(*self.encoder(batch.instructions))
        latent_TZ = posterior.sample(batch.noise_TZ)
        adapter = self._adapter(latent_TZ, posterior, batch.instructions, batch.chance_T)
        task_lm, texts = self.task_llm.language_model, None
        to_decode = latent_TZ, batch.shows_latent_T, batch.decoded
        if self.reads_together(adapter):
            beside = self.decoder.passage(*to_decode)
            states, labels = self.task_llm(
                adapter, batch.answers, batch.num_tasks, packed, beside=beside
            )
            counts = [batch.answers.num_targets, batch.decoded.num_targets]
            (own_KH, other_KH), (own_K, other_K) = states.split(counts), labels.split(counts)
            answers = Predictions(task_lm, own_KH, own_K)
            texts = Predictions(task_lm, other_KH, other_K)
        else:
            read = self.task_llm(adapter, batch.answers, batch.num_tasks, packed)
            answers = Predictions(task_lm, *read)
            if self.decodes:
                written = self.decoder(*to_decode, packed)
                texts = Predictions(self.decoder.language_model, *written)
        kl_TZ = self.prior.kl(posterior.mean_TZ, posterior.log_variance_TZ, latent_TZ)
        outputs = Outputs(
            self._parts[0], batch, posterior, latent_TZ, kl_TZ, adapter, answers, texts
        )
        sums = {name: objective.sum(outputs) for name, objective in self.objectives.items()}
        return StepSums(sums, kl_TZ.detach())

    def reads_together(self, adapter: Adapter) -> bool:
        """Whether Task LLM and decoder, one base, read in one pass; not under ZeRO-3, which gathers
        the decoder's parameters in its own forward (`LowRankUpdate.is_at_hand` sees them there)."""
        decoder, task_llm = self.decoder, self.task_llm
        return (
            self.decodes
            and self.config.backbone == "shared"
            and self.packs
            and decoder.checkpointing == task_llm.checkpointing
            and not self.plans_shards
            and can_read_together((adapter, decoder.own_adapter))
        )

    def _adapter(
        self,
        latent_TZ: Tensor,
        posterior: Posterior,
        read: TokenBatch,
        chance_T: Tensor | None = None,
    ) -> Adapter:
        """Of z, and of the states where this kind fuses them.

        By keywords: of a module that is given tensors and gives none back ZeRO-3 is told where its
        backward pass ends and not where it begins, and an assertion of DeepSpeed's fails where no
        other module's is under way. What is given by keyword it does not follow.
        """
        if posterior.states_TSH is None:
            adapter: Adapter = self.hypernetwork(latent_TZ=latent_TZ)
        else:
            states = States(posterior.states_TSH, read.real_ES, chance_T)
            adapter = self.hypernetwork(latent_TZ=latent_TZ, read=states)
        return adapter

    @torch.no_grad()
    def encode(self, readings: Sequence[str | Reading]) -> Tensor:
        """Posterior means (T, Z) of any number of instructions, or of examples (`Reading`)."""
        return self.posterior(readings).mean_TZ

    @torch.no_grad()
    def posterior(
        self, readings: Sequence[str | Reading], done: Callable[[int], object] | None = None
    ) -> Posterior:
        """q(z | k) of any number of instructions, or of examples (`Reading`). done: is told how
        many more have been encoded, batch by batch."""
        order: list[int] = []
        # Where there are none: the encoder cannot read an empty batch.
        parts = [(torch.zeros(0, self.config.latent_size),) * 2] if not readings else []
        batches = self._encoder_batches(readings, gives_states=False)
        for rows, _, (mean_TZ, log_variance_TZ, *_) in batches:
            parts.append((mean_TZ, log_variance_TZ))
            order += rows
            if done is not None:
                done(len(rows))
        # Row t of the result was read as number places[t].
        places = sorted(range(len(order)), key=order.__getitem__)
        mean_TZ, log_variance_TZ = (torch.cat(one)[places] for one in zip(*parts, strict=True))
        return Posterior(mean_TZ, log_variance_TZ)

    @torch.no_grad()
    def read_once(self, readings: Sequence[str | Reading]) -> list[Encoded]:
        """Each with what the encoder makes of it: with the states of as many, from the first, as
        there is room to keep."""
        num_kept = self._num_kept(readings) if self.hypernetwork.fuses else 0
        made: dict[int, Encoded] = {}
        for start, some in ((0, readings[:num_kept]), (num_kept, readings[num_kept:])):
            keeps = start < num_kept
            batches = self._encoder_batches(some, gives_states=keeps, keeps=keeps)
            for rows, batch, (mean_TZ, _, *states) in batches:
                for place, row in enumerate(rows):
                    # A copy, or it would hold the whole batch.
                    kept = [one[place, : batch.lengths[place]].clone() for one in states]
                    made[start + row] = Encoded(some[row], mean_TZ[place], next(iter(kept), None))
        return [made[row] for row in range(len(readings))]

    def read_where_fused(self, readings: Sequence[str | Reading]) -> Sequence[AnyReading]:
        """The readings, for adapters of several latents: each `read_once` where they fuse what the
        encoder makes of it."""
        return self.read_once(readings) if self.hypernetwork.fuses else readings

    def _num_kept(self, readings: Sequence[str | Reading]) -> int:
        """How many of the readings, from the first, have states that may lie there together."""
        num_tokens = accumulate(len(self.collator.read_prompt(one)) for one in readings)
        state, room = self.encoder.kept_state_bytes, budget.bytes_to_keep(self.device)
        return sum(tokens * state <= room for tokens in num_tokens)

    def _encoder_batches(
        self, readings: Sequence[str | Reading], *, gives_states: bool, keeps: bool = False
    ) -> Iterator[tuple[list[int], TokenBatch, tuple[Tensor, ...]]]:
        """Numbers of readings, their batch and what the encoder gives of it, as many at a time as
        there is room for; with its states, where a kind fuses them and they are wanted. keeps:
        whether these stay there while the next batches are read."""
        ids, encoder = [self.collator.read_prompt(one) for one in readings], self.encoder
        kept = encoder.state_bytes if gives_states else 0

        def row_bytes(width: int) -> int:
            return encoder.language_model.costs.reading(width) + kept * width

        room = budget.bytes_beside_kept if keeps else budget.bytes_free
        free = room(self.device)
        for rows in budget.row_batches(list(map(len, ids)), free, row_bytes):
            prompts = [ids[row] for row in rows]
            batch = TokenBatch.build(prompts, None, self.encoder_prompts.pad_id, device=self.device)
            yield rows, batch, encoder(batch, without_states=not gives_states)

    def _states(self, readings: Sequence[AnyReading]) -> tuple[Tensor, Tensor]:
        """What the encoder's last layer gives of each, (T, S, H), zero in the padding, and where
        they are real, (T, S)."""
        kept = {
            row: one.states_SH
            for row, one in enumerate(readings)
            if isinstance(one, Encoded) and one.states_SH is not None
        }
        rest = [row for row in range(len(readings)) if row not in kept]
        plain = [_plain(readings[row]) for row in rest]
        parts = list(self._encoder_batches(plain, gives_states=True))
        longest = max(
            [batch.ids_ES.shape[1] for _, batch, _ in parts] + [len(one) for one in kept.values()]
        )
        some = parts[0][2][2] if parts else next(iter(kept.values()))
        states_TSH = some.new_zeros(len(readings), longest, some.shape[-1], device=self.device)
        real_TS = torch.zeros(states_TSH.shape[:2], dtype=torch.bool, device=self.device)
        for places, batch, (_, _, states_ESH) in parts:
            rows = [rest[place] for place in places]
            states_TSH[rows, : states_ESH.shape[1]] = states_ESH
            real_TS[rows, : states_ESH.shape[1]] = batch.real_ES
        for row, states_SH in kept.items():
            states_TSH[row, : len(states_SH)] = states_SH
            real_TS[row, : len(states_SH)] = True
        return states_TSH, real_TS

    @cached_property
    def adapter_bytes(self) -> int:
        """Of one task's adapter, and of what `Adapter.prepared` makes of it; where it is as long as
        the instruction, of one of 128 tokens."""
        of_latent, of_state = self._adapter_sizes
        return of_latent + _USUAL_LENGTH * of_state

    def adapter_bytes_of(self, readings: Iterable[AnyReading | None]) -> int:
        """The same of the largest of those that are made of these; None: of z alone."""
        of_latent, of_state = self._adapter_sizes
        if not of_state:
            return of_latent
        # Of z alone it has one state, which nobody sees.
        read = [len(self.collator.read_prompt(_plain(one))) for one in readings if one]
        return of_latent + max(read, default=1) * of_state

    @cached_property
    def _adapter_sizes(self) -> tuple[int, int]:
        """Bytes of an adapter, twice, and of each state more that it fuses, which lies there until
        the adapter is made."""
        if not self.hypernetwork.fuses:
            return self._bytes_of_fused(0), 0
        one, two = self._bytes_of_fused(1), self._bytes_of_fused(2)
        return 2 * one - two, two - one + self.encoder.state_bytes

    @torch.no_grad()
    def _bytes_of_fused(self, num_states: int) -> int:
        latent_TZ = torch.zeros(1, self.config.latent_size, device=self.device)
        fused = {}
        if num_states:
            states_TSH = torch.zeros(1, num_states, self.encoder.state_width, device=self.device)
            real_TS = torch.ones(1, num_states, dtype=torch.bool, device=self.device)
            fused = {"read": States(states_TSH, real_TS)}
        adapter = self.hypernetwork(latent_TZ=latent_TZ, **fused)
        return 2 * sum(tensor.nbytes for tensor in adapter.tensors().values())

    def num_before(self, reading: AnyReading | None) -> int:
        """Places before a prompt that the adapter made of this takes; None: of z alone."""
        places = self.num_virtual_tokens
        if reading and self.hypernetwork.stands_before:
            places += len(self.collator.read_prompt(_plain(reading)))
        return places

    @torch.no_grad()
    def adapt(
        self, latent_TZ: Tensor, readings: Sequence[AnyReading | None] | None = None
    ) -> Adapter:
        """The adapters of these latents.

        Args:
            latent_TZ: one a task.
            readings: what each was made of, which a kind that fuses the encoder's states reads
                again, unless it was `read_once`; None or "", of all or of one: by z alone.
        """
        if readings is None or not any(readings) or not self.hypernetwork.fuses:
            adapter: Adapter = self.hypernetwork(latent_TZ.to(self.device))
            return adapter
        states_TSH, real_TS = self._states([one or "" for one in readings])
        is_read_T1 = torch.tensor([[bool(one)] for one in readings], device=self.device)
        fused: Adapter = self.hypernetwork(
            latent_TZ=latent_TZ.to(self.device), read=States(states_TSH, real_TS & is_read_T1)
        )
        return fused

    @torch.no_grad()
    def adapt_read(self, latent_TZ: Tensor, read: TokenBatch) -> Adapter:
        """The adapters of latents and of what the encoder reads.

        Args:
            latent_TZ: one a task.
            read: a row a task.
        """
        latent_TZ = latent_TZ.to(self.device)
        return self._adapter(latent_TZ, Posterior(*self.encoder(read)), read)

    def read_adapter(self, folder: Path) -> Adapter:
        """A PEFT folder as an adapter of one task; linears that it changes and the run's own
        adapters do not are made ready for it. Raises UserError; see `Hypernetwork.read`."""
        adapter = self.hypernetwork.read(folder, self.task_llm.lm)
        self.task_llm.make_ready(adapter.update_norms())
        return adapter

    def answer(
        self,
        adapter: Adapter | None,
        inputs: Sequence[str],
        max_new_tokens: int,
        wordings: Sequence[str] | None = None,
    ) -> list[str | None]:
        """Greedy answers, one an input; None where no end-of-sequence came in time.

        Args:
            adapter: its tasks have equally many consecutive inputs each; None: the bare base.
            inputs: what is asked, in one batch.
            max_new_tokens: cuts an answer off.
            wordings: one instruction an input. Under an adapter the prompt states it as
                `model.task_llm.instruction` says, by default not at all; without one it states it
                as text (the upper reference). None: no instruction.

        Raises:
            ValueError: there is an adapter and no wordings, and `model.task_llm.instruction` is not
                `none`.
            UserError: see `Collator.answers`.
        """
        batch = self._questions(adapter, inputs, wordings)
        rows = self.task_llm.generate(
            adapter,
            batch,
            self.prompts.eos_id,
            max_new_tokens,
            other_ends=self.prompts.other_ends,
        )
        return [self.prompts.finished_text(row) for row in rows]

    def _questions(
        self, adapter: Adapter | None, inputs: Sequence[str], wordings: Sequence[str] | None
    ) -> TokenBatch:
        form = self.config.task_llm.instruction
        if adapter is not None and wordings is None and form != "none":
            raise ValueError(
                f"model.task_llm.instruction={form}: this Task LLM answers with the "
                "wordings alone; pass them"
            )
        instructions = wordings if wordings is not None else [None] * len(inputs)
        if adapter is not None:
            return self.task_batch(inputs, None, instructions)
        return self.collator.bare_questions(inputs, instructions, self.device)

    def decode(self, latent_TZ: Tensor, max_new_tokens: int) -> list[str]:
        """The instruction that the decoder reads out of each z, without examples; nothing where no
        decoder was trained."""
        if not self.decodes:
            return [""] * len(latent_TZ)
        prompts, lm = self.decoder_prompts, self.decoder.language_model
        width = self.config.decoder.num_soft_tokens + len(prompts.decoder_prompt(()))
        row = lm.costs.decoded_row(width, max_new_tokens)
        rows: list[list[int]] = []
        for latents in latent_TZ.split(max(1, budget.bytes_free(self.device) // row)):
            batch = self.collator.undecoded(len(latents), self.device)
            rows += self.decoder.generate(latents, batch, prompts.eos_id, max_new_tokens)
        return [prompts.text(row) for row in rows]

    def flop_size(self) -> ShipSize:
        """What the formula of FLOPs (flops.py) needs to know of this model."""
        return size_of(self.config, self._parts[0], self.decodes)

    def parameter_counts(self) -> dict[str, int]:
        """Weights of each part, 4-bit ones counted one by one, and how many of all are trained."""
        heads = {
            id(parameter)
            for module in self.hypernetwork.head_modules()
            for parameter in module.parameters()
        }
        hypernetwork = list(self.hypernetwork.parameters())
        return {
            "encoder": _count(self.encoder.parameters()),
            "hypernetwork trunk": _count(
                parameter for parameter in hypernetwork if id(parameter) not in heads
            ),
            "hypernetwork heads": _count(
                parameter for parameter in hypernetwork if id(parameter) in heads
            ),
            "decoder": _count(self.decoder.parameters()),
            "task LLM": _count(self.task_llm.parameters()),
            "trained": _count(
                parameter for parameter in self.parameters() if parameter.requires_grad
            ),
        }


def _plain(reading: AnyReading) -> str | Reading:
    return reading.reading if isinstance(reading, Encoded) else reading


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """A 4-bit weight holds two values a byte and knows its true shape; one that ZeRO-3 has sharded
    knows its whole size."""
    total = 0
    for parameter in parameters:
        quantised = getattr(parameter, "quant_state", None)
        total += (
            quantised.shape.numel()
            if quantised is not None
            else getattr(parameter, "ds_numel", parameter.numel())
        )
    return total
