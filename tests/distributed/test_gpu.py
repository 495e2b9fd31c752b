"""Which GPU a rank takes, in each way that launchers number ranks and show GPUs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import ENVIRONMENT

from dist_trainer.distributed.gpu import check_hidden, local_rank, own_gpu
from dist_trainer.engine import deepspeed, zero
from dist_trainer.engine.base import EngineConfig
from dist_trainer.errors import LocalError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "3"}
SRUN = {"SLURM_LOCALID": "3", "SLURM_PROCID": "11"}


@pytest.mark.parametrize(
    ("environ", "visible", "gpu"),
    [
        ({}, 1, 0),
        (TORCHRUN, 4, 3),
        ({**TORCHRUN, "CUDA_VISIBLE_DEVICES": "7,6,5,4"}, 4, 3),  # the fourth of those, which is number 4 of the host
        (SRUN, 8, 3),  # no LOCAL_RANK: a launcher that sets RANK, WORLD_SIZE and MASTER_ADDR alone
        ({**SRUN, "LOCAL_RANK": "2"}, 8, 2),
        (SRUN, 1, 0),  # srun --gpus-per-task=1
        ({**SRUN, "CUDA_VISIBLE_DEVICES": "3"}, 1, 0),  # the same where Slurm does not use cgroups
        ({"LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "3"}, 1, 0),  # mpirun with a mask per process
    ],
)
def test_a_rank_takes_the_gpu_that_is_its_own(environ: dict[str, str], visible: int, gpu: int) -> None:
    """By hand. Mutations: LOCAL_RANK alone; 0 wherever one is visible, so that torchrun's ranks share one."""
    assert own_gpu(visible, environ) == gpu


@pytest.mark.parametrize(
    ("environ", "visible", "said"),
    [
        (TORCHRUN, 2, "this host has 2. Paste: torchrun --nproc-per-node 2"),
        (TORCHRUN, 1, "this host has 1. Paste: torchrun --nproc-per-node 1"),
        (
            {**TORCHRUN, "CUDA_VISIBLE_DEVICES": "4,5"},
            2,
            "CUDA_VISIBLE_DEVICES=4,5 shows 2. Paste: torchrun --nproc-per-node 2",
        ),
        (SRUN, 2, "this host has 2. Start 2 tasks per node, or show each task its own GPU (srun --gpus-per-task=1)"),
    ],
)
def test_a_rank_without_a_gpu_is_told_what_to_do(environ: dict[str, str], visible: int, said: str) -> None:
    """Mutations: torchrun's advice for srun; the host's number of GPUs where a mask hides some."""
    with pytest.raises(LocalError) as caught:
        own_gpu(visible, environ)
    assert str(caught.value) == f"local rank 3 has no GPU: {said}"
    assert local_rank(environ) == 3


@pytest.mark.parametrize("mask", [None, "", "-1", "NoDevFiles"])
def test_the_cpu_is_for_those_who_have_no_gpu_or_hide_it(mask: str | None) -> None:
    check_hidden({} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})


def test_a_gpu_that_torch_does_not_find_is_not_replaced_by_the_cpu() -> None:
    """A driver that is broken, a build without CUDA: the run would take weeks, and say nothing. Mutation: go on."""
    with pytest.raises(LocalError) as caught:
        check_hidden({"CUDA_VISIBLE_DEVICES": "0,1"})
    assert str(caught.value).startswith("CUDA_VISIBLE_DEVICES=0,1, and torch ")
    assert "finds no GPU: see what nvidia-smi says; CUDA_VISIBLE_DEVICES='' trains on the CPU" in str(caught.value)


def test_these_tests_see_no_gpu_even_where_there_is_one() -> None:
    """Nor do the ranks that they start. Mutation: leave out the line in conftest.py."""
    assert ENVIRONMENT["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(("device", "number"), [("cuda:0", "0"), ("cuda:2", "2"), ("cpu", "3")])
def test_deepspeed_gets_the_number_of_the_gpu(device: str, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes LOCAL_RANK for that. Mutation: leave it, and a task that sees its own GPU alone asks for the fourth."""
    seen = []

    def initialize(*_: Any) -> None:
        seen.append(zero.os.environ["LOCAL_RANK"])

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(deepspeed, "initialize", initialize)
    zero._initialize(None, None, EngineConfig(), SimpleNamespace(micro_batch=1), torch.device(device))  # type: ignore[arg-type]
    assert seen == [number]
