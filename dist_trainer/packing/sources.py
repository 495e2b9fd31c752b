"""Sources of images for `shards pack`: class folders, and torchvision's data sets."""

import hashlib
import inspect
import io
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dist_trainer.data.listing import SUFFIXES_TEXT, class_folders, left_out_above, list_images, suffix_of
from dist_trainer.data.texts import Texts
from dist_trainer.errors import UserError, nearest
from dist_trainer.shards.classes import canonical, few

Labels = npt.NDArray[np.int64]


class Source(Protocol):
    """Labelled images by number. Names are in arrays, no image is in memory."""

    class_names: tuple[str, ...]
    left_out: Mapping[str, int]
    """How many files among the images are none, by suffix."""

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies this source, for JSON."""

    def __len__(self) -> int: ...

    def own_name(self, item: int) -> str:
        """An image's name within the source, to be kept in the index."""

    def name(self, item: int) -> str:
        """An image's name in messages."""

    def is_gone(self, item: int) -> bool:
        """Whether it was found bad by an earlier command, and has been removed since: it keeps its number."""

    def part(self, items: Labels) -> "Source":
        """The images with these numbers, small enough to be sent to a worker process with its task."""

    def labels(self) -> Labels:
        """The class of every image. This may have to decode them all."""

    def read(self, item: int) -> tuple[bytes, str, int]:
        """Encoded bytes, their suffix in lower case, the class. Raises UserError naming a missing image."""


def require_classes(where: object, found: Collection[str], expected: Sequence[str], *, subset: bool = False) -> None:
    """Raises UserError unless the images' classes are those of training: all of them, or with `subset` some."""
    there, known = ({canonical(name): name for name in names} for names in (found, expected))
    unknown, missing = (
        [one[key] for key in one.keys() - other.keys()] for one, other in ((there, known), (known, there))
    )
    if subset and not unknown:
        return
    parts = [f"{len(unknown):,} are not in training ({few(unknown)})"] * bool(unknown)
    parts += [f"{len(missing):,} of training's {len(expected):,} have no image ({few(missing)})"] * bool(missing)
    if parts:
        raise UserError(f"{where}: its classes are not those of training: {'; '.join(parts)}")


class ListedImages:
    """Images named in a list, relative to `root`."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Sequence[int],
        class_names: tuple[str, ...],
        left_out: Mapping[str, int],
        gone: Collection[str] = (),
    ) -> None:
        self.root = root
        self._gone = frozenset(gone)
        self._names = Texts.of(names)
        self._labels = np.array(labels, np.int64)
        self.class_names = class_names
        self.left_out = left_out

    @property
    def facts(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._names.data.data)
        digest.update(np.concatenate([[0], self._names.ends.astype(np.int64)]).data)
        digest.update(self._labels.data)
        return {"source": str(self.root.resolve()), "listing": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> Labels:
        return self._labels

    def own_name(self, item: int) -> str:
        return self._names[item]

    def name(self, item: int) -> str:
        return f"{self.root}/{self._names[item]}"

    def is_gone(self, item: int) -> bool:
        return self._names[item] in self._gone

    def part(self, items: Labels) -> "ListedImages":
        part = copy(self)
        part._names = Texts.of(self._names[item] for item in items.tolist())
        part._labels = self._labels[items]
        return part

    def bytes_of(self, item: int) -> bytes:
        """The image's file content. May raise OSError."""
        return Path(self.name(item)).read_bytes()

    def read(self, item: int) -> tuple[bytes, str, int]:
        try:
            return self.bytes_of(item), suffix_of(self._names[item]), int(self._labels[item])
        except OSError as error:
            raise UserError(f"{self.name(item)}: {error.strerror or error}") from None


class FolderSource(ListedImages):
    """`root`/CLASS/*.jpg: class numbers follow the sorted class names; files are copied byte for byte.

    `found_bad`: {image: class} of those that an earlier command left out. With the `class_names` of training the
    folders are those classes, and some may be missing.
    """

    def __init__(
        self,
        root: Path,
        found_bad: Mapping[str, str] | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        names: list[str] = []
        labels: list[int] = []
        left_out, empty = left_out_above(root), []
        folders, all_gone = class_folders(root), set[str]()
        if class_names is not None:
            require_classes(root, folders, class_names, subset=True)
        numbers = {canonical(name): number for number, name in enumerate(class_names or folders)}
        for folder in folders:
            listing = list_images(root / folder)
            there = {f"{folder}/{image}" for image in listing.images}
            gone = {image for image in found_bad or () if image.startswith(f"{folder}/")} - there
            all_gone |= gone
            names += sorted(there | gone)
            labels += [numbers[canonical(folder)]] * len(there | gone)
            left_out += listing.left_out
            if not listing.images:
                empty.append(folder)
        if not names:
            flat = list_images(root, below=False).images
            remedy = f"; images without class folders need --labels {root.name}=CSV" if flat else ""
            raise UserError(f"{root}: no images ({SUFFIXES_TEXT}) in class folders{remedy}")
        if empty and class_names is None:
            raise UserError(f"{root}: {len(empty):,} class folders have no image: {few(empty)}")
        super().__init__(root, names, labels, class_names or tuple(folders), left_out, all_gone)


class Part:
    """Some images of a source, in the source's order."""

    def __init__(self, source: "Source", items: Labels, **facts: Any) -> None:
        self._source, self._items = source, items
        self.facts = {**source.facts, **facts}
        self.class_names, self.left_out = source.class_names, source.left_out

    def __len__(self) -> int:
        return len(self._items)

    def own_name(self, item: int) -> str:
        return self._source.own_name(int(self._items[item]))

    def name(self, item: int) -> str:
        return self._source.name(int(self._items[item]))

    def labels(self) -> Labels:
        part: Labels = self._source.labels()[self._items]
        return part

    def is_gone(self, item: int) -> bool:
        return self._source.is_gone(int(self._items[item]))

    def part(self, items: Labels) -> "Source":
        return self._source.part(self._items[items])

    def read(self, item: int) -> tuple[bytes, str, int]:
        return self._source.read(int(self._items[item]))


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

    def __init__(self, name: str, root: Path, choices: Sequence[dict[str, Any]]) -> None:
        self.left_out: Mapping[str, int] = {}
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

    def own_name(self, item: int) -> str:
        return f"{self._name}, image {item}"

    name = own_name

    def is_gone(self, item: int) -> bool:
        return False

    def part(self, items: Labels) -> Source:
        return Part(self, items)

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
