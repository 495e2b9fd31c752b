"""`shards index`: many shards to one index, in parallel, again after a kill, from anywhere, with anyone's labels."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torchvision
from helpers import Members, png, sample_members, write_tar
from PIL import Image

from dist_trainer.commands.main import dispatch
from dist_trainer.data.index import BAD, FILE_NAME, ShardIndex
from dist_trainer.errors import UserError
from dist_trainer.shards import build
from dist_trainer.shards.prepare import index_shards, prepare_index

IMAGE = png(np.random.default_rng(2))


def refused(*locations: object, **options: object) -> list[str]:
    """The lines of what `index_shards` refuses."""
    with pytest.raises(UserError) as caught:
        index_shards([str(location) for location in locations], **options)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def indexed(*locations: object, **options: object) -> ShardIndex:
    line = index_shards([str(location) for location in locations], **options)  # type: ignore[arg-type]
    assert line.startswith("indexed ")
    return ShardIndex.load(Path(line.rpartition(": ")[2]))


def named(*names: str) -> Members:
    """One image per name, labelled by it: `dog_1` in json and key."""
    return [
        member
        for number, name in enumerate(names)
        for member in (
            (f"{name}_{number}.json", f'{{"label": "{name}"}}'.encode()),
            (f"{name}_{number}.jpg.png", b"a column"),
            (f"{name}_{number}.png", IMAGE),
        )
    ]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 JPEGs of many sizes and 10 classes in 5 tars, by Python's tarfile; sorted by class."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(3)
    for number in range(5):
        members = []
        for n in range(number * 240, number * 240 + 240):
            small = rng.integers(0, 256, (4, 5, 3), np.uint8)
            buffer = io.BytesIO()
            size = int(rng.integers(20, 90)), int(rng.integers(20, 90))
            Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            members += [(f"{n:05d}.JPEG", buffer.getvalue()), (f"{n:05d}.cls", str(n // 120).encode())]
        write_tar(folder / f"{number}.tar", members)
    return folder


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Four tars of 5 samples each."""
    (tmp_path / "data").mkdir()
    members = sample_members(20)
    return [
        write_tar(tmp_path / "data" / f"{n}.tar", members[n * 10 : n * 10 + 10])  # two members a sample
        for n in range(4)
    ]


def change_unnoticed(tar: Path) -> None:
    """Other content with the same size and time of change: only who reads it can tell."""
    before = tar.stat()
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as file:
        data[next(member for member in file if member.name.endswith("png")).offset_data + 50] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))


# The same index however it is made


def test_every_photograph_is_where_tarfile_says_on_any_number_of_processes(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,200 JPEGs by 1 process, by 3, and through a URL: one fingerprint. Class-sorted, and said to be.

    Fails when shards come in the order in which they get done, or a URL's reads are off.
    """
    line = index_shards([str(photographs)], tmp_path / "one.dtx")
    one = ShardIndex.load(tmp_path / "one.dtx")
    assert line.startswith("indexed 5 tars, 1,200 samples, 10 classes, sorted by class")
    for number, name in enumerate(one.shards):
        data = (photographs / name).read_bytes()
        rows = one.samples[int(one.first[number]) : int(one.first[number + 1])]
        with tarfile.open(photographs / name) as tar:
            images = [member for member in tar if member.name.endswith("JPEG")]
        for row, member in zip(rows, images, strict=True):
            image = data[member.offset_data : member.offset_data + member.size]
            width, height = Image.open(io.BytesIO(image)).size
            label = int(member.name[:5]) // 120
            assert row.tolist() == (member.offset_data, member.size, label, zlib.crc32(image), width, height)
    monkeypatch.setattr(build, "_FEW_BYTES", 0)
    three = indexed(photographs, out=tmp_path / "three.dtx", num_processes=3)
    url = indexed(f"local://{photographs}/{{0..4}}.tar", out=tmp_path / "url.dtx")
    assert one.fingerprint == three.fingerprint == url.fingerprint
    assert url.shard_path(3) == f"local://{photographs}/3.tar"
    assert list(photographs.glob(".*")) == list(tmp_path.glob(".*")) == []


def test_tars_in_memory_are_indexed_as_on_disk(tars: list[Path], tmp_path: Path) -> None:
    """A file system that has URLs alone; said first: how much will be read. Fails when a local path is assumed."""
    store = fsspec.filesystem("memory")
    for tar in tars:
        store.pipe(f"/bucket/{tar.name}", tar.read_bytes())
    said: list[str] = []
    for location in ("memory://bucket", "memory://bucket/{0..3}.tar"):
        out = tmp_path / "memory.dtx"
        out.unlink(missing_ok=True)
        index = indexed(location, out=out, say=said.append)
        assert index.fingerprint == indexed(tars[0].parent, out=tmp_path / f"{len(said)}.dtx").fingerprint
        assert [index.shard_path(n) for n in range(4)] == [f"memory://bucket/{n}.tar" for n in range(4)]
    assert said[0].startswith("4 shards, 0.00 GB, to be read from memory://bucket")
    lines = refused("memory://bucket/{0..3}.tar")
    assert "--out train.dtx" in lines[0]
    store.rm("/bucket", recursive=True)


def test_an_index_that_is_current_is_kept_and_another_is_made_anew(tars: list[Path]) -> None:
    """Fails when stamps, places or the rule are not looked at, or when it is always made anew."""
    folder = tars[0].parent
    index = indexed(folder)
    made = (folder / FILE_NAME).stat().st_mtime_ns
    assert index_shards([str(folder)]).startswith("up to date: 4 tars, 20 samples, 3 classes")
    assert (folder / FILE_NAME).stat().st_mtime_ns == made
    assert refused(folder, label="json:label")
    other = shutil.copytree(folder, folder.with_name("other"))  # with times of change
    assert indexed(other, out=folder / FILE_NAME).shard_path(0) == str(other / "0.tar")
    indexed(folder)
    os.utime(tars[1])
    assert indexed(folder).fingerprint == index.fingerprint
    tars[3].unlink()
    assert len(indexed(folder)) == 15
    (folder / FILE_NAME).write_bytes(b"no index")
    assert len(indexed(folder)) == 15


def test_tars_may_be_moved_with_their_index(tars: list[Path], tmp_path: Path) -> None:
    """Also when it lies above them; elsewhere it knows where they are. Fails when one path is absolute."""
    above = indexed(*tars, out=tmp_path / "all.dtx")
    assert above.shards == tuple(f"data/{n}.tar" for n in range(4))
    (tmp_path / "elsewhere").mkdir()
    beside = indexed(*tars, out=tmp_path / "elsewhere" / "all.dtx")
    assert beside.shard_path(2) == str(tars[2])
    (tmp_path / "moved").mkdir()
    for name in ("data", "all.dtx"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    moved = ShardIndex.load(tmp_path / "moved" / "all.dtx")
    assert moved.shard_path(2) == str(tmp_path / "moved" / "data" / "2.tar")


# Again after a kill


def test_after_a_kill_only_the_shards_that_are_missing_are_read(tars: list[Path], tmp_path: Path) -> None:
    """A process is killed while it waits for the third tar, a pipe. The first two then change without a trace.

    The index has their old checksums, so they were not read again; nothing but the index is left. Fails when a part is
    not kept, or is not taken.
    """
    folder, out = tars[0].parent, tmp_path / "all.dtx"
    expected = indexed(folder, out=tmp_path / "expected.dtx")
    third = tars[2].rename(tmp_path / "third.tar")
    os.mkfifo(tars[2])
    command = [sys.executable, "-m", "dist_trainer", "shards", "index", str(folder), "--out", str(out), "--processes=1"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    parts = tmp_path / ".all.dtx.parts"
    while len(list(parts.glob("*.part"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(parts.glob("*.part"))) == 2
    assert not out.exists()
    tars[2].unlink()
    third.rename(tars[2])
    change_unnoticed(tars[0])
    change_unnoticed(tars[1])
    said: list[str] = []
    assert indexed(folder, out=out, say=said.append).fingerprint == expected.fingerprint
    assert said == ["2 of 4 shards done already"]
    assert not parts.exists()


def test_a_part_that_is_damaged_is_made_again_and_one_of_another_rule_is_not_taken(
    tars: list[Path], tmp_path: Path
) -> None:
    """A shard with a bad sample leaves the parts. Fails when a part's digest, or the label rule, is not looked at."""
    write_tar(tars[3], [("a.cls", b"x"), ("a.png", IMAGE), ("b.cls", b"1"), ("b.png", IMAGE)])
    folder, out = tars[0].parent, tmp_path / "all.dtx"
    expected = indexed(folder, out=tmp_path / "expected.dtx", allow_bad=1)
    refused(folder, out=out)
    parts = sorted((tmp_path / ".all.dtx.parts").glob("*.part"))
    assert len(parts) == 4
    for part in parts[:2]:
        data = bytearray(part.read_bytes())
        data[-20] ^= 1
        part.write_bytes(data)
    assert indexed(folder, out=out, allow_bad=1).fingerprint == expected.fingerprint
    refused(folder, out=tmp_path / "key.dtx", label="key")


# Problems


def test_all_problems_are_said_at_once_and_as_many_as_allowed_are_kept_as_bad_samples(
    tars: list[Path], tmp_path: Path
) -> None:
    """25 in two tars: a line for each of the first 20. With --allow_bad 25 they keep their places, labelled BAD.

    Fails when the first problem ends the scan, when 24 are enough, or when a bad sample moves those behind it.
    """
    members = sample_members(30)
    for n, count in ((1, 13), (3, 12)):
        spoilt = [
            (name, b"x" if name.endswith("cls") and i < 2 * count else data) for i, (name, data) in enumerate(members)
        ]
        write_tar(tars[n], spoilt)
    folder = tars[0].parent
    lines = refused(folder, allow_bad=24)
    assert lines[0].startswith(f"{folder}: 25 problems in 2 shards, where 24 may be bad; ")
    assert "--allow_bad" in lines[0]
    assert lines[1].startswith("  1.tar: at byte 1536: 'x' is a label that is no class number")
    assert len(lines) == 22
    assert lines[-1] == "  and 5 more"
    index = indexed(folder, allow_bad=25)
    assert index.counts.tolist() == [5, 30, 5, 30]
    assert (index.samples["label"] == BAD).sum() == 25
    assert [problem.sample for problem in index.problems] == [*range(5, 18), *range(40, 52)]
    assert index.problems[13].shard == "3.tar"
    assert ShardIndex.load(folder / FILE_NAME).samples["label"][52:70].tolist() == [n % 3 for n in range(12, 30)]


def test_a_wrong_rule_does_not_cost_the_reading_of_all_tars(tars: list[Path]) -> None:
    """Not one sample of the first tar has such a label. Fails when the last tar is read all the same."""
    tars[3].unlink()
    os.mkfifo(tars[3])  # would be waited for
    lines = refused(tars[0].parent, label="json:label", out=tars[0].parent / "x.dtx")
    assert "a shard without a good sample" in lines[0]
    assert "--label" in lines[1]


def test_mistakes_are_named_with_what_to_do(
    tars: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each. Fails when any ends in a traceback, or in an index."""
    folder = tars[0].parent
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("a\nb\na\n")
    for locations, options, word in (
        ([tmp_path / "{0..3.tar"], {}, "braces"),
        ([tmp_path / "{0..3}.tar"], {}, "0.tar: no such tar (and 3 more)"),
        ([tmp_path / "none"], {}, "no such folder"),
        ([tmp_path / "empty"], {}, "no tars there"),
        ([tmp_path / "list.txt"], {}, "neither a tar nor an index"),
        ([tars[0], tmp_path / "list.txt"], {}, "list.txt: not a tar"),
        ([tars[0], "memory://b/1.tar"], {}, "some tars are local"),
        (["memory://nowhere"], {"out": tmp_path / "x.dtx"}, "memory://nowhere"),
        (["memory://nowhere/1.tar"], {"out": tmp_path / "x.dtx"}, "no such tar"),
        (["pipe:touch /tmp/x"], {}, "shell pipes"),
        ([folder], {"out": tmp_path / "x.txt"}, "ends in .dtx"),
        ([folder], {"out": tmp_path / "none" / "x.dtx"}, "its folder is not there"),
        ([folder], {"label": "json"}, "--label"),
        ([folder], {"classes": str(tmp_path / "none.txt")}, "none.txt"),
        ([tmp_path / "x.dtx"], {}, "is an index"),
    ):
        (line,) = refused(*locations, **options)
        assert word in line, line
    assert not (tmp_path / "x.dtx").exists()
    with pytest.raises(UserError, match="--processes: 0"):
        dispatch(["shards", "index", str(folder), "--processes=0"])
    with pytest.raises(UserError, match="--allow_bad: -1"):
        dispatch(["shards", "index", str(folder), "--allow-bad=-1"])
    assert dispatch(["shards", "index", str(folder), "--allow-bad=1", "--processes=1"]) == 0
    assert capsys.readouterr().out.startswith(f"indexed 4 tars, 20 samples, 3 classes: {folder / FILE_NAME}")


# Classes


def test_class_names_are_collected_over_all_tars_and_sorted(tmp_path: Path) -> None:
    """By key and by json, two tars that each know a part. Fails when each tar numbers its classes for itself."""
    write_tar(tmp_path / "0.tar", named("dog", "ant", "dog"))
    write_tar(tmp_path / "1.tar", named("cat", "dog", "ant"))
    for rule in ("key", "json:label"):
        index = indexed(tmp_path, label=rule)
        assert index.class_names == ("ant", "cat", "dog")
        assert index.samples["label"].tolist() == [2, 0, 2, 1, 2, 0]


def test_a_class_list_fixes_numbers_and_set(tmp_path: Path) -> None:
    """Beside the tars it is found, --classes goes first; a name that it lacks is a problem; so are numbers beyond it.

    Fails when names are sorted nevertheless, or an unknown one gets a number.
    """
    write_tar(tmp_path / "0.tar", named("dog", "ant", "dog"))
    (tmp_path / "classes.txt").write_text("dog\n\nbee\nant\n")
    index = indexed(tmp_path, label="key")
    assert index.class_names == ("dog", "bee", "ant")
    assert index.samples["label"].tolist() == [0, 2, 0]
    (tmp_path / "few.txt").write_text("dog\n")
    few = str(tmp_path / "few.txt")
    (tmp_path / "twice.txt").write_text("crane\ncrane\nmaillot\n")  # ImageNet's are called so
    twice = str(tmp_path / "twice.txt")
    assert "'crane' stands twice in the class list" in refused(tmp_path, label="key", classes=twice)[0]
    lines = refused(tmp_path, label="key", classes=few)
    assert lines[0].startswith(f"{tmp_path}: a problem in 1 shard; ")
    assert "'ant' is not in the class list" in lines[1]
    index = indexed(tmp_path, label="key", classes=few, allow_bad=1)
    assert index.samples["label"].tolist() == [0, BAD, 0]
    assert index.samples["length"].tolist() == [len(IMAGE), 0, len(IMAGE)]
    write_tar(tmp_path / "0.tar", sample_members(6))
    assert indexed(tmp_path, classes=twice).class_names == ("crane", "crane", "maillot")
    (line,) = refused(tmp_path, classes=few)
    assert "4 of 6 labels are beyond the class list, which has 1 classes, and the largest is 2" in line
    assert indexed(tmp_path).class_names == ("dog", "bee", "ant")


def test_names_and_numbers_do_not_mix_without_a_list(tmp_path: Path) -> None:
    """Fails when a name gets the number of a class that has one already."""
    write_tar(
        tmp_path / "0.tar", [("a.json", b'{"y": 1}'), ("a.png", IMAGE), ("b.json", b'{"y": "bee"}'), ("b.png", IMAGE)]
    )
    (line,) = refused(tmp_path, label="json:y")
    assert "some labels are numbers and some are names, such as 'bee'" in line
    (tmp_path / "classes.txt").write_text("ant\ncat\nbee\n")
    assert indexed(tmp_path, label="json:y").samples["label"].tolist() == [1, 2]


# Image folders


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Class folders with images in them and below, of which one has an upper-case suffix and one is a text."""
    rng = np.random.default_rng(1)
    for name in ("b/1.png", "b/sub/0.png", "a/2.PNG", "a/10.png", "c/日本.jpeg", "c/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    (tmp_path / "images" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden").mkdir()
    return tmp_path / "images"


def test_an_image_folder_is_what_torchvision_takes_it_for(images: Path) -> None:
    """Classes, files, labels, and of each file length, checksum and size. Fails when upper case is passed over."""
    shutil.rmtree(images / ".hidden")  # torchvision takes it for a class
    theirs = torchvision.datasets.ImageFolder(str(images))
    path, line = prepare_index("data.train", str(images))
    assert line.startswith("indexed 3 class folders, 6 images, 3 classes")
    index = ShardIndex.load(Path(path))
    assert index.class_names == tuple(theirs.classes)
    shards = index.shard_of(np.arange(len(index))).tolist()
    assert [
        (index.file_of(n, shard), int(index.samples["label"][n])) for n, shard in enumerate(shards)
    ] == theirs.samples
    for (file, label), row in zip(theirs.samples, index.samples.tolist(), strict=True):
        data = Path(file).read_bytes()
        assert row == (0, len(data), label, zlib.crc32(data), 12, 9)
    assert prepare_index("data.train", str(images)) == (path, "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: shutil.copy(root / "a" / "10.png", root / "a" / "11.png"), "a: 1 new file, such as 11.png"),
        (lambda root: (root / "b" / "sub" / "0.png").unlink(), "b: 1 file gone, such as sub/0.png"),
        (lambda root: shutil.rmtree(root / "b" / "sub"), "b: 1 file gone, such as sub/0.png"),
        (lambda root: shutil.copytree(root / "a", root / "d"), "d: not in"),
        (lambda root: shutil.rmtree(root / "c"), "c: missing"),
        (lambda root: (root / "c" / "1.png").rename(root / "c" / "2.png"), "c: 1 new file, such as 2.png"),
    ],
)  # fmt: skip
def test_a_change_of_an_image_folder_is_noticed(images: Path, change: object, said: str) -> None:
    """With the file and what to do. Fails when folders below a class folder are not looked at."""
    prepare_index("data.train", str(images))
    change(images)  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        prepare_index("data.train", str(images))
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"data.train: {images}/")
    assert f"delete {images / FILE_NAME}" in str(caught.value) or "delete that" in str(caught.value)


def test_an_image_folder_that_was_only_copied_is_looked_at_once(images: Path) -> None:
    """Fails when new times of change are an error, or are not written down."""
    prepare_index("data.train", str(images))
    copy = Path(shutil.copytree(images, images.with_name("copy"), copy_function=shutil.copy))
    os.utime(copy / "b" / "sub")
    path, line = prepare_index("data.train", str(copy))
    assert "another time of change" in line
    assert prepare_index("data.train", str(copy)) == (path, "")


def test_folders_that_are_no_image_folder_are_refused(images: Path) -> None:
    """A class without images, the folder above train and val, a file that is no image. Fails when any is indexed."""
    (images / "a" / "10.png").write_bytes(b"<html>")
    lines = refused(images)
    assert lines[1] == "  a: at byte 0: 10.png: it does not decode: 6 bytes, which begin with b'<html>'"
    assert indexed(images, allow_bad=1).samples["label"].tolist() == [BAD, 0, 1, 1, 2, 2]
    above = images.with_name("above")
    shutil.copytree(images, above / "train")
    assert "name the folder that holds" in refused(above)[0]
    assert "leave --label" in refused(images, label="cls")[0]
    (images / "empty").mkdir()
    assert "empty: no images" in refused(images)[0]


def test_names_in_a_tar_never_leave_the_folders_that_are_written(tmp_path: Path) -> None:
    """Members called ../../evil_0.png and /.../evil_1.png are samples like others; no file has their names.

    Mutation: extract what is read, under its name.
    """
    folder = tmp_path / "a" / "b" / "tars"
    folder.mkdir(parents=True)
    names = ("../../evil_0", f"{tmp_path}/evil_1")
    write_tar(folder / "x.tar", [each for name in names for each in ((f"{name}.png", IMAGE), (f"{name}.cls", b"0"))])
    index = indexed(folder)
    assert len(index) == 2
    outside = [path for path in tmp_path.rglob("*") if not path.is_dir() and folder not in path.parents]
    assert not outside and not list(tmp_path.rglob("*evil*"))
