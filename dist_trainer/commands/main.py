"""The command line: `dist-trainer COMMAND CONFIG.yaml [--key.sub value ...]`; under torchrun too."""

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import NoReturn

from dist_trainer.distributed.processes import (
    die_with_torchrun,
    launched_by_torchrun,
    lost_contact,
    nccl_fault,
    status_of_rank,
)
from dist_trainer.distributed.slurm import describe_rank
from dist_trainer.errors import EXIT_STATUS, LocalError, UserError, nearest

USAGE = """usage: dist-trainer COMMAND ...

  train CONFIG.yaml [--key.sub value ...]   train, or resume; evaluates and saves. On all GPUs here, or --devices N;
                                            under torchrun and srun: on their ranks
  eval CONFIG.yaml|RUN [--weights PATH]     exact accuracy of a checkpoint folder or a safetensors file
  eval --pretrained timm/NAME --data.val V  published weights beside their published accuracy: are the labels right?
  average RUN [--top_k K|--last K|--files ...]  one model from several of a run, batch-norm re-estimated
  plan CONFIG.yaml [--gpus N] [--json]      everything that follows from a config, before any compute is used
  doctor CONFIG.yaml                        this machine, or this job, against what the run needs, in a minute
  augment CONFIG.yaml [--samples 8]         a picture of training images, before augmentation and after
  shards pack SOURCE OUT                    images -> tars and index; --help lists the kinds of SOURCE
  shards index URL... [--out NAME.dtx]      an index of existing tars (a folder, a brace pattern; local or URLs)
  shards check LOCATION [--level decode]    compare shards with their index; lists bad samples
  wandb-sync RUN                            upload a run to W&B, each step once, whatever its attempts have left there
  report RUN [RUN ...]                      how runs went: one HTML page, and PNG files; they may still train
  checkpoints ls|verify|show RUN            what a run has saved, whether it is whole, and what is in it
  runs [DIR] [--watch]                      one line a run: state, step, epoch, best, last sign of life, where
  agent ARGUMENTS                           torchrun that ends as its ranks do, for launch/ and slurm/
  what-follows RUN [--status N]             what a script does next, as STATE says: for slurm/
  ls, cp NAME TARGET                        the shipped configs and scripts
  ls models                                 networks with a short name, and their parameters

Several --config files merge left to right. --print_config shows the whole config, COMMAND --help every key.
"""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and end the process, with a status of errors.EXIT_STATUS."""
    alone = False
    try:
        status = dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        alone = isinstance(error, LocalError)
        if _is_main() or alone:
            _complain(f"dist-trainer: {_rank() if alone else ''}{error}")
        status = EXIT_STATUS["mistake"]
    except KeyboardInterrupt:
        status = EXIT_STATUS["interrupted"]
    except BrokenPipeError:
        status = EXIT_STATUS["fault"]
    except Exception as error:
        from dist_trainer.data.parallel import loader_fault, silence_loaders

        silence_loaders()
        line = loader_fault(error)
        _complain(f"dist-trainer: {_rank()}{line}" if line else _rank() + _fault(error))
        status, alone = EXIT_STATUS["mistake" if line else "fault"], True
    if copies := sys.modules.get("dist_trainer.run_folder.fetch"):
        copies.remove_copies()
    # Not sys.exit: after an error, other ranks may wait in a collective that interpreter shutdown would wait for too.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(status_of_rank(status, alone=alone))


def _complain(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr)


def _rank() -> str:
    return f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _fault(error: Exception) -> str:
    return lost_contact(error) or nccl_fault(error) or "".join(traceback.format_exception(error))


COMMANDS = {
    "train": "train:command",
    "eval": "eval:command",
    "average": "average:command",
    "plan": "plan:command",
    "doctor": "doctor:command",
    "augment": "augment:command",
    "shards": "shards:command",
    "wandb-sync": "wandb_sync:command",
    "report": "report:command",
    "checkpoints": "checkpoints:command",
    "runs": "runs:command",
    "agent": "agent:command",
    "what-follows": "what_follows:command",
    "ls": "shipped:list_shipped",
    "cp": "shipped:copy_shipped",
}
"""Where each command is in this folder. Only the one that runs is imported."""
WITH_RANKS = ("train", "eval", "average", "doctor")
"""The commands that run on several ranks; srun may have started them."""


def dispatch(argv: list[str]) -> int:
    """Run the command that `argv` names; returns its exit status. Raises UserError."""
    if argv and argv[0] in WITH_RANKS:
        if launched_by_torchrun():
            die_with_torchrun()
        describe_rank()
    # torch prints 25 lines of C++ where a connection closes, also in an orderly end. Errors are still printed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] == "--version":
        from dist_trainer import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"no command {argv[0]!r}{nearest(argv[0], COMMANDS)}; there are: {', '.join(COMMANDS)}")
    module, _, name = COMMANDS[argv[0]].partition(":")
    with _no_collection():
        command: Callable[[list[str]], int] = getattr(import_module(f"dist_trainer.commands.{module}"), name)
    return command(argv[1:])


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No search for garbage while modules are imported: all that they make stays. A fifth of the start of `plan`."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
