"""What an earlier revision left on a disk: this one reads its index, finds its run folder by name, and resumes it."""

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import ROOT, Session

from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.data.read import Reader
from dist_trainer.run_folder import checkpoint
from dist_trainer.storage.cache import CacheConfig
from dist_trainer.storage.retry import RetryConfig

NAME = "small-3cb02d9e"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the fixture, to be the working folder."""
    return shutil.copytree(ROOT / "tests" / "fixtures" / "81fd9c4", tmp_path / "folder")


def said(folder: Path, *argv: str) -> str:
    """What a command prints that ends well."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    session = Session([sys.executable, "-m", "dist_trainer", *argv], log, folder=folder)
    assert session.wait() == 0, log.read_text()
    return log.read_text()


def test_an_old_index_names_the_same_samples(folder: Path) -> None:
    """Labels and bytes, against Python's tarfile. Mutation: change the index's version or the layout of its rows."""
    train = folder / "data" / "train"
    truth: list[tuple[bytes, int]] = []
    for shard in sorted(train.glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = {name: file.read() for name in tar.getnames() if (file := tar.extractfile(name))}
        keys = dict.fromkeys(name.partition(".")[0] for name in files)
        truth += [(files[f"{key}.png"], int(files[f"{key}.cls"])) for key in keys]
    index = ShardIndex.load(train / FILE_NAME)
    assert len(index) == len(truth) == 64
    assert index.samples["label"].tolist() == [label for _, label in truth]
    reader = Reader(index, retry=RetryConfig(), cache=CacheConfig())
    assert reader.read(np.arange(64)) == [data for data, _ in truth]


def rows(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics, without events, and without those that tell of time."""
    lines = [line for line in map(json.loads, file.read_text().splitlines()) if "run/event" not in line]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def test_an_old_run_is_found_by_its_name_and_ends_as_it_would_have(folder: Path) -> None:
    """The same command finds the folder, since its name follows from the config, and goes on in it. All metrics to the
    end are those of the old revision, which trained the same folder to the end.

    1e-4: another processor adds floats in another order; on the one that made the fixture nothing differs.
    Mutations: a new key in the identity; another name of a metric, of a file, of a tensor in a checkpoint.
    """
    assert f"run folder runs/{NAME}, resuming from step_00000010" in said(folder, "train", "small.yaml")
    assert [path.name for path in (folder / "runs").iterdir() if path.name[0] != "."] == [NAME]
    found, expected = rows(folder / "runs" / NAME / "metrics.jsonl"), rows(folder / "undisturbed.jsonl")
    assert [list(row) for row in found] == [list(row) for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    kept = checkpoint.complete(folder / "runs" / NAME / "checkpoints")
    assert [path.name for path in kept] == ["step_00000016", "step_00000012"]


def test_old_weights_score_what_the_old_summary_says(folder: Path) -> None:
    """`eval` of the run folder's best, in integers. Mutation: look for the best weights elsewhere."""
    summary = json.loads((folder / "runs" / NAME / "summary.json").read_text())
    assert f"({round(summary['best']['top1'] * 32)}/32)" in said(folder, "eval", f"runs/{NAME}", "--data.workers=0")
