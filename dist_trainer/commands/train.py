"""`train`: start or resume, train, roll back where that is configured, finish."""

import contextlib
import gc
import logging
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from dist_trainer.commands.devices import ranks_to_start, start_ranks
from dist_trainer.commands.ranks import ranks
from dist_trainer.config.arguments import new_parser, parse_config, stem
from dist_trainer.config.tree import TrainConfig
from dist_trainer.distributed.processes import StopRequest, status_of_rank
from dist_trainer.distributed.watchdog import watched
from dist_trainer.distributed.world import World
from dist_trainer.engine.numerics import naming_operations
from dist_trainer.errors import EXIT_STATUS, UserError
from dist_trainer.log.console import Terminal
from dist_trainer.run.advice import against_infinity
from dist_trainer.run.end import End
from dist_trainer.run.saving import grace_ends
from dist_trainer.run.start import build_run, prepare_run
from dist_trainer.run.state import Run
from dist_trainer.run.summary import finish_run, summary_rows
from dist_trainer.run_folder.folder import RunFolder
from dist_trainer.train import RollBack, train

MAX_ROLL_BACKS = 3
"""To the same checkpoint."""


def command(argv: list[str]) -> int:
    parser = new_parser("train", "Train, or resume where the run folder stands; evaluate and save.")
    parser.add_argument("--devices", type=int | None, default=None, help="ranks on this machine; default: all its GPUs")
    config, values = parse_config(parser, argv)
    if (count := ranks_to_start(config, values.devices)) > 1:
        return start_ranks(count, config, argv)
    os.environ["DIST_TRAINER_VERBOSE"] = "1" if config.log.verbose else ""
    if config.log.verbose:
        logging.getLogger("torch.distributed").setLevel(logging.INFO)
    with ranks(config.run.timeout + 60) as (world, terminal):
        outcome = train_run(config, stem(values), world, terminal)
        if outcome.stopped_by:
            after = f"stopped by {outcome.stopped_by} after step {outcome.summary['steps']}"
            missing = outcome.summary["missing"]
            kept = f"; {missing}: the checkpoint before it stands" if missing else ", saved"
            terminal.say(f"{after}{kept}; start again to continue")
        else:
            title = f"{outcome.folder.path}: {'complete' if outcome.was_complete else 'done'}"
            terminal.table(title, summary_rows(outcome.summary))
    return EXIT_STATUS["stopped" if outcome.stopped_by else "done"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `stopped_by` names a signal; `was_complete`: there was nothing left to do."""

    folder: RunFolder
    summary: dict[str, Any]
    stopped_by: str | None = None
    was_complete: bool = False


def train_run(config: TrainConfig, stem: str, world: World, terminal: Terminal) -> Outcome:
    """Train to the end, or to a signal (collective). Raises UserError for the user's mistakes."""
    stop, end, resume_after, num_roll_backs = StopRequest(), End(world), 0, 0
    rolled_back_to: Path | None = None
    stop.end_at_second(lambda: _end_at_once(end, stop.signal))
    while True:
        prepared = prepare_run(config, stem=stem, world=world, terminal=terminal)
        if prepared.claim.is_complete:
            folder = prepared.claim.folder
            return Outcome(folder, folder.read_summary() or {}, was_complete=True)
        end.begins(prepared)
        try:
            run = build_run(
                prepared, config=config, world=world, terminal=terminal, stop=stop, resume_after=resume_after
            )
            end.trains(run)
            return _train(run, end, stop)
        except RollBack as back:
            resume_after = back.step
        except Exception as error:
            end.record_error(error)
            raise
        num_roll_backs = num_roll_backs + 1 if run.resumed_from == rolled_back_to else 1
        rolled_back_to = run.resumed_from
        gives_up = num_roll_backs > MAX_ROLL_BACKS
        finish_run(run, "mistake" if gives_up else "stopped", "a gradient that was not finite")
        if gives_up:
            raise UserError(
                f"step {resume_after}: the gradient was not finite, for the {num_roll_backs}th time since "
                f"{rolled_back_to or 'the start'}; {against_infinity(config)}"
            )
        terminal.say(f"step {resume_after}: the gradient was not finite: rolled back; continuing after this step")
        del prepared, run
        end.forgets()
        gc.collect()  # two runs would not fit on a device that one fills


def _train(run: Run, end: End, stop: StopRequest) -> Outcome:
    """Train, and finish the run."""
    folder, hung = run.record.folder, partial(end.record_on_main, "fault")

    def asked() -> tuple[str, float] | None:
        return None if run.sums.stop else stop.heard

    if run.world.is_main:  # who writes; its `finish` forgets the run
        folder.writer.until = partial(grace_ends, run)
    stacks = folder.path / "stacks"
    with (
        naming_operations(),
        watched(run.config.run.timeout, run.world.rank, lambda: f"step {end.step}", stacks, hung, asked),
    ):
        stopped_by = train(run)
        return Outcome(folder, finish_run(run, "stopped" if stopped_by else "done", stopped_by), stopped_by)


def _end_at_once(end: End, name: str | None) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        print(f"{name}, the second signal: ended at once; the last checkpoint is whole", file=sys.stderr, flush=True)
    end.record_on_main("interrupted", f"{name}, the second signal")
    os._exit(status_of_rank(EXIT_STATUS["interrupted"]))
