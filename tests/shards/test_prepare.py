"""From a location in a config to an index that fits its shards, and one class list for training and validation."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from helpers import index_of, members_of, message, sample_members, write_tar

from dist_trainer.data.index import BAD, FILE_NAME, SAMPLE, ShardIndex
from dist_trainer.errors import LocalError, UserError, plural
from dist_trainer.shards.prepare import (
    find_index,
    index_shards,
    is_class_sorted,
    match_classes,
    numbering_note,
    open_index,
    prepare_index,
)
from dist_trainer.storage import storage


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return message(caught)


def prepared(location: object, **options: object) -> tuple[ShardIndex, str]:
    path, line = prepare_index("data.train", str(location), **options)  # type: ignore[arg-type]
    return open_index(path), line


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of three tars with 2, 3 and 4 samples."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number}.tar", sample_members(number + 2))
    return folder


@pytest.fixture
def bucket(data: Path) -> str:
    """The same tars at a URL that is a folder of this machine."""
    return f"local://{data}"


# Where the index is


def test_a_folder_a_tar_and_a_brace_pattern_name_the_same_samples(data: Path) -> None:
    """`train` indexes tars that have no index, once; the second time the index is taken.

    Fails when tars are indexed in another order than sorted, or an index is made anew each time.
    """
    tars = sorted(data.glob("*.tar"))
    for location, names in ((data, tars), (data / "{0..2}.tar", tars), (tars[1], tars[1:2])):
        index, line = prepared(location)
        assert index.fingerprint == index_of(*names).fingerprint
        assert line.startswith(f"indexed {plural(len(names), 'tar')}, {len(index)} samples, 3 classes: {data}/")
        assert prepared(location)[1] == ""


def test_an_index_goes_elsewhere_where_it_cannot_lie_beside_the_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only folder: into the fallback folder, by a name of its own; found there again, and said.

    Fails when two folders of one name share an index.
    """
    other = Path(shutil.copytree(data, tmp_path / "other" / "data"))
    (other / "2.tar").unlink()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "data" not in str(path) and access(path, mode))
    fallback = tmp_path / "runs" / ".index"
    first, line = prepared(data, fallback=fallback)
    second, _ = prepared(other, fallback=fallback)
    assert (len(first), len(second)) == (9, 5)
    assert line.endswith(first.path)
    assert {Path(index.path).parent for index in (first, second)} == {fallback}
    assert first.shard_path(0) == str(data / "0.tar")
    assert prepared(data, fallback=fallback)[1] == ""
    assert not list(data.glob("*.dtx"))
    assert "--out train.dtx" in refused(lambda: index_shards([str(data)]))


def test_a_remote_folder_is_read_by_the_index_beside_it(data: Path, bucket: str, tmp_path: Path) -> None:
    """Without one, the command that makes it is said, and its index is taken when named. With one, it is copied, and
    its tars are those at the URL; a pattern that leaves some out is refused.

    Fails when "." means the folder of the copy, or remote tars are indexed unasked.
    """
    fallback = tmp_path / "runs"
    for location in (bucket, f"{bucket}/{{0..2}}.tar"):
        text = refused(lambda location=location: prepared(location, fallback=fallback))
        assert text.startswith(f"data.train: {location}: has no index; make it with: dist-trainer shards index '")
        assert f"'{location}' --out train.dtx" in text
    index_shards([bucket], tmp_path / "train.dtx")
    assert prepared(tmp_path / "train.dtx")[0].shard_path(0) == f"{bucket}/0.tar"
    index_shards([str(data)])
    for location in (bucket, f"{bucket}/{{0..2}}.tar", f"{bucket}/{FILE_NAME}"):
        index, _ = prepared(location, fallback=fallback)
        assert [index.shard_path(n) for n in range(3)] == [f"{bucket}/{n}.tar" for n in range(3)]
        assert Path(index.path).parent == fallback
        assert index.fingerprint == index_of(*sorted(data.glob("*.tar"))).fingerprint
        assert find_index(location, fallback=fallback).fingerprint == index.fingerprint
    assert "2.tar: is in the index at" in refused(lambda: prepared(f"{bucket}/{{0..1}}.tar", fallback=fallback))
    (data / FILE_NAME).write_bytes(b"cut")
    assert f"{bucket}/{FILE_NAME}: damaged" in refused(lambda: prepared(bucket, fallback=fallback))


def test_a_location_that_names_nothing_is_refused_under_the_name_of_its_key(tmp_path: Path) -> None:
    """Fails when a missing tar is noticed only by the reader, or a pipe is run."""
    fsspec.filesystem("memory").pipe("/full/readme", b"text")
    for location in (
        tmp_path, tmp_path / "{0..3}.tar", tmp_path / "none", tmp_path / "none.dtx", "pipe:touch x", "memory://full",
        "memory://none/none.dtx", "nosuch://bucket/{0..3}.tar",
    ):  # fmt: skip
        assert refused(lambda location=location: prepared(location, fallback=tmp_path)).startswith("data.train: ")
    with pytest.raises(LocalError, match="not on this host"):
        open_index(str(tmp_path / "none.dtx"))


# Whether it fits its shards


def test_a_tar_that_was_added_is_gone_or_has_another_size_is_named(data: Path) -> None:
    """With the index and what to do. Fails when the folder, or the size of a tar, is not held against the index."""
    prepared(data)
    tar, index = data / "1.tar", data / FILE_NAME
    size = tar.stat().st_size
    with tar.open("ab") as file:
        file.write(bytes(512))
    text = refused(lambda: prepared(data))
    assert text.startswith(f"data.train: {tar}: {size + 512} bytes, but {index} says {size}; restore it, or delete")
    os.truncate(tar, size)
    write_tar(data / "9.tar", sample_members(3))
    assert refused(lambda: prepared(data)).startswith(f"data.train: {data / '9.tar'}: not in {index}")
    (data / "9.tar").unlink()
    tar.unlink()
    assert refused(lambda: prepared(data)).startswith(f"data.train: {tar}: missing, though {index} lists it")


def test_tars_that_were_copied_are_looked_at_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their time of change differs, so checksums are compared; then the index knows the new time.

    Fails when the time alone is an error, when nothing is read, or when everything is read each time.
    """
    reads: list[str] = []
    read = storage.Storage.read
    monkeypatch.setattr(
        storage.Storage, "read", lambda self, path, *span: reads.append(path) or read(self, path, *span)
    )
    index, _ = prepared(data)
    reads.clear()
    os.utime(data / "1.tar")
    again, line = prepared(data)
    assert line.startswith("1 tar: another time of change")
    assert reads == [str(data / "1.tar")] * 3  # its three samples
    assert again.fingerprint == index.fingerprint
    reads.clear()
    assert prepared(data)[1] == ""
    assert not reads


def test_a_tar_with_another_image_of_the_same_size_is_named_with_the_sample(data: Path) -> None:
    """64 checksums are enough for a tar of 3 samples. Fails when only sizes are compared."""
    prepared(data)
    place = members_of(data / "1.tar")["002.png"].offset_data
    with (data / "1.tar").open("r+b") as file:
        file.seek(place + 50)
        byte = file.read(1)[0]
        file.seek(place + 50)
        file.write(bytes([byte ^ 1]))
    text = refused(lambda: prepared(data))
    assert text.startswith(f"data.train: {data / '1.tar'}, sample 2 at byte {place}: the bytes are not those")


def test_an_unreadable_tar_is_one_line_that_names_the_command(data: Path) -> None:
    """For data of 1,000 tars with one bad, `shards index` has what accepts it; class folders have no --label.

    Mutations: leave the command out; offer --label for both.
    """
    with tarfile.open(data / "1.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("empty.png"))
    with pytest.raises(UserError) as caught:
        prepared(data)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"data.train: {data}: a problem in 1 shard; ")
    assert first.endswith(f"repair them, or see dist-trainer shards index '{data}' --allow_bad N, --label RULE")
    assert len(rest) == 1
    assert not (data / FILE_NAME).exists()
    (data / "folders" / "ant").mkdir(parents=True)
    (data / "folders" / "ant" / "0.png").touch()
    with pytest.raises(UserError) as caught:
        prepared(data / "folders")
    assert str(caught.value).splitlines()[0].endswith("--allow_bad N")


# Classes


def made(labels: list[int], names: tuple[str, ...], shards: int = 1) -> ShardIndex:
    """An index of `labels`, in shards of equal size."""
    samples = np.zeros(len(labels), SAMPLE)
    samples["label"] = labels
    bounds = np.linspace(0, len(labels), shards + 1).astype(np.uint64)
    blank, sizes = ("",) * shards, np.zeros(shards, np.uint64)
    return ShardIndex(
        root=".", shards=blank, stamps=blank, sizes=sizes, first=bounds, samples=samples, class_names=names
    )


NUMBERS = tuple(str(n) for n in range(5))


def test_validation_gets_the_class_list_of_training() -> None:
    """Names in another order change the labels, bad samples stay bad; numbers are taken as they are.

    Fails when labels are kept while names move, or BAD becomes a class.
    """
    train = made([0, 1, 2], ("ant", "bee", "cat"))
    val = match_classes(train, made([0, 1, 2, BAD], ("cat", "ant", "bee")))
    assert val.samples["label"].tolist() == [2, 0, 1, BAD]
    assert val.class_names == train.class_names
    for names in (NUMBERS[:2], NUMBERS[:3]):
        assert match_classes(train, made([0, 1, 1], names)).samples["label"].tolist() == [0, 1, 1]
    assert match_classes(made([4], NUMBERS), made([0, 3], NUMBERS[:4])).class_names == NUMBERS
    assert numbering_note(train, made([1], NUMBERS)) == (
        "data.val: its classes have no names, so their numbers are taken as data.train's: 0 is ant, 1 is bee, ..."
    )
    assert numbering_note(made([1], NUMBERS), made([1], NUMBERS[:3])) is None
    assert numbering_note(train, made([0], ("cat", "ant", "bee"))) is None
    same = made([2], train.class_names)
    assert match_classes(train, same) is same


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        (("a", "b", "c"), ("a", "b", "d"), "(3 and 3): 1 only in data.train ('c'); 1 only in data.val ('d')"),
        (("a", "b"), ("b", "a", "c"), "(3 and 2): 1 only in data.val ('c')"),
        (("a", "b"), ("a",), "(1 and 2): 1 only in data.train ('b'); if that is meant: --eval.classes subset"),
        (("a",), ("v", "w", "x", "y", "z"), "1 only in data.train ('a'); 5 only in data.val ('v', 'w', 'x', ...)"),
        (NUMBERS, ("v", "w"), "have names ('v', 'w'), while those of data.train are numbers"),
        (("a", "b"), NUMBERS, "labels go up to 4, and data.train has 2 classes"),
        (("crane", "crane", "owl"), ("owl", "crane", "crane"), "share a name, and stand in another order"),
        (("0", "1", "10", "2"), ("0", "1", "2", "3"), "1 only in data.train ('10'); 1 only in data.val ('3')"),
    ],
)
def test_other_classes_in_validation_are_refused(train: tuple[str, ...], val: tuple[str, ...], said: str) -> None:
    """With the names on either side. Fails when a smaller set, or folders called by numbers, are let by."""
    text = refused(lambda: match_classes(made([0], train), made(list(range(len(val))), val)))
    assert text.startswith("data.val: ")
    assert said in text


def test_class_sorted_sets_are_told_from_shuffled_ones() -> None:
    """Sorted and shuffled sets of 2 to 1,000 classes, even and uneven, in 1 to 50 shards, also nearly sorted ones.

    Fails when many of one class are taken for sorted, or a few samples decide.
    """
    rng = np.random.default_rng(0)
    for classes, size, shards in ((2, 100, 1), (2, 5000, 50), (10, 300, 7), (1000, 20_000, 16)):
        names = tuple(str(n) for n in range(classes))
        for weights in (np.ones(classes), np.arange(1, classes + 1) ** 1.5):
            labels = np.sort(rng.choice(classes, size, p=weights / weights.sum()))
            assert is_class_sorted(made(labels.tolist(), names, shards)), (classes, size)
            for _ in range(20):
                assert not is_class_sorted(made(rng.permutation(labels).tolist(), names, shards)), (classes, size)
            nearly = labels.copy()
            nearly[rng.integers(0, size, size // 20)] = BAD
            assert is_class_sorted(made(nearly.tolist(), names, shards))
    assert not is_class_sorted(made([0] * 500, ("one",)))
    assert not is_class_sorted(made([0] * 499 + [1], ("a", "b")))
    for few in ([0], [0, 1], [0, 0, 1], [0, 0, 0, 1, 1, 1], [0, 1, 2]):
        assert not is_class_sorted(made(few, NUMBERS))
    repeated = rng.integers(0, 2, 4000)
    repeated[1:] = np.where(rng.random(3999) < 0.4, repeated[:-1], repeated[1:])
    assert not is_class_sorted(made(repeated.tolist(), NUMBERS))  # 70% equal neighbours of 2 classes still mix
    assert not is_class_sorted(made([0, 1, 2, 3, 4] * 100, NUMBERS))  # in turn: as mixed as can be
    assert is_class_sorted(made([0] * 40 + [1] * 40, NUMBERS))
