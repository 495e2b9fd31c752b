"""The block cache: blocks fetched once per node, bounded; nothing that dies or fills up stops or misleads it."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cache_jobs
import numpy as np
import pytest
from cache_jobs import HANG, Job
from faulty_fs import FOR_EVER
from nodes import BLOCK, NUM_BLOCKS, Node, refused, wait_for

from dist_trainer.data.index import ShardIndex
from dist_trainer.storage import cache as cache_module
from dist_trainer.storage.cache import BlockCache, CacheConfig, own_folder
from dist_trainer.storage.flock import is_at, lock_file
from dist_trainer.storage.retry import in_background
from dist_trainer.storage.storage import RetryConfig

# Faults and deaths


def test_a_process_killed_while_it_fetches_blocks_nobody(index: ShardIndex, truth: list[bytes], node: Node) -> None:
    """One process hangs in a request, a second one waits for it; the first one is killed: the second one fetches.

    Fails when a lock outlives its owner, and when the second one does not wait.
    """
    hanging = Job(cache_jobs.read, node.reader(index, "stall", FOR_EVER), [0])
    wait_for(lambda: len(node.requests) == 1)
    waiting = Job(cache_jobs.read, node.reader(index), [1])
    time.sleep(1.0)  # long enough to start; a false pass here is no false failure
    assert waiting.is_waiting
    assert len(node.requests) == 1
    hanging.kill()
    assert waiting.result() == [truth[1]]
    assert len(node.requests) == 2
    assert not node.parts()


def test_a_process_killed_while_it_writes_leaves_nothing_wrong(
    index: ShardIndex, truth: list[bytes], node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a block is on the disk. Who needs it fetches it anew; who does not clears it away; the sum stays right.

    Fails when half a block is read, or stays for ever.
    """
    for number, block in enumerate((0, 3)):
        flag = tmp_path / f"flag{number}"
        writing = Job(cache_jobs.hang_in_write, node.reader(index), [block * BLOCK], str(flag))
        wait_for(flag.exists)
        writing.kill()
    assert len(node.parts()) == 2
    assert node.reader(index).read(np.arange(BLOCK)) == truth[:BLOCK]
    assert len(node.parts()) == 1
    monkeypatch.setattr(cache_module, "_SWEEP_EVERY", -1)
    BlockCache(node.folder, 10**9)
    assert not node.parts()
    assert counted(node) == sum(path.stat().st_size for path in node.blocks())


def test_the_lock_of_a_file_that_is_gone_is_worth_nothing(tmp_path: Path) -> None:
    """Who waited for a file that was renamed or removed meanwhile locks the one that has its name now.

    Fails when the first lock that is had is taken: two processes would then fetch one block.
    """
    path = tmp_path / "block.part"
    for leave in (lambda: path.rename(tmp_path / "block"), path.unlink):
        held = lock_file(path, 1)
        assert held is not None
        waiting = in_background(lambda: lock_file(path, HANG))
        time.sleep(0.05)  # most likely it waits by now; if not, this proves less
        leave()
        os.close(held)
        found = waiting.result(HANG)
        assert found is not None
        assert is_at(found, path)
        assert lock_file(path, 0) is None
        os.close(found)


def test_a_process_ends_while_its_prefetches_hang(index: ShardIndex, node: Node) -> None:
    """Fails when a thread is waited for at exit."""
    job = Job(cache_jobs.prefetch_and_end, node.reader(index, "stall", FOR_EVER), [0, 1, 2])
    assert job.result() == "done"


def test_another_that_fetches_too_long_is_not_waited_for(index: ShardIndex, truth: list[bytes], node: Node) -> None:
    """A live process that does not get on with a block holds others for one attempt's time.

    Fails when they wait for it without end.
    """
    node.reader(index)._cache  # noqa: B018  # makes the folder
    block = node.reader(index)._block(0)
    descriptor = os.open(node.folder / "blocks" / f"{block.name}.part", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert node.reader(index, retry=RetryConfig(timeout=0.3, deadline=60)).read(np.array([1])) == [truth[1]]
    os.close(descriptor)


# Bounds


def counted(node: Node) -> int:
    return int((node.folder / "usage").read_bytes().split()[0])


def used(node: Node) -> int:
    """Bytes of all files, while no process changes names."""
    with (node.folder / "usage").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in (node.folder / "blocks").iterdir())


def test_the_bound_holds_under_churn(index: ShardIndex, truth: list[bytes], node: Node) -> None:
    """Three processes read at random through a cache of half the set: its size never exceeds the bound, and
    every byte is right. Fails when space is taken after the write, or eviction frees too little.
    """
    bound = 200_000
    jobs = [
        Job(cache_jobs.churn, node.reader(index, size=f"{bound}B"), seed, 2.5, truth) for seed in range(3)
    ]  # fmt: skip
    wait_for((node.folder / "usage").exists)
    sizes = []
    while any(job.is_waiting for job in jobs):
        sizes.append(used(node))
        time.sleep(0.002)
    assert [job.result() for job in jobs] == [0, 0, 0]
    assert max(sizes) <= bound
    assert max(sizes) > 0.7 * bound
    assert len(node.requests) > 3 * NUM_BLOCKS  # there was churn
    assert used(node) == counted(node)


def test_what_was_used_longest_ago_is_evicted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten blocks of which one is used over and over stay ten with that one. Fails when the oldest by birth goes."""
    monkeypatch.setattr(cache_module, "_TOUCH_EVERY", 0)
    cache = BlockCache(tmp_path / "cache", 10_000)
    for number in range(100):
        assert (
            cache.fetch(f"b-{number}", 1000, lambda number=number: bytes([number]) * 1000, 1) == bytes([number]) * 1000
        )
        assert cache.read("b-0", 1000, 999, 1) == b"\0"
        time.sleep(0.001)  # marks of use are times
    kept = sorted(int(path.name[2:]) for path in (tmp_path / "cache" / "blocks").iterdir())
    assert kept[0] == 0
    assert kept[1:] == list(range(100 - len(kept) + 1, 100))
    assert len(kept) >= 9


def test_an_open_block_stays_readable_after_it_was_evicted(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", 2500)
    for number in range(3):
        cache.fetch(f"b-{number}", 1000, lambda: b"x" * 1000, 1)
        assert cache.read(f"b-{number}", 1000, 0, 2) == b"xx"
    assert cache.read("b-0", 1000, 0, 2) == b"xx"
    assert not cache.has("b-0", 1000)


def test_a_full_disk_is_one_warning(
    index: ShardIndex, truth: list[bytes], node: Node, capfd: pytest.CaptureFixture[str]
) -> None:
    """A process that can write no block reads all the same. Fails when ENOSPC ends it, or each block warns."""
    assert (
        Job(cache_jobs.read_without_room, node.reader(index, options={"log": ""}), list(range(203)), 300).result()
        == truth
    )
    said = [line for line in capfd.readouterr().err.splitlines() if "continuing without the cache" in line]
    assert len(said) == 1
    assert not node.blocks()
    assert counted(node) == 0


def test_a_cache_folder_that_vanishes_is_no_end(index: ShardIndex, truth: list[bytes], node: Node) -> None:
    """Somebody clears /tmp. Fails when the reader raises what the disk says."""
    reader = node.reader(index)
    assert reader.read(np.arange(40)) == truth[:40]
    shutil.rmtree(node.folder)
    assert reader.read(np.arange(203)) == truth


# Folders, configs


def test_the_folder_is_ours_alone(tmp_path: Path) -> None:
    """Whoever can write there could choose our images. Fails when a shared or linked folder is taken."""
    assert own_folder(tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared").mkdir(mode=0o755)
    assert "chmod 700" in refused(lambda: own_folder(tmp_path / "shared"))
    (tmp_path / "link").symlink_to(tmp_path / "new" / "cache")
    assert "not a folder of this user" in refused(lambda: own_folder(tmp_path / "link"))
    (tmp_path / "file").touch()
    assert refused(lambda: own_folder(tmp_path / "file"))
    assert refused(lambda: own_folder(tmp_path / "file" / "inner"))


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch


def test_where_the_cache_is(clean_environment: pytest.MonkeyPatch) -> None:
    """Slurm's folder before TMPDIR before /tmp, each for this user; a given one with its variables."""
    mine = f"dist_trainer-{os.getuid()}"
    assert CacheConfig().folder == Path("/tmp") / mine
    clean_environment.setenv("TMPDIR", "/var/tmp")
    assert CacheConfig().folder == Path("/var/tmp") / mine
    clean_environment.setenv("SLURM_TMPDIR", "/scratch/7")
    assert CacheConfig().folder == Path("/scratch/7") / mine
    assert CacheConfig(dir="$SLURM_TMPDIR/imagenet").folder == Path("/scratch/7/imagenet")


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("1.5TiB", 3 * 2**39), ("500 MB", 5 * 10**8), ("7", 7), ("2gb", 2 * 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert CacheConfig(size=text).size_bytes == size


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (CacheConfig(size="lots"), "data.cache.size: 'lots' is not a size"),
        (CacheConfig(size="20XB"), "data.cache.size: '20XB' is not a size"),
        (CacheConfig(size="-1GB"), "data.cache.size: '-1GB' is not a size"),
        (CacheConfig(dir="relative"), "data.cache.dir: 'relative' is not an absolute path"),
        (
            CacheConfig(dir="$NO_SUCH_VARIABLE/x"),
            "data.cache.dir: '$NO_SUCH_VARIABLE/x' has a variable that is not set",
        ),
    ],
)
def test_configs_that_cannot_be_kept_are_refused(config: CacheConfig, said: str) -> None:
    assert said in refused(partial(config.check, "data.cache"))
