"""Bad samples: each counted once over all ranks, listed, and stopped by one budget at the same step on every rank."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_trainer.data.index import BAD, ShardIndex
from dist_trainer.data.read import Bad
from dist_trainer.errors import plural


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used; `kind` is crc (other bytes than indexed), decode or label."""

    sample: int
    kind: str
    shard: str
    reason: str
    source: str | None = None
    """The name that its file had before it was packed."""

    @classmethod
    def of(cls, index: ShardIndex, sample: int, bad: Bad) -> "BadSample":
        shard = int(index.shard_of(np.array([sample]))[0])
        return cls(sample, bad.kind, index.file_of(sample, shard), bad.reason, index.source_of(sample))


def budget(max_bad: int | str, num_samples: int) -> int:
    """How many different bad samples a run tolerates: max(10, N / 10,000) unless the config sets it."""
    return max(10, num_samples // 10_000) if max_bad == "auto" else int(max_bad)


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class BadSampleLog:
    """The bad samples that a run has met. All ranks hold the same state, since all `add` the same lists at the same
    steps."""

    def __init__(self, index: ShardIndex, max_bad: int | str, split: str) -> None:
        self.limit = budget(max_bad, len(index))
        self.outage: str | None = None
        """A rank's message about unreachable storage, once all ranks know it."""
        self._index, self._split = index, split
        self._known: dict[int, BadSample] = {}
        self._told, self._epoch = 0, 0
        # Accepted when the index was made, so they do not count against the budget.
        self._accepted = {problem.sample for problem in index.problems}

    @property
    def known(self) -> list[BadSample]:
        return list(self._known.values())

    @property
    def num_bad(self) -> int:
        """Different bad samples met so far."""
        return len(self._known)

    def tell(self, epoch: int) -> str | None:
        """When another epoch has ended: a line, if bad samples were met since the last time."""
        if epoch == self._epoch:
            return None
        new, self._epoch, self._told = self.num_bad - self._told, epoch, self.num_bad
        if new <= 0:
            return None
        found = self.summary(list(self._known.values())[-new:])
        in_all = f"{self.num_bad:,} in all, in bad_samples.jsonl"
        return f"epoch {epoch}: {plural(new, 'bad training sample')}: {found}; {in_all}"

    def add(self, samples: Iterable[BadSample]) -> list[BadSample]:
        """Add what the ranks met; returns the new ones, in the order of sample numbers."""
        found = {bad.sample: bad for bad in samples if bad.sample not in self._known}
        new = [found[sample] for sample in sorted(found)]
        self._known |= {bad.sample: bad for bad in new}
        return new

    def write(self, path: Path, samples: Iterable[BadSample]) -> None:
        """Append to bad_samples.jsonl: one line each, with class and position; none twice, also after a resume.

        It is a list for people: training continues if it cannot be written.
        """
        with contextlib.suppress(OSError), path.open("a+") as file:
            file.seek(0)
            text = file.read()
            if text and not text.endswith("\n"):  # a kill cut the last line off
                file.write("\n")
            listed = {(line.get("split"), line.get("sample")) for line in map(_parsed, text.splitlines())}
            for bad in samples:
                if (self._split, bad.sample) in listed:
                    continue
                label = int(self._index.samples["label"][bad.sample])
                row = self._index.samples[bad.sample]
                line = {
                    "split": self._split,
                    **asdict(bad),
                    "offset": int(row["offset"]),
                    "class": self._index.class_names[label] if label != BAD else None,
                }
                file.write(json.dumps(line) + "\n")

    @property
    def over_budget(self) -> str | None:
        """One line that says which shards and what to run, when there are more bad samples than the budget allows."""
        counted = [bad for sample, bad in self._known.items() if sample not in self._accepted]
        if len(counted) <= self.limit:
            return None
        return (
            f"{plural(len(counted), 'bad sample')}, over the budget of {self.limit} (data.max_bad): "
            f"{self.summary(counted)}. Run: dist-trainer shards check {self._index.location}, and repair the shards, "
            f"or continue with --data.max_bad {2 * len(counted)}"
        )

    @staticmethod
    def summary(samples: Iterable[BadSample]) -> str:
        """`3 crc, 1 decode; train/000001.tar (3), ...`: kinds, and the shards that have most."""
        samples = list(samples)
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(bad.kind for bad in samples).most_common())
        shards = Counter(bad.shard for bad in samples).most_common()
        named = ", ".join(f"{shard} ({count})" for shard, count in shards[:3])
        return f"{kinds}; {named}" + (f" and {plural(len(shards) - 3, 'more shard')}" if len(shards) > 3 else "")

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [asdict(bad) for bad in self._known.values()]

    def load(self, state: Iterable[dict[str, Any]]) -> None:
        self.add(BadSample(**bad) for bad in state)
        self._told = self.num_bad

    def forget(self, is_mended: Callable[[BadSample], bool]) -> None:
        """Remove samples that have been repaired since."""
        self._known = {sample: bad for sample, bad in self._known.items() if not is_mended(bad)}
