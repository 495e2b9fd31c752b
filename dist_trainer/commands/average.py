"""`average`: one model from several of a run, batch-norm re-estimated, scored beside its members."""

from dataclasses import dataclass, replace
from pathlib import Path

from dist_trainer.config.tree import TrainConfig
from dist_trainer.distributed.collectives import World, on_main
from dist_trainer.engine.evaluate import EvalResult
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.run.data import build_augment, build_draw, plan_of
from dist_trainer.run.evaluation import Evaluation
from dist_trainer.run_folder import checkpoint
from dist_trainer.run_folder.snapshots import Snapshots
from dist_trainer.tricks.averaging import Member, State, greedy_soup, mean
from dist_trainer.tricks.precise_bn import re_estimate

_NUM_SAMPLES = 8192  # where the config says nothing: an average without its own statistics says little


@dataclass(frozen=True)
class Averaged:
    """`kept` of the members made the average; `scores` by name: each member, average, average_bn."""

    kept: list[str]
    scores: dict[str, EvalResult]
    out: Path

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
    """Average `files`, best first or newest first, score each and the result, and write that to `out` (collective)."""
    evaluation = Evaluation(config, world, terminal)
    if not config.precise_bn.num_samples:
        config = replace(config, precise_bn=replace(config.precise_bn, num_samples=_NUM_SAMPLES))
    augment = build_augment(config, plan_of(config, evaluation.train_index, 1))
    draw = build_draw(config, augment, evaluation.train_index, world)
    scores: dict[str, EvalResult] = {}

    def score(name: str, state: State) -> EvalResult:
        evaluation.load(state, name)
        scores[name] = evaluation.score()
        terminal.say(f"{name}: top-1 {scores[name].metrics['top1']:.2%}")
        return scores[name]

    members: list[Member] = [(str(file), checkpoint.load_weights(file)) for file in files]
    for name, state in members:
        score(name, state)
    members.sort(key=lambda member: -scores[member[0]].correct1)
    if greedy:
        tried = iter(members)
        state, kept = greedy_soup(members, lambda each: score(f"average with {next(tried)[0]}", each).metrics["top1"])
    else:
        state, kept = mean(members), [name for name, _ in members]
    score("average", state)
    if draw is not None:
        found = re_estimate(
            evaluation.inference.module,
            ((batch.images, not batch.ghost) for batch in draw),
            evaluation.inference.logits,
        )
        state |= found
        score("average_bn", state)
    on_main(world, lambda: checkpoint.write_weights(out, state))
    return Averaged(kept, scores, out)
