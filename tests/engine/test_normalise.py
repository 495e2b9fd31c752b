"""From uint8 pixels to the network's input, in one pass."""

import pytest
import torch
from torch import nn
from training import ALONE, alone, build, micro_batch

from dist_trainer.engine.inference import Inference, Preprocess
from dist_trainer.models.small_resnet import SmallResNet
from dist_trainer.tricks.losses import weighted_sum
from dist_trainer.tricks.mixing import MixingConfig

__all__ = ["alone"]

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def inference(model: nn.Module, precision: str, channels_last: bool) -> Inference:
    return Inference(model, precision, Preprocess(mean=MEAN, std=STD, channels_last=channels_last), ALONE)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
def test_every_pixel_value_is_normalised_as_written(channels_last: bool, sliced: bool) -> None:
    """All 256 values in each channel against float64, within two units in the last place of the largest; bfloat16 is
    the float32 value rounded once; the layout is the network's. Also of images that are a view.

    Mutations: the same mean for all channels; compute in bfloat16, three roundings instead of one.
    """
    engine = inference(nn.Identity(), "bf16", channels_last)
    images = torch.arange(256, dtype=torch.uint8).repeat(4, 3, 1).view(4, 3, 16, 16)
    images = images[1:3, :, :, ::2] if sliced else images
    expected = (images.double() / 255 - torch.tensor(MEAN).double().view(1, 3, 1, 1)) / torch.tensor(STD).double().view(
        1, 3, 1, 1
    )
    exact = engine._prepare(images, torch.float32)
    assert float((exact - expected).abs().max()) < 2.0**-20  # of values up to 4.4
    assert torch.equal(engine._prepare(images, torch.bfloat16), exact.bfloat16())
    assert exact.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_rounding_the_input_first_changes_no_logit() -> None:
    """Autocast rounds float32 images at the first convolution; here that is done in the pass that normalises.

    Bit for bit, for a network that begins with a convolution. Mutation: round after adding half a bfloat16 step.
    """
    torch.manual_seed(0)
    model = SmallResNet(10, in_channels=3).eval().to(memory_format=torch.channels_last)
    engine = inference(model, "bf16", True)
    images = torch.randint(0, 256, (16, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(engine._prepare(images, torch.float32)).float()
    assert torch.equal(engine.logits(images), expected)


def test_images_are_mixed_before_they_are_rounded(alone: None) -> None:
    """The loss of a mixed micro-batch under bf16 is that of float32 images, mixed, which autocast rounds: bit for bit.

    Mutation: mix what is rounded already.
    """
    torch.manual_seed(0)
    engine = build(SmallResNet(10, in_channels=3), precision="bf16", mixing=MixingConfig(mixup=0.5))
    batch = micro_batch(0, 0)
    batch.ghost = False
    mix = engine._mixing.draw(0, 0, batch.images.shape)
    assert 0.0 < mix.share < 1.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        images = mix.images(engine._prepare(batch.images, torch.float32))
        logits = engine.module(images).float()
    expected = weighted_sum(engine._loss, logits, batch.labels, batch.weight, mix)
    assert torch.equal(engine.forward_backward(batch), expected)
