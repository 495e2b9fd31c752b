"""A step waits for its device once, when all that can be launched has been. On the CPU, whose waits are recorded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from training import ALONE, NUM_SLOTS, alone, build, micro_batch

from dist_trainer.data.bad_samples import BadSampleLog
from dist_trainer.data.batch import Batch, SlotAddress
from dist_trainer.distributed import collectives
from dist_trainer.distributed.processes import StopRequest
from dist_trainer.engine import base
from dist_trainer.log.meter import Meter
from dist_trainer.models.small_resnet import SmallResNet
from dist_trainer.run.state import Progress
from dist_trainer.run.step_sums import StepSums
from dist_trainer.run.weights import Weights
from dist_trainer.tensors import HostCopy
from dist_trainer.train import train_step
from dist_trainer.tricks import ema as ema_module
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.ema import Ema, EmaConfig
from dist_trainer.tricks.learning_rate import LearningRate, LearningRateConfig

__all__ = ["alone"]

CALLS: list[str] = []
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
"""Operations whose result the host must know before it can go on."""


SENT: set[int] = set()
"""Memory that a HostCopy has brought to the host."""


class RecordedCopy(HostCopy):
    """A HostCopy as a device would make it: other memory than its source, which may be read once `read` has waited."""

    def __init__(self, value: torch.Tensor) -> None:
        self._what = "norm" if value.dim() == 0 else "sums"
        CALLS.append(f"send {self._what}")
        super().__init__(value.clone())
        SENT.add(self._value.data_ptr())

    def read(self) -> torch.Tensor:
        CALLS.append(f"wait for {self._what}")
        return super().read()


class Reads(TorchDispatchMode):
    """Records operations that would wait for a device, but those on memory that a HostCopy has brought to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        masks = name.startswith("aten::index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if (name.startswith(READS) and args[0].data_ptr() not in SENT) or masks:
            CALLS.append(f"wait in {name}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("alone")
    CALLS.clear()
    for module in (base, collectives):
        monkeypatch.setattr(module, "HostCopy", RecordedCopy)
    for name in ("cpu", "numpy", "tolist"):
        own = getattr(torch.Tensor, name)

        def called(self: torch.Tensor, *args: Any, name: str = name, own: Any = own) -> Any:
            if self.data_ptr() not in SENT:
                CALLS.append(f"wait in {name}")
            return own(self, *args)

        monkeypatch.setattr(torch.Tensor, name, called)
    sum_over_ranks = dist.all_reduce

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        CALLS.append("sum")
        return sum_over_ranks(*args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)


def new_run(backend: str, host: str, index: Any, **engine: Any) -> Any:
    """What `train_step` uses of a run, on random images."""
    torch.manual_seed(0)
    model = SmallResNet(10, in_channels=3)
    built = build(model, backend=backend, **engine)
    statistics, meter = RunningStatistics(built.module), Meter()
    config = EmaConfig(decay=0.9, device=host)  # type: ignore[arg-type]
    ema = Ema(config, built.local_weights(), statistics.running, 0, 9)
    bad_samples = BadSampleLog(index, "auto", "train")
    sums = StepSums(
        plan=built.plan,
        batch_norm=statistics,
        ema=ema,
        meter=meter,
        bad_samples=bad_samples,
        listing=Path("/dev/null"),
        stop_request=StopRequest(),
        world=ALONE,
        is_exact=built.is_exact,
    )
    built.optimizer.register_step_pre_hook(lambda *_: CALLS.append("update"))
    rate = LearningRate(LearningRateConfig(peak=0.01), built.plan)
    return SimpleNamespace(
        learner=SimpleNamespace(engine=built, learning_rate=rate, ema=ema),
        record=SimpleNamespace(meter=meter, bad_samples=bad_samples),
        sums=sums,
        progress=Progress(),
    )


def step(run: Any, number: int) -> list[str]:
    """What a step called."""
    batches = []
    for slot in range(NUM_SLOTS):
        made = micro_batch(number, slot)
        ids, address = torch.zeros(len(made.labels), dtype=torch.int64), SlotAddress(number, slot)
        batches.append(Batch(made.images, made.labels, made.weight, ids, address, num_valid=len(made.labels)))
    CALLS.clear()
    with Reads():
        train_step(run, number, iter(batches))
    return list(CALLS)


IN_ORDER = ["send norm", "wait for sums", "sum", "send sums", "wait for norm", "update"]
"""The sums that are waited for are those of the step before, which came back during this step's forward."""


@pytest.mark.parametrize(
    ("backend", "engine", "host"),
    [("torch", {}, "same"), ("torch", {}, "cpu"), ("torch", {"sums": "exact"}, "cpu"), ("deepspeed", {}, "cpu")],
)  # DeepSpeed once: it keeps the first process group of a process for good
@pytest.mark.usefixtures("recorded")
def test_a_step_waits_once_and_last(backend: str, engine: Any, host: str, index: Any) -> None:
    """Also with an average in host memory, and with a clipped gradient. Nothing else asks the device for a value.

    Mutations: read the norm in `_send_norm`; call `exchange` after `step`; `bool(applied)` of a tensor in `decide`.
    """
    run = new_run(backend, host, index, clip_grad_norm=1.0, **engine)
    step(run, 0)
    calls = step(run, 1)
    if "sums" in engine:  # on the CPU, exact sums look whether a value is beyond their bound
        calls = [call for call in calls if call != "wait in aten::_local_scalar_dense"]
    assert calls == IN_ORDER
    run.sums.finish()


@pytest.mark.usefixtures("recorded")
def test_a_gradient_that_is_not_finite_is_waited_for_and_not_applied(index: Any) -> None:
    """Then the sums are awaited too: an outage must be known before the step counts. Nothing changes, bit for bit.

    Mutation: leave out `decide`, and the statistics of a NaN batch count.
    """
    run = new_run("torch", "cpu", index)
    step(run, 0)
    run.sums.finish()
    engine, ema = run.learner.engine, run.learner.ema
    before = [value.clone() for value in (*engine.local_weights().values(), *ema.weights.values())]
    statistics = run.sums._batch_norm.running.clone()
    engine._scale = torch.full_like(engine._scale, torch.nan)
    assert step(run, 1) == ["send norm", "sum", "send sums", "wait for norm", "wait for sums"]
    after = [*engine.local_weights().values(), *ema.weights.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(statistics, run.sums._batch_norm.running)
    assert (run.progress.step, run.progress.skipped) == (2, 1)


class LateCopies(ema_module._OnHost):
    """As slow as a device may be: it copies when it is waited for."""

    def launch(self) -> None:
        pass

    def wait(self) -> None:
        super().launch()


@pytest.mark.usefixtures("recorded")
def test_an_average_on_the_host_takes_the_weights_as_they_were(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it is asked: the copies of a step join it before the next step's update, or when it is read, or when
    other weights are swapped in. Against an average beside the weights, bit for bit.

    Mutations: leave out `settle` in `train_step`, or in Weights.swapped_in.
    """
    monkeypatch.setattr(ema_module, "_OnHost", LateCopies)
    beside, host = new_run("torch", "same", index), new_run("torch", "cpu", index)
    for number in range(4):
        step(beside, number)
        step(host, number)
        if number == 2:
            host.learner.ema.settle()
    assert host.learner.ema._pending is not None, "the last update is still on its way"
    for run in (beside, host):
        run.sums.finish()
        engine = run.learner.engine
        weights = Weights(engine, run.sums._batch_norm, run.learner.ema, None)
        with weights.swapped_in("model", {name: value + 1 for name, value in engine.model_state().items()}):
            pass
    mine, other = host.learner.ema._weights, beside.learner.ema.weights
    assert all(torch.equal(mine[name], other[name]) for name in other)
