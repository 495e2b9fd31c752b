"""One consolidated checkpoint per save, readable on any world size and ZeRO stage.

`step_00012345/{model,optim}.safetensors`, `state.json`, and `MANIFEST.json` with sizes and digests, written last and
renamed into place: that is the commit. What has no manifest that parses, or does not match it, does not exist.
No pickle is ever read, and DeepSpeed's own format (one file per rank, a pointer written before the files) is not used.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dist_trainer.errors import UserError

State = dict[str, torch.Tensor]
VERSION = 1
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved to go on from."""

    every: str | None = "1ep"
    """How often to save; null: only at the end and when stopped."""
    keep_last: int = 2
    """Checkpoints kept for resuming. The best validated weights are kept beside."""


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def on_host(state: State) -> State:
    """Contiguous copies on the host: safetensors takes neither channels_last nor views of one storage."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def save_tensors(tensors: State, path: Path) -> None:
    """A safetensors file with the rights that a new file has here; safetensors' own would be the owner's alone."""
    path.touch()
    rights = path.stat().st_mode
    save_file(on_host(tensors), path)
    path.chmod(rights)


def write(folder: Path, tensors: dict[str, State], state: dict[str, Any]) -> None:
    """Write `folder` whole: `tensors[x]` as x.safetensors, `state` as state.json, then the manifest."""
    shutil.rmtree(folder, ignore_errors=True)  # an earlier try that never got its manifest
    folder.mkdir(parents=True)
    for name, values in tensors.items():
        save_tensors(values, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps({"version": VERSION, **state}, indent=1))
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": digest(path)}
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(json.dumps({"version": VERSION, "files": files}, indent=1))
    sync(temporary)
    temporary.replace(folder / MANIFEST)
    sync(folder)


def fault(folder: Path, *, digests: bool = True) -> str | None:
    """Why `folder` is not a complete checkpoint, or None. `digests` are checked by reading all of it."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in files.items():
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


def _steps(root: Path) -> list[Path]:
    """The folders `root`/step_*, newest first."""
    return sorted((p for p in root.glob("step_*") if p.is_dir()), reverse=True) if root.is_dir() else []


def complete(root: Path) -> list[Path]:
    """The checkpoints under `root` that have all their files, newest first."""
    return [folder for folder in _steps(root) if not fault(folder, digests=False)]


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """(the newest complete checkpoint under `root` or None, a line for each newer one that was passed over)."""
    notes: list[str] = []
    for folder in _steps(root):
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


def load_tensors(folder: Path, name: str) -> State:
    """`name`.safetensors, on the host. Raises UserError for a file that is none."""
    return _load_file(folder / f"{name}.safetensors")


def _load_file(path: Path) -> State:
    try:
        tensors: State = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None
    return tensors


def save(root: Path, step: int, tensors: dict[str, State], state: dict[str, Any], keep: int) -> None:
    """Commit `root`/step_XXXXXXXX, then remove all but the newest `keep` complete ones.

    Raises UserError when the storage refuses; the earlier checkpoints are untouched then.
    """
    folder = root / f"step_{step:08d}"
    # Another whole one of this step goes only when its successor is whole.
    target = folder if fault(folder, digests=False) else root / f".{folder.name}"
    try:
        write(target, tensors, state)
        if target != folder:
            shutil.rmtree(folder)
            target.rename(folder)
    except (OSError, SafetensorError) as error:
        if target != folder:
            shutil.rmtree(target, ignore_errors=True)
        raise UserError(f"cannot save {folder}: {error}; earlier checkpoints are whole") from None
    older = [other for other in _steps(root) if other.name < folder.name and not fault(other, digests=False)]
    # What is newer was passed over as damaged when this run resumed: it must not outlive its repetition.
    for other in _steps(root):
        if other != folder and other not in older[: keep - 1]:
            shutil.rmtree(other, ignore_errors=True)


def replace_best(root: Path, weights: State, metrics: dict[str, Any]) -> None:
    """Keep `weights` as the best so far, in `root`/step_XXXXXXXX; the former best goes when the new one is whole."""
    save(root, int(metrics["step"]), {"model": weights}, metrics, keep=1)


def write_weights(path: Path, weights: State) -> None:
    """One safetensors file, whole or not at all. Raises UserError when the storage refuses."""
    temporary = path.with_name(f".{path.name}")
    try:
        save_tensors(weights, temporary)
        sync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}") from None


def load_into(model: nn.Module, weights: State, where: str) -> None:
    """Load weights and buffers. Raises UserError, naming them, for keys or shapes that do not fit."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{n} {tuple(weights[n].shape)} for {tuple(own[n].shape)}"
        for n in own
        if n in weights and own[n].shape != weights[n].shape
    ]
    faults = [
        f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("other shapes", shapes))
        if names
    ]
    if faults:
        raise UserError(f"{where}: does not fit the model ({'; '.join(faults)}); check model.name and model.args")
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
    return _load_file(path)
