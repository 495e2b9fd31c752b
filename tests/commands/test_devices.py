"""`train` without a launcher: on all GPUs of the machine, or on as many ranks as --devices says."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import message
from running import ROOT, Session, torchrun

from dist_trainer.commands.devices import ranks_to_start
from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.config import DataConfig
from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig

CONFIG = TrainConfig(data=DataConfig(train="", val=""), batch=BatchConfig(global_batch=96, micro_batch=16))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "tests" / "fixtures" / "81fd9c4", tmp_path / "here", ignore=shutil.ignore_patterns("runs"))
    return tmp_path / "here"


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "dist_trainer", "train", "small.yaml", "--run.name=run", *argv]


def test_devices_starts_as_many_ranks_and_ends_as_they_do(here: Path) -> None:
    """Done: 0, told once. By SIGTERM: 3, all ranks stopped, saved. Mutations: one rank; its own argument passed on."""
    session = Session(command("--devices", "2"), here / "log", folder=here)
    assert session.wait(240) == 0, session.log.read_text()
    assert json.loads((here / "runs" / "run" / "summary.json").read_text())["world"] == 2
    assert session.log.read_text().count("runs/run: done") == 1
    longer = ["--run.name=long", "--duration=1000000step", "--eval.every=null", "--log.every=1step"]
    session = Session(command("--devices=2", *longer), here / "long.log", folder=here)
    while "epoch" not in session.log.read_text():
        assert session.process.poll() is None, session.log.read_text()
    os.kill(session.process.pid, signal.SIGTERM)
    assert session.wait(120) == 3, session.log.read_text()
    assert (here / "runs" / "long" / "STATE").read_text() == "stopped\n"
    assert not session.left_after(15)


def test_a_mistake_is_one_line_with_status_2(here: Path) -> None:
    """One that this process meets before it starts ranks, and one that the ranks meet. Mutation: each rank says it."""
    data = ["--devices=2", "--data.train=no"]
    both = [(["--devices=3"], "dist-trainer: 3 ranks, but "), (data, "dist-trainer: data.train: no")]
    for number, (argv, line) in enumerate(both):
        session = Session(command(*argv), here / f"log{number}", folder=here)
        assert session.wait(120) == 2
        said = session.log.read_text()
        assert said.startswith(line) and said.count("\n") == 1, said
    assert not (here / "runs").exists()


def test_a_launcher_and_devices_exclude_each_other(here: Path) -> None:
    session = Session(torchrun(1, *command("--devices=2")[1:]), here / "log", folder=here)
    assert session.wait(120) != 0
    assert "--devices: 2: a launcher has started the ranks" in session.log.read_text()


@pytest.mark.parametrize(
    ("gpus", "asked", "ranks"),
    [(0, None, 1), (1, None, 1), (4, None, 4), (8, None, 6), (4, 2, 2), (4, 1, 1), (0, 3, 3)],
)
def test_all_gpus_are_used_that_the_batch_feeds(
    gpus: int, asked: int | None, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 / 16 = 6 micro-batches feed 6 ranks. No machine here has GPUs: torch is made to count some."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ranks_to_start(CONFIG, asked) == ranks


def test_a_number_of_devices_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for asked, said in ((0, "--devices: 0 is no number of devices"), (3, "--devices: 3: this machine has 2 GPUs")):
        with pytest.raises(UserError) as caught:
            ranks_to_start(CONFIG, asked)
        assert message(caught).startswith(said)
