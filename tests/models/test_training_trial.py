"""A trial of training before the run folder is made: outputs, batch-norm with one value, unused parameters."""

import copy
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import message
from running import FASHION, TINY, run_jobs, tensors
from torch import nn
from training import build, micro_batch, train

from dist_trainer.errors import UserError
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.models.trial import try_images, try_training
from dist_trainer.tricks.auxiliary import outputs_of, tie

IMAGE = (3, 32, 32)


class Net(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm1d(8), nn.Linear(8, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x).mean((2, 3)))  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.features(x))


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)


class Two(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return (super().forward(x),) * 2 if self.training else super().forward(x)


InceptionOutputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])


class Auxiliary(Net):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> Any:
        features = self.features(x)
        return InceptionOutputs(self.fc(features), self.aux(features)) if self.training else self.fc(features)


pytestmark = pytest.mark.usefixtures("process_group")


def refusal(model: nn.Module, micro: int = 8, shape: tuple[int, int, int] = IMAGE) -> str:
    with pytest.raises(UserError) as caught:
        try_training(model, "mynet", shape, 10, micro)
    return message(caught)


def test_outputs_that_nobody_knows_are_refused() -> None:
    """Fails when the loss is the first to be given a tuple, in the first step."""
    assert refusal(Two()).startswith("model.name: mynet gives a tuple in training, where [m, 10] logits belong")


def test_batch_norm_with_one_value_per_channel_is_refused() -> None:
    """By layer and micro-batch: on its own features, and in a network whose last images have one pixel."""
    assert "the batch-norm layer bn of mynet has one value per channel" in refusal(Net(), micro=1)
    network = build_model(ModelConfig(name="torchvision/resnet18"), 10, 0)
    assert refusal(network, micro=1).startswith("batch.micro_batch: 1: the batch-norm layer layer4.0.bn1 of mynet")
    assert try_training(network, "mynet", (3, 64, 64), 10, 1) == []
    assert try_training(network, "mynet", IMAGE, 10, 2) == []


def test_channels_that_a_network_does_not_take_are_said_with_its_argument() -> None:
    network = build_model(ModelConfig(name="small_resnet"), 10, 0)
    with pytest.raises(UserError, match=r"set data\.channels: 1 or model\.args: \{in_channels: 3\}"):
        try_images(network, "small_resnet", IMAGE, 10)


def test_a_trial_changes_nothing() -> None:
    """Weights, statistics, gradients, modes and random numbers. Mutation: on the model itself."""
    model, state = build_model(ModelConfig(name="torchvision/resnet18"), 10, 0), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    try_training(model, "resnet18", IMAGE, 10, 8)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and all(each.grad is None for each in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


TRIED: list[str] = []
"""Where Noted and ByValue were tried."""


class Noted(Net):
    def forward(self, x: torch.Tensor) -> Any:
        TRIED.append(x.device.type)
        return super().forward(x)


class ByValue(Noted):
    """Its outputs depend on a value, which shapes alone do not have."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: torch.Tensor) -> Any:
        logits = super().forward(x)
        logits = logits * logits.max().item()
        return logits if self.outputs == 1 else (logits,) * self.outputs


def test_shapes_are_enough_for_a_large_network_unless_it_looks_at_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is computed, and what it does is found there, as for a small one. Mutations: compute every network, which
    takes seconds for a large one; take what cannot run on shapes for wrong, or for right."""
    size = sum(each.numel() for each in Net().parameters())
    for large, network, tried in (
        (size, Noted(), ["meta"]),
        (size, ByValue(1), ["meta", "cpu"]),
        (size + 1, Noted(), ["cpu"]),
    ):
        monkeypatch.setattr("dist_trainer.models.trial.LARGE", large)
        TRIED.clear()
        assert try_training(network, "mynet", IMAGE, 10, 8) == []
        assert tried == TRIED
    monkeypatch.setattr("dist_trainer.models.trial.LARGE", size)
    assert "gives a tuple in training" in refusal(ByValue(2))


def test_a_network_that_cannot_be_copied_is_not_refused() -> None:
    """It trained before there was a trial. Mutation: let the error through."""
    model = Net()
    model.lock = threading.Lock()  # type: ignore[assignment]
    assert try_training(model, "mynet", IMAGE, 10, 8) == []


def test_a_parameter_that_is_not_used_is_trained_as_by_weight_decay_alone() -> None:
    """Mutation: no gradient at all, at which DDP stops in the second step."""
    model = Unused()
    unused = try_training(model, "mynet", IMAGE, 10, 8)
    assert unused == ["head.weight", "head.bias"]
    tie(model, [model.head.weight, model.head.bias])
    trained = train(model, steps=3)
    plain = train(Net(), steps=3)
    assert trained.losses == plain.losses
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.engine.module.state_dict().items())
    assert torch.equal(model.head.weight, Unused().head.weight)  # without weight decay


def test_it_is_the_same_at_every_stage_of_zero(tmp_path: Path) -> None:
    """On two ranks with weight decay, in exact sums: bit for bit at stages 0, 1 and 2; stage 3 trains too.

    Mutation: no gradient at stage 0, at which the run ends.
    """
    common = [
        *TINY, f"--data.train={FASHION / 'train'}", f"--data.val={FASHION / 'val'}", "--model.name=tiny:Spare",
        "--optimizer.weight_decay=0.1", "--optimizer.no_decay=[]", "--duration=6step", "--eval.every=null",
    ]  # fmt: skip
    exact = [*common, "--engine.sums=exact"]
    jobs = [{"name": f"zero{stage}", "argv": [*exact, f"--engine.zero={stage}"]} for stage in (0, 1, 2)]
    run_jobs(2, [*jobs, {"name": "zero3", "argv": [*common, "--engine.zero=3"]}], tmp_path)
    states = [tensors(tmp_path / f"zero{stage}") for stage in range(4)]
    for state in states[1:3]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())
    for name in ("spare.weight", "spare.bias"):
        torch.testing.assert_close(states[3][name], states[0][name])


def test_auxiliary_outputs_train_with_their_weight() -> None:
    """Loss and gradient against their definition, main + 0.4 auxiliary; evaluation gives the main one. Mutations: the
    main one alone; another weight."""
    model = Auxiliary()
    assert try_training(model, "mynet", IMAGE, 10, 8) == []
    engine = build(model)
    batch = micro_batch(0, 0)
    reference = copy.deepcopy(model)
    found = float(engine.forward_backward(batch))
    images = (batch.images.float() / 255 - 0.5) / 0.25
    main, auxiliary = reference(images)
    each = [F.cross_entropy(logits, batch.labels, reduction="sum") for logits in (main, auxiliary)]
    assert found == pytest.approx(float((each[0] + 0.4 * each[1]).detach()), rel=1e-5)
    (each[0] + 0.4 * each[1]).backward()
    ours, theirs = model.aux.weight.grad, reference.aux.weight.grad
    assert ours is not None and theirs is not None
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size", "weights"), [("inception_v3", 299, [1.0, 0.4]), ("googlenet", 64, [1.0, 0.3, 0.3])]
)
def test_torchvisions_networks_with_auxiliary_outputs_are_known(name: str, size: int, weights: list[float]) -> None:
    """As they are built without arguments. Fails when they have to be cut off."""
    config = ModelConfig(name=f"torchvision/{name}", args={"init_weights": False, "aux_logits": True})
    model = build_model(config, 10, 0)
    parts = outputs_of(model(torch.zeros(2, 3, size, size)))
    assert parts is not None
    assert [weight for weight, _ in parts] == weights
    assert {tuple(logits.shape) for _, logits in parts} == {(2, 10)}
    assert try_training(model, name, (3, size, size), 10, 2) == []
