"""From addresses to batches when something is wrong: storage, whole bad batches, the user's own code, other indices."""

import os
import pickle
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import augment_of, flip_byte, message, sample_members, write_tar
from safetensors import SafetensorError
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from dist_trainer.by_name import Named
from dist_trainer.commands.main import dispatch
from dist_trainer.data.augment import AugmentConfig, CenterCrop, CropConfig
from dist_trainer.data.bad_samples import BadSample, BadSampleLog
from dist_trainer.data.batch import Batch, EvalAddress, SlotAddress
from dist_trainer.data.config import DataConfig
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.data.order import OrderSpec
from dist_trainer.data.read import Bad
from dist_trainer.data.samples import EvalSamples, TrainSamples
from dist_trainer.data.stream import EvalStream
from dist_trainer.data.unindexed import TarStream
from dist_trainer.distributed.world import World
from dist_trainer.errors import LocalError, Outage, UserError
from dist_trainer.plan import BatchConfig, Duration, make_plan
from dist_trainer.run.data import repaired_samples
from dist_trainer.shards.prepare import prepare_index

CONFIG = DataConfig(train="", val="", workers=0)


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    """24 samples of 8x8 pixels in one tar."""
    write_tar(tmp_path / "0.tar", sample_members(24))
    prepare_index("data.train", str(tmp_path))
    return ShardIndex.load(tmp_path / FILE_NAME)


@pytest.fixture
def own() -> Iterator[ModuleType]:
    """A module of the user's, importable as `own_code`."""
    module = ModuleType("own_code")
    sys.modules["own_code"] = module
    yield module
    del sys.modules["own_code"]


def train_samples(index: ShardIndex, augment: AugmentConfig, config: DataConfig = CONFIG) -> TrainSamples:
    plan = make_plan(
        BatchConfig(global_batch=8, micro_batch=4), Duration.parse("9ep", "duration"), world=1, num_samples=len(index)
    )
    return TrainSamples(index, plan, OrderSpec(seed=0, lanes=2, chunk=4), augment_of(augment, plan), config)


def damage(index: ShardIndex, *samples: int) -> None:
    """Flip a byte of each of these, as a failing disk does: the time of change stays."""
    tar = Path(index.shard_path(0))
    before = tar.stat()
    for sample in samples:
        flip_byte(tar, int(index.samples["offset"][sample]) + 60)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_outage_is_waited_for_once_and_its_batches_can_be_run(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that it ends has more batches: each says so at once, with labels that a loss takes, and weight NaN.

    Fails when every batch waits for the deadline again, or keeps the label -1 of a bad sample.
    """
    samples = train_samples(replace(index, samples=_with_label(index, -1)), AugmentConfig(crop=CropConfig(size=8)))
    asked: list[int] = []

    def away(ids: np.ndarray) -> list[bytes | Bad]:
        asked.extend(ids.tolist())
        raise Outage("storage is away")

    monkeypatch.setattr(samples._reader, "read", away)
    batches: list[Batch] = [samples[SlotAddress(0, slot)] for slot in (0, 1)]
    assert len(asked) == 4
    for batch in batches:
        assert (batch.outage, batch.problem) == ("storage is away", None)
        assert batch.images.shape == (4, 3, 8, 8)
        assert batch.weight.isnan().all()
        assert torch.nn.functional.cross_entropy(torch.zeros(4, 3), batch.labels).isfinite()


def _with_label(index: ShardIndex, label: int) -> Any:
    rows = index.samples.copy()
    rows["label"] = label
    return rows


def test_a_first_batch_that_is_wholly_bad_is_counted_like_any_other(index: ShardIndex) -> None:
    """Whichever batch a loader process sees first. Fails when its shape is learnt from good images alone."""
    damage(index, *range(8))
    transform = CenterCrop(resize=None, crop=6)
    fresh, other = EvalSamples(index, CONFIG, transform), EvalSamples(index, CONFIG, transform)
    assert other[EvalAddress(1, 8)].num_valid == 8
    for samples in (fresh, other):
        batch = samples[EvalAddress(0, 8)]
        assert (batch.problem, batch.num_valid, len(batch.bad)) == (None, 0, 8)
        assert batch.images.shape == (8, 3, 6, 6)


def test_training_crops_are_resized_as_the_config_says(index: ShardIndex) -> None:
    """Whole images, enlarged, against torchvision's bicubic. Fails when the key does not reach the samples."""
    whole = CropConfig(size=12, scale=(1.0, 1.0), ratio=(1.0, 1.0), interpolation="bicubic")
    found = train_samples(index, AugmentConfig(crop=whole, flip=0.0))[SlotAddress(0, 0)].images
    raw = train_samples(index, AugmentConfig(flip=0.0))[SlotAddress(0, 0)].images
    truth = functional.resize(raw, [12, 12], v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(found, truth)


def test_a_transform_of_the_users_may_draw_from_numpy_and_python(index: ShardIndex, own: ModuleType) -> None:
    """The same slot has the same pixels, whatever was drawn before. Fails when only torch is seeded."""

    class Noise:
        def __call__(self, image: torch.Tensor) -> torch.Tensor:
            return image + int(np.random.randint(0, 50)) + random.randrange(50) + int(torch.randint(0, 50, ()))

    own.Noise = Noise  # type: ignore[attr-defined]
    samples = train_samples(index, AugmentConfig(transforms=[Named(name="own_code:Noise")]))
    first = samples[SlotAddress(1, 1)].images
    np.random.seed(1)
    random.seed(1)
    samples[SlotAddress(0, 0)]
    assert torch.equal(samples[SlotAddress(1, 1)].images, first)
    plain = train_samples(index, AugmentConfig())[SlotAddress(1, 1)].images
    assert not torch.equal(first, plain)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"cls": 1}, "image is NoneType, neither bytes nor uint8 pixels"),
        ({"cls": 3}, "cls is 3; it must be a class number below 3"),
        ({"cls": "dog"}, "cls is 'dog'"),
        ({"cls": 0, "image": torch.zeros(3, 8, 8)}, "image is float32 [3, 8, 8]; pixels must be uint8 [3, H, W]"),
        ({"cls": 0, "image": np.zeros((8, 8, 3), np.uint8)}, "image is uint8 [8, 8, 3]; pixels must be uint8"),
    ],
)
def test_what_a_stage_returns_is_looked_at(
    index: ShardIndex, own: ModuleType, returned: dict[str, Any], said: str
) -> None:
    """In training and in validation. Fails when floats are cast to integers, or a class is taken that there is not."""
    own.stage = lambda sample: {"__key__": sample["__key__"], **returned}  # type: ignore[attr-defined]
    config = replace(CONFIG, stages=["own_code:stage"])
    for samples, address in (
        (train_samples(index, AugmentConfig(), config), SlotAddress(0, 0)),
        (EvalSamples(index, config, CenterCrop(None, None)), EvalAddress(0, 4)),
    ):
        problem = samples[address].problem
        assert problem is not None
        assert problem.startswith("data.stages: ")
        assert said in problem
        assert "\n" not in problem


def test_a_loader_process_takes_no_other_index(index: ShardIndex, tmp_path: Path) -> None:
    """It maps the file hours later. Fails when labels of an index made anew meanwhile would be used."""
    sent = pickle.dumps(index)
    assert pickle.loads(sent).fingerprint == index.fingerprint
    replace(index, samples=_with_label(index, 2)).save(tmp_path / FILE_NAME)
    with pytest.raises(LocalError, match="not the index that this run started with"):
        pickle.loads(sent)


def test_an_index_that_cannot_be_written_is_an_os_error_and_leaves_nothing(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors raises an exception of its own. Fails when that gets through (a traceback), or half a file stays."""
    with pytest.raises(OSError, match="gone"):
        index.save(tmp_path / "gone" / FILE_NAME)

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("dist_trainer.data.index.save_file", full)
        index.save(tmp_path / "other.dtx")
    assert [file.name for file in tmp_path.iterdir() if "other" in file.name] == []
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        index.save(folder / FILE_NAME)
    assert not list(folder.iterdir())


def test_repaired_samples_are_held_against_no_budget(index: ShardIndex) -> None:
    """Over the budget, then the bytes come back: known no more. Fails when a mended run could never go on."""
    damage(index, 3, 5)
    health = BadSampleLog(index, 0, "train")
    health.load([BadSample(n, "crc", index.shard_path(0), "").__dict__ for n in (3, 5)])
    assert health.over_budget is not None
    assert "--data.max_bad 4" in health.over_budget
    assert repaired_samples(index, CONFIG, health) == []
    damage(index, 3, 5)  # the same bits again
    mended = repaired_samples(index, CONFIG, health)
    assert mended == [3, 5]
    health.forget(lambda bad: bad.sample in mended)
    assert health.over_budget is None


def test_a_list_of_bad_samples_that_a_kill_cut_off_is_gone_on_with(index: ShardIndex, tmp_path: Path) -> None:
    """Fails when the rest of a line ends training, or swallows the next line, or a sample is listed twice."""
    path = tmp_path / "bad_samples.jsonl"
    bad = [BadSample(n, "crc", "0.tar", "other bytes") for n in range(3)]
    health = BadSampleLog(index, "auto", "train")
    health.write(path, bad[:2])
    whole = path.read_text()
    path.write_text(whole[:-20])
    health.write(path, bad)
    lines = path.read_text().splitlines()
    assert lines[:2] == whole[:-20].splitlines()
    assert len(lines) == 4
    assert '"sample": 1' in lines[2] and '"sample": 2' in lines[3]
    health.write(tmp_path / "no" / "folder", bad)  # a list for people, which stops nothing


def test_bad_samples_are_told_at_the_end_of_the_epoch_that_met_them(index: ShardIndex) -> None:
    """Once, with kinds and shards; not those from before a resume. Mutations: at every step; all of them each time."""
    bad = [BadSample(n, "crc" if n else "decode", f"{n}.tar", "other bytes") for n in range(4)]
    health = BadSampleLog(index, "auto", "train")
    health.load([vars(bad[0])])
    health.add(bad[:3])
    assert health.tell(0) is None
    line = "epoch 1: 2 bad training samples: 2 crc; 1.tar (1), 2.tar (1); 3 in all, in bad_samples.jsonl"
    assert [health.tell(1), health.tell(1), health.tell(2)] == [line, None, None]
    health.add(bad)
    assert str(health.tell(3)).startswith("epoch 3: 1 bad training sample: 1 crc; 3.tar (1); 4 in all")


def test_a_shard_is_named_whole_though_it_has_a_comma(index: ShardIndex, tmp_path: Path) -> None:
    moved = replace(index, root=f"{tmp_path}/a,b")
    assert BadSample.of(moved, 0, Bad("crc", "")).shard == f"{tmp_path}/a,b/0.tar"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "data.train: "),
        (lambda folder: (folder / "s.tar").write_bytes(b"x" * 700), "data.train: "),
        (
            lambda folder: write_tar(folder / "s.tar", [("a.png", b"no"), ("a.cls", b"0")]),
            "1,000 images in a row cannot be decoded, the last is 'a' of",
        ),
        (lambda folder: write_tar(folder / "s.tar", [("a.png", b"no"), ("a.cls", b"dog")]), "cls is b'dog'"),
        (lambda folder: write_tar(folder / "s.tar", [("a.png", b"no"), ("a.cls", b"3")]), "class number below 3"),
    ],
    ids=["missing", "no tar", "no image", "a word", "a class too high"],
)
def test_a_stream_of_tars_that_cannot_be_read_says_so_in_one_line(tmp_path: Path, make: Any, said: str) -> None:
    """Fails when it raises what tarfile raises, skips all samples for ever, or hands on a class that there is not."""
    make(tmp_path)
    config = replace(CONFIG, train=str(tmp_path / "s.tar"), source="stream", num_samples=8)
    stream = TarStream(config, 3, augment_of(AugmentConfig()), 4, 0, 0, 1)
    batch = next(iter(stream.serve([SlotAddress(0, 0)])))
    assert batch.problem is not None
    assert said in batch.problem
    assert "\n" not in batch.problem


@pytest.mark.parametrize(("key", "value"), [("stages", ["a:b"]), ("order", "full")])
def test_keys_that_a_stream_has_no_use_for_are_refused(key: str, value: Any) -> None:
    config = replace(CONFIG, source="stream", num_samples=8, **{key: value})
    with pytest.raises(UserError) as caught:
        config.check()
    assert message(caught).startswith(f"data.{key}: has no effect with data.source: stream")


def test_validation_batches_of_an_outage_reach_the_evaluation(index: ShardIndex, monkeypatch: Any) -> None:
    """Which makes all ranks say so together. Fails when the stream raises on one rank alone."""
    stream = EvalStream(index, CONFIG, CenterCrop(None, 6), 8, World(0, 1, 0, 1, torch.device("cpu")))
    reader = stream._loader.dataset._reader  # type: ignore[attr-defined]
    monkeypatch.setattr(reader, "read", lambda ids: (_ for _ in ()).throw(Outage("away")))
    assert [batch.outage for batch in stream] == ["away"] * 3


def test_a_stream_takes_a_folder_of_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", sample_members(8))
    config = replace(CONFIG, train=str(tmp_path), source="stream", num_samples=8)
    stream = TarStream(config, 3, augment_of(AugmentConfig()), 4, 0, 0, 1)
    assert next(iter(stream.serve([SlotAddress(0, 0)]))).num_valid == 4


def test_an_index_is_for_everyone_whom_the_umask_lets(index: ShardIndex, tmp_path: Path) -> None:
    """And one that may not be read is not called damaged. Fails with the rights that safetensors gives its files."""
    assert (tmp_path / FILE_NAME).stat().st_mode == (tmp_path / "0.tar").stat().st_mode


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["s3://bucket/t.tar", "--storage_options", "{secret: hunter2}"], "--storage_options.secret: a secret has no"),
        (["http://127.0.0.1:9/t-{0..3}.tar?token=hunter2"], "http://127.0.0.1/t-{0..3}.tar: the URL holds a secret"),
    ],
)
def test_secrets_on_the_command_line_of_shards_are_refused_unshown(argv: list[str], said: str, tmp_path: Path) -> None:
    """Before anything is asked for. Fails when they are used, or appear in a message."""
    with pytest.raises(UserError) as caught:
        dispatch(["shards", "index", *argv, "--out", str(tmp_path / "i.dtx")])
    assert message(caught).startswith(said)
    assert "hunter2" not in message(caught)
