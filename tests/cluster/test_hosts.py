"""launch/node.sh on hosts of a network of their own: the same line on each."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_jobs import ARGV, ENVIRONMENT, LONG, alone, digests, work_folder
from hosts import Host, hosts_on_a_network, missing, search_path
from running import ROOT, Session

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "they are there")

LINE = [str(ROOT / "launch" / "node.sh"), "train", "small.yaml", *ARGV, *LONG, "--run.name=run"]


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with hosts_on_a_network(2) as found:
        yield found


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return work_folder(tmp_path)


def start(hosts: list[Host], here: Path, *argv: str, blind: int | None = None) -> list[Session]:
    """The line on each; the host of number `blind` has another runs/ than the others."""
    (here / "runs").mkdir(exist_ok=True)
    elsewhere = f"unshare -m bash -c 'mount -t tmpfs none {here / 'runs'} && exec \"$@\"' _"
    environment = {**ENVIRONMENT, "MASTER_ADDR": hosts[0].name, "NNODES": "2", "NPROC": "1"}
    environment["PATH"] = f"{ENVIRONMENT['PATH']}{os.pathsep}{search_path()}"
    sessions = []
    for number, host in enumerate(hosts):
        command = [*LINE, *argv]
        if number == blind:
            command = ["bash", "-c", f'{elsewhere} "$@"', "_", *command]
        sessions.append(host.start(command, here / f"log-{host.name}", here, **environment))
    return sessions


def logs(sessions: list[Session]) -> str:
    return "\n----\n".join(session.log.read_text() for session in sessions)


def until_step(run: Path, step: int, sessions: list[Session], seconds: float = 120) -> None:
    deadline, file = time.monotonic() + seconds, run / "metrics.jsonl"
    while not (file.exists() and f'{{"step": {step},' in file.read_text()):
        assert time.monotonic() < deadline and sessions[0].process.poll() is None, logs(sessions)
        time.sleep(0.05)  # between two looks; the deadline decides


def test_hosts_that_see_different_folders_are_told_so_before_a_step(hosts: list[Host], here: Path) -> None:
    """In one line, with status 2 on both; nobody starts again. Gloo's interface is derived from the route.

    Mutations: no look at the folder; look on rank 0's host alone; restart after a mistake; take the interface that the
    host's name is at.
    """
    sessions = start(hosts, here, blind=1)
    seen: set[str] = set()
    while any(session.process.poll() is None for session in sessions):
        for session in sessions:
            for pid in session.pids():
                variables = environment_of(pid)
                if "TORCHELASTIC_RUN_ID" in variables and b"train" in cmdline(pid):
                    seen.add(variables["GLOO_SOCKET_IFNAME"])
        time.sleep(0.1)  # between two looks; the sessions decide
    assert [session.wait(60) for session in sessions] == [2, 2], logs(sessions)
    lines = [line for line in logs(sessions).splitlines() if line.startswith("dist-trainer: ")]
    assert len(lines) == 1 and re.search(r"run.dir: .*sees another runs/run than rank 0's host does", lines[0])
    assert seen == {"eth0"}
    assert not any(session.left_after(15) for session in sessions)


def environment_of(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow  # a minute and a half
def test_a_link_that_breaks_and_comes_back_is_gone_on_from(hosts: list[Host], here: Path) -> None:
    """Mid-run: nobody hangs beyond run.timeout; when it is back, both go on by themselves, to the weights of one
    process that was not disturbed. A signal to one host's script stops both, saved.

    Mutations: no outer loop; a restart that ends in a traceback; a stop on one host restarts the other.
    """
    argv = ["--checkpoint.every=10step", "--run.timeout=10", "--data.retry.deadline=8", "--data.retry.timeout=4"]
    sessions = start(hosts, here, *argv)
    run = here / "runs" / "run"
    until_step(run, 30, sessions)
    hosts[1].link("down")
    time.sleep(25)  # a link is down for some time: both have noticed, ended their ranks, and are in their loops
    assert len(list(run.glob("stacks/*"))) > 0 or "lost contact" in logs(sessions)
    hosts[1].link("up")
    assert [session.wait(180) for session in sessions] == [0, 0], logs(sessions)
    assert "restart 1 of 10" in logs(sessions) and "resuming from step_" in logs(sessions)
    assert "Traceback" not in logs(sessions)
    assert digests(run) == digests(alone(here))

    sessions = start(hosts, here, "--duration=100000step", "--run.name=other")
    until_step(here / "runs" / "other", 5, sessions)
    os.kill(sessions[1].process.pid, signal.SIGTERM)
    assert [session.wait(60) for session in sessions] == [3, 3], logs(sessions)
    assert json.loads((here / "runs" / "other" / "summary.json").read_text())["state"] == "stopped"
