"""Augmentation of single images: torchvision's own results, counted pixels, the run's clock, and what is refused."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import augment_of, index_of, message, sample_members, write_tar
from PIL import Image
from torchvision.transforms import v2

from dist_trainer.by_name import Named
from dist_trainer.commands.main import dispatch
from dist_trainer.data.augment import AugmentConfig, CropConfig
from dist_trainer.data.augment.crop import Sizes
from dist_trainer.data.augment.cutout import Cutout
from dist_trainer.data.augment.grid_mask import GridMask
from dist_trainer.data.augment.hide_and_seek import HideAndSeek
from dist_trainer.data.augment.random_erasing import RandomErasing
from dist_trainer.data.config import DataConfig
from dist_trainer.data.decode import decode
from dist_trainer.data.read import Reader
from dist_trainer.data.samples import choose_samples
from dist_trainer.data.stream import TrainStream
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig, Duration, Plan, make_plan
from dist_trainer.storage.cache import CacheConfig
from dist_trainer.storage.retry import RetryConfig

MEAN = [124, 116, 104]  # 255 * (0.485, 0.456, 0.406), rounded
FILL = torch.tensor(MEAN, dtype=torch.uint8)[:, None, None]
TRICKS: dict[str, dict[str, Any]] = {
    "color_jitter": {"color_jitter": 0.4},
    "autoaugment": {"policy": Named(name="autoaugment")},
    "randaugment": {"policy": Named(name="randaugment")},
    "trivialaugment": {"policy": Named(name="trivialaugment")},
    "random_erasing": {"erase": Named(name="random_erasing", args={"probability": 1.0})},
    "cutout": {"erase": Named(name="cutout")},
    "grid_mask": {"erase": Named(name="grid_mask")},
    "hide_and_seek": {"erase": Named(name="hide_and_seek")},
}


def picture(channels: int = 3, side: int = 64) -> torch.Tensor:
    """Smooth, with no pixel of the filling colour: 0, 1 or 2 modulo 5 where that is 4."""
    x = torch.arange(side)
    planes = [(x[:, None] * 2 + x[None] * (c + 1)) % 50 * 5 + c for c in range(channels)]
    return torch.stack(planes).to(torch.uint8)


def plan_of(epochs: int) -> Plan:
    return make_plan(BatchConfig(global_batch=8, micro_batch=4), Duration(epochs, "ep"), world=1, num_samples=80)


def blank(side: int) -> torch.Tensor:
    return torch.zeros((3, side, side), dtype=torch.uint8)


def filled(image: torch.Tensor) -> torch.Tensor:
    """Which pixels (bool [H, W]) hold the filling colour."""
    return (image == FILL).all(0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("trick", TRICKS)
def test_each_trick_changes_images_and_leaves_the_decoded_one_alone(trick: str, channels: int) -> None:
    """Most of 20 draws, grey or in colour, uint8 of the same shape. Fails when a key is not read."""
    mean = [0.485, 0.456, 0.406][:channels]
    augment, image = augment_of(AugmentConfig(**TRICKS[trick]), mean=mean), picture(channels)
    before, changed = image.clone(), 0
    for key in range(20):
        found = augment.transform(image, key, 50)
        assert (found.dtype, found.shape) == (torch.uint8, image.shape)
        assert torch.equal(found, augment.transform(image, key, 50)), "a pure function of the key"
        changed += not torch.equal(found, image)
    assert changed >= 10
    assert torch.equal(image, before)


GOLDEN = {
    "color_jitter": "283275d76bcebe46",
    "autoaugment": "76b872de276edffe",
    "randaugment": "18d33ea8750f9ede",
    "trivialaugment": "0013ef48628fd5ef",
    "random_erasing": "65e4e667109b7b26",
    "cutout": "937b23901d9e92f9",
    "grid_mask": "cafd5654b1814f34",
    "hide_and_seek": "4ad6250f43d1f6b2",
}


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("autoaugment", v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=MEAN)),
        ("randaugment", v2.RandAugment(fill=MEAN)),
        ("trivialaugment", v2.TrivialAugmentWide(fill=MEAN)),
        ("augmix", v2.AugMix(fill=MEAN)),
    ],
)
def test_policies_are_torchvisions_on_pil_images(name: str, theirs: Any) -> None:
    """Bit for bit under the same seed. Fails when another fill, order or conversion comes in."""
    augment, image = augment_of(AugmentConfig(policy=Named(name=name))), picture()
    for seed in range(30):
        torch.manual_seed(seed)
        expected = np.asarray(theirs(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())))
        assert np.array_equal(augment.transform(image, seed, 0).permute(1, 2, 0).numpy(), expected)


def test_random_erasing_is_torchvisions_with_the_mean() -> None:
    theirs = v2.RandomErasing(0.5, (0.02, 0.4), (0.3, 1 / 0.3), MEAN)
    ours = RandomErasing(FILL)
    for seed in range(30):
        torch.manual_seed(seed)
        expected = theirs(picture())
        torch.manual_seed(seed)
        assert torch.equal(ours(picture(), 0.0), expected)


@pytest.mark.parametrize("side", [224, 56])
@pytest.mark.parametrize("mode", [0, 1])
def test_grid_mask_keeps_the_pixels_of_its_formula(mode: int, side: int) -> None:
    """Mode 0 keeps (1 - l / d)^2, mode 1 the rest, l = int(d / 2 + 0.5), over the drawn d.

    Within 4 standard errors. Fails when modes are exchanged, a border is left out, or the period does not scale.
    """
    torch.manual_seed(0)
    low, high = 96 * side // 224, side
    shares = [1 - float(filled(GridMask(FILL, mode=mode)(blank(side), 0.0)).float().mean()) for _ in range(300)]
    inside = np.mean([(1 - int(d * 0.5 + 0.5) / d) ** 2 for d in range(low, high)])
    error = np.std(shares) / len(shares) ** 0.5
    assert abs(np.mean(shares) - (1 - inside if mode else inside)) < 4 * error


def test_grid_masks_squares_are_regular() -> None:
    """With one period, rows and columns of the mask repeat after d. Fails when the grid begins anew somewhere."""
    torch.manual_seed(3)
    hidden = filled(GridMask(FILL, d_min=40, d_max=41)(blank(224), 0.0))
    assert torch.equal(hidden[40:], hidden[:-40])
    assert torch.equal(hidden[:, 40:], hidden[:, :-40])
    assert hidden[:40, :40].sum() == 20 * 20


def test_grid_masks_probability_grows_with_the_run() -> None:
    """p min(1, epoch / ramp), as the share of 2,000 images changed. Fails when the clock stands still."""
    augment = augment_of(
        AugmentConfig(erase=Named(name="grid_mask", args={"probability": 0.8, "ramp": "80%"})), plan_of(10)
    )
    for step, expected in ((0, 0.0), (20, 0.2), (40, 0.4), (80, 0.8), (99, 0.8)):
        changed = [bool(filled(augment.transform(blank(28), key, step)).any()) for key in range(2000)]
        assert abs(np.mean(changed) - expected) <= 4 * (expected * (1 - expected) / 2000) ** 0.5


def test_hide_and_seek_keeps_the_share_of_its_formula_in_whole_cells() -> None:
    """1 - 0.5 * 4/5 of the pixels; each cell is hidden wholly or not. Fails on images in HWC, or without the 0."""
    torch.manual_seed(0)
    trick = HideAndSeek(FILL)
    shares = [1 - float(filled(trick(blank(224), 0.0)).float().mean()) for _ in range(500)]
    assert abs(np.mean(shares) - 0.6) < 4 * np.std(shares) / len(shares) ** 0.5
    cells = filled(HideAndSeek(FILL, sizes=[56])(blank(224), 0.0)).reshape(4, 56, 4, 56).transpose(1, 2).flatten(2)
    assert torch.equal(cells.all(2), cells.any(2))
    assert 0 < cells.all(2).sum() < 16


def test_cutout_fills_a_clipped_square() -> None:
    """Mean of clipped lengths by counting all centres; each image has one box. Fails when the box is moved inside."""
    torch.manual_seed(0)
    covered = np.mean([min(c + 56, 224) - max(c - 56, 0) for c in range(224)]) / 224
    shares = []
    for _ in range(500):
        hidden = filled(Cutout(FILL)(blank(224), 0.0))
        rows, columns = hidden.any(1), hidden.any(0)
        assert torch.equal(hidden, rows[:, None] & columns)
        shares.append(float(hidden.float().mean()))
    assert abs(np.mean(shares) - covered**2) < 4 * np.std(shares) / len(shares) ** 0.5


def test_sizes_grow_as_written_by_hand() -> None:
    """FFCV's 16 epochs: 160 until epoch 11, 192 from 13 on. Fails when the line begins or ends elsewhere."""
    sizes = Sizes(CropConfig(size=192, start_size=160, grow=("11ep", "13ep")), plan_of(16))
    assert [sizes.at(epoch) for epoch in range(16)] == [160] * 12 + [192] * 4
    fine = Sizes(CropConfig(size=224, start_size=128, grow=("20%", "60%")), plan_of(10))
    assert [fine.at(epoch) for epoch in range(10)] == [128, 128, 128, 160, 192, 192, 224, 224, 224, 224]
    assert fine.all == {128, 160, 192, 224}
    assert Sizes(CropConfig(size=100), plan_of(10)).all == {100}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_clock_reaches_loader_processes(tmp_path: Any, workers: int) -> None:
    """Sizes and GridMask's ramp by the step, from any step on, in this process or another: the same pixels.

    Fails when a worker has its own clock (PaddleClas's GridMask never fires), or a resumed run begins it anew.
    """
    write_tar(tmp_path / "0.tar", sample_members(80, size=16))
    index, plan = index_of(tmp_path / "0.tar"), plan_of(10)
    config = DataConfig(train="", val="", workers=workers)
    crop = CropConfig(size=16, start_size=8, grow=("20%", "60%"), multiple_of=4)
    erase = Named(name="grid_mask", args={"ramp": "80%"})
    augment = augment_of(AugmentConfig(crop=crop, erase=erase), plan, mean=[0.0, 0.0, 0.0])
    stream = TrainStream(index, plan, config, augment, "window", 0, World(0, 1, 0, 1, torch.device("cpu")))
    seen = {step: [batch.images for batch in batches] for step, batches in stream.steps(start=18)}
    assert [len(seen[step][0][0, 0]) for step in (18, 29, 30, 40, 49, 60, 99)] == [8, 8, 8, 12, 12, 16, 16]
    black = [float(torch.cat([(i == 0).all(1).flatten() for i in seen[step]]).float().mean()) for step in (18, 40, 90)]
    assert black[0] < black[1] < black[2]
    digest = hashlib.sha256(b"".join(each.numpy().tobytes() for step in (18, 40, 90) for each in seen[step]))
    assert digest.hexdigest()[:16] == CLOCK


CLOCK = "e87750100b59a1ea"


@pytest.mark.parametrize("trick", TRICKS)
def test_augmentation_does_not_change_between_releases(trick: str) -> None:
    """A pinned digest of 5 draws. When torchvision changes a policy this says so: then a new run is another run."""
    augment = augment_of(AugmentConfig(**TRICKS[trick]))
    digest = hashlib.sha256(
        b"".join(augment.transform(picture(), k, 50).contiguous().numpy().tobytes() for k in range(5))
    )
    assert digest.hexdigest()[:16] == GOLDEN[trick]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"color_jitter": 1.5}, "augment.color_jitter: 1.5 is not in [0, 1)"),
        ({"policy": Named(name="autoagument")}, "augment.policy.name: 'autoagument' is not a built-in policy; did you"),
        ({"policy": Named(name="autoaugment", args={"policy": "imagnet"})}, "augment.policy: autoaugment: 'imagnet'"),
        ({"policy": Named(name="randaugment", args={"ops": 2})}, "augment.policy.args.ops: randaugment takes no "),
        (
            {"erase": Named(name="gridmask")},
            "augment.erase.name: 'gridmask' is not one of none, random_erasing, cutout",
        ),
        ({"erase": Named(name="cutout", args={"size": 3})}, "augment.erase.args.size: cutout takes no "),
        (
            {"erase": Named(name="cutout", args={"fill": "noise"})},
            "augment.erase.args.fill: 'noise': erased pixels",
        ),
        ({"erase": Named(name="cutout", args={"length": 0})}, "augment.erase.args: cutout: length 0 is not positive"),
        ({"erase": Named(name="cutout", args={"probability": 2})}, "augment.erase.args.probability: 2 is not a prob"),
        ({"erase": Named(name="grid_mask", args={"mode": 2})}, "augment.erase.args: grid_mask: mode 2 is neither"),
        ({"erase": Named(name="grid_mask", args={"ramp": 240})}, "augment.erase.args.ramp: "),
        (
            {"erase": Named(name="random_erasing", args={"value": "random"})},
            "augment.erase.args.value: 'random': erased",
        ),
        ({"erase": Named(name="hide_and_seek", args={"sizes": []})}, "augment.erase.args: hide_and_seek: sizes []"),
        ({"crop": CropConfig(size=8, scale=(0.2, 1.1))}, "augment.crop.scale: [0.2, 1.1] is not an ascending pair in"),
        ({"crop": CropConfig(size=8, start_size=9)}, "augment.crop.start_size: 9 is larger than augment.crop.size, 8"),
        ({"crop": CropConfig(size=8, start_size=4, grow=("60%", "20%"))}, "augment.crop.grow: 60% comes after 20%"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_image(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        augment_of(AugmentConfig(**config))
    assert message(caught).startswith(said)


def test_the_picture_shows_the_pixels_that_batches_hold(tmp_path: Path) -> None:
    """`augment` on 12-pixel images, zoomed 8 times: the first column is the evaluation's, the last the last epoch's.

    Fails when the grid draws by another path than training, or at another clock.
    """
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "0.tar", sample_members(80, size=12))
    argv = [
        f"--data.train={tmp_path / 'set'}",
        f"--data.val={tmp_path / 'set'}",
        "--model.name=resnet18",
        "--lr.base=0.1",
    ]
    argv += ["--batch.global_batch=8", "--batch.micro_batch=4", "--duration=10ep", "--augment.flip=0"]
    argv += ["--augment.erase={name: grid_mask}", "--samples=3", f"--out={tmp_path / 'grid.png'}"]
    assert dispatch(["augment", *argv]) == 0
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    index = index_of(tmp_path / "set" / "0.tar")
    augment = augment_of(AugmentConfig(flip=0.0, erase=Named(name="grid_mask")), plan_of(10))
    for row, sample in enumerate(choose_samples(index, 3, 0)):
        image = decode(Reader(index, retry=RetryConfig(), cache=CacheConfig()).read(np.array([sample]))[0], 3)
        (key,) = augment.keys(np.array([9]), np.array([sample]), 0).tolist()
        for column, expected in ((0, image), (6, augment.transform(image, key, 99))):
            top, left = 14 + row * (96 + 18), 4 + column * 100
            found = sheet[top : top + 96 : 8, left : left + 96 : 8]
            assert np.array_equal(found, expected.permute(1, 2, 0).numpy())
