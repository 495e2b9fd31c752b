"""A real Slurm of this machine alone: munged, slurmctld and some slurmd, each the daemon of a node n1, n2, ... (root).

Debian's build runs several nodes on one host if each has a port of its own. Everything is in one folder, and ends with
the `with` block. Ports are free ones on loopback.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from running import PATIENCE

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=15
SlurmdTimeout=20
MinJobAge=3600
MessageTimeout=10
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""


def missing() -> str:
    """Why Slurm cannot run here, or ""."""
    if os.getuid() != 0:
        return "a Slurm of one's own needs root"
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return f"this host's name, {socket.gethostname()}, does not resolve"
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    return f"no {', '.join(absent)} (Debian: slurm-wlm slurm-wlm-basic-plugins munge)" if absent else ""


def search_path() -> str:
    """Where programs are: daemons, too, which a user's PATH may not have."""
    return f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin"


class Slurm:
    """Its daemons' files lie in `folder`."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self._folder = folder
        self._names = [f"n{number}" for number in range(1, num_nodes + 1)]
        self._config = str(folder / "slurm.conf")

    def __call__(self, *argv: str) -> str:
        """The output of one of its commands."""
        return self._run(list(argv), Path.cwd())

    def _run(self, argv: list[str], folder: Path) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "WANDB_"))}
        environment |= {"SLURM_CONF": self._config, "PATH": search_path()}
        done = subprocess.run(
            argv, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def start(self) -> None:
        host, ports = socket.gethostname().partition(".")[0], free_ports(1 + len(self._names))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:2 State=UNKNOWN"
            for name, port in zip(self._names, ports[1:], strict=True)
        )
        for name in ("munge", "state", *(f"spool/{name}" for name in self._names)):
            (self._folder / name).mkdir(parents=True)
        (self._folder / "munge").chmod(0o711)
        key = self._folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        (self._folder / "slurm.conf").write_text(
            CONFIG.format(host=host, folder=self._folder, port=ports[0], nodes=nodes)
        )
        devices = self._folder / "gpu"  # any files do: nobody opens them
        devices.mkdir()
        for name in self._names:
            for number in range(2):
                (devices / f"{name}-{number}").touch()
        (self._folder / "gres.conf").write_text(
            "".join(f"NodeName={name} Name=gpu File={devices}/{name}-[0-1]\n" for name in self._names)
        )
        (self._folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # 22.05 insists on one, and uses none
        munge = self._folder / "munge"
        self(
            "munged", "--force", f"--socket={munge}/socket", f"--key-file={key}", f"--log-file={munge}/log",
            f"--pid-file={self._folder}/munged.pid", f"--seed-file={munge}/seed", "--num-threads=2",
        )  # fmt: skip
        self("slurmctld", "-f", self._config)
        for name in self._names:
            self("slurmd", "-N", name, "-f", self._config)
        deadline = time.monotonic() + 60
        while self("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split() != self._names:
            assert time.monotonic() < deadline, (self._folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.1)  # between two looks; the deadline decides

    def stop(self) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            jobs = self("squeue", "-h", "-o", "%A").split()
            for job in jobs:
                self("scancel", "--full", "--signal=KILL", job)
        for file in [*self._folder.glob("slurmd.*.pid"), self._folder / "slurmctld.pid", self._folder / "munged.pid"]:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)
        for step in self._steps():  # one that did not end with its job would wait for its daemon for ever
            with contextlib.suppress(OSError):
                os.kill(step, signal.SIGKILL)

    def _steps(self, job: str = "") -> list[int]:
        """The processes that run this Slurm's steps (of one job): their working folder is the daemons'."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_text()  # slurmstepd: [JOB.batch]
                if (
                    line.startswith(f"slurmstepd: [{job}{'.' if job else ''}")
                    and self._folder == (folder / "cwd").readlink()
                ):
                    found.append(int(folder.name))
        return found

    def lose(self, node: str) -> None:
        """As by a loss of power: its daemon and everything that runs on it."""
        ranks = [pid for pid in processes(SLURMD_NODENAME=node) if pid != os.getpid()]
        steps = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in ranks}
        kill([int((self._folder / f"slurmd.{node}.pid").read_text()), *(steps & set(self._steps())), *ranks])

    def submit(self, folder: Path, *argv: str) -> str:
        """sbatch in `folder`; the job's number."""
        return self._run(["sbatch", "--parsable", *argv], folder)

    def wait_for_restart(self, job: str, seconds: float = 60) -> None:
        """Until it is in the queue once more."""
        deadline = time.monotonic() + PATIENCE * seconds
        while not re.search(r"JobState=PENDING.* Restarts=1 ", self("scontrol", "show", "job", job), re.DOTALL):
            assert time.monotonic() < deadline, self("scontrol", "show", "job", job)
            time.sleep(0.2)  # between two looks; the deadline decides

    def restart_now(self, job: str, *settings: str, seconds: float = 120) -> None:
        """Once it is in the queue again: Slurm itself would wait two minutes, which its first script needs to end.

        Released earlier, the end of that script would be its own. In the second in which its node was told to end it,
        the node would refuse it: credentials are dated in whole seconds (Job credential revoked: FAILED 1:0).
        """
        self.wait_for_restart(job, seconds)
        number = job.partition("_")[0]
        deadline = time.monotonic() + PATIENCE * seconds
        while self._steps(number) or processes(SLURM_JOB_ID=number, SLURM_CONF=self._config):
            assert time.monotonic() < deadline, self("scontrol", "show", "job", job)
            time.sleep(0.2)  # between two looks; the deadline decides
        time.sleep(2)  # not a guess: the clock is to show another whole second
        self("scontrol", "update", f"JobId={job}", "StartTime=now", *settings)

    def wait(self, job: str, seconds: float = 120) -> tuple[str, str]:
        """(its last state, its exit code), such as ("FAILED", "3:0")."""
        deadline = time.monotonic() + PATIENCE * seconds
        while True:
            found = dict(re.findall(r"(JobState|ExitCode)=(\S+)", self("scontrol", "show", "job", job)))
            if found["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
                return found["JobState"], found["ExitCode"]
            assert time.monotonic() < deadline, f"{job} is {found}"
            time.sleep(0.2)  # between two looks; the deadline decides


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@contextlib.contextmanager
def running_slurm(num_nodes: int) -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path may have 107 characters
    slurm = Slurm(folder, num_nodes)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        print((folder / "slurmctld.log").read_text()[-4000:])  # pytest shows it when a test failed
        shutil.rmtree(folder, ignore_errors=True)


def processes(**variables: str) -> list[int]:
    """Numbers of the processes with these variables in their environment."""
    wanted, found = {f"{name}={value}".encode() for name, value in variables.items()}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
