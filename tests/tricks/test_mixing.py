"""Mixup and CutMix: pixels against torchvision's, shares against the box's pixels, draws against their distributions.

Draws are seeded, so a test of a distribution always has the same outcome.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import message, png, refused, write_tar
from timm.data.mixup import cutmix_bbox_and_lam
from torchvision.transforms import v2

from dist_trainer.commands.main import dispatch
from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig, Duration, Plan, make_plan
from dist_trainer.tricks.mixing import Mix, Mixing, MixingConfig

SHAPE = (8, 3, 21, 32)
MANY = 4000


def plan(micro: int = 8, num_samples: int = 160, duration: str = "10ep") -> Plan:
    return make_plan(
        BatchConfig(global_batch=2 * micro, micro_batch=micro),
        Duration.parse(duration, "duration"),
        world=1,
        num_samples=num_samples,
    )


def draws(count: int = MANY, seed: int = 0, shape: tuple[int, ...] = SHAPE, **config: Any) -> list[Mix]:
    """Of `count` slots, two per step."""
    mixing = Mixing(MixingConfig(**config), plan(shape[0], duration=f"{count}step"), seed)
    return [mixing.draw(number // 2, number % 2, shape) for number in range(count)]


def pictures(dtype: torch.dtype = torch.float32, channels_last: bool = False) -> torch.Tensor:
    images = torch.randint(256, SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    return images.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_are_those_of_torchvisions_transforms(channels_last: bool) -> None:
    """Its MixUp and CutMix with our share and box; partners one, and in NumPy any number of places apart.

    Fails when the shares are exchanged, rows and columns are, the box keeps what it should give away, what was given is
    changed, or the memory layout is lost.
    """
    images = pictures(channels_last=channels_last)
    before = images.clone()
    boxes = [(2, 20, 5, 9), (0, 21, 0, 32), (0, 1, 30, 32)]
    for shift in (1, 3, 7):
        for share, box in ((0.3, None), (0.9, None), *((0.5, box) for box in boxes)):
            mixed = Mix(share, shift, box).images(images)
            rolled = np.roll(before.numpy(), shift, 0)
            if box is None:
                expected = torch.from_numpy(share * before.numpy() + (1 - share) * rolled)
            else:
                expected = before.clone()
                for y in range(box[0], box[1]):
                    for x in range(box[2], box[3]):
                        expected[:, :, y, x] = torch.from_numpy(rolled[:, :, y, x])
            torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-4)
            if shift == 1:
                params = {"labels": None, "batch_size": len(images), "lam": share}
                if box is not None:
                    params["box"] = (box[2], box[0], box[3], box[1])
                peer = (v2.MixUp if box is None else v2.CutMix)(num_classes=2).transform(images, params)
                torch.testing.assert_close(mixed, peer, rtol=1e-6, atol=1e-4)
            assert mixed.stride() == images.stride()
            assert torch.equal(images, before)
    assert Mix().images(images) is images


def test_uint8_is_mixed_and_rounded() -> None:
    """For looking at: within half a step of the float's. Fails when it wraps around, is cut off, or becomes float."""
    images = pictures(torch.uint8)
    for mix in (Mix(0.4, 2), Mix(0.4, 2, (3, 9, 1, 30))):
        mixed = mix.images(images)
        assert mixed.dtype == torch.uint8
        assert float((mixed.float() - mix.images(images.float())).abs().max()) <= 0.5
        assert not torch.equal(mixed, images)


@pytest.mark.parametrize("size", [(21, 32), (32, 32), (3, 2), (28, 5)])
def test_the_share_is_the_pixels_that_stay(size: tuple[int, int]) -> None:
    """Counted in mixed pictures of one colour each. Fails when the share is the one drawn, before clipping."""
    owners = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 2, *size)
    clipped = 0
    for mix in draws(300, shape=(4, 2, *size), cutmix=1.0):
        mixed = mix.images(owners)
        stayed = (mixed == owners).float().mean((1, 2, 3))
        assert stayed.tolist() == pytest.approx([mix.share] * 4, abs=1e-6)
        assert torch.equal(torch.where(mixed == owners, owners, mix.partners(owners)), mixed)
        top, bottom, left, right = mix.box or (1, 2, 1, 2)
        assert 0 <= top <= bottom <= size[0] and 0 <= left <= right <= size[1]
        clipped += 0 in (top, left) or bottom == size[0] or right == size[1]
    assert clipped > 50


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixups_shares_are_beta_distributed(alpha: float) -> None:
    """Mean 1/2, variance 1 / (4 (2 a + 1)), and Kolmogorov-Smirnov. Fails for Beta(a, 1), or max(share, 1 - share)."""
    shares = np.array([mix.share for mix in draws(mixup=alpha)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 4 * math.sqrt(variance / MANY)
    assert shares.var() == pytest.approx(variance, rel=0.1)
    assert scipy.stats.kstest(shares, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_cutmixs_boxes_are_distributed_as_timms(alpha: float) -> None:
    """Their edges and what stays, against as many of timm's. Fails when a side is 1 - s, or boxes are never clipped."""
    np.random.seed(1)
    peer = []
    for _ in range(MANY):
        (top, bottom, left, right), share = cutmix_bbox_and_lam(SHAPE, np.random.beta(alpha, alpha))
        peer.append((top, bottom, left, right, share))
    own = [(*(mix.box or ()), mix.share) for mix in draws(cutmix=alpha)]
    for ours, theirs in zip(np.array(own).T, np.array(peer, dtype=float).T, strict=True):
        assert scipy.stats.ks_2samp(ours, theirs).pvalue > 0.01


@pytest.mark.parametrize(("switch", "probability"), [(0.5, 1.0), (0.2, 0.7), (0.0, 1.0), (1.0, 0.5), (0.5, 0.0)])
def test_so_many_are_mixed_and_so_many_of_them_cut(switch: float, probability: float) -> None:
    """Within four standard deviations; exactly none and all at 0 and 1. Fails when the two are drawn by one number."""
    found = draws(mixup=0.5, cutmix=0.5, switch=switch, probability=probability)
    mixed = [mix for mix in found if mix.shift]
    cut = [mix for mix in mixed if mix.box is not None]
    for count, chance, total in ((len(mixed), probability, MANY), (len(cut), switch, len(mixed))):
        assert abs(count - chance * total) <= 4 * math.sqrt(chance * (1 - chance) * total)
    assert all(mix == Mix() for mix in found if not mix.shift)


def test_one_alone_needs_no_switch_and_off_is_off() -> None:
    """Fails when the switch speaks where only one of the two is on, or an alpha of 0 mixes."""
    assert all(mix.box is None and mix.shift for mix in draws(200, mixup=1.0, switch=1.0))
    assert all(mix.box is not None for mix in draws(200, cutmix=1.0, switch=0.0))
    assert all(mix == Mix() for mix in draws(200))


def test_every_other_sample_is_a_partner_equally_often() -> None:
    """Of m = 8: seven shifts, never the sample itself. Chi-squared. Fails for a fixed neighbour or a shift of 0."""
    counts = np.bincount([mix.shift for mix in draws(mixup=1.0)], minlength=SHAPE[0])
    assert counts[0] == 0 and len(counts) == SHAPE[0]
    assert scipy.stats.chisquare(counts[1:]).pvalue > 0.01
    assert {mix.shift for mix in draws(50, shape=(2, 1, 4, 4), mixup=1.0)} == {1}


def test_a_draw_is_a_function_of_seed_step_and_slot_alone() -> None:
    """Asked in another order, by another object, after other draws from NumPy and torch; pinned for all time.

    Fails when a generator is kept from draw to draw, seed, step or slot is left out of the key, or NumPy draws anew.
    """
    config = MixingConfig(mixup=0.2, cutmix=1.0)
    one, other = Mixing(config, plan(), 7), Mixing(config, plan(), 7)
    forth = [one.draw(step, slot, SHAPE) for step in range(20) for slot in range(2)]
    np.random.seed(3)
    torch.manual_seed(3)
    back = [other.draw(step, slot, SHAPE) for step in reversed(range(20)) for slot in (1, 0)]
    assert forth == back[::-1]
    assert len(set(forth)) == len(forth)
    assert Mixing(config, plan(), 8).draw(0, 0, SHAPE) != forth[0]
    pinned = [Mix(0.98814279, 1), Mix(0.62053571, 5, (4, 21, 0, 15)), Mix(0.99980584, 4), Mix(7.477058e-07, 1)]
    for mix, expected in zip(forth[:4], pinned, strict=True):
        assert (mix.shift, mix.box) == (expected.shift, expected.box)
        assert mix.share == pytest.approx(expected.share, rel=1e-6)  # powers and logarithms differ in the last bit


@pytest.mark.parametrize(
    ("off_last", "num_mixed"), [("0ep", 100), ("1step", 99), ("2ep", 80), ("25%", 75), ("48sample", 97)]
)
def test_mixing_stops_at_an_exact_step(off_last: str, num_mixed: int) -> None:
    """Ten epochs of ten steps. Fails by one step at either side."""
    mixing = Mixing(MixingConfig(mixup=1.0, off_last=off_last), plan(), 0)
    assert [step for step in range(100) if mixing.draw(step, 1, SHAPE).shift] == list(range(num_mixed))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"mixup": -0.1}, "mixing.mixup: -0.1"),
        ({"cutmix": math.inf}, "mixing.cutmix: inf"),
        ({"cutmix": math.nan}, "mixing.cutmix: nan"),
        ({"switch": 1.5}, "mixing.switch: 1.5"),
        ({"probability": -1.0}, "mixing.probability: -1.0"),
        ({"off_last": "5"}, "mixing.off_last: '5'"),
        ({"mixup": 0.2, "off_last": "10ep"}, "mixing.off_last: 10ep"),
    ],
)
def test_values_that_cannot_be_are_refused_by_key(config: dict[str, Any], said: str) -> None:
    """Fails when one of them is let by."""
    with pytest.raises(UserError) as caught:
        Mixing(MixingConfig(**config), plan(), 0)
    assert message(caught).startswith(said)


def test_micro_batches_of_one_and_images_of_one_line_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """By `plan`, as by `train`; sizes are those of the crop, or of the data. Fails when either reaches the first step,
    or where Mixup alone, or a crop or transform that may make images larger, would do.
    """
    config, rng = tmp_path / "small.yaml", np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "0.tar", [
        member for n in range(16) for member in ((f"{n}.cls", str(n % 2).encode()), (f"{n}.png", png(rng, 1, 12)))
    ])  # fmt: skip
    config.write_text(
        f"data: {{train: {tmp_path / 'set'}, val: {tmp_path / 'set'}}}\nlr: {{base: 0.1}}\nduration: 1ep\n"
        "model: {name: small_resnet, args: {in_channels: 3}}\nbatch: {global_batch: 4, micro_batch: 2}\n"
    )
    plan = ("plan", config)
    for name in ("mixup", "cutmix"):
        line = refused(*plan, "--batch.micro_batch", 1, f"--mixing.{name}", 0.2)
        assert line.startswith(f"mixing.{name}: 0.2 mixes the samples of a micro-batch")
    cut = (*plan, "--mixing.cutmix", 1)
    assert refused(*cut).startswith("mixing.cutmix: 1.0 cuts boxes")
    assert refused(*cut, "--augment.crop.size", 1, "--samples", 16).startswith("mixing.cutmix: 1.0 cuts boxes")
    larger = ["--augment.transforms", "[{name: Resize, args: {size: [8, 8]}}]"]
    for argv in (["--mixing.mixup", 1], ["--mixing.cutmix", 1, *larger], ["--mixing.cutmix", 1, "--samples", 16],
                 ["--mixing.cutmix", 1, "--augment.crop.size", 8]):  # fmt: skip
        dispatch([str(arg) for arg in (*plan, *argv)])
