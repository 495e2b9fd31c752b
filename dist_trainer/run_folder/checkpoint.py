"""One consolidated checkpoint per save, readable on any world size and ZeRO stage.

`step_00012345/{model,optim}.safetensors`, `state.json`, and `MANIFEST.json` with sizes and digests, written last and
renamed into place: that is the commit. A folder whose manifest is missing, does not parse or does not match its files
is not a checkpoint. DeepSpeed's own format (one file per rank, a pointer written before the files) is not used.
"""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dist_trainer.errors import UserError, nearest
from dist_trainer.plan import DurationText
from dist_trainer.run_folder.retention import Retention
from dist_trainer.run_folder.tensor_files import digest, read_tensors, save_tensors
from dist_trainer.storage.atomic import replace_text, sync
from dist_trainer.tensors import State, misfits

VERSION = 1
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved to resume from."""

    every: DurationText | None = "1ep"
    """How often to save; null: only at the end and when stopped."""
    background: bool = True
    """Training stands still for the copy to host memory alone; false: until the checkpoint is on the disk."""
    keep_last: int = 2
    """Checkpoints kept for resuming. The best validated weights are kept beside."""
    keep_best: int = 0
    """Checkpoints kept beside them: the best by `best_metric`, of those saved right after an evaluation."""
    best_metric: str = "val/top1"
    """A logged validation metric. The least loss is best, the largest accuracy."""
    keep_every: int = 0
    """Each n-th checkpoint (of those at `every`) is kept for ever; 0: none."""
    grace: float = 20.0
    """Seconds after a signal for which the last checkpoint is waited for; then the one before stands."""
    max_failed: int = 3
    """Checkpoints in a row that the storage may refuse; then training stops."""

    def check(self, logged: Collection[str]) -> None:
        """Raises UserError for numbers that cannot be, and for a metric that is not `logged`."""
        if self.best_metric not in logged:
            raise UserError(
                f"checkpoint.best_metric: {self.best_metric!r} is not logged{nearest(self.best_metric, logged)}; "
                f"there are {', '.join(sorted(logged))}"
            )
        if self.keep_last < 1:
            raise UserError(f"checkpoint.keep_last: {self.keep_last}; keep at least 1 to resume from")
        for key, value in (("keep_best", self.keep_best), ("keep_every", self.keep_every)):
            if value < 0:
                raise UserError(f"checkpoint.{key}: {value} is negative; write 0 for none")
        if self.max_failed < 1:
            raise UserError(f"checkpoint.max_failed: {self.max_failed}; write 1 to stop at the first that fails")
        if not self.grace >= 0:
            raise UserError(f"checkpoint.grace: {self.grace:g} is no time to wait; it is seconds, such as 20")


def write(folder: Path, tensors: dict[str, State], state: dict[str, Any]) -> None:
    """Write `folder` whole: `tensors[x]` as x.safetensors, `state` as state.json, then the manifest."""
    shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt that never got its manifest
    folder.mkdir(parents=True)
    for name, values in tensors.items():
        save_tensors(values, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps({"version": VERSION, **state}, indent=1))
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": digest(path)}
    replace_text(folder / MANIFEST, json.dumps({"version": VERSION, "files": files}, indent=1), durable=True)


def fault(folder: Path, *, digests: bool = True) -> str | None:
    """Why `folder` is not a complete checkpoint, or None. `digests` are checked by reading all of it."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if Path(name).name != name:
                return f"{MANIFEST} names {name!r}, which lies elsewhere"
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} of {expected['size']} bytes"
            if digests and digest(folder / name) != expected["sha256"]:
                return f"{name} does not match its digest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} does not parse ({error})"
    return None


def steps(root: Path) -> list[Path]:
    """The folders `root`/step_*, newest first, whole or not."""
    return sorted((p for p in root.glob("step_*") if p.is_dir()), reverse=True) if root.is_dir() else []


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def complete(root: Path) -> list[Path]:
    """The checkpoints under `root` that have all their files, newest first."""
    return [folder for folder in steps(root) if not fault(folder, digests=False)]


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """(the newest complete checkpoint under `root` or None, a line for each newer one that was passed over)."""
    notes: list[str] = []
    for folder in steps(root):
        reason = fault(folder)
        if reason is None:
            return folder, notes
        notes.append(f"checkpoint {folder.name} is not complete ({reason}): passed over")
    return None, notes


def load_state(folder: Path) -> dict[str, Any]:
    """`state.json`. Raises UserError for another format version."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    if state.get("version") != VERSION:
        raise UserError(f"{folder}: checkpoint format {state.get('version')}, this program reads {VERSION}")
    return state


def tensor_names(folder: Path) -> list[str]:
    """What `load_tensors` can load: model, optim, ema, ..."""
    return sorted(path.stem for path in folder.glob("*.safetensors"))


def load_tensors(folder: Path, name: str) -> State:
    """`name`.safetensors, on the host. Raises UserError for another kind of file."""
    return read_tensors(folder / f"{name}.safetensors")


ONLY_LAST = Retention()


def save(
    root: Path, step: int, tensors: dict[str, State], state: dict[str, Any], retention: Retention = ONLY_LAST
) -> None:
    """Commit `root`/step_XXXXXXXX, then remove the complete ones that are not to be kept.

    Raises UserError when the storage refuses; the earlier checkpoints are untouched then.
    """
    folder = root / f"step_{step:08d}"
    # A complete one of the same step is removed only when its successor is complete.
    target = folder if fault(folder, digests=False) else root / f".{folder.name}"
    try:
        write(target, tensors, state)
        if target != folder:
            former = folder.rename(root / f".{folder.name}.former")
            target.rename(folder)
            shutil.rmtree(former)
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)  # of a full disk, it may be what fills it
        raise UserError(f"cannot save {folder}: {error.strerror or error}; earlier checkpoints are whole") from None
    older = {}
    for other in steps(root):
        if other.name <= folder.name and not fault(other, digests=False):
            older[step_of(other)] = retention.value(load_state(other)) if retention.best else None
    kept = {root / f"step_{each:08d}" for each in retention.kept(older)}
    # Newer ones were found damaged when this run resumed: they must not survive being repeated.
    for other in [*steps(root), *root.glob(".step_*")]:
        if other not in kept:
            shutil.rmtree(other, ignore_errors=True)


def write_weights(path: Path, weights: State) -> None:
    """Write one safetensors file atomically. Raises UserError when the storage refuses."""
    try:
        save_tensors(weights, path, durable=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def load_into(model: nn.Module, weights: State, source: str) -> None:
    """Load weights and buffers. Raises UserError, naming `source`, for names or shapes that do not fit."""
    shapes, own = ({name: str(tuple(t.shape)) for name, t in s.items()} for s in (weights, model.state_dict()))
    if found := misfits(shapes, own):
        raise UserError(f"{source}: does not fit the model ({found}); check model.name and model.args")
    model.load_state_dict(weights)


def load_weights(path: Path, name: str = "model") -> State:
    """Weights of one safetensors file, or of a checkpoint folder: model, ema, or those with `_bn` re-estimated.

    Raises UserError when there are none.
    """
    if path.is_dir():
        reason = fault(path)
        if reason:
            raise UserError(f"{path}: not a complete checkpoint ({reason})")
        weights = name.removesuffix("_bn")
        for each in (weights, *([f"bn_{weights}"] if name != weights else [])):
            if not (path / f"{each}.safetensors").is_file():
                raise UserError(f"{path}: has no {each}.safetensors, which --of {name} needs")
        state = load_tensors(path, weights)
        return state if name == weights else state | load_tensors(path, f"bn_{weights}")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint folder or safetensors file")
    return read_tensors(path)
