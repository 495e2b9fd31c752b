"""What accuracy on training samples says, of which samples; and what is said of keys, before a run and after it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import index_of, sample_members, write_tar

from dist_trainer.config.arguments import new_parser, parse_config
from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment import CenterCrop
from dist_trainer.data.config import DataConfig
from dist_trainer.data.samples import choose_samples
from dist_trainer.data.stream import EvalStream
from dist_trainer.distributed.world import World
from dist_trainer.run.advice import keys_to_turn, warnings
from dist_trainer.run.blueprint import make_blueprint
from dist_trainer.tricks.diagnosis import diagnose


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        (0.99, 0.70, "overfitting"),
        (0.91, 0.70, "overfitting"),
        (0.89, 0.70, "healthy"),
        (0.74, 0.70, "healthy"),
        (0.72, 0.70, "underfitting"),
        (0.65, 0.70, "underfitting"),
        (0.50, 0.50, "underfitting"),
        (0.995, 0.994, None),
    ],
)
def test_the_verdict_over_known_accuracies(train: float, val: float, expected: str | None) -> None:
    """Two thirds and a tenth of the validation error, by hand. Fails when the gap is taken absolutely."""
    assert diagnose(train, val, 5000, 10_000) == expected


def test_few_samples_give_no_verdict() -> None:
    """Deviation of 100 against 100 at 60%: 6.9 points, of an error of 40. Fails when any number will do."""
    assert diagnose(0.6, 0.6, 100, 100) is None
    assert diagnose(0.6, 0.6, 2000, 2000) == "underfitting"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_slice_is_each_chosen_sample_once_as_evaluation_sees_it(tmp_path: Path, size: int) -> None:
    """On any number of ranks. Fails when a sample of the draw is missed, doubled, augmented, or another than drawn."""
    write_tar(tmp_path / "0.tar", sample_members(24))
    index = index_of(tmp_path / "0.tar")
    config = DataConfig(train="", val="", workers=0)
    chosen, transform = choose_samples(index, 10, seed=3), CenterCrop(None, 6)
    assert len(set(chosen.tolist())) == 10
    images = {}
    for batch in EvalStream(index, config, transform, 24, World(0, 1, 0, 1, torch.device("cpu"))):
        images = dict(zip(batch.ids.tolist(), batch.images, strict=True))
    seen = []
    for rank in range(size):
        stream = EvalStream(index, config, transform, 4, World(rank, size, rank, size, torch.device("cpu")), chosen)
        assert stream.num_samples == 10
        for batch in stream:
            if batch.ghost:
                continue
            counted = np.flatnonzero(batch.weight.numpy())
            seen += batch.ids[counted].tolist()
            for place in counted:
                assert torch.equal(batch.images[place], images[int(batch.ids[place])])
                assert batch.labels[place] == index.samples["label"][batch.ids[place]]
    assert sorted(seen) == sorted(chosen.tolist())
    assert seen != sorted(seen)


GREY = ["--data.channels=1", "--data.mean=[0.5]", "--data.std=[0.5]"]


def config_of(*argv: str) -> TrainConfig:
    words = ["--data.train=t", "--data.val=v", "--lr.base=0.1", "--model.name=tiny:SmoothNet", *GREY, *argv]
    return parse_config(new_parser("train", ""), words)[0]


LENGTH = "augment.erase.args.length"


def said(*argv: str, num_classes: int = 1000) -> list[str]:
    config = config_of("--duration=5000step", "--batch.global_batch=64", *argv)
    return [
        line.partition(":")[0] for line in warnings(config, make_blueprint(config, 6400, num_classes, 1), num_classes)
    ]


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--ema.decay=0.9999"], "ema.decay"),
        (["--mixing.mixup=0.2", "--loss.name=tiny:Scaled", "--loss.args={factor: 2.0}"], "loss.name"),
        (["--loss.name=bce"], "loss.name"),
        (
            ["--loss.name=bce", "--loss.args={target_threshold: 0.2, sum_classes: true}", "--loss.label_smoothing=0.1"],
            "loss.args.target_threshold",
        ),
        (["--loss.label_smoothing=0.1"], "loss.label_smoothing"),
        (["--optimizer.weight_decay=1e-4"], "optimizer.weight_decay"),
        (["--augment.crop={size: 28}"], "augment.crop.scale"),
        (
            ["--augment.crop={size: 28, scale: [0.2, 1.0], start_size: 4, multiple_of: 1, grow: [50%, 100%]}"],
            "augment.crop.grow",
        ),
        (["--model.freeze=[fc]"], "model.freeze"),
        (["--optimizer.layer_decay=0.75"], "optimizer.layer_decay"),
        (["--data.val=./t/"], "data.val"),
        (["--eval.resize=20", "--eval.crop=28"], "eval.resize"),
        (["--lr.warmup={duration: 9step, start: base}"], "lr.warmup.start"),
        (["--augment.crop={size: 28, scale: [0.2, 1.0]}", "--augment.erase={name: cutout, args: {length: 3}}"], LENGTH),
    ],
)
def test_keys_that_work_against_each_other_are_named(argv: list[str], key: str) -> None:
    """Each alone brings its line. Fails when a rule never fires, or a quiet config is warned."""
    assert key in said(*argv)
    assert said() == []


def test_what_fits_is_not_warned_of() -> None:
    """The same keys where they are right. Fails when a rule looks at one key only."""
    assert said("--ema.decay=0.9999", "--ema.ramp=threshold") == []
    assert said("--ema.decay=0.999") == []
    assert said("--model.freeze=[fc]", "--optimizer.layer_decay=0.75", "--model.pretrained=x.pth") == []
    assert said("--mixing.mixup=0.2") == []
    assert said("--eval.resize=28", "--eval.crop=28") == []
    assert said("--lr.warmup={duration: 9step, start: base}", "--batch.global_batch=256") == []
    assert (
        said("--augment.crop={size: 28, scale: [0.2, 1.0]}", "--augment.erase={name: cutout, args: {length: 4}}") == []
    )
    assert said("--augment.crop={size: 28, scale: [0.2, 1.0], start_size: 12, grow: [0%, 10%]}") == []
    assert said("--loss.name=bce", "--loss.args={sum_classes: true}") == []
    small = ["--loss.label_smoothing=0.1", "--optimizer.weight_decay=1e-4", "--augment.crop={size: 28}"]
    assert said(*small, num_classes=10) == []
    assert said("--augment.crop={size: 28, scale: [0.2, 1.0]}", "--optimizer.weight_decay=3e-5") == []


def test_advice_can_be_followed_and_classes_without_samples_are_named() -> None:
    """Mutation: three digits, which make 1.0 of a decay near it."""
    config = config_of("--duration=50000step", "--batch.global_batch=64", "--ema.decay=0.999999")
    parts = make_blueprint(config, 6400, 10, 1)
    (line,) = warnings(config, parts, 10)
    advised = re.search(r"take ([\d.]+), or", line)
    assert advised and parse_config(
        new_parser("train", ""), ["--data.train=t", "--data.val=v", f"--ema.decay={advised[1]}"]
    )
    assert 0.999 < float(advised[1]) < 1.0
    (_, named) = sorted(warnings(config, parts, 10, {"data.train": ["dog", "cat", "a b", "c"]}), reverse=True)
    assert named == "data.train: 4 classes without a sample, which cannot be learned: 'dog', 'cat', 'a b' ..."


def test_keys_to_turn_are_those_that_are_not_turned_yet() -> None:
    """The seed's directions: against overfitting more of each, against underfitting less."""
    free = config_of("--optimizer.weight_decay=1e-4", "--augment.crop={size: 28, scale: [0.2, 1.0]}")
    assert keys_to_turn(free, "overfitting") == [
        "optimizer.weight_decay: 0.0001 -> 0.0002",
        "loss.label_smoothing: 0 -> 0.1",
        "mixing.mixup: 0 -> 0.2",
        "augment.policy.name: none -> randaugment",
        "augment.crop.scale: from 0.2 -> from 0.08",
    ]
    assert keys_to_turn(free, "underfitting") == [
        "optimizer.weight_decay: 0.0001 -> 3e-05",
        "or a larger network, or a longer run",
    ]
    tied = config_of(
        "--loss.label_smoothing=0.1",
        "--mixing.mixup=0.2",
        "--mixing.cutmix=1",
        "--augment.crop={size: 28}",
        "--augment.policy.name=autoaugment",
        "--augment.erase.name=cutout",
    )
    assert keys_to_turn(tied, "overfitting") == ["optimizer.weight_decay: 0 -> 0.0001"]
    assert keys_to_turn(tied, "underfitting")[:-1] == [
        "loss.label_smoothing: 0.1 -> 0",
        "mixing.mixup: 0.2 -> 0",
        "mixing.cutmix: 1 -> 0",
        "augment.policy.name: autoaugment -> none",
        "augment.erase.name: cutout -> none",
        "augment.crop.scale: from 0.08 -> from 0.2",
    ]
    assert keys_to_turn(free, "healthy") == []
