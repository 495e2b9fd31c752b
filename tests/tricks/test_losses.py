"""Losses against torch's and timm's, label smoothing in closed form, mixed and masked micro-batches by hand."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import message
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy

from dist_trainer.by_name import Named
from dist_trainer.errors import UserError
from dist_trainer.tricks.losses import Loss, LossConfig, build_loss, weighted_sum
from dist_trainer.tricks.mixing import Mix

K = 5


def batch(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [m, K] and labels [m]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, K, generator=generator) * 3, torch.randint(K, (size,), generator=generator)


def bce(smoothing: float = 0.0, **args: Any) -> Loss:
    return build_loss(LossConfig(name="bce", args=args, label_smoothing=smoothing))


def labels_only(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A user's own loss, not linear in anything, which soft targets would make fail."""
    assert labels.dtype == torch.int64 and labels.shape == logits.shape[:1]
    return F.cross_entropy(logits, labels, reduction="none") ** 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_the_closed_form(smoothing: float) -> None:
    """-sum of ((1 - e) onehot + e / K) log softmax, per sample, in NumPy's float64.

    Fails when e is spread over the K - 1 wrong classes, or the mean over the batch is taken.
    """
    logits, labels = batch(6)
    x = logits.double().numpy()
    log_softmax = x - np.log(np.exp(x).sum(1, keepdims=True))
    targets = (1 - smoothing) * np.eye(K)[labels] + smoothing / K
    loss = build_loss(LossConfig(label_smoothing=smoothing))(logits, labels)
    assert loss.shape == (6,)
    np.testing.assert_allclose(loss.numpy(), -(targets * log_softmax).sum(1), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.85])
def test_a_mixed_pair_has_timms_targets_smoothed_once(share: float, smoothing: float) -> None:
    """Cross-entropy of two mixed samples against torch's with the probabilities of timm's mixup_target.

    Fails when targets are smoothed before they are mixed and again in the loss, not at all, or shares are swapped.
    """
    logits, _ = batch(2)
    for y in ([0, 3], [2, 2]):
        labels = torch.tensor(y)
        expected = F.cross_entropy(logits, mixup_target(labels, K, share, smoothing), reduction="sum")
        loss = build_loss(LossConfig(label_smoothing=smoothing))
        found = weighted_sum(loss, logits, labels, torch.ones(2), Mix(share, 1))
        torch.testing.assert_close(found, expected)
        unmixed = weighted_sum(loss, logits, labels, torch.ones(2), Mix())
        assert (float((found - unmixed).abs()) > 1e-3) == (y[0] != y[1])


@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_bce_is_timms(threshold: float | None, smoothing: float, sum_classes: bool) -> None:
    """Of labels, and of mixed pairs on both sides of each threshold (RSB A2: 0.2), whose targets timm smooths itself.

    Fails when the threshold comes before the smoothing (0.0 tells), `>` is `>=`, or mean and sum are exchanged.
    """
    peer = TimmBinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold, sum_classes=sum_classes)
    loss = bce(smoothing, target_threshold=threshold, sum_classes=sum_classes)
    logits, labels = batch(6)
    assert loss(logits, labels).shape == (6,)
    torch.testing.assert_close(loss(logits, labels).mean(), peer(logits, labels))
    for share in (0.1, 0.25, 0.5, 0.6, 0.9):
        logits, labels = batch(2, seed=1)
        found = weighted_sum(loss, logits, labels, torch.ones(2), Mix(share, 1))
        torch.testing.assert_close(found / 2, peer(logits, mixup_target(labels, K, share, smoothing)))


def test_the_sum_over_classes_is_k_times_the_mean() -> None:
    """As documented for the rate. Fails when sum_classes is ignored."""
    logits, labels = batch(4)
    torch.testing.assert_close(bce(sum_classes=True)(logits, labels), K * bce()(logits, labels))


def by_hand(
    loss: Loss, logits: torch.Tensor, labels: torch.Tensor, weight: list[float], share: float, shift: int
) -> float:
    """s w_i L(y_i) + (1 - s) w_j L(y_j), sample by sample, from the loss of labels alone."""
    total = 0.0
    for i in range(len(weight)):
        j = i - shift  # a negative index counts from the end
        for w, y in ((share * weight[i], labels[i]), ((1 - share) * weight[j], labels[j])):
            total += w * float(loss(logits[i : i + 1], y[None])[0])
    return total


@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize("weight", [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
def test_weights_are_mixed_as_targets_are(weight: list[float], shift: int) -> None:
    """Masked samples, as owners and as partners, for losses linear in their targets and one of labels alone.

    Fails when a sample's loss is weighted by its own weight only, partners are taken the other way round, soft targets
    are not divided by their weights' sum (smoothing then grows), or a ghost's weights of 0 give NaN.
    """
    logits, labels = batch(5)
    for loss in (build_loss(LossConfig(label_smoothing=0.3)), bce(0.3), bce(sum_classes=True), labels_only):
        for share in (0.0, 0.3, 0.9):
            found = weighted_sum(loss, logits, labels, torch.tensor(weight, dtype=torch.float32), Mix(share, shift))
            assert float(found) == pytest.approx(by_hand(loss, logits, labels, weight, share, shift), rel=1e-5)


def test_a_threshold_looks_at_what_counts() -> None:
    """Three samples, shares .7 and .3, threshold .5: own class; but the partner's alone where its owner is masked.

    By hand. Fails when a masked sample's label counts in its partner's target.
    """
    logits, labels = batch(3)[0], torch.tensor([0, 1, 2])
    weight = torch.tensor([1.0, 0.0, 1.0])  # partners by shift 1: 0 <- 2, 1 <- 0, 2 <- 1

    def binary(i: int, on: int) -> float:
        """Mean over the classes of sample i with target 1 for class `on`."""
        x = [float(v) for v in logits[i]]
        return sum(math.log1p(math.exp(-v if k == on else v)) for k, v in enumerate(x)) / K

    expected = 1.0 * binary(0, on=0) + 0.3 * binary(1, on=0) + 0.7 * binary(2, on=2)
    found = weighted_sum(bce(target_threshold=0.5), logits, labels, weight, Mix(0.7, 1))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_without_mixing_the_loss_is_asked_for_labels_bit_for_bit() -> None:
    """Also a loss of soft targets. Fails when unmixed samples take the way through probabilities."""
    logits, labels = batch(6)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    for loss in (build_loss(LossConfig(label_smoothing=0.1)), labels_only):
        assert torch.equal(weighted_sum(loss, logits, labels, weight, Mix()), torch.dot(loss(logits, labels), weight))
    asked = []

    class Watching:
        soft_targets = True

        def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            asked.append((targets.dtype, tuple(targets.shape)))
            return logits.sum(1)

    for mix in (Mix(), Mix(0.5, 1)):
        weighted_sum(Watching(), logits, labels, weight, mix)
    assert asked == [(torch.int64, (6,)), (torch.float32, (6, K))]


def test_weights_that_are_not_numbers_make_a_loss_that_is_none() -> None:
    """What storage did not give has weight NaN, and such a step must not be applied. Fails when mixing cleans it."""
    logits, labels = batch(4)
    for loss, mix in itertools.product((bce(), build_loss(LossConfig()), labels_only), (Mix(), Mix(0.5, 1))):
        assert weighted_sum(loss, logits, labels, torch.full((4,), math.nan), mix).isnan()


def test_losses_that_cannot_be_are_refused_by_key() -> None:
    """Fails when smoothing is handed to a loss that has none, or set twice, or arguments are dropped in silence."""

    def refused(**config: Any) -> str:
        with pytest.raises(UserError) as caught:
            build_loss(LossConfig(**config))
        return message(caught)

    for bad in (-0.1, 1.0, math.nan):
        assert refused(label_smoothing=bad).startswith(f"loss.label_smoothing: {bad}")
    assert refused(name="torch.nn:BCELoss", label_smoothing=0.1).startswith("loss.label_smoothing: ")
    assert "did you mean 'cross_entropy'?" in refused(name="cross_entropi")
    assert refused(args={"weigth": [1.0]}).startswith("loss.args.weigth: cross_entropy takes no ")
    assert "it accepts label_smoothing, target_threshold, sum_classes" in refused(name="bce", args={"threshold": 0.2})
    assert refused(args={"label_smoothing": 0.1}).startswith("loss.args.label_smoothing: ")
    for bad in (-0.1, 1.0):
        assert refused(name="bce", args={"target_threshold": bad}).startswith("loss: bce: ")
    said = refused(name="bce", args={"target_threshold": "0.2"})
    assert said == "loss.args.target_threshold: '0.2' is not a number or null"


def test_a_loss_of_the_users_is_built_with_its_arguments() -> None:
    """Fails when loss.args do not arrive."""
    config = LossConfig(name="torch.nn:CrossEntropyLoss", args={"reduction": "none", "label_smoothing": 0.1})
    logits, labels = batch(4)
    assert torch.equal(build_loss(config)(logits, labels), build_loss(LossConfig(label_smoothing=0.1))(logits, labels))
    assert isinstance(config, Named)
