"""`shards pack` of a flat folder with a table, of ImageNet's own archives, of torchvision's data sets."""

import io
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import pixels, png
from pack_sources import CLASSES, contents, fill, folder_contents, jpeg, names_in, packed, refused, table
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import GTSRB, EuroSAT, FashionMNIST, ImageNet
from torchvision.datasets import imagenet as torchvision_imagenet

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
        ([("a", "1"), ("b", "2"), ("c", "3")], "3 class numbers, 1 to 3: they must be 0 to 2"),
        ([("a", "1"), ("b", "2"), ("c", "2")], "2 class numbers, 1 to 2: they must be 0 to 2"),
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
