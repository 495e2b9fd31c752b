"""Whether an index still fits its shards: names, sizes, and content if a modification time or ETag differs."""

import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from dist_trainer.data.index import BAD, ShardIndex
from dist_trainer.data.listing import LISTING
from dist_trainer.errors import UserError, plural
from dist_trainer.shards.build import ShardSet, sizes_and_stamps, stat_all
from dist_trainer.shards.image_folder import file_names, stamp_of, what_changed
from dist_trainer.shards.labels import LabelRule
from dist_trainer.storage.retry import concurrently
from dist_trainer.storage.storage import Storage, is_remote

_RECHECKED = 64  # samples of a shard whose stamp changed
_AT_ONCE = 32  # requests under way


def check_shards(index: ShardIndex, path: Path, shards: ShardSet | None) -> None:
    """Check that a location still names the shards of the index. Raises UserError naming one that differs."""
    if shards is None:
        return
    known = _locations(index)
    new = sorted(set(shards.locations) - set(known))
    if new:
        raise UserError(
            f"{new[0]}: not in {path}, which is older; delete that to index again, "
            "or name the tars that you mean by a brace pattern"
        )
    if is_remote(shards.root) and len(known) > len(shards.names):
        gone = sorted(set(known) - set(shards.locations))
        raise UserError(
            f"{gone[0]}: is in the index at {shards.root}, but not among the tars that are named; "
            "name that index, or make one of your tars: dist-trainer shards index URL... --out train.dtx"
        )


def check_content(index: ShardIndex, path: Path, storage: Storage) -> str:
    """Compare sizes and stamps, and content where a stamp changed. New stamps are saved in `path` if it is
    writable.

    Returns a line for the user, or "". Raises UserError naming a shard that is missing or not what was indexed.
    """
    is_folder = index.names is not None
    stamps = _folder_stamps(index, path) if is_folder else _tar_stamps(index, path, storage)
    changed = sum(old != new for old, new in zip(index.stamps, stamps, strict=True))
    if not changed:
        return ""
    with suppress(OSError):  # then they are compared again next time
        replace(index, stamps=tuple(stamps)).save(path)
    what = plural(changed, "class folder" if is_folder else "tar")
    return f"{what}: another time of change than {path} says, and the same content"


def _locations(index: ShardIndex) -> list[str]:
    return [index.shard_path(number) for number in range(len(index.shards))]


def _mend(path: Path) -> str:
    return f"restore it, or delete {path} to index again"


def _tar_stamps(index: ShardIndex, path: Path, storage: Storage) -> list[str]:
    """The tars' current stamps. For each that changed, 64 checksums are compared."""
    locations, stamps = _locations(index), []
    for location, stat, size in zip(locations, stat_all(locations, storage), index.sizes.tolist(), strict=True):
        if stat is None:
            raise UserError(f"{location}: missing, though {path} lists it; {_mend(path)}")
        if stat.size != size:
            raise UserError(f"{location}: {stat.size} bytes, but {path} says {size}; {_mend(path)}")
        stamps.append(stat.stamp)
    changed = [number for number, stamp in enumerate(stamps) if stamp != index.stamps[number]]

    def same(sample: int) -> bool:
        location, row = locations[int(index.shard_of(np.array([sample]))[0])], index.samples[sample]
        try:
            data = storage.read(location, int(row["offset"]), int(row["length"]))
        except OSError as error:
            raise UserError(f"{location}: {error.strerror or error}") from None
        return zlib.crc32(data) == int(row["crc32"])

    probes = [sample for number in changed for sample in _spread(index, number)]
    for sample, agrees in zip(probes, concurrently(same, probes, _AT_ONCE) if probes else [], strict=True):
        if not agrees:
            raise UserError(f"{index.describe(sample)}: the bytes are not those that were indexed; {_mend(path)}")
    return stamps


def _spread(index: ShardIndex, shard: int) -> list[int]:
    """Up to 64 good samples, spread over a shard."""
    first, stop = int(index.first[shard]), int(index.first[shard + 1])
    good = first + np.flatnonzero(index.samples["label"][first:stop] != BAD)
    chosen = np.linspace(0, len(good) - 1, min(_RECHECKED, len(good))).astype(np.int64)
    return [int(sample) for sample in good[chosen]]


def _folder_stamps(index: ShardIndex, path: Path) -> list[str]:
    """The class folders' current stamps. A changed file of the same size is detected when it is read."""
    stamps = []
    for shard, folder in enumerate(_locations(index)):
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: missing, though {path} lists it; {_mend(path)}")
        try:
            stamp = stamp_of(folder, file_names(index, shard))
        except FileNotFoundError:
            stamp = ""  # a folder inside is gone
        if stamp != index.stamps[shard] and (what := what_changed(index, shard)):
            raise UserError(f"{folder}: {what}; {_mend(path)}")
        stamps.append(stamp)
    return stamps


def is_current(
    path: Path, shards: ShardSet, rule: LabelRule, class_names: Sequence[str], allow_bad: int, storage: Storage
) -> bool:
    """Whether `path` equals a new index: the same shards, unchanged, with the same label rule."""
    if not path.is_file():
        return False
    try:
        index = ShardIndex.load(path)
    except UserError:
        return False
    stats = sizes_and_stamps(shards, storage)
    return (
        _locations(index) == shards.locations
        and (index.names is not None) == shards.is_folder
        and (not shards.is_folder or index.listing == LISTING)
        and index.label_rule == rule.text
        and len(index.problems) <= allow_bad
        and (not class_names or index.class_names == tuple(class_names))
        and index.stamps == tuple(stat.stamp for stat in stats)
        and (shards.is_folder or index.sizes.tolist() == [stat.size for stat in stats])
    )
