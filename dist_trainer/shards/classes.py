"""Class names: their list in a file, one numbering for training and validation; whether samples are sorted by class."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_trainer.data.index import BAD, ShardIndex
from dist_trainer.errors import UserError
from dist_trainer.storage.storage import Storage

CLASSES_FILE = "classes.txt"
"""Beside tars: one class name per line, in the order of their numbers."""


def read_classes(location: str, storage: Storage) -> tuple[str, ...]:
    """The class names in a file, one per line. Raises FileNotFoundError, and UserError for a file of another kind."""
    try:
        lines = storage.read(location).decode().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{location}: not UTF-8 text; a class list has one name per line") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise UserError(f"{location}: no class in it; a class list has one name per line")
    return names


def is_class_sorted(index: ShardIndex) -> bool:
    """Whether neighbours in a shard share their class so often that blocks of neighbours would not mix classes.

    In shuffled shards two neighbours are of one class with probability p = sum n_c (n_c - 1) / (N (N - 1)). Sorted
    means more than half-way from p to 1, and beyond chance: by 4 standard deviations of that many independent pairs.
    """
    labels: npt.NDArray[np.int64] = index.samples["label"].astype(np.int64)
    shard = np.repeat(np.arange(len(index.shards)), index.counts)
    good = labels != BAD
    labels, shard = labels[good], shard[good]
    pairs = shard[1:] == shard[:-1]
    num_pairs, size = int(pairs.sum()), len(labels)
    if not num_pairs:
        return False
    counts = np.bincount(labels).astype(np.float64)
    chance = float((counts * (counts - 1)).sum() / (size * (size - 1)))
    share = float((labels[1:] == labels[:-1])[pairs].mean())
    deviation = (chance * (1 - chance) / num_pairs) ** 0.5
    return chance < 1 and share > (1 + chance) / 2 and share > chance + 4 * deviation


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether classes have no names but their numbers."""
    return all(name == str(number) for number, name in enumerate(names))


def match_classes(train: ShardIndex, val: ShardIndex) -> ShardIndex:
    """`val` with the class list of `train`: its labels are renumbered if its names are in another order.

    Raises UserError when the sets differ, or when classes without names have numbers that training has not.
    """
    if val.class_names == train.class_names:
        return val
    by_number = _are_numbers(train.class_names) or not all(name.isdecimal() for name in train.class_names)
    if _are_numbers(val.class_names) and by_number:  # folders called 0, 1, 10, 2 are names, in the order of text
        largest = int(val.samples["label"].max(initial=BAD))
        if largest >= train.num_classes:
            raise UserError(
                f"data.val: its labels go up to {largest}, and data.train has {train.num_classes:,} classes; "
                "both must be of one data set"
            )
        return replace(val, class_names=train.class_names)
    if _are_numbers(train.class_names):
        raise UserError(
            f"data.val: its classes have names ({_some(val.class_names)}), while those of data.train are numbers; "
            "index both with the same --label and --classes"
        )
    ours, theirs = set(train.class_names), set(val.class_names)
    missing, extra = sorted(ours - theirs), sorted(theirs - ours)
    if missing or extra:
        sides = [(missing, "only in data.train"), (extra, "only in data.val")]
        said = "; ".join(f"{len(names):,} {where} ({_some(names)})" for names, where in sides if names)
        raise UserError(
            f"data.val: its classes are not those of data.train ({val.num_classes:,} and {train.num_classes:,}): {said}"
        )
    if len(ours) < train.num_classes or len(theirs) < val.num_classes:
        raise UserError("data.val: some of its classes share a name, and stand in another order than in data.train")
    numbers = {name: number for number, name in enumerate(train.class_names)}
    table = np.array([*(numbers[name] for name in val.class_names), BAD], np.int32)  # BAD, -1, selects the last
    samples: Any = val.samples.copy()
    samples["label"] = table[samples["label"]]
    return replace(val, samples=samples, class_names=train.class_names)


def numbering_note(train: ShardIndex, val: ShardIndex) -> str | None:
    """A line on what `match_classes` cannot check: numbers cannot be compared with names."""
    if not _are_numbers(val.class_names) or _are_numbers(train.class_names):
        return None
    pairs = ", ".join(f"{number} is {name}" for number, name in enumerate(train.class_names[:2]))
    return f"data.val: its classes have no names, so their numbers are taken as data.train's: {pairs}, ..."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
