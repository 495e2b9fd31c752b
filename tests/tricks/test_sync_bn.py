"""SyncBatchNorm on a GPU, as far as a CPU can show it."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import alone

from dist_trainer.tricks import sync_bn

__all__ = ["alone"]


def test_a_synchronised_layer_does_not_wait_for_its_device(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own function, with NumPy's formulas in the place of its CUDA kernels, gives the same values and asks the
    host for nothing; and torch's answer about graphs is its own again afterwards, also after an error.

    Mutation: no hooks, and a boolean index waits.
    """

    class Layer(nn.SyncBatchNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 1:
                raise RuntimeError("too few")
            apply = torch.nn.modules._functions.SyncBatchNorm.apply
            values = self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum
            return apply(x, *values, torch.distributed.group.WORLD, 1)  # type: ignore[no-any-return]

    def stats(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, (variance + eps).rsqrt()

    def gathered(x: torch.Tensor, means: torch.Tensor, invstds: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        assert means.shape == (1, 3)
        return means[0], invstds[0]

    def normalised(
        x: torch.Tensor, weight: Any, bias: Any, mean: torch.Tensor, invstd: torch.Tensor, eps: float
    ) -> Any:
        return (x - mean.view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)

    class Indices(TorchDispatchMode):
        masks = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.masks += func.name() in ("aten::index.Tensor", "aten::nonzero")
            return func(*args, **(kwargs or {}))

    for name, formula in (
        ("batch_norm_stats", stats),
        ("batch_norm_gather_stats_with_counts", gathered),
        ("batch_norm_elemt", normalised),
    ):
        monkeypatch.setattr(torch, name, formula)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("timm.layers.convert_sync_batchnorm", lambda model: model)
    plain, ours, x = Layer(3), sync_bn.synchronised(Layer(3), torch.device("cuda")), torch.randn(4, 3, 5, 5)
    asked = lambda: False  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    monkeypatch.setattr(sync_bn, "_asked", asked)
    outputs, masks = [], []
    for layer in (plain, ours):
        with torch.no_grad(), Indices() as seen:
            outputs.append(layer(x))
        masks.append(seen.masks)
    assert masks == [3, 0]
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], normalised(x, None, None, *stats(x, 1e-5), 1e-5))
    with pytest.raises(RuntimeError, match="too few"):
        ours(x[:1])
    assert torch.cuda.is_current_stream_capturing is asked
