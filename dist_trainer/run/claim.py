"""Claiming a run folder: at the start, with the initial weights, or at its newest checkpoint."""

import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dist_trainer.config.tree import TrainConfig
from dist_trainer.distributed.collectives import gather_json, on_main, read_on_main
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.models.pretrained import LoadReport, load_pretrained
from dist_trainer.run.start_from import Source, find_source
from dist_trainer.run_folder import checkpoint, class_list
from dist_trainer.run_folder.folder import RunFolder, Start
from dist_trainer.run_folder.identity import Change
from dist_trainer.run_folder.owner import sees_owner
from dist_trainer.shards.classes import canonical, compare_classes
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
    source: Source | None
    """What a run without a checkpoint begins with, whose weights are in the model already; None: its own weights."""
    before: Start | None
    """The start before this one; None in a new folder."""
    scored_on: str | None
    """The fingerprint of the validation set that the run was last started with; None in a new folder."""

    @property
    def step(self) -> int:
        """Where the run goes on."""
        return 0 if self.checkpoint is None else checkpoint.step_of(self.checkpoint)


def claim_or_initialise(
    config: TrainConfig,
    *,
    model: nn.Module,
    class_names: Sequence[str],
    folder: RunFolder,
    identity_keys: dict[str, Any],
    world: World,
    terminal: Terminal,
) -> Claim:
    """`claim_folder`; a run without checkpoints also loads the configured initial weights, if any (collective)."""
    has_checkpoints = on_main(world, folder.has_checkpoints)
    initial = None
    if not has_checkpoints:  # before the claim, so that a mistake leaves no folder
        initial = load_initial_weights(config, model, class_names, world)
    claim = claim_folder(config, folder=folder, identity_keys=identity_keys, world=world, terminal=terminal)
    if has_checkpoints and not claim.is_complete and claim.checkpoint is None:  # they turned out damaged
        initial = load_initial_weights(config, model, class_names, world)
    if isinstance(initial, LoadReport):
        for line in initial.lines():
            terminal.say(line)
        on_main(world, lambda: folder.write_pretrained(asdict(initial)))
    if isinstance(initial, Source):
        terminal.say(f"starting with {initial}")
        return replace(claim, source=initial)
    return claim


def load_initial_weights(
    config: TrainConfig, model: nn.Module, class_names: Sequence[str], world: World
) -> LoadReport | Source | None:
    """Load the weights that model.pretrained or run.start_from names, if any, into the model, whose outputs are for
    `class_names` (collective). Raises UserError for weights whose outputs have these names in another order."""
    if config.model.pretrained and not config.run.start_from:
        storage = Storage(config.data.storage_options, config.data.retry)
        same = partial(_has_same_outputs, "model.pretrained", class_names)
        return load_pretrained(config.model, storage, model, world, same)
    source = None
    if found := on_main(world, lambda: as_json(_source_of_same_outputs(config, class_names))):
        source = Source(Path(found["checkpoint"]), found["with_optimizer"])
        folder = source.checkpoint
        weights = read_on_main(world, lambda: checkpoint.load_tensors(folder, "model"))
        checkpoint.load_into(model, weights, f"run.start_from: {source}")
    return source


def _has_same_outputs(key: str, ours: Sequence[str], file: str, theirs: Sequence[str]) -> bool:
    outputs = compare_classes(ours, theirs)
    if outputs == "another order":
        number = next(number for number, name in enumerate(theirs) if canonical(name) != canonical(ours[number]))
        raise UserError(
            f"{key}: {file} has the classes of data.train in another order: output {number} is {theirs[number]!r} "
            f"there, and {ours[number]!r} here; to keep that order: --data.classes {file}"
        )
    return outputs == "same"


def _source_of_same_outputs(config: TrainConfig, class_names: Sequence[str]) -> Source | None:
    source = find_source(config)
    classes = class_list.beside(str(source.checkpoint), Storage()) if source is not None else None
    if source is not None and classes is not None and not _has_same_outputs("run.start_from", class_names, *classes):
        raise UserError(
            f"run.start_from: {classes[0]} has other classes than data.train; model.pretrained takes all but the "
            f"classifier: --model.pretrained {source.checkpoint}"
        )
    return source


def as_json(source: Source | None) -> dict[str, Any]:
    return {} if source is None else {**asdict(source), "checkpoint": str(source.checkpoint)}


def check_hosts(folder: RunFolder, token: str, world: World) -> None:
    """Raises UserError, on every rank, if a host does not see the folder that rank 0 has claimed (collective).

    Rank 0 alone writes it, but after a restart rank 0 may be elsewhere.
    """
    if world.size == world.local_size or folder.uploader is not None:  # every host can go on from a mirror
        return
    blind = "" if world.local_rank or sees_owner(folder.path, token) else socket.gethostname()
    if blind_hosts := [host for host in gather_json(world, blind) if host]:
        on_main(world, folder.release)
        raise UserError(
            f"run.dir: {', '.join(blind_hosts)}: sees another {folder.path} than rank 0's host does: name a folder on "
            "storage that all hosts share"
        )


def claim_folder(
    config: TrainConfig,
    *,
    folder: RunFolder,
    identity_keys: dict[str, Any],
    world: World,
    terminal: Terminal,
) -> Claim:
    """Become the folder's owner and find what to resume (collective). The folder's config is not rewritten yet."""
    found = on_main(world, lambda: claim_on_main(config, folder, identity_keys, terminal))
    if not found["is_complete"]:
        check_hosts(folder, found["token"], world)
    return Claim(
        folder=folder,
        is_complete=found["is_complete"],
        checkpoint=Path(found["checkpoint"]) if found["checkpoint"] else None,
        changed=[Change(**change) for change in found["changed"]],
        source=None,
        before=Start(**found["before"]) if found["before"] else None,
        scored_on=found["scored_on"],
    )


def claim_on_main(
    config: TrainConfig, folder: RunFolder, identity_keys: dict[str, Any], terminal: Terminal
) -> dict[str, Any]:
    """The same on rank 0, as JSON can hold it; "token" tells this claim from others."""
    folder.claim(terminal.say)
    changed, before = folder.check_identity(identity_keys, config.run.allow_change), folder.last_start()
    found = {
        "changed": [asdict(change) for change in changed],
        "before": None if before is None else asdict(before),
        "scored_on": folder.read_val_fingerprint(),
        "token": folder.token,
    }
    if folder.read_state() == "done" and folder.read_summary() is not None and not changed:
        folder.write_state("done")  # of this attempt, too
        if folder.uploader is not None and (missing := folder.uploader.copy_rest()):
            terminal.say(f"warning: {missing}")
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
