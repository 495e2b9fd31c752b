"""Sources of images for `shards pack`: class folders, and torchvision's data sets."""

import hashlib
import inspect
import io
import os
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dist_trainer.errors import UserError, nearest
from dist_trainer.shards.scan import IMAGE_SUFFIXES

Labels = npt.NDArray[np.int64]


class Source(Protocol):
    """Labelled images by number. Small enough to be sent to worker processes: names are in arrays, no image is in
    memory."""

    class_names: tuple[str, ...]
    num_ignored: int
    """Files among the images that are not images."""

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies this source, for JSON."""

    def __len__(self) -> int: ...

    def name(self, item: int) -> str:
        """An image's name in messages."""

    def labels(self) -> Labels:
        """The class of every image. This may have to decode them all."""

    def read(self, item: int) -> tuple[bytes, str, int]:
        """Encoded bytes, their suffix in lower case, the class. Raises UserError naming a missing image."""


def few(names: Collection[str]) -> str:
    """The first three of `names`, quoted."""
    return ", ".join(repr(name) for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def suffix_of(name: str) -> str:
    return PurePath(name).suffix.lower().lstrip(".")


def is_image(name: str) -> bool:
    """By the suffix, in any case. Hidden files do not count (macOS writes `._cat.JPEG` beside `cat.JPEG`)."""
    return suffix_of(name) in IMAGE_SUFFIXES and not PurePath(name).name.startswith(".")


def require_classes(where: object, found: Collection[str], expected: Sequence[str]) -> None:
    """Raises UserError unless the images' classes are those of training, all of them."""
    unknown, missing = set(found) - set(expected), set(expected) - set(found)
    parts = [f"{len(unknown):,} are not in training ({few(unknown)})"] * bool(unknown)
    parts += [f"{len(missing):,} of training's {len(expected):,} have no image ({few(missing)})"] * bool(missing)
    if parts:
        raise UserError(f"{where}: its classes are not those of training: {'; '.join(parts)}")


class ListedImages:
    """Images named in a list. 1.28 M names take 60 MB in arrays, and 150 MB as Python objects."""

    def __init__(
        self, root: Path, names: Sequence[str], labels: Sequence[int], class_names: tuple[str, ...], num_ignored: int
    ) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.root = root
        self._names = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *(len(name) for name in encoded)], dtype=np.int64)
        self._labels = np.array(labels, np.int64)
        self.class_names = class_names
        self.num_ignored = num_ignored

    @property
    def facts(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._names.data)
        digest.update(self._ends.data)
        digest.update(self._labels.data)
        return {"source": str(self.root.resolve()), "listing": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> Labels:
        return self._labels

    def name(self, item: int) -> str:
        return f"{self.root}/{os.fsdecode(self._names[self._ends[item] : self._ends[item + 1]].tobytes())}"

    def bytes_of(self, item: int) -> bytes:
        """The image's file content. May raise OSError."""
        return Path(self.name(item)).read_bytes()

    def read(self, item: int) -> tuple[bytes, str, int]:
        name = self.name(item)
        try:
            return self.bytes_of(item), suffix_of(name), int(self._labels[item])
        except OSError as error:
            raise UserError(f"{name}: {error.strerror or error}") from None


def listed_images(folder: Path) -> tuple[list[str], int]:
    """(sorted paths of the images below `folder` relative to it, the number of other files); links are followed."""

    def refuse(error: OSError) -> None:  # os.walk would skip a folder that it may not read
        raise UserError(f"{error.filename}: {error.strerror}")

    images: list[str] = []
    num_ignored = 0
    for current, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = "" if current == str(folder) else f"{os.path.relpath(current, folder)}/"
        found = [f"{below}{name}" for name in files if is_image(name)]
        images += found
        num_ignored += len(files) - len(found)
    return sorted(images), num_ignored


class FolderSource(ListedImages):
    """`root`/CLASS/*.jpg: class numbers follow the sorted class names; files are copied byte for byte."""

    def __init__(self, root: Path) -> None:
        entries = sorted(root.iterdir())
        folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        names: list[str] = []
        labels: list[int] = []
        num_ignored = sum(entry.is_file() for entry in entries)
        empty = []
        for label, folder in enumerate(folders):
            images, others = listed_images(folder)
            names += [f"{folder.name}/{image}" for image in images]
            labels += [label] * len(images)
            num_ignored += others
            if not images:
                empty.append(folder.name)
        if not names:
            flat = any(is_image(entry.name) for entry in entries)
            remedy = f"; images without class folders need --labels {root.name}=CSV" if flat else ""
            raise UserError(f"{root}: no images ({', '.join(IMAGE_SUFFIXES)}) in class folders{remedy}")
        if empty:
            raise UserError(f"{root}: {len(empty):,} class folders have no image: {few(empty)}")
        super().__init__(root, names, labels, tuple(folder.name for folder in folders), num_ignored)


def _torchvision(name: str) -> Any:
    import torchvision.datasets

    factories = {name: getattr(torchvision.datasets, name) for name in torchvision.datasets.__all__}
    known = [name for name, each in factories.items() if "root" in inspect.signature(each).parameters]
    if name not in known:
        raise UserError(f"torchvision/{name}: no such data set{nearest(name, known)}")
    return factories[name]


class TorchvisionSource:
    """A split of a torchvision classification data set, its images encoded as PNG (lossless).

    `choices` are arguments that select the split; the first that the data set knows is used.
    """

    num_ignored = 0

    def __init__(self, name: str, root: Path, choices: Sequence[dict[str, Any]]) -> None:
        self._name = f"torchvision/{name}"
        factory = _torchvision(name)
        for last, choice in enumerate(choices, 1):
            self._name = ", ".join([f"torchvision/{name}", *(f"{key}={value!r}" for key, value in choice.items())])
            try:
                try:
                    self._data = factory(str(root), **choice)
                except RuntimeError:  # not there yet: torchvision's own word for it
                    self._data = factory(str(root), **choice, download=True)
                break
            except (RuntimeError, ValueError, TypeError, OSError) as error:
                if last == len(choices) or not isinstance(error, ValueError):  # ValueError: no such split
                    raise UserError(f"{self._name}, in {root}: {' '.join(str(error).split())}") from None
        self.class_names = tuple(str(c) for c in getattr(self._data, "classes", ()))

    @property
    def facts(self) -> dict[str, Any]:
        return {"source": self._name}

    def __len__(self) -> int:
        return len(self._data)

    def name(self, item: int) -> str:
        return f"{self._name}, image {item}"

    def labels(self) -> Labels:
        return np.array([int(self._data[item][1]) for item in range(len(self))], np.int64)

    def read(self, item: int) -> tuple[bytes, str, int]:
        try:
            image, label = self._data[item]
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name(item)}: {error}") from None
        return buffer.getvalue(), "png", int(label)


def torchvision_splits(name: str, root: Path) -> dict[str, Source]:
    """Training and validation, or else the test split. A set without splits is all training."""
    accepts = inspect.signature(_torchvision(name)).parameters
    choices: dict[str, list[dict[str, Any]]] = {"train": [{}]}
    if "train" in accepts:
        choices = {"train": [{"train": True}], "val": [{"train": False}]}
    elif "split" in accepts:
        names = {"train": ("train", "trainval"), "val": ("val", "valid", "test")}
        choices = {split: [{"split": name} for name in each] for split, each in names.items()}
    return {split: TorchvisionSource(name, root, each) for split, each in choices.items()}
