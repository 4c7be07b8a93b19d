"""Who proposes instructions: the run's decoder, its Task LLM, or an endpoint.

Letters: C candidates, T tasks, Z latent size.
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ship_ds.api import Ship
from ship_ds.evaluation.endpoint import ChatEndpoint
from ship_ds.inference.bank import Bank
from ship_ds.inference.deduction import bare_answerer
from ship_ds.inference.proposals import sample_texts
from ship_ds.model.drawing import draw_seed
from ship_ds.supply.config import ProposeConfig

_ASKED = (
    "Here are instructions of {count} tasks. Write {num_new} new ones for other tasks on inputs of "
    "the same form, one a line, without numbers."
)
_NUMBER = re.compile(r"^\s*(?:\d+\s*[.):]|[-*•])\s*")


class ProposedTask(NamedTuple):
    """An instruction, and what it was made of."""

    text: str
    origin: dict[str, Any]


class Proposer(ABC):
    """Proposes instructions, as a function of the seed and the round."""

    @abstractmethod
    def propose(self, known: Sequence[str], seed: int, number: int) -> list[ProposedTask]:
        """The instructions of a round; some may be alike, or like known ones.

        Args:
            known: instructions to start from.
            seed: of every draw.
            number: of the round, from 0.

        Raises:
            UserError: an endpoint that was asked gave no answer.
        """


class DecoderProposer(Proposer):
    """What the decoder reads out of latents that nobody wrote an instruction for."""

    def __init__(self, ship: Ship, config: ProposeConfig) -> None:
        self.ship, self.config = ship, config
        self._bank: Bank | None = None

    @torch.no_grad()
    def propose(self, known: Sequence[str], seed: int, number: int) -> list[ProposedTask]:
        """See `Proposer`."""
        model, config = self.ship.model, self.config
        rng = random.Random(f"supply {seed} {number}")
        count = config.num_at_once
        generator = torch.Generator().manual_seed(draw_seed("supply", seed, number))
        bank = self._bank = self._bank or self.ship.bank_of(known)
        starts = [
            None if rng.random() < config.prior_share else rng.randrange(len(bank))
            for _ in range(count)
        ]
        drawn_TZ = model.prior.sample(count, generator).to(bank.latent_CZ.device)
        noise_TZ = torch.randn(drawn_TZ.shape, generator=generator).to(drawn_TZ.device)
        rows = torch.tensor([start or 0 for start in starts], device=drawn_TZ.device)
        # A generator of its own, so that the other draws do not hang on the share.
        ways = random.Random(f"supply ways {seed} {number}")
        ends = [
            ways.randrange(len(bank))
            if ways.random() < config.between_share and start is not None
            else None
            for start in starts
        ]
        way_T1 = torch.tensor([[0.0 if end is None else ways.random()] for end in ends])
        others = torch.tensor([end or 0 for end in ends], device=drawn_TZ.device)
        middle_TZ = torch.lerp(
            bank.latent_CZ[rows], bank.latent_CZ[others], way_T1.to(bank.latent_CZ)
        )
        around_TZ = middle_TZ + config.spread * (bank.log_variance_CZ[rows] / 2).exp() * noise_TZ
        is_drawn = torch.tensor([start is None for start in starts], device=drawn_TZ.device)
        latent_TZ = torch.where(is_drawn[:, None], drawn_TZ, around_TZ)
        texts = sample_texts(
            model,
            [()] * count,
            latent_TZ,
            1,
            config.temperature,
            [draw_seed("supply", seed, number, i) for i in range(count)],
            self.ship.config.evaluation.max_instruction_tokens,
        )
        return [
            ProposedTask(
                text,
                {"by": "decoder", "run": self.ship.digest[:12]}
                | ({"from": "prior"} if start is None else {"around": bank.instructions[start]})
                | ({} if end is None else {"towards": bank.instructions[end]}),
            )
            for row, start, end in zip(texts, starts, ends, strict=True)
            for text in row
        ]


class TaskLlmProposer(Proposer):
    """What the bare Task LLM writes after a numbered list of known instructions."""

    def __init__(self, ship: Ship, config: ProposeConfig) -> None:
        self.ship, self.config = ship, config

    def propose(self, known: Sequence[str], seed: int, number: int) -> list[ProposedTask]:
        """See `Proposer`: one for each list, greedily; the lists differ."""
        form, prompts = self.ship.model.prompts, []
        lists = [
            _some(known, self.config.num_in_context, f"{seed} {number} {i}")
            for i in range(self.config.num_at_once)
        ]
        for shown in lists:
            asked = _ASKED.format(count=len(shown), num_new=1)
            prompts.append(form.task_prompt("\n".join([asked, *shown])))
        length = self.ship.config.evaluation.max_instruction_tokens
        rows = bare_answerer(self.ship.model).rows([prompts], length)[0]
        origin = {"by": "task_llm", "run": self.ship.digest[:12]}
        texts = [_lines(form.text(row))[:1] for row in rows]
        return [
            ProposedTask(text, origin | {"shown": shown})
            for row, shown in zip(texts, lists, strict=True)
            for text in row
        ]


class EndpointProposer(Proposer):
    """What a model behind an OpenAI-compatible endpoint writes when it is shown known ones."""

    def __init__(self, endpoint: ChatEndpoint, config: ProposeConfig) -> None:
        self.endpoint, self.config = endpoint, config

    def propose(self, known: Sequence[str], seed: int, number: int) -> list[ProposedTask]:
        """See `Proposer`: one request a round."""
        shown = _some(known, self.config.num_in_context, f"{seed} {number}")
        asked = _ASKED.format(count=len(shown), num_new=self.config.num_at_once)
        message = {"role": "user", "content": "\n".join([asked, "", *shown])}
        # The seed makes requests of different rounds differ where they show the same.
        reply = self.endpoint.reply(
            [message],
            temperature=self.config.temperature,
            seed=draw_seed("supply", seed, number) % 2**31,
        )
        origin = {"by": "endpoint", "model": self.endpoint.config.model, "shown": shown}
        return [ProposedTask(text, origin) for text in _lines(reply)[: self.config.num_at_once]]


def _some(known: Sequence[str], count: int, key: str) -> list[str]:
    return random.Random(f"supply {key}").sample(list(known), min(count, len(known)))


def _lines(text: str) -> list[str]:
    """Lines without numbers, dashes and space around them."""
    lines = (_NUMBER.sub("", line).strip() for line in text.splitlines())
    return [line for line in lines if line]
