"""Which rank a task of a Slurm step is, and when SLURM_* variables describe none."""

import pytest

from dist_trainer.distributed.slurm import describe_rank, first_host, is_task, tasks_per_node
from dist_trainer.errors import UserError

STEP = {
    "SLURM_JOB_ID": "20007", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2,1(x2)", "SLURM_CPUS_ON_NODE": "8",
    "SLURM_STEP_NODELIST": "localhost,n[2-3]", "SLURM_LAUNCH_NODE_IPADDR": "10.9.9.9",
}  # fmt: skip
"""As srun --ntasks=4 sets them on the second of three nodes."""


def test_a_task_of_a_step_is_a_rank() -> None:
    """Mutations: the job's variables in place of the step's; tasks of the first node for all; a fixed port."""
    environ = dict(STEP)
    describe_rank(environ, at_terminal=False)
    expected = {
        "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(10000 + 20007 + 3 * 97 - 20000), "OMP_NUM_THREADS": "8", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    assert {name: environ[name] for name in expected} == expected
    assert is_task(environ) and not is_task(dict(STEP)) and not is_task({})


def test_what_is_set_stays() -> None:
    """Mutation: assign in place of setdefault."""
    mine = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7", "OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "mine"}
    environ = STEP | mine
    describe_rank(environ, at_terminal=False)
    assert {name: environ[name] for name in mine} == mine and environ["RANK"] == "2"


@pytest.mark.parametrize(
    ("variables", "at_terminal"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, False),  # batch script
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, False),  # srun --pty bash in an allocation of 4
        (STEP, True),  # srun --ntasks=4 --pty bash
        ({**STEP, "TORCHELASTIC_RUN_ID": "x", "RANK": "5"}, False),  # a rank of torchrun, which srun started
        (
            {**STEP, "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "a"},
            False,
        ),  # of a third launcher
    ],
)
def test_other_slurm_variables_describe_no_rank(variables: dict[str, str], at_terminal: bool) -> None:
    """Mutations: SLURM_PROCID or SLURM_NTASKS suffice; no look at torchrun's variable, at the terminal, at RANK."""
    environ = dict(variables)
    describe_rank(environ, at_terminal=at_terminal)
    assert environ == variables and not is_task(environ)


def test_a_heterogeneous_job_is_refused_unless_addresses_are_given() -> None:
    """Mutation: take the step's node list, which is that of one group."""
    environ = {**STEP, "SLURM_HET_SIZE": "2"}
    with pytest.raises(UserError, match="heterogeneous Slurm job: set MASTER_ADDR"):
        describe_rank(environ, at_terminal=False)
    describe_rank(environ | {"MASTER_ADDR": "localhost"}, at_terminal=False)


def test_an_address_is_found_where_node_names_do_not_resolve() -> None:
    """That of the host that called srun. Mutation: the name all the same, and all wait for it."""
    environ = {**STEP, "SLURM_STEP_NODELIST": "no-such-host.invalid"}
    describe_rank(environ, at_terminal=False)
    assert environ["MASTER_ADDR"] == "10.9.9.9"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[2-4]", "n2"),
        ("gpu[007-009,12],cpu3", "gpu007"),
        ("a[1-3,05],b-[01-02]", "a1"),
        ("r[1-2]n[1-4]", "r1n1"),
        ("gpu-[007-009]-a", "gpu-007-a"),
        ("login,n[1-2]", "login"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    """As scontrol show hostnames has it. Mutation: split at commas within brackets."""
    assert first_host(nodes) == first


def test_tasks_per_node_are_counted_out() -> None:
    """Mutation: forget the factor."""
    assert tasks_per_node("2,1(x2)") == [2, 1, 1]
    assert tasks_per_node("4(x3),2") == [4, 4, 4, 2]
