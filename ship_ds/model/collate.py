"""From drawn tasks and texts to token batches: what each of the three language models reads.

The Task LLM reads (model.task_llm.instruction), V being the adapter's virtual tokens, k the
instruction, x the input: `none` [V, prompt(x)]; `hard` [V, prompt(k, x)]; `soft` [V, embeddings of
k's tokens, prompt(x)], where induction may put optimised embeddings in place of the table's. In
training some tasks of a run with `none` may read as with `hard` (model.task_llm.fading_steps).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ship_ds.data.sampler import TaskDraw
from ship_ds.data.task import Reading
from ship_ds.model.batch import TokenBatch
from ship_ds.model.drawing import keyed_generator
from ship_ds.model.encoder import chances, posterior_noise
from ship_ds.model.step import ShipBatch
from ship_ds.prompt import PromptFormat


@dataclass(frozen=True)
class Prompts:
    """The prompt format of each role, with its base's tokenizer."""

    task_llm: PromptFormat
    encoder: PromptFormat
    decoder: PromptFormat


@dataclass(frozen=True)
class Collator:
    """Makes every batch of a model.

    instruction: how the Task LLM's prompts state the instruction. num_virtual_tokens: places that
    its adapters' virtual tokens take. num_soft_tokens: those of z before the decoder's prompts.
    encoder_context: tokens that the encoder reads at most; None: any number. stated_share: of a
    step's tasks whose prompts state the instruction as text, whatever `instruction` says.
    drop_tokens: how often a token of what the decoder writes is hidden from the next ones.
    """

    prompts: Prompts
    instruction: Literal["none", "hard", "soft"]
    latent_size: int
    num_virtual_tokens: int
    num_soft_tokens: int
    encoder_context: int | None = None
    stated_share: Callable[[int], float] = lambda _: 0.0
    drop_tokens: float = 0.0

    def step(
        self, draws: Sequence[TaskDraw], seed: int, step: int, device: torch.device
    ) -> ShipBatch:
        """The batch of a micro-step: each task's wording, the examples to answer, those shown.

        Made on the host and moved in one copy.

        Args:
            draws: this rank's tasks of the micro-step; each has equally many examples to answer.
            seed: of the run.
            step: the global step; with the seed it keys the noise and what is hidden.
            device: where the batch is wanted.

        Raises:
            UserError: a text holds a control token of the base (`PromptFormat.check_spelling`).
        """
        host = torch.device("cpu")
        names = [draw.task_id for draw in draws]
        states = self._states_instruction(seed, step, names)
        answered = [
            (example, draw.wording, is_stated)
            for draw, is_stated in zip(draws, states, strict=True)
            for example in draw.answered
        ]
        return ShipBatch(
            self.readings([draw.reading for draw in draws], host),
            self.answers(
                [example.input for example, _, _ in answered],
                [example.target for example, _, _ in answered],
                [wording for _, wording, _ in answered],
                host,
                [is_stated for _, _, is_stated in answered],
            ),
            self._decoded(draws, seed, step),
            torch.tensor([draw.shows_latent for draw in draws], device=host),
            posterior_noise(seed, step, names, self.latent_size),
            chances(seed, step, names),
            step=step,
        ).to(device)

    def _decoded(self, draws: Sequence[TaskDraw], seed: int, step: int) -> TokenBatch:
        """What the decoder reads, with some tokens hidden; on the host."""
        prompts = self.prompts.decoder
        targets = [prompts.target(draw.wording) for draw in draws]
        batch = TokenBatch.build(
            [prompts.decoder_prompt(draw.shown) for draw in draws],
            targets,
            prompts.pad_id,
            self.num_soft_tokens,
        )
        if not self.drop_tokens:
            return batch
        drawn = [
            torch.rand(
                len(target), generator=keyed_generator(f"hidden {seed} {step} {draw.task_id}")
            )
            for draw, target in zip(draws, targets, strict=True)
        ]
        return batch.hiding(torch.cat(drawn) < self.drop_tokens, prompts.pad_id)

    def _states_instruction(self, seed: int, step: int, names: list[str]) -> list[bool]:
        """For each task of a step whether its prompts state the instruction all the same."""
        share = self.stated_share(step)
        if share == 0:
            return [False] * len(names)
        # Others than those by which a kind of adapter leaves states out.
        drawn = chances(seed, step, [f"stated {name}" for name in names])
        return [chance < share for chance in drawn.tolist()]

    def readings(self, readings: Sequence[str | Reading], device: torch.device) -> TokenBatch:
        """What the encoder reads: instructions, examples, or both."""
        ids = [self.read_prompt(one) for one in readings]
        return TokenBatch.build(ids, None, self.prompts.encoder.pad_id, device=device)

    def read_prompt(self, reading: str | Reading) -> tuple[int, ...]:
        """The ids of a reading, with as many of its examples as the encoder's context has room
        for; the last ones are left out first."""
        ids = self.prompts.encoder.encoder_prompt(reading)
        fits = self.encoder_context is None or len(ids) <= self.encoder_context
        if fits or isinstance(reading, str) or not reading.examples:
            return ids
        return self.read_prompt(replace(reading, examples=reading.examples[:-1]))

    def answers(
        self,
        inputs: Sequence[str],
        targets: Sequence[str] | None,
        wordings: Sequence[str | None],
        device: torch.device,
        states: Sequence[bool] | None = None,
    ) -> TokenBatch:
        """What the Task LLM reads under an adapter, a row an input.

        Args:
            inputs: what is asked, those of a task side by side.
            targets: one an input; None: to be answered.
            wordings: one an input; None among them: no instruction.
            device: where the batch is wanted.
            states: which inputs stand behind the wording as text, whatever `instruction` says;
                None: none.

        Raises:
            UserError: a text holds a control token of the base (`PromptFormat.check_spelling`).
        """
        prompts = self.prompts.task_llm
        return TokenBatch.build(
            [
                prompts.task_prompt(text, wording if is_stated else self._in_text(wording))
                for text, wording, is_stated in zip(
                    inputs, wordings, states or [False] * len(inputs), strict=True
                )
            ],
            None if targets is None else [prompts.target(text) for text in targets],
            prompts.pad_id,
            self.num_virtual_tokens,
            device,
            [self._before(wording) for wording in wordings],
        )

    def bare_questions(
        self, inputs: Sequence[str], wordings: Sequence[str | None], device: torch.device
    ) -> TokenBatch:
        """What the Task LLM reads without an adapter: the instruction as text, where there is one.

        Args:
            inputs: what is asked.
            wordings: one an input; None among them: no instruction.
            device: where the batch is wanted.

        Raises:
            UserError: a text holds a control token of the base (`PromptFormat.check_spelling`).
        """
        prompts = self.prompts.task_llm
        ids = [
            prompts.task_prompt(text, wording)
            for text, wording in zip(inputs, wordings, strict=True)
        ]
        return TokenBatch.build(ids, None, prompts.pad_id, device=device)

    def undecoded(self, count: int, device: torch.device) -> TokenBatch:
        """What the decoder reads of z alone, `count` rows, to be continued."""
        prompts = self.prompts.decoder
        return TokenBatch.build(
            [prompts.decoder_prompt(())] * count, None, prompts.pad_id, self.num_soft_tokens, device
        )

    def question(self, text: str, wording: str | None = None) -> tuple[int, ...]:
        """The ids before an answer, without virtual tokens."""
        prompt = self.prompts.task_llm.task_prompt(text, self._in_text(wording))
        return (*self._before(wording), *prompt)

    def _in_text(self, wording: str | None) -> str | None:
        return wording if self.instruction == "hard" else None

    def _before(self, wording: str | None) -> tuple[int, ...]:
        if wording is None or self.instruction != "soft":
            return ()
        return self.prompts.task_llm.target(wording)[:-1]  # without the end of sequence
