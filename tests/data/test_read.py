"""The reader: the right bytes by every way, and what happens when the bytes are wrong or do not come."""

import pickle
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cache_jobs
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from cache_jobs import Job
from faulty_fs import FOR_EVER
from helpers import index_of, sample_members, write_tar
from nodes import BLOCK, COUNTS, NUM_BLOCKS, RETRY, Node, refused, wait_for
from s3_server import S3Server

from dist_trainer.data import read as read_module
from dist_trainer.data.blocks import Blocks
from dist_trainer.data.index import BAD, Problem, ShardIndex
from dist_trainer.data.order import EpochOrder, OrderSpec
from dist_trainer.data.read import Bad, Reader
from dist_trainer.data.texts import Texts
from dist_trainer.errors import LocalError, Outage
from dist_trainer.storage.cache import CacheConfig
from dist_trainer.storage.storage import RetryConfig

# Blocks


@hypothesis.given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 17))
def test_blocks_are_runs_of_samples_that_stay_in_a_shard(counts: list[int], block: int) -> None:
    """Held against a plain enumeration. Fails when an empty shard, a short block or a shard's edge is off."""
    plain = [
        list(range(sum(counts[:shard]) + start, sum(counts[:shard]) + min(start + block, count)))
        for shard, count in enumerate(counts)
        for start in range(0, count, block)
    ]
    blocks = Blocks(counts, block)
    assert len(blocks) == len(plain)
    for number, ids in enumerate(plain):
        assert blocks.span(number) == (ids[0], ids[-1] + 1)
        assert blocks.of(np.array(ids)).tolist() == [number] * len(ids)
        assert sum(counts[: blocks.shard(number)]) <= ids[0] < sum(counts[: blocks.shard(number) + 1])


def test_blocks_are_those_that_the_order_moves() -> None:
    """In a window of one block the order gives block after block. Fails when the two have different blocks."""
    blocks = Blocks(COUNTS, BLOCK)
    spec = OrderSpec(seed=0, lanes=1, chunk=1, block=BLOCK, window=1)
    found = blocks.of(EpochOrder(COUNTS, spec, 0).ids(0, sum(COUNTS)))
    assert np.count_nonzero(np.diff(found)) == len(blocks) - 1


# The right bytes


def test_four_processes_fetch_each_block_from_s3_once(
    index: ShardIndex, tars: Path, truth: list[bytes], node: Node, s3: S3Server
) -> None:
    """They share one cache and read everything, each in another order: every byte equals the tars', and moto's server
    has answered exactly one ranged request per block.

    Fails without the lock (blocks are fetched up to four times), and when a block's range is off by one.
    """
    s3.upload("shards", *tars.glob("*.tar"), under="train/")
    reader = node.reader(replace(index, root="s3://shards/train"), options=s3.options)
    jobs = [Job(cache_jobs.read_in_order_of, reader, seed, 48) for seed in range(4)]
    for job in jobs:
        assert job.result() == truth
    assert set(Counter(s3.gets).values()) == {1}
    assert len(s3.gets) == NUM_BLOCKS


def test_all_ways_give_the_same_bytes(index: ShardIndex, truth: list[bytes], node: Node) -> None:
    """Where they are, through the cache from a path, from a URL, and sample by sample; repeated ids too.

    Fails when a place inside a block is off, or the order of ids is not kept.
    """
    config = CacheConfig(dir=str(node.folder))
    readers = [
        Reader(index, retry=RETRY, cache=CacheConfig()),
        Reader(index, retry=RETRY, cache=config, block=BLOCK),
        node.reader(index),
        node.reader(index, whole_blocks=False),
    ]
    for reader in readers:
        for ids in (np.arange(len(truth)), np.array([5, 202, 5, 0, 99, 100]), np.array([], np.int64)):
            assert reader.read(ids) == [truth[sample] for sample in ids]
        assert pickle.loads(pickle.dumps(reader)).read(np.array([7])) == [truth[7]]


def test_what_is_cached_is_not_asked_for_again(
    index: ShardIndex, truth: list[bytes], node: Node, tmp_path: Path
) -> None:
    """The tars are gone after the first read. Fails when a hit still touches the source."""
    moved = Path(shutil.copytree(index.root, tmp_path / "moved"))
    moving = replace(index, root=str(moved))
    assert node.reader(moving).read(np.arange(203)) == truth
    shutil.rmtree(moved)
    later = node.reader(moving)
    assert later.read(np.arange(203)) == truth
    assert later.bytes_fetched == 0
    assert len(node.requests) == NUM_BLOCKS


def test_sets_whose_tars_have_the_same_names_stay_apart(node: Node, tmp_path: Path) -> None:
    """train/000000.tar and val/000000.tar, in one cache. Fails when a block is named by its tar's name alone."""
    readers = []
    for name, skip in (("train", 0), ("val", 2)):
        (tmp_path / name).mkdir()
        readers.append(node.reader(index_of(write_tar(tmp_path / name / "000000.tar", sample_members(20)[2 * skip :]))))
    train, val = (reader.read(np.arange(16)) for reader in readers)
    assert train[2:] == val[:-2]
    assert [reader.read(np.arange(16)) for reader in readers] == [train, val]
    assert len(node.requests) == len(node.blocks()) == 2


def test_single_samples_are_fetched_where_whole_blocks_would_be_waste(
    index: ShardIndex, truth: list[bytes], node: Node
) -> None:
    """Exactly the samples' own bytes come, and none is kept; but a block that is there is used.

    Fails when whole blocks come, or the cache is not looked into.
    """
    node.reader(index).read(np.array([0]))
    reader = node.reader(index, whole_blocks=False)
    assert reader.read(np.array([3, 20, 40])) == [truth[sample] for sample in (3, 20, 40)]
    assert reader.bytes_fetched == len(truth[20]) + len(truth[40])
    assert len(node.blocks()) == 1


def image_folder(folder: Path, truth: list[bytes]) -> ShardIndex:
    """The first 40 samples as files of two classes, and their index."""
    names = [f"{number}.png" for number in range(40)]
    for number, name in enumerate(names):
        path = folder / ("a" if number < 25 else "b") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(truth[number])
    plain = index_of(write_tar(folder.with_suffix(".tar"), sample_members(40)))
    samples = plain.samples.copy()
    samples["offset"] = 0
    return replace(
        plain, root=str(folder), shards=("a", "b"), stamps=("", ""), sizes=np.zeros(2, np.uint64), samples=samples,
        first=np.array([0, 25, 40], np.uint64), names=Texts.of(names),
    )  # fmt: skip


def test_image_folders_are_read_alike(truth: list[bytes], node: Node, tmp_path: Path) -> None:
    """Each sample its own file: where they are, and as cached blocks from a URL, each file asked for once.

    Fails when files are laid end to end in another order, or a shard's edge splits no block.
    """
    index = image_folder(tmp_path / "images", truth)
    assert Reader(index, retry=RETRY, cache=CacheConfig()).read(np.arange(40)[::-1]) == truth[:40][::-1]
    reader = node.reader(index)
    assert reader.read(np.arange(40)[::-1]) == truth[:40][::-1]
    assert node.reader(index).read(np.array([30, 1])) == [truth[30], truth[1]]
    assert len(node.requests) == len(set(node.requests)) == 40
    assert len(node.blocks()) == 2 + 1
    (tmp_path / "images" / "b" / "39.png").unlink()
    assert "39.png" in refused(lambda: Reader(index, retry=RETRY, cache=CacheConfig()).read(np.array([39])))


# What is wrong with bytes


def test_a_damaged_block_is_read_past_and_replaced(index: ShardIndex, truth: list[bytes], node: Node) -> None:
    """Flipped bytes, a cut and foreign bytes in cached files never reach the reader, and do not stay.

    Fails when a cached block is believed, or a damaged one kept.
    """
    node.reader(index).read(np.arange(203))
    sizes = [path.stat().st_size for path in node.blocks()]
    flipped, cut, foreign, longer = node.blocks()[:4]
    flipped.write_bytes(bytes(byte ^ 1 for byte in flipped.read_bytes()))
    cut.write_bytes(cut.read_bytes()[:700])
    foreign.write_bytes(bytes(foreign.stat().st_size))
    longer.write_bytes(longer.read_bytes() + b"x")
    assert node.reader(index).read(np.arange(203)) == truth
    healed = node.reader(index)
    assert healed.read(np.arange(203)) == truth  # fetches what was dropped
    last = node.reader(index)
    assert last.read(np.arange(203)) == truth
    assert last.bytes_fetched == 0
    assert [path.stat().st_size for path in node.blocks()] == sizes


@pytest.mark.parametrize("way", ["local", "cached", "single"])
def test_bytes_that_differ_twice_are_a_bad_sample(
    index: ShardIndex, truth: list[bytes], node: Node, tmp_path: Path, way: str
) -> None:
    """The source itself is damaged in one sample: that one is Bad, after a second read, and all others are right.

    Fails when it raises, or the bytes pass.
    """
    copy = Path(shutil.copytree(index.root, tmp_path / "copy"))
    data = bytearray((copy / "000000.tar").read_bytes())
    data[int(index.samples["offset"][9]) + 20] ^= 1
    (copy / "000000.tar").write_bytes(data)
    damaged = replace(index, root=str(copy))
    readers = {
        "local": lambda: Reader(damaged, retry=RETRY, cache=CacheConfig()),
        "cached": lambda: node.reader(damaged),
        "single": lambda: node.reader(damaged, whole_blocks=False),
    }
    found = readers[way]().read(np.arange(203))
    assert [sample for sample, data in enumerate(found) if isinstance(data, Bad)] == [9]
    assert isinstance(found[9], Bad)
    assert found[9].kind == "crc"
    found[9] = truth[9]
    assert found == truth
    if way != "local":
        start, length = (int(index.samples[name][9]) for name in ("offset", "length"))
        again = f"get {copy}/000000.tar {start} {start + length}"
        assert node.requests.count(again) == (1 if way == "cached" else 2)


def test_a_local_tar_that_was_cut_gives_bad_samples(
    index: ShardIndex, truth: list[bytes], node: Node, tmp_path: Path
) -> None:
    """Also through the cache. Fails when one lost sample takes its whole block along, or is waited for."""
    copy = Path(shutil.copytree(index.root, tmp_path / "copy"))
    end = int(index.samples["offset"][95])
    (copy / "000000.tar").write_bytes((copy / "000000.tar").read_bytes()[:end])
    cut = replace(index, root=str(copy))
    for cache in (CacheConfig(), CacheConfig(dir=str(node.folder))):
        found = Reader(cut, retry=RETRY, cache=cache, block=BLOCK).read(np.arange(203))
        assert [sample for sample, data in enumerate(found) if isinstance(data, Bad)] == list(range(95, 100))
        assert found[:95] == truth[:95]
        assert found[100:] == truth[100:]


def test_known_bad_samples_are_not_read(index: ShardIndex, truth: list[bytes], node: Node) -> None:
    """Tombstones keep their place and say why. Fails when they are read, or shift the others."""
    samples = index.samples.copy()
    for sample in (4, 5, *range(32, 48)):  # the last ones are a whole block
        samples[sample] = (0, 0, BAD, 0, 0, 0)
    known = replace(index, samples=samples, problems=(Problem("000000.tar", 512, "no label", 4),))
    for reader in (Reader(known, retry=RETRY, cache=CacheConfig()), node.reader(known)):
        found = reader.read(np.array([3, 4, 5, 6, 47]))
        assert found == [truth[3], Bad("label", "no label"), Bad("label", "known to be bad"), truth[6], found[4]]
        assert isinstance(found[4], Bad)
        assert len(reader.read(np.array([4, 5]))) == 2
        reader.prefetch([2])
    assert len(node.requests) == 1


# Faults


@pytest.mark.parametrize("whole_blocks", [True, False])
def test_faults_below_the_reader(index: ShardIndex, truth: list[bytes], node: Node, whole_blocks: bool) -> None:
    """Resets, short reads and 503s are survived and counted; what does not end is an Outage, never a bad sample;
    a missing tar is named at once.

    Fails when an I/O error becomes Bad, or is masked.
    """
    reader = node.reader(index, "reset", "short", "503", "short", whole_blocks=whole_blocks)
    assert reader.read(np.arange(40)) == truth[:40]
    assert reader.retries == 4
    other = Node(node.folder / "other")
    ends = RetryConfig(timeout=0.2, deadline=0.5)
    with pytest.raises(Outage, match="gave up after"):
        other.reader(index, "short", FOR_EVER, retry=ends, whole_blocks=whole_blocks).read(np.arange(40))
    gone = other.reader(replace(index, root="/nowhere"), whole_blocks=whole_blocks)
    with pytest.raises(LocalError, match=r"/nowhere/000000.tar.*no such file") as caught:
        gone.read(np.array([0]))
    assert not isinstance(caught.value, Outage)
    wait_for(lambda: not other.parts())


def test_blocks_larger_than_the_cache_are_not_kept(index: ShardIndex, truth: list[bytes], node: Node) -> None:
    """Then single samples come: a block per sample would never end. Fails when blocks are fetched for nothing."""
    reader = node.reader(index, size="1KB")
    assert reader.read(np.arange(20)) == truth[:20]
    assert reader.bytes_fetched == sum(map(len, truth[:20]))
    assert not node.blocks()


# Prefetch


def test_prefetch_fetches_in_the_given_order_once(
    index: ShardIndex, truth: list[bytes], node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one thread, the requests come in the order of the blocks, those repeated or cached but once; and reading
    needs no other. Fails when a block is queued twice, or the order is not kept.
    """
    monkeypatch.setattr(read_module, "_PREFETCHERS", 1)
    reader = node.reader(index)
    reader.read(np.array([0]))
    order = [9, 3, 3, 14, 9, 0, 1]
    reader.prefetch(order)
    reader.prefetch(iter(order))
    wait_for(lambda: len(node.blocks()) - len(node.parts()) == 5)
    starts = [request.split()[1:3] for request in node.requests]
    blocks = [reader._block(number) for number in (0, 9, 3, 14, 1)]
    assert starts == [[f"{index.root}/{index.shards[block.shard]}", str(block.start)] for block in blocks]
    reader.read(np.arange(3 * BLOCK, 4 * BLOCK))
    assert len(node.requests) == 5


def test_prefetch_never_raises(index: ShardIndex, truth: list[bytes], node: Node) -> None:
    """A block that could not be fetched ahead is fetched when it is needed. Fails when a thread dies of a fault."""
    reader = node.reader(index, *["403"] * 12)
    reader.prefetch(range(12))
    wait_for(lambda: len(node.requests) >= 12 and not reader._prefetcher._pending)
    reader.prefetch(range(12))
    wait_for(lambda: len(node.blocks()) - len(node.parts()) == 12)
    Reader(index, retry=RETRY, cache=CacheConfig()).prefetch([1, 2])
