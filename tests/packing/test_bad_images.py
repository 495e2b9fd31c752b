"""`shards pack` and images that cannot be used: found in one pass, left out, mended or removed without a new start."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import png
from pack_sources import contents, fill, folder_contents, packed
from PIL import Image

from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.errors import UserError
from dist_trainer.packing.pack import BAD_FILE

PER_SHARD = "--samples_per_shard=4"


def broken(raw: Path, *names: str) -> list[Path]:
    """These files cut in half."""
    files = [raw / name for name in names]
    for file in files:
        file.write_bytes(file.read_bytes()[:-30])
    return files


def lines(raw: Path, out: Path, *options: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        packed(raw, out, PER_SHARD, *options)
    return str(caught.value).splitlines()


def tars(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


def test_all_are_named_in_one_pass_and_the_rest_is_packed(tmp_path: Path) -> None:
    """In both splits. Fails when the first ends the command."""
    for split in ("train", "val"):
        fill(tmp_path / "raw" / split, {"ant": 9, "bee": 9})
    bad = broken(tmp_path / "raw", "train/ant/ant_0002.png", "train/bee/bee_0008.png", "val/ant/ant_0000.png")
    said = lines(tmp_path / "raw", tmp_path / "out", "--allow-bad=0")
    assert [line for line in said if line.startswith("  ")] == [
        f"  {file}: does not decode: image file is truncated" for file in bad
    ]
    assert "2 images cannot be used" in said[0]
    assert said[0].endswith("or --allow_bad 2")
    assert len(tars(tmp_path / "out" / ".train.partial")) == 5


@pytest.mark.parametrize("options", [(), ("--val_fraction=0.2",)], ids=["whole", "a part split off"])
def test_removing_one_does_not_start_the_pack_again(
    tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished tars stay as they are; the result holds every other image, by its number from before, and is the one
    that --allow_bad gives, byte for byte.

    Mutations: a removed image shifts the others' numbers; the split for validation is drawn anew.
    """
    raw = fill(tmp_path / "raw", {"ant": 10, "bee": 10})
    (bad,) = broken(raw, "bee/bee_0003.png")
    lines(raw, tmp_path / "out", *options)
    lines(raw, tmp_path / "allowed", *options)
    packed(raw, tmp_path / "allowed", PER_SHARD, *options, "--allow_bad=1")
    before = {split: tars(tmp_path / "out" / f".{split}.partial") for split in ("train", "val")}
    bad.unlink()
    packed(raw, tmp_path / "out", PER_SHARD, *options)
    found: Counter[tuple[str, int]] = Counter()
    for split in ("train", "val") if options else ("train",):
        after = tmp_path / "out" / split
        found += contents(after)
        assert before[split].items() <= tars(after).items()
        for tar in after.glob("*.tar"):
            assert tar.read_bytes() == (tmp_path / "allowed" / split / tar.name).read_bytes()
        assert not list(after.glob("0*.json"))
    assert found == folder_contents(raw)
    assert "1 bad image left out (bad.json)" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists; remove it"):
        packed(raw, tmp_path / "out", PER_SHARD, *options)


def test_one_that_is_mended_is_taken_in(tmp_path: Path) -> None:
    """Its tar alone is written anew. Fails when it stays out, or all is packed again."""
    raw = fill(tmp_path / "raw", {"ant": 10, "bee": 10})
    whole = (raw / "ant" / "ant_0001.png").read_bytes()
    broken(raw, "ant/ant_0001.png", "bee/bee_0000.png")
    lines(raw, tmp_path / "out")
    before = tars(tmp_path / "out" / ".train.partial")
    (raw / "ant" / "ant_0001.png").write_bytes(whole)
    packed(raw, tmp_path / "out", PER_SHARD, "--allow_bad=1")
    out = tmp_path / "out" / "train"
    (raw / "bee" / "bee_0000.png").unlink()
    assert contents(out) == folder_contents(raw)
    assert len(before.items() - tars(out).items()) == 1
    (left,) = json.loads((out / BAD_FILE).read_text())
    assert (left["image"], left["class_name"], left["is_gone"]) == ("bee/bee_0000.png", "bee", False)


def test_one_of_a_labelled_folder_may_go_with_its_row_or_without(tmp_path: Path) -> None:
    """Fails when the table's row of a removed image is a mistake, or its class is forgotten."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(6):
        (raw / f"{number}.png").write_bytes(png(np.random.default_rng(number)))
    rows = [f"{number}.png,{'ant' if number < 3 else 'bee'}\n" for number in range(6)]
    table = tmp_path / "labels.csv"
    table.write_text("".join(rows))
    for out, keep in (("with", True), ("without", False)):
        (bad,) = broken(raw, "2.png")
        lines(raw, tmp_path / out, f"--labels={table}")
        bad.unlink()
        if not keep:
            table.write_text("".join(rows[:2] + rows[3:]))
        packed(raw, tmp_path / out, PER_SHARD, f"--labels={table}")
        index = ShardIndex.load(tmp_path / out / "train" / FILE_NAME)
        assert sorted(index.samples["label"].tolist()) == [0, 0, 1, 1, 1]
        (raw / "2.png").write_bytes(png(np.random.default_rng(2)))


def test_the_index_keeps_each_files_own_name(tmp_path: Path) -> None:
    """In the tars' order, without those that were left out; messages about a sample show it.

    Mutation: names in the order of the source.
    """
    raw = fill(tmp_path / "raw", {"ant": 5, "bee": 5})
    for number, path in enumerate(sorted(raw.glob("*/*.png"))):
        Image.new("L", (number + 1, 1)).save(path)
    broken(raw, "bee/bee_0000.png")
    packed(raw, tmp_path / "out", PER_SHARD, "--allow_bad=1")
    index = ShardIndex.load(tmp_path / "out" / "train" / FILE_NAME)
    names = {number + 1: f"{path.parent.name}/{path.name}" for number, path in enumerate(sorted(raw.glob("*/*.png")))}
    widths = index.samples["width"].tolist()
    assert [index.source_of(sample) for sample in range(9)] == [names[width] for width in widths]
    assert index.describe(3).endswith(f"({names[widths[3]]})")
