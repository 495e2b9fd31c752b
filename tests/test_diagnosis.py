"""What accuracy on training samples says, and that these are the samples and pixels that it claims."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import index_of, sample_members, write_tar

from dist_trainer.comm import World
from dist_trainer.data.augment import CenterCrop
from dist_trainer.data.config import DataConfig
from dist_trainer.data.samples import drawn
from dist_trainer.data.stream import EvalStream
from dist_trainer.tricks.diagnosis import diagnose


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        (0.99, 0.70, "overfitting"),
        (0.91, 0.70, "overfitting"),
        (0.89, 0.70, "healthy"),
        (0.74, 0.70, "healthy"),
        (0.72, 0.70, "underfitting"),
        (0.65, 0.70, "underfitting"),
        (0.50, 0.50, "underfitting"),
        (0.995, 0.994, None),
    ],
)
def test_the_verdict_over_known_accuracies(train: float, val: float, expected: str | None) -> None:
    """Two thirds and a tenth of the validation error, by hand. Fails when the gap is taken absolutely."""
    assert diagnose(train, val, 5000, 10_000) == expected


def test_few_samples_give_no_verdict() -> None:
    """Deviation of 100 against 100 at 60%: 6.9 points, of an error of 40. Fails when any number will do."""
    assert diagnose(0.6, 0.6, 100, 100) is None
    assert diagnose(0.6, 0.6, 2000, 2000) == "underfitting"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_slice_is_each_chosen_sample_once_as_evaluation_sees_it(tmp_path: Path, size: int) -> None:
    """On any number of ranks. Fails when a sample of the draw is missed, doubled, augmented, or another than drawn."""
    write_tar(tmp_path / "0.tar", sample_members(24))
    index = index_of(tmp_path / "0.tar")
    config = DataConfig(train="", val="", workers=0)
    chosen, transform = drawn(index, 10, seed=3), CenterCrop(None, 6)
    assert len(set(chosen.tolist())) == 10
    images = {}
    for batch in EvalStream(index, config, transform, 24, World(0, 1, 0, 1, torch.device("cpu"))):
        images = dict(zip(batch.ids.tolist(), batch.images, strict=True))
    seen = []
    for rank in range(size):
        stream = EvalStream(index, config, transform, 4, World(rank, size, rank, size, torch.device("cpu")), chosen)
        assert stream.num_samples == 10
        for batch in stream:
            if batch.ghost:
                continue
            counted = np.flatnonzero(batch.weight.numpy())
            seen += batch.ids[counted].tolist()
            for place in counted:
                assert torch.equal(batch.images[place], images[int(batch.ids[place])])
                assert batch.labels[place] == index.samples["label"][batch.ids[place]]
    assert sorted(seen) == sorted(chosen.tolist())
    assert seen != sorted(seen)
