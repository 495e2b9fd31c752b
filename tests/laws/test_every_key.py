"""Every key of the config, given what cannot be: status 2, one line, and no run folder."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from helpers import refused
from pydantic import TypeAdapter, ValidationError
from running import ROOT

from dist_trainer.config.arguments import new_parser, parse_config, stem
from dist_trainer.config.tree import TrainConfig
from dist_trainer.distributed.world import alone
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.run.start import prepare_run

OTHERS_WORDS = re.compile(
    r"<class|typing|Literal|Union|Optional|NoneType|dataclass|Expected a|jsonargparse|Traceback|argument |Annotated"
)
VALUES: list[Any] = [
    None, True, 0, 1, 7, -3, 0.5, 12.25, "wrng", "7", "0.5", "", [], [0.5], [0.5, 0.75], ["a"], [[1]], {}, {"x": 1},
]  # fmt: skip


def keys(cls: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, type) of the whole config."""
    hints = get_type_hints(cls, include_extras=True)
    for each in fields(cls):
        yield prefix + each.name, hints[each.name]
        for inner in (hints[each.name], *get_args(hints[each.name])):
            if is_dataclass(inner) and isinstance(inner, type):
                yield from keys(inner, f"{prefix}{each.name}.")


KEYS = dict(keys())
IN_LISTS = {key for key in KEYS if key.startswith("augment.transforms.")}


PARSER = new_parser("train", "")


def said(*argv: str) -> str:
    """What is wrong with these arguments; empty where nothing is."""
    try:
        parse_config(PARSER, ["--data.train=t", "--data.val=v", *argv])
    except UserError as error:
        return str(error)
    return ""


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def is_group(hint: Any) -> bool:
    return any(is_dataclass(each) or get_origin(each) is dict for each in (hint, *get_args(hint)))


def accepts(hint: Any, value: Any) -> bool:
    """By pydantic, which knows the types and nothing of ours; and by what a key's own annotation says."""
    if isinstance(value, bool) and any(isinstance(each, int) for each in get_args(hint)):
        return False  # Python's True is 1, and pydantic's Literal[1, 3] takes it
    try:
        TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return all(each.fits(item) for each, item in annotations(hint, value))


def annotations(hint: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    if get_origin(hint) is Annotated:
        yield get_args(hint)[1], value
    elif isinstance(value, list):
        for item in value:
            yield from annotations(get_args(hint)[0], item)
    elif value is not None and not isinstance(value, str):
        for part in get_args(hint):
            yield from annotations(part, value)
    elif isinstance(value, str):
        parts = [part for part in get_args(hint) if get_origin(part) is Annotated and get_args(part)[0] is str]
        yield from ((get_args(part)[1], value) for part in parts)


@pytest.mark.parametrize("key", sorted(KEYS.keys() - IN_LISTS))
def test_a_value_of_another_type_is_refused_and_one_of_its_type_is_not(key: str, tmp_path: Path) -> None:
    """Against pydantic, in a file and as an argument: the line begins with the key, shows the value, says what is
    allowed, and has no word of the parsing library.

    Mutations: null for any key; true for a number; the parser's own message; a list of another length.
    """
    hint, file = KEYS[key], tmp_path / "wrong.yaml"
    for value in VALUES:
        if isinstance(value, dict) and is_group(hint):
            continue  # its own keys decide
        file.write_text(yaml.safe_dump(nested(key, value)))
        shown = "null" if value is None else "true" if value is True else repr(value)
        line = said("--config", str(file))
        if accepts(hint, value):
            assert f"(in {file})" not in line, line
            continue
        assert line.startswith(f"{key}: {shown} is not "), (value, line)
        assert "\n" not in line and not OTHERS_WORDS.search(line), line
        assert str(file) in line
        if value == "wrng":  # others may be what they look like, on the command line
            line = said(f"--{key}", value)
            assert line.startswith(f"{key}: "), line
            assert value in line and not OTHERS_WORDS.search(line), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", sorted(KEYS.keys() - IN_LISTS))
def test_a_near_miss_of_its_name_is_answered_with_the_name(key: str, tmp_path: Path) -> None:
    """A letter too many, in a file and as an argument. Mutations: the nearest of another group; no answer."""
    near, file = f"{key}{key[-1]}", tmp_path / "near.yaml"
    file.write_text(yaml.safe_dump(nested(near, None)))
    for argv in ([f"--{near}=1"], ["--config", str(file)]):
        line = said(*argv)
        assert line.startswith(f"{near}: no such key; "), line
        assert f"'{key}'" in line, line


OUT_OF_RANGE: dict[str, list[Any]] = {
    "data.classes": ["nowhere.txt"],
    "data.max_pixels": [0, -1],
    "data.num_samples": [0, -1],
    "data.workers": [-1],
    "data.mean": [[-0.1], [0.5, 0.5]],
    "data.std": [[0.0], [0.5, 0.5]],
    "data.max_bad": [-1],
    "data.cache.dir": ["relative"],
    "data.cache.size": ["20 apples"],
    "data.retry.timeout": [0, -1],
    "data.retry.deadline": [0, -1],
    "data.stages": [["no_such_module:f"], ["json:no_such_name"], ["f"]],
    "data.storage_options": [{"secret": "abc"}],
    "data.tail": ["none"],
    "run.dir": ["ftpp://host/x"],
    "run.mirror": ["ftpp://host/x"],
    "run.name": ["a/b", ".."],
    "run.timeout": [0, 10],
    "run.seed": [-1],
    "run.start_from": ["no_such_run"],
    "augment.crop.size": [0],
    "augment.crop.scale": [[0.5, 0.1], [0.0, 1.0], [0.1, 2.0]],
    "augment.crop.ratio": [[2.0, 1.0], [0.0, 1.0]],
    "augment.crop.start_size": [0, 4096],
    "augment.crop.grow": [["9ep", "2ep"]],
    "augment.crop.multiple_of": [0],
    "augment.flip": [-0.1, 1.1],
    "augment.color_jitter": [-0.1, 1.0],
    "augment.policy": [{"name": "rand"}, {"name": "randaugment", "args": {"magnitude": 31}}],
    "augment.policy.name": ["rand"],
    "augment.transforms": [[{"name": "NoSuch"}]],
    "augment.erase": [{"name": "cutout", "args": {"length": -1}}],
    "augment.erase.name": ["cut"],
    "augment.repeats": [0, 3],
    "mixing.mixup": [-0.1],
    "mixing.cutmix": [-0.1],
    "mixing.switch": [-0.1, 1.1],
    "mixing.probability": [-0.1, 1.1],
    "mixing.off_last": ["2000ep"],
    "model.name": ["no_such_model", "tmm/no_such"],
    "model.args": [{"no_such": 1}],
    "model.dropout": [-0.1, 1.0],
    "model.drop_path": [-0.1, 1.0],
    "model.pretrained": ["no_such_file.pt"],
    "model.freeze": [["no_such_part"]],
    "batch.global_batch": [0, 17],
    "batch.micro_batch": [0, 3],
    "duration": ["0ep"],
    "optimizer.name": ["adamm"],
    "optimizer.args": [{"momentum": "0,9"}, {"momentum": -1}, {"no_such": 1}],
    "optimizer.weight_decay": [-0.1],
    "optimizer.layer_decay": [0.0, 1.1],
    "lr.base": [0.0, -1.0],
    "lr.peak": [0.0, -1.0],
    "lr.warmup.duration": ["2000ep"],
    "lr.schedule": [{"name": "cosin"}, {"name": "cosine", "args": {"end": 2}}],
    "lr.schedule.name": ["cosin"],
    "loss.name": ["entropy"],
    "loss.args": [{"no_such": 1}],
    "loss.label_smoothing": [-0.1, 1.0],
    "ema.decay": [-0.1, 1.0],
    "ema.beta": [0.0],
    "ema.start": ["2000ep"],
    "ema.every": [0],
    "precise_bn.num_samples": [-1],
    "averaging.top_k": [-1],
    "averaging.metric": ["val/top2"],
    "eval.every": ["0ep"],
    "eval.batch": [0],
    "eval.resize": [0],
    "eval.crop": [0],
    "eval.train_samples": [-1],
    "checkpoint.every": ["0ep"],
    "checkpoint.keep_last": [0],
    "checkpoint.keep_best": [-1],
    "checkpoint.best_metric": ["val/top2"],
    "checkpoint.keep_every": [-1],
    "checkpoint.grace": [-1],
    "checkpoint.max_failed": [0],
    "engine.clip_grad_norm": [0.0],
    "engine.threads": [0],
    "log.every": ["0step"],
    "wandb.timeout": [0],
}
ANYTHING = {
    # Paths, and words for people: a folder that is not there is told of with the data.
    "data.train", "data.val", "wandb.project", "wandb.entity", "wandb.group", "wandb.name", "wandb.tags", "wandb.notes",
    "wandb.job_type", "augment.policy.args", "augment.erase.args", "lr.schedule.args", "optimizer.no_decay",
    "run.allow_change",
}  # fmt: skip
WITH: dict[str, list[str]] = {  # what a key needs beside it, to have an effect
    "data.num_samples": ["--data.source=stream"],
    "augment.crop.*": ["--augment.crop.size=28"],
    "augment.crop.grow": ["--augment.crop.size=28", "--augment.crop.start_size=14"],
    "augment.crop.multiple_of": ["--augment.crop.size=28", "--augment.crop.start_size=14"],
    "mixing.off_last": ["--mixing.mixup=0.2"],
    "mixing.switch": ["--mixing.mixup=0.2", "--mixing.cutmix=1.0"],
    "lr.peak": ["--lr.base=null"],
    "lr.base": ["--lr.peak=null"],
    "ema.*": ["--ema.decay=0.9"],
    "averaging.metric": ["--averaging.top_k=2"],
}


def finite(hint: Any) -> bool:
    """Whether the type itself says what is allowed: choices, true or false, a group of keys."""
    options = (get_origin(hint) is not Annotated and get_args(hint)) or [hint]
    return all(each in (bool, type(None)) or is_dataclass(each) or not isinstance(each, type) for each in options)


def test_every_key_that_its_type_leaves_open_has_a_value_that_is_out_of_range() -> None:
    """A new key is listed here. Fails when it is not."""
    open_keys = {key for key, hint in KEYS.items() if not finite(hint)} - IN_LISTS
    assert not open_keys - OUT_OF_RANGE.keys() - ANYTHING
    assert not OUT_OF_RANGE.keys() - KEYS.keys()


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values])
def test_a_value_out_of_range_is_refused_before_a_run_folder_is_made(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plan and by train in the same words: the key or its group, the value, what is allowed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tests" / "fixtures" / "81fd9c4" / "data", "data")
    shutil.copy(ROOT / "tests" / "fixtures" / "81fd9c4" / "small.yaml", tmp_path)
    more = WITH.get(key) or WITH.get(f"{key.partition('.')[0]}.*") or WITH.get(f"{key.rpartition('.')[0]}.*") or []
    given = value if isinstance(value, str) else json.dumps(value)
    argv = ["small.yaml", *more, f"--{key}={given}"]
    line = refused("plan", *argv)
    with pytest.raises(UserError) as caught:
        config, values = parse_config(new_parser("train", ""), argv)
        prepare_run(config, stem=stem(values), world=alone(), terminal=Terminal(active=False))
    assert str(caught.value) == line
    assert re.match(rf"{re.escape(key)}\b|{re.escape(key.rpartition('.')[0])}\b", line), line
    for part in shown(value):
        assert part in line, line
    assert "\n" not in line and not OTHERS_WORDS.search(line), line
    assert not (tmp_path / "runs").exists()


def shown(value: Any) -> list[str]:
    """The parts of a value of which a line has to name one: a number, a word."""
    if isinstance(value, dict):
        inner = value.get("args", value)
        return [str(next(iter(inner.values() if "args" in value else inner)))]
    if isinstance(value, list):
        return [] if not value or isinstance(value[0], dict) else [str(value[0])]
    return [f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)]
