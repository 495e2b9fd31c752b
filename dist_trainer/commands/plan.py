"""`plan`: everything that follows from a config, as figures and as a table."""

import json
import math
from pathlib import Path
from typing import Any

from dist_trainer.config.arguments import new_parser, parse_config, stem
from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.stream import num_workers
from dist_trainer.distributed.watchdog import STOP_S
from dist_trainer.distributed.world import World, alone, devices
from dist_trainer.errors import UserError, nearest, plural, readable_size
from dist_trainer.log.console import Terminal
from dist_trainer.log.tracker import STOP_PATIENCE_S
from dist_trainer.models.pretrained import advised_rate, find_pretrained
from dist_trainer.plan import largest_world, num_slots
from dist_trainer.run.advice import num_parameters, warnings
from dist_trainer.run.blueprint import make_blueprint
from dist_trainer.run.data import open_data
from dist_trainer.run.hand_over import hand_over
from dist_trainer.run.promise import promise
from dist_trainer.run.space import space_of
from dist_trainer.run.start import choose_folder
from dist_trainer.run.start_from import find_source
from dist_trainer.run_folder.folder import RunFolder
from dist_trainer.run_folder.identity import identity
from dist_trainer.storage.storage import Storage

IMAGENETS_CLASSES = 1000
"""Where the data are not here to say."""


def command(argv: list[str]) -> int:
    parser = new_parser("plan", "Everything that follows from a config, before any compute is used.")
    parser.add_argument("--gpus", type=int | None, default=None, help="ranks; default: what this machine can use")
    parser.add_argument(
        "--at_most", type=int | None, default=None, help="as many of so many devices as the batch can feed"
    )
    parser.add_argument(
        "--samples", type=int | None, default=None, help="size of the training set, where it is not here"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--show", type=str | None, default=None, help="print these figures alone, a line each, such as run,world"
    )
    config, values = parse_config(parser, argv)
    for name in ("gpus", "at_most", "samples"):
        if (number := values[name]) is not None and number < 1:
            raise UserError(f"--{name}: {number} is not 1 or more")
    gpus = values.gpus if values.at_most is None else largest_world(config.batch, values.at_most)
    figures = plan_figures(config, stem(values), gpus=gpus, num_samples=values.samples)
    if values.show is not None:
        names = values.show.split(",")
        for name in names:
            if name not in figures:
                raise UserError(f"--show: no figure {name!r}{nearest(name, figures)}; there are: {', '.join(figures)}")
        for name in names:
            print(figures[name])
    elif values.json:
        print(json.dumps(figures, indent=1))
    else:
        rows, notes = plan_rows(figures)
        terminal = Terminal(active=True)
        terminal.table("plan", rows)
        for note in notes:
            terminal.say(note)
    return 0


def scaling(config: TrainConfig, global_batch: int) -> str | None:
    """How the peak follows from lr.base, such as `0.1 x 512 / 256`; None where lr.peak is given."""
    if config.lr.base is None:
        return None
    factor = {"linear": f" x {global_batch} / 256", "sqrt": f" x sqrt({global_batch} / 256)", "none": ""}
    return f"{config.lr.base:g}{factor[config.lr.scale]}"


def stop_seconds(config: TrainConfig) -> int:
    """How long ranks that were told to stop may take: torchrun is to wait for them."""
    return math.ceil(STOP_S + config.checkpoint.grace + STOP_PATIENCE_S)


def plan_figures(
    config: TrainConfig, stem: str, *, gpus: int | None = None, num_samples: int | None = None
) -> dict[str, Any]:
    """Figures by name; `stem` begins the names of run folders. Raises UserError for whatever `train` would refuse."""
    num_classes, num_val = config.model.args.get("num_classes", IMAGENETS_CLASSES), None
    without_samples: dict[str, list[str]] = {}
    world = gpus if gpus is not None else largest_world(config.batch, devices())
    host = World(0, world, 0, min(world, devices()), alone().device)
    train: ShardIndex | int
    run = {}
    if num_samples is None:
        data = open_data(config, alone(), Terminal(active=False))
        train, num_classes, num_val, without_samples = data.train, data.num_classes, len(data.val), data.without_samples
        path, similar = choose_folder(config.run, stem, identity(config.as_dict(), data.fingerprint))
        run = {"run": path, "stands": RunFolder(Path(path)).standing(), "similar_run": similar}
    else:
        train = num_samples
    blueprint = make_blueprint(config, train, num_classes, world)
    plan, rate = blueprint.plan, blueprint.learning_rate
    needs = hand_over(config, blueprint.model, blueprint.augment, train, num_workers(config.data, host))
    groups = blueprint.optimizer.param_groups
    disk = space_of(config, blueprint)
    return {
        **run,
        **initial_weights(config, plan.num_samples),
        "world": plan.world,
        "parameters": num_parameters(blueprint.model),
        "trained": sum(p.numel() for group in groups for p in group["params"]),
        "decayed": sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"]),
        "lr_scale_least": min(group.get("lr_scale", 1.0) for group in groups),
        "global_batch": plan.global_batch,
        "micro_batch": plan.micro_batch,
        "micro_batches_per_step": plan.num_slots,
        "forwards_per_rank": plan.forwards,
        "efficiency": plan.efficiency,
        "legal_worlds": f"1 to {num_slots(config.batch)}",
        "full_worlds": [w for w in range(1, plan.num_slots + 1) if plan.num_slots % w == 0],
        "num_samples": plan.num_samples,
        "num_classes": num_classes,
        "num_val": num_val,
        "steps_per_epoch": plan.steps_per_epoch,
        "samples_in_last_step": plan.num_valid(math.ceil(plan.steps_per_epoch) - 1),
        "total_steps": plan.total_steps,
        "warmup_steps": rate.warmup,
        "lr_first": rate(0),
        "lr_peak": rate.peak,
        "lr_scaling": scaling(config, plan.global_batch),
        "lr_last": rate(plan.total_steps - 1),
        "bits": promise(config),
        "stop_seconds": stop_seconds(config),
        "checkpoint_bytes": disk.checkpoint,
        "disk_bytes": disk.in_all,
        "shared_bytes_per_rank": needs.shared if needs else None,
        "pinned_bytes_per_rank": needs.pinned if needs else None,
        "warnings": warnings(config, blueprint, num_classes, without_samples),
    }


def initial_weights(config: TrainConfig, num_samples: int) -> dict[str, Any]:
    """The rate that is advised from pretrained weights, for sgd. Raises UserError for weights that are not there."""
    find_source(config)
    if not config.model.pretrained:
        return {}
    find_pretrained(config.model, Storage(config.data.storage_options, config.data.retry))
    return {"lr_advised": advised_rate(num_samples)} if config.optimizer.name in ("sgd", "sgdw") else {}


def plan_rows(figures: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """(the table as a person reads it, lines below it)."""
    f = figures
    lines = [f"warning: {line}" for line in f["warnings"]]
    if f["efficiency"] < 0.9:
        better = max(w for w in f["full_worlds"] if w <= f["world"])
        lines.append(
            f"warning: {f['world']} ranks share {f['micro_batches_per_step']} micro-batches unevenly: "
            f"{1 - f['efficiency']:.0%} of the forwards do not count; {plural(better, 'rank')} do it evenly"
        )
    if f.get("similar_run"):
        lines.append(f["similar_run"])
    frozen = f["parameters"] - f["trained"]
    rows = {
        **({"run": f"{f['run']}: {f['stands']}"} if "run" in f else {}),
        "model": f"{f['parameters']:,} parameters{f', {frozen:,} frozen' if frozen else ''}, {f['decayed']:,} with "
        "weight decay",
        "world": f"{plural(f['world'], 'rank')} (legal: {f['legal_worlds']}; even: "
        f"{', '.join(map(str, f['full_worlds']))})",
        "step": f"{plural(f['global_batch'], 'sample')} = {plural(f['micro_batches_per_step'], 'micro-batch')} of "
        f"{f['micro_batch']}; "
        f"{plural(f['forwards_per_rank'], 'forward')} per rank, "
        f"{f['efficiency']:.0%} efficient",
        "data": f"{plural(f['num_classes'], 'class')}; "
        + (f"{f['num_val']:,} validation samples" if f["num_val"] is not None else "validation samples are not here"),
        "epoch": f"{plural(f['num_samples'], 'sample')} = {plural(f['steps_per_epoch'], 'step')}, "
        f"{plural(f['samples_in_last_step'], 'sample')} in the last",
        "length": plural(f["total_steps"], "step"),
        "bits": f["bits"],
        "learning rate": f"{f['lr_first']:g} at step 0, {f['lr_peak']:g}"
        f"{' = ' + f['lr_scaling'] if f['lr_scaling'] else ''} after "
        f"{plural(f['warmup_steps'], 'step')} of warm-up, "
        f"{f['lr_last']:.3g} at the last"
        + (f"; {f['lr_scale_least']:.2g} of it in the first layer" if f["lr_scale_least"] < 1 else ""),
    }
    rows["disk"] = f"{readable_size(f['checkpoint_bytes'])} per checkpoint, {readable_size(f['disk_bytes'])} at most"
    if f["pinned_bytes_per_rank"] is not None:
        shared = (
            f"{readable_size(f['shared_bytes_per_rank'])} of /dev/shm" if f["shared_bytes_per_rank"] else "no /dev/shm"
        )
        rows["host memory"] = (
            f"per rank at most {shared}, with the loader processes of a host like this one; on a GPU "
            f"{readable_size(f['pinned_bytes_per_rank'])} pinned"
        )
    if "lr_advised" in f:
        per_256 = f["lr_peak"] * 256 / f["global_batch"]
        rows["fine-tuning"] = (
            f"{f['lr_advised']:.2g} per 256 samples is advised for {f['num_samples']:,} images (.001 below 1,000, .01 "
            f"or more above 100,000, interpolated in between); here it is {per_256:.2g}"
        )
    return rows, lines
