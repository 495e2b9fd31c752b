"""What is frozen stays: parameters, batch-norm statistics and the mode that uses them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import message
from running import TINY, metrics, run_jobs, tensors
from timm.layers import BatchNormAct2d
from torch import nn

from dist_trainer.engine.optimizer_state import get_state, set_state, settings
from dist_trainer.errors import UserError
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.freezing import freeze
from dist_trainer.tricks.precise_bn import re_estimate


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), BatchNormAct2d(5), nn.Flatten())


def test_a_prefix_is_a_part_and_not_the_beginning_of_a_word() -> None:
    """`layer1` of a ResNet and not `layer10`; one parameter by its full name. Fails when a bare startswith is used."""
    model = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer10": nn.Linear(2, 2)})
    freeze(model, ["layer1", "layer10.bias"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["layer10.weight"]

    resnet = torchvision.models.resnet18()
    freeze(resnet, ["conv1", "bn1", "relu", "layer1"])
    frozen = {name.partition(".")[0] for name, p in resnet.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}


def test_parts_that_do_not_exist_and_networks_without_anything_to_train_are_refused() -> None:
    """With the nearest name, also inside. Fails when a misspelt prefix freezes nothing, in silence."""

    def refused(*prefixes: str) -> str:
        with pytest.raises(UserError) as caught:
            freeze(torchvision.models.resnet18(), prefixes)
        return message(caught)

    assert refused("layer5").startswith("model.freeze: the model has no part 'layer5'; did you mean 'layer")
    assert "it consists of conv1, bn1, relu" in refused("stem")
    assert "did you mean 'layer1.0.conv2'" in refused("layer1.0.conv")
    assert "''" in refused("")
    assert refused("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc").startswith(
        "model.freeze: conv1, bn1, "
    )


def test_frozen_batch_norm_keeps_its_statistics_and_uses_them() -> None:
    """Through train() and eval(), a training step and PreciseBN, for torch's class and timm's; the free layer's move.

    Fails when train() of the whole network wakes it up, its buffers are taken over, or it is re-estimated.
    """
    model = net()
    for layer in (model[1], model[3]):
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(1, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze(model, ["0", "1"])
    model.eval()
    model.train()
    assert [model[n].training for n in (0, 1, 3)] == [True, False, True]

    statistics = RunningStatistics(model)
    assert len(statistics) == 2 * 5
    x = torch.randn(6, 3, 8, 8)
    y = model[1](x[:, :1].expand(-1, 4, -1, -1))
    scale = (before["1.running_var"] + model[1].eps).rsqrt()[:, None, None]
    torch.testing.assert_close(y, (x[:, :1] - before["1.running_mean"][:, None, None]) * scale)
    model(x).sum().backward()
    statistics.add()
    statistics.update(statistics.take(), 1)
    statistics.publish()
    found = re_estimate(model, [(x, True)], model)
    assert found.keys() == {"3.running_mean", "3.running_var"}

    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "3.running_mean", "3.running_var", "3.num_batches_tracked"
    }  # fmt: skip
    assert [name for name, p in model.named_parameters() if p.grad is None] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, fashion: list[str]) -> Path:
    """Four steps with EMA and PreciseBN: all but the last batch-norm and the classifier frozen, and nothing."""
    folder = tmp_path_factory.mktemp("freezing")
    small = ["--model.name=small_resnet", "--model.args={stem_width: 4, widths: [4], depths: [1]}", "--duration=4step"]
    argv = [*TINY, *fashion, *small, "--lr.warmup.duration=0ep", "--ema.decay=0.5", "--precise_bn.num_samples=64"]
    run_jobs(1, [
        {"name": "frozen", "argv": [*argv, "--model.freeze=[stem, blocks]"], "stop_at": 1},
        {"name": "frozen", "argv": [*argv, "--model.freeze=[stem, blocks]", "--engine.backend=torch"]},
        {"name": "free", "argv": argv},
    ], folder)  # fmt: skip
    return folder


def test_a_run_trains_the_rest_and_saves_all(runs: Path) -> None:
    """`stem` and `blocks` stand in every file as they began (a run without freezing moves them), the rest moves.

    Fails when a checkpoint lacks what was not trained, or the average of a constant is another one.
    """
    frozen, free = tensors(runs / "frozen"), tensors(runs / "free")
    ema, statistics = tensors(runs / "frozen", "ema"), tensors(runs / "frozen", "bn_model")
    assert frozen.keys() == free.keys() == ema.keys()
    still: Any = [name for name in frozen if name.startswith(("stem", "blocks"))]
    assert all(torch.equal(frozen[name], ema[name]) for name in still)
    assert not any(torch.equal(frozen[name], free[name]) for name in still if name.endswith("weight"))
    assert torch.equal(frozen["blocks.0.bn1.running_mean"], torch.zeros(4))
    assert not torch.equal(frozen["bn.running_mean"], torch.zeros(4))
    assert statistics.keys() == {"bn.running_mean", "bn.running_var"}
    assert {name.split("/")[1] for name in tensors(runs / "frozen", "optim")} == {
        "bn.weight", "bn.bias", "fc.weight", "fc.bias"
    }  # fmt: skip
    assert metrics(runs / "frozen", "val_ema_bn/top1")


def test_optimizer_state_of_other_parameters_is_refused() -> None:
    """A run does not go on with other parts frozen. Fails when the difference is passed over, or is a KeyError."""
    before, after = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(before.parameters(), 0.1, momentum=0.9)
    before(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = get_state(optimizer, before, settings(optimizer))
    assert state.keys() == {"momentum_buffer/weight", "momentum_buffer/bias"}
    freeze(after, ["weight"])
    for there, back in ((after, state), (before, {"momentum_buffer/bias": state["momentum_buffer/bias"]})):
        trained = [p for p in there.parameters() if p.requires_grad]
        with pytest.raises(UserError) as caught:
            set_state(torch.optim.SGD(trained, 0.1), there, back)
        assert message(caught).startswith(
            "model.freeze: the checkpoint's optimizer trained other parameters (weight is"
        )
