"""`what-follows`: for the scripts of launch/ and slurm/, after their ranks have ended."""

import argparse
import os
import sys
from pathlib import Path

from dist_trainer.distributed.processes import ATTEMPT
from dist_trainer.errors import UserError
from dist_trainer.run_folder.what_follows import what_follows


def command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "dist-trainer what-follows", description="Print done, end, requeue or restart, as STATE in the run folder says."
    )
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--status", type=int, default=1, help="with which the ranks ended")
    values = parser.parse_args(argv)
    try:
        word, why = what_follows(values.run, os.environ.get(ATTEMPT), values.status)
    except OSError as error:
        raise UserError(f"{values.run}: {error.strerror or error}") from None
    print(why, file=sys.stderr, flush=True)
    print(word)
    return 0
