"""Join the scans of shards to one index: classes get numbers, problems are counted."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dist_trainer.data.index import BAD, Problem, ShardIndex
from dist_trainer.data.texts import Texts
from dist_trainer.errors import UserError, plural

_SHOWN = 20


@dataclass(frozen=True)
class ShardScan:
    """The content of one shard: rows of SAMPLE in file order, its size in bytes, and its problems.

    A row's label is a class number, or -2 - i for the class called names[i], or BAD.
    """

    samples: npt.NDArray[np.void]
    size: int
    stamp: str = ""
    problems: tuple[Problem, ...] = ()
    """Each has a row with the label BAD; `sample` is the number of that row."""
    names: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """For a folder: the file of each row, relative to it."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """For a folder: how many files are no images, by suffix."""


def join(
    names: Sequence[str],
    scans: Sequence[ShardScan],
    class_names: Sequence[str] = (),
    *,
    root: str = ".",
    label_rule: str = "cls",
    allow_bad: int = 0,
    advice: str = "mend the tars",
    left_out: Mapping[str, int] | None = None,
    sources: Iterable[str] | None = None,
) -> ShardIndex:
    """One index of scanned shards, called `names`, relative to `root`.

    Without `class_names`, classes are the sorted names that were found, or just numbers. Raises UserError for more than
    `allow_bad` problems (`advice` says what to do; a line for each of the first 20 follows), for labels beyond
    `class_names`, for a mixture of names and numbers, and when no sample is left.
    """
    if label_rule.startswith("cls") and not class_names and _mostly_numbers(scans):
        scans = [_with_numbers(scan, {}, "is a label that is no class number") for scan in scans]
    class_names = tuple(class_names) or _names_found(scans, root)
    order = {name: number for number, name in enumerate(class_names)}
    if len(order) < len(class_names) and any(scan.names for scan in scans):
        twice = next(name for number, name in enumerate(class_names) if order[name] != number)
        raise UserError(f"{root}: {twice!r} stands twice in the class list; as a label it must be one class")
    scans = [_with_numbers(scan, order) for scan in scans]
    first = np.cumsum([0, *(len(scan.samples) for scan in scans)]).astype(np.uint64)
    problems = [
        replace(problem, shard=name, sample=start + (problem.sample or 0))
        for name, start, scan in zip(names, first.tolist(), scans, strict=False)
        for problem in scan.problems
    ]
    if len(problems) > allow_bad:
        raise refusal(root, problems, allow_bad, advice)
    samples = np.concatenate([scan.samples for scan in scans])
    labels, files = samples["label"], [file for scan in scans for file in scan.files]
    largest = int(labels.max(initial=BAD))
    num_classes = len(class_names) or largest + 1
    if largest == BAD:
        raise UserError(f"{names[0]}: the tars hold no samples")
    if largest >= num_classes:
        raise UserError(
            f"{root}: {int((labels >= num_classes).sum()):,} of {len(labels):,} labels are beyond the class list, "
            f"which has {num_classes:,} classes, and the largest is {largest:,}; give the list of these tars"
        )
    return ShardIndex(
        root=root,
        shards=tuple(names),
        stamps=tuple(scan.stamp for scan in scans),
        sizes=np.array([scan.size for scan in scans], np.uint64),
        first=first,
        samples=samples,
        class_names=class_names or tuple(str(number) for number in range(num_classes)),
        label_rule=label_rule,
        problems=tuple(problems),
        names=Texts.of(files) if files else None,
        sources=Texts.of(sources) if sources is not None else None,
        left_out=sum((Counter(scan.left_out) for scan in scans), Counter(left_out)),
    )


def _mostly_numbers(scans: Sequence[ShardScan]) -> bool:
    """Whether a name in a .cls is a mistake, since most labels are numbers."""
    numbers = sum(int((scan.samples["label"] >= 0).sum()) for scan in scans)
    return numbers > sum(int((scan.samples["label"] < BAD).sum()) for scan in scans)


def _names_found(scans: Sequence[ShardScan], root: str) -> tuple[str, ...]:
    """The sorted class names of all shards; none where labels are numbers."""
    names = tuple(sorted({name for scan in scans for name in scan.names}))
    if names and any((scan.samples["label"] >= 0).any() for scan in scans):
        raise UserError(
            f"{root}: some labels are numbers and some are names, such as {names[0]!r}; give the list of all classes: "
            "--classes FILE, one name per line, in the order of their numbers"
        )
    return names


def _with_numbers(scan: ShardScan, order: dict[str, int], what: str = "is not in the class list") -> ShardScan:
    """Class names become numbers; a name that is not in `order` becomes a problem."""
    rows = np.flatnonzero(scan.samples["label"] < BAD)
    if not len(rows):
        return scan
    samples = scan.samples.copy()
    names = BAD - 1 - samples["label"][rows]
    numbers = np.array([order.get(name, BAD) for name in scan.names], np.int32)[names]
    samples["label"][rows] = numbers
    unknown = np.flatnonzero(numbers == BAD).tolist()
    more = tuple(
        Problem("", int(samples["offset"][rows[i]]), f"{scan.names[names[i]]!r} {what}", int(rows[i])) for i in unknown
    )
    for name in ("length", "crc32", "width", "height"):
        samples[name][rows[unknown]] = 0
    return replace(scan, samples=samples, problems=scan.problems + more, names=scan.names if order else ())


def refusal(root: str, problems: Sequence[Problem], allow_bad: int, advice: str) -> UserError:
    """Its first line says how many problems there are and what to do; the first 20 follow, one line each."""

    def lines() -> Iterator[str]:
        shards = len({problem.shard for problem in problems})
        number = f"{len(problems):,} problems" if len(problems) > 1 else "a problem"
        allowed = f", where {allow_bad:,} may be bad" if allow_bad else ""
        yield f"{root}: {number} in {plural(shards, 'shard')}{allowed}; {advice}"
        yield from (f"  {problem}" for problem in problems[:_SHOWN])
        if len(problems) > _SHOWN:
            yield f"  and {len(problems) - _SHOWN:,} more"

    return UserError("\n".join(lines()))
