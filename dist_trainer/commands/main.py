"""The command line: `dist-trainer COMMAND CONFIG.yaml [--key.sub value ...]`; under torchrun too."""

import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

from jsonargparse import ArgumentParser

from dist_trainer.config.arguments import new_parser, parse_config
from dist_trainer.errors import LocalError, UserError, nearest

USAGE = """usage: dist-trainer COMMAND ...

  train CONFIG.yaml [--key.sub value ...]   train, or go on; evaluates and saves (under torchrun: on all ranks)
  eval CONFIG.yaml|RUN [--weights PATH]     exact accuracy of a checkpoint folder or a safetensors file
  eval --pretrained timm/NAME --data.val V  published weights beside their published accuracy: are the labels right?
  average RUN [--top_k K|--last K|--files ...]  one model from several of a run, batch-norm re-estimated
  plan CONFIG.yaml [--gpus N] [--json]      everything derived, before a node is paid for
  augment CONFIG.yaml [--samples 8]         a picture of what the network sees, before augmentation and after
  shards pack SOURCE OUT                    images -> tars and index; --help lists the kinds of SOURCE
  shards index URL... [--out NAME.dtx]      the index of tars that are there (a folder, a brace pattern; local or URLs)
  shards check LOCATION [--level decode]    hold shards against their index; lists bad samples
  ls, cp NAME TARGET                        the shipped configs and scripts
  ls models                                 networks with a short name, and their parameters

Several --config files merge left to right. --print_config shows the whole config, COMMAND --help every key.
"""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and end the process: 0 done or stopped in order, 2 the user's mistake, 1 a fault."""
    try:
        status = dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if _is_main() or isinstance(error, LocalError):
            print(f"dist-trainer: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 1
    except Exception as error:
        print(_fault(error), file=sys.stderr)
        status = 1
    # Not sys.exit: after an error, other ranks may wait in a collective that interpreter shutdown would wait for too.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _fault(error: Exception) -> str:
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    text = str(error)
    if isinstance(error, RuntimeError) and re.search(r"[Cc]onnection (closed|reset|refused)|Broken pipe|gloo", text):
        return f"{rank}lost contact with another rank, which failed or was ended: {text.splitlines()[0]}"
    return rank + "".join(traceback.format_exception(error))


def dispatch(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "average": _average,
        "plan": _plan,
        "augment": _augment,
        "shards": _shards,
        "ls": _ls,
        "cp": _cp,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] == "--version":
        from dist_trainer import __version__

        print(__version__)
        return 0
    if argv[0] not in commands:
        raise UserError(f"no command {argv[0]!r}{nearest(argv[0], commands)}; there are: {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


def _train(argv: list[str]) -> int:
    parser = new_parser("train", "Train, or go on where the run folder stands; evaluate and save.")
    config, values = parse_config(parser, argv)
    from dist_trainer.commands.train import train_run
    from dist_trainer.distributed import collectives as comm
    from dist_trainer.log.console import Terminal
    from dist_trainer.run.start import summary_rows

    stem = Path(str(values.config[0])).stem if values.get("config") else "run"
    world = comm.init(config.run.timeout + 60)
    terminal = Terminal(active=world.is_main)
    done = train_run(config, stem, world, terminal)
    if done.stopped_by:
        terminal.say(f"stopped by {done.stopped_by} after step {done.summary['steps']}, saved; start again to go on")
    else:
        title = f"{done.folder.path}: {'complete' if done.was_complete else 'done'}"
        terminal.table(title, summary_rows(done.summary))
    comm.shutdown()
    return 0


def _eval(argv: list[str]) -> int:
    parser = new_parser("eval", "Exact accuracy of a checkpoint or a weights file, the same on any number of ranks.")
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="a checkpoint folder or safetensors file; default: the run's best",
    )
    parser.add_argument(
        "--of",
        type=Literal["model", "model_bn", "ema", "ema_bn"],
        default="model",
        help="which weights of a checkpoint folder; _bn: with re-estimated batch-norm",
    )
    parser.add_argument(
        "--pretrained",
        type=str | None,
        default=None,
        help="timm/MODEL[.TAG] or torchvision/MODEL[.TAG]: their weights beside their published accuracy, instead of a "
        "run's: are the labels right? Needs no config, only --data.val; with --weights a file of that model",
    )
    folder, argv = _run_folder(argv)
    if name := _value_of(argv, "pretrained"):
        return _eval_published(parser, name, argv)
    config, values = parse_config(parser, argv)
    from dist_trainer.distributed import collectives as comm
    from dist_trainer.log.console import Terminal
    from dist_trainer.run.evaluation import evaluate_weights
    from dist_trainer.run_folder.checkpoint import newest

    if values.weights is not None:
        weights: Path | None = Path(values.weights)
    elif folder is not None:
        weights, _ = newest(folder / "best")
    else:
        raise UserError("--weights: is required with a config; with a run folder, its best are taken")
    if weights is None:
        raise UserError(f"{folder}: no best weights yet; give --weights {folder}/checkpoints/step_...")
    world = comm.init()
    terminal = Terminal(active=world.is_main)
    result = evaluate_weights(config, weights, world, terminal, values.of)
    m = result.metrics
    terminal.say(
        f"{weights}: top-1 {m['top1']:.2%} ({result.correct1}/{result.num_samples})  "
        f"top-5 {m['top5']:.2%} ({result.correct5}/{result.num_samples})  loss {m['loss']:.4f}"
    )
    comm.shutdown()
    return 0


def _value_of(argv: list[str], name: str) -> str | None:
    """What follows --name, if it is there."""
    words = iter(argv)
    for word in words:
        key, sign, value = word.partition("=")
        if key == f"--{name}":
            return value if sign else next(words, "")
    return None


def _eval_published(parser: ArgumentParser, name: str, argv: list[str]) -> int:
    from dist_trainer.commands.eval_published import compare, shorthand

    ends = [k + 2 if word == "--config" else k + 1 for k, word in enumerate(argv) if re.match(r"--config(=|$)", word)]
    behind = max(ends + [1 for word in argv[:1] if not word.startswith("-")], default=0)  # the last config
    if not behind:  # there is nothing to train
        argv = [f"--data.train={_value_of(argv, 'data.val') or ''}", *argv]
    config, values = parse_config(parser, [*argv[:behind], *shorthand(name), *argv[behind:]])
    from dist_trainer.distributed import collectives as comm
    from dist_trainer.log.console import Terminal

    world = comm.init()
    terminal = Terminal(active=world.is_main)
    for line in compare(config, values.weights, world, terminal).lines():
        terminal.say(line)
    comm.shutdown()
    return 0


def _run_folder(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The run folder that stands in the place of a config, if one does, and the arguments with its config.yaml."""
    folder = Path(argv[0]) if argv and Path(argv[0]).is_dir() else None
    if folder is None:
        return None, argv
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder: it has no config.yaml")
    return folder, [str(folder / "config.yaml"), *argv[1:]]


def _average(argv: list[str]) -> int:
    parser = new_parser("average", "Average weights of a run, re-estimate batch-norm, score the result; one file.")
    parser.add_argument("--top_k", type=int | None, default=None, help="of the best snapshots; default: all")
    parser.add_argument("--last", type=int | None, default=None, help="so many of the last checkpoints instead")
    parser.add_argument("--files", type=list[str], default=[], help="these safetensors files instead")
    parser.add_argument("--greedy", action="store_true", help="keep a member only if validation does not drop")
    parser.add_argument("--out", type=str | None, default=None, help="default: average.safetensors in the run folder")
    run, argv = _run_folder(argv)
    if run is None:
        raise UserError("average: give a run folder, such as runs/my-1a2b3c4d")
    config, values = parse_config(parser, argv)
    from dist_trainer.commands.average import average_files, choose
    from dist_trainer.distributed import collectives as comm
    from dist_trainer.log.console import Terminal

    for name in ("top_k", "last"):
        if values[name] is not None and values[name] < 1:
            raise UserError(f"--{name}: {values[name]} is not positive")
    files = choose(run, top_k=values.top_k, last=values.last, files=[Path(file) for file in values.files])
    world = comm.init()
    terminal = Terminal(active=world.is_main)
    out = Path(values.out) if values.out is not None else run / "average.safetensors"
    done = average_files(config, files, out, greedy=values.greedy, world=world, terminal=terminal)
    final = done.scores.get("average_bn", done.scores["average"])
    gain = final.correct1 - done.scores[done.best_member].correct1
    terminal.say(
        f"{out}: {len(done.kept)} of {len(files)} averaged: top-1 {final.metrics['top1']:.2%} "
        f"({final.correct1}/{final.num_samples}), "
        + (f"{gain} more than the best of them" if gain > 0 else f"does not help: {done.best_member} has {-gain} more")
    )
    comm.shutdown()
    return 0


def _plan(argv: list[str]) -> int:
    parser = new_parser("plan", "Everything that follows from a config, before a node is paid for.")
    parser.add_argument("--gpus", type=int | None, default=None, help="ranks; default: what this machine can use")
    parser.add_argument(
        "--samples", type=int | None, default=None, help="size of the training set, where it is not here"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--show", type=str | None, default=None, help="print one figure alone, such as world")
    config, values = parse_config(parser, argv)
    from dist_trainer.commands.plan import plan_figures, plan_rows

    figures = plan_figures(config, gpus=values.gpus, num_samples=values.samples)
    if values.show is not None:
        if values.show not in figures:
            raise UserError(
                f"--show: no figure {values.show!r}{nearest(values.show, figures)}; there are: {', '.join(figures)}"
            )
        print(figures[values.show])
    elif values.json:
        print(json.dumps(figures, indent=1))
    else:
        from dist_trainer.log.console import Terminal

        rows, warnings = plan_rows(figures)
        terminal = Terminal(active=True)
        terminal.table("plan", rows)
        for warning in warnings:
            terminal.say(f"warning: {warning}")
    return 0


def _augment(argv: list[str]) -> int:
    parser = new_parser("augment", "A PNG of what the network sees, before augmentation and after, over the run.")
    parser.add_argument("--samples", type=int, default=8, help="training samples, one row each")
    parser.add_argument("--out", type=str, default="augment.png", help="the picture")
    config, values = parse_config(parser, argv)
    from dist_trainer.commands.augment import augment_grid

    out = Path(values.out).expanduser()
    try:
        print(augment_grid(config, values.samples, out))
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {out}: {error}") from None
    return 0


def _shards(argv: list[str]) -> int:
    from dist_trainer.commands.shards import COMMANDS

    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"shards: say what to do: {', '.join(COMMANDS)}; dist-trainer shards pack --help")
    return COMMANDS[argv[0]](argv[1:])


def _shipped() -> dict[str, Path]:
    """Shipped files by the name under which `cp` finds them: imagenet/resnet50_8k, slurm/train.sbatch, ..."""
    package = Path(__file__).parent.parent
    root = package / "shipped" if (package / "shipped").is_dir() else package.parent
    files = {}
    for folder in ("configs", "launch", "slurm"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".yaml", ".sh", ".sbatch"):
                name = path.relative_to(root / folder if folder == "configs" else root)
                files[str(name.with_suffix("") if folder == "configs" else name)] = path
    return files


def _ls(argv: list[str]) -> int:
    if argv == ["models"]:
        from dist_trainer.models.build import model_table

        for name, source, parameters in model_table():
            print(f"{name:<20} {parameters:>12,}  {source}")
        return 0
    if argv:
        raise UserError(f"ls: {argv[0]!r}: there is `ls`, of the shipped configs and scripts, and `ls models`")
    files = _shipped()
    width = max(len(name) for name in files) + 2
    for name, path in files.items():
        first = next((line.lstrip("# ").strip() for line in path.read_text().splitlines() if line.startswith("# ")), "")
        print(f"{name:<{width}}{first}")
    return 0


def _cp(argv: list[str]) -> int:
    if len(argv) != 2:
        raise UserError("cp: give a name that dist-trainer ls shows, and a target file or folder")
    files = _shipped()
    name = argv[0].removesuffix(".yaml")
    if name not in files:
        raise UserError(f"{argv[0]}: not shipped{nearest(name, files)}; dist-trainer ls shows what is")
    target = Path(argv[1])
    target = target / files[name].name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target}: exists; remove it, or name another file")
    try:
        shutil.copy(files[name], target)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror or error}") from None
    print(target)
    return 0
