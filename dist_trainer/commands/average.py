"""`average`: one model from several of a run, batch-norm re-estimated, scored beside its members."""

from dataclasses import dataclass, replace
from pathlib import Path

from dist_trainer.commands.ranks import ranks
from dist_trainer.config.arguments import new_parser, parse_config, run_folder_argument, value_of
from dist_trainer.config.tree import TrainConfig
from dist_trainer.distributed.collectives import on_main, read_on_main
from dist_trainer.distributed.world import World
from dist_trainer.engine.evaluate import EvalResult
from dist_trainer.errors import UserError, plural
from dist_trainer.log.console import Terminal
from dist_trainer.run.blueprint import build_augment, plan_run
from dist_trainer.run.data import bn_sample_stream
from dist_trainer.run.evaluation import Evaluation
from dist_trainer.run_folder import checkpoint, class_list
from dist_trainer.run_folder.snapshots import Snapshots
from dist_trainer.shards.classes import compare_classes
from dist_trainer.storage.storage import Storage, is_remote
from dist_trainer.tensors import State
from dist_trainer.tricks.averaging import average
from dist_trainer.tricks.precise_bn import re_estimate

_NUM_SAMPLES = 8192  # if the config sets none: an average needs batch-norm statistics of its own


def command(argv: list[str]) -> int:
    parser = new_parser("average", "Average weights of a run, re-estimate batch-norm, score the result; one file.")
    parser.add_argument("--top_k", type=int | None, default=None, help="of the best snapshots; default: all")
    parser.add_argument("--last", type=int | None, default=None, help="this many of the last checkpoints instead")
    parser.add_argument("--files", type=list[str], default=[], help="these safetensors files instead")
    parser.add_argument("--greedy", action="store_true", help="keep a member only if validation does not drop")
    parser.add_argument(
        "--out", type=str | None, default=None, help="default: average.safetensors in the run folder, or here"
    )
    is_here = not (argv and is_remote(argv[0]))
    run, argv = run_folder_argument(argv, "checkpoints" if value_of(argv, "last") else "snapshots")
    if run is None and not {"-h", "--help"} & set(argv):
        raise UserError("average: give a run folder, such as runs/my-1a2b3c4d")
    if others := [word for word in argv[1:2] if not word.startswith("-")]:
        raise UserError(
            f"average: takes the config of one run, and {others[0]} is another; to average weights of several, name "
            f"their files: average {run} --files '[{run}/best/step_.../model.safetensors, ...]'"
        )
    config, values = parse_config(parser, argv)
    assert run is not None  # --help has ended the process
    for name in ("top_k", "last"):
        if values[name] is not None and values[name] < 1:
            raise UserError(f"--{name}: {values[name]} is not positive")
    files = choose(run, top_k=values.top_k, last=values.last, files=[Path(file) for file in values.files])
    out = Path(values.out) if values.out is not None else (run if is_here else Path()) / "average.safetensors"
    with ranks() as (world, terminal):
        if (wanted := values.last or values.top_k or 0) > len(files):
            kind, key = ("checkpoint", "checkpoint.keep_last") if values.last else ("snapshot", "averaging.top_k")
            terminal.say(f"{run} has {plural(len(files), kind)}, not {wanted} ({key} says how many are kept)")
        done = average_files(config, files, out, greedy=values.greedy, world=world, terminal=terminal)
        final = done.scores.get("average_bn", done.scores["average"])
        gain = final.correct1 - done.scores[done.best_member].correct1
        verdict = (
            f"{gain} more than the best of them" if gain > 0 else f"does not help: {done.best_member} has {-gain} more"
        )
        terminal.say(
            f"{out}: {len(done.kept)} of {len(files)} averaged: top-1 {final.metrics['top1']:.2%} "
            f"({final.correct1}/{final.num_samples}), {verdict}"
        )
    return 0


@dataclass(frozen=True)
class Averaged:
    """`kept` of the members made the average; `scores` by name: each member, average, average_bn."""

    kept: list[str]
    scores: dict[str, EvalResult]

    @property
    def best_member(self) -> str:
        members = (name for name in self.scores if not name.startswith("average"))
        return max(members, key=lambda name: self.scores[name].correct1)


def choose(run: Path, *, top_k: int | None, last: int | None, files: list[Path]) -> list[Path]:
    """The weights to average: given files, the last checkpoints (their EMA, where there is one), or the best snapshots.

    Raises UserError when there are none.
    """
    if sum(each is not None for each in (top_k, last)) + bool(files) > 1:
        raise UserError("give one of --top_k, --last and --files")
    if files:
        return files
    if last is not None:
        folders = checkpoint.complete(run / "checkpoints")[:last]
        ema = all((each / "ema.safetensors").is_file() for each in folders)
        chosen = [each / ("ema.safetensors" if ema else "model.safetensors") for each in folders]
    else:
        folder = run / "snapshots"
        chosen = [folder / each.file for each in Snapshots(folder, top_k or 10**6).best]
    if not chosen:
        where = "checkpoints" if last is not None else "snapshots (averaging.top_k keeps them); try --last K"
        raise UserError(f"{run}: has no {where}")
    return chosen


def average_files(
    config: TrainConfig, files: list[Path], out: Path, *, greedy: bool, world: World, terminal: Terminal
) -> Averaged:
    """Average `files`, score each of them and the result, and write that to `out` (collective).

    One file at a time is in memory: each is read to be scored, and again to be averaged, best first.
    """
    evaluation = Evaluation(config, world, terminal, on_main(world, lambda: _classes_of([out, *files])))
    scores: dict[str, EvalResult] = {}

    def score(name: str, state: State) -> EvalResult:
        evaluation.load(state, name)
        scores[name] = evaluation.score()
        terminal.say(f"{name}: top-1 {scores[name].metrics['top1']:.2%}")
        return scores[name]

    def load(file: Path) -> State:
        return read_on_main(world, lambda: checkpoint.load_weights(file))

    for file in files:
        score(str(file), load(file))
    best_first = sorted(files, key=lambda file: -scores[str(file)].correct1)
    state, kept = average(
        ((str(file), load(file)) for file in best_first),
        (lambda name, trial: score(f"average with {name}", trial).metrics["top1"]) if greedy else None,
    )
    score("average", state)
    if statistics := _re_estimated(config, evaluation, world):
        state |= statistics
        score("average_bn", state)
    on_main(world, lambda: checkpoint.write_weights(out, state))
    return Averaged(kept, scores)


def _classes_of(weights: list[Path]) -> tuple[str, tuple[str, ...]] | None:
    """The list of class names beside the weights, and its place. Raises UserError where their lists differ."""
    found = [each for path in weights if (each := class_list.beside(str(path), Storage())) is not None]
    for file, names in found[1:]:
        if (outputs := compare_classes(found[0][1], names)) != "same":
            raise UserError(
                f"--files: {found[0][0]} and {file} list {outputs}: the same output means different classes, and "
                "their mean would mean none"
            )
    return found[0] if found else None


def _re_estimated(config: TrainConfig, evaluation: Evaluation, world: World) -> State:
    """Batch-norm statistics of the weights that `evaluation` holds, from training samples (collective)."""
    train, precise = evaluation.data.train, config.precise_bn
    if not precise.num_samples:
        precise = replace(precise, num_samples=_NUM_SAMPLES)
    augment = build_augment(config, plan_run(config, train, 1))
    samples = bn_sample_stream(precise, config.eval, config.batch, config.data, augment, train, config.run.seed, world)
    if samples is None:
        return {}
    inference = evaluation.inference
    batches = ((batch.images, not batch.ghost) for batch in samples)
    return re_estimate(inference.module, batches, inference.logits, is_exact=inference.is_exact)
