"""Write WebDataset tars and their index from an image folder or a torchvision data set."""

import inspect
import io
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torchvision.datasets
import webdataset

from dist_trainer.data.index import FILE_NAME
from dist_trainer.data.scan import IMAGE_SUFFIXES, LABEL_SUFFIX, ShardScan, join, scan_tar
from dist_trainer.errors import UserError, nearest
from dist_trainer.keyed import permutation


class Source(Protocol):
    """Labelled images by number: encoded bytes, their suffix, and the class."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, item: int) -> tuple[bytes, str, int]: ...


class FolderSource:
    """`root`/CLASS/*.jpg: class numbers follow the sorted class names; files are taken over byte for byte."""

    def __init__(self, root: Path) -> None:
        self.class_names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
        self._files = [
            (path, label)
            for label, name in enumerate(self.class_names)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES
        ]
        if not self._files:
            raise UserError(f"{root}: no images ({', '.join(IMAGE_SUFFIXES)}) in class folders")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, item: int) -> tuple[bytes, str, int]:
        path, label = self._files[item]
        return path.read_bytes(), path.suffix.lower().lstrip("."), label


class TorchvisionSource:
    """A split of a torchvision classification data set, its images encoded as PNG (lossless)."""

    def __init__(self, name: str, root: Path, split: str) -> None:
        known = [n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n))]
        if name not in known:
            raise UserError(f"torchvision/{name}: no such data set{nearest(name, known)}")
        factory = getattr(torchvision.datasets, name)
        accepts = inspect.signature(factory).parameters
        selection: dict[str, Any] = {"train": split == "train"} if "train" in accepts else {"split": split}
        try:
            try:
                self._data = factory(str(root), **selection)
            except RuntimeError:  # not there yet: torchvision's own word for it
                self._data = factory(str(root), **selection, download=True)
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise UserError(f"torchvision/{name}, split {split!r}, in {root}: {error}") from None
        self.class_names = tuple(str(c) for c in getattr(self._data, "classes", ()))

    def __len__(self) -> int:
        return len(self._data)

    def read(self, item: int) -> tuple[bytes, str, int]:
        image, label = self._data[item]
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue(), "png", int(label)


@dataclass(frozen=True)
class _Shard:
    number: int
    items: list[int]
    path: Path


_source: Source  # of this worker process: a torchvision source is large, so it travels once and not with every shard


def _init_worker(source: Source) -> None:
    global _source  # noqa: PLW0603
    _source = source


def _write_shard(shard: _Shard) -> ShardScan:
    with webdataset.ShardWriter(
        str(shard.path.with_name("%06d.tar")),
        maxcount=len(shard.items) + 1,
        maxsize=1 << 62,
        start_shard=shard.number,
        verbose=0,
        mtime=0.0,
    ) as writer:
        for item in shard.items:
            data, suffix, label = _source.read(item)
            writer.write({"__key__": f"{item:08d}", suffix: data, LABEL_SUFFIX: str(label).encode()})
    return scan_tar(shard.path)


def pack(source: Source, out: Path, *, samples_per_shard: int, seed: int, num_processes: int) -> Iterator[int]:
    """Write `source` into `out`/000000.tar ... and `out`/index.dtx, shuffled with `seed`; yields samples done.

    `out` appears when it is whole. Raises UserError when it exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists; remove it, or name another folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    order = permutation(len(source), seed)
    shards = [
        _Shard(number, [int(i) for i in order[start : start + samples_per_shard]], partial / f"{number:06d}.tar")
        for number, start in enumerate(range(0, len(source), samples_per_shard))
    ]
    scans: list[ShardScan] = []
    with ProcessPoolExecutor(
        num_processes, mp_context=get_context("spawn"), initializer=_init_worker, initargs=(source,)
    ) as pool:
        for shard, scan in zip(shards, pool.map(_write_shard, shards), strict=True):
            scans.append(scan)
            yield len(shard.items)
    join([shard.path.name for shard in shards], scans, source.class_names).save(partial / FILE_NAME)
    partial.replace(out)


def find_splits(source: str, root: Path | None) -> dict[str, Source]:
    """{"train": ..., "val": ...} of `torchvision/NAME` or of a folder with train/ and val/ (or of class folders)."""
    if source.startswith("torchvision/"):
        name = source.removeprefix("torchvision/")
        if root is None:
            raise UserError(f"{source}: --root must say where its files are, or where to download them to")
        factory = getattr(torchvision.datasets, name, None)
        has_val = factory is not None and "train" not in inspect.signature(factory).parameters
        return {
            "train": TorchvisionSource(name, root, "train"),
            "val": TorchvisionSource(name, root, "val" if has_val else "test"),
        }
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder; give one with class folders, or torchvision/NAME")
    splits = {name: folder / name for name in ("train", "val") if (folder / name).is_dir()} or {"train": folder}
    return {name: FolderSource(path) for name, path in splits.items()}
