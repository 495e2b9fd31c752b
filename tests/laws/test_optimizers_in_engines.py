"""Every optimizer in every engine on two ranks: the library's own updates, and state that goes from stage to stage."""

import json
from typing import Any

import pytest
from running import run_ranks

# Rounding of 5 updates in another order of sums: 5 x a few 2**-24, scaled up by 1 / sqrt(v) where gradients are small.
TOLERANCE = 5e-6
ELEMENT_WISE = {
    "sgd": ["momentum_buffer"],
    "sgdw": ["momentum_buffer"],
    "rmsprop": ["momentum_buffer", "square_avg", "step"],
    "rmsprop_tf": ["grad_avg", "momentum_buffer", "square_avg", "step"],
    "adam": ["exp_avg", "exp_avg_sq", "step"],
    "adamw": ["exp_avg", "exp_avg_sq", "step"],
    "adadelta": ["acc_delta", "square_avg", "step"],
    "torch.optim:NAdam": ["exp_avg", "exp_avg_sq", "mu_product", "step"],
    "timm.optim:AdaBelief": ["exp_avg", "exp_avg_var", "step:number"],
    "sgd layers": ["momentum_buffer"],
    "adamw frozen": ["exp_avg", "exp_avg_sq", "step"],
}
LAYER_WISE = {
    "lars": ["momentum_buffer"],
    "lamb": ["exp_avg", "exp_avg_sq", "step@group"],
    "timm.optim:Adan": ["exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad", "step:number@group"],
    "lamb layers": ["exp_avg", "exp_avg_sq", "step@group"],
}
ALL = {**ELEMENT_WISE, **LAYER_WISE}
FROZEN = ["conv1.weight", *(f"bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var"))]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("optimizers")
    run_ranks(2, "optimizers", folder / "out.json")
    found: dict[str, dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


@pytest.mark.parametrize("case", ALL)
def test_an_update_is_the_librarys_own(result: dict[str, dict[str, Any]], case: str) -> None:
    """Five updates at five rates against a plain loop over torch's or timm's class, its groups written by hand.

    Also with layer_decay 0.7 (groups at 0.49, 0.7 and 1 of the rate) and with frozen layers. Fails when decay reaches a
    norm, a default of ours differs, the rate of a group is not scaled, or LAMB clips twice.
    """
    assert result[case]["peer"] < TOLERANCE
    assert result[case]["unmoved"] == ([*FROZEN, "bn1.num_batches_tracked"] if "frozen" in case else [])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_fused_update_is_the_same_up_to_rounding(result: dict[str, dict[str, Any]], name: str) -> None:
    """What a GPU gets by default, on the CPU: against the library's plain loop, and going from stage to stage, where an
    element's place in memory decides how it is rounded. Mutation: nesterov or a decay that the fused way would lose.
    """
    case = result[f"{name} fused"]
    assert case["kept as"] == ELEMENT_WISE[name] and case["peer"] < TOLERANCE
    assert all(difference < TOLERANCE for way in case["others"].values() for difference in way.values())


def test_small_buckets_change_no_bit() -> None:
    """ZeRO 1 and 2, gradients over two micro-batches per rank. Mutation: count what one bucket needs as many."""
    run_ranks(2, "buckets")


def test_a_save_never_holds_the_whole_state_of_a_sharded_optimizer() -> None:
    """At ZeRO 1, 2 and 3 it comes to rank 0's host memory one parameter at a time, and stays nowhere else.

    Mutation: keep it on every rank, which would need the memory that sharding saves.
    """
    run_ranks(2, "saved_state")


@pytest.mark.parametrize("case", ALL)
def test_a_run_goes_on_from_stage_to_stage_bit_for_bit(result: dict[str, dict[str, Any]], case: str) -> None:
    """A new engine after every step, at ZeRO 1, 3, 2, torch, 1, through files; and all steps at ZeRO 3.

    Layer-wise ones: ZeRO 0 and torch. Weights, statistics, optimizer state. Fails when Adam's step, a number that is no
    tensor, or what stands in a group is not saved; when a padded piece is cut wrongly; when DeepSpeed drops lr_scale.
    """
    assert result[case]["kept as"] == ALL[case]
    ways = {"chain"} if case in LAYER_WISE else {"chain", "zero3"}
    assert ways <= result[case]["others"].keys()
    assert all(difference == 0 for way in result[case]["others"].values() for difference in way.values())


def test_frozen_layers_are_averaged_held_and_saved_at_every_stage(result: dict[str, dict[str, Any]]) -> None:
    """EMA, weights that are held for an evaluation, and the model, bit for bit those of torch's DDP.

    Fails when a stage looks for the optimizer state of a frozen parameter, or leaves it out of what it saves.
    """
    others = result["adamw frozen"]["others"]
    assert others.keys() == {"zero0", "zero1", "zero2", "zero3", "chain"}
    assert all(others[f"zero{n}"] == {"model": 0, "optim": 0, "ema": 0, "held": 0} for n in range(4))


def test_state_that_cannot_be_right_or_saved_ends_the_run_at_its_first_step(result: dict[str, dict[str, Any]]) -> None:
    """A norm per tensor is fine at ZeRO 0, and that of a flat piece is wrong; ZeRO 3 steps groups one after another, so
    what they count is wrong too; a list fits no checkpoint.

    Fails when a save finds out, an epoch later, or nobody does.
    """
    assert result["tiny:NormKeeper torch"] == {}
    for name, zero in (("NormKeeper", 1), ("GroupKeeper", 3)):
        said = result[f"tiny:{name} zero{zero}"]["refused"]
        assert said.startswith(f"engine.zero: {zero} cuts weights into flat pieces, and {name} keeps state that")
    assert result["tiny:ListKeeper torch"]["refused"].startswith("optimizer.name: ListKeeper keeps 'history' as a list")
