"""Weights to begin with: every kind of file, what is left out, what is refused, where they come from."""

import hashlib
import io
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models as torchvision_models
from faulty_fs import http_server
from pretrained_weights import ALONE, begin, in_hub_cache, in_torch_cache, refused, trained
from running import run_ranks
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dist_trainer.models import ModelConfig, build_model
from dist_trainer.models.pretrained import classifiers_of, load_pretrained
from dist_trainer.run_folder import checkpoint
from dist_trainer.storage.storage import Storage
from dist_trainer.tensors import State

pytestmark = pytest.mark.usefixtures("process_group", "offline")


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
    checkpoint.save(path / "best", 9, {"model": model.state_dict()}, {})
    worse = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    checkpoint.save(path / "checkpoints", 12, {"model": worse}, {})


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
    layers = {name: value for name, value in state.items() if name.startswith("layer1.")}
    kept = {name: value for name, value in state.items() if name not in layers}
    save_file({**kept, **prefixed(layers, "trunk.")}, tmp_path / "a")
    _, loaded = begin(tmp_path / "a", "timm/test_resnet")
    assert set(loaded.missing) == set(layers)
    assert set(loaded.unexpected) == {f"trunk.{name}" for name in layers}
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
    assert "it holds no weights, but the keys epoch" in line({"epoch": 3})
    assert "it holds no weights, but list" in line([1, 2])
    assert "none of its names" in line(prefixed(state, "trunk."))
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
    run_ranks(2, "pretrained", tmp_path / "a", tmp_path)
    state, _ = begin(tmp_path / "a", "small_resnet")
    truth = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.digest").read_text() == truth
        assert (tmp_path / f"{rank}.error").read_text() == f"model.pretrained: {tmp_path / 'a'}.no: no such file"
