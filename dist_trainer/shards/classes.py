"""Class names: their list in a file, one numbering for training and validation; whether samples are sorted by class."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dist_trainer.data.index import BAD, ShardIndex
from dist_trainer.errors import UserError, plural
from dist_trainer.run_folder.class_list import read_names
from dist_trainer.storage.storage import Storage

CLASSES_FILE = "classes.txt"
"""Beside tars: one class name per line, in the order of their numbers."""


def read_classes(location: str, storage: Storage) -> tuple[str, ...]:
    """The class names in a file, one per line, as they are: a blank at the end of a line belongs to its name.

    Or in a JSON list, such as a run's classes.json. Raises FileNotFoundError, and UserError for a file of another kind.
    """
    content = storage.read(location)
    if location.endswith(".json"):
        try:
            return read_names(content)
        except ValueError as error:
            raise UserError(f"{location}: {error}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{location}: not UTF-8 text; a class list has one name per line") from None
    names = tuple(line.removesuffix("\r") for line in text.split("\n") if line.strip())
    if not names:
        raise UserError(f"{location}: no class in it; a class list has one name per line")
    return names


def canonical(name: str) -> str:
    """A name for comparison: accents composed (NFC), which macOS writes decomposed. Names themselves are kept."""
    return unicodedata.normalize("NFC", name)


def few(names: Iterable[str]) -> str:
    """The first three of `names`, quoted."""
    listed = sorted(names)
    return ", ".join(repr(name) for name in listed[:3]) + (", ..." if len(listed) > 3 else "")


def misnumbered(names: Sequence[str]) -> bool:
    """Whether names hold numbers in another order than they stand in: class_0, class_1, class_10, class_2. A class
    number may then mean either order."""
    parts = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    found = [(part[1], int(part[2])) for part in parts if part]
    return len(found) == len(names) and len({prefix for prefix, _ in found}) == 1 and found != sorted(found)


def without_samples(index: ShardIndex) -> list[str]:
    """Names of the classes that no good sample has."""
    labels = index.samples["label"]
    counts = np.bincount(labels[labels != BAD], minlength=index.num_classes)
    return [name for name, count in zip(index.class_names, counts, strict=False) if not count]


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


Outputs = Literal["same", "another order", "other classes"]


def compare_classes(ours: Sequence[str], theirs: Sequence[str]) -> Outputs:
    """What the outputs of a network with the classes `theirs` are for those that have `ours`, by name.

    Numbers are no names: where either list has no more, they are held to be the same.
    """
    a, b = [canonical(name) for name in ours], [canonical(name) for name in theirs]
    if a == b or _are_numbers(a) or _are_numbers(b):
        return "same"
    return "another order" if sorted(a) == sorted(b) else "other classes"


def match_classes(train: ShardIndex, val: ShardIndex, *, subset: bool = False) -> ShardIndex:
    """`val` with the class list of `train`: its labels are renumbered by name.

    Raises UserError when the sets differ (with `subset`, `val` may lack classes), or when classes without names have
    numbers that training has not.
    """
    ours, theirs = train.class_names, val.class_names
    if theirs == ours:
        return val
    by_number = _are_numbers(ours) or not all(name.isdecimal() for name in ours)
    if _are_numbers(theirs) and by_number:  # folders called 0, 1, 10, 2 are names, in the order of text
        largest = int(val.samples["label"].max(initial=BAD))
        if largest >= train.num_classes:
            raise UserError(
                f"data.val: its labels go up to {largest}, and data.train has {train.num_classes:,} classes; "
                "both must be of one data set"
            )
        if misnumbered(ours):
            raise UserError(
                f"data.val: its classes are numbers, and those of data.train are called {few(ours)}, in the order of "
                "text: which class a number means is open; give both the names, or one list: data.classes: FILE"
            )
        return replace(val, class_names=ours)
    if _are_numbers(ours):
        raise UserError(
            f"data.val: its classes have names ({few(theirs)}), while those of data.train are numbers; "
            "index both with the same --label and --classes, or name them: data.classes: FILE"
        )
    missing, extra = _only(ours, theirs), _only(theirs, ours)
    if extra or (missing and not subset):
        sides = [(missing, "only in data.train"), (extra, "only in data.val")]
        said = "; ".join(f"{len(names):,} {where} ({few(names)})" for names, where in sides if names)
        remedy = "" if extra else "; if that is meant: --eval.classes subset"
        raise UserError(
            f"data.val: its classes are not those of data.train ({val.num_classes:,} and {train.num_classes:,}): "
            f"{said}{remedy}"
        )
    return _renumbered("data.val", val, ours)


def bind_classes(key: str, index: ShardIndex, names: Sequence[str], source: str) -> ShardIndex:
    """`index` with the classes that `source` lists: by name, or by number where they have no names.

    Raises UserError for a class that is not in the list.
    """
    if _are_numbers(index.class_names):
        largest = int(index.samples["label"].max(initial=BAD))
        if largest >= len(names):
            raise UserError(f"{source}: {plural(len(names), 'class')}, and labels of {key} go up to {largest}")
        return replace(index, class_names=tuple(names))
    if extra := _only(index.class_names, names):
        raise UserError(f"{source}: {plural(len(extra), 'class')} of {key} not in it ({few(extra)})")
    return index if index.class_names == tuple(names) else _renumbered(key, index, tuple(names))


def _only(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of `names` that are not among the `others`."""
    known = {canonical(name) for name in others}
    return [name for name in names if canonical(name) not in known]


def _renumbered(key: str, index: ShardIndex, names: tuple[str, ...]) -> ShardIndex:
    numbers = {canonical(name): number for number, name in enumerate(names)}
    found = [numbers[canonical(name)] for name in index.class_names]
    if len(numbers) < len(names) or len(set(found)) < len(found):
        raise UserError(f"{key}: some of its classes share a name, and stand in another order than in data.train")
    table = np.array([*found, BAD], np.int32)  # BAD, -1, selects the last
    samples: Any = index.samples.copy()
    samples["label"] = table[samples["label"]]
    return replace(index, samples=samples, class_names=names)


def numbering_note(train: ShardIndex, val: ShardIndex) -> str | None:
    """A line on what `match_classes` cannot check: numbers cannot be compared with names."""
    if not _are_numbers(val.class_names) or _are_numbers(train.class_names):
        return None
    pairs = ", ".join(f"{number} is {name}" for number, name in enumerate(train.class_names[:2]))
    return f"data.val: its classes have no names, so their numbers are taken as data.train's: {pairs}, ..."
