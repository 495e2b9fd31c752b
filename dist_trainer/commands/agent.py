"""`agent`: torchrun, with its arguments, that ends as its ranks do and prints no report.

Ranks have said already what went wrong; torchrun's 25 lines would hide it. What gloo, NCCL and the rendezvous have to
know of this host is derived here; a variable that is set, and an argument that is given, stay as they are.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from functools import partial
from pathlib import Path

import psutil
from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api as launcher

from dist_trainer.distributed.cores import cores
from dist_trainer.distributed.network import is_own, own_address, use_interface
from dist_trainer.distributed.processes import STATUS_FILE
from dist_trainer.errors import EXIT_STATUS, UserError, first_line

EXIT_BARRIER_S = 10.0
"""How long an agent whose ranks have ended waits for the others; torch's 300 s pass where one was told to stop."""


USAGE = """usage: dist-trainer agent ARGUMENTS -m dist_trainer train CONFIG.yaml [--key.sub value ...]

torchrun, with its arguments (torchrun --help lists them), that ends as its ranks do, and that derives threads,
addresses and interfaces where they are not given. launch/ and slurm/ call it.
"""


def tell_ranks(number: int, _: object) -> None:
    """Pass a signal on; torchrun would die of SIGUSR1."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "dist_trainer" in child.cmdline():
                child.send_signal(number)


def command(argv: list[str]) -> int:
    """Raises UserError for an argument that torchrun does not take."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else EXIT_STATUS["mistake"]
    status = "done"
    if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:  # slurm/ ignores it here, since Slurm signals the ranks too
        signal.signal(signal.SIGUSR1, tell_ranks)
    # Of signals, and of a rendezvous that is gone when an agent leaves it; the ranks have said why they end.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "status"
        os.environ[STATUS_FILE] = str(said)
        try:
            args = torchrun.parse_args(argv)  # type: ignore[no-untyped-call]
            describe_host(args)
            launcher.LocalElasticAgent = partial(LocalElasticAgent, exit_barrier_timeout=EXIT_BARRIER_S)  # type: ignore
            torchrun.run(args)  # type: ignore[no-untyped-call]
        except (ValueError, AssertionError) as error:  # of an argument
            raise UserError(f"agent: {first_line(error)}") from None
        except ChildFailedError as error:
            status = "fault"
            if line := killed(error):
                print(f"agent: {line}", file=sys.stderr, flush=True)
        except SignalException:  # those that said nothing had not begun
            status = "interrupted"
        except (RendezvousError, DistError, OSError) as error:
            why = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            print(f"agent: no rendezvous at {args.rdzv_endpoint}: {why}", file=sys.stderr, flush=True)
            return EXIT_STATUS["fault"]
        return first_of_last_attempt(said.read_text() if said.exists() else "", EXIT_STATUS[status])


def describe_host(args: argparse.Namespace) -> None:
    """Complete torchrun's arguments and the environment of the ranks, for this host (in place).

    - the interface that leads to the rendezvous: gloo would take the one that the host's name resolves to, if it does;
    - the address by which other hosts reach this one, and whether the rendezvous is here, which torchrun guesses from
      names (pytorch #150532);
    - the threads of a rank: its share of the cores;
    - that restarts do not read the dead ranks' addresses from torchrun's store (pytorch #135712).

    Raises UserError for the name of no host, and OSError where there is no way to it now.
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    ranks = torchrun.determine_local_world_size(args.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    host = "localhost" if args.standalone else args.rdzv_endpoint.rpartition(":")[0]
    if not host:
        return
    try:
        address = own_address(host)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise UserError(f"agent: {host}: no such host; name one that resolves on every host") from None
        raise  # the network may come back
    args.local_addr = args.local_addr or address
    use_interface(address)
    if not args.standalone and "is_host" not in args.rdzv_conf:
        args.rdzv_conf = ",".join(filter(None, [args.rdzv_conf, f"is_host={int(is_own(host))}"]))


def killed(error: ChildFailedError) -> str | None:
    """One line if the first rank to fail was ended by a signal: it could not say so itself, and the others that wait
    for it, within NCCL, do not know."""
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return None
    name = signal.Signals(-failure.exitcode).name
    return f"rank {rank} was ended by {name}" + (", most likely for want of memory" if name == "SIGKILL" else "")


def first_of_last_attempt(said: str, otherwise: int) -> int:
    """Of lines `attempt status`: one rank's end is the cause of those after it. `otherwise`: where there is no line."""
    lines = [(int(attempt), int(status)) for attempt, status in map(str.split, said.splitlines())]
    last = max((attempt for attempt, _ in lines), default=0)
    return next((status for attempt, status in lines if attempt == last), otherwise)
