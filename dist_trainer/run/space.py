"""Bytes on the disk that a run's checkpoints, best weights and snapshots take, known before its first step."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from dist_trainer.config.tree import TrainConfig
from dist_trainer.engine.optimizer_state import bytes_per_weight
from dist_trainer.errors import UserError, readable_size
from dist_trainer.run.blueprint import Blueprint
from dist_trainer.run_folder.what_follows import read_state


@dataclass(frozen=True)
class Space:
    """Bytes, without the few of logs and lists."""

    checkpoint: int
    """One of them."""
    in_all: int
    """At most: those kept, the one that is written meanwhile, best weights, snapshots, the average."""


def space_of(config: TrainConfig, blueprint: Blueprint) -> Space:
    """For a run whose engine has not been built."""
    model, optimizer = blueprint.model, blueprint.optimizer
    weights = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    statistics = sum(value.nbytes for value in model.buffers() if value.is_floating_point())
    statistics = statistics if config.precise_bn.num_samples else 0
    has_ema = config.ema.decay is not None
    one = (1 + has_ema) * (weights + statistics) + round(trained * bytes_per_weight(optimizer))
    saving, averaging = config.checkpoint, config.averaging.top_k
    saves = blueprint.plan.num_due(0, blueprint.intervals.checkpoint)
    for_ever = saves // saving.keep_every if saving.keep_every else 0
    kept = min(saves, saving.keep_last + saving.keep_best + for_ever)
    snapshots = averaging + saving.keep_last + 2 if averaging else 0  # those of kept checkpoints; the average, twice
    return Space(one, one * (kept + 1) + weights * (2 + snapshots))


def room_note(space: Space, folder: Path) -> str | None:
    """A warning where the run may not fit beside what is in its `folder` already.

    Raises UserError where not even one checkpoint does.
    """
    if read_state(folder)[0] == "done":  # nothing more is written, or little
        return None
    place = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(place).free
    there = sum(each.stat().st_size for each in folder.rglob("*.safetensors"))
    if free < space.checkpoint:
        raise UserError(
            f"run.dir: a checkpoint takes {readable_size(space.checkpoint)}, and {readable_size(free)} are free in "
            f"{place}: make room, or choose another --run.dir"
        )
    if free + there < space.in_all:
        return (
            f"run.dir: the run's checkpoints take up to {readable_size(space.in_all)}, and {readable_size(free)} are "
            f"free in {place}: make room, or keep fewer (checkpoint.keep_last, averaging.top_k)"
        )
    return None
