"""The one listing of images: random trees against a plain specification, links, and who uses it."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import message, png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import ROOT

from dist_trainer.data.listing import class_folders, is_image, left_out_text, list_images, passed_over
from dist_trainer.errors import UserError
from dist_trainer.packing.sources import FolderSource
from dist_trainer.shards.image_folder import scan_folder

IMAGE_BYTES = png(np.random.default_rng(0))
NAMES = st.sampled_from(
    ["a.jpg", "B.JPEG", "c.Png", "d.bmp", "e.tif", "f.gif", "g.jfif", "._a.jpg", ".hidden.png", "Thumbs.db", "list.txt",
     "noext", "x.jpg.bak", "jpg", "two.dots.webp", "é.jpg", "e\u0301.jpg", "名.png", "blank .jpg", "x.jpg_large"]
)  # fmt: skip
FOLDERS = st.sampled_from(["sub", ".cache", "@eaDir", "__MACOSX", ".ipynb_checkpoints", "Ünter", "lost+found", "x.jpg"])
TREE = st.recursive(
    st.dictionaries(NAMES, st.none(), max_size=4),
    lambda inner: st.dictionaries(FOLDERS, inner, max_size=3).flatmap(
        lambda folders: st.dictionaries(NAMES, st.none(), max_size=4).map(lambda files: {**files, **folders})
    ),
    max_leaves=6,
)
LINKS = st.lists(st.tuples(st.sampled_from(["up", "in.png", "sub2"]), st.integers(0, 20)), max_size=3)


def grow(folder: Path, tree: dict[str, object]) -> list[Path]:
    """Make the tree; its folders."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder]
    for name, inner in tree.items():
        if isinstance(inner, dict):
            made += grow(folder / name, inner)
        elif not (folder / name).exists():
            (folder / name).write_bytes(IMAGE_BYTES)
    return made


def specified(folder: Path) -> tuple[list[str], Counter[str]]:
    """By README: what is hidden or junk does not exist, known suffixes are images, a folder counts once, by the first
    of its names in depth-first order."""
    kept: list[str] = []
    others: Counter[str] = Counter()
    done = set()
    waiting = [(folder, "")]
    while waiting:
        at, inside = waiting.pop()
        if at.resolve() in done:
            continue
        done.add(at.resolve())
        below = []
        for name in sorted(path.name for path in at.iterdir()):
            if name[0] == "." or name in ("@eaDir", "__MACOSX", "Thumbs.db", "desktop.ini", "lost+found"):
                continue
            if (at / name).is_dir():
                below.append((at / name, f"{inside}{name}/"))
                continue
            ending = name.rpartition(".")[2].lower() if "." in name else ""
            known = "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm pnm avif jp2"
            if ending in known.split():
                kept.append(inside + name)
            else:
                others[ending] += 1
        waiting += reversed(below)
    return sorted(kept), others


@given(TREE, LINKS)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_trees_are_listed_as_specified(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object], links: list[tuple[str, int]]
) -> None:
    """In place, and by `shards pack`. Mutations: follow a link that leads up; take `._a.jpg`; forget upper case."""
    root = tmp_path_factory.mktemp("tree")
    made = grow(root / "class", tree)
    for name, number in links:  # to a folder above, beside or below, or to itself
        place = made[number % len(made)] / name
        if not place.exists() and not place.is_symlink():
            place.symlink_to(made[number // 2 % len(made)], target_is_directory=True)
    images, others = specified(root / "class")
    listing = list_images(root / "class")
    assert (listing.images, +listing.left_out) == (images, others)
    if images:
        scan = scan_folder(str(root / "class"))
        source = FolderSource(root)
        assert scan.files == tuple(images)
        assert [source.own_name(i) for i in range(len(source))] == [f"class/{image}" for image in images]
        assert scan.left_out == source.left_out == +others


def test_a_link_to_its_own_folder_ends(tmp_path: Path) -> None:
    """And a folder that two links name counts once. Fails when links are followed until the kernel refuses."""
    grow(tmp_path / "a", {"1.jpg": None})
    grow(tmp_path / "b", {"2.jpg": None})
    (tmp_path / "a" / "again").symlink_to(".")
    (tmp_path / "a" / "y").symlink_to(tmp_path / "b")
    (tmp_path / "a" / "x").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "up").symlink_to(tmp_path / "a")
    assert list_images(tmp_path / "a").images == ["1.jpg", "x/2.jpg"]


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    """Fails when it is passed over, or a pipe with the name of an image is waited for."""
    grow(tmp_path / "c" / "a", {"1.jpg": None})
    (tmp_path / "c" / "a" / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "c" / "a" / "3.jpg")
    listing = list_images(tmp_path / "c" / "a")
    assert (listing.images, listing.left_out) == (["1.jpg", "2.jpg"], {"jpg": 1})
    with pytest.raises(FileNotFoundError, match=r"2\.jpg"):
        scan_folder(str(tmp_path / "c" / "a"))


@pytest.mark.skipif(os.getuid() != 0, reason="becoming a user who may not read needs root")
def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    """Fails when os.walk's silence is kept."""
    inner = tmp_path / "class" / "more"
    grow(inner, {"1.jpg": None})
    for folder in [*tmp_path.parents, tmp_path, tmp_path / "class"]:
        if str(folder).startswith(str(tmp_path.parents[1])):
            folder.chmod(0o755)
    inner.chmod(0o000)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

    def as_another(code: str) -> subprocess.CompletedProcess[str]:
        command = ["setpriv", "--reuid", "54321", "--clear-groups", sys.executable, "-c", code, str(tmp_path / "class")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    start = "import sys, pathlib; from dist_trainer.data.listing import *; "
    if as_another(start).returncode:  # where the checkout or its Python lies in a folder of root's alone
        pytest.skip("another user cannot read this checkout")
    done = as_another(f"{start}list_images(pathlib.Path(sys.argv[1]))")
    assert f"UserError: {inner}: Permission denied" in done.stderr


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    """An index could not hold it. Fails when it ends in a traceback of the encoder."""
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(IMAGE_BYTES)
    with pytest.raises(UserError, match="is not UTF-8; rename it") as caught:
        list_images(tmp_path)
    message(caught)


def test_folders_that_systems_leave_are_no_classes(tmp_path: Path) -> None:
    for name in ("cat", "@eaDir", "__MACOSX", ".git", "dog "):
        (tmp_path / name).mkdir()
    assert class_folders(tmp_path) == ["cat", "dog "]


def test_members_of_tars_go_by_the_same_rules() -> None:
    """`./` and `../` are no hidden folders. Fails when the first component alone is looked at."""
    kept = ["./a/1.jpg", "a/b/1.JPG", "../1.png"]
    assert [name for name in [*kept, "a/._1.jpg", "__MACOSX/1.jpg", ".x/1.jpg"] if is_image(name)] == kept
    assert passed_over("a/.x/1.cls")


def test_what_is_left_out_is_said_by_suffix() -> None:
    assert left_out_text({}) == ""
    assert left_out_text({"": 1}) == "; 1 other file left out (1 without a suffix)"
    many = {"txt": 2, "bin": 1_200, "xml": 2, "a": 1, "b": 1, "c": 1}
    assert left_out_text(many) == "; 1,207 other files left out (1,200 .bin, 2 .txt, 2 .xml, 1 .a, 1 .b, ...)"
