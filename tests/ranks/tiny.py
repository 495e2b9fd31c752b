"""Blueprint that tests name in configs as tiny:Name."""

import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dist_trainer.data.decode import decode


class SmoothNet(nn.Module):
    """Convolutions, batch-norm, dropout, and no kink where rounding could choose another branch."""

    def __init__(self, num_classes: int, dropout: float = 0.1, poison: tuple[int, int] = (-1, 0)) -> None:
        """`poison` (n, rank): the n-th training forward on that rank sees NaN."""
        super().__init__()
        self.poison, self.num_forwards = poison, 0
        self.conv1 = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            if (self.num_forwards, int(os.environ.get("RANK", 0))) == tuple(self.poison):
                x = x * float("nan")
            self.num_forwards += 1
        x = F.silu(self.bn1(self.conv1(x)))
        x = F.silu(self.bn2(self.conv2(x)))
        return self.fc(self.dropout(x.mean((2, 3))))  # type: ignore[no-any-return]


class Spare(SmoothNet):
    """With a layer that it never uses."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.spare = nn.Linear(16, 5)


class OneAtATime(SmoothNet):
    """Cannot be made while another one exists, as on a device that one fills."""

    alive: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.alive:
            raise RuntimeError("the model before is still there")
        self.alive.add(self)


class NormKeeper(torch.optim.SGD):
    """Keeps one number per tensor that is not a counter."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["norm"] = parameter.grad.norm()


class GroupKeeper(torch.optim.SGD):
    """Counts in its groups."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1


class ListKeeper(torch.optim.SGD):
    """Keeps what no safetensors file holds."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = [parameter.grad]


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Scaled:
    """Cross-entropy times a factor: gradients far longer than 1."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.factor * F.cross_entropy(logits, labels, reduction="none")


def seen_by_webdataset(sample: dict[str, Any]) -> dict[str, Any]:
    """A stage that draws from all three generators: the picture becomes a brighter, decoded one."""
    amount = random.randrange(1, 40) + int(np.random.randint(1, 40)) + int(torch.randint(1, 40, ()))
    image = decode(sample["image"], 1)
    return {**sample, "image": (image // 2 + amount).clamp_max(255).to(torch.uint8)}


def hangs_on_rank_1(sample: dict[str, Any]) -> dict[str, Any]:
    """A stage that never comes back from its fortieth sample on one rank."""
    global _num_seen  # noqa: PLW0603
    _num_seen += 1
    if _num_seen == 40 and os.environ["RANK"] == "1":
        threading.Event().wait()
    return sample


_num_seen = 0


class Hungry(SmoothNet):
    """Asks for a pebibyte in its ninth training forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.num_forwards == 8:
            torch.empty(2**50, dtype=torch.uint8)
        return super().forward(x)


class Stuck(SmoothNet):
    """Never comes back from its third training forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.num_forwards == 2:
            threading.Event().wait()
        return super().forward(x)


class OnSlowDisk(SmoothNet):
    """Each sync of a checkpoint's file takes as many seconds longer as the file `slow` in the working folder says.

    Others do not: of a checkpoint that is seen whole, nothing slow is left to be done.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        sync, slow = os.fsync, Path("slow").absolute()

        def slow_sync(descriptor: int) -> None:
            file = Path(f"/proc/self/fd/{descriptor}").readlink()
            if slow.exists() and file.parent.name.startswith("step_"):
                time.sleep(float(slow.read_text()))
            sync(descriptor)

        os.fsync = slow_sync


class Broken(SmoothNet):
    """Has a fault in its third training forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.num_forwards == 2:
            raise RuntimeError("nothing was expected\nof this model")
        return super().forward(x)


class Marked(SmoothNet):
    """Says in a file per rank, in the folder MARKS, whether it trains, evaluates or re-estimates batch-norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        phase = "step" if self.training else "precise_bn" if self.bn1.training else "evaluation"
        (Path(os.environ["MARKS"]) / os.environ.get("RANK", "0")).write_text(phase)
        return super().forward(x)
