"""Reading tars for their index: members and labels as others read them, and every kind of damage by its place."""

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from helpers import Members, members_of, message, png, sample_members, write_tar
from PIL import Image

from dist_trainer.data.index import BAD
from dist_trainer.errors import UserError
from dist_trainer.shards.join import ShardScan
from dist_trainer.shards.labels import LabelRule
from dist_trainer.shards.scan import scan_shard, scan_tar
from dist_trainer.storage.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore:WebDataset:UserWarning")  # it is used without options on purpose
IMAGE = png(np.random.default_rng(2))
A, B, C = ([(f"{name}.cls", str(n).encode()), (f"{name}.png", IMAGE)] for n, name in enumerate("abc"))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return message(caught)


def scan(path: Path, label: str = "cls") -> ShardScan:
    return scan_shard(str(path), Storage(), LabelRule.parse(label))


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def overwrite(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def count_by_webdataset(path: Path) -> int:
    return sum(1 for _ in webdataset.WebDataset(str(path)))


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """Six whole samples: 000.cls, 000.png, 001.cls, ..."""
    return write_tar(tmp_path / "six.tar", sample_members(6))


# What belongs to a sample


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_webdataset_and_tarfile_see(tmp_path: Path, form: int) -> None:
    """Folders before and between samples, links, names of 150 letters and in UTF-8, metadata, columns beside the image.

    webdataset gives keys, labels and bytes; tarfile gives places. Fails when a long name is cut, or a link's bytes
    are skipped though it has none.
    """
    long = "n01440764_" + "x" * 60 + "/" + "y" * 80
    rng = np.random.default_rng(0)
    folder, link = tarfile.TarInfo("images"), tarfile.TarInfo("latest")
    folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "images/0001"
    jpeg = encoded(Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)), "JPEG")
    members = [
        folder, ("__index__", b"7"), ("README", b"read me"), ("images/0001.JPG", jpeg), ("images/0001.cls", b" 7\n"),
        ("images/0001.json", b"{}"), link, ("./nested/0001.jpeg", jpeg), ("./nested/0001.cls", b"0"),
        (f"{long}.cls", b"3"), (f"{long}.png", png(rng, 5, 6)), (f"{long}.seg.png", b"no image at all"),
        ("日本.webp", encoded(Image.new("RGB", (11, 13)), "WEBP")), ("日本.Cls", b"12"),
    ]  # fmt: skip
    path = tmp_path / "all.tar"
    with tarfile.open(path, "w", format=form, encoding="utf-8") as file:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            data = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = 5000 if info is link else len(data)  # some tools give links a size, and no bytes
            file.addfile(info, io.BytesIO(data) if data else None)
    expected = []
    places = members_of(path)
    for sample in webdataset.WebDataset(str(path)):
        suffix = next(suffix for suffix in ("jpg", "jpeg", "png", "webp") if suffix in sample)
        member = next(m for name, m in places.items() if name.lower() == f"{sample['__key__']}.{suffix}".lower())
        size = Image.open(io.BytesIO(sample[suffix])).size
        data = sample[suffix]
        expected.append((member.offset_data, len(data), int(sample["cls"]), zlib.crc32(data), *size))
    found = scan(path)
    assert not found.problems
    assert found.samples.tolist() == expected
    assert found.samples["label"].tolist() == [7, 0, 3, 12]


@pytest.mark.parametrize(
    ("rule", "members", "labels", "names"),
    [
        ("json:label", [("a.json", b'{"label": 4}'), A[1], ("b.json", b'{"label": 0}'), B[1]], [4, 0], ()),
        ("json:a.b", [("a.json", b'{"a": {"b": "dog"}}'), A[1], ("b.JSON", b'{"a": {"b": "cat"}}'), B[1]], [-2, -3],
         ("dog", "cat")),
        ("key", [("n02/x_1.png", IMAGE), ("d/n01/x_2.PNG", IMAGE), ("./n02_7.png", IMAGE)], [-2, -3, -2],
         ("n02", "n01")),
        ("key", [*A[1:], ("b_1.png", IMAGE)], [BAD, -2], ("b",)),
    ],
)  # fmt: skip
def test_labels_come_from_where_the_rule_says(
    tmp_path: Path, rule: str, members: Members, labels: list[int], names: tuple[str, ...]
) -> None:
    """-2 - i stands for the class called names[i]. Fails when the outer folder is taken, or a dot is part of a key."""
    found = scan(write_tar(tmp_path / "a.tar", members), rule)
    assert found.samples["label"].tolist() == labels
    assert found.names == names
    assert len(found.problems) == labels.count(BAD)


@pytest.mark.parametrize(
    ("rule", "text", "reason"),
    [
        ("json:label", b"{}", "is missing: its .json has no 'label'"),
        ("json:a.b", b'{"a": 3}', "is missing: its .json has no 'a.b'"),
        ("json:label", b"{", "is missing: its .json does not parse"),
        ("json:label", b'{"label": true}', "is True, neither"),
        ("json:label", b'{"label": -1}', "is -1, neither"),
        ("json:label", b'{"label": 1.5}', "is 1.5, neither"),
        ("json:label", b'{"label": ""}', "is '', neither"),
        ("json:label", b'{"label": [1]}', "is [1], neither"),
        ("key", b"", "is not in its key"),
    ],
)
def test_a_label_that_is_none_is_said(tmp_path: Path, rule: str, text: bytes, reason: str) -> None:
    """Fails when Python's idea of numbers is taken for the user's: True is no class."""
    path = write_tar(tmp_path / "a.tar", [("a.json", text), A[1]])
    assert str(scan(path, rule).problems[0]).startswith(f"{path}: at byte 0: the label of sample 'a' {reason}")


@pytest.mark.parametrize("text", ["json", "json:", "json:a..b", "CLS", "cls:x", ""])
def test_what_is_no_label_rule_is_refused(text: str) -> None:
    """Fails when an empty field is looked up."""
    assert refused(lambda: LabelRule.parse(text)).startswith(f"--label: {text!r}; write cls")


# Damage


@pytest.mark.parametrize("block", [b"\xff" * 512, bytes(512)], ids=["overwritten", "zeroed"])
@pytest.mark.parametrize("member", ["003.cls", "003.png"])
def test_a_destroyed_header_costs_its_sample_and_no_other(tar: Path, block: bytes, member: str) -> None:
    """The fourth sample is half destroyed: webdataset gives 3 or 4 of 6 samples and no error.

    One tombstone keeps its place, whichever member it was; the others are as before. Fails when the scan stops where
    tarfile does, or reports what is left of the sample a second time.
    """
    whole = scan_tar(tar).samples.tolist()
    assert (len(whole), count_by_webdataset(tar)) == (6, 6)
    place = members_of(tar)[member].offset
    overwrite(tar, place, block)
    assert count_by_webdataset(tar) < 5
    text = refused(lambda: scan_tar(tar))
    assert text.startswith(f"{tar}: at byte {place}: a destroyed header: ")
    found = scan(tar)
    assert found.samples.tolist() == [*whole[:3], (place, 0, BAD, 0, 0, 0), *whole[4:]]
    assert [(p.offset, p.sample) for p in found.problems] == [(place, 3)]


def test_the_samples_beside_a_destroyed_stretch_are_kept(tar: Path) -> None:
    """From within the image of 001 to within that of 003: 001 keeps its place, as an image that does not decode.

    Fails when neighbours of damage are thrown away.
    """
    places = members_of(tar)
    start = places["001.png"].offset_data + 60
    overwrite(tar, start, b"\xa5" * (places["003.png"].offset_data - start))
    found = scan(tar)
    assert [p.offset for p in found.problems] == [places["001.png"].offset_data, places["002.cls"].offset]
    assert found.samples["label"].tolist() == [0, BAD, BAD, 1, 2]  # 000, 001, damage, 004, 005


def test_a_column_that_is_destroyed_is_reported_and_its_sample_stays(tmp_path: Path) -> None:
    """The sample goes on behind the damage. Fails when what follows is taken for the same key a second time."""
    path = write_tar(tmp_path / "a.tar", [A[0], ("a.json", b"{}"), A[1], *B])
    place = members_of(path)["a.json"].offset
    overwrite(path, place, b"\xff" * 512)
    found = scan(path)
    assert sorted(found.samples["label"].tolist()) == [BAD, 0, 1]
    assert [p.offset for p in found.problems] == [place]


def test_a_tar_that_is_cut_inside_a_member_is_refused(tar: Path) -> None:
    """Fails when a member's end is not held against the size of the file, or the label that is left is blamed."""
    member = members_of(tar)["003.png"]
    with tar.open("r+b") as file:
        file.truncate(member.offset_data + member.size // 2)
    assert refused(lambda: scan_tar(tar)).startswith(f"{tar}: at byte {member.offset}: '003.png' is cut short")
    assert scan(tar).samples["label"].tolist() == [0, 1, 2, BAD]


@pytest.mark.parametrize("member", ["003.cls", "003.png"])
def test_a_tar_that_is_cut_between_two_members_is_refused(tar: Path, member: str) -> None:
    """Only the end marker is missing; webdataset reads on as if nothing were.

    Fails when the two zero blocks at the end are not required.
    """
    place = members_of(tar)[member].offset
    with tar.open("r+b") as file:
        file.truncate(place)
    assert count_by_webdataset(tar) < 5
    text = refused(lambda: scan_tar(tar))
    assert text.startswith(f"{tar}: at byte {place}: ")
    assert "end marker is missing" in text
    assert scan(tar).samples["label"].tolist() == [0, 1, 2, BAD]


def test_tars_that_were_put_end_to_end_are_refused(tar: Path) -> None:
    """tarfile sees the first alone. Fails when zeros in the middle are passed over."""
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes() * 2)
    assert "zeros, while the next whole one is at byte" in str(scan(tar).problems[0])
    assert f"at byte {size}" in str(scan(tar).problems[0])


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    """With what to do where it is compressed. Fails when tarfile's own exceptions get through."""
    for name, data in (("empty.tar", b""), ("text.tar", b"not a tar " * 200), ("short.tar", bytes(512))):
        (tmp_path / name).write_bytes(data)
        text = refused(lambda path=tmp_path / name: scan_tar(path))
        assert text.startswith(f"{tmp_path / name}: at byte 0: not a readable tar")
    with tarfile.open(tmp_path / "a.tar", "w:gz") as packed:
        packed.add(__file__)
    assert "compressed with gzip" in refused(lambda: scan_tar(tmp_path / "a.tar"))


def test_extended_records_that_do_not_parse_are_damage(tmp_path: Path) -> None:
    """And not an endless loop. Fails when a record of length 0 is stepped over by its length."""
    path = tmp_path / "pax.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for name, data in (("x" * 120 + ".cls", b"1"), *A):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    overwrite(path, 512, b"000 path=")
    found = scan(path)
    assert "extended records" in str(found.problems[0])
    assert found.samples["label"].tolist()[-1] == 0


# Samples that are none


@pytest.mark.parametrize(
    ("members", "at", "reason"),
    [
        ([*A, *A], "a.cls", "sample 'a' has two labels"),
        ([A[1], A[1], A[0]], "a.png", "sample 'a' has two images"),
        ([*A, ("a.jpg", IMAGE)], "a.jpg", "sample 'a' has two images"),
        ([*A, *B, A[0]], "a.cls", "key 'a' comes again"),
        ([*A, *B, *A], "a.cls", "key 'a' comes again"),
        ([*A, B[1]], "b.png", "sample 'b' has no label"),
        ([*A, B[0]], "b.cls", "sample 'b' has no image"),
        (
            [*A, ("b.2.png", IMAGE), B[0]],
            "b.2.png",
            "sample 'b' has no image (jpg, png, webp, bmp, gif",
        ),
        ([("a.cls", b"two\nlines"), A[1]], "a.cls", "the label of sample 'a' is 'two\\nlines'"),
        ([("a.cls", b"-1"), A[1]], "a.cls", "the label of sample 'a' is '-1'"),
        ([("a.cls", b"1.5"), A[1]], "a.cls", "the label of sample 'a' is '1.5'"),
        ([("a.cls", b"9999999999"), A[1]], "a.cls", "the label of sample 'a' is '9999999999'"),
        (
            [*A, B[0], ("b.png", b"<html>404</html>")],
            "b.png",
            "the image of sample 'b' does not decode: 16 bytes, which b",
        ),
        ([*A, B[0], ("b.png", b"")], "b.png", "the image of sample 'b' does not decode: it is empty"),
        ([*A, B[0], ("b.png", IMAGE[:16] + b"\0\1\0\0" + IMAGE[20:])], "b.png", "the image of sample 'b' is 65536 x"),
    ],
)
def test_a_sample_that_is_no_labelled_image_is_a_problem(
    tmp_path: Path, members: Members, at: str, reason: str
) -> None:
    """By tar, byte and key: the byte is that of the last member of that name, or of its data where the image is meant.

    It keeps its place, and the sample that follows is as it was. Fails when the check that names the reason is dropped.
    """
    path = write_tar(tmp_path / "bad.tar", [*members, *C])
    with tarfile.open(path) as tar:
        member = tar.getmember(at)  # the last of that name
    place = member.offset_data if "the image" in reason else member.offset
    found = scan(path)
    assert str(found.problems[0]).startswith(f"{path}: at byte {place}: {reason}")
    assert len(found.problems) == 1
    assert found.samples["label"].tolist()[-1] == 2
    bad = found.samples[found.problems[0].sample]
    assert bad.tolist() == (place, 0, BAD, 0, 0, 0)


def test_a_tar_that_is_still_written_is_refused(tar: Path) -> None:
    """Its size was asked for before. Fails when a short read is taken for a small image."""

    class Growing(Storage):
        def stat(self, location: str) -> object:
            found = super().stat(location)
            with tar.open("r+b") as file:
                file.truncate(members_of(tar)["003.png"].offset_data + 20)
            return found

    assert "shorter while it was read" in refused(lambda: scan_shard(str(tar), Growing(), LabelRule()))


def test_labels_survive_json_of_other_tools(tmp_path: Path) -> None:
    """What json.dumps writes, with unicode and nesting. Fails when bytes are not decoded as JSON says."""
    data = json.dumps({"meta": {"class": "Müller"}}).encode("utf-16")
    assert scan(write_tar(tmp_path / "a.tar", [("a.json", data), A[1]]), "json:meta.class").names == ("Müller",)
