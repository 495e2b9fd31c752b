"""`wandb-sync`: upload a run from its record, each step once, whatever its attempts have left at W&B."""

import contextlib
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from dist_trainer.config.arguments import new_parser, parse
from dist_trainer.errors import UserError, plural
from dist_trainer.log.follow import Deadline, read_ending
from dist_trainer.log.metrics_file import by_step, read_rows
from dist_trainer.log.wandb_run import WandbConfig, WandbRun, closing_s, describe, mode_of, whole_rows
from dist_trainer.storage.flock import lock_file


def command(argv: list[str]) -> int:
    parser = new_parser("wandb-sync", "Upload a run to W&B from its metrics.jsonl, each step once.", config=False)
    parser.add_argument("run", type=str, help="a run folder")
    folder = Path(parse(parser, argv).run)
    print(sync(folder))
    return 0


def sync(folder: Path) -> str:
    """Send what W&B does not have of the run; returns a line. Raises UserError where that cannot be."""
    facts = read_facts(folder)
    known = {each.name for each in fields(WandbConfig)}
    config = WandbConfig(**{name: value for name, value in facts["wandb"].items() if name in known})
    if not os.environ.get("WANDB_MODE") and mode_of(WandbConfig()) == "offline":
        raise UserError("wandb-sync: no W&B API key is set up here; run `wandb login`, or set WANDB_API_KEY")
    mode = "online" if not os.environ.get("WANDB_MODE") else mode_of(config)
    if mode == "disabled":
        raise UserError("wandb-sync: WANDB_MODE says disabled: unset it")
    rows = list(by_step(read_rows(folder / "metrics.jsonl")))
    if not rows:
        raise UserError(f"{folder}: metrics.jsonl has no metrics yet; nothing to upload")
    with contextlib.suppress(OSError):  # a folder that cannot be written, or a file system without locks
        if lock_file(folder / ".wandb_lock", patience=0) is None:
            raise UserError(f"{folder}: the run trains and uploads by itself; try again when it has ended")
    ending = read_ending(folder)
    whole = whole_rows(rows, ending)
    seconds = closing_s(folder, config) + 60
    wait = f"dist-trainer: wandb-sync: no answer within {config.timeout:g} s; try again later"
    late = f"dist-trainer: wandb-sync: not done after {seconds:.0f} s; try again: what W&B has is not sent twice"
    try:
        with Deadline(config.timeout, lambda: print(wait, file=sys.stderr, flush=True), 1):
            run = WandbRun(folder, config, facts, mode=mode)
        count = run.show(whole, ending)
        run.remove_older()
        with Deadline(seconds, lambda: print(late, file=sys.stderr, flush=True), 1):
            if ending.state == "done":
                run.artifact()
            run.close(ending, alerts=False)
    except Exception as error:  # whatever wandb raises
        raise UserError(f"wandb-sync: {describe(error)}") from None
    rest = "" if whole == rows else f"; step {rows[-1]['step']} may get more values, and comes when the run has gone on"
    return f"{folder}: {plural(count, 'step')} uploaded: {run.where or 'offline'}{rest}"


def read_facts(folder: Path) -> dict[str, Any]:
    """The run's config on W&B. Raises UserError for a folder that is no run."""
    try:
        config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
        environment = json.loads((folder / "env.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a run folder: it has no {Path(error.filename).name}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: cannot be read: {' '.join(str(error).split())}") from None
    return {"wandb": {}, **config, "world": environment.get("world"), "git": environment.get("git")}
