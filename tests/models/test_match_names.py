"""Weights of other programs: their prefixes and wrappers are taken off and said; what hardly fits is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretrained_weights import begin, refused, trained

from dist_trainer.models import ModelConfig, build_model
from dist_trainer.models.match_names import bound
from dist_trainer.tensors import State

pytestmark = pytest.mark.usefixtures("process_group", "offline")
NAME = "torchvision/resnet18"


def behind(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def in_parts(state: State) -> State:
    """As mmpretrain names them."""
    return {("head." if name.startswith("fc") else "backbone.") + name: value for name, value in state.items()}


PROGRAMS: dict[str, tuple[Callable[[State, State], Any], list[str]]] = {
    "Lightning": (lambda right, _: {"state_dict": behind("model.", right)}, ["model."]),
    "Lightning, net": (lambda right, _: {"state_dict": behind("net.", right), "epoch": 3}, ["net."]),
    "MoCo v3": (
        lambda right, wrong: {
            "state_dict": {**behind("module.momentum_encoder.", wrong), **behind("module.base_encoder.", right)}
        },
        ["module.base_encoder."],
    ),
    "DINO": (
        lambda right, wrong: {"student": behind("module.backbone.", wrong), "teacher": behind("backbone.", right)},
        ["backbone."],
    ),
    "mmpretrain": (lambda right, _: {"state_dict": in_parts(right)}, ["backbone.", "head."]),
    "super-gradients": (lambda right, wrong: {"net": wrong, "ema_net": right}, []),
    "a NumPy number": (lambda right, _: {"state_dict": right, "acc": np.float64(70), "n": np.int32(3)}, []),
    "a NumPy array": (lambda right, _: {"state_dict": right, "mean": np.zeros(3)}, []),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_weights_as_other_programs_save_them_are_taken(program: str, tmp_path: Path) -> None:
    """Bit for bit, those of the average where there are two; what was taken off is said. Mutations: a prefix less; the
    student before the teacher."""
    right, wrong = trained(NAME, 7).state_dict(), build_model(ModelConfig(name=NAME), 7, seed=9).state_dict()
    make, stripped = PROGRAMS[program]
    torch.save(make(right, wrong), tmp_path / "w.pth")
    state, loaded = begin(tmp_path / "w.pth", NAME)
    for name, value in right.items():
        assert torch.equal(state[name], value), name
    assert (loaded.share, loaded.missing, loaded.stripped) == (1.0, [], stripped)
    assert ("without" in loaded.lines()[0]) == bool(stripped)


def test_one_of_two_prefixes_is_taken_and_the_rest_is_left() -> None:
    """The one that most names stand behind. Fails when entries of both are mixed."""
    weights = {"student.a": 1, "student.b": 2, "teacher.a": 3, "teacher.b": 4, "teacher.c": 5, "other": 6}
    named, stripped = bound(weights, ["a", "b", "c"])
    assert named == {"a": 3, "b": 4, "c": 5, "student.a": 1, "student.b": 2, "other": 6}
    assert stripped == ["teacher."]
    assert bound({"backbone.conv": 1}, ["backbone.conv", "conv"]) == ({"backbone.conv": 1}, [])


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """By the tensor's name. Fails when training begins with NaN."""
    for value in (math.nan, math.inf):
        state = trained("timm/test_vit").state_dict()
        state["blocks.0.attn.qkv.weight"][3, 3] = value
        torch.save(state, tmp_path / "w.pth")
        said = refused(begin, tmp_path / "w.pth", "timm/test_vit")
        assert said.endswith("1 tensor with values that are not finite: blocks.0.attn.qkv.weight")


def test_fewer_than_half_of_the_parameters_are_refused(tmp_path: Path) -> None:
    """With what is missing and what is there instead; a dropped classifier does not count. Mutation: any name does."""
    state = trained("timm/test_vit").state_dict()
    renamed = {(name if "norm" in name else f"trunk.{name}"): value for name, value in state.items()}
    torch.save(renamed, tmp_path / "w.pth")
    said = refused(begin, tmp_path / "w.pth", "timm/test_vit")
    assert "of the parameters, have a name that the model has" in said
    assert "trunk." in said


def test_a_classifier_of_another_width_is_left_out_whole(tmp_path: Path) -> None:
    """Its bias would fit. Fails when half of a classifier is loaded."""
    state = dict(trained("timm/test_vit", 7).state_dict())
    state["head.weight"] = torch.zeros(7, 32)
    torch.save(state, tmp_path / "w.pth")
    found, loaded = begin(tmp_path / "w.pth", "timm/test_vit")
    fresh = build_model(ModelConfig(name="timm/test_vit"), 7, seed=0).state_dict()
    assert torch.equal(found["head.bias"], fresh["head.bias"])
    assert loaded.dropped == ["head.weight [7, 32] for [7, 64]", "head.bias"]
    assert loaded.missing == []
