"""A folder of class folders with images, read in place: a shard is a class folder, a sample is a file."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path

from dist_trainer.data.index import BAD, Problem, ShardIndex
from dist_trainer.errors import UserError, plural
from dist_trainer.shards.join import ShardScan
from dist_trainer.shards.scan import IMAGE_SUFFIXES, measure, rows


def class_folders(root: Path) -> list[str]:
    """Sorted names of the folders in `root`, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def is_image(name: str) -> bool:
    return Path(name).suffix.lower().lstrip(".") in IMAGE_SUFFIXES


def holds_images(root: Path) -> bool:
    """Whether some class folder holds an image directly, not only in subfolders."""
    return any(is_image(entry.name) for name in class_folders(root) for entry in os.scandir(root / name))


def images_below(folder: str) -> list[str]:
    """Sorted paths of the images in `folder` and below, relative to it, with / between folders."""
    found = []
    for path, _, files in os.walk(folder, followlinks=True):
        inside = os.path.relpath(path, folder).replace(os.sep, "/") + "/"
        found += [f"{'' if inside == './' else inside}{name}" for name in files if is_image(name)]
    return sorted(found)


def stamp_of(folder: str, files: Iterable[str]) -> str:
    """A stamp that changes when a file is added, removed or renamed in a folder that holds one of `files`."""
    folders = sorted({"", *(file.rpartition("/")[0] for file in files)})
    times = [(inside, Path(folder, inside).stat().st_mtime_ns) for inside in folders]
    return hashlib.sha256(json.dumps(times).encode()).hexdigest()[:16]


def scan_folder(folder: str) -> ShardScan:
    """Read every image of a class folder; its label is the folder's name. A file that is not an image becomes a
    Problem.

    Raises UserError for a folder without images, which is no class.
    """
    files = images_below(folder)
    if not files:
        raise UserError(
            f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it, so it is no class; move it elsewhere"
        )
    stamp, size = stamp_of(folder, files), 0
    values: list[tuple[int, ...]] = []
    problems = []
    for file in files:
        try:
            file.encode()
            data = Path(folder, file).read_bytes()
            size += len(data)
            crc32, width, height = measure(data)
            values.append((0, len(data), BAD - 1, crc32, width, height))
        except UnicodeEncodeError:
            raise UserError(f"{folder}: the name of {file!r} is not UTF-8; rename it") from None
        except ValueError as error:
            problems.append(Problem(folder, 0, f"{file}: it {error}", len(values)))
            values.append((0, 0, BAD, 0, 0, 0))
    return ShardScan(rows(values), size, stamp, tuple(problems), (Path(folder).name,), tuple(files))


def file_names(index: ShardIndex, shard: int) -> list[str]:
    """The files of one class folder, in the order of its samples."""
    assert index.names is not None
    assert index.name_ends is not None
    first, stop = int(index.first[shard]), int(index.first[shard + 1])
    start = int(index.name_ends[first - 1]) if first else 0
    ends = [start, *index.name_ends[first:stop].tolist()]
    return [index.names[a:b].tobytes().decode() for a, b in itertools.pairwise(ends)]


def what_changed(index: ShardIndex, shard: int) -> str:
    """How a class folder differs from the index; "" if it does not.

    A changed file is detected here by its size, and by its checksum when it is read.
    """
    folder, known = index.shard_path(shard), file_names(index, shard)
    there = set(images_below(folder))
    if added := sorted(there - set(known)):
        return f"{plural(len(added), 'new file')}, such as {added[0]}"
    if gone := sorted(set(known) - there):
        return f"{plural(len(gone), 'file')} gone, such as {gone[0]}"
    lengths = index.samples["length"][int(index.first[shard]) : int(index.first[shard + 1])].tolist()
    for file, length in zip(known, lengths, strict=True):
        size = Path(folder, file).stat().st_size
        if length and size != length:  # bad ones have length 0
            return f"{file} has {size:,} bytes, and had {length:,}"
    return ""
