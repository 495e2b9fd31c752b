"""A checkpoint back into a run: the model before an engine takes it, everything else afterwards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.config import DataConfig
from dist_trainer.data.index import ShardIndex
from dist_trainer.distributed.collectives import on_main, read_on_main
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.run.data import repaired_samples
from dist_trainer.run.state import Learner, Progress, Record
from dist_trainer.run_folder import checkpoint
from dist_trainer.tensors import State
from dist_trainer.tricks.sync_bn import check_same_world


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose weights are in the model already. Rank 0 alone reads it."""

    folder: Path
    state: dict[str, Any]
    """What its state.json holds."""
    names: list[str]
    """Of its files of tensors."""
    world: World

    @property
    def num_beyond(self) -> int:
        """Gradient values so far that exact sums did not promise."""
        return int(self.state.get("beyond", 0))

    def tensors(self, name: str) -> State:
        """On every rank (collective). Raises UserError for a file that cannot be read."""
        return read_on_main(self.world, lambda: checkpoint.load_tensors(self.folder, name))


def load_model(folder: Path, model: nn.Module, config: TrainConfig, world: World) -> Saved:
    """Load a checkpoint's weights into the model, before an engine takes it (collective).

    Raises UserError if they do not fit.
    """
    state = on_main(world, lambda: checkpoint.load_state(folder))
    saved = Saved(folder, state, on_main(world, lambda: checkpoint.tensor_names(folder)), world)
    if config.model.sync_bn:
        check_same_world(saved.state["world"], world.size)
    if world.device.type == "cpu" and saved.state["world"] == world.size and not config.engine.is_exact:
        torch.set_num_threads(saved.state["threads"])  # the number of threads decides the order of float sums
    checkpoint.load_into(model, saved.tensors("model"), str(folder))
    return saved


def restore(
    saved: Saved, *, learner: Learner, record: Record, train: ShardIndex, config: DataConfig, world: World
) -> Progress:
    """Load everything of a checkpoint except the model (collective).

    Raises UserError for a checkpoint of other data or another order of them.
    """
    state = saved.state
    if any(state[name] != record.facts[name] for name in ("order", "fingerprint")):
        raise UserError(f"{saved.folder}: was made with other data or another order of them; use another --run.name")
    learner.engine.load_optimizer_state(saved.tensors("optim"))
    record.meter.load(state["meter"])
    record.bad_samples.load(state["bad_samples"])
    if record.bad_samples.over_budget:
        repaired = on_main(world, lambda: repaired_samples(train, config, record.bad_samples))
        record.bad_samples.forget(lambda bad: bad.sample in repaired)
    progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
    if learner.ema is not None:
        updates = progress.step - progress.skipped
        if "ema" in saved.names:
            learner.weights.load_ema(saved.tensors("ema"), updates)
        else:
            learner.ema.begin_after(updates)
    return progress
