"""W&B shows the record: its files and what a server got, read back, after every kind of interruption.

The server is tests/support/wandb_server.py, on loopback; the client is wandb itself.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import PATIENCE, TINY, Session, metrics, run_jobs, tensors, torchrun, wait_for_step
from wandb_files import compared, history, record, records
from wandb_server import KEY, WandbServer, serving

from dist_trainer.commands.main import dispatch
from dist_trainer.errors import UserError
from dist_trainer.log.follow import Task
from dist_trainer.log.follower import Follower
from dist_trainer.log.metrics_file import MetricsFile
from dist_trainer.log.wandb_run import WandbConfig

CLI = [sys.executable, "-m", "dist_trainer"]
ONLINE = [*(each for each in TINY if "wandb" not in each), "--eval.every=5step", "--checkpoint.every=4step"]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with serving() as server:
        yield server
    assert not server.errors


def variables(server: WandbServer | str, **more: str) -> dict[str, str]:
    url = server if isinstance(server, str) else server.url
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false", **more}


def train(world: int, argv: list[str], folder: Path, environment: dict[str, str]) -> Session:
    command = ["-m", "dist_trainer", "train", *argv, f"--run.dir={folder}", "--run.name=run"]
    launch = torchrun(world, *command) if world > 1 else [sys.executable, *command]
    return Session(launch, folder / "log", **environment)


def sync(run: Path, environment: dict[str, str]) -> str:
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}, **environment}
    done = subprocess.run(
        [*CLI, "wandb-sync", str(run)], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout + done.stderr


def only(found: Any) -> Any:
    (one,) = found
    return one


def test_offline_there_is_one_file_with_every_step_once(tmp_path: Path, fashion: list[str]) -> None:
    """Stopped, rolled back, gone on with on other worlds: value by value, and no step goes backwards.

    Mutations: keep the files of attempts before; write only what comes after the checkpoint.
    """
    argv = [*TINY, *fashion, "--wandb.mode=offline", "--eval.every=5step", "--checkpoint.every=4step"]
    run_jobs(2, [{"name": "run", "argv": argv, "stop_at": 6}], tmp_path)
    first = only((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    assert [row["step"] for row in history(first)] == [1, 2, 3, 4, 5, 6, 7]
    run_jobs(3, [{"name": "run", "argv": argv, "stop_at": 11}], tmp_path)
    run_jobs(1, [{"name": "run", "argv": argv}], tmp_path)
    second = only((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    rows = history(second)
    assert second.name == first.name, "one run"
    assert [row["step"] for row in rows] == [row["_step"] for row in rows] == list(range(1, 21))
    assert compared(rows) == record(tmp_path / "run")
    assert [row["run/world"] for row in rows if "run/event" in row] == [3, 1]
    assert rows[-1]["_timestamp"] == metrics(tmp_path / "run", "perf/time")[-1]
    config = {}
    for each in records(second):
        if each.WhichOneof("record_type") == "run":
            config |= {update.key: json.loads(update.value_json) for update in each.run.config.update}
    assert config["batch"] == {"global_batch": 64, "micro_batch": 16} and config["world"] == 1


@pytest.mark.slow
def test_a_killed_run_leaves_a_whole_file_and_goes_on(tmp_path: Path, fashion: list[str]) -> None:
    """SIGKILL of every rank: what was logged is in the file. Mutation: rank 0 writes it itself."""
    argv = [*ONLINE, *fashion, "--wandb.mode=offline", "--duration=100000step"]
    session = train(2, argv, tmp_path, {})
    wait_for_step(session, tmp_path / "run", 9)
    for pid in session.rank_pids():
        os.kill(pid, signal.SIGKILL)
    assert session.wait() != 0
    assert not session.left_after(30)
    rows = history(only((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")))
    assert compared(rows) == record(tmp_path / "run")
    assert rows[-1]["step"] >= 9
    session = train(
        1, [*argv[:-1], f"--duration={rows[-1]['step'] + 5}step", "--run.allow_change=[duration]"], tmp_path, {}
    )
    assert session.wait() == 0, session.log.read_text()[-3000:]
    rows = history(only((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")))
    assert compared(rows) == record(tmp_path / "run")


@pytest.mark.slow
def test_a_server_gets_one_run_whatever_interrupts_it(tmp_path: Path, fashion: list[str], server: WandbServer) -> None:
    """Killed behind its checkpoint, gone on with, then offline for a while, then synchronised: every step once.

    Its times are those of the attempt that came first. Mutations: send all rows on resume; a new id.
    """
    argv = [*ONLINE, *fashion, "--wandb.tags=[a, b]", "--wandb.group=g", "--wandb.artifact=best"]
    argv.append("--lr.schedule.name=constant")  # repeated steps have the same rate, however long the run is
    session = train(2, [*argv, "--duration=100000step"], tmp_path, variables(server, WANDB_PROJECT="theirs"))
    wait_for_step(session, tmp_path / "run", 9)
    deadline = time.monotonic() + PATIENCE * 60
    while not any(run.lines for run in server.runs.values()):
        assert time.monotonic() < deadline, session.log.read_text()[-3000:]
        time.sleep(0.1)  # between two looks; the deadline decides
    for pid in session.rank_pids():
        os.kill(pid, signal.SIGKILL)
    session.wait()
    assert not session.left_after(30)
    name, run = only(server.runs.items())
    assert run.exit_code == 1
    assert [alert["title"] for alert in run.alerts] == ["run: killed"]
    sent = run.history
    steps = sent[-1]["step"] + 3
    more = [*argv, f"--duration={steps}step", "--run.allow_change=[duration]"]
    assert train(2, more, tmp_path, variables(server, WANDB_PROJECT="theirs")).wait() == 0
    assert only(server.runs) == name
    assert run.history[: len(sent)] == sent, "a server's history is appended to"
    assert [row["step"] for row in run.history] == list(range(1, steps + 1))
    assert compared(run.history, "perf/", "run/") == record(tmp_path / "run", "perf/", "run/")
    assert [row["run/restarts"] for row in run.history if "run/restarts" in row] == [1]
    assert (run.exit_code, run.given("project"), run.given("tags"), run.given("groupName")) == (
        0,
        "theirs",
        ["a", "b"],
        "g",
    )
    assert run.config()["batch"] == {"global_batch": 64, "micro_batch": 16}
    assert run.config()["world"] == 2 and run.config()["plan"]["total_steps"] == steps
    summary = json.loads(run.summary)
    assert summary["best"]["top1"] == summary["val/top1.max"] == max(metrics(tmp_path / "run", "val/top1"))
    assert [name for name in run.files if re.fullmatch(r"media/images/predictions_\d+_\w+\.png", name)]
    assert only(server.artifacts)["input"]["artifactCollectionName"] == f"best-{name}"
    assert f"{tmp_path / 'run'}: 0 steps uploaded" in sync(tmp_path / "run", variables(server))
    assert len(run.history) == steps


@pytest.mark.parametrize(
    ("fault", "timeout"),
    [
        ("refuses", 60),  # as long as its file may take to be written at the end, on a busy machine
        pytest.param("silent", 12, marks=pytest.mark.slow),
        pytest.param("closed", 60, marks=pytest.mark.slow),
    ],
)
def test_where_a_server_does_not_answer_the_run_is_offline_and_uploaded_later(
    tmp_path: Path, fashion: list[str], server: WandbServer, fault: str, timeout: int
) -> None:
    """One line, no wait at the start, the same weights as without W&B; wandb-sync uploads it, each step once.

    Mutations: wait for W&B before the first step; take its weights from a run with a hook.
    """
    listener = socket.create_server(("127.0.0.1", 0))  # accepts, by the kernel, and never answers
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if fault == "closed":
        listener.close()
    if fault == "refuses":
        server.refuses, url = True, server.url
    session = train(1, [*ONLINE, *fashion, f"--wandb.timeout={timeout}"], tmp_path, variables(url))
    assert session.wait() == 0
    said = [line for line in session.log.read_text().splitlines() if "W&B" in line]
    assert not session.left_after(10)
    assert len(said) == 1 and "offline" in said[0] and f"wandb-sync {tmp_path / 'run'}" in said[0], said
    rows = history(only((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")))
    assert compared(rows) == record(tmp_path / "run")
    assert len(said[0]) < 320 and KEY not in session.log.read_text()
    listener.close()
    server.refuses = False
    assert "20 steps uploaded" in sync(tmp_path / "run", variables(server))
    assert compared(only(server.runs.values()).history) == record(tmp_path / "run")
    if fault == "silent":
        run_jobs(1, [{"name": "without", "argv": [*ONLINE, *fashion, "--wandb.mode=disabled"]}], tmp_path)
        with_wandb, without = tensors(tmp_path / "run"), tensors(tmp_path / "without")
        assert all(torch.equal(with_wandb[name], without[name]) for name in without)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="mounting needs root and unshare")
def test_a_full_disk_of_wandbs_costs_a_line_alone(tmp_path: Path, fashion: list[str], server: WandbServer) -> None:
    """WANDB_DIR on a file system of 64 kB, a real one. Mutation: no look at what is free, as wandb has none."""
    full = tmp_path / "full"
    full.mkdir()
    argv = ["-m", "dist_trainer", "train", *ONLINE, *fashion, "--wandb.mode=offline", f"--run.dir={tmp_path}"]
    mounted = f'mount -t tmpfs -o size=64k none {full} && exec "$@"'
    command = ["unshare", "-m", "bash", "-c", mounted, "_", sys.executable, *argv, "--run.name=run"]
    session = Session(command, tmp_path / "log", WANDB_DIR=str(full))
    assert session.wait() == 0
    assert not session.left_after(20)
    first, second = [line for line in session.log.read_text().splitlines() if "W&B" in line]
    assert first.startswith("W&B: offline") and "No space left on device" in second and "wandb-sync" in second
    assert "20 steps uploaded" in sync(tmp_path / "run", variables(server))
    assert compared(only(server.runs.values()).history) == record(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_trial_that_its_sweep_gave_up_is_not_handed_out_again(
    tmp_path: Path, fashion: list[str], server: WandbServer, number: signal.Signals
) -> None:
    """`wandb agent` ends one by SIGTERM; SIGUSR1 is a time limit. Mutation: every stop is a preemption."""
    environment = variables(server, WANDB_SWEEP_ID="sweep123", WANDB_RUN_ID="trial1")
    session = train(1, [*ONLINE, *fashion, "--duration=100000step"], tmp_path, environment)
    wait_for_step(session, tmp_path / "run-trial1", 6)
    session.process.send_signal(number)
    assert session.wait() == 3
    assert not session.left_after(20)
    assert server.runs["trial1"].preempting == (number == signal.SIGUSR1)


@pytest.mark.slow
def test_another_hosts_load_is_a_run_of_the_same_group(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb.system: all, with both hosts' processes here. Mutation: both write into one run."""
    for name, value in variables(server).items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    folder.mkdir()
    first = Task(folder=str(folder), mode="online", wandb=asdict(WandbConfig(system="all")), facts={})
    other = Follower(replace(first, label="node2"), print)  # waits for the id that rank 0 is about to choose
    (folder / "wandb_id").write_text("abcd1234")
    main = Follower(first, print)
    MetricsFile(folder / "metrics.jsonl", 0).write(1, {"epoch": 0.1, "train/loss": 2.0})
    deadline = time.monotonic() + PATIENCE * 40
    while not all(server.runs.get(name) and server.runs[name].events for name in ("abcd1234", "abcd1234-node2")):
        assert time.monotonic() < deadline, server.runs.keys()
        time.sleep(0.1)  # between two looks; the deadline decides
    (folder / "STATE").write_text("done\n")
    other.close(20)
    main.close(20)
    assert server.runs["abcd1234"].given("groupName") == server.runs["abcd1234-node2"].given("groupName") == "abcd1234"
    assert [row["step"] for row in server.runs["abcd1234"].history] == [1]
    assert server.runs["abcd1234-node2"].given("displayName") == "run: node2"
    assert not server.runs["abcd1234-node2"].history and server.runs["abcd1234-node2"].exit_code == 0


POISON = ["--model.args={poison: [12, 0]}", "--checkpoint.every=4step", "--checkpoint.keep_last=9"]
"""NaN at step 7, and in a network that was made anew at the 14th."""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_roll_backs_leave_one_run_with_every_step_once(
    tmp_path: Path, fashion: list[str], server: WandbServer, mode: str
) -> None:
    """Two roll-backs of a run on two ranks, in one process each. Offline: value by value. Online, where rows cannot be
    taken back: each step of the record is there once, and steps go up. Mutation: the second process waits for nothing.
    """
    argv = [*(each for each in TINY if "wandb" not in each), *fashion, *POISON, "--engine.not_finite=roll_back"]
    session = train(2, [*argv, f"--wandb.mode={mode}"], tmp_path, variables(server))
    assert session.wait() == 0, session.log.read_text()[-3000:]
    run = tmp_path / "run"
    assert [row["run/roll_backs"] for row in record(run) if "run/event" in row] == [1, 2]
    assert sorted(set(metrics(run, "step"))) == [*range(1, 5), *range(8, 13), *range(15, 21)]
    if mode == "offline":
        assert compared(history(only(run.glob("wandb/offline-run-*/run-*.wandb")))) == record(run)
    else:
        stored = only(server.runs.values())
        steps = [row["step"] for row in stored.history]
        assert steps == sorted(set(steps))
        kept = {row["step"]: row for row in compared(stored.history, "perf/", "run/")}
        assert [kept[row["step"]] for row in record(run, "perf/", "run/")] == record(run, "perf/", "run/")
        assert stored.exit_code == 0 and not stored.alerts


@pytest.mark.slow
def test_a_stop_by_a_gradient_that_is_not_finite_is_an_alert(
    tmp_path: Path, fashion: list[str], server: WandbServer
) -> None:
    argv = [*(each for each in TINY if "wandb" not in each), *fashion, *POISON, "--engine.not_finite=stop"]
    assert train(1, argv, tmp_path, variables(server)).wait() == 2
    deadline = time.monotonic() + PATIENCE * 20
    while not (run := only(server.runs.values())).alerts and time.monotonic() < deadline:
        time.sleep(0.1)  # the process that tells outlives the run; the deadline decides
    (alert,) = run.alerts
    assert alert["title"] == "run: stopped by an error" and "engine.not_finite: stop" in alert["text"]


def test_a_stop_is_no_failure_at_wandb_and_code_and_secrets_stay_here(
    tmp_path: Path, fashion: list[str], server: WandbServer
) -> None:
    """It is marked as preempted, so that a sweep hands it out again. Neither the command line, nor differences of the
    repository, nor any source is sent. Mutations: exit code 0; disable_code is left out.
    """
    environment = variables(server, WANDB_SAVE_CODE="true", AWS_SECRET_ACCESS_KEY="planted-secret")
    session = train(1, [*ONLINE, *fashion, "--duration=100000step"], tmp_path, environment)
    wait_for_step(session, tmp_path / "run", 6)
    session.process.send_signal(signal.SIGTERM)
    assert session.wait() == 3
    assert not session.left_after(20)
    run = only(server.runs.values())
    assert run.preempting and run.exit_code == 1 and not run.alerts
    assert json.loads(run.summary)["state"] == "stopped"
    sent = b"\n".join(server.bodies)
    assert b"planted-secret" not in sent and KEY.encode() not in sent and b"def train(" not in sent
    assert run.files <= {"requirements.txt", "config.yaml", "wandb-metadata.json", "wandb-summary.json", "output.log"}


def test_wandb_sync_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(UserError, match=f"{tmp_path}: not a run folder"):
        dispatch(["wandb-sync", str(tmp_path)])
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "env.json").write_text("{}")
    with pytest.raises(UserError, match="no metrics yet"):
        dispatch(["wandb-sync", str(tmp_path)])
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="no W&B API key"):
        dispatch(["wandb-sync", str(tmp_path)])
