import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

# Several ranks of a test would want a GPU each, and NCCL: on a machine with GPUs they are hidden from all tests but
# those that are for one (pytest -m cuda), and from the ranks that tests start, which inherit this.
if "cuda" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from helpers import index_of, members_of, sample_members, write_tar
from nodes import COUNTS, RETRY, Node
from running import FASHION, POOLS

from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.data.read import Reader
from dist_trainer.shards.prepare import prepare_index
from dist_trainer.storage import retry
from dist_trainer.storage.cache import CacheConfig

if TYPE_CHECKING:
    from s3_server import S3Server


@pytest.fixture(scope="session", autouse=True)
def _end_of_ranks() -> Iterator[None]:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, the ranks that tests start would ignore it, too
    yield
    for pool in POOLS.values():
        pool.close()


@pytest.fixture(scope="session")
def whole_fashion() -> list[str]:
    """Arguments that name the Fashion-MNIST tars, which `make data` prepares."""
    if not (FASHION / "val" / "index.dtx").exists():
        pytest.fail("Fashion-MNIST is not prepared: run make data")
    return [f"--data.train={FASHION / 'train'}", f"--data.val={FASHION / 'val'}"]


@pytest.fixture(scope="session")
def fashion(whole_fashion: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same with the first 500 validation images alone: most tests score many runs."""
    folder = tmp_path_factory.mktemp("fashion")
    index = ShardIndex.load(FASHION / "val" / FILE_NAME)
    images = Reader(index, retry=RETRY, cache=CacheConfig()).read(np.arange(500))
    labels = index.samples["label"].tolist()
    members = [
        member
        for number, (image, label) in enumerate(zip(images, labels, strict=False))
        for member in ((f"{number:04d}.png", image), (f"{number:04d}.cls", b"%d" % label))
    ]
    write_tar(folder / "0.tar", members)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in index.class_names))
    prepare_index("data.val", str(folder))
    return [whole_fashion[0], f"--data.val={folder}"]


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of 100, 70 and 33 samples: 15 blocks of 16."""
    folder = tmp_path_factory.mktemp("tars")
    for number, count in enumerate(COUNTS):
        write_tar(folder / f"{number:06d}.tar", sample_members(count, 8 + number))
    return folder


@pytest.fixture(scope="session")
def index(tars: Path) -> ShardIndex:
    return index_of(*sorted(tars.glob("*.tar")))


@pytest.fixture(scope="session")
def truth(tars: Path) -> list[bytes]:
    """Every image in order, by Python's tarfile."""
    images = []
    for tar in sorted(tars.glob("*.tar")):
        data = tar.read_bytes()
        members = [info for name, info in members_of(tar).items() if name.endswith(".png")]
        images += [data[info.offset_data : info.offset_data + info.size] for info in members]
    return images


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE", 0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three files; `a.bin` has 5,000 random bytes."""
    path = tmp_path / "folder"
    path.mkdir()
    for name in ("a.bin", "b.bin", "c.tar"):
        (path / name).write_bytes(np.random.default_rng(ord(name[0])).bytes(5000))
    return path


@pytest.fixture(scope="session")
def _moto() -> "Iterator[S3Server]":
    from s3_server import S3Server  # three seconds

    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(_moto: "S3Server", monkeypatch: pytest.MonkeyPatch) -> "S3Server":
    """moto's S3 on loopback, and made-up credentials in the environment."""
    from s3_server import CREDENTIALS

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    _moto.gets.clear()
    return _moto
