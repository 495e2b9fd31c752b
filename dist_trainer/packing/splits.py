"""From SOURCE of `shards pack` to training and validation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dist_trainer.draws import SPLIT, permutation
from dist_trainer.errors import UserError
from dist_trainer.packing.imagenet import ARCHIVES, imagenet_split
from dist_trainer.packing.label_table import LabelledFolder
from dist_trainer.packing.sources import FolderSource, ListedImages, Part, Source, require_classes, torchvision_splits
from dist_trainer.shards.classes import few

SPLITS = ("train", "val")


def _label_tables(labels: Sequence[str]) -> dict[str, Path]:
    """{"train": CSV, "val": CSV} of `SPLIT=CSV`; of a CSV alone {"": CSV}, which means SOURCE itself."""
    tables: dict[str, Path] = {}
    for text in labels:
        split, equals, file = text.partition("=")
        if not equals or Path(text).exists():
            split, file = "", text
        elif split not in SPLITS:
            raise UserError(f"--labels: {text!r} is neither a file nor train=CSV or val=CSV")
        if split in tables or (tables and "" in {split, *tables}):
            raise UserError(
                f"--labels: {text!r} is one too many: one for train and one for val, or one for SOURCE itself"
            )
        tables[split] = Path(file)
    return tables


def _folder_splits(
    folder: Path, tables: dict[str, Path], found_bad: Mapping[str, Mapping[str, str]]
) -> dict[str, Source]:
    def bad(place: Path) -> Mapping[str, str]:
        return found_bad.get(str(place.resolve()), {})

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with class folders, or torchvision/NAME")
    if "" in tables:
        return {"train": LabelledFolder(folder, tables[""], found_bad=bad(folder))}
    splits: dict[str, Source] = {}
    for split in SPLITS:
        if split in tables:
            if not (folder / split).is_dir():
                raise UserError(f"--labels {split}={tables[split]}: {folder / split}: no such folder")
            names = splits["train"].class_names if "train" in splits else None
            splits[split] = LabelledFolder(folder / split, tables[split], names, bad(folder / split))
        elif (folder / split).is_dir():
            names = splits["train"].class_names if "train" in splits else None
            splits[split] = FolderSource(folder / split, bad(folder / split), names)
        elif (folder / ARCHIVES[split]).is_file():
            splits[split] = imagenet_split(folder, split)
    return splits or {"train": FolderSource(folder, bad(folder))}


def find_splits(
    source: str,
    root: Path | None = None,
    *,
    labels: Sequence[str] = (),
    val_fraction: float | None = None,
    seed: int = 0,
    found_bad: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Source]:
    """{"train": ..., "val": ...}, or one of them, from SOURCE of `shards pack`.

    That is `torchvision/NAME` with its files in `root`, or a folder: with train/ and val/, each of class folders or
    with a table in `labels` (`SPLIT=CSV`); of class folders, or with a table (`CSV`); with ILSVRC2012_*.tar.
    `val_fraction` takes validation out of training. `found_bad`: {source: {image: class}} of those that the same
    command left out before, which keep their numbers when they are removed. Raises UserError where training and
    validation differ in classes.
    """
    tables = _label_tables(labels)
    if source.startswith("torchvision/"):
        if root is None:
            raise UserError(f"{source}: --root must say where its files are, or where to download them to")
        if tables:
            raise UserError(f"--labels: {source} has labels of its own")
        splits = torchvision_splits(source.removeprefix("torchvision/"), root)
    else:
        try:
            splits = _folder_splits(Path(source), tables, found_bad or {})
        except OSError as error:
            raise UserError(f"{error.filename or source}: {error.strerror or error}") from None
    if val_fraction is not None:
        if "val" in splits:
            raise UserError(f"--val_fraction: {source} has images for validation of its own")
        return split_off(splits["train"], val_fraction, seed)
    if len(splits) == len(SPLITS):
        require_classes(splits["val"].facts["source"], splits["val"].class_names, splits["train"].class_names)
    return splits


def lacking(source: Source) -> str | None:
    """A line about classes without an image, which validation may have."""
    if not isinstance(source, ListedImages):
        return None
    counts = np.bincount(source.labels(), minlength=len(source.class_names))
    names = [source.class_names[number] for number in np.flatnonzero(counts == 0)]
    if not names:
        return None
    return (
        f"warning: {source.root}: {len(names):,} of {len(counts):,} classes have no image ({few(names)}); "
        "top-1 will be over the others"
    )


def split_off(source: Source, fraction: float, seed: int) -> dict[str, Source]:
    """{"train": ..., "val": ...}: of every class round(fraction * images) for validation, drawn under `seed`.

    A class of two or more images gives at least one and keeps at least one; a single image stays in training.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--val_fraction: {fraction} is not between 0 and 1")
    labels = source.labels()
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    held = np.zeros(len(labels), bool)
    for label, items in enumerate(by_class):
        count = len(items)
        taken = min(max(round(count * fraction), 1), count - 1)
        if taken > 0:
            held[items[permutation(count, SPLIT, seed, label)[:taken]]] = True
    if not held.any():
        raise UserError("--val_fraction: every class has only one image, which training keeps")
    return {
        "train": Part(source, np.flatnonzero(~held), val_fraction=fraction),
        "val": Part(source, np.flatnonzero(held), val_fraction=fraction),
    }
