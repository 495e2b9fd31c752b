"""`shards pack`: what it writes from each kind of source, held against webdataset and torchvision; what it refuses."""

import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from helpers import members_of, message, pixels, png
from PIL import Image
from running import ROOT
from scipy.io import savemat
from torchvision.datasets import GTSRB, EuroSAT, FashionMNIST, ImageFolder, ImageNet
from torchvision.datasets import imagenet as torchvision_imagenet

from dist_trainer.commands.main import dispatch
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.errors import UserError
from dist_trainer.packing.pack import MANIFEST, Recipe, pack, partial_folder
from dist_trainer.packing.sources import FolderSource
from dist_trainer.packing.splits import find_splits

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    """Tars are written in this process: starting others takes seconds."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


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


# Class folders


def test_train_and_val_are_packed_as_webdataset_and_torchvision_read_them(tmp_path: Path) -> None:
    """Bytes and class numbers of every file; class names in the index and in classes.txt; nothing else in the tars.

    What torchvision sees in the folders is what webdataset, with no option, sees in the tars. Suffixes in any case are
    images. Fails when a label is off by one, an image is encoded again, or `.JPG` is passed over.
    """
    train, val = (fill(tmp_path / "raw" / split, {"ant": 5, "bee": 7, "cat": 6}) for split in ("train", "val"))
    for number, suffix in enumerate(("JPEG", "jpg", "Png", "WEBP", "JPG")):
        Image.new("RGB", (3, number + 1)).save(train / "bee" / f"more_{number}.{suffix}")
    packed(tmp_path / "raw", tmp_path / "out", "--samples_per_shard=9")
    for split, folder in (("train", train), ("val", val)):
        out = tmp_path / "out" / split
        assert contents(out) == folder_contents(folder)
        assert names_in(out) == CLASSES == tuple(ImageFolder(str(folder)).classes)
        assert (out / "classes.txt").read_text().split() == list(CLASSES)
    members = [name for tar in (tmp_path / "out" / "train").glob("*.tar") for name in members_of(tar)]
    keys = {name.partition(".")[0] for name in members}
    assert keys == {f"{number:08d}" for number in range(23)}
    assert len(members) == len(set(members)) == 2 * 23
    assert {Path(name).suffix for name in members} == {".cls", ".jpeg", ".jpg", ".png", ".webp"}


def test_what_is_no_image_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hidden files and folders, and files with other suffixes. Fails when `._ant.JPEG` is taken for an image."""
    fill(tmp_path / "raw", {"ant": 2, "bee": 2})
    for name in ("ant/._ant_0000.png", "ant/Thumbs.db", "bee/list.txt", ".DS_Store", "readme.md"):
        (tmp_path / "raw" / name).write_bytes(b"x")
    (tmp_path / "raw" / ".cache").mkdir()
    packed(tmp_path / "raw", tmp_path / "out")
    assert sum(contents(tmp_path / "out" / "train").values()) == 4
    assert "4 samples, 2 classes, 5 other files ignored" in capsys.readouterr().out


def test_samples_are_shuffled_over_the_tars_under_the_seed(tmp_path: Path) -> None:
    """Fails when the tars hold one class after another, or the seed does nothing."""
    fill(tmp_path / "raw", {"ant": 20, "bee": 20})
    orders = []
    for seed in (0, 1):
        packed(tmp_path / "raw", tmp_path / f"out{seed}", "--seed", seed)
        orders.append(ShardIndex.load(tmp_path / f"out{seed}" / "train" / FILE_NAME).samples["label"].tolist())
        assert json.loads((tmp_path / f"out{seed}" / "train" / MANIFEST).read_text())["seed"] == seed
    assert orders[0] != orders[1]
    assert all(order != sorted(order) and sorted(order) == [0] * 20 + [1] * 20 for order in orders)


def test_validation_with_other_classes_is_refused(tmp_path: Path) -> None:
    """By number and name, either way. Fails when each split counts its own class names."""
    fill(tmp_path / "raw" / "train", {"ant": 1, "bee": 1, "cat": 1})
    fill(tmp_path / "raw" / "val", {"ant": 1, "cow": 1, "dog": 1})
    line = refused(tmp_path / "raw", tmp_path / "out")
    assert line.startswith(f"{tmp_path / 'raw' / 'val'}: ")
    assert "2 are not in training ('cow', 'dog')" in line
    assert "2 of training's 3 have no image ('bee', 'cat')" in line
    assert not (tmp_path / "out").exists()


def test_a_class_folder_without_images_is_refused(tmp_path: Path) -> None:
    """As torchvision does. Fails when it silently becomes a class that no image has."""
    fill(tmp_path / "raw", {"ant": 1, "bee": 0})
    assert "1 class folders have no image: 'bee'" in refused(tmp_path / "raw", tmp_path / "out")


# A flat folder and a table


VARIANTS: dict[str, Callable[[list[tuple[str, str]]], str]] = {
    "bare": lambda rows: "".join(f"{name},{label}\n" for name, label in rows),
    "header": lambda rows: "file,class\n" + "".join(f"{name},{label}\r\n" for name, label in rows),
    "folder": lambda rows: "".join(f"./val/{name},{label}\n" for name, label in rows),
    "no suffix": lambda rows: "image;label\n" + "".join(f"{Path(name).stem};{label}\n" for name, label in rows),
    "blanks": lambda rows: "\ufeff" + "".join(f"{name} {label}\n" for name, label in rows),
    "numbers": lambda rows: "file,class\n" + "".join(f"{n},{CLASSES.index(label)}\n" for n, label in rows),
    "kaggle": lambda rows: (
        "ImageId,PredictionString\n"
        + "".join(f"{Path(name).stem},{label} 85 1 499 272 {label} 3 4 30 44 \n" for name, label in rows)
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_flat_folder_takes_its_classes_from_a_table(tmp_path: Path, variant: str) -> None:
    """Labels are training's, whatever the table looks like; the same images in class folders give the same.

    Fails when the table's order of rows counts instead of its names, or a variant is read another way.
    """
    fill(tmp_path / "raw" / "train", dict.fromkeys(CLASSES, 2))
    folders = fill(tmp_path / "folders", {"ant": 3, "bee": 4, "cat": 2})
    (tmp_path / "raw" / "val").mkdir()
    rows = []
    for number, path in enumerate(sorted(folders.glob("*/*.png"), key=lambda path: path.name[::-1])):
        name = f"val_{number:08d}.PNG"
        (tmp_path / "raw" / "val" / name).write_bytes(path.read_bytes())
        rows.append((name, path.parent.name))
    (tmp_path / "labels.csv").write_text(VARIANTS[variant](rows[::-1]), encoding="utf-8")
    packed(tmp_path / "raw", tmp_path / "out", "--labels", f"val={tmp_path / 'labels.csv'}")
    assert contents(tmp_path / "out" / "val") == folder_contents(folders)
    assert names_in(tmp_path / "out" / "val") == CLASSES


@pytest.mark.parametrize("labels", [("ant", "bee"), ("0", "1")])
def test_a_table_alone_is_for_the_source_itself(tmp_path: Path, labels: tuple[str, str]) -> None:
    """Classes are what the table holds. Fails when a folder of its own is asked for."""
    rng = np.random.default_rng(0)
    (tmp_path / "raw").mkdir()
    images = [png(rng) for _ in range(4)]
    for number, image in enumerate(images):
        (tmp_path / "raw" / f"{number}.png").write_bytes(image)
    file = table(tmp_path / "labels.csv", *((f"{number}.png", labels[number % 2]) for number in range(4)))
    packed(tmp_path / "raw", tmp_path / "out", "--labels", file)
    assert contents(tmp_path / "out" / "train") == Counter({(each, n % 2): 1 for n, each in enumerate(images)})
    assert names_in(tmp_path / "out" / "train") == labels


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a", "ant"), ("b", "bee"), ("c", "cat"), ("x", "cat"), ("y", "cat")], "2 images are not in"),
        ([("a", "ant"), ("b", "bee")], "1 images have no class in"),
        ([("a", "ant"), ("b", "bee"), ("c", "cat"), ("a.png", "bee")], "1 images are named twice: 'a'"),
        ([("a", "ant"), ("b", "bee"), ("c", "cow")], "1 are not in training ('cow'); 1 of training's 3 have no image"),
        ([("a", "ant"), ("b", "bee"), ("c", "bee")], "1 of training's 3 have no image ('cat')"),
        ([("a", "1"), ("b", "2"), ("c", "3")], "3 class numbers, 1 to 3: they must be 0 to 2"),
        ([("a", "0"), ("b", "1"), ("c", "1")], "2 class numbers, 0 to 1: they must be 0 to 2"),
        ([("a", "ant"), ("b", ""), ("c", "cat")], "the row 'b ' is not a file name and a class"),
    ],
)
def test_a_table_that_does_not_fit_the_images_is_refused(
    tmp_path: Path, rows: list[tuple[str, str]], said: str
) -> None:
    """In one line with the number and the first names. Fails when the check that says so is dropped."""
    fill(tmp_path / "raw" / "train", dict.fromkeys(CLASSES, 1))
    (tmp_path / "raw" / "val").mkdir()
    for name in "abc":
        (tmp_path / "raw" / "val" / f"{name}.png").write_bytes(png(np.random.default_rng(0)))
    file = table(tmp_path / "labels.csv", *rows)
    line = refused(tmp_path / "raw", tmp_path / "out", "--labels", f"val={file}")
    assert said in line
    assert str(file) in line


def test_a_flat_folder_without_a_table_says_what_is_missing(tmp_path: Path) -> None:
    """ImageNet's validation set as it comes. Fails when it is taken for a folder without images and no more is said."""
    fill(tmp_path / "raw" / "train", {"ant": 1})
    (tmp_path / "raw" / "val").mkdir()
    (tmp_path / "raw" / "val" / "a.JPEG").write_bytes(b"")
    assert "--labels val=CSV" in refused(tmp_path / "raw", tmp_path / "out")
    assert "no such folder" in refused(tmp_path / "raw" / "train", tmp_path / "out", "--labels", "val=x.csv")
    assert "x.csv: No such file" in refused(tmp_path / "raw", tmp_path / "out", "--labels", "val=x.csv")
    assert "neither a file nor" in refused(tmp_path / "raw", tmp_path / "out", "--labels", "test=x.csv")


# ImageNet's own archives


SYNSETS = [f"n{number:08d}" for number in (1440764, 1443537, 1484850, 2085620, 2099601, 2123045, 2504458, 2690373,
                                           3100240, 7753592)]  # fmt: skip


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def devkit(ids: dict[int, str], truth: list[int]) -> bytes:
    """ILSVRC2012_devkit_t12.tar.gz: the real fields; synsets with ids, then two inner nodes of the tree."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images"]  # fmt: skip
    rows = [(number, wnid, f"word of {wnid}, other", "gloss", 0, [], 0, 5) for number, wnid in ids.items()]
    rows += [(len(ids) + n, f"n9000000{n}", "entity", "gloss", 2, [n, n + 1], 3, 0) for n in (1, 2)]
    synsets = np.empty((len(rows), 1), [(field, object) for field in fields])
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    text = "".join(f"{number}\n" for number in truth)
    top = "ILSVRC2012_devkit_t12"
    return tar_of(
        {
            f"{top}/readme.txt": b"text",
            f"{top}/data/meta.mat": meta.getvalue(),
            f"{top}/data/ILSVRC2012_validation_ground_truth.txt": text.encode(),
        },
        "w:gz",
    )


@pytest.fixture
def ilsvrc(tmp_path: Path) -> Path:
    """The three files of ImageNet, of 10 classes whose ids are not in the order of their synsets."""
    rng = np.random.default_rng(5)
    ids = {int(number) + 1: SYNSETS[place] for place, number in enumerate(rng.permutation(10))}
    truth = [*range(1, 11), *rng.integers(1, 11, 13).tolist()]
    folder = tmp_path / "ilsvrc"
    folder.mkdir()
    train = {
        f"{wnid}.tar": tar_of({f"{wnid}_{n}.JPEG": jpeg(rng, 9 + n) for n in (10, 9, 100)[: 2 + place % 2]})
        for place, wnid in reversed(list(enumerate(SYNSETS)))
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(train))
    val = {f"ILSVRC2012_val_{number + 1:08d}.JPEG": jpeg(rng) for number in rng.permutation(23)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit(ids, truth))
    return folder


def test_imagenets_archives_give_what_torchvision_makes_of_them(
    ilsvrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and class numbers of both splits, the devkit read by torchvision's own code. Nothing is unpacked.

    Fails when the devkit's ids are taken for class numbers, or validation images are counted in the archive's order.
    """
    packed(ilsvrc, tmp_path / "out", "--samples-per-shard", 8)
    assert len(list(ilsvrc.iterdir())) == 3
    monkeypatch.setattr(torchvision_imagenet, "_verify_archive", lambda root, file, md5: None)
    for split in ("train", "val"):
        theirs = ImageNet(str(ilsvrc), split)
        expected = Counter((Path(path).read_bytes(), label) for path, label in theirs.samples)
        assert contents(tmp_path / "out" / split) == expected
        assert list(names_in(tmp_path / "out" / split)) == theirs.wnids == SYNSETS


def test_one_archive_is_packed_alone_and_validation_needs_the_devkit(ilsvrc: Path, tmp_path: Path) -> None:
    """Fails when training asks for the devkit, or validation does not."""
    kit = (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").rename(tmp_path / "kit")
    assert "ILSVRC2012_devkit_t12.tar.gz: missing" in refused(ilsvrc, tmp_path / "out")
    val = (ilsvrc / "ILSVRC2012_img_val.tar").rename(tmp_path / "val.tar")
    packed(ilsvrc, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    (ilsvrc / "ILSVRC2012_img_train.tar").unlink()
    val.rename(ilsvrc / "ILSVRC2012_img_val.tar")
    kit.rename(ilsvrc / "ILSVRC2012_devkit_t12.tar.gz")
    packed(ilsvrc, tmp_path / "alone")
    assert list(names_in(tmp_path / "alone" / "val")) == SYNSETS


def test_scipy_is_named_where_it_is_missing(ilsvrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the ImportError gets through."""
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install 'dist_trainer[imagenet]'" in refused(ilsvrc, tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "cut inside", "header inside", "header", "no tar", "devkit"])
def test_a_damaged_archive_is_refused(ilsvrc: Path, tmp_path: Path, damage: str) -> None:
    """Python's tarfile takes a destroyed header for the end, so half of a class could be lost without a word.

    Fails when what follows the last member is not looked at, or tarfile's exceptions get through.
    """
    path = ilsvrc / "ILSVRC2012_img_train.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        inside = tar.extractfile(members[4])
        assert inside is not None
        with tarfile.open(fileobj=inside) as inner:
            second = members[4].offset_data + inner.getmembers()[1].offset
    if damage == "cut":
        data = data[: members[-1].offset_data + 1000]
    elif damage == "cut inside":  # the class tar's own size, in its header, is right
        data = data[: members[0].offset] + tar_of({members[4].name: bytes(data[members[4].offset_data : second + 600])})
    elif damage == "header inside":
        data[second : second + 512] = bytes(512)
    elif damage == "header":
        data[members[4].offset : members[4].offset_data] = b"\xff" * 512
    elif damage == "no tar":
        data = bytearray(b"<html>403</html>" * 100)
    else:
        path = ilsvrc / "ILSVRC2012_devkit_t12.tar.gz"
        data = bytearray(path.read_bytes()[:300])
    path.write_bytes(data)
    assert refused(ilsvrc, tmp_path / "out").startswith(str(path))
    assert not (tmp_path / "out").exists()


# A part of training as validation


def test_a_part_is_split_off_by_class(tmp_path: Path) -> None:
    """Of n images round(n / 10), of two or more at least one; the parts are disjoint and together everything.

    Another seed draws others. Fails when classes are not drawn from each by itself, or a single image leaves training.
    """
    raw = fill(tmp_path / "raw", {"ant": 1, "bee": 2, "cat": 14, "dog": 16, "eel": 40})
    held = []
    for seed in (0, 1):
        packed(raw, tmp_path / f"out{seed}", "--val-fraction", 0.1, "--seed", seed)
        train, val = (contents(tmp_path / f"out{seed}" / split) for split in ("train", "val"))
        assert Counter(label for _, label in val) == {1: 1, 2: 1, 3: 2, 4: 4}
        assert train + val == folder_contents(raw)
        assert names_in(tmp_path / f"out{seed}" / "val") == ("ant", "bee", "cat", "dog", "eel")
        held.append(val)
    assert held[0] != held[1]


def test_a_fraction_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """Fails when a validation set that is there is left out, or everything may be held back."""
    for split in ("train", "val"):
        fill(tmp_path / "raw" / split, {"ant": 1, "bee": 1})
    assert "of its own" in refused(tmp_path / "raw", tmp_path / "out", "--val_fraction=0.5")
    assert "between 0 and 1" in refused(tmp_path / "raw" / "train", tmp_path / "out", "--val_fraction=1.0")
    assert "one image alone" in refused(tmp_path / "raw" / "train", tmp_path / "out", "--val_fraction=0.5")


# Smaller images


def test_max_side_makes_large_images_smaller_and_leaves_the_others(tmp_path: Path) -> None:
    """The longer side is max_side, the aspect kept, the filter Pillow's LANCZOS; small ones byte for byte.

    Fails when the shorter side is limited, EXIF turns an image, a small image is encoded again, or BICUBIC is used.
    """
    rng = np.random.default_rng(0)
    folder = tmp_path / "raw" / "ant"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    tall, wide = (Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((600, 300), (200, 640)))
    tall.convert("RGB").save(folder / "a_tall.JPEG", quality=95, exif=exif)
    wide.convert("RGBA").save(folder / "b_wide.png")
    wide.convert("CMYK").save(folder / "c_cmyk.jpg", quality=95)
    (folder / "d_small.jpg").write_bytes(jpeg(rng, 256, 100))
    (folder / "e_small.webp").write_bytes(png(rng, 30, 256))
    packed(tmp_path / "raw", tmp_path / "out", "--max-side=256", "--quality=90")
    tar = tmp_path / "out" / "train" / "000000.tar"
    with tarfile.open(tar) as opened:
        files = {name: opened.extractfile(name) for name in opened.getnames()}
        data = {name: file.read() for name, file in files.items() if file is not None}
    assert {name for name in data if not name.endswith("cls")} == {
        *(f"0000000{number}.jpg" for number in range(4)), "00000004.webp"
    }  # fmt: skip
    assert data["00000003.jpg"] == (folder / "d_small.jpg").read_bytes()
    assert data["00000004.webp"] == (folder / "e_small.webp").read_bytes()
    for name, size, original in (
        ("00000000", (128, 256), tall),
        ("00000001", (256, 80), wide),
        ("00000002", (256, 80), wide),
    ):
        with Image.open(io.BytesIO(data[f"{name}.jpg"])) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
            assert not image.getexif()
        errors = {}
        for filter in Image.Resampling:
            expected = np.array(original.convert("RGB").resize(size, filter)).transpose(2, 0, 1).astype(float)
            errors[filter.name] = np.abs(pixels(data[f"{name}.jpg"]) - expected).mean()
        assert min(errors, key=errors.__getitem__) == "LANCZOS", "of 256 levels; what is left is that of JPEG"
        assert errors["LANCZOS"] < 5
    index = ShardIndex.load(tmp_path / "out" / "train" / FILE_NAME)
    assert max(index.samples["width"].max(), index.samples["height"].max()) == 256
    manifest = json.loads((tmp_path / "out" / "train" / MANIFEST).read_text())
    assert (manifest["max_side"], manifest["quality"]) == (256, 90)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--quality=90", "--quality: "), ("--quality=101 --max_side=9", "--quality: 101"),
        ("--max_side=0", "--max_side: 0"), ("--samples-per-shard=0", "--samples_per_shard: 0"),
        ("--sed=1", "--sed: no such key"),
    ],
)  # fmt: skip
def test_options_without_sense_are_refused(tmp_path: Path, argument: str, said: str) -> None:
    fill(tmp_path / "raw", {"ant": 1})
    assert refused(tmp_path / "raw", tmp_path / "out", *argument.split()).startswith(said)


# What is no image, and what the file system refuses


def test_images_of_an_unexpected_kind_are_taken_as_they_are(tmp_path: Path) -> None:
    """CMYK, a PNG called .JPEG, EXIF: byte for byte. Fails when something is decoded on the way."""
    rng = np.random.default_rng(3)
    folder = tmp_path / "raw" / "ant"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "cmyk.JPEG").write_bytes(jpeg(rng, mode="CMYK"))
    (folder / "png.JPEG").write_bytes(png(rng))
    (folder / "exif.JPEG").write_bytes(jpeg(rng, exif=exif))
    packed(tmp_path / "raw", tmp_path / "out")
    assert contents(tmp_path / "out" / "train") == folder_contents(tmp_path / "raw")


BAD: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", []),
    "a page": (b"<html>404 Not Found</html>", []),
    "too wide": (png(np.random.default_rng(0), 1, 65_536), []),
    "cut short": (jpeg(np.random.default_rng(0), 64, 64)[:1500], ["--max_side=32"]),
    "a page, to be made smaller": (b"<html>404 Not Found</html>", ["--max_side=32"]),
}


@pytest.mark.parametrize("case", BAD)
def test_an_image_that_is_none_is_named_by_its_source(tmp_path: Path, case: str) -> None:
    """Its file, not only its place in a shard. One that is cut short is noticed where it has to be decoded.

    Fails when the scan's own message is all that is said, or Pillow's exception gets through.
    """
    fill(tmp_path / "raw", {"ant": 3, "bee": 3})
    bad = tmp_path / "raw" / "bee" / "bee_0001.JPEG"
    data, options = BAD[case]
    bad.write_bytes(data)
    line = refused(tmp_path / "raw", tmp_path / "out", *options)
    assert line.startswith(f"{bad}: ")
    assert not (tmp_path / "out" / "train").exists()


def test_a_file_that_vanishes_or_a_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    """One line, no OUT/train; when the cause is gone the same command goes on. A limit on file size acts as the disk.

    Fails when a shard gets its name before all of it is written.
    """
    raw = fill(tmp_path / "raw", {"ant": 8, "bee": 8})
    out, recipe = tmp_path / "out" / "train", Recipe(samples_per_shard=4)
    gone = raw / "bee" / "bee_0003.png"
    source, data = FolderSource(raw), gone.read_bytes()
    gone.unlink()
    with pytest.raises(UserError, match="No such file") as caught:
        list(pack(source, out, recipe, num_processes=1))
    assert message(caught).startswith(f"{gone}: ")
    gone.write_bytes(data)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large") as caught:
            list(pack(source, out, recipe, num_processes=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message(caught)
    assert not out.exists()
    assert sum(pack(source, out, recipe, num_processes=1)) == 16
    assert contents(out) == folder_contents(raw)
    assert [path.name for path in out.parent.iterdir()] == ["train"]


def test_an_out_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """Fails when the OSError gets through. The parent is a file: root may write everywhere else."""
    fill(tmp_path / "raw", {"ant": 1})
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(tmp_path / "raw", tmp_path / "file" / "out")


# Going on, and never overwriting


def test_pack_refuses_to_overwrite(tmp_path: Path) -> None:
    """Also what the very same command has made. Fails when an existing folder is replaced, or added to."""
    fill(tmp_path / "raw", {"ant": 3})
    packed(tmp_path / "raw", tmp_path / "out")
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in (tmp_path / "out" / "train").iterdir()}
    for options in ([], ["--seed=1"]):
        assert refused(tmp_path / "raw", tmp_path / "out", *options).startswith(f"{tmp_path / 'out' / 'train'}: exists")
    with pytest.raises(UserError, match="exists"):
        next(pack(FolderSource(tmp_path / "raw"), tmp_path / "out" / "train", Recipe(), num_processes=1))
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in (tmp_path / "out" / "train").iterdir()} == before


def test_a_command_that_was_killed_between_its_splits_goes_on_with_the_second(tmp_path: Path) -> None:
    """Training, finished by the same command, is left alone; one made in another way is refused before anything runs.

    Fails when the first split has to be removed before the second can be packed.
    """
    for split in ("train", "val"):
        fill(tmp_path / "raw" / split, {"ant": 3})
    splits = find_splits(str(tmp_path / "raw"))
    list(pack(splits["train"], tmp_path / "out" / "train", Recipe(), num_processes=1))
    before = (tmp_path / "out" / "train" / "000000.tar").stat()
    assert "exists" in refused(tmp_path / "raw", tmp_path / "out", "--seed=1")
    assert not (tmp_path / "out" / "val").exists()
    packed(tmp_path / "raw", tmp_path / "out")
    assert (tmp_path / "out" / "train" / "000000.tar").stat() == before
    assert contents(tmp_path / "out" / "val") == folder_contents(tmp_path / "raw" / "val")


def test_a_killed_pack_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL in the middle, workers included; then the same command: finished tars keep their inode and time.

    One image is a pipe that nobody writes to: the run that is killed finishes all shards but that one. The result is
    an undisturbed run's, byte for byte. Another seed starts over and says so. Fails when tars are written anew, or a
    half-written one is taken for whole.
    """
    raw = fill(tmp_path / "raw", {"ant": 30, "bee": 30})
    stuck = raw / "ant" / "ant_0007.png"
    data = stuck.read_bytes()
    packed(raw, tmp_path / "undisturbed", "--samples_per_shard=7")
    stuck.unlink()
    os.mkfifo(stuck)
    argv = ["shards", "pack", str(raw), str(tmp_path / "out"), "--samples_per_shard=7"]
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the child may start two workers
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_trainer", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    partial = partial_folder(tmp_path / "out" / "train")
    shards = {path.name for path in (tmp_path / "undisturbed" / "train").glob("*.tar")}
    wanted = len(shards) - 1 if len(os.sched_getaffinity(process.pid)) > 1 else 1
    try:
        deadline = time.monotonic() + 120
        while len(list(partial.glob("*.tar"))) < wanted:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    while _alive(process.pid):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    finished = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in partial.glob("*.tar")}
    assert list(partial.glob("*.part"))
    assert not (tmp_path / "out" / "train").exists()
    stuck.unlink()
    stuck.write_bytes(data)
    assert dispatch(argv) == 0
    assert f"goes on, {wanted} tars are there" in capsys.readouterr().out
    for path in (tmp_path / "undisturbed" / "train").iterdir():
        other = tmp_path / "out" / "train" / path.name
        if path.name in finished:
            assert (other.stat().st_ino, other.stat().st_mtime_ns) == finished[path.name]
        if path.name != FILE_NAME:  # it has the tars' times of change
            assert other.read_bytes() == path.read_bytes()
    indices = [ShardIndex.load(tmp_path / name / "train" / FILE_NAME) for name in ("out", "undisturbed")]
    assert indices[0].fingerprint == indices[1].fingerprint


def _alive(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def test_another_recipe_starts_over_and_says_so(tmp_path: Path) -> None:
    """Also a source that gained a file. Fails when tars of another seed are taken into the result."""
    raw = fill(tmp_path / "raw", {"ant": 6, "bee": 6})
    out = tmp_path / "out" / "train"
    said: list[str] = []
    for recipe in (Recipe(samples_per_shard=4, seed=1), Recipe(samples_per_shard=4)):
        run = pack(FolderSource(raw), out, recipe, num_processes=1, say=said.append)
        assert next(run) == 4
        run.close()
    assert said == [f"{partial_folder(out)}: starts over: what was there had another seed"]
    (raw / "ant" / "new.png").write_bytes(png(np.random.default_rng(0)))
    list(pack(FolderSource(raw), out, Recipe(samples_per_shard=4), num_processes=1, say=said.append))
    assert "another listing, samples" in said[1]
    assert contents(out) == folder_contents(raw)


def test_two_runs_do_not_pack_into_the_same_folder(tmp_path: Path) -> None:
    """Fails when the second deletes what the first writes."""
    raw = fill(tmp_path / "raw", {"ant": 6})
    first = pack(FolderSource(raw), tmp_path / "out", Recipe(samples_per_shard=2), num_processes=1)
    next(first)
    with pytest.raises(UserError, match="another process packs into it") as caught:
        next(pack(FolderSource(raw), tmp_path / "out", Recipe(samples_per_shard=2), num_processes=1))
    message(caught)
    list(first)
    assert contents(tmp_path / "out") == folder_contents(raw)


# torchvision's data sets


def test_torchvisions_data_sets_keep_their_pixels_and_labels(tmp_path: Path) -> None:
    """One with `train`, one with `split` and no validation, one without splits; against what torchvision gives.

    Fails when test images are taken for training, or an image loses anything by its encoding as PNG.
    """
    rng = np.random.default_rng(0)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 12), ("t10k", 5)):
        head = b"".join(number.to_bytes(4) for number in (0x803, count, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + rng.bytes(count * 28 * 28))
        labels = bytes(rng.integers(0, 10, count).tolist())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(b"".join(n.to_bytes(4) for n in (0x801, count)) + labels)
    fill(tmp_path / "gtsrb" / "GTSRB" / "Training", {"00000": 2, "00001": 3}, "ppm")
    fill(tmp_path / "gtsrb" / "GTSRB" / "Final_Test", {"Images": 4}, "ppm")
    rows = [("Filename;x", "ClassId"), *((f"Images_{n:04d}.ppm;x", str(n % 2)) for n in range(4))]
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("".join(f"{a};{b}\n" for a, b in rows))
    fill(tmp_path / "eurosat" / "2750", {"Crop": 4, "River": 6}, "png")
    for name, theirs in (
        ("FashionMNIST", [FashionMNIST(str(tmp_path), train=True), FashionMNIST(str(tmp_path), train=False)]),
        ("GTSRB", [GTSRB(str(tmp_path), "train"), GTSRB(str(tmp_path), "test")]),
        ("EuroSAT", [EuroSAT(str(tmp_path))]),
    ):
        packed(f"torchvision/{name}", tmp_path / "out" / name, "--root", tmp_path)
        assert [path.name for path in sorted((tmp_path / "out" / name).iterdir())] == ["train", "val"][: len(theirs)]
        for split, data in zip(("train", "val"), theirs, strict=False):
            ours = contents(tmp_path / "out" / name / split)
            found = Counter((pixels(image).tobytes(), label) for image, label in ours.elements())
            assert found == Counter((pixels_of(image), label) for image, label in data)
    packed("torchvision/EuroSAT", tmp_path / "parts", "--root", tmp_path, "--val-fraction=0.5")
    train, val = (contents(tmp_path / "parts" / split) for split in ("train", "val"))
    assert Counter(label for _, label in val) == {0: 2, 1: 3}
    assert train + val == contents(tmp_path / "out" / "EuroSAT" / "train")


def pixels_of(image: Image.Image) -> bytes:
    return np.array(image.convert("RGB")).transpose(2, 0, 1).tobytes()


def test_a_torchvision_data_set_that_there_is_not_is_refused(tmp_path: Path) -> None:
    """Fails when an AttributeError or torchvision's own exception gets through."""
    line = refused("torchvision/FashionMNST", tmp_path / "out", "--root", tmp_path)
    assert "did you mean 'FashionMNIST'?" in line
    assert "--root" in refused("torchvision/FashionMNIST", tmp_path / "out")
    assert "labels of its own" in refused("torchvision/MNIST", tmp_path, "--root", tmp_path, "--labels=x.csv")
    assert "no such data set" in refused("torchvision/FakeData", tmp_path / "out", "--root", tmp_path)
