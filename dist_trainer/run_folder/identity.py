"""A run's identity: the keys that change the training result, their digest in the run's name, and equal runs.

`KEYS` says of every key of a config which kind it is. A key of the result counts only where it differs from its first
default, which is frozen here. So a later version with a new key, off by default, has the same identity for the same
config; and a version that changes a default has another one.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dist_trainer.errors import UserError, nearest

FREE: Final = "free"
"""How a run is evaluated, logged, saved, averaged, laid out in memory, or computed: may change at every start, and each
change is said in a line. Weights stay the same, up to rounding for layout and engine."""
PLACE: Final = "place"
"""Where things are and how long something may take: may change at every start."""
REQUIRED: Final = "no default"


@dataclass(frozen=True)
class First:
    """A key of the training result, with the default that it had when it appeared.

    `fixed`: it cannot change within a run, not even with run.allow_change, since the checkpoint depends on it.
    """

    default: Any
    fixed: bool = False


KEYS: dict[str, First | str] = {
    "augment.color_jitter": First(0.0),
    "augment.crop": First(None),
    "augment.crop.grow": First(["35%", "85%"]),
    "augment.crop.interpolation": First("bilinear"),  # as auto is resolved without published weights
    "augment.crop.multiple_of": First(32),
    "augment.crop.ratio": First([3 / 4, 4 / 3]),
    "augment.crop.scale": First([0.08, 1.0]),
    "augment.crop.size": First(REQUIRED),
    "augment.crop.start_size": First(None),
    "augment.erase.args": First({}),
    "augment.erase.name": First("none"),
    "augment.flip": First(0.5),
    "augment.policy.args": First({}),
    "augment.policy.name": First("none"),
    "augment.repeats": First(1, fixed=True),
    "augment.transforms": First([]),
    "averaging.greedy": FREE,
    "averaging.metric": FREE,
    "averaging.top_k": FREE,
    "batch.global_batch": First(256, fixed=True),
    "batch.micro_batch": First(32, fixed=True),
    "checkpoint.background": FREE,
    "checkpoint.best_metric": FREE,
    "checkpoint.every": FREE,
    "checkpoint.grace": FREE,
    "checkpoint.keep_best": FREE,
    "checkpoint.keep_every": FREE,
    "checkpoint.keep_last": FREE,
    "checkpoint.max_failed": FREE,
    "data.cache.dir": PLACE,
    "data.cache.size": PLACE,
    "data.channels": First(3, fixed=True),
    "data.classes": PLACE,
    "data.fingerprint": First(REQUIRED, fixed=True),  # of the training set, in the place of data.train
    "data.max_bad": FREE,
    "data.mean": First([0.485, 0.456, 0.406]),  # as it is resolved
    "data.exif": First("ignore", fixed=True),
    "data.max_pixels": First(178_956_970),
    "data.num_samples": First(None, fixed=True),
    "data.order": First("auto", fixed=True),
    "data.preprocess": PLACE,  # fills other keys, which count
    "data.retry.deadline": PLACE,
    "data.retry.timeout": PLACE,
    "data.source": First("index", fixed=True),
    "data.stages": First([]),
    "data.std": First([0.229, 0.224, 0.225]),
    "data.storage_options": PLACE,
    "data.tail": First("mask", fixed=True),
    "data.train": PLACE,
    "data.val": PLACE,
    "data.val_fingerprint": FREE,  # of the validation set, in the place of data.val
    "data.workers": PLACE,
    "duration": First("90ep"),
    "ema.beta": First(15.0),
    "ema.decay": First(None),
    "ema.device": FREE,
    "ema.every": First(1),
    "ema.ramp": First("constant"),
    "ema.start": First("0step"),
    "engine.backend": FREE,
    "engine.clip_grad_norm": First(None),
    "engine.compile": FREE,
    "engine.gradient_checkpointing": FREE,
    "engine.not_finite": First("skip"),
    "engine.precision": First("bf16"),
    "engine.sums": First("fast"),
    "engine.threads": First(1),  # with exact sums
    "engine.zero": FREE,
    "eval.bad": FREE,
    "eval.batch": FREE,
    "eval.classes": FREE,
    "eval.crop": FREE,
    "eval.every": FREE,
    "eval.interpolation": FREE,
    "eval.resize": FREE,
    "eval.train_samples": FREE,
    "log.csv": FREE,
    "log.every": FREE,
    "log.tensorboard": FREE,
    "log.verbose": FREE,
    "loss.args": First({}),
    "loss.label_smoothing": First(0.0),
    "loss.name": First("cross_entropy"),
    "lr.base": First(None),
    "lr.count_from": First("auto"),
    "lr.peak": First(None),
    "lr.scale": First("linear"),
    "lr.schedule.args": First({}),
    "lr.schedule.name": First("cosine"),
    "lr.warmup.duration": First("0ep"),
    "lr.warmup.start": First("0"),
    "mixing.cutmix": First(0.0),
    "mixing.mixup": First(0.0),
    "mixing.off_last": First("0ep"),
    "mixing.probability": First(1.0),
    "mixing.switch": First(0.5),
    "model.args": First({}, fixed=True),
    "model.channels_last": FREE,
    "model.drop_path": First(None),
    "model.dropout": First(None),
    "model.freeze": First([], fixed=True),
    "model.name": First("torchvision/resnet50", fixed=True),
    "model.pretrained": First(None, fixed=True),
    "model.sync_bn": First(False, fixed=True),
    "optimizer.args": First({}),
    "optimizer.layer_decay": First(1.0),
    "optimizer.name": First("sgd", fixed=True),
    "optimizer.no_decay": First(["norm", "bias", "model"]),
    "optimizer.weight_decay": First(0.0),
    "precise_bn.num_samples": FREE,
    "precise_bn.transform": FREE,
    "run.allow_change": PLACE,
    "run.deterministic": FREE,
    "run.dir": PLACE,
    "run.mirror": PLACE,
    "run.name": PLACE,
    "run.seed": First(0, fixed=True),
    "run.start_from": First(None, fixed=True),
    "run.timeout": PLACE,
    "wandb.artifact": PLACE,
    "wandb.entity": PLACE,
    "wandb.group": PLACE,
    "wandb.job_type": PLACE,
    "wandb.mode": PLACE,
    "wandb.name": PLACE,
    "wandb.notes": PLACE,
    "wandb.project": PLACE,
    "wandb.system": PLACE,
    "wandb.tags": PLACE,
    "wandb.timeout": PLACE,
}


def row_of(key: str) -> First | str | None:
    """The row of `KEYS` for a flat key. `model.args.depths` has that of `model.args`, without a default of its own."""
    if key in KEYS:
        return KEYS[key]
    parent, _, _ = key.partition(".args.")
    row = KEYS.get(f"{parent}.args") if parent != key else None
    return First(REQUIRED, row.fixed) if isinstance(row, First) else row


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as `a.b.c`; empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def counting(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that count: of the training result, and not at their first default. Unknown keys count."""
    rows = {key: row_of(key) for key in flat}
    return {
        key: flat[key]
        for key, row in rows.items()
        if row is None or (isinstance(row, First) and (row.default == REQUIRED or flat[key] != row.default))
    }


def identity(config: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """The keys of a config that count, flat, with the training set's fingerprint."""
    return counting({**flatten(config), "data.fingerprint": fingerprint})


def auto_name(stem: str, identity: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{stem}-{digest[:8]}"


def read_identity(folder: Path) -> tuple[dict[str, Any], str | None] | None:
    """(the keys that count, the validation set's fingerprint) of a run folder; None if it has none.

    Until 81fd9c4 identity.json held all keys, evaluation's too, and both fingerprints in one value.
    """
    try:
        flat: dict[str, Any] = json.loads((folder / "identity.json").read_text())
        train, _, val = str(flat["data.fingerprint"]).partition(" ")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return counting({**flat, "data.fingerprint": train}), flat.get("data.val_fingerprint", val or None)


@dataclass(frozen=True)
class Change:
    """A key with another value than the run was started with."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {self.old!r} -> {self.new!r}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The keys that differ between two identities. A key that is in one alone has its first default in the other."""

    def value(of: Mapping[str, Any], key: str) -> Any:
        row = row_of(key)
        return of.get(key, row.default if isinstance(row, First) and row.default != REQUIRED else None)

    return [
        Change(key, value(old, key), value(new, key))
        for key in sorted({*old, *new})
        if (key in old) != (key in new) or old[key] != new[key]
    ]


def runs_of(root: Path, stem: str) -> dict[str, dict[str, Any]]:
    """Name -> the keys that count, of the run folders `root`/STEM-XXXXXXXX, the newest first."""
    pattern = re.compile(re.escape(stem) + r"-[0-9a-f]{8}")
    folders = [each for each in root.iterdir() if pattern.fullmatch(each.name)] if root.is_dir() else []
    found = {each: read_identity(each) for each in folders}
    known = {each: keys[0] for each, keys in found.items() if keys is not None}
    newest_first = sorted(known, key=lambda each: -(each / "identity.json").stat().st_mtime)
    return {each.name: known[each] for each in newest_first}


def find_run(root: Path, stem: str, identity: Mapping[str, Any], allow_change: Collection[str]) -> tuple[str, str]:
    """(name of this identity's run folder, a line about a similar run or "").

    It is the folder that has its name; or else the newest run of this `stem` with equal keys but those of
    `allow_change`, whatever version named it; or else a new one. The line names a run that differs in few keys, and how
    to continue that one.
    """
    name, runs = auto_name(stem, identity), runs_of(root, stem)
    if name in runs:
        return name, ""
    differing = {other: changes(keys, identity) for other, keys in runs.items()}
    for other, found in differing.items():
        if all(change.key in allow_change for change in found):
            return other, ""
    if not differing:
        return name, ""
    other = min(differing, key=lambda each: len(differing[each]))
    return name, _advice(root, other, differing[other])


def _advice(root: Path, other: str, found: list[Change]) -> str:
    fixed = [change for change in found if is_fixed(change.key)]
    if len(found) > 3 or len(fixed) == len(found):
        return ""
    differences = "; ".join(map(str, found))
    if fixed:
        return f"a new run; {root / other} has other values: {differences}"
    keys = json.dumps([change.key for change in found])
    return f"a new run; to continue {root / other} with other values ({differences}): --run.allow_change '{keys}'"


def check_allowed(keys: Collection[str]) -> None:
    """Raises UserError for a key of run.allow_change that does not exist: it would begin a new run instead."""
    for key in keys:
        if row_of(key) is None:
            raise UserError(f"run.allow_change: no key {key!r}{nearest(key, KEYS)}")


def is_fixed(key: str) -> bool:
    """Whether no run can continue with another value of this key."""
    row = row_of(key)
    return isinstance(row, First) and row.fixed
