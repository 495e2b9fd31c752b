"""From a location to an index that is complete and fits its shards; made here if that needs no decision."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_trainer.data.index import ShardIndex
from dist_trainer.data.listing import left_out_text
from dist_trainer.distributed.cores import cores
from dist_trainer.errors import LocalError, UserError, plural
from dist_trainer.shards.build import ShardSet, build_index
from dist_trainer.shards.classes import (
    CLASSES_FILE,
    few,
    is_class_sorted,
    match_classes,
    numbering_note,
    read_classes,
    without_samples,
)
from dist_trainer.shards.freshness import check_content, check_shards, is_current
from dist_trainer.shards.labels import LabelRule
from dist_trainer.shards.locate import INDEX_SUFFIX, DataPlace, locate, rooted
from dist_trainer.storage.storage import RetryConfig, Storage, is_remote

__all__ = [
    "describe",
    "find_index",
    "index_shards",
    "is_class_sorted",
    "match_classes",
    "numbering_note",
    "open_index",
    "prepare_index",
]


def prepare_index(
    key: str,
    location: str,
    *,
    options: Mapping[str, Any] | None = None,
    retry: RetryConfig | None = None,
    fallback: Path | None = None,
    allow_empty: bool = False,
) -> tuple[str, str]:
    """The index of `location`, checked against its shards. Local tars and image folders without one are indexed.

    Call it on one rank. `fallback` is a folder for indices that cannot be written beside the data: those of read-only
    folders, and copies of remote ones. With `allow_empty` a class folder may be without images. Returns (path of a
    local index file, a line to print or ""). Raises UserError, starting with the config key `key`, for missing, damaged
    or changed data.
    """
    storage = Storage(options, retry or RetryConfig())
    try:
        data_place = locate([location], storage)
        path = _existing(data_place, location, storage, fallback)
        if path is None:
            return _make(data_place, location, options, fallback, allow_empty)
        index = ShardIndex.load(path)
        check_shards(index, path, data_place.shards)
        return str(path), check_content(index, path, storage)
    except LocalError:
        raise
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    except OSError as error:
        raise UserError(f"{key}: {error.filename or location}: {error.strerror or error}") from None


def open_index(path: str) -> ShardIndex:
    """Map an index that `prepare_index` has checked. Raises UserError if it is missing or damaged."""
    if not Path(path).is_file():
        raise LocalError(f"{path}: not on this host; the index must lie where every host sees it, or be copied to each")
    return ShardIndex.load(Path(path), verify=False)


def find_index(location: str, *, options: Mapping[str, Any] | None = None, fallback: Path | None = None) -> ShardIndex:
    """The index of `location`, which must exist; its shards are not checked. Raises UserError."""
    storage = Storage(options)
    try:
        path = _existing(locate([location], storage), location, storage, fallback)
    except OSError as error:
        raise UserError(f"{error.filename or location}: {error.strerror or error}") from None
    if path is None:
        raise UserError(f"{location}: has no index; make it with: dist-trainer shards index '{location}'")
    return ShardIndex.load(path)


def index_shards(
    locations: Sequence[str],
    out: Path | None = None,
    *,
    label: str | None = None,
    image: str | None = None,
    classes: str | None = None,
    allow_bad: int = 0,
    options: Mapping[str, Any] | None = None,
    num_processes: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Make the index of `locations` in `out` (default: where `prepare_index` looks), unless it is current.

    Returns a line about the result; `say` gets progress and warnings. Raises UserError.
    """
    storage = Storage(options)
    data_place = locate(locations, storage)
    shards = data_place.shards
    if shards is None:
        raise UserError(f"{locations[0]}: is an index; name the tars to make one of")
    if shards.is_folder and (label is not None or image is not None or classes is not None):
        raise UserError(
            f"{locations[0]}: an image folder, whose classes are its folders; leave --label, --image and --classes out"
        )
    if out is None:
        out = Path(data_place.index)
        if data_place.is_remote or not os.access(out.parent, os.W_OK):
            raise UserError(
                f"{shards.root}: the index cannot be written there; give another location: "
                f"dist-trainer shards index '{' '.join(locations)}' --out train{INDEX_SUFFIX}"
            )
    if out.suffix != INDEX_SUFFIX or not out.absolute().parent.is_dir():
        wrong = "its folder is not there" if out.suffix == INDEX_SUFFIX else f"an index's name ends in {INDEX_SUFFIX}"
        raise UserError(f"--out: {out}: {wrong}")
    rule = LabelRule.parse(label or "cls", image or "")
    try:
        class_names = class_list(shards, storage) if classes is None else read_classes(classes, storage)
    except OSError as error:
        raise UserError(f"{error.filename or classes}: {error.strerror or error}") from None
    shards = rooted(shards, out)
    if is_current(out, shards, rule, class_names, allow_bad, storage):
        return f"up to date: {describe(ShardIndex.load(out), out)}"
    index = build_index(
        shards,
        out,
        rule=rule,
        class_names=class_names,
        allow_bad=allow_bad,
        options=options,
        num_processes=num_processes,
        advice="repair them, or accept N bad samples with --allow_bad N",
        say=say,
    )
    return f"indexed {describe(index, out)}"


def describe(index: ShardIndex, path: Path) -> str:
    """`8 tars, 1,200 samples, 10 classes: /data/train/index.dtx`, with bad samples, a sorted order, files that are left
    out and classes without a sample, if any.
    """
    kind, each = ("tar", "sample") if index.names is None else ("class folder", "image")
    bad = f", {len(index.problems):,} of them bad" if index.problems else ""
    missing = without_samples(index)
    empty = f"; {plural(len(missing), 'class')} without a sample ({few(missing)})" if missing else ""
    if missing == ["0"]:
        empty = "; warning: class 0 has no sample: do labels begin at 1?"
    order = ", sorted by class (training takes order full)" if is_class_sorted(index) else ""
    what = f"{plural(len(index.shards), kind)}, {plural(len(index), each)}{bad}, {plural(index.num_classes, 'class')}"
    return f"{what}{order}{left_out_text(index.left_out)}{empty}: {path}"


# Where the index is


def _existing(data_place: DataPlace, location: str, storage: Storage, fallback: Path | None) -> Path | None:
    """The local file of an existing index; a remote one is copied. None if there is none."""
    spare = _spare(location, fallback)
    if data_place.is_remote:
        path = _copy(data_place.index, storage, spare)
        if path is None and data_place.shards is None:
            raise UserError(f"{data_place.index}: no such index")
        return path
    found = next((path for path in (Path(data_place.index).expanduser(), spare) if path.is_file()), None)
    if found is None and data_place.shards is None:
        raise UserError(
            f"{data_place.index}: no such index; make it with: "
            f"dist-trainer shards index URL... --out {data_place.index}"
        )
    return found


def _spare(location: str, fallback: Path | None) -> Path:
    """A file with a unique name for an index that cannot be written beside `location`."""
    absolute = location if is_remote(location) else str(Path(location).expanduser().absolute())
    stem = Path(location.rstrip("/")).stem.partition("{")[0].strip("-_. ") or "index"
    folder = fallback or Path.home() / ".cache" / "dist_trainer"
    return folder / f"{stem}-{hashlib.sha256(absolute.encode()).hexdigest()[:8]}{INDEX_SUFFIX}"


def _copy(url: str, storage: Storage, spare: Path) -> Path | None:
    """Copy a remote index to `spare`, unless it is there. None if there is none at `url`."""
    download = spare.with_name(f".{spare.name}.{os.getpid()}.download")
    try:
        data = storage.read(url)
    except (FileNotFoundError, PermissionError):  # S3 refuses missing files to those who may not list
        return None
    try:
        spare.parent.mkdir(parents=True, exist_ok=True)
        download.write_bytes(data)
        try:
            index = ShardIndex.load(download)
        except UserError as error:
            raise UserError(str(error).replace(str(download), url)) from None
        if Path(index.root) == download.absolute().parent:  # "." there: its tars lie beside it, at the URL
            index = replace(index, root=url.rpartition("/")[0])
        if not spare.is_file() or _identity(ShardIndex.load(spare)) != _identity(index):
            index.save(spare)  # otherwise the existing copy may know newer stamps
    finally:
        download.unlink(missing_ok=True)
    return spare


def _identity(index: ShardIndex) -> tuple[str, str, tuple[str, ...]]:
    return index.fingerprint, index.root, index.shards


def _make(
    data_place: DataPlace,
    location: str,
    options: Mapping[str, Any] | None,
    fallback: Path | None,
    allow_empty: bool,
) -> tuple[str, str]:
    """Index local tars or an image folder: (the index file, the line that says so)."""
    assert data_place.shards is not None  # otherwise it would exist, or have been refused
    if data_place.is_remote:
        raise UserError(
            f"{location}: has no index; make it with: dist-trainer shards index '{location}' "
            f"--out train{INDEX_SUFFIX}, and name train{INDEX_SUFFIX} here"
        )
    out = Path(data_place.index)
    if not os.access(out.parent, os.W_OK):
        out = _spare(location, fallback)
        out.parent.mkdir(parents=True, exist_ok=True)
    elsewhere = "" if data_place.shards.is_folder else ", --label RULE"
    index = build_index(
        rooted(data_place.shards, out),
        out,
        rule=LabelRule(),
        class_names=class_list(data_place.shards, Storage(options)),
        num_processes=cores(),
        allow_empty=allow_empty,
        advice=f"repair them, or see dist-trainer shards index '{location}' --allow_bad N{elsewhere}",
    )
    return str(out), f"indexed {describe(index, out)}"


def class_list(shards: ShardSet, storage: Storage) -> Sequence[str]:
    """An image folder's class folders; for tars, the names in `classes.txt` beside them; none without it."""
    if shards.is_folder:
        return shards.names
    try:
        return read_classes(f"{shards.root}/{CLASSES_FILE}", storage)
    except FileNotFoundError:
        return ()
