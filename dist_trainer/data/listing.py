"""The files that count as images: one listing for class folders in place, `shards pack` and members of tars."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dist_trainer.errors import UserError

IMAGE_SUFFIXES = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif", "jp2",
)  # fmt: skip
"""Formats of still images that Pillow decodes by itself; in any case of letters."""
SUFFIXES_TEXT = "jpg, png, webp, bmp, gif, tif, ..."
"""For messages."""
LISTING = 2
"""Changes when other files are listed. Indices made before go on with the listing that they were made with."""
_JUNK = {"@eaDir", "__MACOSX", "lost+found", "Thumbs.db", "desktop.ini"}  # of Synology, macOS, file systems, Windows
_SUFFIXES_BEFORE = ("jpg", "jpeg", "png", "webp")
_SHOWN = 5
_INDEX = "dtx"


@dataclass(frozen=True)
class Listing:
    """The images below a folder: their paths relative to it, with / between folders, sorted by code points."""

    images: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """How many other files there are, by suffix (lower case, without its dot)."""


def passed_over(path: str) -> bool:
    """Whether a file or folder is no business of a data set, by a name in its path: a hidden one (`._cat.jpg` of macOS,
    `.ipynb_checkpoints`), or a folder that systems leave behind.
    """
    return any((name.startswith(".") and name not in (".", "..")) or name in _JUNK for name in path.split("/"))


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case, without its dot; "" where there is none."""
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() if stem else ""


def is_image(path: str) -> bool:
    """By its suffix, in any case of letters."""
    return suffix_of(path) in IMAGE_SUFFIXES and not passed_over(path)


def class_folders(root: Path) -> list[str]:
    """The sorted names of the folders in `root`. Raises UserError where it cannot be read."""
    return sorted(entry.name for entry in _entries(str(root)) if entry.is_dir() and not passed_over(entry.name))


def list_images(root: Path, *, below: bool = True) -> Listing:
    """The images in `root` and, with `below`, in its folders. Links are followed, a folder once.

    Two names of one folder (a link to a folder that holds it, in the worst case) are told by its device and number:
    the first in sorted order counts. Raises UserError naming a folder that cannot be read, and a name that is not
    UTF-8, which an index could not hold.
    """
    found = Listing()
    seen: set[tuple[int, int]] = set()

    def visit(folder: str, inside: str) -> None:
        status = os.stat(folder)  # noqa: PTH116 (os.scandir gives text, and there are millions of files)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(_entries(folder), key=lambda entry: entry.name):
            if passed_over(entry.name):
                continue
            if entry.is_dir():
                if below:
                    visit(entry.path, f"{inside}{entry.name}/")
            elif suffix_of(entry.name) in IMAGE_SUFFIXES and _is_file(entry):
                found.images.append(inside + _utf8(entry))
            else:
                found.left_out[suffix_of(entry.name)] += 1

    visit(str(root), "")
    found.images.sort()
    return found


def left_out_above(root: Path) -> Counter[str]:
    """The files beside the class folders of `root`, by suffix: images, too, have no class there."""
    names = [entry.name for entry in _entries(str(root)) if not entry.is_dir() and not passed_over(entry.name)]
    return Counter(suffix_of(name) for name in names if suffix_of(name) != _INDEX)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from None


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it can be read as one, or is a link that leads nowhere, for which its reader is to say so."""
    return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())


def _utf8(entry: os.DirEntry[str]) -> str:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{Path(entry.path).parent!s}: the name of {entry.name!r} is not UTF-8; rename it") from None
    return entry.name


def left_out_text(left_out: Mapping[str, int]) -> str:
    """`; 6 other files left out (4 .bmp, 2 without a suffix)`, or nothing."""
    total = sum(left_out.values())
    if not total:
        return ""
    by_number = sorted(left_out.items(), key=lambda each: (-each[1], each[0]))
    shown = [f"{number:,} {f'.{suffix}' if suffix else 'without a suffix'}" for suffix, number in by_number[:_SHOWN]]
    more = ", ..." if len(by_number) > _SHOWN else ""
    return f"; {total:,} other file{'s' if total > 1 else ''} left out ({', '.join(shown)}{more})"


def images_of_listing_1(root: Path) -> list[str]:
    """What LISTING 1 found below a class folder: also what is hidden, and loops of links up to the kernel's limit."""
    found = []
    for path, _, files in os.walk(root, followlinks=True):
        inside = os.path.relpath(path, root).replace(os.sep, "/") + "/"
        names = [name for name in files if suffix_of(name) in _SUFFIXES_BEFORE]
        found += [f"{'' if inside == './' else inside}{name}" for name in names]
    return sorted(found)
