"""A second copy of a run folder, at any URL or path: what is there, and one pass that brings it up to date.

Objects are put whole; a checkpoint's manifest comes last and makes it one, so nothing is renamed. Of a checkpoint that
was cut off there is no manifest, and it does not exist.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_trainer.errors import UserError
from dist_trainer.run_folder import checkpoint, lineage
from dist_trainer.run_folder.checkpoint import MANIFEST
from dist_trainer.run_folder.lineage import LINEAGE
from dist_trainer.run_folder.retention import Retention
from dist_trainer.run_folder.snapshots import INDEX
from dist_trainer.storage.storage import Storage

FIRST = (
    *(LINEAGE, "identity.json", "config.yaml", "changes.json", "env.json", "classes.json", "pretrained.json"),
    *("wandb_id", "metrics.jsonl", "bad_samples.jsonl"),
)
"""Small files, before the checkpoint that they belong to: metrics then reach at least as far as it does."""
LAST = ("predictions.png", "summary.json", "STATE")
"""After it: they tell how the run ended."""
OWNER = "owner.json"
"""Who is training there now; not a copy of the local one."""
KINDS = ("best", "average")
"""Folders with one checkpoint each. The newest replaces the one before."""


class Moved(Exception):
    """A local file went away while it was copied: training has gone on, and the pass begins again."""


class Mirror:
    """The copy at `location`. Methods raise Outage, PermissionError or FileNotFoundError as Storage does."""

    def __init__(self, location: str, storage: Storage) -> None:
        self.location = location.rstrip("/")
        self.storage = storage
        self.pinned: int | None = None
        """The step whose checkpoint is being copied: it is not to be removed meanwhile."""
        self._there: dict[str, object] = {}

    def at(self, name: str) -> str:
        return f"{self.location}/{name}"

    # What is there

    def read_text(self, name: str) -> str | None:
        """None where there is no such file."""
        try:
            return self.storage.read(self.at(name)).decode()
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Of its entries; none where there is no such folder."""
        try:
            return self.storage.list(self.at(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def begins(self) -> list[lineage.Begin]:
        """The starts that the copy has seen; empty where there is no copy, or one without them."""
        with contextlib.suppress(ValueError):
            return lineage.parse(self.read_text(LINEAGE) or "[]")
        return []

    def manifests(self, folder: str) -> dict[int, str]:
        """Step -> manifest of the complete checkpoints there."""
        found = {}
        for name in self.names(folder):
            if name.startswith("step_") and (text := self.read_text(f"{folder}/{name}/{MANIFEST}")) is not None:
                found[int(name.removeprefix("step_"))] = text
        return found

    # One pass

    def bring_up_to_date(self, run: Path, retention: Retention) -> None:
        """Copy what changed in `run`, in an order in which a cut at any place leaves a whole copy; then remove, by the
        rule for this place alone, what is not to be kept. Raises Moved where it has to begin again."""
        self._put_small(run, FIRST)
        for kind in KINDS:
            newest = next(iter(checkpoint.complete(run / kind)), None)
            if newest is not None:
                self._put_checkpoint(run, newest)
        named = self._put_snapshots(run)
        kept = self._put_checkpoints(run, retention)
        self._put_small(run, (f"snapshots/{INDEX}",))
        self._remove_others(run, kept, named)
        self._put_small(run, LAST)

    def _put_small(self, run: Path, names: tuple[str, ...]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = (run / name).stat()
                stamp = found.st_size, found.st_mtime_ns
                if self._there.get(name) != stamp:
                    self._put(name, (run / name).read_bytes())
                    self._there[name] = stamp

    def _put(self, name: str, content: bytes | Path) -> None:
        if isinstance(content, Path) and not content.exists():
            raise Moved
        try:
            self.storage.write(self.at(name), content)
        except FileNotFoundError:
            if isinstance(content, Path) and not content.exists():
                raise Moved from None
            raise

    def _put_checkpoint(self, run: Path, folder: Path) -> None:
        name = str(folder.relative_to(run))
        try:
            manifest = (folder / MANIFEST).read_text()
            files = json.loads(manifest)["files"]
        except FileNotFoundError:
            raise Moved from None
        if self._there.get(name) == manifest:
            return
        if name not in self._there and self.read_text(f"{name}/{MANIFEST}") == manifest:
            self._there[name] = manifest  # an attempt before put it there
            return
        self.storage.remove(self.at(f"{name}/{MANIFEST}"))  # of another content, which is about to change
        for file in files:
            self._put(f"{name}/{file}", folder / file)
        self._put(f"{name}/{MANIFEST}", manifest.encode())
        self._there[name] = manifest

    def _put_snapshots(self, run: Path) -> set[str]:
        """The files that the index names, without the index."""
        try:
            index = json.loads((run / "snapshots" / INDEX).read_text())["snapshots"]
        except FileNotFoundError:
            return set()
        for each in index:
            name = f"snapshots/step_{each['step']:08d}.safetensors"
            if self._there.get(name) != each["sha256"]:
                self._put(name, run / name)
                self._there[name] = each["sha256"]
        return {f"step_{each['step']:08d}.safetensors" for each in index}

    def _put_checkpoints(self, run: Path, retention: Retention) -> set[int]:
        """The newest first, since a run goes on from it. Returns the steps to keep."""
        here = {checkpoint.step_of(folder): folder for folder in checkpoint.complete(run / "checkpoints")}
        newest = max(here, default=-1)
        there = {step for step in self._steps_there() if step <= newest}
        values = {step: self._value(run, step, retention) for step in {*here, *there}}
        kept = retention.kept(values)
        for step in sorted(kept & here.keys(), reverse=True):
            self.pinned = step
            try:
                if step == newest:
                    self._put_small(run, (f"snapshots/{INDEX}",))  # as the checkpoint knows it
                self._put_checkpoint(run, here[step])
            finally:
                self.pinned = None
        return kept

    def _steps_there(self) -> list[int]:
        return [int(name.removeprefix("step_")) for name in self.names("checkpoints") if name.startswith("step_")]

    def _value(self, run: Path, step: int, retention: Retention) -> float | None:
        if not retention.best:
            return None
        name = f"checkpoints/step_{step:08d}/state.json"
        try:
            text = (run / name).read_text()
        except FileNotFoundError:
            text = self.read_text(name) or "{}"
        state: dict[str, Any] = json.loads(text)
        return retention.value(state)

    def _remove_others(self, run: Path, kept: set[int], snapshots: set[str]) -> None:
        """What has a successor that is whole, or never became whole."""
        for step in self._steps_there():
            if step not in kept:
                self._remove(f"checkpoints/step_{step:08d}")
        for kind in KINDS:
            newest = next(iter(checkpoint.complete(run / kind)), None)
            for name in self.names(kind) if newest is not None else []:
                if newest is not None and name != newest.name:
                    self._remove(f"{kind}/{name}")
        for name in self.names("snapshots"):
            if name != INDEX and name not in snapshots:
                self._there.pop(f"snapshots/{name}", None)
                self.storage.remove(self.at(f"snapshots/{name}"))

    def _remove(self, folder: str) -> None:
        """A checkpoint: its manifest first, so that it is none at once."""
        self._there.pop(folder, None)
        for name in sorted(self.names(folder), key=lambda name: name != MANIFEST):
            self.storage.remove(self.at(f"{folder}/{name}"))

    # The way back

    def bring_back(self, run: Path) -> list[str]:
        """Copy into `run` its newest whole checkpoint, best weights, snapshots, and record; lineage.json last.

        Returns a line for each checkpoint that is damaged. Raises UserError where all of them are.
        """
        self.bring_record(run)
        notes = [note for kind in (*KINDS, "checkpoints") for note in self.bring_newest(run, kind)]
        self.bring_snapshots(run)
        lineage.write(run, self.begins())
        return notes

    def bring_record(self, run: Path, *more: str) -> None:
        """The small files, and these."""
        run.mkdir(parents=True, exist_ok=True)
        for name in (*FIRST[1:], *LAST, *more):
            with contextlib.suppress(FileNotFoundError):
                (run / name).write_bytes(self.storage.read(self.at(name)))

    def bring_newest(self, run: Path, kind: str) -> Iterator[str]:
        """The newest whole checkpoint of checkpoints, best or average; a line for each that is not."""
        manifests = self.manifests(kind)
        for step in sorted(manifests, reverse=True):
            folder = f"{kind}/step_{step:08d}"
            reason = self.bring_checkpoint(run, folder, manifests[step])
            if reason is None:
                return
            yield f"{self.at(folder)} is not complete ({reason}): passed over"
        if manifests and kind == "checkpoints":
            raise UserError(f"{self.location}: all of its checkpoints are damaged; choose another --run.name")

    def bring_checkpoint(self, run: Path, folder: str, manifest: str) -> str | None:
        """Copy one; why it is not complete, or None: each file's size and digest are checked."""
        target = run / folder
        target.mkdir(parents=True, exist_ok=True)
        (target / MANIFEST).unlink(missing_ok=True)
        for name in json.loads(manifest)["files"]:
            if Path(name).name != name:  # `fault` says so
                break
            if (reason := self._copy(f"{folder}/{name}", target / name)) is not None:
                return reason
        (target / MANIFEST).write_text(manifest)
        reason = checkpoint.fault(target)
        if reason is not None:
            (target / MANIFEST).unlink()
        return reason

    def _copy(self, name: str, target: Path) -> str | None:
        try:
            with self.storage.open(self.at(name)) as source, target.open("wb") as out:
                while data := source.read(2**23):
                    out.write(data)
        except FileNotFoundError:
            return f"{target.name} is missing"
        return None

    def bring_snapshots(self, run: Path) -> None:
        text = self.read_text(f"snapshots/{INDEX}")
        if text is None:
            return
        folder = run / "snapshots"
        folder.mkdir(parents=True, exist_ok=True)
        for each in json.loads(text)["snapshots"]:
            name = f"step_{int(each['step']):08d}.safetensors"
            self._copy(f"snapshots/{name}", folder / name)  # one that is missing is dropped, with a line, on resume
        (folder / INDEX).write_text(text)
