"""SHIP (Sun et al. 2025, arXiv 2502.02315): encoder, hypernetwork, Task LLM and decoder in one module, for one engine.

Letters: T tasks, M examples a task, Z latent, K labelled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ship_ds.config import EncoderConfig, LoraHypernetworkConfig, LoraTuning, ModelConfig
from ship_ds.data.sampler import TaskDraw
from ship_ds.loss import kl_to_prior, sum_cross_entropy
from ship_ds.model.adapters import Adapter, wrap_sites
from ship_ds.model.backbone import add_static_lora, freeze, load_lm, load_tokenizer
from ship_ds.model.batch import TokenBatch
from ship_ds.model.decoder import Decoder
from ship_ds.model.encoder import Encoder, Posterior, posterior_noise
from ship_ds.model.hypernetwork import LoraHypernetwork, SoftPromptHypernetwork
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
    """Sums over this micro-batch: task and reconstruction over target tokens, KL over tasks (mean over dimensions)."""

    task: Tensor
    reconstruction: Tensor
    kl: Tensor
    kl_TZ: Tensor


class ShipModel(nn.Module):
    """All of SHIP. The Task LLM is a submodule only when it is to be sharded; a replicated one stays outside the engine."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.prompts = PromptFormat(load_tokenizer(config.task_llm.base))
        self.encoder_prompts = PromptFormat(load_tokenizer(config.encoder.base))
        self.decoder_prompts = PromptFormat(load_tokenizer(config.decoder.base))
        task_lm = freeze(load_lm(config.task_llm.base, config.task_llm.quantisation, dtype))
        targets = config.hypernetwork.targets if isinstance(config.hypernetwork, LoraHypernetworkConfig) else ()
        sites = wrap_sites(task_lm, targets)
        task_llm = TaskLlm(task_lm, config.task_llm.checkpointing)
        self._outside = [] if config.task_llm.shard == "always" else [task_llm]
        if not self._outside:
            self.sharded_task_llm = task_llm
        encoder_lm, decoder_lm = _role_lm(config.encoder, dtype), _role_lm(config.decoder, dtype)
        self.encoder = Encoder(encoder_lm, _hidden_size(encoder_lm), config.latent_size)
        # The encoder reads hidden states; its output layer is never used and would be a dead trainable parameter.
        encoder_lm.lm_head = nn.Identity()
        self.decoder = Decoder(decoder_lm, _hidden_size(decoder_lm), config.latent_size, config.decoder.num_soft_tokens)
        self.hypernetwork: LoraHypernetwork | SoftPromptHypernetwork
        if isinstance(config.hypernetwork, LoraHypernetworkConfig):
            self.hypernetwork = LoraHypernetwork(config.hypernetwork, config.latent_size, sites)
        else:
            self.hypernetwork = SoftPromptHypernetwork(config.hypernetwork, config.latent_size, _hidden_size(task_lm))

    @property
    def task_llm(self) -> TaskLlm:
        return self._outside[0] if self._outside else self.sharded_task_llm

    @property
    def device(self) -> torch.device:
        return next(self.hypernetwork.parameters()).device

    @property
    def num_virtual_tokens(self) -> int:
        return self.hypernetwork.num_virtual_tokens if isinstance(self.hypernetwork, SoftPromptHypernetwork) else 0

    def collate(self, draws: Sequence[TaskDraw], seed: int, step: int) -> ShipBatch:
        encoder, decoder, task = self.encoder_prompts, self.decoder_prompts, self.prompts
        answered = [example for draw in draws for example in draw.answered]
        return ShipBatch(
            TokenBatch.build([encoder.encoder_prompt(draw.wording) for draw in draws], None, encoder.pad_id, device=self.device),
            TokenBatch.build(
                [task.task_prompt(example.input) for example in answered],
                [task.target(example.target) for example in answered], task.pad_id, self.num_virtual_tokens,
                self.device,
            ),
            TokenBatch.build(
                [decoder.decoder_prompt(draw.shown) for draw in draws], [decoder.target(draw.wording) for draw in draws],
                decoder.pad_id, self.config.decoder.num_soft_tokens, self.device,
            ),
            torch.tensor([draw.shows_latent for draw in draws], device=self.device),
            posterior_noise(seed, step, [draw.task_id for draw in draws], self.config.latent_size).to(self.device),
        )

    def forward(self, batch: ShipBatch) -> LossSums:
        """One sample of z feeds both halves: the adapter (VIB) and the reconstruction (VAE)."""
        packed = self.device.type == "cuda"
        posterior = Posterior(*self.encoder(batch.instructions))
        latent_TZ = posterior.sample(batch.noise_TZ)
        task_logits, task_labels = self.task_llm(self.hypernetwork(latent_TZ), batch.answers, len(latent_TZ), packed)
        text_logits, text_labels = self.decoder(latent_TZ, batch.shows_latent_T, batch.decoded, packed)
        kl_TZ = kl_to_prior(posterior.mean_TZ, posterior.log_variance_TZ)
        return LossSums(
            sum_cross_entropy(task_logits, task_labels), sum_cross_entropy(text_logits, text_labels),
            kl_TZ.mean(1).sum(), kl_TZ.detach(),
        )

    @torch.no_grad()
    def encode(self, instructions: Sequence[str]) -> Tensor:
        """Posterior means (T, Z)."""
        prompts = self.encoder_prompts
        ids = [prompts.encoder_prompt(text) for text in instructions]
        batch = TokenBatch.build(ids, None, prompts.pad_id, device=self.device)
        mean_TZ: Tensor = self.encoder(batch)[0]
        return mean_TZ

    @torch.no_grad()
    def adapt(self, latent_TZ: Tensor) -> Adapter:
        adapter: Adapter = self.hypernetwork(latent_TZ)
        return adapter

    def answer(
        self, adapter: Adapter | None, inputs: Sequence[str], max_new_tokens: int, instructions: Sequence[str] | None = None
    ) -> list[str | None]:
        """Greedy answers, one an input, task-major under `adapter`; None where no end-of-sequence came in time."""
        prompts = self.prompts
        stated = instructions if instructions is not None else [None] * len(inputs)
        ids = [prompts.task_prompt(text, instruction) for text, instruction in zip(inputs, stated, strict=True)]
        batch = TokenBatch.build(ids, None, prompts.pad_id, self.num_virtual_tokens if adapter is not None else 0, self.device)
        rows = self.task_llm.generate(adapter, batch, prompts.eos_id, max_new_tokens)
        return [prompts.text(row) if row[-1] == prompts.eos_id else None for row in rows]

    def decode(self, latent_TZ: Tensor, max_new_tokens: int) -> list[str]:
        """The instruction that the decoder reads out of each z, without examples."""
        prompts = self.decoder_prompts
        batch = TokenBatch.build(
            [prompts.decoder_prompt(())] * len(latent_TZ), None, prompts.pad_id, self.config.decoder.num_soft_tokens, self.device
        )
        return [prompts.text(row) for row in self.decoder.generate(latent_TZ, batch, prompts.eos_id, max_new_tokens)]


def _role_lm(config: EncoderConfig, dtype: torch.dtype) -> nn.Module:
    lm = load_lm(config.base, config.quantisation, dtype)
    return add_static_lora(lm, config.tuning) if isinstance(config.tuning, LoraTuning) else lm


def _hidden_size(lm: nn.Module) -> int:
    size: int = lm.get_input_embeddings().embedding_dim  # type: ignore[operator]
    return size
