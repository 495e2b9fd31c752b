"""A user's locations: an index, a folder of tars, an image folder, a tar, a brace pattern; paths or URLs."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_trainer.data.index import FILE_NAME
from dist_trainer.data.listing import class_folders
from dist_trainer.errors import UserError
from dist_trainer.shards.build import ShardSet
from dist_trainer.shards.image_folder import holds_images
from dist_trainer.storage.secret import refuse_secret_url
from dist_trainer.storage.storage import Storage, is_remote

INDEX_SUFFIX = ".dtx"


@dataclass(frozen=True)
class DataPlace:
    """The path or URL of an index that may not exist yet, and its shards; None if the location is an index."""

    index: str
    shards: ShardSet | None

    @property
    def is_remote(self) -> bool:
        return is_remote(self.index)


def locate(locations: Sequence[str], storage: Storage) -> DataPlace:
    """Resolve one location, or several tars. Whether named tars exist is not checked.

    Raises UserError for a location without images, a pattern that does not parse, and unreachable storage.
    """
    for location in locations:
        refuse_secret_url(location)  # before any message shows it
    if len(locations) == 1:
        (location,) = locations
        if location.startswith("pipe:"):
            raise UserError(f"{location}: shell pipes are refused; name a path, or a URL such as s3://bucket/folder")
        if location.endswith(INDEX_SUFFIX):
            return DataPlace(location, None)
        if not location.endswith(".tar") and "{" not in location:
            return _remote_folder(location.rstrip("/"), storage) if is_remote(location) else _local_folder(location)
    tars = [tar for location in locations for tar in _expand(location)]
    wrong = next((tar for tar in tars if not tar.endswith(".tar")), None)
    if wrong is not None and _is_packed(wrong):
        raise UserError(f"{wrong}: compressed; samples are read by their offset, so decompress it first")
    if wrong is not None:
        raise UserError(f"{wrong}: not a tar by its name; several locations must all be tars")
    if len({is_remote(tar) for tar in tars}) > 1:
        raise UserError(f"{tars[0]}: some tars are local and some are remote; make an index of each kind")
    shards = _relative(tars)
    name = hashlib.sha256("\n".join(shards.names).encode()).hexdigest()[:8]
    return DataPlace(f"{shards.root}/{FILE_NAME if is_remote(tars[0]) else f'index-{name}{INDEX_SUFFIX}'}", shards)


def _expand(pattern: str) -> list[str]:
    from braceexpand import braceexpand  # only for several tars

    try:
        return list(braceexpand(pattern if is_remote(pattern) else os.path.expanduser(pattern)))  # noqa: PTH111
    except ValueError:
        raise UserError(f"{pattern}: its braces do not match; write a range as {{000000..001281}}") from None


def _relative(tars: Sequence[str]) -> ShardSet:
    """The tars by names relative to the innermost folder that holds all of them."""
    if is_remote(tars[0]):
        folders = [tar.split("/")[:-1] for tar in tars]
        depth = next((n for n, parts in enumerate(zip(*folders, strict=False)) if len(set(parts)) > 1), None)
        common = folders[0][: min(map(len, folders)) if depth is None else depth]
        if len(common) < 3:  # several hosts or buckets: names are whole URLs
            return ShardSet("/".join(folders[0]), tuple(tars))
        root = "/".join(common)
        return ShardSet(root, tuple(tar.removeprefix(f"{root}/") for tar in tars))
    paths = [Path(tar).absolute() for tar in tars]
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    return ShardSet(str(folder), tuple(path.relative_to(folder).as_posix() for path in paths))


def _local_folder(location: str) -> DataPlace:
    folder = Path(location).expanduser().absolute()
    if not folder.is_dir():
        if _is_packed(folder.name):
            raise UserError(f"{location}: compressed; samples are read by their offset, so decompress it first")
        found = f"a file that is neither a tar nor an index ({INDEX_SUFFIX})" if folder.exists() else "no such folder"
        raise UserError(f"{location}: {found}")
    index = folder / FILE_NAME
    tars = sorted(path.name for path in folder.glob("*.tar"))
    if tars:
        return DataPlace(str(index), ShardSet(str(folder), tuple(tars)))
    classes = class_folders(folder)
    if classes and holds_images(folder):
        return DataPlace(str(index), ShardSet(str(folder), tuple(classes), is_folder=True))
    if index.exists():
        return DataPlace(str(index), None)
    packed = sorted(path.name for path in folder.iterdir() if _is_packed(path.name))
    if packed:
        raise UserError(
            f"{location}: compressed tars there ({packed[0]}); samples are read by their offset, so decompress them"
        )
    if not classes:
        raise UserError(
            f"{location}: no tars there, and no class folders; dist-trainer shards pack --help says how to make tars"
        )
    raise UserError(
        f"{location}: no tars there, and no images in its folders ({', '.join(classes[:3])}); "
        f"name the folder that holds the tars or the class folders, such as {location.rstrip('/')}/{classes[0]}"
    )


def _is_packed(name: str) -> bool:
    return name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def _remote_folder(url: str, storage: Storage) -> DataPlace:
    try:
        names = storage.list(url)
    except FileNotFoundError:
        raise UserError(f"{url}: no such folder") from None
    except OSError as error:
        raise UserError(f"{url}: {error.strerror or error}") from None
    tars = tuple(name for name in names if name.endswith(".tar"))
    if not tars and any(_is_packed(name) for name in names):
        raise UserError(f"{url}: compressed tars there; samples are read by their offset, so decompress them first")
    if not tars and FILE_NAME not in names:
        raise UserError(f"{url}: no tars there, and no {FILE_NAME}")
    return DataPlace(f"{url}/{FILE_NAME}", ShardSet(url, tars) if tars else None)


def rooted(shards: ShardSet, index: Path) -> ShardSet:
    """`shards` relative to the folder of `index` if they are in it or below, so that all can be moved together."""
    folder = index.absolute().parent
    if is_remote(shards.root) or not Path(shards.root).is_relative_to(folder):
        return shards
    inside = Path(shards.root).relative_to(folder)
    return ShardSet(str(folder), tuple((inside / name).as_posix() for name in shards.names), shards.is_folder)
