"""Runs and checkpoints at a URL, for commands that read them: copied into a folder of this process."""

import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from dist_trainer.errors import Outage, UserError
from dist_trainer.run_folder import checkpoint
from dist_trainer.run_folder.checkpoint import MANIFEST
from dist_trainer.run_folder.mirror import OWNER, Mirror
from dist_trainer.storage.storage import Storage, is_remote

_COPIES: list[Path] = []
Part = Literal["best", "checkpoints", "snapshots"]


def local_run(location: str, parts: Collection[Part], storage: Storage | None = None) -> Path:
    """The run folder at a path or a URL, with its record and these parts of it; digests are checked.

    Raises UserError for a URL that holds no run, or cannot be read.
    """
    if not is_remote(location):
        return Path(location)
    mirror = Mirror(location, storage or Storage())
    run = _scratch() / mirror.location.rpartition("/")[2]
    try:
        mirror.bring_record(run, OWNER)  # tells whether it trains just now
        if not (run / "config.yaml").exists():
            raise UserError(f"{location}: not a run folder: it has no config.yaml")
        if "best" in parts:
            list(mirror.bring_newest(run, "best"))
        if "snapshots" in parts:
            mirror.bring_snapshots(run)
        if "checkpoints" in parts:
            for step, manifest in mirror.manifests("checkpoints").items():
                folder = f"checkpoints/step_{step:08d}"
                if mirror.bring_checkpoint(run, folder, manifest):
                    (run / folder / MANIFEST).write_text(manifest)  # for `fault`, which says why it is not whole
    except (Outage, OSError) as error:
        raise UserError(f"{location}: cannot be read: {_reason(error)}") from None
    return run


def local_weights(location: str, storage: Storage | None = None) -> Path:
    """A safetensors file, a checkpoint folder, or a run folder's best weights, at a path or a URL; or the newest in a
    folder of checkpoints, such as RUN/average.

    Raises UserError for what holds none of them, or cannot be read.
    """
    if not is_remote(location):
        return _here(Path(location))
    url, name = location.rstrip("/").rsplit("/", 1)
    mirror, folder = Mirror(url, storage or Storage()), _scratch()
    try:
        if name.endswith(".safetensors"):
            (folder / name).write_bytes(mirror.storage.read(location))
            return folder / name
        if (manifest := mirror.read_text(f"{name}/{MANIFEST}")) is not None:
            if reason := mirror.bring_checkpoint(folder, name, manifest):
                raise UserError(f"{location}: not a complete checkpoint ({reason})")
            return folder / name
        best, _ = checkpoint.newest(local_run(location, ["best"], storage) / "best")
    except (Outage, OSError) as error:
        raise UserError(f"{location}: cannot be read: {_reason(error)}") from None
    if best is None:
        raise UserError(f"{location}: no best weights yet")
    return best


def _here(path: Path) -> Path:
    is_run = (path / "config.yaml").is_file()
    if not is_run and not any(path.glob("step_*")):
        return path
    found, _ = checkpoint.newest(path / "best" if is_run else path)
    if found is None:
        raise UserError(f"{path}: {'no best weights yet' if is_run else 'no complete checkpoint'}")
    return found


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())


def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dist_trainer-"))
    _COPIES.append(folder)
    return folder


def remove_copies() -> None:
    """At the end of the process, which runs no handlers of atexit."""
    for folder in _COPIES:
        shutil.rmtree(folder, ignore_errors=True)
