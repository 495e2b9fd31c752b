"""Classes are bound by name: through folders, tars, tables, lists and validation, in whatever order each has them."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import message, png, refused, write_tar

from dist_trainer.data.index import BAD, ShardIndex
from dist_trainer.errors import UserError
from dist_trainer.shards.classes import (
    bind_classes,
    compare_classes,
    match_classes,
    misnumbered,
    read_classes,
    without_samples,
)
from dist_trainer.shards.join import ShardScan, join
from dist_trainer.shards.prepare import index_shards
from dist_trainer.shards.scan import rows
from dist_trainer.storage.storage import Storage

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
IMAGE = png(np.random.default_rng(0))


def made(labels: list[int], names: tuple[str, ...]) -> ShardIndex:
    return join(["0.tar"], [ShardScan(rows([(0, 1, label, 0, 1, 1) for label in labels]), 1)], names)


def refusal(*args: object, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        match_classes(*args, **options)  # type: ignore[arg-type]
    return message(caught)


# Names


def test_an_accent_written_in_two_ways_is_one_class() -> None:
    """Kept as training has it. Fails when names are compared byte for byte, which look the same in a message."""
    train, val = made([0, 1], (COMPOSED, "dog")), made([0, 1], (DECOMPOSED, "dog"))
    assert match_classes(train, val).class_names == (COMPOSED, "dog")
    assert match_classes(made([0, 1], ("cat", COMPOSED)), made([0, 1], (DECOMPOSED, "cat"))).samples[
        "label"
    ].tolist() == [1, 0]


def test_a_blank_at_the_end_of_a_name_survives(tmp_path: Path) -> None:
    """And is seen in messages. Fails when classes.txt is read with strip(), or split where Unicode ends a line."""
    file = tmp_path / "classes.txt"
    file.write_bytes("cat \ndog\r\n\nx\u2028y\x0bz\n".encode())
    assert read_classes(str(file), Storage()) == ("cat ", "dog", "x\u2028y\x0bz")
    assert "1 only in data.train ('cat '); 1 only in data.val ('cat')" in refusal(
        made([0], ("cat ",)), made([0], ("cat",))
    )


@pytest.mark.parametrize(
    ("names", "are"),
    [
        (("class_0", "class_1", "class_10", "class_2"), True),
        (("class_0", "class_1", "class_2", "class_10"), False),
        (("class_00", "class_01", "class_10"), False),
        (("n01440764", "n01443537"), False),
        (("a1", "b0"), False),
        (("cat", "dog"), False),
        (("0", "1", "10", "2"), True),
    ],
)
def test_names_whose_numbers_stand_in_the_order_of_text_are_noticed(names: tuple[str, ...], are: bool) -> None:
    assert misnumbered(names) == are


def test_numbers_for_such_names_are_refused() -> None:
    """pytorch/vision#714. Fails when number 2 is taken for the third in the order of text, class_10."""
    names = tuple(sorted(f"class_{number}" for number in range(12)))
    val = made(list(range(12)), tuple(str(number) for number in range(12)))
    assert "which class a number means is open" in refusal(made(list(range(12)), names), val)


# Classes that validation lacks


def test_validation_may_lack_classes_if_that_is_said() -> None:
    """Its labels are training's all the same; a class that training has not is a mistake as before.

    Mutation: number what is there from 0.
    """
    train = made([0, 1, 2], ("ant", "bee", "cat"))
    assert "if that is meant: --eval.classes subset" in refusal(train, made([0, 1], ("ant", "cat")))
    val = match_classes(train, made([0, 1, BAD], ("ant", "cat")), subset=True)
    assert (val.samples["label"].tolist(), val.class_names) == ([0, 2, BAD], train.class_names)
    assert without_samples(val) == ["bee"]
    assert "1 only in data.val ('dog')" in refusal(train, made([0, 1], ("ant", "dog")), subset=True)


# One list


def test_a_list_fixes_the_numbers_of_both() -> None:
    """By name; numbers without names get the list's. Mutation: take the list's names without renumbering."""
    names = ("cat", "bee", "ant", "dog")
    bound = bind_classes("data.train", made([0, 1, 1, BAD], ("ant", "bee")), names, "list.txt")
    assert (bound.samples["label"].tolist(), bound.class_names) == ([2, 1, 1, BAD], names)
    assert bound.fingerprint != made([0, 1, 1, BAD], ("ant", "bee")).fingerprint
    numbers = bind_classes("data.train", made([0, 3], ("0", "1", "2", "3")), names, "list.txt")
    assert (numbers.samples["label"].tolist(), numbers.class_names) == ([0, 3], names)
    with pytest.raises(UserError, match=r"list.txt: 1 class of data.val not in it \('eel'\)"):
        bind_classes("data.val", made([0], ("eel",)), names, "list.txt")
    with pytest.raises(UserError, match=r"4 classes, and labels of data.val go up to 4"):
        bind_classes("data.val", made([4], tuple("01234")), names, "list.txt")


@pytest.mark.parametrize(
    ("ours", "theirs", "outputs"),
    [
        (("ant", COMPOSED), ("ant", DECOMPOSED), "same"),
        (("ant", "bee"), ("bee", "ant"), "another order"),
        (("ant", "bee"), ("ant", "bee", "cat"), "other classes"),
        (("ant", "bee"), ("ant", "cat"), "other classes"),
        (("0", "1"), ("bee", "ant"), "same"),
        (("bee", "ant"), ("0", "1"), "same"),
        (("0", "1", "10", "2"), ("0", "1", "2", "10"), "another order"),
    ],
)
def test_outputs_are_compared_by_name(ours: tuple[str, ...], theirs: tuple[str, ...], outputs: str) -> None:
    """Numbers alone, from 0, are no names. Mutations: compare them all the same; as they are written."""
    assert compare_classes(ours, theirs) == outputs


def test_a_list_may_be_that_of_a_run(tmp_path: Path) -> None:
    """JSON, as its classes.json. Mutation: read its lines as names."""
    file = tmp_path / "classes.json"
    file.write_text('["cat ",\n"dog"]\n')
    assert read_classes(str(file), Storage()) == ("cat ", "dog")
    for content, said in (('{"cat": 0}', "not a list of class names, such as"), ('["cat"', r"not JSON \(")):
        file.write_text(content)
        with pytest.raises(UserError, match=f"classes.json: {said}"):
            read_classes(str(file), Storage())


# Tars of other people's


def index(folder: Path, members: list[tuple[str, bytes]], **options: str) -> tuple[ShardIndex, str]:
    folder.mkdir()
    write_tar(folder / "0.tar", members)
    line = index_shards([str(folder)], **options)  # type: ignore[arg-type]
    return ShardIndex.load(folder / "index.dtx"), line


def samples(*parts: tuple[str, bytes], count: int = 3) -> list[tuple[str, bytes]]:
    return [(f"{number}.{suffix}", data) for number in range(count) for suffix, data in parts]


def test_a_cls_may_hold_a_name_or_a_whole_number(tmp_path: Path) -> None:
    """2.0 is 2. Fails when a name is refused there and taken from a .json, or a float is a name of its own."""
    names, _ = index(
        tmp_path / "names", [("0.jpg", IMAGE), ("0.cls", "Café\n".encode()), ("1.jpg", IMAGE), ("1.cls", b"b")]
    )
    assert (names.class_names, names.samples["label"].tolist()) == (("Café", "b"), [0, 1])
    floats, _ = index(tmp_path / "floats", [("0.jpg", IMAGE), ("0.cls", b"2.0"), ("1.jpg", IMAGE), ("1.cls", b"2")])
    assert floats.samples["label"].tolist() == [2, 2]


def test_labels_that_begin_at_1_are_said(tmp_path: Path) -> None:
    _, line = index(tmp_path / "one", [m for n in (1, 2) for m in ((f"{n}.jpg", IMAGE), (f"{n}.cls", b"%d" % n))])
    assert "; warning: class 0 has no sample: do labels begin at 1?: " in line


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([("jpg", IMAGE), ("json", b'{"id": 7, "label": "cat"}')], "but its .json names a class: --label json:label"),
        ([("jpg", IMAGE), ("json", b'{"class_id": 3}')], "--label json:class_id"),
        (
            [("left.jpg", IMAGE), ("right.jpg", IMAGE), ("cls", b"1")],
            "left.jpg, right.jpg: choose one with --image l",
        ),
    ],
)
def test_a_wrong_rule_is_said_once_with_the_right_one(
    tmp_path: Path, parts: list[tuple[str, bytes]], said: str
) -> None:
    """Fails when every sample is a problem of its own."""
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t" / "0.tar", samples(*parts, count=30))
    assert said in refused("shards", "index", tmp_path / "t")


def test_one_of_several_images_is_chosen(tmp_path: Path) -> None:
    """Only that is read, and an index of the other is another. Mutation: the rule does not know of the image."""
    left, right = png(np.random.default_rng(1), 5, 6), png(np.random.default_rng(2), 7, 8)
    members = samples(("left.png", left), ("right.png", right), ("cls", b"0"))
    found, _ = index(tmp_path / "t", members, image="left.png")
    assert found.samples["width"].tolist() == [6, 6, 6]
    assert index_shards([str(tmp_path / "t")], image="right.png").startswith("indexed")
    assert ShardIndex.load(tmp_path / "t" / "index.dtx").samples["width"].tolist() == [8, 8, 8]
    assert refused("shards", "index", tmp_path / "t", "--image=left").startswith("--image: 'left' does not end as")


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz"])
def test_compressed_tars_are_to_be_decompressed(tmp_path: Path, name: str) -> None:
    """In a folder and by name. Fails when there are 'no tars'."""
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    for location in (tmp_path, tmp_path / name):
        assert "decompress" in refused("shards", "index", location)


# Packing


def test_a_table_with_floats_gives_the_classes_of_one_with_whole_numbers(tmp_path: Path) -> None:
    """A column that once had an empty cell. Fails when '10.0' is a name that stands before '2.0'."""
    for split in ("train", "val"):
        (tmp_path / "raw" / split).mkdir(parents=True)
        lines = []
        for number in range(12):
            (tmp_path / "raw" / split / f"{number}.png").write_bytes(png(np.random.default_rng(number), 4, number + 1))
            lines.append(f"{number}.png,{number}{'.0' if split == 'train' else ''}\n")
        (tmp_path / f"{split}.csv").write_text("file,class\n" + "".join(lines))
    from dist_trainer.commands.main import dispatch

    tables = [f"--labels={split}={tmp_path / split}.csv" for split in ("train", "val")]
    dispatch(["shards", "pack", str(tmp_path / "raw"), str(tmp_path / "out"), *tables])
    for split in ("train", "val"):
        found = ShardIndex.load(tmp_path / "out" / split / "index.dtx")
        assert found.samples["label"].tolist() == [width - 1 for width in found.samples["width"].tolist()]


def test_packed_validation_may_lack_a_class_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With training's numbers. Fails when its folders are numbered by themselves."""
    from dist_trainer.commands.main import dispatch

    for split, names in (("train", ("ant", "bee", "cat")), ("val", ("ant", "cat"))):
        for name in names:
            (tmp_path / "raw" / split / name).mkdir(parents=True)
            (tmp_path / "raw" / split / name / "1.png").write_bytes(IMAGE)
    (tmp_path / "raw" / "val" / "bee").mkdir()  # empty
    dispatch(["shards", "pack", str(tmp_path / "raw"), str(tmp_path / "out")])
    assert "1 of 3 classes have no image ('bee')" in capsys.readouterr().out
    found = ShardIndex.load(tmp_path / "out" / "val" / "index.dtx")
    assert (sorted(found.samples["label"].tolist()), found.class_names) == ([0, 2], ("ant", "bee", "cat"))
