"""`eval`: the exact accuracy of given weights, the same on any number of ranks."""

from pathlib import Path
from typing import Literal

from dist_trainer.commands.eval_published import eval_published
from dist_trainer.commands.ranks import ranks
from dist_trainer.config.arguments import new_parser, parse_config, run_folder_argument, value_of
from dist_trainer.distributed.collectives import on_main
from dist_trainer.errors import UserError
from dist_trainer.run.evaluation import evaluate_weights
from dist_trainer.run_folder import class_list
from dist_trainer.run_folder.checkpoint import newest
from dist_trainer.run_folder.fetch import local_weights
from dist_trainer.storage.storage import Storage, is_remote


def command(argv: list[str]) -> int:
    parser = new_parser("eval", "Exact accuracy of a checkpoint or a weights file, the same on any number of ranks.")
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="a checkpoint folder or safetensors file, a run (its best) or a part of it such as RUN/average, also at "
        "a URL; default: the run's best",
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
    given = argv[0] if argv else ""
    folder, argv = run_folder_argument(argv, *(() if value_of(argv, "weights") else ("best",)))
    if name := value_of(argv, "pretrained"):
        return eval_published(parser, name, argv)
    config, values = parse_config(parser, argv)
    storage = Storage(config.data.storage_options, config.data.retry)
    inside = given if folder is not None and not is_remote(given) and not Path(given).samefile(folder) else None
    weights = _weights(values.weights or inside, folder, storage)
    shown = values.weights or (f"{given.rstrip('/')}/best/{weights.name}" if is_remote(given) else weights)
    with ranks() as (world, terminal):
        classes = on_main(world, lambda: class_list.beside(values.weights or given, storage))
        result, digest = evaluate_weights(config, weights, world, terminal, values.of, classes)
        m = result.metrics
        terminal.say(
            f"{shown}: top-1 {m['top1']:.2%} ({result.correct1}/{result.num_samples})  "
            f"top-5 {m['top5']:.2%} ({result.correct5}/{result.num_samples})  loss {m['loss']:.4f}"
        )
        terminal.say(f"sha256 {digest}")
    return 0


def _weights(given: str | None, run: Path | None, storage: Storage) -> Path:
    """The weights that --weights names, or the best of a run folder. Raises UserError."""
    if given is not None:
        return local_weights(given, storage)
    if run is None:
        raise UserError("--weights: is required with a config; with a run folder, its best are taken")
    best, _ = newest(run / "best")
    if best is None:
        raise UserError(f"{run}: no best weights yet; give --weights {run}/checkpoints/step_...")
    return best
