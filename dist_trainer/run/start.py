"""Putting a run together, from the start or from a checkpoint: `prepare_run`, then `build_run`."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.bad_samples import BadSampleLog
from dist_trainer.data.stream import FixedSampleStream, num_workers
from dist_trainer.distributed.collectives import on_main
from dist_trainer.distributed.processes import ATTEMPT, StopRequest
from dist_trainer.distributed.world import World
from dist_trainer.engine.base import Engine
from dist_trainer.engine.build import build_engine
from dist_trainer.engine.inference import Preprocess
from dist_trainer.engine.numerics import precision_note, set_numerics
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.log.meter import Meter
from dist_trainer.log.tracker import Tracker
from dist_trainer.plan import Plan
from dist_trainer.run.advice import warnings
from dist_trainer.run.averaging import Averaging
from dist_trainer.run.began import how_it_goes_on
from dist_trainer.run.blueprint import Blueprint, make_blueprint
from dist_trainer.run.claim import Claim, claim_or_initialise
from dist_trainer.run.data import RunData, Streams, open_data, open_streams
from dist_trainer.run.hand_over import hand_over, shared_memory_note
from dist_trainer.run.pace import Pace
from dist_trainer.run.restore import Saved, load_model, restore
from dist_trainer.run.saving import retention_of
from dist_trainer.run.space import room_note, space_of
from dist_trainer.run.start_from import load_optimizer
from dist_trainer.run.state import Learner, Progress, Record, Run
from dist_trainer.run.step_sums import StepSums
from dist_trainer.run.weights import Weights
from dist_trainer.run_folder import class_list
from dist_trainer.run_folder.environment import git_revision
from dist_trainer.run_folder.folder import RunConfig, RunFolder
from dist_trainer.run_folder.identity import auto_name, find_run, identity
from dist_trainer.run_folder.mirror import Mirror
from dist_trainer.storage.storage import Storage
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.compiling import allow_sizes, compile_note
from dist_trainer.tricks.ema import Ema, EmaConfig
from dist_trainer.tricks.sync_bn import synchronised


@dataclass(frozen=True)
class PreparedRun:
    """A run whose config was found right and whose folder is claimed; nothing is on a device yet."""

    data: RunData
    blueprint: Blueprint
    streams: Streams
    claim: Claim
    identity_keys: dict[str, Any]


def prepare_run(config: TrainConfig, *, stem: str, world: World, terminal: Terminal) -> PreparedRun:
    """Open the data, make the blueprint, claim the run folder (collective).

    `stem` begins the names of run folders. All checks of the config come before the folder is touched. Raises
    UserError, on every rank, for the user's mistakes.
    """
    set_numerics(config.run.deterministic or config.engine.is_exact, config.engine.cpu_threads)
    data = open_data(config, world, terminal)
    on_gpu = world.device.type == "cuda"
    blueprint = make_blueprint(config, data.train, data.num_classes, world.size, on_gpu=on_gpu)
    if config.model.sync_bn:
        blueprint = replace(blueprint, model=synchronised(blueprint.model, world.device))
    streams = open_streams(config, data, blueprint.plan, blueprint.augment, world)
    for note in [*streams.notes, *notes_on(config, data, blueprint, world)]:
        terminal.say(note)
    identity_keys = identity(config.as_dict(), data.fingerprint)
    folder, similar = on_main(world, lambda: choose_folder(config.run, stem, identity_keys))
    room = on_main(world, lambda: room_note(space_of(config, blueprint), Path(folder)))
    for line in [similar, f"warning: {room}" if room else ""]:
        if line:
            terminal.say(line)
    claim = claim_or_initialise(
        config,
        model=blueprint.model,
        class_names=data.train.class_names,
        folder=RunFolder(Path(folder), config.checkpoint, mirror_of(config, Path(folder).name)),
        identity_keys=identity_keys,
        world=world,
        terminal=terminal,
    )
    return PreparedRun(data, blueprint, streams, claim, identity_keys)


def notes_on(config: TrainConfig, data: RunData, blueprint: Blueprint, world: World) -> list[str]:
    """Warnings of what is slow, or works against something else. Raises LocalError where /dev/shm is too small."""
    needs = hand_over(config, blueprint.model, blueprint.augment, data.train, num_workers(config.data, world))
    notes = [
        precision_note(config.engine.precision, world.device),
        shared_memory_note(needs, config, world),
        compile_note(world.device) if config.engine.compile else None,
        *warnings(config, blueprint, data.num_classes, data.without_samples),
    ]
    return [f"warning: {note}" for note in notes if note]


def choose_folder(config: RunConfig, stem: str, identity_keys: Mapping[str, Any]) -> tuple[str, str]:
    """(the run's folder, a line about a similar run or ""), as run.name says; on one rank.

    Under `wandb agent` each trial has its own, named after it: handed out again, it goes on there.
    """
    root = config.root
    trial = os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""
    if config.name != "auto" or trial:
        name = auto_name(stem, identity_keys) if config.name == "auto" else config.name
        return str(root / (f"{name}-{trial}" if trial else name)), ""
    name, similar = find_run(root, stem, identity_keys, config.allow_change)
    return str(root / name), similar


def mirror_of(config: TrainConfig, name: str) -> Mirror | None:
    """The second copy of the run of this name, if there is to be one."""
    if config.run.mirror_root is None:
        return None
    storage = Storage(config.data.storage_options, config.data.retry)
    return Mirror(f"{config.run.mirror_root.rstrip('/')}/{name}", storage)


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
    saved, progress = None, Progress()
    if claim.checkpoint is not None:
        saved = load_model(claim.checkpoint, blueprint.model, config, world)
    learner = build_learner(config, blueprint, bn_samples=streams.bn_samples, folder=claim.folder, world=world)
    record = new_record(prepared, config=config, weights=learner.weights, world=world, terminal=terminal)
    if saved is not None:
        progress = go_on(saved, prepared, config=config, learner=learner, record=record, world=world)
    elif claim.source is not None and claim.source.with_optimizer:
        load_optimizer(claim.source, learner)
    open_logs(prepared, config=config, learner=learner, record=record, progress=progress, world=world)
    tell_of_start(prepared, record, progress.step, rolled_back=resume_after > 0)
    progress.skip_to(resume_after)
    sums = step_sums(blueprint.plan, learner, record, stop, world, num_beyond=saved.num_beyond if saved else 0)
    streams.between_batches(sums.check_stop)
    return Run(
        config=config,
        world=world,
        plan=blueprint.plan,
        intervals=blueprint.intervals,
        streams=streams,
        learner=learner,
        record=record,
        sums=sums,
        progress=progress,
        resumed_from=claim.checkpoint,
    )


def build_learner(
    config: TrainConfig,
    blueprint: Blueprint,
    *,
    bn_samples: FixedSampleStream | None,
    folder: RunFolder,
    world: World,
) -> Learner:
    """The engine on its device, and everything derived from its weights.

    Raises UserError for settings that exclude each other.
    """
    if config.engine.compile:
        allow_sizes(len(blueprint.augment.sizes))
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
    batch_norm = RunningStatistics(engine.module, engine.is_exact)
    ema = build_ema(config.ema, engine, batch_norm, blueprint.ema_start, blueprint.plan.total_steps)
    weights = Weights(engine, batch_norm, ema, bn_samples)
    averaging = Averaging(config.averaging, weights, folder, world) if config.averaging.top_k else None
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
    live = engine.local_weights() if engine.is_sharded or engine.world.is_main else {}
    return Ema(config, live, batch_norm.running, start, total)


def new_record(
    prepared: PreparedRun, *, config: TrainConfig, weights: Weights, world: World, terminal: Terminal
) -> Record:
    """The record of a run before its first step. Raises UserError for a metric that is not logged."""
    train, blueprint = prepared.data.train, prepared.blueprint
    return Record(
        folder=prepared.claim.folder,
        tracker=Tracker(world, blueprint.plan.total_steps, terminal),
        meter=Meter(),
        pace=Pace(blueprint.plan, blueprint.intervals),
        bad_samples=BadSampleLog(train, config.data.max_bad, "train"),
        retention=retention_of(config.checkpoint, weights, blueprint.plan, blueprint.intervals),
        facts={
            "fingerprint": train.fingerprint,
            "val_fingerprint": prepared.data.val_fingerprint,
            "order": asdict(prepared.streams.train.spec),
            "world": world.size,
            "threads": torch.get_num_threads(),
            "engine": asdict(config.engine),
            "torch": torch.__version__,
        },
    )


def go_on(
    saved: Saved, prepared: PreparedRun, *, config: TrainConfig, learner: Learner, record: Record, world: World
) -> Progress:
    """Restore all of a checkpoint but the model, as far as it holds under the config of now (collective).

    Raises UserError where training cannot go on from it.
    """
    data, terminal = prepared.data, record.tracker.terminal
    progress = restore(saved, learner=learner, record=record, train=data.train, config=config.data, world=world)
    check_length(progress.step, prepared.blueprint.plan, config.duration)
    if saved.state.get("val_fingerprint", prepared.claim.scored_on) != data.val_fingerprint:
        terminal.say("the validation set is another one: best weights and snapshots are chosen anew")
        progress.forget_scores()
    return progress


def check_length(step: int, plan: Plan, duration: str) -> None:
    """Raises UserError for a run that was made shorter than it is."""
    if step > plan.total_steps:
        raise UserError(
            f"duration: {duration} ends at step {plan.total_steps}, and the run stands at step {step}; set it longer"
        )


def open_logs(
    prepared: PreparedRun, *, config: TrainConfig, learner: Learner, record: Record, progress: Progress, world: World
) -> None:
    """Training continues from here: write the folder's files, continue snapshots, metrics and W&B (collective)."""
    claim, folder, terminal, step = prepared.claim, record.folder, record.tracker.terminal, progress.step

    def write() -> list[dict[str, Any]]:
        class_list.write(folder.path, prepared.data.train.class_names)
        folder.write_environment(world.size, prepared.blueprint.plan.total_steps)
        folder.write_config(
            config.as_dict(),
            prepared.identity_keys,
            val_fingerprint=prepared.data.val_fingerprint,
            changed=claim.changed,
            step=progress.step,
        )
        folder.write_state("running")
        folder.begin(step)
        return folder.read_changes()

    history = on_main(world, write)
    if learner.averaging is not None:
        for note in learner.averaging.resume(progress.evaluated_step):
            terminal.say(note)
    facts = {**config.as_dict(), "world": world.size, "git": git_revision(), "changes": history}
    record.tracker.open(
        folder.path,
        progress.step,
        log=config.log,
        wandb=config.wandb,
        facts={**facts, "plan": asdict(prepared.blueprint.plan)},
        is_evaluated=progress.evaluated_step == progress.step,
    )


def tell_of_start(prepared: PreparedRun, record: Record, step: int, *, rolled_back: bool) -> None:
    """One line and one record, unless it is the run's first start."""
    before, plan = prepared.claim.before, prepared.blueprint.plan
    if before is not None:
        attempt = os.environ.get(ATTEMPT)
        line = how_it_goes_on(before, attempt=attempt, world=plan.world, step=step, rolled_back=rolled_back)
        record.tracker.event(step, plan.epoch(step), line, rolled_back=rolled_back)


def step_sums(
    plan: Plan, learner: Learner, record: Record, stop: StopRequest, world: World, *, num_beyond: int
) -> StepSums:
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
        is_exact=learner.engine.is_exact,
        num_beyond=num_beyond,
    )
