"""Policies in timm's notation, held against what timm's own training makes of the same text."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import augment_of, message
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_train

from dist_trainer.by_name import Named
from dist_trainer.data.augment import AugmentConfig
from dist_trainer.data.stages import seed_all
from dist_trainer.errors import UserError

MEAN = (0.485, 0.456, 0.406)
TEXTS = ("rand-m9-mstd0.5-inc1", "rand-m15-mmax20-n3-p0.7", "rand-m5-tweights", "augmix-m3", "augmix-m5-w4-d2-b1",
         "original-mstd0.5", "v0", "originalr", "3a", "rand-t3a")  # fmt: skip


def picture(channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (channels, 48, 48), dtype=np.uint8))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_gives_the_images_of_timms_own_training(text: str) -> None:
    """Bit for bit under the same seed, whatever the generators held before. Mutations: another fill; a generator that
    is not seeded; no translation of AugMix's."""
    _, second, _ = transforms_imagenet_train(48, auto_augment=text, mean=MEAN, color_jitter=None, separate=True)
    (theirs,) = second.transforms
    augment, image = augment_of(AugmentConfig(policy=Named(name=text))), picture()
    for seed in range(12):
        seed_all(seed)
        expected = np.asarray(theirs(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())))
        random.seed(99 - seed)
        np.random.seed(seed + 1)
        found = augment.transform(image, seed, 0)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
    drawn = [augment.transform(image, seed, 0) for seed in range(12)]
    assert any(not torch.equal(each, drawn[0]) for each in drawn)


@pytest.mark.parametrize("text", TEXTS)
def test_grey_images_are_taken_too(text: str) -> None:
    """Fails when a colour for three channels fills one."""
    augment = augment_of(AugmentConfig(policy=Named(name=text)), mean=MEAN[:1])
    for seed in range(12):
        assert augment.transform(picture(1), seed, 0).shape == (1, 48, 48)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rand-m15", "m is 15, not in 0 to 10; timm would clip it"),
        ("rand-m9-mst0.5", "'mst0.5' is not understood; did you mean 'mstd'?"),
        ("rand-m9-foo", "'foo' is not understood"),
        ("rand-m9-n0", "n is 0, not in 1 to 15"),
        ("rand-m9-tother", "'tother' names no set of operations; there are tweights, t3a, t3aw"),
        ("augmix-m11", "m is 11, not in 0 to 10"),
        ("augmix-m3-q1", "'q1' is not understood; augmix takes"),
        ("original-m3", "'m3' is not understood"),
    ],
)
def test_what_timm_passes_over_or_fails_at_is_refused(text: str, said: str) -> None:
    """By name, before training. Fails when it becomes an assertion of timm's, or a magnitude that nobody asked for."""
    with pytest.raises(UserError) as caught:
        augment_of(AugmentConfig(policy=Named(name=text)))
    line = message(caught)
    assert line.startswith(f"augment.policy.name: {text!r}: ")
    assert said in line


def test_arguments_beside_a_text_are_refused() -> None:
    with pytest.raises(UserError, match="says all in its name"):
        augment_of(AugmentConfig(policy=Named(name="rand-m9", args={"magnitude": 3})))


def test_such_a_policy_goes_to_a_loader_process(tmp_path: Path) -> None:
    """Fails when timm's objects cannot be sent there."""
    import pickle

    augment = augment_of(AugmentConfig(policy=Named(name=TEXTS[0])))
    again = pickle.loads(pickle.dumps(augment))
    assert torch.equal(again.transform(picture(), 3, 0), augment.transform(picture(), 3, 0))
