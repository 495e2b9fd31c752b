"""Sources for the tests of packing, and what is in the tars that come of them."""

import csv
import io
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from helpers import message, png
from PIL import Image
from torchvision.datasets import ImageFolder

from dist_trainer.commands.main import dispatch
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.errors import UserError

CLASSES = ("ant", "bee", "cat")


def jpeg(rng: np.random.Generator, height: int = 8, width: int = 8, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    array = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    Image.fromarray(array.squeeze(), mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def fill(folder: Path, counts: dict[str, int], suffix: str = "png") -> Path:
    """`folder`/CLASS/CLASS_0000.png ..., every image another one."""
    rng = np.random.default_rng(sum(map(ord, str(folder.name))))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{name}_{number:04d}.{suffix}").write_bytes(png(rng, 4, 5))
    return folder


def contents(folder: Path) -> Counter[tuple[bytes, int]]:
    """How often each (image, class number) is in the tars of `folder`, as webdataset reads them with no option."""
    found: Counter[tuple[bytes, int]] = Counter()
    for tar in sorted(folder.glob("*.tar")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no shuffling was asked for
            for sample in webdataset.WebDataset(str(tar)):
                (suffix,) = {key for key in sample if not key.startswith("__")} - {"cls"}
                found[sample[suffix], int(sample["cls"])] += 1
    return found


def folder_contents(folder: Path) -> Counter[tuple[bytes, int]]:
    """The same of class folders, as torchvision reads them."""
    return Counter((Path(path).read_bytes(), label) for path, label in ImageFolder(str(folder)).samples)


def packed(*argv: object) -> None:
    assert dispatch(["shards", "pack", *(str(arg) for arg in argv)]) == 0


def refused(*argv: object) -> str:
    with pytest.raises(UserError) as caught:
        dispatch(["shards", "pack", *(str(arg) for arg in argv)])
    return message(caught)


def names_in(folder: Path) -> tuple[str, ...]:
    return ShardIndex.load(folder / FILE_NAME).class_names


def table(path: Path, *rows: tuple[str, str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path
