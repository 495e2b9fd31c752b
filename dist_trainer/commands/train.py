"""`train`, from config to summary: start or go on, train, roll back where that is asked for, finish."""

from dataclasses import dataclass
from typing import Any

import torch

from dist_trainer.config.tree import TrainConfig
from dist_trainer.distributed.collectives import StopRequest, World
from dist_trainer.distributed.watchdog import watched
from dist_trainer.engine.numerics import naming_operations
from dist_trainer.errors import LocalError, UserError
from dist_trainer.log.console import Terminal
from dist_trainer.run.start import Run, finish_run, start_run
from dist_trainer.run_folder.folder import RunFolder
from dist_trainer.train import RollBack, train

MAX_ROLL_BACKS = 3
"""To the same checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run. `stopped_by` names a signal; `was_complete`: there was nothing left to do."""

    folder: RunFolder
    summary: dict[str, Any]
    stopped_by: str | None = None
    was_complete: bool = False


def train_run(config: TrainConfig, stem: str, world: World, terminal: Terminal) -> Outcome:
    """Train to the end, or to a signal (collective). Raises UserError for the user's mistakes."""
    stop, past, last, tries = StopRequest(), 0, "", 0
    while True:
        run = start_run(config, stem, world, terminal, stop, past)
        if isinstance(run, RunFolder):
            return Outcome(run, run.read_summary() or {}, was_complete=True)
        try:
            stopped_by = _train(run)
            return Outcome(run.folder, finish_run(run, stopped_by), stopped_by)
        except RollBack as back:
            past = back.step
        finish_run(run, "a gradient that was not finite")
        tries = tries + 1 if run.resumed_from == last else 1
        last = run.resumed_from
        if tries > MAX_ROLL_BACKS:
            raise UserError(
                f"step {past}: the gradient was not finite, for the {tries}th time since {last or 'the start'}; "
                "lower lr, lengthen lr.warmup.duration, or set engine.clip_grad_norm; then start again"
            )
        terminal.say(f"step {past}: the gradient was not finite: rolling back, and on behind that step")


def _train(run: Run) -> str | None:
    folder, world = run.folder.path / "stacks", run.world
    try:
        where = lambda: f"step {run.progress.step}"  # noqa: E731
        with naming_operations(), watched(run.config.run.timeout, world.rank, where, folder):
            return train(run)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate" not in str(error):
            raise
        raise LocalError(_out_of_memory(run)) from None


def _out_of_memory(run: Run) -> str:
    """One line: what did not fit, and what to change."""
    size, batch = run.plan.micro_batch, run.plan.global_batch
    smaller = ", ".join([str(n) for n in range(size - 1, 0, -1) if batch % n == 0][:4])
    return (
        f"rank {run.world.rank}, step {run.progress.step}: out of memory with micro-batches of {size} samples. Smaller "
        f"ones that divide the batch ({smaller or 'there are none'}: --batch.micro_batch) need less, but make another "
        "model, since they are batch-norm's groups; engine.zero above 0 needs less and changes nothing"
    )
