"""Trials of a W&B sweep: real `wandb agent`, launch/local.sh and two ranks, against a server on loopback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import PATIENCE, ROOT, TINY, metrics
from wandb_files import compared, record
from wandb_server import KEY, serving

from dist_trainer.config.arguments import new_parser, parse_config
from dist_trainer.run.start import choose_folder
from dist_trainer.run_folder.folder import RunConfig

SMALL = [*(each for each in TINY if "wandb" not in each), "--checkpoint.every=4step"]


def test_the_agents_arguments_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wandb's own source writes them: None, True, nested mappings and lists in Python's spelling.

    Mutation: `None` stays a word.
    """
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    values: dict[str, Any] = {
        "lr": {"base": 0.05, "peak": None},
        "model.dropout": None,
        "model.channels_last": True,
        "ema.decay": None,
        "optimizer.args": {"momentum": 0.8, "nesterov": True},
        "optimizer.no_decay": ["norm", "bias"],
        "optimizer.weight_decay": 1e-05,
        "eval.every": None,
    }
    argv = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})["args"]
    spaced = [word for each in argv for word in each.split("=", 1)]
    base = ["--data.train=here", "--data.val=here", "--ema.decay=0.5"]
    for words in (argv, spaced):
        config, _ = parse_config(new_parser("train", ""), [*base, *words])
        assert (config.lr.base, config.lr.peak, config.model.dropout, config.ema.decay) == (0.05, None, None, None)
        assert config.model.channels_last is True and config.eval.every is None
        assert config.optimizer.args == {"momentum": 0.8, "nesterov": True}
        assert (config.optimizer.no_decay, config.optimizer.weight_decay) == (["norm", "bias"], 1e-05)


def test_a_trial_names_its_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the config names the run; WANDB_RUN_ID alone, which people set by themselves, does not."""
    auto, named = RunConfig(dir=str(tmp_path)), RunConfig(dir=str(tmp_path), name="mine")
    plain, _ = choose_folder(auto, "stem", {})
    monkeypatch.setenv("WANDB_RUN_ID", "t1")
    assert choose_folder(auto, "stem", {})[0] == plain
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    assert choose_folder(auto, "stem", {})[0] == f"{plain}-t1"
    assert choose_folder(named, "stem", {})[0] == str(tmp_path / "mine-t1")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_sweep_sweeps_keys_that_exist(path: Path) -> None:
    """Every value of every parameter; its command names files that are here."""
    sweep = yaml.safe_load(path.read_text())
    command = [word for word in sweep["command"] if "/" in word]
    assert all((ROOT / word).is_file() for word in command), command
    for name, parameter in sweep["parameters"].items():
        for value in parameter.get("values", [parameter.get("min")]):
            parse_config(new_parser("train", ""), [command[-1], f"--{name}={value}"])


@pytest.mark.slow
def test_two_trials_of_two_ranks_and_one_that_is_handed_out_again(tmp_path: Path, fashion: list[str]) -> None:
    """The first is stopped in the middle: W&B hands it out again, and it goes on in its own folder, as the same run.

    Mutations: the stop is no preemption; folders are named by the config alone, so that a repeated trial joins another.
    """
    config = tmp_path / "small.yaml"
    nested: dict[str, Any] = {}
    for word in [*SMALL, *fashion, f"--run.dir={tmp_path / 'runs'}"]:
        name, value = word.removeprefix("--").split("=", 1)
        inner = nested
        for part in name.split(".")[:-1]:
            inner = inner.setdefault(part, {})
        inner[name.rpartition(".")[2]] = yaml.safe_load(value)
    config.write_text(yaml.safe_dump(nested))
    with serving() as server:
        server.sweep = {"method": "grid", "parameters": {}}
        server.sweep["command"] = [str(ROOT / "launch" / "local.sh"), "train", str(config), "${args}"]
        values = {"lr.peak": 0.05, "model.dropout": None, "engine.compile": False}
        server.trials = {"trial1": {**values, "duration": "600step"}, "trial2": {**values, "duration": "20step"}}
        env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_"))} | {
            "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false", "NPROC": "2",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'ranks'}",
        }  # fmt: skip
        agent = ["wandb", "agent", "--forward-signals", "--count", "1", "me/p/sweep123"]

        def start() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(agent, env=env, cwd=tmp_path)

        first = start()
        deadline = time.monotonic() + PATIENCE * 90
        while not [file for file in tmp_path.glob("runs/*-trial1/metrics.jsonl") if '"step": 9,' in file.read_text()]:
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)  # between two looks; the deadline decides
        first.send_signal(signal.SIGUSR1)
        first.wait(90)
        (run1,) = tmp_path.glob("runs/small-*-trial1")
        assert (run1 / "STATE").read_text() == "stopped\n"
        assert start().wait(120) == 0
        assert start().wait(120) == 0
        (run2,) = tmp_path.glob("runs/small-*-trial2")
        for run, name, steps in ((run1, "trial1", 600), (run2, "trial2", 20)):
            assert (run / "STATE").read_text() == "done\n"
            stored = server.runs[name]
            assert [row["step"] for row in stored.history] == list(range(1, steps + 1))
            assert compared(stored.history, "perf/", "run/") == record(run, "perf/", "run/")
            assert (stored.given("sweep"), stored.config()["world"]) == ("sweep123", 2)
        assert len(metrics(run1, "run/event")) == 1 and not metrics(run2, "run/event")
        assert not server.trials and server.runs.keys() == {"trial1", "trial2"}
