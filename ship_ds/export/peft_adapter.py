"""Adapters that the hypernetwork made, as PEFT folders that have been proved before they are left
behind.

An adapter whose keys match nothing is served as the bare base in silence. So each export is loaded
back with `peft` on the same base: its logits on probe prompts must equal the live hypernetwork's
and differ from the base's.

Letters: S padded length, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ship_ds.adapter_files import paths_of, weights_digest
from ship_ds.api import Ship
from ship_ds.config import base_folder
from ship_ds.errors import UserError
from ship_ds.export.proof import PeftBase, PromptIds, Proof, largest_difference
from ship_ds.model.adapters.adapter import Adapter, Export
from ship_ds.model.batch import TokenBatch
from ship_ds.model.loading import load_lm
from ship_ds.origin import Origin, Tuning
from ship_ds.weights_folder import WeightsFolder, settings_fingerprint

MAX_DIFFERENCE = 1e-4
"""Largest logit difference in fp32 between the exported adapter and the live hypernetwork; the same
share of what the adapter changes, where that is above 1. The larger the logits are, the more
rounding moves them, on one processor more than on another: a T5 that was within it on AVX-512 was
refused on AVX2, at 1.5e-4 of logits that the adapter had moved by 15."""
MAX_SHARE = 0.05
"""The same in bf16, as a share of what the adapter itself changes: there `peft` rounds in other
places, and more than fp32 allows. So an adapter that changes less than rounding does is refused: a
wider bound would pass one of which half the keys match. To prove every run in fp32 would take two
copies of the base in it, where a card may just hold two in 16 bits; --dtype float32 asks for it."""


def max_difference(from_base: float) -> float:
    """What fp32 may round by, of an adapter that moves logits by so much at most."""
    return MAX_DIFFERENCE * max(1.0, from_base)


class Exporter:
    """Writes and proves adapters of one run; the base that `peft` loads them on is read once.

    Args:
        ship: The run.
        probes: Inputs on which each adapter is proved.

    Raises:
        UserError: There are no probes.
    """

    def __init__(self, ship: Ship, probes: Sequence[str]) -> None:
        if not probes:
            raise UserError("--probe: give at least one input to prove the adapter on")
        config = ship.config.model.task_llm
        self.ship, self.probes = ship, probes
        # As the live model computes: rounding alone would differ more than the proof allows.
        device, self.dtype = ship.model.device, ship.dtype
        base = load_lm(config.base, config.quantisation, self.dtype, device=device)
        self.base = PeftBase(base, device)
        folder = base_folder(config.base)
        self.fingerprint = WeightsFolder(folder).fingerprint
        self.settings = settings_fingerprint(folder)

    @torch.no_grad()
    def write(
        self,
        part: Path,
        export: Export,
        made_from: str,
        wording: str | None,
        tuning: Tuning | None = None,
        confidence: Mapping[str, float | None] | None = None,
    ) -> Proof:
        """Write an adapter with its origin and model card, and prove it.

        Args:
            part: An existing folder, which gets its own name only when this returns.
            export: The adapter.
            made_from: Of what, for the model card.
            wording: The instruction that the prompts state, where this run's prompts do.
            tuning: What was trained of it since; it stands in its origin.
            confidence: In its answers to the probes; likewise.

        Returns:
            How far it is from the live adapter and from the bare base.

        Raises:
            UserError: The proof fails, or the prompts need a wording and there is none.
        """
        config = self.ship.config.model.task_llm
        if wording is None and config.instruction != "none":
            raise UserError(
                f"model.task_llm.instruction={config.instruction}: this run's prompts state the "
                "instruction, and a bare latent or a sum of adapters has none; give one "
                "instruction each"
            )
        export.write(part, str(base_folder(config.base).resolve()), self.base.base)
        prompts = [self.ship.model.question(text, wording) for text in self.probes]
        proof = self._prove(part, export, prompts)
        Origin(
            made_from,
            self.ship.config.run.folder,
            self.ship.digest,
            config.base,
            self.fingerprint,
            config.quantisation,
            export.shape(),
            self.ship.model.prompts.describe(),
            [list(ids) for ids in prompts],
            asdict(proof),
            weights_digest(paths_of(part, export.folders())),
            tuning,
            None if confidence is None else dict(confidence),
            self.settings,
            export.folders(),
        ).write(part)
        return proof

    def _prove(self, part: Path, export: Export, prompts: PromptIds) -> Proof:
        live = [live_logits(self.ship, export.live(), ids) for ids in prompts]
        bare = self.base.bare(prompts)
        exported = self.base.under(paths_of(part, export.folders()), prompts)
        proof = Proof(largest_difference(exported, live), largest_difference(exported, bare))
        most, advice = max_difference(proof.from_base), ""
        if self.dtype != torch.float32:
            most = MAX_SHARE * proof.from_base
            # An adapter that changes little is lost in the rounding of logits to 16 bits.
            advice = "; --dtype float32 rounds less"
        # Written so that a NaN fails, too, and an adapter that does nothing.
        if not (proof.from_live <= most and proof.from_base > MAX_DIFFERENCE):
            raise UserError(
                f"{self.ship.config.model.task_llm.base}: the exported adapter's logits differ "
                f"from the live one's by {proof.from_live:.2e} (at most {most:.0e}) and "
                f"from the bare base's by {proof.from_base:.2e} (more than {MAX_DIFFERENCE:.0e}); "
                f"nothing was written{advice}"
            )
        return proof


def live_logits(ship: Ship, adapter: Adapter, ids: Sequence[int]) -> Tensor:
    """Logits (S, V) of the hypernetwork's own Task LLM under an adapter of one task; see
    `LanguageModel.logits`.

    Args:
        ship: The run.
        adapter: Of one task.
        ids: Of the prompt.
    """
    virtual = adapter.virtual_tokens()
    num_virtual = 0 if virtual is None else virtual.shape[1]
    batch = TokenBatch.build([ids], None, ship.model.prompts.pad_id, num_virtual, ship.model.device)
    return ship.model.task_llm.logits(adapter, batch)[0]
