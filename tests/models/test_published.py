"""Published weights: how images are prepared for them, and `eval --pretrained`."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models as torchvision_models
from helpers import write_tar
from PIL import Image
from pretrained_weights import ALONE, in_torch_cache, refused, said_by
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from dist_trainer.commands.eval_published import compare, order_notes, verdict
from dist_trainer.commands.main import dispatch
from dist_trainer.config.preprocess import resolve_preprocess
from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment import AugmentConfig, CenterCrop, CropConfig
from dist_trainer.data.config import DataConfig
from dist_trainer.data.decode import decode, resize
from dist_trainer.engine.evaluate import EvalConfig
from dist_trainer.log.console import Terminal
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.models.published import described

pytestmark = pytest.mark.usefixtures("process_group", "offline")


# How images are prepared


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("torchvision/resnet50", "IMAGENET1K_V2"),  # 232, bilinear
        ("torchvision/swin_t", "IMAGENET1K_V1"),  # bicubic
        ("timm/resnet18", "a1_in1k"),  # 235, bicubic
        ("timm/resnet18", "tv_in1k"),  # 256, bilinear
        ("timm/vit_tiny_patch16_224", "augreg_in21k_ft_in1k"),  # 224 / .9 = 248.9; mean .5
        ("timm/test_vit", "r160_in1k"),
    ],
)
def test_photographs_are_evaluated_as_the_library_prepares_them(name: str, tag: str, photographs: list[Path]) -> None:
    """Against torchvision's presets and timm's create_transform on PIL images: at most 2 levels of 255 beside, and
    fewer than one value in a hundred beside at all (PIL resizes in its own rounding).

    Fails when the interpolation is the other one, not antialiased, or the size is rounded instead of cut.
    """
    config = resolve_preprocess(
        TrainConfig(data=DataConfig(train="", val="", preprocess="model"), model=ModelConfig(name=name, pretrained=tag))
    )
    library, _, model = name.partition("/")
    if library == "torchvision":
        peer = torchvision_models.get_model_weights(model)[tag].transforms()
    else:
        peer = create_transform(**resolve_model_data_config(timm.create_model(f"{model}.{tag}")))
    ours = CenterCrop(config.eval.resize, config.eval.crop, config.eval.interpolation)
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (config.data.mean, config.data.std))
    for path in photographs[::3]:
        with Image.open(path) as image:
            truth = peer(image.convert("RGB"))
        levels = (((ours(decode(path.read_bytes(), 3)) / 255 - mean) / std - truth) * std * 255).abs()
        assert levels.max() <= 2.01
        assert (levels > 0.01).float().mean() < 0.01
    assert config.augment.crop is not None
    assert (config.augment.crop.size, config.augment.crop.interpolation) == (
        config.eval.crop,
        config.eval.interpolation,
    )


def test_the_training_crop_is_resized_as_torchvision_does(photographs: list[Path]) -> None:
    """Bit for bit, bicubic and bilinear, which differ. Fails when the crop's interpolation is dropped on the way."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as peer

    image = decode(photographs[0].read_bytes(), 3)[:, :300, :200]
    for mode in ("bilinear", "bicubic"):
        truth = peer.resize(image, [224, 224], interpolation=InterpolationMode(mode), antialias=True)
        assert torch.equal(resize(image, (224, 224), mode), truth)
    assert not torch.equal(resize(image, (224, 224), "bicubic"), resize(image, (224, 224)))


def filled(pretrained: Any = None, name: str = "timm/resnet18", **data: Any) -> TrainConfig:
    config = DataConfig(train="", val="", **data)
    return resolve_preprocess(TrainConfig(data=config, model=ModelConfig(name=name, pretrained=pretrained)))


def test_only_what_is_left_open_is_filled() -> None:
    """auto is the model's with published weights alone; a given key wins; filling twice changes nothing.

    Fails when a default beats a key, or a file of one's own is taken for published weights.
    """
    plain = filled()
    assert (plain.data.mean, plain.data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (plain.eval.resize, plain.eval.crop, plain.eval.interpolation) == (None, None, "bilinear")
    assert plain.augment.crop is None
    assert filled("weights.pth").eval == filled(True, preprocess="imagenet").eval == plain.eval
    model = filled(True)
    assert (model.eval.resize, model.eval.crop, model.eval.interpolation) == (235, 224, "bicubic")
    assert filled("weights.pth", preprocess="model").eval == filled(preprocess="model").eval == model.eval
    assert filled("tv_in1k").eval.interpolation == "bilinear"
    assert filled(True, name="resnet50").eval.resize == 232  # a short name: torchvision's second recipe
    assert filled(True, name="timm/vit_tiny_patch16_224").data.mean == [0.5, 0.5, 0.5]
    own = TrainConfig(
        data=DataConfig(train="", val="", mean=[0.1, 0.2, 0.3]),
        model=ModelConfig(name="timm/resnet18", pretrained=True),
        eval=EvalConfig(resize=320, interpolation="bilinear"),
        augment=AugmentConfig(crop=CropConfig(size=160)),
    )
    mine = resolve_preprocess(own)
    assert (mine.data.mean, mine.data.std) == ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225])
    assert (mine.eval.resize, mine.eval.crop, mine.eval.interpolation) == (320, 224, "bilinear")
    assert mine.augment.crop == CropConfig(size=160, interpolation="bicubic")
    for config in (plain, model, mine):
        assert resolve_preprocess(config) == config


def test_preprocessing_that_is_not_offered_is_refused() -> None:
    """timm squashes the images of some weights. Fails when they are cropped instead, in silence."""
    assert "crop_mode squash" in refused(filled, True, "timm/convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384")
    assert "only timm/ and torchvision/" in refused(filled, None, "small_resnet", preprocess="model")


def test_each_published_figure_is_torchvisions_own() -> None:
    """By its documentation: 69.758 and 80.858. Fails when percent are taken for fractions, or the tag is ignored."""
    resnet18, resnet50 = (described(ModelConfig(name=f"torchvision/resnet{n}")) for n in (18, 50))
    assert (resnet18.top1, resnet50.top1) == (pytest.approx(0.69758), pytest.approx(0.80858))
    assert described(ModelConfig(name="torchvision/resnet50", pretrained="IMAGENET1K_V1")).top1 == pytest.approx(0.7613)
    assert described(ModelConfig(name="timm/resnet18")).top1 is None


def labelled(folder: Path, photographs: list[Path], labels: list[int], names: list[str]) -> Path:
    """A tar of the photographs under these labels."""
    folder.mkdir()
    members = []
    for number, (label, path) in enumerate(zip(labels, photographs, strict=True)):
        members += [(f"{number:03d}.cls", str(label).encode()), (f"{number:03d}.jpg", path.read_bytes())]
    write_tar(folder / "0.tar", members)
    (folder / "classes.txt").write_text("\n".join(names))
    return folder


def test_eval_pretrained_scores_the_published_weights_with_their_own_preprocessing(
    tmp_path: Path, photographs: list[Path]
) -> None:
    """Labels are what torchvision's own model and preset say of photographs: all are right; and by each wrong number,
    none. The same from a file, and whatever a config says of sizes.

    Fails when images are prepared or weights are loaded in another way, or the verdict does not follow.
    """
    model = build_model(ModelConfig(name="torchvision/squeezenet1_1"), 1000, seed=0).eval()
    weights = torchvision_models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    images = []
    for path in photographs:
        with Image.open(path) as image:
            images.append(weights.transforms()(image.convert("RGB")))
    last = model.classifier[1]
    with torch.no_grad():  # a head whose answers differ from image to image
        nn.init.normal_(last.weight, generator=torch.manual_seed(0))
        last.bias.sub_(last(model.features(torch.stack(images))).mean((0, 2, 3)))
        labels = model(torch.stack(images)).argmax(1).tolist()
    in_torch_cache(weights, model.state_dict(), tmp_path)
    assert len(set(labels)) > len(labels) / 2
    wnids = [f"n{number:08d}" for number in range(1000)]
    right = labelled(tmp_path / "right", photographs, labels, wnids)
    wrong = labelled(tmp_path / "wrong", photographs, [(label + 1) % 1000 for label in labels], wnids[::-1])
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    (tmp_path / "config.yaml").write_text(f"data: {{train: {wrong}, val: {wrong}}}\neval: {{resize: 40, crop: 32}}\n")
    small = ["--data.workers=0", "--eval.batch=12"]
    plain = ["eval", "--pretrained", "torchvision/squeezenet1_1", f"--data.val={right}", *small]
    other = ["eval", str(tmp_path / "config.yaml"), "--pretrained=torchvision/squeezenet1_1.IMAGENET1K_V1",
             f"--weights={tmp_path / 'mine.pth'}", *small]  # fmt: skip
    again = [*other, f"--data.val={right}", f"--data.train={right}"]
    said = said_by(
        f"run({plain}); print('#'); run({other}); print('#'); run({again})", tmp_path, TORCH_HOME=f"{tmp_path}/torch"
    )
    first, second, third = (" ".join(part.split()) for part in said.split("#"))
    assert f"torchvision/squeezenet1_1.IMAGENET1K_V1: top-1 100.00% ({len(labels)}/{len(labels)})" in first
    assert "published: top-1 58.18% on ImageNet-1k; difference +41.82%" in first
    assert "verdict: above" in first
    assert "warning" not in first
    assert f"{tmp_path / 'mine.pth'}: top-1 0.00%" in second
    assert "verdict: as good as chance (0.1%)" in second
    assert "not sorted" in second
    assert f"{tmp_path / 'mine.pth'}: top-1 100.00%" in third


def test_eval_pretrained_refuses_what_it_cannot_compare(fashion: list[str], tmp_path: Path) -> None:
    """Fails when 10 classes are scored by 1,000 logits, or a tag that is none becomes the default one."""
    assert "timm/MODEL or torchvision/MODEL" in refused(dispatch, ["eval", "--pretrained", "resnet18", *fashion])
    assert refused(dispatch, ["eval", "--pretrained=timm/resnet18"]).startswith("data.val: ")
    data = {split: argument.partition("=")[2] for split, argument in zip(("train", "val"), fashion, strict=True)}
    for pretrained, said in (("zz", "has no weights 'zz', but r160_in1k"), (True, "data.val: has 10 classes")):
        model = ModelConfig(name="timm/test_vit", pretrained=pretrained)
        config = resolve_preprocess(TrainConfig(data=DataConfig(**data), model=model))
        assert said in refused(compare, config, None, ALONE, Terminal(active=False))


@pytest.mark.parametrize(
    ("ours", "published", "samples", "said"),
    [
        (0.8071, 0.80858, 50_000, "as published"),
        (0.785, 0.80858, 50_000, "below the published"),
        (0.785, 0.80858, 500, "as published"),  # three standard deviations are 5.5 points
        (0.0012, 0.80858, 50_000, "as good as chance"),
        (0.87, 0.80858, 50_000, "above the published"),
        (0.0009, None, 50_000, "as good as chance"),
        (0.71, None, 50_000, "far better than chance"),
    ],
)
def test_the_verdict_follows_from_the_two_accuracies(
    ours: float, published: float | None, samples: int, said: str
) -> None:
    """Fails when a difference within the noise of so few samples is called one, or chance is not seen."""
    assert verdict(ours, published, samples, 1000).startswith(f"verdict: {said}")


def test_the_order_of_the_classes_is_held_against_sorted_wordnet_ids() -> None:
    """Fails when unsorted ids pass, or numbers are taken for a proof."""
    assert order_notes(["n01440764", "n01443537"]) == []
    assert "not sorted" in order_notes(["n01443537", "n01440764"])[0]
    assert "have no names" in order_notes(["0", "1", "2"])[0]
    assert "are no WordNet ids" in order_notes(["goldfish", "tench"])[0]
