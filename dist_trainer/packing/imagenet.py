"""ImageNet's own files as a source: images are read directly from ILSVRC2012_img_*.tar, nothing is unpacked.

The labels of the validation images are in the devkit, as numbers that its meta.mat maps to synsets. Class numbers here
follow the sorted synsets, as in torchvision and timm.
"""

import contextlib
import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, cast

import numpy as np

from dist_trainer.data.listing import is_image, passed_over, suffix_of
from dist_trainer.errors import UserError
from dist_trainer.packing.sources import Labels, ListedImages, Source, require_classes

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_BLOCK = 512  # bytes: a tar's unit
_Span = tuple[str, int, int]
"""A file's name, its offset in the outermost tar, its size in bytes."""


class TarImages(ListedImages):
    """Images inside one tar, or inside tars in it."""

    def __init__(
        self, tar: Path, images: list[_Span], labels: list[int], class_names: tuple[str, ...], left_out: Counter[str]
    ) -> None:
        super().__init__(tar, [name for name, _, _ in images], labels, class_names, left_out)
        self._spans = np.array([(offset, size) for _, offset, size in images], np.int64)

    def part(self, items: Labels) -> "TarImages":
        part = cast("TarImages", super().part(items))
        part._spans = self._spans[items]
        return part

    def bytes_of(self, item: int) -> bytes:
        offset, size = self._spans[item].tolist()
        with self.root.open("rb") as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes instead of {size}: the archive changed")
        return data


def _files(tar: tarfile.TarFile, file: IO[bytes], where: str) -> Iterator[tarfile.TarInfo]:
    """The files in a tar, which is also open as `file`. Raises UserError if tarfile stops too early."""
    end = 0
    for member in tar:
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if member.isfile():
            yield member
    file.seek(end)
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            raise UserError(f"{where}: a destroyed header after byte {end:,}; copy it again")


@contextlib.contextmanager
def _open(tar: Path) -> Iterator[tuple[tarfile.TarFile, IO[bytes]]]:
    """(the tar, its file). Errors while it is read become a UserError that names it."""
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file) as opened:
            yield opened, file
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{tar}: not a readable tar ({' '.join(str(error).split())})") from None
    except OSError as error:
        raise UserError(f"{tar}: {error.strerror or error}") from None


def _train(tar: Path) -> Source:
    classes: dict[str, list[_Span]] = {}
    left_out: Counter[str] = Counter()
    with _open(tar) as (outer, file):
        for member in _files(outer, file, str(tar)):
            inside = outer.extractfile(member)
            name = PurePosixPath(member.name)
            if name.suffix != ".tar" or inside is None:
                left_out[suffix_of(member.name)] += not passed_over(member.name)
                continue
            images = classes.setdefault(name.stem, [])
            where = f"{tar}/{member.name}"
            with inside, tarfile.open(fileobj=inside, mode="r:") as inner:
                for each in _files(inner, inside, where):
                    if is_image(each.name):
                        offset = member.offset_data + each.offset_data
                        images.append((f"{name.stem}/{PurePosixPath(each.name).name}", offset, each.size))
                    elif not passed_over(each.name):
                        left_out[suffix_of(each.name)] += 1
            if not images:
                raise UserError(f"{where}: no images inside")
    if not classes:
        raise UserError(f"{tar}: no tars of classes inside")
    names = tuple(sorted(classes))
    in_order = [image for name in names for image in sorted(classes[name])]
    labels = [label for label, name in enumerate(names) for _ in classes[name]]
    return TarImages(tar, in_order, labels, names, left_out)


def _val(tar: Path) -> Source:
    truth, synsets = _read_devkit(tar.with_name(DEVKIT))
    with _open(tar) as (flat, file):
        members = _files(flat, file, str(tar))
        files = [(PurePosixPath(member.name).name, member.offset_data, member.size) for member in members]
    images = sorted(file for file in files if is_image(file[0]))
    left_out = Counter(suffix_of(name) for name, _, _ in files if not is_image(name) and not passed_over(name))
    if len(images) != len(truth):
        raise UserError(f"{tar}: {len(images):,} images, but {DEVKIT} has the classes of {len(truth):,}")
    names = tuple(sorted(synsets.values()))
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers[synsets[number]] for number in truth]
    return TarImages(tar, images, labels, names, left_out)


def _read_devkit(devkit: Path) -> tuple[list[int], dict[int, str]]:
    """(the devkit's class number of each validation image in order of file names, {class number: synset})."""
    if not devkit.is_file():
        raise UserError(f"{devkit}: missing; the classes of {ARCHIVES['val']} are in it")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{devkit}: reading it needs SciPy: pip install 'dist_trainer[imagenet]'") from None
    with _open(devkit) as (tar, _):
        contents = {PurePosixPath(each.name).name: tar.extractfile(each) for each in tar if each.isfile()}
        files = [contents.get(name) for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")]
        meta, truth = (file.read() if file else b"" for file in files)
    try:
        # Synsets with children are the inner nodes of WordNet's tree: no image has them as its class.
        rows = [row for row in loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"] if row["num_children"] == 0]
        synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
        numbers = [int(line) for line in truth.split()]
        require_classes(devkit, {synsets[number] for number in numbers}, sorted(synsets.values()))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{devkit}: no readable data/meta.mat and ground truth inside ({error!r})") from None
    return numbers, synsets


def imagenet_split(folder: Path, split: str) -> Source:
    """The images of ILSVRC2012_img_train.tar (tars of classes) or of ILSVRC2012_img_val.tar with the devkit.

    Raises UserError for an archive that is cut short or damaged, a missing devkit or a missing SciPy.
    """
    return {"train": _train, "val": _val}[split](folder / ARCHIVES[split])
