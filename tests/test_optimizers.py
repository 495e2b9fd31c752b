"""Decay groups counted by hand and by a peer, and optimizers by path."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import message
from timm.optim import param_groups_weight_decay
from torch import nn

from dist_trainer.errors import UserError
from dist_trainer.tricks.optimizers import OptimizerConfig, build_optimizer, decay_groups


def groups_of(model: nn.Module, **config: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(with, without) weight decay, told apart by the groups' own weight decay."""
    groups = decay_groups(model, 0.1, config.get("no_decay", ["norm", "bias"]))
    found: dict[float, list[nn.Parameter]] = {0.1: [], 0.0: []}
    for group in groups:
        found[group["weight_decay"]] += group["params"]
    return found[0.1], found[0.0]


def build(name: str) -> nn.Module:
    """An architecture without memory for its weights."""
    with torch.device("meta"):
        return torchvision.models.resnet50() if name == "resnet50" else timm.create_model(name)


@pytest.mark.parametrize(
    ("name", "num_decayed", "num_free"),
    [
        # 53 convolutions and fc.weight; 53 batch-norms of two and fc.bias
        ("resnet50", 54, 107),
        # stem, 2 of the separable block, 14 x 3, the last 1x1, 8 squeeze-excite x 2, conv_head, classifier;
        # (1 + 2 + 14 x 3 + 1) batch-norms of two, 16 squeeze-excite biases, those of conv_head and classifier
        ("mobilenetv3_large_100", 64, 110),
        # 12 x (qkv, proj, fc1, fc2), patch_embed, head, cls_token, pos_embed;
        # 12 x (two norms of two, four biases), norm of two, biases of patch_embed and head
        ("vit_tiny_patch16_224", 52, 100),
    ],
)
def test_decay_groups_are_those_counted_by_hand_and_those_of_timm(name: str, num_decayed: int, num_free: int) -> None:
    """timm tells parameters apart by their number of dimensions, we by their module; here both must agree.

    Fails when norms are found by name (torchvision's `downsample.1`), or biases of convolutions are forgotten.
    """
    model = build(name)
    decayed, free = groups_of(model)
    assert (len(decayed), len(free)) == (num_decayed, num_free)
    peer = {group["weight_decay"]: {id(p) for p in group["params"]} for group in param_groups_weight_decay(model, 0.1)}
    assert {id(p) for p in decayed} == peer[0.1]
    assert {id(p) for p in free} == peer[0.0]


def test_the_decayed_elements_of_resnet50_are_all_but_norms_and_the_last_bias() -> None:
    """25,557,032 parameters less 2 x 26,560 of batch-norm and 1,000 biases. Fails with the group of `fc` exchanged."""
    decayed, _ = groups_of(build("resnet50"))
    assert sum(p.numel() for p in decayed) == 25_557_032 - 53_120 - 1_000


def test_no_decay_chooses_norms_and_biases_separately() -> None:
    """A convolution with bias and a batch-norm. Fails when a norm's bias is counted as a bias only."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    names = {id(p): name for name, p in model.named_parameters()}
    free = {key: {names[id(p)] for p in groups_of(model, no_decay=list(key))[1]} for key in ((), ("norm",), ("bias",))}
    assert free == {(): set(), ("norm",): {"1.weight", "1.bias"}, ("bias",): {"0.bias", "1.bias"}}


def test_biases_of_attention_are_biases() -> None:
    """nn.MultiheadAttention calls one of its biases in_proj_bias. Fails when a bias must be called just `bias`."""
    model = nn.MultiheadAttention(4, 2)
    assert {tuple(p.shape) for p in groups_of(model)[1]} == {(12,), (4,)}


def test_tied_parameters_are_in_one_group_once_and_frozen_ones_in_none() -> None:
    """Fails when torch would refuse the parameter that appears in two groups, or a frozen weight decays."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "frozen": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    model["frozen"].requires_grad_(False)
    decayed, free = groups_of(model)
    assert [id(p) for p in decayed] == [id(model["a"].weight)]
    assert {id(p) for p in free} == {id(model["a"].bias), id(model["b"].bias)}


def test_optimizers_are_built_by_name_and_by_path() -> None:
    """With decay in the right group and a rate of 0, which the loop overwrites. Fails when args are dropped."""
    model = nn.Linear(2, 2)
    sgd = build_optimizer(OptimizerConfig(weight_decay=0.3, args={"momentum": 0.8, "nesterov": True}), model)
    adamw = build_optimizer(OptimizerConfig(name="torch.optim:AdamW", args={"betas": [0.8, 0.9]}), model)
    assert type(sgd) is torch.optim.SGD
    assert type(adamw) is torch.optim.AdamW
    assert [(g["lr"], g["weight_decay"], g["momentum"]) for g in sgd.param_groups] == [(0, 0.3, 0.8), (0, 0, 0.8)]
    assert [tuple(g["betas"]) for g in adamw.param_groups] == [(0.8, 0.9)] * 2


def test_momentum_is_a_default_of_sgd_alone() -> None:
    """Fails when it is the default of optimizer.args, which every other optimizer would be handed."""
    model = nn.Linear(2, 2)
    assert [group["momentum"] for group in build_optimizer(OptimizerConfig(), model).param_groups] == [0.9, 0.9]
    assert type(build_optimizer(OptimizerConfig(name="torch.optim:AdamW"), model)) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "sdg"}, ["optimizer.name: 'sdg'", "did you mean 'sgd'?"]),
        ({"name": "torch.optim:AdamX", "args": {}}, ["optimizer.name: 'torch.optim:AdamX'", "did you mean 'Adam"]),
        ({"name": "no_such:Thing"}, ["optimizer.name: 'no_such:Thing'", "cannot import 'no_such'"]),
        ({"args": {"momentun": 0.9}}, ["optimizer.args: sgd: ", "'momentun'", "it accepts", "momentum"]),
        (
            {"name": "torch.optim:AdamW", "args": {"momentum": 0.9}},
            ["optimizer.args: torch.optim:AdamW: ", "'momentum'"],
        ),
        ({"args": {"momentum": -1.0}}, ["optimizer: sgd: ", "momentum"]),
        ({"args": {"lr": 0.1}}, ["optimizer.args.lr: ", "lr.base"]),
        ({"args": {"weight_decay": 0.1}}, ["optimizer.args.weight_decay: ", "optimizer.weight_decay"]),
        ({"weight_decay": -0.1}, ["optimizer.weight_decay: -0.1"]),
    ],
)
def test_optimizers_that_cannot_be_are_refused_with_what_would_do(config: dict[str, Any], said: list[str]) -> None:
    """Fails when a TypeError of the optimizer's gets through, or the rate is set twice without a word."""
    with pytest.raises(UserError) as caught:
        build_optimizer(OptimizerConfig(**config), nn.Linear(2, 2))
    text = message(caught)
    assert text.startswith(said[0])
    assert all(part in text for part in said)
