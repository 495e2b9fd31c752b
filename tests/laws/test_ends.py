"""Every end of a run is one of five: in STATE, in summary.json with the reason, and in the exit status."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import PATIENCE, RANKS, ROOT, Session, newest, tensors, torchrun, wait_for_step

from dist_trainer.commands.agent import first_of_last_attempt
from dist_trainer.data.parallel import loader_fault
from dist_trainer.distributed.processes import SECOND_AFTER_S

LONG = ["--duration=1000000step", "--eval.every=null", "--checkpoint.every=null", "--log.every=1step"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The working folder: data and a config."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "81fd9c4", tmp_path / "here")
    shutil.rmtree(tmp_path / "here" / "runs")
    return tmp_path / "here"


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "dist_trainer", "train", "small.yaml", "--run.name=run", *argv]


def started(here: Path, argv: list[str]) -> Session:
    """A run that has written its first line of metrics."""
    session = Session(argv, here / "log", folder=here)
    wait_for(here / "runs" / "run" / "metrics.jsonl", session)
    return session


def wait_for(file: Path, session: Session) -> None:
    deadline = time.monotonic() + PATIENCE * 120
    while not (file.exists() and file.read_text()):
        assert session.process.poll() is None, session.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)  # between two looks; the deadline decides


def end_of(here: Path) -> tuple[str, str]:
    """(state, reason), which STATE and summary.json agree on."""
    run = here / "runs" / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (run / "STATE").read_text() == f"{summary['state']}\n"
    return summary["state"], summary["reason"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_in_order_with_status_3(here: Path, number: signal.Signals) -> None:
    """So that `train && eval` does not go on. Mutation: 0, as for done; SIGHUP ends the process."""
    session = started(here, command(*LONG, "--data.workers=1"))
    os.kill(session.process.pid, number)
    assert session.wait(60) == 3
    assert end_of(here) == ("stopped", number.name)
    assert not session.left_after(15), session.left_after(0)
    assert "leaked" not in session.log.read_text()


def test_a_rank_under_torchrun_stops_with_status_0(here: Path) -> None:
    """By a signal to the rank alone: torchrun ends well, and starts nothing again. Mutation: 3 there too."""
    session = started(here, torchrun(1, *command(*LONG)[1:], restarts=1))
    (rank,) = session.rank_pids()
    os.kill(rank, signal.SIGUSR1)
    assert session.wait(60) == 0
    assert end_of(here) == ("stopped", "SIGUSR1")


def test_a_second_signal_ends_at_once(here: Path) -> None:
    """A model that never comes back: the first signal waits for its step, one within 2 s is the same signal delivered
    twice, a later one ends. Mutations: count the one within 2 s; wait for the main thread.
    """
    session = Session(command(*LONG, "--model.name=tiny:Stuck", "--model.args={}"), here / "log", folder=here)
    wait_for(here / "runs" / "run" / "STATE", session)
    # Into the forward that hangs. A slow machine may not be there yet: the handlers are set before STATE is written, so
    # the end is the same.
    time.sleep(1)
    for pause in (0.0, 0.1, SECOND_AFTER_S + 0.2):
        time.sleep(pause)  # what is tested is the time between signals
        assert session.process.poll() is None
        os.kill(session.process.pid, signal.SIGINT)
    assert session.wait(20) == 130
    assert end_of(here) == ("interrupted", "SIGINT, the second signal")
    assert "Traceback" not in session.log.read_text()


def test_a_fault_has_status_1_and_its_first_line_as_reason(here: Path) -> None:
    """Mutation: STATE stays at running."""
    session = Session(command(*LONG, "--model.name=tiny:Broken", "--model.args={}"), here / "log", folder=here)
    assert session.wait(60) == 1
    assert end_of(here) == ("fault", "RuntimeError: nothing was expected")


def test_twenty_steps_that_are_not_finite_end_with_the_good_weights_saved(here: Path) -> None:
    """A rate of 1e30 destroys the weights in the second step: their values stay finite, no gradient is.

    Mutations: raise without saving; STATE stopped, which a batch script would start again.
    """
    session = Session(command("--lr.peak=1e30", *LONG), here / "log", folder=here)
    assert session.wait(60) == 2
    state, reason = end_of(here)
    assert state == "mistake"
    assert "not finite 20 times in a row" in reason
    (line,) = [line for line in session.log.read_text().splitlines() if line.startswith("dist-trainer: ")]
    assert f"stopped after {newest(here / 'runs' / 'run').name.replace('step_000000', 'step ')}, saved" in line
    assert all(torch.isfinite(value).all() for value in tensors(here / "runs" / "run").values())


def closed_after(here: Path, num_lines: int, *argv: str) -> int:
    """The exit status of a run whose stdout and stderr are closed after some lines."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{RANKS}"}
    process = subprocess.Popen(command(*argv), cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    for _ in range(num_lines):
        process.stdout.readline()
    process.stdout.close()
    try:
        return process.wait(60)
    finally:
        process.kill()


def test_a_closed_stdout_mutes_train_which_goes_on(here: Path) -> None:
    """As behind `| head -3`, with a loader process. Mutation: rich's own answer, which ends the program."""
    assert closed_after(here, 3, "--data.workers=1", "--log.every=1step") == 0
    assert end_of(here)[0] == "done"


@pytest.mark.slow  # eight starts
def test_no_moment_to_close_stdout_hangs(here: Path) -> None:
    """Random ones, spread over the run. Mutation: let any print raise."""
    for number in range(8):
        num_lines = random.randrange(5 * number, 5 * number + 5)
        print(f"closed after {num_lines} lines")
        assert closed_after(here, num_lines, f"--run.dir=runs-{number}", "--log.every=1step", "--data.workers=1") == 0
        assert (here / f"runs-{number}" / "run" / "STATE").read_text() == "done\n"


SLOWLY = [pytest.mark.slow]


@pytest.mark.parametrize(
    "command_line",
    [
        "plan small.yaml",
        pytest.param("eval runs/small-3cb02d9e --data.workers 1", marks=SLOWLY),
        pytest.param("average runs/small-3cb02d9e --top_k 2", marks=SLOWLY),
        pytest.param("augment small.yaml --samples 2 --out picture.png", marks=SLOWLY),
        pytest.param("shards index data/train", marks=SLOWLY),
        pytest.param("shards check data/train --level decode", marks=SLOWLY),
        pytest.param("ls models", marks=SLOWLY),
        pytest.param("train --help", marks=SLOWLY),
    ],
)
def test_another_command_ends_when_stdout_is_closed(here: Path, command_line: str) -> None:
    """At once, and after some lines. Mutation: flush what cannot be flushed, which raises after all was handled."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "81fd9c4" / "runs", here / "runs")
    for num_lines in (0, random.randrange(1, 4)):
        argv = [sys.executable, "-m", "dist_trainer", *command_line.split()]
        process = subprocess.Popen(argv, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None and process.stderr is not None
        for _ in range(num_lines):
            process.stdout.readline()
        process.stdout.close()
        status, said = process.wait(60), process.stderr.read().decode()
        assert status in (0, 1) and not re.search("Traceback|dist-trainer: ", said), said


def test_an_error_between_a_killed_run_and_the_first_step_is_its_end(here: Path) -> None:
    """STATE still says running, of the attempt before. Mutation: only the training itself is watched."""
    session = started(here, command(*LONG, "--checkpoint.every=1step"))
    wait_for_step(session, here / "runs" / "run", 8)  # one checkpoint waits for the other: that of step 4 was whole
    session.kill()
    assert (here / "runs" / "run" / "STATE").read_text() == "running\n"
    session = Session(command("--duration=3step", '--run.allow_change=["duration"]'), here / "log", folder=here)
    assert session.wait(60) == 2
    state, reason = end_of(here)
    assert state == "mistake"
    assert reason.startswith("duration: 3step ends at step 3, and the run stands at step ")


def test_a_killed_loader_process_costs_one_line(here: Path) -> None:
    """As by the kernel, for want of memory. Mutation: torch's traceback, and status 1."""
    session = started(here, command(*LONG, "--data.workers=1"))
    (worker,) = [pid for pid, line in session.pids().items() if "spawn_main" in line]
    os.kill(worker, signal.SIGKILL)
    assert session.wait(60) == 2
    line = "a loader process was killed, most likely for want of memory: set fewer data.workers, or 0"
    assert end_of(here) == ("mistake", line)
    assert not session.left_after(15), session.left_after(0)  # multiprocessing's helper, too, has nothing to say
    assert session.log.read_text().splitlines()[-1] == f"dist-trainer: {line}"


@pytest.mark.parametrize("limit", [18, 26])
def test_too_few_descriptors_cost_one_line(here: Path, limit: int) -> None:
    """In the first process, or for the next one. With 18, some machines cannot even read the data: a line too.

    Mutation: torch's complaint of a loader that was never whole.
    """
    line = f'ulimit -n {limit}; exec "$@"'
    session = Session(["bash", "-c", line, "-", *command("--data.workers=4")], here / "log", folder=here)
    assert session.wait(60) == 2
    said = session.log.read_text()
    line = f"ulimit -n is {limit}, too few open files for loader processes: raise it, or set data.workers: 0"
    if (here / "runs").exists():
        assert end_of(here) == ("mistake", line)
    assert said.splitlines()[-1] == f"dist-trainer: {line}" or re.search(
        "^dist-trainer: data.* Too many open files$", said
    )
    assert not re.search("Traceback|AttributeError", said)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            "/dev/shm is full",
        ),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for file "
            "</torch_7_1_0>: No space left on device (28)",
            "/dev/shm is full",
        ),
        ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n is "),
        ("received 0 items of ancdata", "ulimit -n is "),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "a loader process was killed"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "a loader process was killed"),
        ("shape '[8]' is invalid for input of size 7", None),
    ],
)
def test_each_death_of_a_loader_has_its_remedy(words: str, remedy: str | None) -> None:
    """torch's words, as it raises them. Mutation: full shared memory is called want of memory."""
    found = loader_fault(RuntimeError(words))
    assert (found is None) == (remedy is None)
    assert remedy is None or (found or "").startswith(remedy)


def local(here: Path, *argv: str) -> Session:
    """launch/local.sh with two ranks."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(ROOT / "launch" / "local.sh"), "train", "small.yaml", "--run.name=run", *argv]
    return Session(command, here / "log", folder=here, NPROC="2", PATH=path)


def test_local_sh_ends_as_its_ranks_do(here: Path) -> None:
    """Stopped, by a signal to the script, and a mistake that only the ranks meet: 3 and 2, one line, no report by
    torchrun. Mutation: its own status, 1 for both.
    """
    session = local(here, *LONG)
    wait_for(here / "runs" / "run" / "metrics.jsonl", session)
    os.kill(session.process.pid, signal.SIGTERM)
    assert session.wait(60) == 3
    assert end_of(here) == ("stopped", "SIGTERM")
    assert not session.left_after(15), session.left_after(0)
    session = local(here, *LONG, "--lr.peak=1e30", '--run.allow_change=["lr.peak"]')
    assert session.wait(120) == 2
    assert end_of(here)[0] == "mistake"
    assert session.log.read_text().splitlines()[-1].startswith("dist-trainer: stopped after step ")
    assert not re.search("ChildFailedError|Traceback", session.log.read_text())


def test_a_mistake_that_one_rank_meets_is_the_end_of_all(here: Path) -> None:
    """The loader process of rank 1 is killed: that is the reason, the status and the line, though rank 0 only knows
    that it lost contact. Mutations: that rank ends with 0, for which NCCL's others wait; rank 0 alone writes STATE.
    """
    session = local(here, *LONG, "--data.workers=1")
    wait_for(here / "runs" / "run" / "metrics.jsonl", session)
    parents = {pid: parent_of(pid) for pid, line in session.pids().items() if "spawn_main" in line}
    (worker,) = [pid for pid, parent in parents.items() if variable(parent, "RANK") == "1"]
    os.kill(worker, signal.SIGKILL)
    assert session.wait(60) == 2
    assert not session.left_after(15), session.left_after(0)
    line = "a loader process was killed, most likely for want of memory: set fewer data.workers, or 0"
    assert end_of(here) == ("mistake", line)
    log = session.log.read_text()
    assert f"dist-trainer: [rank 1] {line}" in log.splitlines()
    assert not re.search("ChildFailedError|Traceback", log)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def variable(pid: int, name: str) -> str | None:
    """Of a process's environment."""
    pairs = [pair.partition("=") for pair in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    return next((value for key, _, value in pairs if key == name), None)


def test_a_wrong_argument_of_the_agent_is_one_line() -> None:
    """Mutation: torchrun's traceback."""
    argv = [sys.executable, "-m", "dist_trainer", "agent", "--nproc-per-node=many", "-m", "dist_trainer"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "dist-trainer: agent: Unsupported nproc_per_node value: many\n")


def test_the_agent_names_a_rank_that_was_killed(tmp_path: Path) -> None:
    """It could not say so itself, and those that wait for it within NCCL do not know. Mutation: say nothing."""
    script = tmp_path / "script.py"
    script.write_text("import os, time\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), 9)\ntime.sleep(60)\n")
    argv = [sys.executable, "-m", "dist_trainer", "agent", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "agent: rank 1 was ended by SIGKILL, most likely for want of memory"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("", 1),
        ("0 3\n0 3\n", 3),
        ("0 2\n0 1\n", 2),  # a rank's mistake, and another one that lost contact with it
        ("0 2\n0 1\n1 3\n1 3\n", 3),  # then torchrun started them again
        ("0 3\n0 0\n1 1\n", 1),
    ],
)
def test_the_first_end_of_the_last_attempt_is_that_of_all(said: str, status: int) -> None:
    """Mutations: the last line; the first of all."""
    assert first_of_last_attempt(said, otherwise=1) == status


def test_a_loader_that_dies_while_it_hands_over_is_known_by_the_place() -> None:
    """Python's own connection, closed at the other end; another EOFError is another fault. Mutation: by type alone."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.close()
    with pytest.raises(EOFError) as caught:
        ours.recv()
    assert (loader_fault(caught.value) or "").startswith("a loader process was killed")
    assert loader_fault(EOFError()) is None
