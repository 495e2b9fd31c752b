"""`shards pack`: what it writes, held against webdataset and torchvision; smaller images; what it refuses."""

import io
import json
import resource
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import members_of, message, pixels, png
from pack_sources import CLASSES, contents, fill, folder_contents, jpeg, names_in, packed, refused
from PIL import Image
from torchvision.datasets import ImageFolder

from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.errors import UserError
from dist_trainer.packing.pack import MANIFEST, pack
from dist_trainer.packing.sources import FolderSource
from dist_trainer.packing.write import Recipe

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
    out = capsys.readouterr().out
    assert "4 samples, 2 classes" in out
    assert out.endswith("; 2 other files left out (1 .md, 1 .txt)\n")


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
    assert "only one image" in refused(tmp_path / "raw" / "train", tmp_path / "out", "--val_fraction=0.5")


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
            assert dict(image.getexif()) == ({0x0112: 6} if original is tall else {})  # for data.exif
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
        ("--sed=1", "--sed: no such option; did you mean 'seed'?"),
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


BAD: dict[str, tuple[bytes, str, list[str]]] = {
    "empty": (b"", "does not decode: it is empty", []),
    "a page": (b"<html>404 Not Found</html>", "does not decode: 26 bytes, which begin with b'<html>404 ", []),
    "too wide": (png(np.random.default_rng(0), 1, 65_536), "is 65536 x 1, over 65,535 a side", []),
    "cut short": (jpeg(np.random.default_rng(0), 64, 64)[:1500], "does not decode: image file is truncated", []),
    "a page, to be made smaller": (b"<html>404 Not Found</html>", "does not decode: 26 bytes", ["--max_side=32"]),
}


@pytest.mark.parametrize("case", BAD)
def test_an_image_that_is_none_is_named_by_its_source(tmp_path: Path, case: str) -> None:
    """Its file, not only its place in a shard; the other split is packed all the same.

    Fails when the scan's own message is all that is said, or Pillow's exception gets through.
    """
    for split in ("train", "val"):
        fill(tmp_path / "raw" / split, {"ant": 3, "bee": 3})
    bad = tmp_path / "raw" / "train" / "bee" / "bee_0001.JPEG"
    data, reason, options = BAD[case]
    bad.write_bytes(data)
    with pytest.raises(UserError) as caught:
        packed(tmp_path / "raw", tmp_path / "out", *options)
    first, line = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path / 'raw' / 'train'}: 1 image cannot be used, where --allow_bad is 0; ")
    assert line.startswith(f"  {bad}: {reason}")
    assert not (tmp_path / "out" / "train").exists()
    assert sum(contents(tmp_path / "out" / "val").values()) == 6


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
