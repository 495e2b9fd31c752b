"""What a run consists of, and how it is put together: data, plan, folder, model, engine; from the start or resumed."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.health import Health
from dist_trainer.data.stream import EvalStream, TrainStream
from dist_trainer.distributed.collectives import StopRequest, World, on_main
from dist_trainer.engine.base import Engine
from dist_trainer.engine.build import build_engine
from dist_trainer.engine.inference import Preprocess
from dist_trainer.engine.numerics import set_numerics
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.log.meter import Meter
from dist_trainer.log.tracker import SCORES, Tracker
from dist_trainer.models.pretrained import Loaded, load_pretrained
from dist_trainer.plan import Plan
from dist_trainer.run.advice import keys_to_turn, warnings
from dist_trainer.run.averaging import Averaging
from dist_trainer.run.blueprint import Every, build_parts
from dist_trainer.run.data import mended_samples, open_data, open_streams, prepare_data
from dist_trainer.run.step_sums import StepSums
from dist_trainer.run.weights import Weights
from dist_trainer.run_folder import checkpoint
from dist_trainer.run_folder.folder import RunFolder, auto_name, git_revision, identity
from dist_trainer.storage.storage import Storage
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.diagnosis import diagnose
from dist_trainer.tricks.ema import Ema, EmaConfig
from dist_trainer.tricks.learning_rate import LearningRate
from dist_trainer.tricks.sync_bn import check_same_world, synchronised


@dataclass
class Progress:
    """How far a run is. `step` counts updates tried, `skipped` those that were not applied.

    `last` holds the metrics of the last evaluation by the weights' name, `train_eval` those of the model on training
    samples, `best` the best top-1 of all with its name.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated_step: int = 0
    last: dict[str, dict[str, float]] = field(default_factory=dict)
    train_eval: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    def count(self, applied: bool) -> None:
        """One more step was tried."""
        self.step += 1
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1

    def pass_over(self, step: int) -> None:
        """Go on behind `step`, if that lies ahead: the steps up to it are not made."""
        self.skipped += max(0, step - self.step)
        self.step = max(step, self.step)

    def as_dict(self, plan: Plan) -> dict[str, Any]:
        """For a checkpoint; `position` is samples consumed, which no number of ranks or workers changes."""
        return {**asdict(self), "epoch": plan.epoch(self.step), "position": plan.position(self.step)}


@dataclass
class Run:
    """Everything that the loop uses. `facts` is what a checkpoint says about how it was made, `resumed_from` the one
    that it went on from, if any."""

    config: TrainConfig
    world: World
    plan: Plan
    every: Every
    stream: TrainStream
    val: EvalStream
    train_eval: EvalStream | None
    engine: Engine
    learning_rate: LearningRate
    batch_norm: RunningStatistics
    ema: Ema | None
    weights: Weights
    averaging: Averaging | None
    sums: StepSums
    health: Health
    meter: Meter
    tracker: Tracker
    folder: RunFolder
    facts: dict[str, Any]
    resumed_from: str
    progress: Progress
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"eval": 0.0, "save": 0.0})


def start_run(
    config: TrainConfig, stem: str, world: World, terminal: Terminal, stop: StopRequest, past: int = 0
) -> Run | RunFolder:
    """Put a run together: from the newest complete checkpoint of its folder, or from the start (collective).

    With `past`, a step, it goes on behind that step, and those since the checkpoint count as skipped.
    Returns the folder alone when the run in it is complete. Raises UserError, on every rank, for the user's mistakes.
    """
    set_numerics(config.run.deterministic)
    place = on_main(world, lambda: prepare_data(config))
    for note in place["notes"]:
        terminal.say(note)
    train_index, val_index = open_data(config, place)
    what = identity(config.as_dict(), f"{train_index.fingerprint[:16]} {val_index.fingerprint[:16]}")
    name = auto_name(stem, what) if config.run.name == "auto" else config.run.name
    folder = RunFolder(Path(config.run.dir).expanduser() / name)
    # Whatever can be wrong with the config shows before the folder is touched.
    parts = build_parts(config, train_index, train_index.num_classes, world.size)
    model = synchronised(parts.model, world.device) if config.model.sync_bn else parts.model
    streams = open_streams(config, parts.plan, parts.augment, train_index, val_index, world)
    for note in [*streams.notes, *(f"warning: {line}" for line in warnings(config, parts, train_index.num_classes))]:
        terminal.say(note)
    resumed_from = _begin(config, model, folder, what, world, terminal)
    if resumed_from == "complete":
        return folder

    state: dict[str, Any] = {}
    if resumed_from:
        state = checkpoint.load_state(Path(resumed_from))
        if config.model.sync_bn:
            check_same_world(state["world"], world.size)
        if world.device.type == "cpu" and state["world"] == world.size:
            torch.set_num_threads(state["threads"])  # another number of threads adds floats in another order
        checkpoint.load_into(model, checkpoint.load_tensors(Path(resumed_from), "model"), resumed_from)
    preprocess = Preprocess(mean=config.data.mean, std=config.data.std, channels_last=config.model.channels_last)
    engine = build_engine(
        config.engine,
        model,
        parts.optimizer,
        parts.loss,
        parts.mixing,
        parts.plan,
        world,
        preprocess,
        config.run.seed,
    )
    facts = {
        "fingerprint": train_index.fingerprint,
        "order": asdict(streams.train.spec),
        "world": world.size,
        "threads": torch.get_num_threads(),
        "engine": asdict(config.engine),
        "torch": torch.__version__,
    }
    batch_norm, meter, progress = RunningStatistics(engine.module), Meter(), Progress()
    ema = build_ema(config.ema, engine, batch_norm, parts.ema_start, parts.plan.total_steps)
    weights = Weights(engine, batch_norm, ema, streams.draw)
    health = Health(train_index, config.data.max_bad, "train")
    if state:
        if state["order"] != facts["order"] or state["fingerprint"] != facts["fingerprint"]:
            raise UserError(
                f"{resumed_from}: was made with other data or another order of them; use another --run.name"
            )
        engine.load_optimizer_state(checkpoint.load_tensors(Path(resumed_from), "optim"))
        meter.load(state["meter"])
        health.load(state["bad_samples"])
        if health.over_budget:
            mended = on_main(world, lambda: mended_samples(train_index, config.data, health))
            health.forget(lambda bad: bad.sample in mended)
        progress = Progress(**{key: state[key] for key in Progress.__dataclass_fields__})
        if ema is not None:
            weights.load_ema(checkpoint.load_tensors(Path(resumed_from), "ema"), progress.step - progress.skipped)
    averaging = open_averaging(config, weights, folder, progress.evaluated_step, world, terminal)
    tracker = Tracker(world, parts.plan.total_steps, terminal)
    tracker.open(
        folder.path, progress.step, config.wandb, {**config.as_dict(), "world": world.size, "git": git_revision()}
    )
    progress.pass_over(past)
    return Run(
        config=config,
        world=world,
        plan=parts.plan,
        every=parts.every,
        stream=streams.train,
        val=streams.val,
        train_eval=streams.train_eval,
        engine=engine,
        learning_rate=parts.learning_rate,
        batch_norm=batch_norm,
        ema=ema,
        weights=weights,
        averaging=averaging,
        sums=StepSums(parts.plan, batch_norm, ema, meter, health, folder.bad_samples, stop, world),
        health=health,
        meter=meter,
        tracker=tracker,
        folder=folder,
        facts=facts,
        resumed_from=resumed_from,
        progress=progress,
    )


def _begin(
    config: TrainConfig, model: nn.Module, folder: RunFolder, what: dict[str, Any], world: World, terminal: Terminal
) -> str:
    """What `_claim` says; a run that starts, starts with the configured weights, if any (collective)."""
    begun = on_main(world, lambda: bool(checkpoint.complete(folder.checkpoints)))
    loaded = None if begun else _pretrained(config, model, world)  # mistakes show before it is touched
    resumed_from = _claim(folder, config, what, world, terminal)
    if begun and not resumed_from:  # its checkpoints turned out damaged
        loaded = _pretrained(config, model, world)
    if loaded is not None:
        for line in loaded.lines():
            terminal.say(line)
        on_main(world, lambda: folder.write_pretrained(asdict(loaded)))
    return resumed_from


def _pretrained(config: TrainConfig, model: nn.Module, world: World) -> Loaded | None:
    """Have the model begin with the configured weights, if any (collective)."""
    if not config.model.pretrained:
        return None
    storage = Storage(config.data.storage_options, config.data.retry)
    return load_pretrained(config.model, storage, model, world)


def build_ema(config: EmaConfig, engine: Engine, batch_norm: RunningStatistics, start: int, total: int) -> Ema | None:
    """The average, where one is configured: of all weights on rank 0, or of each rank's piece."""
    if config.decay is None:
        return None
    live = engine.own_weights if engine.is_sharded or engine.world.is_main else dict
    return Ema(config, live, batch_norm.running, start, total)


def open_averaging(
    config: TrainConfig, weights: Weights, folder: RunFolder, evaluated: int, world: World, terminal: Terminal
) -> Averaging | None:
    """The k best as of the validation at step `evaluated`, where they are to be averaged (collective)."""
    if not config.averaging.top_k:
        return None
    averaging = Averaging(config.averaging, weights, folder.snapshots, world)
    for note in averaging.resume(evaluated):
        terminal.say(note)
    return averaging


def _claim(folder: RunFolder, config: TrainConfig, what: dict[str, Any], world: World, terminal: Terminal) -> str:
    """Become the folder's owner and find what to resume: "" (start), "complete", or a checkpoint (collective)."""

    def claim() -> str:
        if config.checkpoint.keep_last < 1:
            raise UserError(f"checkpoint.keep_last: {config.checkpoint.keep_last}; keep at least 1 to resume from")
        folder.claim()
        for note in folder.write_config(config.as_dict(), what, config.run.allow_change):
            terminal.say(note)
        summary = folder.read_summary()
        if summary is not None and summary["state"] == "done":
            folder.release()
            return "complete"
        folder.write_environment(world.size)
        folder.write_state("running")
        found, notes = checkpoint.newest(folder.checkpoints)
        for note in notes:
            terminal.say(note)
        terminal.say(f"run folder {folder.path}" + (f", resuming from {found.name}" if found else ""))
        return str(found or "")

    return on_main(world, claim)


def finish_run(run: Run, stopped_by: str | None) -> dict[str, Any]:
    """Write summary.json and STATE, close what was opened, and give the summary back (collective)."""
    seconds = time.perf_counter() - run.started
    state: Literal["stopped", "done"] = "stopped" if stopped_by else "done"
    summary: dict[str, Any] = {
        "state": state,
        "steps": run.progress.step,
        "epochs": run.plan.epoch(run.progress.step),
        "skipped": run.progress.skipped,
        "final": run.progress.last,
        "best": run.progress.best,
        "diagnosis": _diagnosis(run),
        "seconds": {"all": seconds, **run.seconds, "train": seconds - sum(run.seconds.values())},
        "world": run.world.size,
        "git": git_revision() if run.world.is_main else None,
    }

    def close() -> None:
        run.tracker.close(summary)
        run.folder.write_summary(summary)
        run.folder.write_state(state)
        run.folder.release()

    on_main(run.world, close)
    run.engine.close()
    return summary


def _diagnosis(run: Run) -> dict[str, Any] | None:
    """Of the last evaluation, where training samples were scored and were enough to tell."""
    if run.train_eval is None or not run.progress.train_eval:
        return None
    train, val = run.progress.train_eval["top1"], run.progress.last["model"]["top1"]
    verdict = diagnose(train, val, run.train_eval.num_samples, run.val.num_samples)
    if verdict is None:
        return None
    return {"verdict": verdict, "train_top1": train, "val_top1": val, "turn": keys_to_turn(run.config, verdict)}


def _accuracy(values: dict[str, float]) -> str:
    return f"top-1 {values['top1']:.2%}  top-5 {values['top5']:.2%}  loss {values['loss']:.4f}"


def summary_rows(summary: dict[str, Any]) -> dict[str, str]:
    """The summary as a person reads it."""
    rows = {}
    for name, values in summary["final"].items():
        rows[SCORES[name][1]] = _accuracy(values)
    if best := summary["best"]:
        if "average" in summary["final"] and not best["weights"].startswith("average"):
            rows["average"] = "does not help here"
        rows["best"] = f"{_accuracy(best)} at step {best['step']} ({SCORES[best['weights']][1]})"
    if found := summary.get("diagnosis"):
        seen = f"{found['train_top1']:.2%} on training samples, {found['val_top1']:.2%} in validation"
        rows["diagnosis"] = f"{found['verdict']}: top-1 {seen}"
        if found["turn"]:
            rows["keys to turn"] = "\n".join(found["turn"])
    seconds = summary["seconds"]
    rows["steps"] = f"{summary['steps']} ({summary['epochs']:g} epochs, {summary['skipped']} skipped)"
    rows["time"] = (
        f"training {seconds['train']:.1f} s, evaluation {seconds['eval']:.1f} s, saving {seconds['save']:.1f} s"
        f" on {summary['world']} rank{'s' if summary['world'] > 1 else ''}"
    )
    return rows
