"""run.start_from: a new run that begins with what another one has learned."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from dist_trainer.config.tree import TrainConfig
from dist_trainer.distributed.collectives import on_main, read_on_main
from dist_trainer.errors import UserError
from dist_trainer.run.state import Learner
from dist_trainer.run_folder import checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint of another run."""

    checkpoint: Path
    with_optimizer: bool
    """Momentum and moving average too."""

    def __str__(self) -> str:
        return f"{'weights, momentum and EMA' if self.with_optimizer else 'weights'} of {self.checkpoint}"


def find_source(config: TrainConfig) -> Source | None:
    """What run.start_from names, if anything. Raises UserError if it is not there, or does not fit the config."""
    if config.run.start_from is None:
        return None
    if config.model.pretrained:
        raise UserError("run.start_from: model.pretrained names initial weights too; leave one of them out")
    match = re.fullmatch(r"(.+?)(?:@(\d+))?(\+optimizer)?", config.run.start_from)
    assert match is not None, "the first group takes whatever the others leave"
    name, step, with_optimizer = match[1], match[2], bool(match[3])
    run = _run_folder(name, config.run.root)
    if with_optimizer and (other := _optimizer_of(run)) != config.optimizer.name:
        raise UserError(
            f"run.start_from: the optimizer of {run} is {other}, and optimizer.name is {config.optimizer.name}; leave "
            "+optimizer out"
        )
    return Source(_checkpoint(run, step), with_optimizer)


def _run_folder(name: str, root: Path) -> Path:
    for folder in (Path(name).expanduser(), root / name):
        if (folder / "checkpoints").is_dir():
            return folder
    raise UserError(f"run.start_from: {name}: no run folder with checkpoints, here or in {root}")


def _checkpoint(run: Path, step: str | None) -> Path:
    there = {int(folder.name.removeprefix("step_")): folder for folder in checkpoint.complete(run / "checkpoints")}
    if not there:
        raise UserError(f"run.start_from: {run} has no complete checkpoint")
    if step is not None and int(step) not in there:
        raise UserError(
            f"run.start_from: {run} has no checkpoint of step {int(step)}; it has {', '.join(map(str, sorted(there)))}"
        )
    found = there[int(step) if step is not None else max(there)]
    if reason := checkpoint.fault(found):
        raise UserError(f"run.start_from: {found} is damaged ({reason}); name another step as {run}@STEP")
    return found


def _optimizer_of(run: Path) -> str:
    try:
        return str(yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["name"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"run.start_from: {run}/config.yaml cannot be read; leave +optimizer out") from None


def load_optimizer(source: Source, learner: Learner) -> None:
    """The source's momentum and, where both have one, its moving average (collective), before the first step."""
    world, folder = learner.engine.world, source.checkpoint
    learner.engine.load_optimizer_state(read_on_main(world, lambda: checkpoint.load_tensors(folder, "optim")))
    if learner.ema is not None and "ema" in on_main(world, lambda: checkpoint.tensor_names(folder)):
        learner.weights.load_ema(read_on_main(world, lambda: checkpoint.load_tensors(folder, "ema")), 0)
