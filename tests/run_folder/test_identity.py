"""What makes two runs the same run: the table of keys, names, and how a run is found again."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_trainer.by_name import Named
from dist_trainer.config.preprocess import resolve_preprocess
from dist_trainer.config.tree import TrainConfig
from dist_trainer.config.values import keys_of
from dist_trainer.data.augment import AugmentConfig
from dist_trainer.data.augment.crop import CropConfig
from dist_trainer.data.config import DataConfig
from dist_trainer.engine.base import EngineConfig
from dist_trainer.models import ModelConfig
from dist_trainer.plan import BatchConfig
from dist_trainer.run_folder import identity as table
from dist_trainer.run_folder.folder import RunConfig
from dist_trainer.run_folder.identity import FREE, KEYS, PLACE, First, auto_name, find_run, flatten, identity, row_of
from dist_trainer.tricks.learning_rate import LearningRateConfig, WarmupConfig
from dist_trainer.tricks.losses import LossConfig
from dist_trainer.tricks.optimizers import OptimizerConfig

CONFIG = resolve_preprocess(TrainConfig(data=DataConfig(train="tars/train", val="tars/val")))


def name_of(config: TrainConfig, fingerprint: str = "abc") -> str:
    return auto_name("stem", identity(config.as_dict(), fingerprint))


# The table


def test_every_key_has_a_row_and_every_row_a_key() -> None:
    """Against the config's own classes. Mutation: a key without a row, a row of a key that is gone."""
    keys = set(keys_of(TrainConfig))
    parents = {key.rpartition(".")[0] for key in keys} - {"augment.crop", "augment.transforms"}  # null, or a list
    inside_list = {"augment.transforms.name", "augment.transforms.args"}
    assert set(KEYS) - {"data.fingerprint", "data.val_fingerprint"} == keys - parents - inside_list


def test_no_key_counts_at_the_default_of_today() -> None:
    """So no default has changed since its key appeared. Mutation: another default in a config class or in the table."""
    assert identity(CONFIG.as_dict(), "abc") == {"data.fingerprint": "abc"}
    cropped = resolve_preprocess(replace(CONFIG, augment=AugmentConfig(crop=CropConfig(size=224))))
    assert set(identity(cropped.as_dict(), "abc")) == {"data.fingerprint", "augment.crop.size"}


def test_each_key_names_the_run_or_does_not_as_its_row_says() -> None:
    """Every leaf of the config in turn gets another value. Mutation: `counting` takes FREE for a key of the result."""
    flat = {**flatten(CONFIG.as_dict()), "data.fingerprint": "abc", "data.val_fingerprint": "def"}
    before = auto_name("stem", table.counting(flat))
    for key in flat:
        same = auto_name("stem", table.counting({**flat, key: "another"})) == before
        assert same == (row_of(key) in (FREE, PLACE)), key


def test_an_argument_has_the_row_of_its_parent() -> None:
    """Mutation: `model.args.x` is looked up by its own name alone, and counts as free to change."""
    assert row_of("model.args.widths") == First(table.REQUIRED, fixed=True)
    assert row_of("optimizer.args.momentum") == First(table.REQUIRED)
    assert row_of("no.such.key") is None


def test_a_later_key_that_is_off_changes_no_name_and_a_later_default_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: keys at their first default count; the table follows today's defaults."""
    flat = flatten(CONFIG.as_dict())
    before = auto_name("stem", table.counting(flat))
    monkeypatch.setitem(KEYS, "tricks.later", First(False))
    assert auto_name("stem", table.counting({**flat, "tricks.later": False})) == before
    assert auto_name("stem", table.counting({**flat, "tricks.later": True})) != before
    assert auto_name("stem", table.counting({**flat, "augment.flip": 0.25})) != before


# Names


def test_the_automatic_name_changes_with_all_that_changes_the_result() -> None:
    """A stem and eight hex digits, different for each. Fails when a key of a nested list or of `args` is left out."""
    other = [
        replace(CONFIG, data=replace(CONFIG.data, order="full")),
        replace(CONFIG, data=replace(CONFIG.data, mean=[0.5, 0.5, 0.5])),
        replace(CONFIG, run=RunConfig(seed=1)),
        replace(CONFIG, augment=AugmentConfig(flip=0.1)),
        replace(CONFIG, augment=AugmentConfig(transforms=[Named(name="RandomRotation", args={"degrees": 30})])),
        replace(CONFIG, augment=AugmentConfig(transforms=[Named(name="RandomRotation", args={"degrees": 31})])),
        replace(CONFIG, model=ModelConfig(name="timm/resnet18")),
        replace(CONFIG, model=ModelConfig(args={"zero_init_residual": True})),
        replace(CONFIG, model=ModelConfig(sync_bn=True)),
        replace(CONFIG, model=ModelConfig(dropout=0.1)),
        replace(CONFIG, model=ModelConfig(drop_path=0.1)),
        replace(CONFIG, batch=BatchConfig(micro_batch=16)),
        replace(CONFIG, duration="91ep"),
        replace(CONFIG, optimizer=OptimizerConfig(args={"momentum": 0.8})),
        replace(CONFIG, lr=LearningRateConfig(warmup=WarmupConfig(duration="5ep"))),
        replace(CONFIG, loss=LossConfig(label_smoothing=0.1)),
        replace(CONFIG, engine=EngineConfig(precision="fp32")),
        replace(CONFIG, engine=EngineConfig(clip_grad_norm=1.0)),
    ]
    names = [name_of(CONFIG), name_of(CONFIG, fingerprint="abd"), *(name_of(config) for config in other)]
    assert len(set(names)) == len(names)
    assert all(name.startswith("stem-") and len(name) == 13 for name in names)
    assert all(int(name[5:], 16) >= 0 for name in names)


# Found again


def add_run(root: Path, name: str, keys: Mapping[str, Any], age: int = 0) -> None:
    file = root / name / "identity.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(keys))
    os.utime(file, (10**9 - age, 10**9 - age))


BASE = {"data.fingerprint": "abc", "lr.base": 0.1}


def test_a_run_is_found_whatever_it_is_called(tmp_path: Path) -> None:
    """By its keys, in this version's form or in the first one's. Mutation: look for the folder of the digest alone."""
    first = {**flatten(CONFIG.as_dict()), "data.fingerprint": "abc val", "lr.base": 0.1, "eval.batch": 999}
    add_run(tmp_path, "stem-00000001", first)
    add_run(tmp_path, "stem-00000002", {**BASE, "duration": "3ep"})
    assert find_run(tmp_path, "stem", BASE, []) == ("stem-00000001", "")
    assert find_run(tmp_path, "stem", {**BASE, "duration": "3ep"}, []) == ("stem-00000002", "")
    assert find_run(tmp_path, "other", BASE, []) == (auto_name("other", BASE), "")
    assert find_run(tmp_path / "none", "stem", BASE, []) == (auto_name("stem", BASE), "")


def test_the_run_that_is_being_changed_is_found(tmp_path: Path) -> None:
    """The newest of those that differ in allowed keys alone. Mutation: any allowed key lets all others differ."""
    add_run(tmp_path, "stem-00000001", {**BASE, "duration": "3ep"}, age=10)
    add_run(tmp_path, "stem-00000002", {**BASE, "duration": "5ep"})
    add_run(tmp_path, "stem-00000003", {**BASE, "duration": "7ep", "lr.base": 0.2})
    assert find_run(tmp_path, "stem", BASE, ["duration"]) == ("stem-00000002", "")
    name, _ = find_run(tmp_path, "stem", BASE, ["lr.base"])
    assert name == auto_name("stem", BASE)
    add_run(tmp_path, name, BASE, age=20)
    assert find_run(tmp_path, "stem", BASE, ["duration"]) == (name, "")


def test_a_similar_run_is_named_with_what_continues_it(tmp_path: Path) -> None:
    """Its keys, old and new. A fixed key cannot be allowed. Mutation: advise run.allow_change for any key."""
    add_run(tmp_path, "stem-00000001", {**BASE, "duration": "3ep"})
    assert find_run(tmp_path, "stem", BASE, [])[1] == (
        f"a new run; to continue {tmp_path}/stem-00000001 with other values (duration '3ep' -> '90ep'): "
        """--run.allow_change '["duration"]'"""
    )
    line = find_run(tmp_path, "stem", {**BASE, "duration": "3ep", "run.seed": 1, "lr.base": 0.2}, [])[1]
    assert line == f"a new run; {tmp_path}/stem-00000001 has other values: lr.base 0.1 -> 0.2; run.seed 0 -> 1"
    other_data = {**BASE, "data.fingerprint": "another", "duration": "3ep"}
    assert find_run(tmp_path, "stem", other_data, [])[1] == ""


@pytest.mark.parametrize("text", ["", "{}", "[1]", "nonsense", '{"data.fingerprint": '])
def test_a_damaged_identity_is_no_run(tmp_path: Path, text: str) -> None:
    """Mutation: a torn file stops every run of that stem."""
    add_run(tmp_path, "stem-00000001", {})
    (tmp_path / "stem-00000001" / "identity.json").write_text(text)
    assert find_run(tmp_path, "stem", BASE, []) == (auto_name("stem", BASE), "")
