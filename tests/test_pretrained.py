"""Weights to begin with: every kind of file, what is left out, what is refused, and how images are prepared."""

import hashlib
import io
import json
import math
import pickle
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
import torch.distributed as dist
import torchvision.models as torchvision_models
from faulty_fs import http_server
from helpers import message, pack_images, write_tar
from PIL import Image
from running import TINY, Session, tensors, torchrun
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.distributed import HashStore
from torch.optim.swa_utils import AveragedModel

from dist_trainer.commands.eval_published import compare, order_notes, verdict
from dist_trainer.commands.main import dispatch
from dist_trainer.config.preprocess import resolve_preprocess
from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment import AugmentConfig, CenterCrop, CropConfig
from dist_trainer.data.config import DataConfig
from dist_trainer.data.decode import decode, resize
from dist_trainer.distributed.world import World
from dist_trainer.engine.evaluate import EvalConfig
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.models.pretrained import LoadReport, advised_rate, classifiers_of, load_pretrained
from dist_trainer.models.published import described
from dist_trainer.run_folder import checkpoint
from dist_trainer.storage.storage import Storage

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def _group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cache but an empty one, and no network: HTTPS goes to a port where nothing listens."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve JPEGs of 400 x 427: pieces of scikit-learn's two photographs, their colours exchanged in every way."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, pixels in enumerate(load_sample_images().images):
        for left, colours in zip(range(0, 240, 40), permutations(range(3)), strict=True):
            piece = Image.fromarray(pixels[:, left : left + 400, colours])
            piece.save(folder / f"{number}_{left:03d}.jpg", quality=95)
    return sorted(folder.iterdir())


def trained(name: str, classes: int = 1000, **args: Any) -> nn.Module:
    """A model whose every weight and statistic is random, and not what `build_model` draws."""
    model = build_model(ModelConfig(name=name, args=args), classes, seed=77)
    generator = torch.Generator().manual_seed(5)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator))
    return model


def begin(
    place: object, name: str, classes: int = 7, storage: Storage | None = None, **args: Any
) -> tuple[State, LoadReport]:
    """(state, report) of a fresh model that begins with what is at `place`."""
    config = ModelConfig(name=name, args=args, pretrained=place if place is True else str(place))
    model = build_model(config, classes, seed=0)
    loaded = load_pretrained(config, storage or Storage(), model, ALONE)
    return model.state_dict(), loaded


def refused(call: Callable[..., object], *args: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **more)
    return message(caught)


# Files


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def timm_saver(model: nn.Module, path: Path) -> None:
    """As timm's train.py does: argparse's Namespace, an optimizer, and an average, whose weights are the model's."""
    other = timm.create_model(model.pretrained_cfg["architecture"])
    optimizer = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    args = Namespace(model="test_vit", lr=0.1, mean=None, aa="rand-m9")
    average = timm.utils.ModelEmaV3(model)
    (path.parent / "saver").mkdir()
    saver = timm.utils.CheckpointSaver(other, optimizer, args, average, checkpoint_dir=str(path.parent / "saver"))
    saver.save_checkpoint(3, metric=0.5)
    shutil.copy(path.parent / "saver" / "last.pth.tar", path)


def torchvision_reference(model: nn.Module, path: Path) -> None:
    """As torchvision's references/classification/train.py does."""
    other = AveragedModel(model, use_buffers=True)
    torch.save(
        {"model": prefixed(model.state_dict(), "x."), "model_ema": other.state_dict(), "args": Namespace(a=1)}, path
    )


def run_folder(model: nn.Module, path: Path) -> None:
    """The best weights, and later ones that were worse."""
    checkpoint.save(path / "best", 9, {"model": model.state_dict()}, {}, keep=1)
    worse = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    checkpoint.save(path / "checkpoints", 12, {"model": worse}, {}, keep=1)


FORMATS: dict[str, Callable[[nn.Module, Path], object]] = {
    "safetensors": lambda model, path: save_file(model.state_dict(), path),
    "torch": lambda model, path: torch.save(model.state_dict(), path),
    "old torch": lambda model, path: torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False),
    "state_dict": lambda model, path: torch.save({"epoch": 3, "state_dict": model.state_dict()}, path),
    "model": lambda model, path: torch.save({"model": model.state_dict(), "best": 0.7, "model_ema": None}, path),
    "nested": lambda model, path: torch.save({"model": {"state_dict": model.state_dict()}}, path),
    "DDP": lambda model, path: torch.save({"model": prefixed(model.state_dict(), "module.")}, path),
    "compiled": lambda model, path: torch.save(torch.compile(model).state_dict(), path),
    "both": lambda model, path: save_file(prefixed(model.state_dict(), "module._orig_mod."), path),
    "checkpoint": lambda model, path: checkpoint.write(path, {"model": model.state_dict(), "optim": {}}, {}),
    "run folder": run_folder,
    "torchvision's": torchvision_reference,
    "timm's": timm_saver,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_of_file_gives_its_weights_bit_for_bit_but_the_classifier(kind: str, tmp_path: Path) -> None:
    """1,000 classes to 7: the head is dropped, whole, and listed; all else is bit-equal; nothing else is missing.

    Fails when a wrapper or a prefix stays, the raw weights are taken before the average, a part of the head is loaded,
    or Namespace is not let by.
    """
    source, path = trained("timm/test_vit"), tmp_path / "weights.anything"
    FORMATS[kind](source, path)
    state, loaded = begin(path, "timm/test_vit")
    truth, fresh = source.state_dict(), build_model(ModelConfig(name="timm/test_vit"), 7, seed=0).state_dict()
    for name, value in state.items():
        assert torch.equal(value, fresh[name] if name.startswith("head.") else truth[name]), name
    assert loaded.dropped == ["head.weight [1000, 64] for [7, 64]", "head.bias [1000] for [7]"]
    assert loaded.missing == []
    assert loaded.unexpected == (["n_averaged"] if kind == "torchvision's" else [])
    assert loaded.loaded == len(truth) - 2 == loaded.num_tensors - 2
    assert loaded.lines()[1] == "  dropped: head.weight [1000, 64] for [7, 64]"


def test_as_many_classes_keep_the_classifier(tmp_path: Path) -> None:
    """Half precision becomes float32. Fails when the head is dropped always, or the model takes the file's type."""
    source = trained("torchvision/squeezenet1_1", 7)
    save_file({name: value.half() for name, value in source.state_dict().items()}, tmp_path / "a")
    state, loaded = begin(tmp_path / "a", "torchvision/squeezenet1_1")
    assert (loaded.dropped, loaded.missing, loaded.share) == ([], [], 1.0)
    for name, value in source.state_dict().items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], value.half().float())
    assert loaded.sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_every_name_that_does_not_fit_is_reported_and_few_are_printed(tmp_path: Path) -> None:
    """Fails when a name is lost, or a hundred lines are printed."""
    state = trained("timm/test_resnet").state_dict()
    layers = {name: value for name, value in state.items() if name.startswith("layer")}
    kept = {name: value for name, value in state.items() if name not in layers}
    save_file({**kept, **prefixed(layers, "backbone.")}, tmp_path / "a")
    _, loaded = begin(tmp_path / "a", "timm/test_resnet")
    assert set(loaded.missing) == set(layers)
    assert set(loaded.unexpected) == {f"backbone.{name}" for name in layers}
    assert loaded.loaded == len(kept) - 2
    lines = loaded.lines()
    assert len(lines) == 1 + 2 + 9 + 9
    assert lines[-1] == f"  unexpected: {len(layers) - 8} more"


def test_the_classifier_is_what_the_number_of_classes_changes() -> None:
    """In torchvision and in timm's families: the layers whose shapes differ between 1,000 and 7 classes.

    Fails when a hidden 1x1 convolution is taken for it, or one of two heads is forgotten.
    """
    auxiliary = {"googlenet": {"aux_logits": False}, "inception_v3": {"aux_logits": False}}
    known = torchvision_models.list_models(module=torchvision_models)[::4]
    names = [f"torchvision/{name}" for name in known if not name.startswith("regnet")]  # which need memory to be built
    names += [f"torchvision/{name}" for name in auxiliary]
    names += ["timm/resnet18", "timm/deit_tiny_distilled_patch16_224", "timm/convnext_atto", "timm/densenet121",
              "timm/mobilenetv3_small_050", "timm/efficientnet_b0", "timm/mixer_s32_224"]  # fmt: skip
    for name in names:
        args = auxiliary.get(name.partition("/")[2], {})
        with torch.device("meta" if name.startswith("torchvision") else "cpu"):  # shapes alone
            few, many = (build_model(ModelConfig(name=name, args=args), classes, 0) for classes in (7, 1000))
        other = many.state_dict()
        changed = {key.rpartition(".")[0] for key, value in few.state_dict().items() if value.shape != other[key].shape}
        assert set(classifiers_of(few)) == changed, name


# What is refused


def write(path: Path) -> None:
    path.write_text("executed")


class Exploit:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return write, (self.path,)


class Plain:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    """The line names the class; also for a whole model. Fails when weights_only is dropped, or more is let by."""
    state = trained("timm/test_vit").state_dict()
    mark, path = tmp_path / "mark", tmp_path / "a.pth"
    hidden = Namespace(lr=0.1, inner=Exploit(mark))
    for content, what in (
        ({"state_dict": state, "args": hidden}, "test_pretrained.write"),
        ({"model": state, "extra": Plain()}, "test_pretrained.Plain"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        line = refused(begin, path, "timm/test_vit")
        assert line.startswith(f"model.pretrained: {path}: refused: it holds {what}")
        assert not mark.exists()
    pickle.loads(pickle.dumps(Exploit(mark)))
    assert mark.exists(), "the exploit itself must work"


def test_files_that_cannot_be_used_cost_one_line(tmp_path: Path) -> None:
    """Each names the file and what is wrong; the model stays as it was. Fails when a library's error comes through."""
    state, path = trained("timm/test_vit").state_dict(), tmp_path / "a"

    def line(content: object) -> str:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        said = refused(begin, path, "timm/test_vit")
        assert said.startswith(f"model.pretrained: {path}: ")
        return said

    whole = io.BytesIO()
    torch.save(state, whole)
    save_file(state, tmp_path / "b")
    assert "not a whole torch file" in line(whole.getvalue()[:50_000])
    assert "not a whole safetensors file" in line((tmp_path / "b").read_bytes()[:50_000])
    for nothing in (b"", b"<html>404</html>"):
        assert "neither a safetensors nor a torch file" in line(nothing)
    assert "no weights in it, but the keys epoch" in line({"epoch": 3})
    assert "no weights in it, but list" in line([1, 2])
    assert "none of its names" in line(prefixed(state, "encoder."))
    wide = line({**state, "blocks.0.attn.qkv.weight": torch.zeros(3, 64)})
    assert "blocks.0.attn.qkv.weight [3, 64] for [192, 64]" in wide
    assert "data.channels" not in wide
    torch.save(state, path)
    assert "data.channels: 3" in refused(begin, path, "timm/test_vit", in_chans=1)
    model = build_model(ModelConfig(name="timm/test_vit"), 7, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({**state, "blocks.0.attn.qkv.weight": torch.zeros(3, 64)}, path)
    refused(load_pretrained, ModelConfig(name="timm/test_vit", pretrained=str(path)), Storage(), model, ALONE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "neither a run folder with checkpoints nor a checkpoint" in refused(begin, tmp_path, "timm/test_vit")


def test_names_that_do_not_exist_cost_one_line(tmp_path: Path) -> None:
    """A misspelt tag shows the tags there are. Fails when it is taken for the default weights."""
    line = refused(begin, "IMAGENET1K_V3", "torchvision/resnet50")
    assert line == (
        "model.pretrained: IMAGENET1K_V3: no such file; torchvision/resnet50 has published weights "
        "IMAGENET1K_V2, IMAGENET1K_V1"
    )
    assert "no such file" in refused(begin, tmp_path / "no.pth", "small_resnet")
    assert "only timm/ and torchvision/" in refused(begin, True, "small_resnet")
    assert "publishes no weights" in refused(begin, True, "timm/nf_ecaresnet26")
    assert "give one tag" in refused(begin, "a2_in1k", "timm/resnet18.a1_in1k")


# URLs, libraries, ranks


def test_a_url_is_read_with_retries(tmp_path: Path, short_pauses: None) -> None:
    """From a server whose first two answers fail. Fails when the URL is opened as a path, or without `storage`."""
    source = trained("timm/test_vit")
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with http_server(tmp_path, "reset", "503") as web:
        state, loaded = begin(f"{web.url}/a.pth", "timm/test_vit")
        assert refused(begin, f"{web.url}/no.pth", "timm/test_vit").startswith(
            f"model.pretrained: {web.url}/no.pth: no such"
        )
    assert torch.equal(state["norm.weight"], source.state_dict()["norm.weight"])
    assert loaded.source == f"{web.url}/a.pth"


def in_torch_cache(weights: Any, state: State, home: Path) -> None:
    """Where torch.hub would have put what it downloads."""
    folder = home / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / weights.url.rpartition("/")[2])


def in_hub_cache(repository: str, state: State, home: Path) -> None:
    """Where huggingface_hub would have put it."""
    folder = home / "hf" / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(state, folder / "snapshots" / "abc" / "model.safetensors")


def test_published_weights_come_from_the_libraries_own_caches(tmp_path: Path) -> None:
    """By true and by tag, through torch.hub's and the Hugging Face hub's real code; timm adds up the input's channels.

    Fails when a tag is ignored, or the head of another size is not left out.
    """
    tv, vit = trained("torchvision/squeezenet1_1").state_dict(), trained("timm/test_vit").state_dict()
    in_torch_cache(torchvision_models.SqueezeNet1_1_Weights.IMAGENET1K_V1, tv, tmp_path)
    in_hub_cache("timm/test_vit.r160_in1k", vit, tmp_path)
    for place in (True, "IMAGENET1K_V1"):
        state, loaded = begin(place, "torchvision/squeezenet1_1")
        assert torch.equal(state["features.0.weight"], tv["features.0.weight"])
        assert [each.split()[0] for each in loaded.dropped] == ["classifier.1.weight", "classifier.1.bias"]
        assert loaded.source == "torchvision/squeezenet1_1.IMAGENET1K_V1"
    for place, name in ((True, "timm/test_vit"), ("r160_in1k", "timm/test_vit"), (True, "timm/test_vit.r160_in1k")):
        state, loaded = begin(place, name)
        assert torch.equal(state["norm.weight"], vit["norm.weight"])
        assert len(loaded.dropped) == 2
    state, _ = begin(True, "timm/test_vit", in_chans=1)
    assert torch.allclose(state["patch_embed.proj.weight"], vit["patch_embed.proj.weight"].sum(1, keepdim=True))
    assert "does not fit model.args" in refused(begin, True, "timm/test_vit", embed_dim=32)


def test_without_a_network_one_line_says_what_to_do() -> None:
    """Fails when urllib's or the hub's error comes through, or the address of the file is not given."""
    for name, address in (
        ("torchvision/resnet18", "https://download.pytorch.org/models/resnet18-f37072fd.pth"),
        ("timm/resnet18", "https://huggingface.co/timm/resnet18.a1_in1k"),
    ):
        line = refused(begin, True, name)
        assert f"cannot be fetched from {address}: " in line
        assert line.endswith("--model.pretrained PATH")


def test_inputs_that_are_normalised_in_another_way_are_not_passed_over(tmp_path: Path) -> None:
    """torchvision's Inception takes its published weights with transform_input. Fails when that is not asked for."""
    source = torchvision_models.inception_v3(init_weights=False, num_classes=1000)
    in_torch_cache(torchvision_models.Inception_V3_Weights.IMAGENET1K_V1, source.state_dict(), tmp_path)
    assert "transform_input: true" in refused(begin, True, "torchvision/inception_v3", init_weights=False)


def test_one_rank_reads_and_all_have_the_same(tmp_path: Path) -> None:
    """Two ranks whose random weights differ, classifier and buffers included; a missing file is said on both.

    Fails when tensors are not sent, or buffers are forgotten.
    """
    source = trained("small_resnet")
    save_file(source.state_dict(), tmp_path / "a")
    argv = torchrun(2, str(Path(__file__).parent / "ranks" / "pretrained.py"), str(tmp_path / "a"), str(tmp_path))
    session = Session(argv, tmp_path / "log")
    assert session.wait() == 0, session.log.read_text()
    state, _ = begin(tmp_path / "a", "small_resnet")
    truth = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.digest").read_text() == truth
        assert (tmp_path / f"{rank}.error").read_text() == f"model.pretrained: {tmp_path / 'a'}.no: no such file"


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


# The learning rate


def test_the_advised_rate_is_the_guides_at_both_ends_and_straight_in_logarithms_between() -> None:
    """.001 up to 1,000 images, .01 from 100,000; 10,000 is half-way: 10 ** -2.5. Fails on any other way between."""
    assert [advised_rate(n) for n in (10, 1_000, 100_000, 1_281_167)] == pytest.approx([0.001, 0.001, 0.01, 0.01])
    assert advised_rate(10_000) == pytest.approx(10**-2.5)
    assert math.log(advised_rate(3_000)) - math.log(advised_rate(1_000)) == pytest.approx(0.5 * math.log(3))


def test_plan_shows_it_beside_the_configs_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 images at lr.base 0.1. Fails when it is shown without pretrained weights, or a missing file is let by."""
    argv = ["plan", "--data.train=", "--data.val=", "--lr.base=0.1", "--model.name=small_resnet", "--samples=10000"]
    assert dispatch(argv) == 0
    assert "fine-tuning" not in capsys.readouterr().out
    torch.save({}, tmp_path / "a")
    assert dispatch([*argv, f"--model.pretrained={tmp_path / 'a'}"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "0.0032 per 256 samples is advised for 10,000 images" in shown
    assert "here it is 0.1" in shown
    assert "no such file" in refused(dispatch, [*argv, "--model.pretrained=nowhere.pth"])


# Whole commands


def said_by(program: str, folder: Path, **environment: str) -> str:
    """What a Python program, which may `run` commands of ours, prints."""
    folder.mkdir(exist_ok=True)
    start = "import pathlib, shutil; from dist_trainer.commands.main import dispatch as run; "
    session = Session([sys.executable, "-c", start + program], folder / "log", **environment)
    assert session.wait() == 0, session.log.read_text()
    return session.log.read_text()


def test_a_run_begins_with_the_weights_of_another_and_a_resumed_one_does_not(tmp_path: Path) -> None:
    """10 classes to 3 others, at a rate too small to change a weight: all but the head stays, bit for bit. Then the
    first run is removed, the second loses its last checkpoint, and goes on. With none that is whole it begins anew.

    Fails when nothing is loaded, the head is, a resume asks for the weights again, or a new beginning does not.
    """
    ten = pack_images(tmp_path / "ten", num_samples=40, num_classes=10, per_shard=40)
    three = pack_images(tmp_path / "three", num_samples=40, num_classes=3, per_shard=40)
    runs = ["train", *TINY, "--run.dir", str(tmp_path), "--duration=2step", "--lr.warmup.duration=0step",
            "--batch.global_batch=32", "--engine.backend=torch", "--checkpoint.every=1step"]  # fmt: skip
    first = [*runs, "--run.name=first", f"--data.train={ten}", f"--data.val={ten}"]
    second = [*runs, "--run.name=second", f"--data.train={three}", f"--data.val={three}", "--lr.peak=1.0e-30",
              "--optimizer.weight_decay=0", f"--model.pretrained={tmp_path / 'first'}"]  # fmt: skip
    loses = (
        f"shutil.move('{tmp_path}/first', '{tmp_path}/gone'); shutil.copytree('{tmp_path}/second', '{tmp_path}/whole');"
    )
    loses += f"shutil.rmtree('{tmp_path}/second/checkpoints/step_00000002');"
    loses += f"pathlib.Path('{tmp_path}/second/summary.json').unlink();"
    breaks = f"shutil.move('{tmp_path}/gone', '{tmp_path}/first');"
    breaks += f"shutil.copytree('{tmp_path}/second', '{tmp_path}/on');"
    breaks += f"files = pathlib.Path('{tmp_path}/second/checkpoints').glob('*/model.safetensors');"
    breaks += "[each.write_bytes(each.read_bytes()[:-9] + b'!' * 9) for each in files];"
    breaks += f"pathlib.Path('{tmp_path}/second/summary.json').unlink();"
    said = said_by(f"run({first}); run({second}); {loses} run({second}); {breaks} run({second})", tmp_path)
    before, after, again, anew = (tensors(tmp_path / name) for name in ("first", "whole", "on", "second"))
    parameters = [name for name in sorted(before) if "running" not in name and "num_batches" not in name]
    assert [name for name in parameters if not torch.equal(before[name], after[name])] == ["fc.bias", "fc.weight"]
    report = json.loads((tmp_path / "second" / "pretrained.json").read_text())
    assert [each.split()[0] for each in report["dropped"]] == ["fc.weight", "fc.bias"]
    assert said.count("dropped: fc.weight [10, ") == 2
    assert said.count("resuming from") == 1
    assert "resuming from step_00000001" in said
    assert all(torch.equal(again[name], after[name]) and torch.equal(anew[name], after[name]) for name in after)


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
