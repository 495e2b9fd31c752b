"""Compilation, gradient checkpointing, SyncBatchNorm, determinism: each does what it says, and changes nothing else."""

import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import message
from running import FASHION, ROOT, TINY, metrics, run_jobs, tensors
from timm.layers import BatchNormAct2d
from torch import nn
from training import NUM_SLOTS, alone, build, micro_batch, train

from dist_trainer.engine.base import EngineConfig
from dist_trainer.engine.numerics import naming_operations, set_numerics
from dist_trainer.errors import UserError
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.plan import BatchConfig, Duration, make_plan
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.compiling import allow_sizes, compile_training
from dist_trainer.tricks.gradient_checkpointing import checkpoint_blocks
from dist_trainer.tricks.precise_bn import re_estimate
from dist_trainer.tricks.sync_bn import check_same_world, check_sync_bn, synchronised

__all__ = ["alone"]


# Gradient checkpointing

NETWORKS: dict[str, dict[str, Any]] = {
    "small_resnet": {"args": {"in_channels": 3}},
    "mobilenet_v1_x0_25": {},
    "torchvision/resnet18": {},
    "mobilenet_v2_x0_25": {"dropout": 0.5},
    "efficientnet_b0": {"drop_path": 0.5},
    "timm/vit_tiny_patch16_224": {"args": {"img_size": 32, "depth": 3}, "dropout": 0.3, "drop_path": 0.3},
    "timm/resnet18": {"drop_path": 0.5},
    "timm/mobilenetv3_small_050": {"drop_path": 0.5, "dropout": 0.5},
}


def network(name: str) -> nn.Module:
    return build_model(ModelConfig(name=name, **NETWORKS[name]), 10, 0)


def kept_bytes(model: nn.Module, checkpointed: bool) -> int:
    """What a forward in training keeps for backward, weights aside."""
    weights = {p.data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if checkpointed:
        checkpoint_blocks(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.ones(2, 3, 32, 32)).sum()  # held, so that no memory is used twice
    assert loss.requires_grad
    return sum(seen.values())


QUICK = ("small_resnet", "timm/vit_tiny_patch16_224", "timm/mobilenetv3_small_050")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def test_checkpointed_gradients_and_statistics_are_the_same_bits(name: str, alone: None) -> None:
    """Losses, gradients, weights, running statistics and their counters of two steps, dropout and drop-path on.

    Fails when the second forward of a block draws anew (preserve_rng_state), moves running statistics once more (a
    momentum below 1), or a parameter's name changes.
    """
    plain, other = (train(network(name), gradient_checkpointing=on) for on in (False, True))
    assert plain.losses == other.losses
    for mine, theirs in (
        (plain.gradients, other.gradients),
        (plain.engine.model_state(), other.engine.model_state()),
        (plain.statistics.unflatten(plain.statistics.running), other.statistics.unflatten(other.statistics.running)),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_keeps_less(name: str) -> None:
    """At most 60% of the bytes kept for backward. Fails when no block, or only small ones, are wrapped."""
    assert kept_bytes(network(name), True) < 0.6 * kept_bytes(network(name), False)


def test_a_model_without_blocks_is_refused() -> None:
    """Ours, and timm's that say so themselves. Fails when the key is taken and does nothing."""
    for model in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), build_model(ModelConfig(name="timm/vgg11"), 10, 0)):
        with pytest.raises(UserError) as caught:
            checkpoint_blocks(model)
        assert message(caught).startswith("engine.gradient_checkpointing: ")


# torch.compile


class Small(nn.Module):
    """A convolution, batch-norm, dropout and a classifier: little to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc(self.dropout(torch.relu(self.bn(self.conv(x))).mean((2, 3))))
        return output


@pytest.mark.skipif(shutil.which("g++") is None, reason="engine.compile needs g++")
def test_compiled_training_differs_by_rounding_alone(alone: None) -> None:
    """Three steps against uncompiled ones: losses, gradients, weights, running statistics within 1e-5, dropout on.

    One graph of all, which also the second and third step run; the names of a state dict stay. Fails when nothing is
    compiled, dropout draws otherwise (fallback_random), running statistics are not written, or names get a prefix.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = train(Small(), steps=3), train(Small(), steps=3, compile=True)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    for mine, theirs in (
        (compiled.gradients, plain.gradients),
        (compiled.engine.model_state(), plain.engine.model_state()),
    ):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2  # the trial's and this one
    assert not counters["graph_break"]

    # Evaluation and PreciseBN run the module as it is written, in any shape.
    fresh = Small()
    fresh.load_state_dict(compiled.engine.model_state())
    reference = build(fresh)
    for engine in (compiled.engine, reference):
        engine.module.eval()
    images = [micro_batch(9, slot).images[: 4 - slot] for slot in range(NUM_SLOTS)]
    for each in images:
        assert torch.equal(compiled.engine.logits(each), reference.logits(each))
    found = [re_estimate(e.module, ((i, True) for i in images), e.logits) for e in (compiled.engine, reference)]
    assert found[0].keys() == found[1].keys() == {"bn.running_mean", "bn.running_var"}
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="engine.compile needs g++")
@pytest.mark.slow
def test_each_size_of_a_growing_crop_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch stops at the ninth. Mutation: leave its limit."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    for name in ("recompile_limit", "accumulated_recompile_limit"):  # to be as it was after this test
        monkeypatch.setattr(torch._dynamo.config, name, getattr(torch._dynamo.config, name))
    torch._dynamo.reset()
    counters.clear()
    allow_sizes(11)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    compile_training(model, torch.device("cpu"))
    for side in range(5, 16):
        model(torch.zeros(1, 3, side, side)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1 + 11  # with the trial's


@pytest.mark.slow
def test_without_a_compiler_it_is_refused_in_one_line(tmp_path: Path) -> None:
    """By the command line, before the first step. Fails when torch's traceback comes through."""
    argv = ["train", *TINY, f"--data.train={FASHION / 'train'}", f"--data.val={FASHION / 'val'}"]
    argv += ["--engine.compile=true", f"--run.dir={tmp_path}", "--engine.backend=torch"]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": "/nonexistent/g++"}
    env = {**os.environ, **cache, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'ranks'}"}
    done = subprocess.run(
        [sys.executable, "-m", "dist_trainer", *argv], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dist-trainer: engine.compile: ")
    assert "Traceback" not in done.stderr and "C++ compiler" in last


def test_compilation_at_stage_3_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        EngineConfig(compile=True, zero=3).check()
    assert message(caught).startswith("engine.compile: ")


# Under ranks

NET = ["--model.name=small_resnet", "--model.args={stem_width: 4, widths: [6], depths: [1]}", "--duration=4step",
       "--lr.warmup.duration=1step"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, fashion: list[str]) -> Path:
    """One start of two ranks, two micro-batches each."""
    folder = tmp_path_factory.mktemp("keys")
    argv = [*TINY, *fashion, *NET]
    keys = {
        "plain": [],
        "plain-zero3": ["--engine.zero=3"],
        "blocks": ["--engine.gradient_checkpointing=true"],
        "blocks-zero3": ["--engine.gradient_checkpointing=true", "--engine.zero=3"],
        "compiled": ["--engine.compile=true"],
        "compiled-zero2": ["--engine.compile=true", "--engine.zero=2"],
        "deterministic": ["--run.deterministic=true"],
        "deterministic-zero3": ["--run.deterministic=true", "--engine.zero=3"],
    }
    run_jobs(2, [{"name": name, "argv": [*argv, *more]} for name, more in keys.items()], folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "blocks-zero3", "deterministic", "deterministic-zero3"])
def test_ranks_get_the_same_bits(runs: Path, name: str) -> None:
    """Gradient checkpointing and determinism against the same stage without: loss, weights, statistics, momentum.

    Fails when a block's second forward misses weights that ZeRO 3 has given back, or uninitialised memory, which
    determinism fills with NaN, reaches a result.
    """
    plain = "plain-zero3" if name.endswith("zero3") else "plain"
    for file in ("model", "optim"):
        ours, theirs = tensors(runs / name, file), tensors(runs / plain, file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert metrics(runs / name, "train/loss") == metrics(runs / plain, "train/loss")


@pytest.mark.skipif(shutil.which("g++") is None, reason="engine.compile needs g++")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled", "compiled-zero2"])
def test_ranks_compile_to_the_same_run(runs: Path, name: str) -> None:
    """At ZeRO 0 and 2, with accumulation: names equal, values within 1e-5. Fails when a rank's gradients are not
    reduced, or a checkpoint holds names of compiled modules."""
    assert metrics(runs / name, "train/loss") == pytest.approx(metrics(runs / "plain", "train/loss"), rel=1e-5)
    ours, theirs = tensors(runs / name), tensors(runs / "plain")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5)
    assert metrics(runs / name, "val/loss") == pytest.approx(metrics(runs / "plain", "val/loss"), rel=1e-4)


# SyncBatchNorm


def test_sync_bn_is_refused_on_the_cpu_and_on_worlds_that_would_mix_in_surplus_forwards() -> None:
    """And where a run goes on that was begun on another world. Fails when torch is the first to say so."""
    with pytest.raises(UserError) as caught:
        synchronised(nn.BatchNorm2d(3), torch.device("cpu"))
    assert message(caught).startswith("model.sync_bn: ")
    plan = make_plan(
        BatchConfig(global_batch=32, micro_batch=8), Duration.parse("1step", "duration"), world=3, num_samples=320
    )
    with pytest.raises(UserError) as caught:
        check_sync_bn(plan)
    assert "start 1, 2, 4 ranks" in message(caught)
    check_sync_bn(replace(plan, world=2))
    with pytest.raises(UserError) as caught:
        check_same_world(8, 4)
    assert "8 ranks" in message(caught)
    check_same_world(4, 4)


def test_every_layer_is_synchronised_over_the_same_parameters() -> None:
    """timm's, which carry an activation, keep it; optimizers built before keep their parameters; alone, the same
    outputs and statistics. Fails with torch's own conversion, which drops the activation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), BatchNormAct2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, momentum=0.2))
    parameters = dict(model.named_parameters())
    plain = copy.deepcopy(model)
    converted = synchronised(model, torch.device("cuda"))
    layers = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [isinstance(layer, nn.SyncBatchNorm) for layer in layers] == [True, True]
    assert all(value is parameters[name] for name, value in converted.named_parameters())
    assert converted.state_dict().keys() == plain.state_dict().keys()
    x, published = torch.randn(5, 3, 9, 9), []
    for each in (plain, converted):
        statistics = RunningStatistics(each)
        for slot in (x, x + 1):
            output = each(slot)
            statistics.add()
        statistics.update(statistics.take(), 2)
        published.append((output.detach(), statistics.running))
    torch.testing.assert_close(published[0], published[1])
    assert float(published[0][0].abs().max()) > 0


def test_running_statistics_of_synchronised_layers_are_the_mean_over_groups() -> None:
    """Two ranks with two micro-batches each: layers of both hold what the pair that ran together has, as
    SyncBatchNorm leaves it; NumPy pools each pair. Fails when a group counts once, or per rank."""
    x = np.random.default_rng(0).normal(3, 2, (2, 2, 5, 4))  # forward, rank, sample, channel
    ranks = [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
    statistics = [RunningStatistics(layer) for layer in ranks]
    for forward in x.reshape(2, 10, 4):
        for layer, each in zip(ranks, statistics, strict=True):
            layer.running_mean.copy_(torch.from_numpy(forward.mean(0)))  # type: ignore[union-attr]
            layer.running_var.copy_(torch.from_numpy(forward.var(0, ddof=1)))  # type: ignore[union-attr]
            each.add()
    total = statistics[0].take() + statistics[1].take()
    for each in statistics:
        each.update(total.clone(), 4)
    mean = 0.1 * np.mean([forward.mean(0) for forward in x.reshape(2, 10, 4)], axis=0)
    variance = 0.9 + 0.1 * np.mean([forward.var(0, ddof=1) for forward in x.reshape(2, 10, 4)], axis=0)
    np.testing.assert_allclose(statistics[0].running.numpy(), np.concatenate([mean, variance]), rtol=1e-6)
    assert torch.equal(statistics[0].running, statistics[1].running)


# Determinism


def test_determinism_is_set_and_taken_back() -> None:
    """Fails when one of the switches is forgotten; cuDNN measures what is fastest only where bits may change."""
    for on in (True, False):
        set_numerics(on)
        assert torch.are_deterministic_algorithms_enabled() is on
        assert torch.backends.cudnn.benchmark is not on
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]


def test_an_operation_without_deterministic_kernel_is_named() -> None:
    """Other faults come through as they are. Fails when every RuntimeError is laid at the key's door."""
    set_numerics(True)
    try:
        with pytest.raises(UserError) as caught, naming_operations():
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
        assert message(caught).startswith("run.deterministic: put_ ")
        with pytest.raises(RuntimeError, match="size"), naming_operations():
            torch.zeros(3) + torch.zeros(4)
    finally:
        set_numerics(False)
