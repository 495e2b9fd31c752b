"""Write WebDataset tars and their index, in parallel. Resumable. The output appears only when it is complete."""

import contextlib
import fcntl
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dist_trainer.data.index import FILE_NAME
from dist_trainer.distributed.processes import die_with_parent
from dist_trainer.draws import permutation
from dist_trainer.errors import UserError, plural
from dist_trainer.packing.sources import Source
from dist_trainer.packing.write import GO_ON, BadImage, Recipe, Shard, Written, read_bad, write_bad
from dist_trainer.shards.classes import CLASSES_FILE
from dist_trainer.shards.join import join

MANIFEST = "pack.json"
BAD_FILE = "bad.json"
"""Beside the tars: the images that are not in them, and why."""
_LOCK = "lock"
_SHOWN = 20


class BadImagesError(UserError):
    """Images that cannot be used, more than are allowed."""

    def __init__(self, bad: Sequence[BadImage], folder: Path, allowed: int) -> None:
        self.bad, self.folder, self.allowed = tuple(bad), folder, allowed
        super().__init__("\n".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        where = self.bad[0].source
        yield (
            f"{where}: {plural(len(self.bad), 'image')} cannot be used, where --allow_bad is {self.allowed}; repair or "
            f"remove them and start the same command again, which goes on; or --allow_bad {len(self.bad)}"
        )
        yield from (f"  {bad.source}/{bad.image}: {bad.reason}" for bad in self.bad[:_SHOWN])
        if len(self.bad) > _SHOWN:
            yield f"  and {len(self.bad) - _SHOWN:,} more; {self.folder / BAD_FILE} lists them all"


def _init_worker() -> None:
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on Ctrl-C ends it at once, without a traceback


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


def _write_all(shards: Sequence[Shard], num_processes: int) -> Iterator[Written]:
    """The finished shards, in order; in this process when one is enough."""
    num_processes = min(num_processes, len(shards))
    if num_processes <= 1:
        yield from map(Shard.write, shards)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=_init_worker) as pool:
        try:
            with _deaf_to_interrupts():
                written = pool.map(Shard.write, shards)
            yield from written
        except BrokenProcessPool:
            raise UserError(f"a worker process was killed, maybe for lack of memory; {GO_ON}") from None
        finally:
            pool.shutdown(cancel_futures=True)


def partial_folder(out: Path) -> Path:
    """The folder of `out`'s tars until all are written."""
    return out.with_name(f".{out.name}.partial")


def found_bad(out: Path, splits: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
    """{source: {image: class}} of the images that the same command left out before, of all its splits."""
    found: dict[str, dict[str, str]] = {}
    for folder in [place for split in splits for place in (partial_folder(out / split), out / split)]:
        for file in folder.glob(f"*{BAD_FILE}"):
            for bad in read_bad(file):
                found.setdefault(bad.source, {})[bad.image] = bad.class_name
    return found


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
        keep |= {MANIFEST, *finished, *(path.name for path in folder.glob(f"*{BAD_FILE}"))}
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
    allow_bad: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[int]:
    """Write `source` into `out`/000000.tar ... and `out`/index.dtx, shuffled; yields images done, shard by shard.

    `out` appears when it is complete, with pack.json (source and recipe), classes.txt and, if images were left out,
    bad.json. After a kill, the same call writes the missing tars. Raises UserError if `out` exists, for an image that
    cannot be read, and for errors of the file system; at the end BadImagesError for more than `allow_bad` images that
    cannot be used. Those that were removed since an earlier call found them bad do not count.
    """
    if out.exists():
        raise UserError(f"{out}: exists; remove it, or name another folder")
    folder = partial_folder(out)
    order = permutation(len(source), recipe.seed)
    runs = [order[start : start + recipe.samples_per_shard] for start in range(0, len(order), recipe.samples_per_shard)]
    shards = [
        Shard(folder / f"{number:06d}.tar", number, items, source.part(items), recipe)
        for number, items in enumerate(runs)
    ]
    written: list[Written] = []
    try:
        with _claimed(folder):
            _begin(folder, recipe.manifest(source), say)
            for shard, done in zip(shards, _write_all(shards, num_processes), strict=True):
                written.append(done)
                yield len(shard.items)
            _finish(folder, source, shards, written, allow_bad)
            folder.replace(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}; {GO_ON}") from None


def _finish(folder: Path, source: Source, shards: Sequence[Shard], written: Sequence[Written], allow_bad: int) -> None:
    """What lies beside the finished tars. Raises BadImagesError."""
    bad = sorted((each for done in written for each in done.bad), key=lambda each: each.item)
    if bad:
        write_bad(folder / BAD_FILE, bad)
    if sum(not each.is_gone for each in bad) > allow_bad:
        raise BadImagesError([each for each in bad if not each.is_gone], folder, allow_bad)
    left_out = {each.item for each in bad}
    names = (source.own_name(item) for shard in shards for item in shard.items.tolist() if item not in left_out)
    scans = [done.scan for done in written]
    index = join([shard.path.name for shard in shards], scans, source.class_names, sources=names)
    (folder / CLASSES_FILE).write_text("".join(f"{name}\n" for name in index.class_names), encoding="utf-8")
    index.save(folder / FILE_NAME)
    for path in [folder / _LOCK, *folder.glob(f"*.{BAD_FILE}")]:
        path.unlink()


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
