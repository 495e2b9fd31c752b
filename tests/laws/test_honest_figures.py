"""Figures say what happened: no loss without an update, rates that are not rounded away, one rank that is one."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from running import ROOT, Session, metrics, run_ranks

from dist_trainer.errors import plural


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A copy of data, a config and a run folder with two checkpoints, to be the working folder."""
    return shutil.copytree(ROOT / "tests" / "fixtures" / "81fd9c4", tmp_path / "here")


def trained(here: Path, name: str, *argv: str) -> tuple[Path, str]:
    """(the run folder, what was printed) of `train small.yaml` to its end."""
    run_ranks(1, "train_command", here, here / "said", "", "small.yaml", f"--run.name={name}", *argv)
    return here / "runs" / name, (here / "said").read_text()


def test_an_interval_without_an_update_has_no_loss(here: Path) -> None:
    """A rate of 1e30: the first update has the rate 0, the second destroys the weights, and from then on none is made.

    Mutation: 0 for the mean of nothing, which looks like the best loss of all.
    """
    run, said = trained(here, "huge", "--lr.peak=1e30", "--eval.every=null", "--duration=12step")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[0] > 0
    assert losses[1:] == [None] * 5
    assert said.count("loss none, no update") == 5


def test_a_printed_rate_has_significant_digits(here: Path) -> None:
    """Against metrics.jsonl, to a thousandth. Mutation: four decimals, which print 2e-5 as 0."""
    run, said = trained(here, "small", "--lr.peak=0.00003", "--eval.every=null", "--duration=12step")
    printed = [float(rate) for rate in re.findall(r" lr (\S+) ", said)]
    assert printed == pytest.approx(metrics(run, "train/lr"), rel=1e-3)
    assert all(printed)


def test_batch_norm_is_re_estimated_at_the_crop_size_of_that_step(here: Path) -> None:
    """Two runs whose crops grow after the half, to 20 or to 28 pixels, are one run until then: so is every score.

    Mutation: the crop size of the last step, in every evaluation.
    """
    argv = ["--augment.crop.start_size=16", '--augment.crop.grow=["50%", "100%"]', "--augment.crop.multiple_of=4",
            "--duration=16step", "--eval.every=4step"]  # fmt: skip
    (small, _), (large, _) = (trained(here, f"to{size}", f"--augment.crop.size={size}", *argv) for size in (20, 28))
    for name in ("val/loss", "val_bn/loss", "val_ema_bn/loss"):
        ours, theirs = metrics(small, name), metrics(large, name)
        assert ours[:2] == theirs[:2], name
        assert ours[2:4] != theirs[2:4], name


def test_average_says_when_there_are_fewer_than_asked_for(here: Path) -> None:
    """Mutation: average two, and call them three."""
    argv = [sys.executable, "-m", "dist_trainer", "average", "runs/small-3cb02d9e", "--last=3", "--data.workers=0"]
    session = Session(argv, here / "log", folder=here)
    assert session.wait() == 0
    said = (here / "log").read_text()
    assert "runs/small-3cb02d9e has 2 checkpoints, not 3 (checkpoint.keep_last says how many are kept)" in said
    assert "2 of 2 averaged" in said


def test_one_is_singular() -> None:
    """Mutation: `1 ranks`, `2 classs`."""
    said = [plural(1, "rank"), plural(0, "rank"), plural(1200, "sample"), plural(2, "class"), plural(1.0, "epoch")]
    assert said == ["1 rank", "0 ranks", "1,200 samples", "2 classes", "1 epoch"]
    assert plural(2.5, "epoch") == "2.5 epochs"
    assert plural(1_281_167, "image") == "1,281,167 images"


def test_a_run_of_one_epoch_on_one_rank_says_so(here: Path) -> None:
    """Mutation: `1 epochs`, `1 ranks`."""
    _, said = trained(here, "one", "--duration=1ep", "--lr.warmup.duration=0ep")
    assert "(1 epoch, 0 skipped)" in said
    assert "on 1 rank " in " ".join(re.split(r"[\s│]+", said))
