"""SHIP (Sun et al. 2025, arXiv 2502.02315): encoder, hypernetwork, Task LLM and decoder in one
module, for one engine.

What the Task LLM reads (model.task_llm.instruction), V being the adapter's virtual tokens, k the
instruction, x the input: `none` [V, prompt(x)]; `hard` [V, prompt(k, x)]; `soft` [V, embeddings of
k's tokens, prompt(x)], where induction may put optimised embeddings in place of the table's.

Letters: T tasks, M examples a task, Z latent.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ship_ds.config import (
    EncoderConfig,
    LoraTuning,
    ModelConfig,
    TaskLlmConfig,
)
from ship_ds.data.sampler import TaskDraw
from ship_ds.loss import kl_to_prior, sum_cross_entropy
from ship_ds.model.adapters import Adapter, wrap_sites
from ship_ds.model.attention import Choice, this_machine
from ship_ds.model.backbone import add_static_lora, freeze, load_lm, load_tokenizer, stored_bytes
from ship_ds.model.batch import TokenBatch
from ship_ds.model.decoder import Decoder
from ship_ds.model.encoder import Encoder, Posterior, posterior_noise
from ship_ds.model.hypernetwork import build_hypernetwork, targets_of
from ship_ds.model.search import beam_search
from ship_ds.model.streaming import Shard
from ship_ds.model.task_llm import TaskLlm
from ship_ds.prompt import PromptFormat


@dataclass(frozen=True)
class ShipBatch:
    """A rank's share of one micro-step, tensors only; `noise_TZ` is the posterior's noise."""

    instructions: TokenBatch
    answers: TokenBatch
    decoded: TokenBatch
    shows_latent_T: Tensor
    noise_TZ: Tensor


@dataclass(frozen=True)
class LossSums:
    """Sums over this micro-batch: task and reconstruction over target tokens, KL over tasks (mean
    over dimensions)."""

    task: Tensor
    reconstruction: Tensor
    kl: Tensor
    kl_TZ: Tensor


class ShipModel(nn.Module):
    """All of SHIP. The Task LLM is a submodule only when it is to be sharded; a replicated one
    stays outside the engine."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        shard: Shard | None = None,
    ) -> None:
        """dtype: of the language models' weights. device: where it will run, None for CUDA where
        there is any; the weights are on the CPU until `to` or the engine moves them. shard: for
        frozen 4-bit bases, while they load (streaming.py)."""
        super().__init__()
        self.config = config
        device = torch.device(device) if device is not None else this_machine()
        self.prompts = PromptFormat(load_tokenizer(config.task_llm.base))
        self.encoder_prompts = PromptFormat(load_tokenizer(config.encoder.base))
        self.decoder_prompts = PromptFormat(load_tokenizer(config.decoder.base))
        sharded = is_sharded(config.task_llm, dtype)
        task_lm = freeze(
            load_lm(
                config.task_llm.base,
                config.task_llm.quantisation,
                dtype,
                config.attention,
                device,
                shard if sharded else None,
            )
        )
        sites = wrap_sites(task_lm, targets_of(config.hypernetwork))
        task_llm = TaskLlm(task_lm, config.task_llm.checkpointing)
        self._outside = [] if sharded else [task_llm]
        if not self._outside:
            self.sharded_task_llm = task_llm
        encoder_lm = _role_lm(config.encoder, dtype, config.attention, device, shard)
        decoder_lm = _role_lm(config.decoder, dtype, config.attention, device, shard)
        self.encoder = Encoder(encoder_lm, _hidden_size(encoder_lm), config.latent_size)
        # The encoder reads hidden states; its output layer is never used and would be a dead
        # trainable parameter.
        encoder_lm.lm_head = nn.Identity()
        self.decoder = Decoder(
            decoder_lm,
            _hidden_size(decoder_lm),
            config.latent_size,
            config.decoder.num_soft_tokens,
            config.decoder.fusion,
        )
        self.hypernetwork = build_hypernetwork(
            config.hypernetwork, config.latent_size, sites, _hidden_size(task_lm)
        )

    @property
    def task_llm(self) -> TaskLlm:
        return self._outside[0] if self._outside else self.sharded_task_llm

    def _apply(self, fn: Any, recurse: bool = True) -> "ShipModel":
        """Moves and casts reach the Task LLM outside too."""
        for module in self._outside:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        return next(self.encoder.head.parameters()).device

    @property
    def num_virtual_tokens(self) -> int:
        return self.hypernetwork.num_virtual_tokens

    @property
    def packs(self) -> bool:
        """Whether batches are laid out without padding, for a kernel that gains by it."""
        return self.task_llm.language_model.packs

    def collate(self, draws: Sequence[TaskDraw], seed: int, step: int) -> ShipBatch:
        encoder, decoder = self.encoder_prompts, self.decoder_prompts
        answered = [(example, draw.wording) for draw in draws for example in draw.answered]
        return ShipBatch(
            TokenBatch.build(
                [encoder.encoder_prompt(draw.wording) for draw in draws],
                None,
                encoder.pad_id,
                device=self.device,
            ),
            self.task_batch(
                [example.input for example, _ in answered],
                [example.target for example, _ in answered],
                [wording for _, wording in answered],
            ),
            TokenBatch.build(
                [decoder.decoder_prompt(draw.shown) for draw in draws],
                [decoder.target(draw.wording) for draw in draws],
                decoder.pad_id,
                self.config.decoder.num_soft_tokens,
                self.device,
            ),
            torch.tensor([draw.shows_latent for draw in draws], device=self.device),
            posterior_noise(
                seed, step, [draw.task_id for draw in draws], self.config.latent_size
            ).to(self.device),
        )

    def question(self, text: str, wording: str | None = None) -> tuple[int, ...]:
        """The ids before an answer, without virtual tokens, in the form of
        `model.task_llm.instruction`."""
        return (*self._before(wording), *self.prompts.task_prompt(text, self._stated(wording)))

    def _stated(self, wording: str | None) -> str | None:
        return wording if self.config.task_llm.instruction == "hard" else None

    def _before(self, wording: str | None) -> tuple[int, ...]:
        is_soft = wording is not None and self.config.task_llm.instruction == "soft"
        return self.prompts.target(wording)[:-1] if wording is not None and is_soft else ()

    def task_batch(
        self, inputs: Sequence[str], targets: Sequence[str] | None, wordings: Sequence[str | None]
    ) -> TokenBatch:
        """What the Task LLM reads under an adapter, one wording an input; no targets: to be
        answered."""
        return TokenBatch.build(
            [
                self.prompts.task_prompt(text, self._stated(said))
                for text, said in zip(inputs, wordings, strict=True)
            ],
            None if targets is None else [self.prompts.target(text) for text in targets],
            self.prompts.pad_id,
            self.num_virtual_tokens,
            self.device,
            [self._before(said) for said in wordings],
        )

    def forward(self, batch: ShipBatch) -> LossSums:
        """One sample of z feeds both halves: the adapter (VIB) and the reconstruction (VAE)."""
        packed = self.packs
        posterior = Posterior(*self.encoder(batch.instructions))
        latent_TZ = posterior.sample(batch.noise_TZ)
        task_logits, task_labels = self.task_llm(
            self.hypernetwork(latent_TZ), batch.answers, len(latent_TZ), packed
        )
        text_logits, text_labels = self.decoder(
            latent_TZ, batch.shows_latent_T, batch.decoded, packed
        )
        kl_TZ = kl_to_prior(posterior.mean_TZ, posterior.log_variance_TZ)
        return LossSums(
            sum_cross_entropy(task_logits, task_labels),
            sum_cross_entropy(text_logits, text_labels),
            kl_TZ.mean(1).sum(),
            kl_TZ.detach(),
        )

    @torch.no_grad()
    def encode(self, instructions: Sequence[str]) -> Tensor:
        """Posterior means (T, Z)."""
        return self.posterior(instructions).mean_TZ

    @torch.no_grad()
    def posterior(self, instructions: Sequence[str]) -> Posterior:
        prompts = self.encoder_prompts
        ids = [prompts.encoder_prompt(text) for text in instructions]
        return Posterior(
            *self.encoder(TokenBatch.build(ids, None, prompts.pad_id, device=self.device))
        )

    @torch.no_grad()
    def adapt(self, latent_TZ: Tensor) -> Adapter:
        adapter: Adapter = self.hypernetwork(latent_TZ.to(self.device))
        return adapter

    def answer(
        self,
        adapter: Adapter | None,
        inputs: Sequence[str],
        max_new_tokens: int,
        wordings: Sequence[str] | None = None,
        any_unfinished: Callable[[bool], bool] = bool,
    ) -> list[str | None]:
        """Greedy answers, one an input, task-major under `adapter`; None where no end-of-sequence
        came in time.

        wordings: one instruction an input. Under an adapter the prompt states it as
        `model.task_llm.instruction` says, by default not at all; without one it states it as text
        (the upper reference). any_unfinished: see `greedy`.
        """
        batch = self._questions(adapter, inputs, wordings)
        rows = self.task_llm.generate(
            adapter, batch, self.prompts.eos_id, max_new_tokens, any_unfinished=any_unfinished
        )
        return [self.prompts.finished_text(row) for row in rows]

    def answer_by_beams(
        self,
        adapter: Adapter | None,
        inputs: Sequence[str],
        max_new_tokens: int,
        num_beams: int,
        wordings: Sequence[str] | None = None,
    ) -> list[str | None]:
        """As `answer`, the best of a beam search in place of the greedy answer."""
        stream = self.task_llm.stream(adapter, self._questions(adapter, inputs, wordings))
        found = beam_search(stream, num_beams, self.prompts.eos_id, max_new_tokens)
        return [self.prompts.finished_text(beams[0].tokens) for beams in found]

    def _questions(
        self, adapter: Adapter | None, inputs: Sequence[str], wordings: Sequence[str] | None
    ) -> TokenBatch:
        prompts, form = self.prompts, self.config.task_llm.instruction
        if adapter is not None and wordings is None and form != "none":
            raise ValueError(
                f"model.task_llm.instruction={form}: this Task LLM answers with the "
                "wordings alone; pass them"
            )
        said = wordings if wordings is not None else [None] * len(inputs)
        if adapter is not None:
            return self.task_batch(inputs, None, said)
        ids = [
            prompts.task_prompt(text, instruction)
            for text, instruction in zip(inputs, said, strict=True)
        ]
        return TokenBatch.build(ids, None, prompts.pad_id, device=self.device)

    def decode(
        self, latent_TZ: Tensor, max_new_tokens: int, any_unfinished: Callable[[bool], bool] = bool
    ) -> list[str]:
        """The instruction that the decoder reads out of each z, without examples."""
        prompts = self.decoder_prompts
        batch = TokenBatch.build(
            [prompts.decoder_prompt(())] * len(latent_TZ),
            None,
            prompts.pad_id,
            self.config.decoder.num_soft_tokens,
            self.device,
        )
        rows = self.decoder.generate(
            latent_TZ, batch, prompts.eos_id, max_new_tokens, any_unfinished
        )
        return [prompts.text(row) for row in rows]

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


SHARD_ABOVE_BYTES = 8e9


def is_sharded(config: TaskLlmConfig, dtype: torch.dtype) -> bool:
    """Decided by the shapes, before anything is loaded."""
    if config.shard == "auto":
        return stored_bytes(config.base, config.quantisation, dtype) > SHARD_ABOVE_BYTES
    return config.shard == "always"


def _role_lm(
    config: EncoderConfig,
    dtype: torch.dtype,
    attention: Choice,
    device: torch.device,
    shard: Shard | None,
) -> nn.Module:
    lm = load_lm(config.base, config.quantisation, dtype, attention, device, shard)
    return add_static_lora(lm, config.tuning) if isinstance(config.tuning, LoraTuning) else lm


def _hidden_size(lm: nn.Module) -> int:
    size: int = lm.get_input_embeddings().embedding_dim  # type: ignore[operator]
    return size
