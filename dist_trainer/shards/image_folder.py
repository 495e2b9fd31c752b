"""A folder of class folders with images, read in place: a shard is a class folder, a sample is a file."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dist_trainer.data.index import BAD, Problem, ShardIndex
from dist_trainer.data.listing import LISTING, SUFFIXES_TEXT, class_folders, images_of_listing_1, list_images
from dist_trainer.errors import UserError, plural
from dist_trainer.shards.join import ShardScan
from dist_trainer.shards.scan import measure, rows


def holds_images(root: Path) -> bool:
    """Whether some class folder holds an image directly, not only in subfolders."""
    return any(list_images(root / name, below=False).images for name in class_folders(root))


def stamp_of(folder: str, files: Iterable[str]) -> str:
    """A stamp that changes when a file is added, removed or renamed in a folder that holds one of `files`."""
    folders = sorted({"", *(file.rpartition("/")[0] for file in files)})
    times = [(inside, Path(folder, inside).stat().st_mtime_ns) for inside in folders]
    return hashlib.sha256(json.dumps(times).encode()).hexdigest()[:16]


def scan_folder(folder: str, *, allow_empty: bool = False) -> ShardScan:
    """Read every image of a class folder; its label is the folder's name. A file that is not an image becomes a
    Problem.

    Raises UserError for a folder without images, which is no class, unless `allow_empty`.
    """
    listing = list_images(Path(folder))
    files = listing.images
    if not files and not allow_empty:
        raise UserError(f"{folder}: no images ({SUFFIXES_TEXT}) in it, so it is no class; move it elsewhere")
    stamp, size = stamp_of(folder, files), 0
    values: list[tuple[int, ...]] = []
    problems = []
    for file in files:
        try:
            data = Path(folder, file).read_bytes()
            size += len(data)
            crc32, width, height = measure(data)
            values.append((0, len(data), BAD - 1, crc32, width, height))
        except ValueError as error:
            problems.append(Problem(folder, 0, f"{file}: it {error}", len(values)))
            values.append((0, 0, BAD, 0, 0, 0))
    return ShardScan(
        rows(values), size, stamp, tuple(problems), (Path(folder).name,), tuple(files), dict(listing.left_out)
    )


def file_names(index: ShardIndex, shard: int) -> list[str]:
    """The files of one class folder, in the order of its samples."""
    assert index.names is not None
    return [index.names[sample] for sample in range(int(index.first[shard]), int(index.first[shard + 1]))]


def what_changed(index: ShardIndex, shard: int) -> str:
    """How a class folder differs from the index; "" if it does not.

    A changed file is detected here by its size, and by its checksum when it is read.
    """
    folder, known = index.shard_path(shard), file_names(index, shard)
    there = set(list_images(Path(folder)).images if index.listing == LISTING else images_of_listing_1(Path(folder)))
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
