"""`shards check`: what is bad in shards, by the level of looking, on real tars and image folders."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import members_of, png, sample_members, write_tar
from PIL import Image

from dist_trainer.commands.main import dispatch
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.errors import UserError
from dist_trainer.shards import check
from dist_trainer.shards.check import Level, check_index
from dist_trainer.shards.prepare import find_index, index_shards

LEVELS: tuple[Level, ...] = ("headers", "crc", "decode")


def patch(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two indexed tars of 5 samples each; the last image's pixels are destroyed, between a good header and end."""
    folder = tmp_path / "data"
    folder.mkdir()
    members = sample_members(10, size=40)
    name, image = members[-1]
    members[-1] = name, image[: len(image) // 2] + bytes(100) + image[len(image) // 2 + 100 :]
    for number in range(2):
        write_tar(folder / f"{number}.tar", members[number * 10 : number * 10 + 10])
    index_shards([str(folder)])
    return folder


def found(index: ShardIndex, level: Level) -> list[tuple[str, int | None, str]]:
    """(shard, sample, reason)"""
    return [(Path(bad.shard).name, bad.sample, bad.reason) for bad in check_index(index, level)]


def test_each_level_finds_what_it_looks_at_and_no_more(data: Path) -> None:
    """A flipped byte, a cut image, a destroyed header, a wrong length: by sample, at the level that can know.

    Fails when headers are not looked at behind headers, or an image that decodes in part is good.
    """
    index = find_index(str(data))
    cut = ("1.tar", 9, "not a readable image")
    assert [found(index, level) for level in LEVELS[:2]] == [[], []]
    assert [(shard, n, reason[: len(cut[2])]) for shard, n, reason in found(index, "decode")] == [cut]
    places = members_of(data / "0.tar")
    patch(data / "0.tar", places["001.png"].offset_data + 300, b"\xff\x00\xff")
    crc = ("0.tar", 1, "its bytes are not those that were indexed")
    assert found(index, "headers") == []
    assert found(index, "crc") == [crc]
    patch(data / "0.tar", places["003.png"].offset, b"\xff" * 512)
    header = ("0.tar", 3, "no tar header before it")
    assert found(index, "headers") == [header]
    assert found(index, "crc") == [crc, header]
    assert len(found(index, "decode")) == 3


def test_shards_that_are_gone_or_cut_are_listed_with_their_samples(data: Path) -> None:
    """And the others are checked all the same. Fails when the first that is missing ends the check."""
    index = find_index(str(data))
    place = members_of(data / "1.tar")["008.png"].offset_data
    with (data / "1.tar").open("r+b") as file:
        file.truncate(place + 100)
    (data / "0.tar").unlink()
    said = found(index, "crc")
    assert said[0] == ("0.tar", None, "No such file or directory")
    assert said[1][:2] == ("1.tar", None)
    assert "bytes, but the index says" in said[1][2]
    assert [n for _, n, _ in said[2:]] == [8, 9]


def test_known_bad_samples_are_passed_over_and_counted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 0 for a set that is as it was accepted. Fails when they are reported as news."""
    write_tar(data / "1.tar", [("a.cls", b"x"), ("a.png", png(np.random.default_rng(0))), *sample_members(3)])
    index_shards([str(data)], allow_bad=1)
    assert dispatch(["shards", "check", str(data), "--level", "decode"]) == 0
    assert capsys.readouterr().out == (
        f"{data}: 9 samples, 2 shards, decode: all good; 1 more were bad when they were indexed\n"
    )


def test_the_command_lists_bad_samples_and_says_so_by_its_status(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shard, sample, byte, class and reason; the same as JSON. Fails when the status is 0."""
    place = members_of(data / "1.tar")["009.png"].offset_data
    file = tmp_path / "bad.json"
    assert dispatch(["shards", "check", str(data / FILE_NAME), "--level=decode", f"--json={file}"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{data / '1.tar'}: sample 9 at byte {place}, class '0': not a readable image")
    assert last == f"{data / FILE_NAME}: 10 samples, 2 shards, decode: 1 bad"
    (entry,) = json.loads(file.read_text())
    assert (entry["shard"], entry["sample"], entry["offset"]) == (str(data / "1.tar"), 9, place)
    assert dispatch(["shards", "check", str(data)]) == 0


def test_wrong_sizes_and_labels_are_found(data: Path) -> None:
    """An index that says another width or length, or a class that is none. Fails when decode only decodes."""
    index = find_index(str(data))
    samples = index.samples.copy()
    samples["width"][2] += 1
    samples["label"][4] = 3
    samples["length"][6] -= 1
    said = found(replace(index, samples=samples), "decode")
    assert [n for _, n, _ in said] == [2, 4, 6, 9]
    assert said[0][2] == "it decodes to 40 x 40, but its header says 41 x 40"
    assert said[1][2] == "label 3, but the index has 3 classes"
    assert "the tar header before it says" in said[2][2]


def test_an_image_folder_is_checked_file_by_file(tmp_path: Path) -> None:
    """Fails when files are looked for in tars."""
    rng = np.random.default_rng(0)
    for name in ("a/0", "a/1", "b/0", "b/1"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"{name}.png").write_bytes(png(rng))
    index_shards([str(tmp_path / "images")])
    index = find_index(str(tmp_path / "images"))
    assert [found(index, level) for level in LEVELS] == [[], [], []]
    patch(tmp_path / "images" / "a" / "1.png", 60, b"\xff\xff")
    (tmp_path / "images" / "b" / "0.png").write_bytes(b"short")
    (tmp_path / "images" / "b" / "1.png").unlink()
    by_level = {level: [(shard, n) for shard, n, _ in found(index, level)] for level in LEVELS}
    assert by_level["headers"] == [("0.png", 2), ("1.png", 3)]
    assert by_level["crc"] == by_level["decode"] == [("1.png", 1), ("0.png", 2), ("1.png", 3)]


def test_a_thousand_photographs_are_good_on_one_process_and_on_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JPEG, PNG, WebP, grey, palette and CMYK, in 4 tars, by the decoder that training uses; then one byte is flipped.

    Fails when an image that is whole is reported, or processes give their findings in another order.
    """
    rng, members = np.random.default_rng(0), []
    kinds = ["jpg RGB", "jpg L", "jpg CMYK", "png RGB", "png P", "png LA", "webp RGB"]
    for n in range(1000):
        suffix, mode = kinds[n % 7].split()
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        image = small.resize((int(rng.integers(16, 60)), int(rng.integers(16, 60))), Image.Resampling.BICUBIC)
        file = tmp_path / f"image.{suffix}"
        image.convert(mode).save(file)
        members += [(f"{n:04d}.{suffix}", file.read_bytes()), (f"{n:04d}.cls", b"%d" % (n % 5))]
    tars = [write_tar(tmp_path / f"{number}.tar", members[number * 500 : number * 500 + 500]) for number in range(4)]
    index_shards([str(tmp_path)])
    index = find_index(str(tmp_path))
    assert check_index(index, "decode") == []
    monkeypatch.setitem(check._FEW, "crc", 0)
    for tar, key in ((tars[3], "0990"), (tars[1], "0300")):
        member = next(m for name, m in members_of(tar).items() if name.startswith(key) and ".cls" not in name)
        patch(tar, member.offset_data + member.size // 2, b"\x00\xff\x00\xff")
    two = check_index(index, "crc", num_processes=2)
    assert [bad.sample for bad in two] == [300, 990]
    assert two == check_index(index, "crc")


def test_a_location_without_an_index_is_refused(data: Path, tmp_path: Path) -> None:
    """Nothing is indexed unasked. Fails when a check makes what it checks against."""
    (data / FILE_NAME).unlink()
    with pytest.raises(UserError, match="has no index; make it with: dist-trainer shards index"):
        dispatch(["shards", "check", str(data)])
    with pytest.raises(UserError, match="level"):
        dispatch(["shards", "check", str(data), "--level=all"])
    shutil.rmtree(data)
    with pytest.raises(UserError, match="no such folder"):
        dispatch(["shards", "check", str(data)])
