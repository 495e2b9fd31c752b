"""Compare shards with their index, and list bad samples."""

import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dist_trainer.data.index import BAD, ShardIndex
from dist_trainer.data.parallel import in_processes, progress
from dist_trainer.shards.tar import BLOCK
from dist_trainer.storage.storage import Storage

Level = Literal["headers", "crc", "decode"]
_FEW = {"headers": 100_000, "crc": 20_000, "decode": 1000}  # faster to check than to start processes


@dataclass(frozen=True)
class Finding:
    """What is wrong with sample `sample` of the index, or with a whole shard if that is None."""

    shard: str
    sample: int | None
    offset: int
    class_name: str
    reason: str
    source: str | None = None
    """The name that its file had before it was packed."""

    def __str__(self) -> str:
        if self.sample is None:
            return f"{self.shard}: {self.reason}"
        what = f"class {self.class_name!r}" + (f", {self.source}" if self.source else "")
        return f"{self.shard}: sample {self.sample} at byte {self.offset}, {what}: {self.reason}"


@dataclass(frozen=True)
class _Work:
    """Sent to every process, where the index maps its file."""

    index: ShardIndex
    level: Level
    options: Mapping[str, Any] | None

    def __call__(self, shard: int) -> list[Finding]:
        if self.level == "decode":
            import torch

            torch.set_num_threads(1)  # the processes share the cores already
        return list(_check_shard(self.index, shard, self.level, Storage(self.options)))


def check_index(
    index: ShardIndex,
    level: Level,
    *,
    options: Mapping[str, Any] | None = None,
    num_processes: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[Finding]:
    """Every sample that differs from `index`, in order.

    headers: shards are there and have their size, and where the index has an image the tar has the header of one; crc:
    its bytes too; decode: it decodes, to the width and height of the index. Samples that were bad when they were
    indexed are skipped.
    """
    counts = index.counts.tolist()
    found: dict[int, list[Finding]] = {}
    processes = num_processes if len(index) >= _FEW[level] else 1
    results = in_processes(_Work(index, level, options), range(len(index.shards)), processes)
    with closing(results), progress(f"checking {level}", len(index), in_bytes=False, say=say) as advance:
        for shard, bad in results:
            found[shard] = bad
            advance(counts[shard])
    return [bad for shard in sorted(found) for bad in found[shard]]


def _check_shard(index: ShardIndex, shard: int, level: Level, storage: Storage) -> Iterator[Finding]:
    location = index.shard_path(shard)
    is_tar = index.names is None
    with ExitStack() as stack:
        try:
            size = storage.stat(location).size
            tar = stack.enter_context(storage.open(location)) if is_tar else None
        except OSError as error:
            yield Finding(location, None, 0, "", error.strerror or str(error))
            return
        if is_tar and size != int(index.sizes[shard]):
            yield Finding(location, None, 0, "", f"{size} bytes, but the index says {int(index.sizes[shard])}")
        for sample in range(int(index.first[shard]), int(index.first[shard + 1])):
            row = index.samples[sample]
            label, offset = int(row["label"]), int(row["offset"])
            if label == BAD:
                continue
            name = index.class_names[label] if 0 <= label < index.num_classes else f"number {label}"
            try:
                if not 0 <= label < index.num_classes:
                    raise ValueError(f"label {label}, but the index has {index.num_classes} classes")
                data = _read_tar(tar, row, level) if tar else _read_file(index.file_of(sample, shard), row, level)
                if level != "headers":
                    _check_content(data, row, level)
            except (ValueError, OSError) as error:
                reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                yield Finding(index.file_of(sample, shard), sample, offset, name, reason, index.source_of(sample))


def _read_tar(tar: BinaryIO, row: Any, level: Level) -> bytes:
    """The bytes of an image, or none for `headers`. Raises ValueError when there is no header of it before them."""
    offset, length = int(row["offset"]), int(row["length"])
    tar.seek(offset - BLOCK)
    data = tar.read(BLOCK if level == "headers" else BLOCK + length)
    try:
        info = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise ValueError("no tar header before it") from None
    if not info.isreg() or not info.name:
        raise ValueError(f"the tar header before it is that of {info.name!r}, no file")
    if info.size != length:
        raise ValueError(f"the tar header before it says {info.size} bytes, the index {length}")
    return data[BLOCK:]


def _read_file(file: str, row: Any, level: Level) -> bytes:
    path, length = Path(file), int(row["length"])
    size = path.stat().st_size
    if size != length:
        raise ValueError(f"{size} bytes, but the index says {length}")
    return b"" if level == "headers" else path.read_bytes()


def _check_content(data: bytes, row: Any, level: Level) -> None:
    """Raises ValueError for bytes that were not indexed, and for an image that does not decode."""
    if len(data) != int(row["length"]):
        raise ValueError(f"cut short: {len(data)} of {int(row['length'])} bytes are there")
    if zlib.crc32(data) != int(row["crc32"]):
        raise ValueError("its bytes are not those that were indexed")
    if level == "decode":
        from dist_trainer.data.decode import decode

        _, height, width = decode(data, 3).shape
        if (width, height) != (int(row["width"]), int(row["height"])):
            raise ValueError(f"it decodes to {width} x {height}, but its header says {row['width']} x {row['height']}")
