"""Slots to batches without processes: which rank runs what, and that a batch depends on its address alone."""

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import augment_of, index_of, message, pack_images, pixels, sample_members, write_tar

from dist_trainer.by_name import Named
from dist_trainer.data.augment import AugmentConfig, CenterCrop, CropConfig, crop_boxes
from dist_trainer.data.batch import Batch, SlotAddress
from dist_trainer.data.config import DataConfig
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.data.order import OrderSpec
from dist_trainer.data.read import Reader
from dist_trainer.data.samples import EvalSamples, TrainSamples
from dist_trainer.data.stream import _EvalAddresses, _TrainAddresses
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig, Duration, Plan, make_plan
from dist_trainer.storage.cache import CacheConfig
from dist_trainer.storage.retry import RetryConfig

CONFIG = DataConfig(train="", val="")
NUM_SAMPLES, NUM_SLOTS = 53, 4  # 53 = 3 * 16 + 5: the last of 4 steps is partly masked


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("slots")
    return ShardIndex.load(pack_images(folder, num_samples=NUM_SAMPLES, num_classes=3, per_shard=14) / FILE_NAME)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return index_of(write_tar(tmp_path_factory.mktemp("eval") / "0.tar", sample_members(1000, size=1)))


def plan_of(world: int, epochs: int = 2) -> Plan:
    batch = BatchConfig(global_batch=16, micro_batch=16 // NUM_SLOTS)
    return make_plan(batch, Duration(epochs, "ep"), world=world, num_samples=NUM_SAMPLES)


def samples_of(index: ShardIndex, config: AugmentConfig | None = None, seed: int = 3) -> TrainSamples:
    augment = augment_of(config or AugmentConfig(flip=0.0), plan_of(1), seed)
    return TrainSamples(index, plan_of(1), OrderSpec(seed=seed, lanes=4, chunk=4, block=5, window=7), augment, CONFIG)


def epoch_of(samples: TrainSamples, epoch: int = 0) -> list[Batch]:
    first = epoch * plan_of(1).steps_per_epoch
    return [samples[SlotAddress(first + n // NUM_SLOTS, n % NUM_SLOTS)] for n in range(4 * NUM_SLOTS)]


def by_id(batches: Sequence[Batch]) -> dict[int, torch.Tensor]:
    """The image of each sample, by its id."""
    return {int(i): image for batch in batches for i, image in zip(batch.ids, batch.images, strict=True)}


def test_every_slot_is_run_by_exactly_one_rank_not_as_a_ghost() -> None:
    """On worlds 1..M: each (step, slot) once, `forwards` runs per rank and step, steps in order, from any start.

    Fails when ghosts are left out, are not marked, or when a start is taken for a number of micro-batches.
    """
    for world in range(1, NUM_SLOTS + 1):
        plan = plan_of(world)
        runs = [list(_TrainAddresses(plan, rank, 0)) for rank in range(world)]
        real = Counter((a.step, a.slot) for addresses in runs for a in addresses if not a.ghost)
        assert real == {(step, slot): 1 for step in range(plan.total_steps) for slot in range(NUM_SLOTS)}
        for rank, addresses in enumerate(runs):
            assert [a.step for a in addresses] == [s for s in range(plan.total_steps) for _ in range(plan.forwards)]
            assert list(_TrainAddresses(plan, rank, 5)) == [a for a in addresses if a.step >= 5]


def test_an_epoch_weighs_every_sample_exactly_once(index: ShardIndex) -> None:
    """53 samples in steps of 16, two epochs: each counts once per epoch, and a step counts as many as the plan says.

    Fails when the tail of the epoch keeps weight 1 on its substitutes, or the epoch is cut at whole steps.
    """
    samples = samples_of(index)
    for epoch in (0, 1):
        batches = epoch_of(samples, epoch)
        counted = torch.cat([batch.ids[batch.weight > 0] for batch in batches])
        assert sorted(counted.tolist()) == list(range(NUM_SAMPLES))
        for step in range(4):
            weights = torch.cat([batch.weight for batch in batches[step * NUM_SLOTS : (step + 1) * NUM_SLOTS]])
            assert weights.shape == (16,)
            assert set(weights.tolist()) <= {0.0, 1.0}
            assert weights.sum() == plan_of(1).num_valid(step)


def test_a_ghost_is_its_slot_without_weight(index: ShardIndex) -> None:
    """Fails when a ghost's weight is that of its slot, or its pixels are blank."""
    samples = samples_of(index)
    real, ghost = samples[SlotAddress(1, 2)], samples[SlotAddress(1, 2, ghost=True)]
    assert ghost.ghost
    assert not real.ghost
    assert ghost.weight.tolist() == [0.0] * 4
    assert torch.equal(ghost.images, real.images)


def test_pixels_and_labels_are_those_of_the_sample_that_the_id_names(index: ShardIndex) -> None:
    """Against Pillow on the bytes in the tar, and the label that stands in them.

    Fails when ids and images are ordered differently within a batch.
    """
    encoded = Reader(index, retry=RetryConfig(), cache=CacheConfig()).read(np.arange(NUM_SAMPLES))
    for batch in epoch_of(samples_of(index)):
        assert batch.problem is None
        assert batch.images.dtype == torch.uint8
        for sample, image, label in zip(batch.ids.tolist(), batch.images, batch.labels.tolist(), strict=True):
            assert np.array_equal(image.numpy(), pixels(encoded[sample]))
            assert label == index.samples["label"][sample]


@pytest.mark.parametrize("num_samples", [7, 255, 256, 257, 1000])
def test_validation_counts_every_sample_once_on_any_world(thousand: ShardIndex, num_samples: int) -> None:
    """Batches of 64 on worlds 1 to 5: the weighted ids are all samples once, on as many batches per rank.

    Fails when the last batch repeats samples at weight 1, or ghosts count.
    """
    part = replace(thousand, samples=thousand.samples[:num_samples], first=np.array([0, num_samples], np.uint64))
    samples = EvalSamples(part, CONFIG, CenterCrop(None, None))
    for size in range(1, 6):
        ranks = [World(rank, size, 0, 1, torch.device("cpu")) for rank in range(size)]
        runs = [[samples[address] for address in _EvalAddresses(-(-num_samples // 64), 64, rank)] for rank in ranks]
        assert len({len(batches) for batches in runs}) == 1
        counted = [batch.ids[batch.weight > 0] for batches in runs for batch in batches]
        assert sorted(torch.cat(counted).tolist()) == list(range(num_samples))
        assert all(len(batch.images) == 64 and batch.problem is None for batches in runs for batch in batches)


AUGMENTED = AugmentConfig(
    crop=CropConfig(size=6), flip=0.5, transforms=[Named(name="RandomRotation", args={"degrees": 30})]
)


def test_a_batch_does_not_depend_on_what_was_asked_for_before(index: ShardIndex) -> None:
    """Forwards, backwards, alone, and after a trip to a loader worker: the same pixels, labels, weights and ids.

    Fails when a draw comes from a running generator, another epoch's order is kept, or a file descriptor is pickled.
    """
    addresses = [SlotAddress(step, slot) for step in range(8) for slot in range(NUM_SLOTS)]
    samples = samples_of(index, AUGMENTED)
    forwards = {address: samples[address] for address in addresses}
    backwards = {address: samples[address] for address in reversed(addresses)}
    travelled = pickle.loads(pickle.dumps(samples))
    for address, batch in forwards.items():
        for other in (backwards[address], samples_of(index, AUGMENTED)[address], travelled[address]):
            for name in ("images", "labels", "weight", "ids"):
                assert torch.equal(getattr(batch, name), getattr(other, name))


def test_the_state_of_torchs_generator_has_no_influence(index: ShardIndex) -> None:
    """Also with a torchvision transform of the user's, which draws from that very generator.

    Fails when Augment does not seed it.
    """
    samples, plain = samples_of(index, AUGMENTED), samples_of(index, replace(AUGMENTED, transforms=[]))
    alone = samples[SlotAddress(2, 1)].images
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert torch.equal(samples[SlotAddress(2, 1)].images, alone)
    assert not torch.equal(plain[SlotAddress(2, 1)].images, alone)  # the rotation does something


def test_flips_mirror_some_images_and_others_in_the_next_epoch(index: ShardIndex) -> None:
    """With flip 0.5 an image is itself or its mirror image; with 0 and 1 it is always the one or the other.

    Fails when flips are keyed without the epoch, or turn images upside down.
    """
    plain = by_id(epoch_of(samples_of(index)))
    flipped = []
    for epoch in (0, 1):
        images = by_id(epoch_of(samples_of(index, AugmentConfig(flip=0.5)), epoch))
        flipped.append({i for i, image in images.items() if torch.equal(image, plain[i].flip(-1))})
        assert all(torch.equal(image, plain[i]) for i, image in images.items() if i not in flipped[-1])
    assert 0 < len(flipped[0]) < NUM_SAMPLES
    assert flipped[0] != flipped[1]
    always = by_id(epoch_of(samples_of(index, AugmentConfig(flip=1.0))))
    assert all(torch.equal(image, plain[i].flip(-1)) for i, image in always.items())


def test_crops_are_drawn_per_sample_epoch_and_seed(index: ShardIndex) -> None:
    """The same sample is cut another way in another epoch and under another seed, most of the time.

    Fails when the key of an augmentation leaves out the epoch, the seed or the sample.
    """
    config = AugmentConfig(crop=CropConfig(size=6), flip=0.0)
    first = by_id(epoch_of(samples_of(index, config)))
    next_epoch = by_id(epoch_of(samples_of(index, config), 1))
    other_seed = by_id(epoch_of(samples_of(index, config, seed=4)))
    for other in (next_epoch, other_seed):
        assert sum(torch.equal(first[i], other[i]) for i in first) < NUM_SAMPLES // 4
    keys = augment_of(config, seed=3).keys(np.zeros(20, np.int64), np.arange(20), 0)
    assert len({tuple(box) for box in crop_boxes(CropConfig(size=6), np.full(20, 12), np.full(20, 10), keys)}) > 10


def test_augmentations_that_cannot_be_are_refused_by_key() -> None:
    """Fails when torchvision finds out, at the first image, in a loader worker."""

    def refused(**config: Any) -> str:
        with pytest.raises(UserError) as caught:
            augment_of(AugmentConfig(**config))
        return message(caught)

    assert refused(flip=1.5).startswith("augment.flip: 1.5")
    assert refused(crop=CropConfig(size=0)).startswith("augment.crop.size: 0")
    assert refused(crop=CropConfig(size=8, scale=(0.5, 0.1))).startswith("augment.crop.scale: ")
    assert refused(crop=CropConfig(size=8, ratio=(2.0, 1.0))).startswith("augment.crop.ratio: ")
    text = refused(transforms=[Named(name="RandomErasing"), Named(name="RandomRotatoin")])
    assert text.startswith("augment.transforms[1].name: 'RandomRotatoin'")
    assert "did you mean 'RandomRotation'?" in text
    text = refused(transforms=[Named(name="RandomRotation", args={"degres": 30})])
    assert text.startswith("augment.transforms[0].args.degres: RandomRotation takes no degres; did you mean 'degrees'?")


def test_a_transform_that_does_not_give_uint8_is_a_problem(index: ShardIndex) -> None:
    """Floats in [0, 1] would become zeros and ones. Fails when a batch casts what it is given."""
    config = AugmentConfig(flip=0.0, transforms=[Named(name="ToDtype", args={"dtype": torch.float32, "scale": True})])
    problem = samples_of(index, config)[SlotAddress(0, 0)].problem
    assert problem is not None
    assert "uint8" in problem
