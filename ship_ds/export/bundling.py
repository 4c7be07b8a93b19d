"""A bundle of a checkpoint, for a run that has not ended, or whose bundle is lost."""

from collections.abc import Mapping
from pathlib import Path

from ship_ds.bundle import (
    PROGRESS,
    check_bases,
    check_checkpoint,
    frozen_bases,
    rebased,
    write_bundle,
)
from ship_ds.config import parse_config
from ship_ds.files import refuse_existing
from ship_ds.model.loading import load_prompts
from ship_ds.prompt import ROLES, describe_roles
from ship_ds.runtime import checkpoint


def bundle_from_checkpoint(checkpoint_folder: Path, out: Path, base: str | None = None) -> None:
    """Write the bundle that the run would have left had it ended at this checkpoint.

    Args:
        checkpoint_folder: RUN/checkpoints/step-N.
        out: The bundle's folder, which must not exist yet.
        base: Where its base model is now; None: where its config says.

    Raises:
        UserError: The checkpoint is missing or damaged, or a frozen model is another one now.
    """
    check_checkpoint(checkpoint_folder)
    refuse_existing(out)
    progress = checkpoint.read_progress(checkpoint_folder)
    config = parse_config(progress.config, str(checkpoint_folder / PROGRESS))
    bases: Mapping[str, str] = progress.bases
    if base is not None:
        config, bases = rebased(config, bases, base)
    check_bases(checkpoint_folder, frozen_bases(config), bases)
    prompts = {
        role: load_prompts(getattr(config.model, role).base, config.model.system_message)
        for role in ROLES
    }
    write_bundle(
        out,
        checkpoint.trainable_state(checkpoint_folder),
        config,
        describe_roles(prompts),
        bases,
        progress.known_instructions,
        progress.probes,
    )
