"""Putting a run together, from the start or from a checkpoint: `prepare_run`, then `build_run`."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.bad_samples import BadSampleLog
from dist_trainer.data.config import DataConfig
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.stream import FixedSampleStream
from dist_trainer.distributed.collectives import on_main
from dist_trainer.distributed.processes import StopRequest
from dist_trainer.distributed.world import World
from dist_trainer.engine.base import Engine
from dist_trainer.engine.build import build_engine
from dist_trainer.engine.inference import Preprocess
from dist_trainer.engine.numerics import set_numerics
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.log.meter import Meter
from dist_trainer.log.tracker import Tracker
from dist_trainer.plan import Plan
from dist_trainer.run.advice import warnings
from dist_trainer.run.averaging import Averaging
from dist_trainer.run.blueprint import Blueprint, make_blueprint
from dist_trainer.run.claim import Claim, claim_or_initialise
from dist_trainer.run.data import RunData, Streams, mended_samples, open_data, open_streams
from dist_trainer.run.state import Learner, Progress, Record, Run
from dist_trainer.run.step_sums import StepSums
from dist_trainer.run.weights import Weights
from dist_trainer.run_folder import checkpoint
from dist_trainer.run_folder.environment import git_revision
from dist_trainer.run_folder.folder import RunFolder
from dist_trainer.run_folder.identity import auto_name, identity
from dist_trainer.tensors import State
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.ema import Ema, EmaConfig
from dist_trainer.tricks.sync_bn import check_same_world, synchronised


@dataclass(frozen=True)
class PreparedRun:
    """A run whose config was found right and whose folder is claimed; nothing is on a device yet."""

    data: RunData
    blueprint: Blueprint
    streams: Streams
    claim: Claim


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose weights are in the model already."""

    folder: Path
    state: dict[str, Any]
    """What its state.json holds."""

    def tensors(self, name: str) -> State:
        return checkpoint.load_tensors(self.folder, name)


def prepare_run(config: TrainConfig, *, stem: str, world: World, terminal: Terminal) -> PreparedRun:
    """Open the data, make the blueprint, claim the run folder (collective).

    `stem` begins the names of run folders. All checks of the config come before the folder is touched. Raises
    UserError, on every rank, for the user's mistakes.
    """
    set_numerics(config.run.deterministic)
    data = open_data(config, world, terminal)
    blueprint = make_blueprint(config, data.train, data.num_classes, world.size)
    if config.model.sync_bn:
        blueprint = replace(blueprint, model=synchronised(blueprint.model, world.device))
    streams = open_streams(config, data, blueprint.plan, blueprint.augment, world)
    for note in [*streams.notes, *(f"warning: {line}" for line in warnings(config, blueprint, data.num_classes))]:
        terminal.say(note)
    identity_keys = identity(config.as_dict(), data.fingerprint)
    name = auto_name(stem, identity_keys) if config.run.name == "auto" else config.run.name
    claim = claim_or_initialise(
        config,
        model=blueprint.model,
        folder=RunFolder(Path(config.run.dir).expanduser() / name),
        identity_keys=identity_keys,
        world=world,
        terminal=terminal,
    )
    return PreparedRun(data, blueprint, streams, claim)


def build_run(
    prepared: PreparedRun,
    *,
    config: TrainConfig,
    world: World,
    terminal: Terminal,
    stop: StopRequest,
    resume_after: int = 0,
) -> Run:
    """Put everything on its device and restore the checkpoint, if there is one (collective).

    With `resume_after`, a step, training continues after that step; those since the checkpoint count as skipped.
    """
    blueprint, streams, claim = prepared.blueprint, prepared.streams, prepared.claim
    saved = load_model(claim.checkpoint, blueprint, config, world) if claim.checkpoint is not None else None
    learner = build_learner(config, blueprint, streams.bn_samples, claim.folder, world)
    record = new_record(config, prepared, world, terminal)
    progress = restore(saved, learner, record, prepared.data.train, config.data, world) if saved else Progress()
    if learner.averaging is not None:
        for note in learner.averaging.resume(progress.evaluated_step):
            terminal.say(note)
    facts = {**config.as_dict(), "world": world.size, "git": git_revision()}
    record.tracker.open(claim.folder.path, progress.step, config.wandb, facts)
    progress.skip_to(resume_after)
    return Run(
        config=config,
        world=world,
        plan=blueprint.plan,
        intervals=blueprint.intervals,
        streams=streams,
        learner=learner,
        record=record,
        sums=step_sums(blueprint.plan, learner, record, stop, world),
        progress=progress,
        resumed_from=claim.checkpoint,
    )


def load_model(folder: Path, blueprint: Blueprint, config: TrainConfig, world: World) -> Saved:
    """Load a checkpoint's weights into the model, before an engine takes it. Raises UserError where they do not fit."""
    saved = Saved(folder, checkpoint.load_state(folder))
    if config.model.sync_bn:
        check_same_world(saved.state["world"], world.size)
    if world.device.type == "cpu" and saved.state["world"] == world.size:
        torch.set_num_threads(saved.state["threads"])  # the number of threads decides the order of float sums
    checkpoint.load_into(blueprint.model, saved.tensors("model"), str(folder))
    return saved


def build_learner(
    config: TrainConfig,
    blueprint: Blueprint,
    bn_samples: FixedSampleStream | None,
    folder: RunFolder,
    world: World,
) -> Learner:
    """The engine on its device, and everything derived from its weights. Raises UserError for what does not go
    together."""
    engine = build_engine(
        config.engine,
        model=blueprint.model,
        optimizer=blueprint.optimizer,
        loss=blueprint.loss,
        mixing=blueprint.mixing,
        plan=blueprint.plan,
        world=world,
        preprocess=Preprocess.of(config.data, config.model),
        seed=config.run.seed,
    )
    batch_norm = RunningStatistics(engine.module)
    ema = build_ema(config.ema, engine, batch_norm, blueprint.ema_start, blueprint.plan.total_steps)
    weights = Weights(engine, batch_norm, ema, bn_samples)
    averaging = Averaging(config.averaging, weights, folder.snapshots, world) if config.averaging.top_k else None
    return Learner(
        engine=engine,
        learning_rate=blueprint.learning_rate,
        batch_norm=batch_norm,
        ema=ema,
        weights=weights,
        averaging=averaging,
    )


def build_ema(config: EmaConfig, engine: Engine, batch_norm: RunningStatistics, start: int, total: int) -> Ema | None:
    """The moving average, where one is configured: of all weights on rank 0, or of each rank's piece."""
    if config.decay is None:
        return None
    live = engine.local_weights if engine.is_sharded or engine.world.is_main else dict
    return Ema(config, live, batch_norm.running, start, total)


def new_record(config: TrainConfig, prepared: PreparedRun, world: World, terminal: Terminal) -> Record:
    """The record of a run before its first step."""
    train = prepared.data.train
    return Record(
        folder=prepared.claim.folder,
        tracker=Tracker(world, prepared.blueprint.plan.total_steps, terminal),
        meter=Meter(),
        bad_samples=BadSampleLog(train, config.data.max_bad, "train"),
        facts={
            "fingerprint": train.fingerprint,
            "order": asdict(prepared.streams.train.spec),
            "world": world.size,
            "threads": torch.get_num_threads(),
            "engine": asdict(config.engine),
            "torch": torch.__version__,
        },
    )


def restore(
    saved: Saved, learner: Learner, record: Record, train: ShardIndex, data: DataConfig, world: World
) -> Progress:
    """Load all of a checkpoint but the model (collective). Raises UserError for one of other data or another order."""
    state = saved.state
    if any(state[name] != record.facts[name] for name in ("order", "fingerprint")):
        raise UserError(f"{saved.folder}: was made with other data or another order of them; use another --run.name")
    learner.engine.load_optimizer_state(saved.tensors("optim"))
    record.meter.load(state["meter"])
    record.bad_samples.load(state["bad_samples"])
    if record.bad_samples.over_budget:
        mended = on_main(world, lambda: mended_samples(train, data, record.bad_samples))
        record.bad_samples.forget(lambda bad: bad.sample in mended)
    progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__})
    if learner.ema is not None:
        learner.weights.load_ema(saved.tensors("ema"), progress.step - progress.skipped)
    return progress


def step_sums(plan: Plan, learner: Learner, record: Record, stop: StopRequest, world: World) -> StepSums:
    """The sum that the ranks exchange once per step."""
    return StepSums(
        plan=plan,
        batch_norm=learner.batch_norm,
        ema=learner.ema,
        meter=record.meter,
        bad_samples=record.bad_samples,
        listing=record.folder.bad_samples,
        stop_request=stop,
        world=world,
    )
