"""Tars and their index: what `pack` writes, and what `scan`, the index and the reader refuse."""

import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from helpers import Members, index_of, members_of, message, pack_images, pixels, png, sample_members, write_tar
from PIL import Image

from dist_trainer.data.augment import CenterCrop
from dist_trainer.data.index import FILE_NAME, SAMPLE, ShardIndex
from dist_trainer.data.pack import FolderSource, pack
from dist_trainer.data.read import TarReader
from dist_trainer.data.scan import scan_tar
from dist_trainer.data.sources import prepare_index
from dist_trainer.data.stream import EvalAddress, EvalSamples
from dist_trainer.errors import UserError

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


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# What pack writes


def test_packed_tars_are_plain_webdataset_tars(packed: Path) -> None:
    """webdataset with no option reads every image and label of the folder, byte for byte, and nothing else.

    Fails when a label is off by one, an image is encoded again, or another member is added.
    """
    files = sorted((packed.parent / "images").glob("*/*.png"))
    seen = set()
    for sample in webdataset.WebDataset(str(packed / "{000000..000002}.tar")):
        assert {key for key in sample if not key.startswith("__")} == {"png", "cls"}
        number = int(sample["__key__"])
        seen.add(number)
        assert sample["png"] == files[number].read_bytes()
        assert files[number].parent.name == f"class_{int(sample['cls'])}"
    assert len(seen) == NUM_SAMPLES
    names = [name for tar in sorted(packed.glob("*.tar")) for name in members_of(tar)]
    assert sorted(names) == sorted(f"{n:08d}.{suffix}" for n in range(NUM_SAMPLES) for suffix in ("cls", "png"))


def test_samples_are_shuffled_over_the_tars(packed: Path) -> None:
    """Fails when the tars hold one class after another."""
    labels = ShardIndex.load(packed / FILE_NAME).samples["label"].tolist()
    assert labels != sorted(labels)
    assert [labels.count(label) for label in range(NUM_CLASSES)] == [8, 8, 7]


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


def test_pack_refuses_to_overwrite(packed: Path) -> None:
    """Fails when an existing folder is replaced, or added to."""
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    source = FolderSource(packed.parent / "images")
    text = refused(lambda: list(pack(source, packed, samples_per_shard=4, seed=1, num_processes=1)))
    assert text.startswith(f"{packed}: exists")
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before


# What scan refuses


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """Six whole samples: 000.cls, 000.png, 001.cls, ..."""
    return write_tar(tmp_path / "six.tar", sample_members(6))


def count_by_webdataset(path: Path) -> int:
    return sum(1 for _ in webdataset.WebDataset(str(path)))


@pytest.mark.parametrize("block", [b"\xff" * 512, bytes(512)], ids=["overwritten", "zeroed"])
def test_a_destroyed_header_is_named_where_webdataset_reads_fewer_samples(tar: Path, block: bytes) -> None:
    """The header of the fourth sample is destroyed: webdataset gives 3 of 6 samples and no error.

    Fails when the scan does not look behind the member after which tarfile stops.
    """
    assert (len(scan_tar(tar).samples), count_by_webdataset(tar)) == (6, 6)
    place = members_of(tar)["003.cls"].offset
    with tar.open("r+b") as file:
        file.seek(place)
        file.write(block)
    assert count_by_webdataset(tar) == 3
    text = refused(lambda: scan_tar(tar))
    assert text.startswith(f"{tar}: at byte {place}: ")
    assert "destroyed header" in text


def test_a_tar_that_is_cut_inside_a_member_is_refused(tar: Path) -> None:
    """Fails when the last member's end is not held against the size of the file."""
    member = members_of(tar)["003.png"]
    with tar.open("r+b") as file:
        file.truncate(member.offset_data + member.size // 2)
    assert refused(lambda: scan_tar(tar)).startswith(f"{tar}: at byte {member.offset}: '003.png' is cut short")


def test_a_tar_that_is_cut_between_two_samples_is_refused(tar: Path) -> None:
    """Only the end marker is missing; webdataset reads on as if nothing were.

    Fails when the two zero blocks at the end are not required.
    """
    place = members_of(tar)["003.cls"].offset
    with tar.open("r+b") as file:
        file.truncate(place)
    assert count_by_webdataset(tar) == 3
    text = refused(lambda: scan_tar(tar))
    assert text.startswith(f"{tar}: at byte {place}: ")
    assert "end marker is missing" in text


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    """Fails when tarfile's own exceptions get through."""
    for name, data in (("empty.tar", b""), ("text.tar", b"not a tar " * 200)):
        (tmp_path / name).write_bytes(data)
        assert refused(lambda path=tmp_path / name: scan_tar(path)).startswith(f"{tmp_path / name}: ")


def huge_jpeg() -> bytes:
    """The header of a JPEG of 65,000 x 65,000 pixels: its size is changed in the frame header."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    before, marker, after = buffer.getvalue().partition(b"\xff\xc0")
    return before + marker + after[:3] + (65_000).to_bytes(2) * 2 + after[7:]


IMAGE = png(np.random.default_rng(2))
A, B = [("a.cls", b"0"), ("a.png", IMAGE)], [("b.cls", b"1"), ("b.png", IMAGE)]


@pytest.mark.parametrize(
    ("members", "at", "reason"),
    [
        ([*A, *A], "a.cls", "sample 'a' has two labels"),
        ([A[1], A[1], A[0]], "a.png", "sample 'a' has two images"),
        ([*A, *B, A[0]], "a.cls", "key 'a' comes again"),
        ([*A, B[1]], "b.png", "sample 'b' has no label"),
        ([*A, B[0]], "b.cls", "sample 'b' has no image"),
        ([("a.cls", b"tench"), A[1]], "a.cls", "the label of sample 'a' is 'tench'"),
        ([("a.cls", b"-1"), A[1]], "a.cls", "the label of sample 'a' is '-1'"),
        ([("a.cls", b"1.5"), A[1]], "a.cls", "the label of sample 'a' is '1.5'"),
        ([("a.cls", b"9999999999"), A[1]], "a.cls", "the label of sample 'a' is '9999999999'"),
        ([*A, B[0], ("b.png", b"<html>404</html>")], "b.png", "the image of sample 'b' does not decode"),
        (
            [*A, B[0], ("b.png", IMAGE[:16] + b"\0\1\0\0" + IMAGE[20:])],
            "b.png",
            "the image of sample 'b'",
        ),  # 65,536 wide
        ([*A, B[0], ("b.jpg", huge_jpeg())], "b.jpg", "the image of sample 'b'"),
    ],
)
def test_a_sample_that_is_no_labelled_image_is_refused(tmp_path: Path, members: Members, at: str, reason: str) -> None:
    """By tar, byte and key: the byte is that of the last member of that name, or of its data where the image is meant.

    Fails when the check that names the reason is dropped.
    """
    path = write_tar(tmp_path / "bad.tar", members)
    with tarfile.open(path) as tar:
        member = tar.getmember(at)  # the last of that name
    text = refused(lambda: scan_tar(path))
    place = member.offset_data if "the image" in reason else member.offset
    assert text.startswith(f"{path}: at byte {place}: {reason}")


def test_members_that_belong_to_no_sample_are_passed_over(tmp_path: Path) -> None:
    """Folders, files without a suffix and other columns do not make a sample wrong, as in webdataset.

    Fails when every member must be an image or a label.
    """
    path = write_tar(tmp_path / "more.tar", [("README", b"hello"), *A, ("a.json", b"{}"), *B])
    assert scan_tar(path).samples["label"].tolist() == [0, 1]


# What the index and the reader refuse


@pytest.mark.parametrize("damage", ["truncated", "flipped in a column", "no safetensors", "empty"])
def test_a_damaged_index_is_refused(copy: Path, damage: str) -> None:
    """Fails when the columns are not held against the fingerprint, or safetensors' own exception gets through."""
    path = copy / FILE_NAME
    data = path.read_bytes()
    column = int.from_bytes(data[:8], "little") + 8 + 100
    if damage == "flipped in a column":
        flip_byte(path, column)
    else:
        path.write_bytes({"truncated": data[:column], "no safetensors": b"x" * 300, "empty": b""}[damage])
    text = refused(lambda: ShardIndex.load(path))
    assert text.startswith(f"{path}: ")
    assert "damaged" in text


def test_an_index_whose_tars_are_gone_or_changed_is_refused(copy: Path) -> None:
    """Fails when the size of a tar is not held against the index."""
    tar = copy / "000001.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    text = refused(lambda: prepare_index("data.train", str(copy)))
    size = tar.stat().st_size
    assert text.startswith(f"data.train: {tar}: {size} bytes, but {copy / FILE_NAME} says {size - 512}")
    tar.unlink()
    assert refused(lambda: prepare_index("data.train", str(copy))).startswith(f"data.train: {tar}: missing")


def test_a_flipped_byte_of_an_image_is_reported_with_tar_and_sample(copy: Path) -> None:
    """Every other sample still reads. Fails when the checksum is not compared."""
    index = ShardIndex.load(copy / FILE_NAME)
    sample = 11  # the third of 000001.tar, which holds samples 9 to 17
    place = int(index.samples["offset"][sample])
    flip_byte(copy / "000001.tar", place + 40)
    reader = TarReader(index)
    others = [i for i in range(NUM_SAMPLES) if i != sample]
    assert len(list(reader.read(np.array(others)))) == NUM_SAMPLES - 1
    text = refused(lambda: list(reader.read(np.array([sample]))))
    assert text.startswith(f"{copy / '000001.tar'}, sample 2 at byte {place}: ")


def test_an_unreadable_image_is_named_by_the_problem_of_its_batch(tmp_path: Path) -> None:
    """A web page called .jpg, indexed with its own checksum: the batch says which sample, and does not raise.

    Fails when a decoder's exception leaves the loader, or the sample's name is lost.
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
    samples = EvalSamples(index, CenterCrop(None, None), 3)
    good, bad = samples[EvalAddress(0, 1)], samples[EvalAddress(1, 1)]
    assert good.problem is None
    assert np.array_equal(good.images[0].numpy(), pixels(IMAGE))
    assert bad.problem is not None
    assert bad.problem.startswith(f"{path}, sample 1 at byte {places[1][0]}: ")
    assert "\n" not in bad.problem


def test_images_of_two_sizes_in_one_batch_are_a_problem_that_names_the_remedy(tmp_path: Path) -> None:
    """Fails when the first image's shape is assumed for all."""
    rng = np.random.default_rng(0)
    path = write_tar(tmp_path / "two.tar", [*A, ("b.cls", b"1"), ("b.png", png(rng, 8, 9))])
    problem = EvalSamples(index_of(path), CenterCrop(None, None), 3)[EvalAddress(0, 2)].problem
    assert problem is not None
    assert "augment.crop" in problem


# From a location to an index


@pytest.fixture
def one_core() -> Iterator[None]:
    """Tars are scanned in this process: starting others takes seconds."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_core")
def test_a_folder_a_tar_and_a_brace_pattern_name_the_same_samples(tmp_path: Path) -> None:
    """`train` indexes tars that have no index, once; the second time the index is taken.

    Fails when tars are indexed in another order than sorted, or an index is made anew each time.
    """
    tars = [write_tar(tmp_path / f"{number}.tar", sample_members(number + 2)) for number in range(3)]
    pattern = str(tmp_path / "{0..2}.tar")
    by_pattern, note = prepare_index("data.train", pattern)
    assert note.startswith("indexed 3 tars, 9 samples, 3 classes")
    assert prepare_index("data.train", pattern) == (by_pattern, "")
    by_folder, _ = prepare_index("data.train", str(tmp_path))
    one, _ = prepare_index("data.train", str(tars[1]))
    assert ShardIndex.load(Path(by_pattern)).fingerprint == index_of(*tars).fingerprint
    assert ShardIndex.load(Path(by_folder)).fingerprint == index_of(*tars).fingerprint
    assert ShardIndex.load(Path(one)).fingerprint == index_of(tars[1]).fingerprint


@pytest.mark.usefixtures("one_core")
def test_a_tar_that_was_added_to_an_indexed_folder_is_noticed(tmp_path: Path) -> None:
    """By name, as a missing one is. Fails when the index that is there is taken without a look at the folder."""
    write_tar(tmp_path / "0.tar", sample_members(3))
    prepare_index("data.train", str(tmp_path))
    write_tar(tmp_path / "1.tar", sample_members(3))
    text = refused(lambda: prepare_index("data.train", str(tmp_path)))
    assert "1.tar" in text
    assert FILE_NAME in text


def test_locations_without_tars_are_refused_under_the_name_of_their_key(tmp_path: Path) -> None:
    """Fails when a missing tar is noticed only by the reader, or a pipe is run."""
    for location in (str(tmp_path), str(tmp_path / "{0..3}.tar"), "pipe:touch x", "s3://bucket/{0..3}.tar"):
        assert refused(lambda location=location: prepare_index("data.val", location)).startswith("data.val: ")
