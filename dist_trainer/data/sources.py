"""From what a config names to an index: a folder of tars, one tar, or a brace pattern."""

import hashlib
import os
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from dist_trainer.comm import cores
from dist_trainer.data.cache import local_copy
from dist_trainer.data.config import DataConfig
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.data.scan import scan_tars
from dist_trainer.data.storage import Storage, is_remote
from dist_trainer.errors import UserError


def _locate(key: str, location: str) -> tuple[Path, list[Path]]:
    """(where the index is or shall be, the tars; none when the index is there)."""
    if location.startswith("pipe:") or "://" in location:
        raise UserError(f"{key}: {location!r}: only local paths can be read")
    path = Path(location).expanduser()
    if path.is_dir():
        index, tars = path / FILE_NAME, sorted(path.glob("*.tar"))
        if not tars:
            raise UserError(f"{key}: {path}: no tars there; make them with: dist-trainer shards pack SOURCE {path}")
        if index.exists():
            added = sorted({tar.name for tar in tars} - set(ShardIndex.load(index).shards))
            if added:
                raise UserError(
                    f"{key}: {path / added[0]}: not in {index}, which was made before; delete the index to index anew, "
                    "or name the tars that you mean by a brace pattern"
                )
            tars = []
        return index, tars
    tars = [Path(url) for url in expand_urls(str(path))]
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        rest = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{key}: {missing[0]}: no such tar{rest}")
    root = Path(os.path.commonpath([tar.parent for tar in tars]))
    name = hashlib.sha256("\n".join(str(tar.relative_to(root)) for tar in tars).encode()).hexdigest()[:8]
    index = root / f"index-{name}.dtx"
    return index, [] if index.exists() else tars


def prepare_index(key: str, location: str, *, options: Any = None, fallback: Path | None = None) -> tuple[str, str]:
    """Make the index of `location` if there is none yet. To be called on one rank.

    Returns (the index file, a line to print or ""). Raises UserError naming the config key `key`.
    """
    path, tars = _locate(key, location)
    if not tars:
        return str(path), ""
    index = scan_tars(path.parent, tars, cores())
    try:
        index.save(path)
    except OSError as error:
        raise UserError(f"{key}: cannot write the index {path} ({error.strerror or error})") from None
    return str(path), f"indexed {len(tars)} tars, {len(index):,} samples, {index.num_classes} classes: {path}"


def open_index(path: str) -> ShardIndex:
    """Read an index and hold it against its shards. Raises UserError for one that is damaged or out of date."""
    index = ShardIndex.load(Path(path))
    for number, size in enumerate(index.sizes.tolist()):
        tar = Path(index.shard_path(number))
        if not tar.exists():
            raise UserError(f"{tar}: missing, though {path} lists it; restore it, or delete {path} to index anew")
        if tar.stat().st_size != size:
            raise UserError(
                f"{tar}: {tar.stat().st_size} bytes, but {path} says {size}; restore it, or delete {path} to index anew"
            )
    return index


def local_index(path: str, config: DataConfig) -> str:
    """An index file on this node: copied here once where it is at a URL."""
    if not is_remote(path):
        return path
    storage = Storage(config.storage_options, config.retry)
    return str(local_copy(path, config.cache, storage))


def is_class_sorted(index: ShardIndex) -> bool:
    return False


def match_classes(train: ShardIndex, val: ShardIndex) -> ShardIndex:
    return val
