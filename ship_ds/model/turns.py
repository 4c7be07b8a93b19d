"""Ranks that share one model's weights, each with work of its own.

Under ZeRO-3 a pass through a model is a collective: every rank has to make it, or all of them
hang. While training they all do the same. In an evaluation each rank has tasks of its own, so how
many passes it makes, and through which part, nobody else knows. So before each pass the ranks agree
whose part is next, and those who wanted another one, or are done, make an idle pass that nobody
reads:

    rank 0 wants   encoder   task LLM   task LLM   (done)
    rank 1 wants   encoder   decoder    decoder    task LLM
    all make       encoder   task LLM   decoder    task LLM     <- one after the other
                             task LLM   decoder

    with in_turn(model, ranks.sum_over_ranks):
        answers = answer_latents(model, ...)      # any code that asks the model, on each rank

It costs a sum of six numbers a pass.

Letters: T tasks, Z latent size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ship_ds.model.batch import TokenBatch
from ship_ds.model.ship import ShipModel

Pass = Literal["encoder", "prior", "hypernetwork", "task LLM", "decoder", "decoder's token"]
"""Passes that go through the same modules in the same order have one name: a prompt and a token of
the Task LLM do; the decoder reads a latent before its prompts. The prior's are its mean and
samples."""
_PASSES: tuple[Pass, ...] = get_args(Pass)
SumOverRanks = Callable[[Tensor], Tensor]


@contextmanager
def in_turn(model: ShipModel, sum_over_ranks: SumOverRanks) -> Iterator[None]:
    """Within it every rank may ask the model as often as it likes, for whatever it likes.

    Every rank has to enter, with or without work. One that raises an error makes idle passes until
    the others are done.

    Args:
        model: in evaluation mode; nothing within may need gradients.
        sum_over_ranks: agrees over the ranks that share the model's weights.
    """
    turns = _Turns(model, sum_over_ranks)
    handles = turns.attach()
    try:
        yield
    finally:
        try:
            turns.finish()
        finally:
            for handle in handles:
                handle.remove()
            turns.detach()


def shares_weights(model: ShipModel) -> bool:
    """Whether ZeRO-3 has sharded any of the model's weights: a pass is then a collective."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


class _Turns:
    """What a rank does before each pass."""

    def __init__(self, model: ShipModel, sum_over_ranks: SumOverRanks) -> None:
        self.model, self.sum_over_ranks = model, sum_over_ranks
        self.is_idling = False
        self.release_task_llm: Callable[[], None] = lambda: None

    def attach(self) -> list[Any]:
        """Be asked before each pass, before DeepSpeed's own hooks gather anything."""
        model = self.model
        modules: dict[Pass, Any] = {
            "encoder": model.encoder,
            "hypernetwork": model.hypernetwork,
            "decoder": model.decoder,
        }
        self.release_task_llm = model.task_llm.wait_before_passes(partial(self.take, "task LLM"))
        model.decoder.before_token = partial(self.take, "decoder's token")
        model.prior.before_pass = partial(self.take, "prior")
        return [
            module.register_forward_pre_hook(partial(self._hook, name), prepend=True)
            for name, module in modules.items()
        ]

    def detach(self) -> None:
        """Passes are made as they come again."""
        self.release_task_llm()
        self.model.decoder.before_token = self.model.prior.before_pass = None

    def _hook(self, name: Pass, *_: Any) -> None:
        self.take(name)

    def take(self, name: Pass) -> None:
        """Return when it is this pass's turn on all ranks."""
        if self.is_idling:
            return
        while (agreed := self._agree(name)) != name:
            self._idle(agreed)

    def finish(self) -> None:
        """Make idle passes until no rank wants one."""
        while (agreed := self._agree(None)) is not None:
            self._idle(agreed)

    def _agree(self, name: Pass | None) -> Pass | None:
        """What most ranks want; of equally many the first."""
        wishes = torch.tensor([float(one == name) for one in _PASSES])
        totals = self.sum_over_ranks(wishes).tolist()
        return _PASSES[totals.index(max(totals))] if any(totals) else None

    @torch.no_grad()
    def _idle(self, name: Pass | None) -> None:
        """The same modules in the same order, with as little to do as there can be."""
        assert name is not None, "this rank wants a pass, so one is agreed on"
        self.is_idling = True
        try:
            self._idle_pass(name)
        finally:
            self.is_idling = False

    def _idle_pass(self, name: Pass) -> None:
        model, decoder, device = self.model, self.model.decoder, self.model.device
        latent_TZ = torch.zeros(1, model.config.latent_size, device=device)
        one_token = TokenBatch.of_lengths(1, 1, 0, device=device)
        match name:
            case "encoder":
                model.encoder(one_token)
            case "prior":
                model.prior.mean(1)
            case "hypernetwork":
                model.hypernetwork(latent_TZ)
            case "task LLM":
                model.task_llm.language_model.logits(one_token)
            case "decoder":
                decoder.stream(latent_TZ, None, model.collator.undecoded(1, device))
            case "decoder's token":
                decoder.language_model.logits(one_token, decoder.own_adapter)
