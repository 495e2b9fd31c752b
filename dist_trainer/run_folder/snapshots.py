"""The k best weights of a run by a metric of its validation, for averaging. One file each; an index written last.

`step_00012345.safetensors` and `index.json`, which alone decides what exists. Both are written under another name,
synced and renamed, so the index always names complete files.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dist_trainer.errors import UserError
from dist_trainer.run_folder.tensor_files import digest, read_tensors, save_tensors
from dist_trainer.storage.atomic import replace_text
from dist_trainer.tensors import State, not_finite

INDEX = "index.json"
VERSION = 1
_OURS = re.compile(r"\.?step_\d{8,}\.safetensors|\.index\.json|\.tmp\w{6}")  # .tmp: safetensors', after a kill


@dataclass(frozen=True)
class Snapshot:
    """One file, as in the index."""

    step: int
    value: float
    size: int
    sha256: str
    displaced: int | None = None
    """The step whose snapshot took its place; None for the k best."""

    @property
    def file(self) -> str:
        return f"step_{self.step:08d}.safetensors"


class Snapshots:
    """The `top_k` best snapshots in `folder`. Opening reads; one process writes, `resume` first.

    A killed run resumes from a checkpoint and repeats what came after, so it must find the k best as of that
    checkpoint, although later ones may have displaced some. So a displaced snapshot stays, marked with the step that
    displaced it, as long as a kept checkpoint (`commit`) lies between its own step and that one. `resume(step)` drops
    snapshots later than `step` and restores those displaced later. A checkpoint is identified by the last step whose
    validation it knows of; 0 is the start of the run.
    """

    def __init__(self, folder: Path, top_k: int, larger_is_better: bool = True, *, metric: str | None = None) -> None:
        """`metric`: the name of the values; snapshots ranked by another one are passed over, and dropped by `resume`.

        Raises UserError for an index that is damaged.
        """
        self.folder = folder
        self._top_k, self._metric = top_k, metric
        self._sign = 1.0 if larger_is_better else -1.0
        self._all: list[Snapshot] = []
        self._checkpoints: list[int] = []
        self.former_metric: str | None = None
        """That of the snapshots that were passed over."""
        try:
            index = json.loads((folder / INDEX).read_text())
            if index["version"] != VERSION:
                raise UserError(f"{folder / INDEX}: format {index['version']}, this program reads {VERSION}")
            ranked_by = index.get("metric")  # not written before metrics could change
            if None not in (metric, ranked_by) and metric != ranked_by:
                self.former_metric = ranked_by
            else:
                self._all = [Snapshot(**each) for each in index["snapshots"]]
                self._checkpoints = index["checkpoints"]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / INDEX} does not parse ({error}); move {folder} away to continue without its snapshots"
            ) from None

    @property
    def best(self) -> list[Snapshot]:
        """At most `top_k`, best first; of equal ones the older first."""
        return self._ranked(self._all)[: self._top_k]

    def _ranked(self, snapshots: Iterable[Snapshot]) -> list[Snapshot]:
        standing = (each for each in snapshots if each.displaced is None)
        return sorted(standing, key=lambda each: (-self._sign * each.value, each.step))

    def would_take(self, value: float) -> bool:
        """Whether to offer weights of this `value`: it is finite, and there is room or the worst is worse."""
        best = self.best
        full = len(best) >= self._top_k
        return math.isfinite(value) and not (full and (not best or self._sign * (value - best[-1].value) <= 0))

    def offer(self, step: int, value: float, weights: State) -> str | None:
        """Keep `weights` if they are among the best, instead of the worst.

        Returns a line if weights or value are not finite, which are not kept. A `step` that is offered again replaces
        its snapshot, and later ones are dropped. Raises UserError when the storage refuses; the earlier snapshots are
        whole then.
        """
        if (before := self._as_of(step - 1)) != self._all:
            self._put(before, self._checkpoints)  # first, since the file of this step is about to change
        if not math.isfinite(value):
            return f"step {step}: no snapshot is kept, its metric is {value}"
        if not self.would_take(value):
            return None
        if key := not_finite(weights):
            return f"step {step}: no snapshot is kept, {key} has values that are not finite"
        snapshots = [*self._all, self._write(step, value, weights)]
        kept = self._ranked(snapshots)[: self._top_k]
        self._put(
            [
                each if each in kept or each.displaced is not None else replace(each, displaced=step)
                for each in snapshots
            ],
            self._checkpoints,
        )
        return None

    def resume(self, step: int) -> list[str]:
        """Go back to the k best as of `step`, and remove files that the index does not name.

        Returns a line for each missing or truncated file, which is dropped. Raises UserError as `offer` does.
        """
        there, notes = [], []
        for each in self._as_of(step):
            reason = self._fault(each, digests=False)
            if reason:
                notes.append(f"snapshot {each.file} {reason}: dropped")
            else:
                there.append(each)
        self._put(there, sorted({step, *(other for other in self._checkpoints if other < step)}))
        return notes

    def commit(self, steps: Iterable[int]) -> None:
        """After a save, set the kept checkpoints: snapshots that none of them needs are removed. Raises as `offer`
        does."""
        self._put(self._all, sorted(steps))

    def load(self, snapshot: Snapshot) -> State:
        """A snapshot's weights, on the host. Raises UserError for a file that changed since it was written."""
        if reason := self._fault(snapshot, digests=True):
            raise UserError(f"{self.folder / snapshot.file} {reason}: damaged; average without it, with --files")
        return read_tensors(self.folder / snapshot.file)

    def _as_of(self, step: int) -> list[Snapshot]:
        return [
            replace(each, displaced=None) if (each.displaced or 0) > step else each
            for each in self._all
            if each.step <= step
        ]

    def _fault(self, snapshot: Snapshot, *, digests: bool) -> str | None:
        path = self.folder / snapshot.file
        if not path.is_file():
            return "is missing"
        if (size := path.stat().st_size) != snapshot.size:
            return f"has {size} of {snapshot.size} bytes"
        return "does not match its digest" if digests and digest(path) != snapshot.sha256 else None

    def _write(self, step: int, value: float, weights: State) -> Snapshot:
        path = self.folder / Snapshot(step, value, 0, "").file
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(weights, path, durable=True)
            return Snapshot(step, value, path.stat().st_size, digest(path))
        except OSError as error:
            raise UserError(f"cannot keep {path}: {error.strerror or error}; the earlier snapshots are whole") from None

    def _put(self, snapshots: list[Snapshot], checkpoints: list[int]) -> None:
        """Write the index, then remove the files that it does not name."""

        def needed(each: Snapshot) -> bool:
            return each.displaced is None or any(each.step <= step < each.displaced for step in checkpoints)

        named = [each for each in snapshots if needed(each)]
        index: dict[str, Any] = {
            "version": VERSION,
            "metric": self._metric,
            "checkpoints": checkpoints,
            "snapshots": [asdict(e) for e in named],
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.folder / INDEX, json.dumps(index, indent=1), durable=True)
            self._all, self._checkpoints = named, checkpoints
            files = {each.file for each in named}
            for path in self.folder.iterdir():
                if _OURS.fullmatch(path.name) and path.name not in files:
                    path.unlink()
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder / INDEX}: {error.strerror or error}; the earlier snapshots are whole"
            ) from None
