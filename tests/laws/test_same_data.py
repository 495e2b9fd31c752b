"""One directory, read in three ways: class folders in place, packed, and as somebody else's tars."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import png
from PIL import Image
from running import metrics, run_jobs

from dist_trainer.commands.main import dispatch
from dist_trainer.data.decode import decode
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.data.listing import IMAGE_SUFFIXES
from dist_trainer.data.read import Reader
from dist_trainer.errors import UserError
from dist_trainer.shards.prepare import prepare_index
from dist_trainer.storage.cache import CacheConfig
from dist_trainer.storage.retry import RetryConfig

JUNK = ("._0.png", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints/0.png", "@eaDir/0.png", "notes.txt")
FORMATS = ("png", "JPG", "jpeg", "webp", "bmp", "gif", "tif", "ppm", "pgm")


def grow(root: Path) -> Path:
    """Three classes with images of every kind, in folders below too, among what systems leave there."""
    rng = np.random.default_rng(0)
    for name in ("cat ", "dog", "Ünter"):
        (root / name / "more").mkdir(parents=True)
        for number, suffix in enumerate(FORMATS):
            image = Image.fromarray(rng.integers(0, 256, (9, 7 + number, 3), dtype=np.uint8))
            image = image.convert("L") if suffix == "pgm" else image
            image.save(root / name / ("more" if number % 2 else ".") / f"{number}.{suffix}")
        for junk in JUNK:
            (root / name / junk).parent.mkdir(exist_ok=True)
            (root / name / junk).write_bytes(png(rng) if junk.endswith("0.png") else b"x")
    (root / ".git").mkdir()
    (root / "dog" / "again").symlink_to(root / "dog")
    return root


def content(index: ShardIndex) -> Counter[tuple[str, bytes]]:
    """How often each (class, pixels) is there."""
    reader = Reader(index, retry=RetryConfig(), cache=CacheConfig())
    data = reader.read(np.arange(len(index)))
    names = [index.class_names[label] for label in index.samples["label"].tolist()]
    return Counter(
        (name, decode(each, 3).numpy().tobytes())
        for name, each in zip(names, data, strict=True)
        if isinstance(each, bytes)
    )


def test_folders_packs_and_tars_of_others_give_the_same_samples_classes_and_pixels(tmp_path: Path) -> None:
    """And each is there once. Mutations: the listing of one of them knows a suffix less; members go by other rules."""
    root = grow(tmp_path / "raw")
    folders = ShardIndex.load(Path(prepare_index("data.train", str(root))[0]))
    dispatch(["shards", "pack", str(root), str(tmp_path / "packed"), "--samples_per_shard=5"])
    packed = ShardIndex.load(tmp_path / "packed" / "train" / FILE_NAME)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for path in sorted(root.rglob("*"), key=str):
            if path.is_file() and "again" not in path.parts and path.name not in ("Thumbs.db", FILE_NAME):
                tar.add(path, path.relative_to(root))
                label = tarfile.TarInfo(str(path.relative_to(root).with_suffix(".json")))
                data = json.dumps({"species": path.relative_to(root).parts[0]}).encode()
                label.size = len(data)
                tar.addfile(label, io.BytesIO(data))
    dispatch(["shards", "index", str(tmp_path / "tars"), "--label=json:species", "--allow-bad=3"])  # notes.txt
    tars = ShardIndex.load(tmp_path / "tars" / FILE_NAME)
    assert len(folders) == len(packed) == len(tars) - 3 == 3 * len(FORMATS)
    assert content(folders) == content(packed) == content(tars)
    assert len(content(folders)) == 3 * len(FORMATS)
    assert packed.class_names == folders.class_names == ("cat ", "dog", "Ünter")
    own = {folders.describe(sample) for sample in range(len(folders))}
    assert {f"{root}/{packed.source_of(sample)}" for sample in range(len(packed))} == own


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_format_that_is_listed_decodes(suffix: str, tmp_path: Path) -> None:
    """As Pillow wrote it. Fails when a suffix is listed that no decoder of this installation reads."""
    array = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    path = tmp_path / f"a.{suffix}"
    grey = suffix in ("pgm", "pbm")
    try:
        (image.convert("1" if suffix == "pbm" else "L") if grey else image).save(path)
    except (OSError, KeyError, ValueError) as error:  # AVIF came with Pillow 11.3, JPEG 2000 needs its library
        pytest.skip(f"this Pillow does not write {suffix}: {error}")
    pixels = decode(path.read_bytes(), 3)
    with Image.open(path) as opened:
        expected = np.array(opened.convert("RGB"))
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).max() <= (8 if suffix == "webp" else 2)


def test_an_index_goes_on_with_the_listing_that_it_was_made_with(tmp_path: Path) -> None:
    """What an older version did not list, or did, is no change of the data. Mutation: list anew by today's rules."""
    for name in ("a", "b"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "0.png").write_bytes(png(np.random.default_rng(0)))
    path, _ = prepare_index("data.train", str(tmp_path / "d"))
    Image.new("RGB", (2, 2)).save(tmp_path / "d" / "a" / "1.bmp")  # unknown to that version
    replace(ShardIndex.load(Path(path)), listing=1).save(Path(path))
    assert "the same content" in prepare_index("data.train", str(tmp_path / "d"))[1]
    replace(ShardIndex.load(Path(path)), listing=2, stamps=("", "")).save(Path(path))
    with pytest.raises(UserError, match=r"1 new file, such as 1\.bmp"):
        prepare_index("data.train", str(tmp_path / "d"))


def test_validation_without_a_class_is_scored_over_the_others(tmp_path: Path) -> None:
    """With training's class numbers, whether the class's folder is empty or not there: a network that has learned the
    classes has every image right. Mutation: number the folders that are there from 0.
    """
    rng = np.random.default_rng(0)
    for split, names in (("train", "abc"), ("val", "bc"), ("all", "abc")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(8 if name != "a" or split == "train" else 0):
                pixels = np.clip(rng.normal("abc".index(name) * 100 + 20, 10, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    common = [
        "--augment.crop=null", "--eval.resize=null", "--eval.crop=null", "--data.workers=0", "--wandb.mode=disabled",
        "--model.name=small_resnet", "--model.args={in_channels: 3, stem_width: 8, widths: [8], depths: [1]}",
        "--batch.global_batch=8", "--batch.micro_batch=8", "--lr.base=1.0", "--duration=20ep", "--engine.backend=torch",
        "--engine.precision=fp32", f"--data.train={tmp_path / 'train'}", "--eval.train_samples=0", "--eval.every=null",
    ]  # fmt: skip
    jobs = [
        {"name": name, "argv": [*common, f"--data.val={tmp_path / name}", "--eval.classes=subset"]}
        for name in ("val", "all")
    ]
    run_jobs(1, jobs, tmp_path)
    for name in ("val", "all"):
        assert metrics(tmp_path / name, "val/top1")[-1] == 1.0
