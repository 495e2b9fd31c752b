"""Tars and their index: what the index says, and what `scan`, the index and the reader refuse."""

import io
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    flip_byte,
    index_of,
    members_of,
    message,
    pack_images,
    pixels,
    png,
    write_tar,
)
from PIL import Image

from dist_trainer.data.augment import CenterCrop
from dist_trainer.data.batch import EvalAddress
from dist_trainer.data.config import DataConfig
from dist_trainer.data.index import FILE_NAME, SAMPLE, ShardIndex
from dist_trainer.data.read import Bad, Reader
from dist_trainer.data.samples import EvalSamples
from dist_trainer.errors import UserError
from dist_trainer.storage.cache import CacheConfig
from dist_trainer.storage.retry import RetryConfig

pytestmark = pytest.mark.filterwarnings("ignore:WebDataset:UserWarning")  # it is used without options on purpose
NUM_SAMPLES, NUM_CLASSES = 23, 3


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images of 3 classes in 3 tars; the sources lie in ../images."""
    folder = tmp_path_factory.mktemp("shards")
    return pack_images(folder, num_samples=NUM_SAMPLES, num_classes=NUM_CLASSES, per_shard=9)


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """The packed folder, to be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return message(caught)


def test_the_index_says_what_pythons_tarfile_says(packed: Path) -> None:
    """Offset, length, crc32, label, width and height of every sample; first sample and size of every tar.

    Fails when an offset is that of the header, or samples are counted before an empty rest of a shard.
    """
    index = ShardIndex.load(packed / FILE_NAME)
    assert index.class_names == ("class_0", "class_1", "class_2")
    assert index.shards == ("000000.tar", "000001.tar", "000002.tar")
    assert index.counts.tolist() == [9, 9, 5]
    expected = []
    for name, size in zip(index.shards, index.sizes.tolist(), strict=True):
        data = (packed / name).read_bytes()
        assert size == len(data)
        members = members_of(packed / name)
        for member in members.values():
            if member.name.endswith(".png"):
                image = data[member.offset_data : member.offset_data + member.size]
                label = members[member.name.replace(".png", ".cls")]
                width, height = Image.open(io.BytesIO(image)).size
                number = int(data[label.offset_data : label.offset_data + label.size])
                expected.append((member.offset_data, member.size, number, zlib.crc32(image), width, height))
    assert index.samples.tolist() == expected


def test_the_fingerprint_is_that_of_the_samples_not_of_their_place(packed: Path, copy: Path) -> None:
    """Fails when the folder or a modification time enters the fingerprint, or a label does not."""
    index = ShardIndex.load(packed / FILE_NAME)
    assert ShardIndex.load(copy / FILE_NAME).fingerprint == index.fingerprint
    labels = index.samples.copy()
    labels["label"][4] += 1
    assert replace(index, samples=labels).fingerprint != index.fingerprint


IMAGE = png(np.random.default_rng(2))
CONFIG = DataConfig(train="", val="")
A = [("a.cls", b"0"), ("a.png", IMAGE)]

# What the index and the reader refuse


@pytest.mark.parametrize("damage", ["truncated", "flipped in a column", "no safetensors", "empty"])
def test_a_damaged_index_is_refused(copy: Path, damage: str) -> None:
    """Fails when the columns are not held against the fingerprint, or safetensors' own exception gets through."""
    path = copy / FILE_NAME
    data = path.read_bytes()
    start = int.from_bytes(data[:8], "little") + 8
    column = start + json.loads(data[8:start])["samples"]["data_offsets"][0] + 100
    if damage == "flipped in a column":
        flip_byte(path, column)
    else:
        path.write_bytes({"truncated": data[:column], "no safetensors": b"x" * 300, "empty": b""}[damage])
    text = refused(lambda: ShardIndex.load(path))
    assert text.startswith(f"{path}: ")
    assert "damaged" in text


def test_a_flipped_byte_of_an_image_is_reported_with_tar_and_sample(copy: Path) -> None:
    """Every other sample still reads. Fails when the checksum is not compared."""
    index = ShardIndex.load(copy / FILE_NAME)
    sample = 11  # the third of 000001.tar, which holds samples 9 to 17
    place = int(index.samples["offset"][sample])
    flip_byte(copy / "000001.tar", place + 40)
    reader = Reader(index, retry=RetryConfig(), cache=CacheConfig())
    others = [i for i in range(NUM_SAMPLES) if i != sample]
    assert all(isinstance(data, bytes) for data in reader.read(np.array(others)))
    assert reader.read(np.array([0, sample]))[1] == Bad("crc", "the bytes are not those that were indexed")
    assert index.describe(sample) == f"{copy / '000001.tar'}, sample 2 at byte {place} ({index.source_of(sample)})"


def test_an_unreadable_image_loses_its_weight_and_is_named(tmp_path: Path) -> None:
    """A web page called .jpg, indexed with its own checksum, beside a good image whose pixels and label it takes.

    Fails when a decoder's exception leaves the loader, the sample counts, or its name is lost.
    """
    page = b"<html>404 Not Found</html>"
    path = write_tar(tmp_path / "page.tar", [*A, ("b.cls", b"1"), ("b.jpg", page)])
    places = [(members_of(path)[name].offset_data, data) for name, data in (("a.png", IMAGE), ("b.jpg", page))]
    rows = [(place, len(data), label, zlib.crc32(data), 8, 8) for label, (place, data) in enumerate(places)]
    size = path.stat().st_size
    index = ShardIndex(
        root=str(tmp_path),
        shards=(path.name,),
        stamps=("",),
        sizes=np.array([size]),
        first=np.array([0, 2]),
        samples=np.array(rows, SAMPLE),
        class_names=("zero", "one"),
    )
    samples = EvalSamples(index, CONFIG, CenterCrop(None, None))
    batch = samples[EvalAddress(0, 2)]
    assert batch.problem is None
    assert all(np.array_equal(image.numpy(), pixels(IMAGE)) for image in batch.images)
    assert (batch.weight.tolist(), batch.labels.tolist(), batch.num_valid) == ([1.0, 0.0], [0, 0], 1)
    (bad,) = batch.bad
    assert (bad.sample, bad.kind, bad.shard) == (1, "decode", str(path))
    assert "\n" not in bad.reason
    alone = samples[EvalAddress(1, 1)]  # nothing good in the batch: blank, once a shape is known
    assert (alone.weight.tolist(), int(alone.images.sum()), len(alone.bad)) == ([0.0], 0, 1)


def test_images_of_two_sizes_in_one_batch_are_a_problem_that_names_the_remedy(tmp_path: Path) -> None:
    """Fails when the first image's shape is assumed for all."""
    rng = np.random.default_rng(0)
    path = write_tar(tmp_path / "two.tar", [*A, ("b.cls", b"1"), ("b.png", png(rng, 8, 9))])
    problem = EvalSamples(index_of(path), CONFIG, CenterCrop(None, None))[EvalAddress(0, 2)].problem
    assert problem is not None
    assert "augment.crop" in problem
