"""Claiming a run folder: at the start, with the initial weights, or at its newest checkpoint."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.config import DataConfig
from dist_trainer.distributed.collectives import on_main
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.models import ModelConfig
from dist_trainer.models.pretrained import LoadReport, load_pretrained
from dist_trainer.run_folder import checkpoint
from dist_trainer.run_folder.folder import RunFolder
from dist_trainer.run_folder.identity import Change
from dist_trainer.storage.storage import Storage


@dataclass(frozen=True)
class Claim:
    """A run folder that this process owns, unless the run in it `is_complete`."""

    folder: RunFolder
    is_complete: bool
    checkpoint: Path | None
    """The checkpoint to resume from; None at the start."""
    changed: list[Change]
    """Keys of the training result that have other values from here on (run.allow_change)."""
    scored_on: str | None
    """The fingerprint of the validation set that the run was last started with; None in a new folder."""


def claim_or_initialise(
    config: TrainConfig,
    *,
    model: nn.Module,
    folder: RunFolder,
    identity_keys: dict[str, Any],
    world: World,
    terminal: Terminal,
) -> Claim:
    """`claim_folder`; a run without checkpoints also loads the configured initial weights, if any (collective)."""
    has_checkpoints = on_main(world, lambda: bool(checkpoint.complete(folder.checkpoints)))
    report = None
    if not has_checkpoints:  # before the claim, so that a mistake leaves no folder
        report = load_initial_weights(config.model, config.data, model, world)
    claim = claim_folder(config, folder=folder, identity_keys=identity_keys, world=world, terminal=terminal)
    if has_checkpoints and not claim.is_complete and claim.checkpoint is None:  # they turned out damaged
        report = load_initial_weights(config.model, config.data, model, world)
    if report is not None:
        for line in report.lines():
            terminal.say(line)
        on_main(world, lambda: folder.write_pretrained(asdict(report)))
    return claim


def load_initial_weights(config: ModelConfig, data: DataConfig, model: nn.Module, world: World) -> LoadReport | None:
    """Load the weights that model.pretrained names, if any, into the model (collective)."""
    if not config.pretrained:
        return None
    return load_pretrained(config, Storage(data.storage_options, data.retry), model, world)


def claim_folder(
    config: TrainConfig,
    *,
    folder: RunFolder,
    identity_keys: dict[str, Any],
    world: World,
    terminal: Terminal,
) -> Claim:
    """Become the folder's owner and find what to resume (collective). The folder's config is not rewritten yet."""

    def claim() -> dict[str, Any]:
        if config.checkpoint.keep_last < 1:
            raise UserError(f"checkpoint.keep_last: {config.checkpoint.keep_last}; keep at least 1 to resume from")
        folder.claim()
        changed = folder.check_identity(identity_keys, config.run.allow_change)
        found = {"changed": [asdict(change) for change in changed], "scored_on": folder.read_val_fingerprint()}
        summary = folder.read_summary()
        if summary is not None and summary["state"] == "done" and not changed:
            folder.release()
            return {**found, "is_complete": True, "checkpoint": None}
        for change in changed:
            terminal.say(f"changed: {change}")
        for change in folder.free_changes(config.as_dict()):
            terminal.say(f"changed, without effect on training: {change}")
        newest, notes = checkpoint.newest(folder.checkpoints)
        for note in notes:
            terminal.say(note)
        terminal.say(f"run folder {folder.path}" + (f", resuming from {newest.name}" if newest else ""))
        return {**found, "is_complete": False, "checkpoint": str(newest) if newest else None}

    found = on_main(world, claim)
    return Claim(
        folder=folder,
        is_complete=found["is_complete"],
        checkpoint=Path(found["checkpoint"]) if found["checkpoint"] else None,
        changed=[Change(**change) for change in found["changed"]],
        scored_on=found["scored_on"],
    )
