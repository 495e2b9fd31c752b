"""Checks of what only a GPU can show: each trains something small and compares it with something independent.

A check takes the world and whether it is to be `quick`, returns a line of figures, and raises AssertionError. On the
CPU the same lines run, which shows that they can.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from steps import OPTIMIZER, STD, Task, a_batch, a_run, an_engine
from torch import nn
from torch.utils.data import Dataset

from dist_trainer.data.batch import Batch, SlotAddress
from dist_trainer.data.stream import _loader, _on_device
from dist_trainer.distributed.collectives import on_main, read_on_main
from dist_trainer.distributed.exact_sums import add_on_grid, from_grid, joined, sum_on_grid, words
from dist_trainer.distributed.world import World
from dist_trainer.engine.base import Engine, EngineConfig
from dist_trainer.engine.numerics import set_numerics
from dist_trainer.tensors import HostCopy, State
from dist_trainer.train import train_step
from dist_trainer.tricks.batch_norm import BatchNorm
from dist_trainer.tricks.ema import EmaConfig
from dist_trainer.tricks.precise_bn import re_estimate

SMALL = Task(model="small_resnet", args={"in_channels": 3}, pixels=32, batch=16)
TORCH = EngineConfig(backend="torch")


class Smooth(nn.Module):
    """No kink, where a rounding of the input would decide which branch a gradient takes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layers(x)
        return output


class Missing(Exception):
    """A package that this check needs."""


def steps_of(run: Any, task: Task, world: World, numbers: Iterable[int]) -> None:
    """Train these steps, each on its own batches."""
    plan = run.learner.engine.plan
    batches = task.batches(world, 16)
    for number in numbers:
        slots = [
            a_batch(*batches[(number * task.slots + slot) % len(batches)], number, slot)
            for slot in plan.slots_of(world.rank)
        ]
        train_step(run, number, iter(slots))
    run.sums.finish()


def everything(run: Any) -> State:
    """All that a step may change, by name, on the host."""
    learner = run.learner
    state = {f"model/{name}": value for name, value in learner.engine.local_weights().items()}
    state |= {f"optim/{name}": value for name, value in learner.engine.optimizer_state().items()}
    state["statistics"] = run.batch_norm.running
    if learner.ema is not None:
        state |= {f"ema/{name}": value for name, value in learner.ema.weights.items()}
        state["ema statistics"] = learner.ema.statistics
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def differing(a: State, b: State) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def relative(found: Iterable[torch.Tensor], true: Iterable[torch.Tensor]) -> float:
    """L2 of the difference over L2 of the true values."""
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in zip(found, true, strict=True)]
    return float(
        (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5  # type: ignore[arg-type]
    )


def ranks(world: World, quick: bool) -> str:
    """A process group of one: work on rank 0, tensors through the host, a sum on the device."""
    assert on_main(world, lambda: {"answer": 42}) == {"answer": 42}
    sent = {"x": torch.arange(5.0), "n": torch.tensor(3)}
    found = read_on_main(world, lambda: sent)
    assert not differing(found, sent)
    value = torch.full((1000,), 3.0, device=world.device)
    dist.all_reduce(value)
    assert bool((value == 3.0 * world.size).all())
    return f"{dist.get_backend()}, {world.device}"


def weights_swapped_in(world: World, quick: bool) -> str:
    """The average is in the module within the block; afterwards the weights are what they were, bit for bit."""
    engine, plan = an_engine(SMALL, "bf16", world, TORCH)
    run = a_run(engine, plan, world, EmaConfig(decay=0.5))
    steps_of(run, SMALL, world, range(3))
    before = {name: value.clone() for name, value in engine.local_weights().items()}
    average = {name: value.clone() for name, value in run.learner.ema.weights.items()}
    assert differing(before, average)
    with engine.swapped_in(run.learner.ema.weights):
        assert not differing(engine.local_weights(), average)
    assert not differing(engine.local_weights(), before)
    engine.close()
    return f"{len(before)} tensors"


def keep(seen: dict[str, list[torch.Tensor]], name: str, layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    """A hook that keeps what a layer saw."""
    seen.setdefault(name, []).append(inputs[0].detach().double().cpu())


def batch_norm_statistics(world: World, quick: bool) -> str:
    """PreciseBN against float64 over the very activations that the layers saw."""
    bounds = {("fp32", False): 1e-6, ("fp32", True): 1e-4, ("bf16", False): 5e-4, ("bf16", True): 5e-4}
    lines = []
    for (precision, channels_last), bound in bounds.items():
        engine, _ = an_engine(SMALL, precision, world, TORCH)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        engine.module.to(memory_format=layout)
        engine._format = layout
        seen: dict[str, list[torch.Tensor]] = {}
        layers = {name: each for name, each in engine.module.named_modules() if isinstance(each, BatchNorm)}

        hooks = [layer.register_forward_pre_hook(partial(keep, seen, name)) for name, layer in layers.items()]
        batches = [(images, True) for images, _ in SMALL.batches(world, 4)]
        state = re_estimate(engine.module, batches, engine.logits)
        for hook in hooks:
            hook.remove()
        worst = 0.0
        for name, inputs in seen.items():
            values = torch.cat(inputs).transpose(0, 1).flatten(1)
            variance, mean = torch.var_mean(values, 1)
            off_mean = (state[f"{name}.running_mean"].cpu().double() - mean).abs() / variance.sqrt()
            off_variance = (state[f"{name}.running_var"].cpu().double() / variance - 1).abs()
            worst = max(worst, float(off_mean.max()), float(off_variance.max()))
        assert worst <= bound, f"{precision}, channels_last {channels_last}: {worst:.1e} is above {bound:g}"
        lines.append(f"{precision}{' channels_last' if channels_last else ''} {worst:.1e}")
        engine.close()
    return "relative to float64: " + ", ".join(lines)


def waits(world: World, quick: bool) -> str:
    """How often the host waits for the device in a step: once, for the gradient's norm.

    What torch calls a synchronising operation, and reads of copies that have not arrived yet.
    """
    ways: dict[str, tuple[EngineConfig, EmaConfig | None]] = {
        "DDP": (TORCH, None),
        "average on the host": (TORCH, EmaConfig(decay=0.9, device="cpu")),
        "exact": (replace(TORCH, sums="exact"), None),
        "ZeRO 0": (EngineConfig(), None),
    }
    if not has_deepspeed():
        del ways["ZeRO 0"]
    found, on_gpu = [], world.device.type == "cuda"
    for name, (config, ema) in ways.items():
        engine, plan = an_engine(SMALL, "bf16", world, config)
        run = a_run(engine, plan, world, ema)
        steps_of(run, SMALL, world, range(3))
        late: list[torch.Size] = []
        read = HostCopy.read

        def watched(self: HostCopy, late: Any = late, read: Any = read) -> torch.Tensor:
            if self._done is None or not self._done.query():
                late.append(self._value.shape)
            return read(self)  # type: ignore[no-any-return]

        HostCopy.read = watched  # type: ignore[method-assign]
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        images, labels = SMALL.batches(world, 1)[0]
        batch = a_batch(images, labels, 3, 0)
        batch.weight = batch.weight.pin_memory() if on_gpu else batch.weight
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train_step(run, 3, iter([batch]))
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        HostCopy.read = read  # type: ignore[method-assign]
        blocking = [str(each.message) for each in said if "synchroniz" in str(each.message)]
        norms = [shape for shape in late if not shape]
        assert not blocking and len(norms) <= 1, f"{name}: {blocking}, {late}"
        found.append(f"{name} {len(blocking) + len(norms)}")
        run.sums.finish()
        engine.close()
    return ", ".join(found)


class Numbered(Dataset[Batch]):
    """Batches whose every byte follows from their number."""

    shape = (32, 3, 64, 64)

    def __getitem__(self, address: SlotAddress) -> Batch:
        numbers = torch.arange(self.shape[0])
        images = expected_bytes(address.step, self.shape, torch.device("cpu"))
        return Batch(images, numbers + address.step, (numbers + address.step).float(), numbers, address, len(numbers))


def expected_bytes(number: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    places = torch.arange(torch.Size(shape).numel(), device=device)
    return ((places * 7 + number * 31) % 251).to(torch.uint8).view(shape)


def bytes_under_reuse(world: World, quick: bool) -> str:
    """Batches that loader processes make, pinned, copied on a stream of their own while the one before is computed
    with: every byte is right, with memory that is freed and taken again at every batch and a device that lags behind.
    """
    count = 20 if quick else 500
    addresses = [SlotAddress(number, 0) for number in range(count)]
    loader = _loader(Numbered(), addresses, 2, world)
    wrong = torch.zeros((), dtype=torch.int64, device=world.device)
    on_gpu, seen = world.device.type == "cuda", 0
    for number, batch in enumerate(_on_device(loader, world.device)):
        if on_gpu:
            torch.cuda._sleep(3_000_000)  # type: ignore[no-untyped-call]  # some 2 ms: the host runs ahead
        wrong += (batch.images != expected_bytes(number, Numbered.shape, world.device)).sum()
        wrong += (batch.labels != torch.arange(len(batch.labels), device=world.device) + number).sum()
        wrong += (batch.weight != (torch.arange(len(batch.labels), device=world.device) + number).float()).sum()
        assert batch.address.step == number  # type: ignore[union-attr]
        seen += 1
        del batch
        torch.empty(Numbered.shape, dtype=torch.uint8, device=world.device).fill_(255)  # takes freed memory
    assert seen == count
    assert int(wrong) == 0, f"{int(wrong)} wrong values in {count} batches"
    return f"{count} batches of {torch.Size(Numbered.shape).numel():,} bytes"


def gradients(world: World, quick: bool) -> str:
    """Of our step in float32 against the CPU's in float64; the CPU's own float32 says what rounding costs."""
    task = replace(SMALL, model="gpu_checks:Smooth", args={})
    images, labels = task.batches(world, 1)[0]
    true: dict[torch.dtype, list[torch.Tensor]] = {}
    for dtype in (torch.float64, torch.float32):
        model = task.build().to(dtype)
        x = (images.to(dtype) / 255 - 0.5) / STD
        (F.cross_entropy(model(x), labels, label_smoothing=0.1, reduction="sum") / task.batch).backward()
        true[dtype] = [p.grad for p in model.parameters() if p.grad is not None]
    cpu = relative(true[torch.float32], true[torch.float64])
    lines = []
    for name, config in (("fast", TORCH), ("exact", replace(TORCH, sums="exact"))):
        engine, _ = an_engine(task, "fp32", world, config)
        engine.forward_backward(a_batch(images, labels, 0, 0))
        engine.reduce()
        found = [p.grad for p in engine._parameters if p.grad is not None]
        error = relative(found, true[torch.float64])
        assert error < max(20 * cpu, 1e-5), f"{name}: {error:.1e}, the CPU's float32: {cpu:.1e}"
        lines.append(f"{name} {error:.1e}")
        engine.close()
    return f"relative to float64: {', '.join(lines)}; the CPU's float32 {cpu:.1e}"


def exact_sums(world: World, quick: bool) -> str:
    """The sums themselves, bit for bit those of the CPU, in any order and grouping."""
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(100_003, generator=generator) * 10.0**exponent for exponent in (-9, -3, 0, 1, -6, -1)]
    results = []
    for device, order in ((torch.device("cpu"), terms), (world.device, terms[::-1])):
        whole = torch.empty(100_003, device=device)
        sum_on_grid([term.to(device, copy=True) for term in order], whole, 2.0**5)
        total, parts = torch.zeros(100_003, dtype=torch.float64, device=device), torch.empty(100_003, device=device)
        for number, term in enumerate(order):
            add_on_grid(total, term.to(device, copy=True), 2.0**5, first=number == 0)
        from_grid(total, parts)
        losses = sum(words(term[:1000].to(device)) for term in order)
        assert torch.equal(whole, parts)
        results.append((whole.cpu(), joined(losses).cpu()))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return f"{len(terms)} x 100,003 terms"


def a_step_that_is_not_finite(world: World, quick: bool) -> str:
    """Changes no bit of weights, optimizer, average or statistics, with fused and with plain updates."""
    for fused, device in ((True, "same"), (False, "cpu")):
        engine, plan = an_engine(SMALL, "bf16", world, TORCH, fused=fused)
        run = a_run(engine, plan, world, EmaConfig(decay=0.9, device=device))  # type: ignore[arg-type]
        steps_of(run, SMALL, world, range(3))
        before, scale = everything(run), engine._scale
        engine._scale = torch.full_like(scale, torch.nan)
        steps_of(run, SMALL, world, [3])
        assert run.progress.skipped == 1
        assert not differing(before, everything(run))
        engine._scale = scale
        steps_of(run, SMALL, world, [4])
        assert differing(before, everything(run)) and all(v.isfinite().all() for v in everything(run).values())
        engine.close()
    return f"{len(before)} tensors"


def resumed(engine: Engine, run: Any) -> tuple[State, State]:
    """What a checkpoint holds: (model, optimizer state), on the host."""
    run.batch_norm.publish()
    return (
        {name: value.detach().to("cpu", copy=True) for name, value in engine.model_state().items()},
        {name: value.detach().to("cpu", copy=True) for name, value in engine.optimizer_state().items()},
    )


def begun(task: Task, world: World, config: EngineConfig, precision: str, state: tuple[State, State] | None) -> Any:
    """A run from such a state, in a fresh engine."""
    engine, plan = an_engine(task, precision, world, config, weights=state[0] if state is not None else None)
    if state is not None:
        engine.load_optimizer_state(state[1])
    return a_run(engine, plan, world)


def deterministic_resume(world: World, quick: bool) -> str:
    """Six steps, and three in each of two engines, with run.deterministic: the same bits, fast and exact."""
    set_numerics(deterministic=True)
    try:
        for sums in ("fast", "exact"):
            config = replace(TORCH, sums=sums)  # type: ignore[arg-type]
            whole = begun(SMALL, world, config, "bf16", None)
            steps_of(whole, SMALL, world, range(6))
            first = begun(SMALL, world, config, "bf16", None)
            steps_of(first, SMALL, world, range(3))
            second = begun(SMALL, world, config, "bf16", resumed(first.learner.engine, first))
            steps_of(second, SMALL, world, range(3, 6))
            different = differing(everything(whole), everything(second))
            assert not different, f"sums {sums}: {different[:3]} of {len(different)}"
    finally:
        set_numerics(deterministic=False)
    return "6 = 3 + 3 steps, fast and exact"


def has_deepspeed() -> bool:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        return False
    return True


def checkpoints_across_stages(world: World, quick: bool) -> str:
    """A step in each of torch's DDP and ZeRO 0 to 3, through what a checkpoint holds, against all steps in DDP."""
    if not has_deepspeed():
        raise Missing("deepspeed")
    ways = [TORCH, *(EngineConfig(zero=stage) for stage in (0, 1, 2, 3, 1)), TORCH]  # type: ignore[arg-type]
    task = replace(SMALL, slots=2)
    state: tuple[State, State] | None = None
    for number, config in enumerate(ways):
        run = begun(task, world, config, "fp32", state)
        steps_of(run, task, world, [number])
        state = resumed(run.learner.engine, run)
        run.learner.engine.close()
    assert state is not None
    whole = begun(task, world, TORCH, "fp32", None)
    steps_of(whole, task, world, range(len(ways)))
    expected = resumed(whole.learner.engine, whole)
    errors = []
    for found, true in zip(state, expected, strict=True):
        assert found.keys() == true.keys()
        names = [name for name, value in true.items() if value.is_floating_point()]
        errors.append(relative([found[name] for name in names], [true[name] for name in names]))
    assert max(errors) < 1e-4, errors
    return f"{len(ways)} engines; weights {errors[0]:.1e}, optimizer {errors[1]:.1e} relative to DDP alone"


def fused_updates(world: World, quick: bool) -> str:
    """Five steps with torch's fused optimizers against plain ones, in float32."""
    results: list[State] = []
    for fused in (False, True):
        engine, plan = an_engine(SMALL, "fp32", world, TORCH, fused=fused)
        assert engine.optimizer.param_groups[0]["fused"] == (True if fused else None)
        run = a_run(engine, plan, world)
        steps_of(run, SMALL, world, range(5))
        results.append(everything(run))
        engine.close()
    plain, together = results
    error = relative([together[name] for name in plain], list(plain.values()))
    assert error < 1e-4, error
    return f"{OPTIMIZER.name}: {error:.1e} relative"


def average_on_the_host(world: World, quick: bool) -> str:
    """Its copies travel beside the next step: the bits of an average beside the weights, update for update."""
    set_numerics(deterministic=True)
    try:
        results = []
        for device in ("same", "cpu"):
            engine, plan = an_engine(SMALL, "bf16", world, TORCH)
            run = a_run(engine, plan, world, EmaConfig(decay=0.9, device=device))  # type: ignore[arg-type]
            steps_of(run, SMALL, world, range(20))
            results.append({name: value.cpu() for name, value in run.learner.ema.weights.items()})
            engine.close()
    finally:
        set_numerics(deterministic=False)
    error = relative(results[1].values(), results[0].values())
    assert error < 1e-6, error  # a CPU and a GPU may round a lerp differently
    return f"20 updates, {error:.1e} relative"


CHECKS: dict[str, Callable[[World, bool], str]] = {
    "ranks and the host": ranks,
    "weights swapped in and out": weights_swapped_in,
    "batch-norm statistics": batch_norm_statistics,
    "waits per step": waits,
    "every byte of the batches": bytes_under_reuse,
    "gradients in float32": gradients,
    "exact sums": exact_sums,
    "a step that is not finite": a_step_that_is_not_finite,
    "deterministic resume": deterministic_resume,
    "fused updates": fused_updates,
    "average on the host": average_on_the_host,
    "checkpoints across ZeRO stages": checkpoints_across_stages,
}


def all_checks(world: World, quick: bool) -> Iterator[tuple[str, str, str]]:
    """(name, ok | FAILED | skipped, a line) of each."""
    for name, check in CHECKS.items():
        try:
            yield name, "ok", check(world, quick)
        except Missing as missing:
            yield name, "skipped", f"no {missing} here"
        except Exception as error:
            text = str(error).strip().splitlines()
            yield name, "FAILED", f"{type(error).__name__}: {text[0] if text else ''}"
