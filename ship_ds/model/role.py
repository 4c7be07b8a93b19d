"""A role of SHIP: a language model and an adapter.

    encoder     base + its static LoRA, or a model of its own that is trained whole
    decoder     likewise
    Task LLM    base + what the hypernetwork generates for each task

Where `model.backbone` is shared, the base of all three is one module: the Task LLM has it, encoder
and decoder borrow it.

Letters: K labelled positions, H hidden size, V vocabulary.
"""

from typing import Any

from torch import Tensor, nn

from ship_ds.model.adapters.adapter import Adapter
from ship_ds.model.adapters.static_lora import StaticLora
from ship_ds.model.language_model import language_model


class Role(nn.Module):
    """What encoder, decoder and Task LLM have in common."""

    def __init__(
        self,
        lm: nn.Module,
        adapter: StaticLora | None = None,
        *,
        checkpointing: bool = False,
        borrows: bool = False,
    ) -> None:
        """Register the model and the adapter.

        Args:
            lm: a transformers model, its sites and blocks wrapped where it needs it.
            adapter: the role's own, over wrapped sites; None: none, or one that comes with each
                call.
            checkpointing: recompute the model's blocks in the backward pass.
            borrows: `lm` is another role's, which has it registered.
        """
        super().__init__()
        self.language_model = language_model(lm)
        self.checkpointing = checkpointing
        if not borrows:
            self.lm = lm
        # After the model, before what a role adds: the order of the optimiser's state.
        self.adapter = adapter

    @property
    def own_adapter(self) -> Adapter | None:
        """What the model is run under; None: nothing."""
        return None if self.adapter is None else self.adapter.value()


class Writer(Role):
    """A role that predicts text. Its forward gives the states before each label and the labels, so
    that a loss may take the logits in pieces (step.py: Predictions)."""

    def score(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Label logits (K, V) and labels (K,), arguments as in `forward`."""
        states_KH, labels_K = self(*arguments, **options)
        return self.language_model.head(states_KH), labels_K
