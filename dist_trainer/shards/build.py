"""Build the index of many shards in parallel. Resumable: a killed build continues with the missing shards."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dist_trainer.data.index import BAD, VERSION, ShardIndex
from dist_trainer.data.listing import LISTING, left_out_above, list_images
from dist_trainer.data.parallel import in_processes, progress
from dist_trainer.data.texts import Texts
from dist_trainer.errors import Outage, UserError, plural
from dist_trainer.shards.image_folder import file_names, scan_folder, stamp_of
from dist_trainer.shards.join import ShardScan, join, refusal
from dist_trainer.shards.labels import LabelRule
from dist_trainer.shards.scan import scan_shard
from dist_trainer.storage.retry import concurrently
from dist_trainer.storage.storage import Stat, Storage, is_remote

_FEW_BYTES, _FEW_FILES = 2**31, 20_000  # faster to read than to start processes
_AT_ONCE = 32  # requests for sizes under way


@dataclass(frozen=True)
class ShardSet:
    """Shards by their names, relative to `root`, a local folder or URL; of an image folder they are class folders."""

    root: str
    names: tuple[str, ...]
    is_folder: bool = False

    @property
    def locations(self) -> list[str]:
        return [name if "://" in name else f"{self.root}/{name}" for name in self.names]


@dataclass(frozen=True)
class _Task:
    """One shard to scan, and the file that keeps the result."""

    location: str
    rule: LabelRule
    is_folder: bool
    allow_empty: bool
    part: Path


def _run(task: _Task, options: Mapping[str, Any] | None) -> ShardScan:
    if task.is_folder:
        scan = scan_folder(task.location, allow_empty=task.allow_empty)
    else:
        scan = scan_shard(task.location, Storage(options), task.rule)
    with suppress(OSError):  # the build works without it
        _save_part(task.part, scan)
    return scan


def _save_part(path: Path, scan: ShardScan) -> None:
    ShardIndex(
        root="",
        shards=(path.name,),
        stamps=(scan.stamp,),
        sizes=np.array([scan.size], np.uint64),
        first=np.array([0, len(scan.samples)], np.uint64),
        samples=scan.samples,
        class_names=scan.names,
        problems=scan.problems,
        names=Texts.of(scan.files) if scan.files else None,
        left_out=scan.left_out,
    ).save(path)


def _load_part(path: Path) -> ShardScan | None:
    """The result of an earlier build; None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        part = ShardIndex.load(path)
    except UserError:
        return None
    files = tuple(file_names(part, 0)) if part.names is not None else ()
    return ShardScan(
        part.samples, int(part.sizes[0]), part.stamps[0], part.problems, part.class_names, files, part.left_out
    )


def stat_all(locations: Sequence[str], storage: Storage) -> list[Stat | None]:
    """Size and stamp of each file, asked for together; None where there is nothing."""

    def stat(location: str) -> Stat | None:
        try:
            return storage.stat(location)
        except FileNotFoundError:
            return None

    try:
        return concurrently(stat, locations, _AT_ONCE)
    except OSError as error:
        raise UserError(f"{error.filename or locations[0]}: {error.strerror or error}") from None


def sizes_and_stamps(shards: ShardSet, storage: Storage) -> list[Stat]:
    """Bytes of each tar, or images of each class folder. Raises UserError naming the first shard that is missing."""
    if shards.is_folder:
        files = [list_images(Path(location)).images for location in shards.locations]
        return [
            Stat(len(names), stamp_of(location, names)) for location, names in zip(shards.locations, files, strict=True)
        ]
    stats = stat_all(shards.locations, storage)
    missing = [location for location, stat in zip(shards.locations, stats, strict=True) if stat is None]
    if missing:
        rest = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: no such tar{rest}")
    return [stat for stat in stats if stat is not None]


def build_index(
    shards: ShardSet,
    out: Path,
    *,
    rule: LabelRule,
    class_names: Sequence[str] = (),
    allow_bad: int = 0,
    allow_empty: bool = False,
    options: Mapping[str, Any] | None = None,
    num_processes: int = 1,
    advice: str = "mend the tars",
    say: Callable[[str], None] = lambda line: None,
) -> ShardIndex:
    """Scan `shards` and write their index to `out`.

    Results are kept in `.NAME.parts` beside `out` until the index is complete, by name, size and stamp of each shard.
    Raises UserError for missing and unreadable shards, and for too many bad samples (see `join`).
    """
    stats = sizes_and_stamps(shards, Storage(options))
    if is_remote(shards.root):
        size = sum(stat.size for stat in stats) / 1e9
        say(f"{plural(len(stats), 'shard')}, {size:,.2f} GB, to be read from {shards.root}")
    parts = out.with_name(f".{out.name}.parts")
    tasks = [
        _Task(location, rule, shards.is_folder, allow_empty, parts / _part_name(location, stat, rule))
        for location, stat in zip(shards.locations, stats, strict=True)
    ]
    try:
        parts.mkdir(exist_ok=True)
        scans = _scan_all(tasks, [stat.size for stat in stats], shards, allow_bad, options, num_processes, advice, say)
        index = join(
            shards.names,
            scans,
            class_names,
            root=shards.root,
            label_rule=rule.text,
            allow_bad=allow_bad,
            advice=advice,
            left_out=left_out_above(Path(shards.root)) if shards.is_folder else {},
        )
        index.save(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from None
    shutil.rmtree(parts, ignore_errors=True)
    return index


def _part_name(location: str, stat: Stat, rule: LabelRule) -> str:
    what = json.dumps([VERSION, LISTING, location, stat.size, stat.stamp, rule.text])
    return f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.part"


def _scan_all(
    tasks: Sequence[_Task],
    sizes: Sequence[int],
    shards: ShardSet,
    allow_bad: int,
    options: Mapping[str, Any] | None,
    num_processes: int,
    advice: str,
    say: Callable[[str], None],
) -> list[ShardScan]:
    """The scan of every task, in order: kept results are reused, the others are scanned."""
    scans = {number: scan for number, task in enumerate(tasks) if (scan := _load_part(task.part)) is not None}
    if scans:
        say(f"{len(scans):,} of {plural(len(tasks), 'shard')} done already")
    todo = [number for number in range(len(tasks)) if number not in scans]
    weight = sum(sizes[number] for number in todo)
    few = _FEW_FILES if shards.is_folder else _FEW_BYTES
    work = partial(_run, options=options)
    results = in_processes(work, [tasks[number] for number in todo], num_processes if weight >= few else 1)
    with closing(results), progress("indexing", weight, in_bytes=not shards.is_folder, say=say) as advance:
        try:
            for number, scan in results:
                scans[todo[number]] = scan
                if len(scan.problems) > max(allow_bad, 1) and (scan.samples["label"] == BAD).all():
                    # With a wrong --label, do not read all shards.
                    hopeless = f"a shard without a good sample; {advice}"
                    raise refusal(shards.root, scan.problems, allow_bad, hopeless)
                advance(sizes[todo[number]])
        except Outage as error:
            done = f"{len(scans):,} of {plural(len(tasks), 'shard')} done, and the same command continues from there"
            raise UserError(f"{error}; {done}") from None
    return [scans[number] for number in range(len(tasks))]
