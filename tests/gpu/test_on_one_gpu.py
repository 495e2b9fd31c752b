"""The checks of `make gpu` as tests: `pytest -m cuda tests/gpu` on a machine with a GPU. Elsewhere they are skipped."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from running import ROOT

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for run.deterministic; read when cuBLAS starts
sys.path.append(str(ROOT / "benchmarks"))
from gpu_checks import CHECKS, Missing

from dist_trainer.distributed.world import World, init_world, shutdown_world
from dist_trainer.engine.numerics import set_numerics

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    set_numerics(deterministic=False)
    yield init_world()
    shutdown_world()


@pytest.mark.parametrize("name", CHECKS)
def test_what_only_a_gpu_shows(name: str, world: World) -> None:
    """See the check's own words, and the CPU's tests of the same thing."""
    assert world.device.type == "cuda"
    try:
        print(CHECKS[name](world, False))
    except Missing as missing:
        pytest.skip(f"no {missing}")
