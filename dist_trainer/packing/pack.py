"""Write WebDataset tars and their index, in parallel. Resumable. The output appears only when it is complete."""

import contextlib
import fcntl
import io
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset
from PIL import Image

from dist_trainer.data.index import FILE_NAME, SAMPLE
from dist_trainer.distributed.processes import die_with_parent
from dist_trainer.draws import permutation
from dist_trainer.errors import UserError, plural
from dist_trainer.packing.sources import Source
from dist_trainer.shards.classes import CLASSES_FILE
from dist_trainer.shards.scan import LABEL_SUFFIX, ShardScan, join, scan_tar

MANIFEST = "pack.json"
_LOCK = "lock"
_SOURCE = "source.pickle"
_UNFINISHED = ".part"
_MAX_SIDE = np.iinfo(SAMPLE["width"]).max  # pixels


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How images become tars. Source and recipe determine every byte of the tars."""

    samples_per_shard: int = 2048
    seed: int = 0
    """Of the shuffle over shards."""
    max_side: int | None = None
    """Pixels: an image with a longer side is reduced and encoded as JPEG; others are copied byte for byte."""
    quality: int = 95
    """Of the JPEGs that `max_side` makes."""

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "max_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: {value} is not positive")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality: {self.quality} is not between 1 and 100")

    def manifest(self, source: Source) -> dict[str, Any]:
        """The content of pack.json. Equal manifests mean equal tars, byte for byte."""
        facts = {"version": 1, **source.facts, "samples": len(source), **asdict(self)}
        return {**facts, "class_names": list(source.class_names)}


@dataclass(frozen=True)
class _Shard:
    number: int
    path: Path
    items: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Writer:
    """Writes shards of one source; every worker process reads it once."""

    source: Source
    recipe: Recipe

    def write(self, shard: _Shard) -> ShardScan:
        """The scan of `shard`, which is written first unless it exists, under another name until it is complete."""
        if shard.path.exists():
            return scan_tar(shard.path)
        unfinished = shard.path.with_name(shard.path.name + _UNFINISHED)
        try:
            with unfinished.open("wb") as file:
                self._write_to(file, shard)
                file.flush()
                os.fsync(file.fileno())  # a full disk is detected here at the latest, on NFS too
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise UserError(f"{shard.path}: {error.strerror or error}; {_GO_ON}") from None
        try:
            scan = scan_tar(unfinished)
        except UserError:
            self._blame(shard)
            raise
        unfinished.replace(shard.path)
        return scan

    def _write_to(self, file: io.BufferedWriter, shard: _Shard) -> None:
        with webdataset.ShardWriter(
            "%06d.tar",
            opener=lambda name: file,
            start_shard=shard.number,
            maxcount=len(shard.items) + 1,
            maxsize=1 << 62,
            verbose=0,
            mtime=0.0,
        ) as writer:
            for item in shard.items.tolist():
                data, suffix, label = self.source.read(item)
                if self.recipe.max_side is not None:
                    data, suffix = shrink(
                        data, suffix, self.recipe.max_side, self.recipe.quality, self.source.name(item)
                    )
                writer.write({"__key__": f"{item:08d}", suffix: data, LABEL_SUFFIX: str(label).encode()})

    def _blame(self, shard: _Shard) -> None:
        """Raises UserError that names the image for which the scan refused the shard; the scan knows only its byte."""
        for item in shard.items.tolist():
            name = self.source.name(item)
            width, height = _size(self.source.read(item)[0], name)
            if max(width, height) > _MAX_SIDE:
                raise UserError(f"{name}: {width:,} x {height:,} pixels; an index holds {_MAX_SIDE:,} a side at most")


_GO_ON = "finished tars stay, and the same command continues from there"


def _size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) from an image's header. Raises UserError naming it when there is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as error:  # Pillow's plugins raise whatever they meet
        found = f"{len(data):,} bytes, {data[:16]!r}" if data else "empty"
        kind = "" if isinstance(error, OSError) else f" ({error})"
        raise UserError(f"{name}: not a readable image{kind}: {found}; repair or remove it") from None


def shrink(data: bytes, suffix: str, max_side: int, quality: int, name: str) -> tuple[bytes, str]:
    """The image with `max_side` pixels on its longer side, or unchanged if it is not longer.

    Decoded as the trainer decodes, made smaller by Pillow's LANCZOS filter (antialiased), encoded as RGB JPEG without
    EXIF, whatever it was before; its orientation is not applied. Raises UserError naming an image that does not decode.
    """
    width, height = _size(data, name)
    longer = max(width, height)
    if longer <= max_side:
        return data, suffix
    from dist_trainer.data.decode import decode

    try:
        pixels = decode(data, 3).permute(1, 2, 0).numpy()
    except ValueError as error:
        raise UserError(f"{name}: {error}; repair or remove it") from None
    size = [max(1, round(side * max_side / longer)) for side in (width, height)]
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), "jpg"


_writer: _Writer  # of this worker process


def _init_worker(writer: Path) -> None:
    global _writer  # noqa: PLW0603
    die_with_parent(signal.SIGKILL)
    _writer = pickle.loads(writer.read_bytes())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on Ctrl-C ends it at once, without a traceback


def _write(shard: _Shard) -> ShardScan:
    return _writer.write(shard)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that start here do not die of Ctrl-C, which reaches the whole group, with a traceback of imports."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write_all(writer: _Writer, shards: Sequence[_Shard], num_processes: int) -> Iterator[ShardScan]:
    """The shards' scans, in order; in this process when one is enough."""
    num_processes = min(num_processes, len(shards))
    if num_processes <= 1:
        yield from map(writer.write, shards)
        return
    # By a file: the arguments of a new process go through a pipe. A large source fills it until the process has
    # imported everything, so processes would start one after the other.
    file = shards[0].path.with_name(_SOURCE)
    file.write_bytes(pickle.dumps(writer))
    with ProcessPoolExecutor(
        num_processes, mp_context=get_context("spawn"), initializer=_init_worker, initargs=(file,)
    ) as pool:
        try:
            with _deaf_to_interrupts():
                scans = pool.map(_write, shards)
            yield from scans
        except BrokenProcessPool:
            raise UserError(f"a worker process was killed, maybe for lack of memory; {_GO_ON}") from None
        finally:
            pool.shutdown(cancel_futures=True)
    file.unlink()


def partial_folder(out: Path) -> Path:
    """The folder of `out`'s tars until all are written."""
    return out.with_name(f".{out.name}.partial")


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Claim the folder for this process, until it ends or dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process packs into it; wait for that one, or end it") from None
        except OSError:
            pass  # Lustre may be mounted without locks
        yield


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest


def _begin(folder: Path, manifest: dict[str, Any], say: Callable[[str], None]) -> None:
    """Keep in `folder` only the finished tars of the same manifest."""
    before = _read_manifest(folder)
    keep = {_LOCK}
    if before == manifest:
        finished = [path.name for path in folder.glob("*.tar")]
        keep |= {MANIFEST, *finished}
        say(f"{folder}: continues, {plural(len(finished), 'tar')} there")
    elif before is not None:
        other = ", ".join(key for key in manifest if before.get(key) != manifest[key])
        say(f"{folder}: starts over: the unfinished tars had another {other}")
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()
    if before != manifest:
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def pack(
    source: Source,
    out: Path,
    recipe: Recipe,
    *,
    num_processes: int,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[int]:
    """Write `source` into `out`/000000.tar ... and `out`/index.dtx, shuffled; yields samples done, shard by shard.

    `out` appears when it is complete, with pack.json (source and recipe) and classes.txt. After a kill, the same call
    writes the missing tars. Raises UserError if `out` exists, for a file that is not an image, and for errors of the
    file system.
    """
    if out.exists():
        raise UserError(f"{out}: exists; remove it, or name another folder")
    folder = partial_folder(out)
    order = permutation(len(source), recipe.seed)
    shards = [
        _Shard(number, folder / f"{number:06d}.tar", order[start : start + recipe.samples_per_shard])
        for number, start in enumerate(range(0, len(source), recipe.samples_per_shard))
    ]
    scans: list[ShardScan] = []
    try:
        with _claimed(folder):
            _begin(folder, recipe.manifest(source), say)
            for shard, scan in zip(shards, _write_all(_Writer(source, recipe), shards, num_processes), strict=True):
                scans.append(scan)
                yield len(shard.items)
            index = join([shard.path.name for shard in shards], scans, source.class_names)
            (folder / CLASSES_FILE).write_text("".join(f"{name}\n" for name in index.class_names), encoding="utf-8")
            index.save(folder / FILE_NAME)
            (folder / _LOCK).unlink()
            folder.replace(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}; {_GO_ON}") from None


def unfinished(splits: dict[str, Source], out: Path, recipe: Recipe) -> dict[str, Source]:
    """The splits that are still to be packed into `out`/SPLIT, after a command that was killed between them.

    Raises UserError if one exists that this command did not write, or if all do: nothing is ever overwritten.
    """
    there = {split for split in splits if (out / split).exists()}
    for split in sorted(there):
        ours = len(there) < len(splits) and _read_manifest(out / split) == recipe.manifest(splits[split])
        if not ours:
            raise UserError(f"{out / split}: exists; remove it, or name another folder")
    return {split: source for split, source in splits.items() if split not in there}
