"""Killed, interrupted, restarted: the run ends with the same weights, bit for bit, and leaves no process behind."""

import os
import random
import signal
from pathlib import Path

import pytest
from running import TINY, Session, assert_same_end, metrics, newest, torchrun, wait_for_step

STEPS = 600


@pytest.fixture(scope="module")
def argv(fashion: list[str]) -> list[str]:
    return [
        "-m", "dist_trainer", "train", *TINY, *fashion, f"--duration={STEPS}step", "--checkpoint.every=20step",
        "--eval.every=100step", "--log.every=5step", "--checkpoint.keep_last=3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    session = Session(torchrun(2, *argv, f"--run.dir={folder}", "--run.name=run"), folder / "log")
    assert session.wait() == 0, session.log.read_text()[-5000:]
    return folder / "run"


@pytest.mark.slow  # the start that it shares is cheap, three more are not; test_data_ranks.py kills a rank each time
def test_killed_at_random_and_resumed_is_the_run_that_was_not(
    argv: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL to the agent, then to a rank, at random steps, with loader workers; then the newest checkpoint truncated.

    After each kill no process is left within 15 s. Mutations: drop die_with_parent; save no momentum; load the
    truncated checkpoint; count steps from the checkpoint's epoch.
    """
    run = tmp_path / "run"
    command = torchrun(2, *argv, "--data.workers=1", f"--run.dir={tmp_path}", "--run.name=run")
    step = random.randint(25, 100)
    print(f"killing the agent at step {step}")
    session = Session(command, tmp_path / "log1")
    wait_for_step(session, run, step)
    assert len(session.rank_pids()) >= 2
    session.process.kill()
    session.wait()
    assert not session.left_after(15), session.left_after(0)

    step = max(metrics(run, "step")) + random.randint(25, 80)
    print(f"killing a rank at step {step}")
    session = Session(command, tmp_path / "log2")
    wait_for_step(session, run, step)
    os.kill(random.choice(session.rank_pids()), signal.SIGKILL)
    assert session.wait(60) != 0
    assert not session.left_after(15), session.left_after(0)

    truncated = newest(run)
    with (truncated / "optim.safetensors").open("r+b") as file:
        file.truncate(100)
    session = Session(command, tmp_path / "log3")
    assert session.wait() == 0, session.log.read_text()[-5000:]
    log = session.log.read_text()
    assert f"{truncated.name} is not complete (optim.safetensors has 100 of" in log
    assert "resuming from step_" in log and f"resuming from {truncated.name}" not in log
    assert_same_end(run, undisturbed)


@pytest.mark.slow  # test_worlds.py stops runs in one start with others; here it is by real signals
def test_ctrl_c_and_sigterm_stop_at_the_next_step_and_say_how_to_go_on(
    argv: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """To every process at once, as a terminal does; to one rank alone; to all but torchrun, as Slurm does with SIGUSR1.

    Mutations: let loader workers or multiprocessing's helper die of the signal; reduce votes on rank 0 only; skip the
    save.
    """
    run = tmp_path / "run"
    command = torchrun(2, *argv, "--data.workers=1", f"--run.dir={tmp_path}", "--run.name=run")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        session = Session(command, tmp_path / f"log-{number.name}")
        before = max(metrics(run, "step"), default=0) if (run / "metrics.jsonl").exists() else 0
        wait_for_step(session, run, before + 20)
        everyone = set(session.pids())
        targets = {
            signal.SIGINT: everyone,
            signal.SIGTERM: set(session.rank_pids()[-1:]),
            signal.SIGUSR1: everyone - {session.process.pid},
        }
        for pid in targets[number]:
            os.kill(pid, number)
        session.wait(60)
        assert not session.left_after(15), session.left_after(0)
        assert (run / "STATE").read_text() == "stopped\n"
        assert f"stopped by {number.name} after step" in session.log.read_text()
        assert "KeyError" not in session.log.read_text()
        assert "Traceback" not in session.log.read_text().split("torch/distributed", 1)[0]
    session = Session(command, tmp_path / "log")
    assert session.wait() == 0, session.log.read_text()[-5000:]
    assert_same_end(run, undisturbed)


def test_torchrun_restarts_after_a_killed_rank(argv: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """With --max-restarts and nothing else set, new ranks meet and go on. Mutation: drop the attempt's store prefix."""
    run = tmp_path / "run"
    command = torchrun(2, *argv, f"--run.dir={tmp_path}", "--run.name=run", restarts=1)
    session = Session(command, tmp_path / "log")
    wait_for_step(session, run, 30)
    os.kill(session.rank_pids()[-1], signal.SIGKILL)
    assert session.wait(120) == 0, session.log.read_text()[-5000:]
    assert_same_end(run, undisturbed)
