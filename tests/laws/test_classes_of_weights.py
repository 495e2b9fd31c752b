"""A network's outputs mean the classes that it was trained with: its weights are bound to data by name."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from helpers import refused
from PIL import Image
from running import metrics, newest, run_jobs

from dist_trainer.commands.main import dispatch
from dist_trainer.run_folder import class_list
from dist_trainer.storage.storage import Storage

NAMES = ("ant", "bee", "cat")
COMMON = [
    "--augment.crop=null", "--eval.resize=null", "--eval.crop=null", "--data.workers=0", "--wandb.mode=disabled",
    "--model.name=small_resnet", "--model.args={in_channels: 3, stem_width: 8, widths: [8], depths: [1]}",
    "--batch.global_batch=8", "--batch.micro_batch=8", "--engine.backend=torch", "--engine.precision=fp32",
    "--eval.train_samples=0", "--eval.every=null", "--eval.classes=subset",
]  # fmt: skip
LEARNS = ["--lr.base=1.0", "--duration=20ep"]
STAYS = ["--lr.base=1e-9", "--duration=1step"]
"""A run that ends with the weights that it begins with: its accuracy tells what they were."""


def grown(root: Path, names: Sequence[str], per_class: int = 8) -> Path:
    """Class folders: each class has its own shade of grey, by its place in NAMES, or else its first letter."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        shade = NAMES.index(name) if name in NAMES else 3
        for number in range(per_class):
            pixels = np.clip(rng.normal(shade * 70 + 20, 8, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@dataclass(frozen=True)
class Place:
    """Data of the same images: `ours` in the order of text, `turned` listed the other way round, `others` of which one
    class is another; and a run that has learned `ours`."""

    folder: Path

    def data(self, name: str) -> list[str]:
        images = self.folder / ("others" if name == "others" else "images")
        listed = [f"--data.classes={self.folder / 'turned.txt'}"] if name == "turned" else []
        return [f"--data.train={images}", f"--data.val={images}", *listed]

    def config(self, name: str) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text("{}\n")
        return path

    @property
    def run(self) -> Path:
        return self.folder / "learned"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("classes")
    grown(folder / "images", NAMES)
    grown(folder / "others", ("ant", "bee", "dog"))
    (folder / "turned.txt").write_text("".join(f"{name}\n" for name in reversed(NAMES)))
    made = Place(folder)
    run_jobs(1, [{"name": "learned", "argv": [*COMMON, *LEARNS, *made.data("ours")]}], folder)
    assert metrics(made.run, "val/top1")[-1] == 1.0
    return made


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    if dist.is_initialized():  # the command failed
        dist.destroy_process_group()


def top1(text: str) -> str:
    return next(line.split("top-1 ")[1].split("  ")[0] for line in text.splitlines() if "top-1 " in line)


def given(place: Place) -> list[str]:
    """The same weights, named in every way: the run, a part of it, a file, a URL of each."""
    checkpoint = newest(place.run)
    names = [place.run, place.run / "best", checkpoint, checkpoint / "model.safetensors"]
    return [*map(str, names), *(f"file://{name}" for name in (place.run, checkpoint, checkpoint / "model.safetensors"))]


def test_accuracy_does_not_depend_on_how_the_classes_are_numbered(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named as a run, a part of it or a file, here or at a URL. Mutation: take the outputs by number: bee alone is
    right then, 33%."""
    config = place.config("turned")
    for weights in given(place):
        dispatch(["eval", str(config), *COMMON, *place.data("turned"), f"--weights={weights}"])
        said = capsys.readouterr().out
        assert top1(said) == "100.00% (24/24)"
        assert "/classes.json, the classes of the weights" in said
    dispatch(["eval", str(place.run)])
    own = capsys.readouterr().out
    assert top1(own) == "100.00% (24/24)"
    assert "classes.json" not in own


def test_data_with_fewer_classes_than_the_weights_are_scored_and_with_others_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among all outputs. Mutation: a network with as many outputs as the data have classes."""
    few = grown(tmp_path / "few", ("cat", "bee"))
    argv = [str(place.config("few")), *COMMON, f"--data.train={few}", f"--data.val={few}", f"--weights={place.run}"]
    dispatch(["eval", *argv])
    assert top1(capsys.readouterr().out) == "100.00% (16/16)"
    line = refused("eval", place.config("others"), *COMMON, *place.data("others"), f"--weights={place.run}")
    assert line == (f"{place.run}/classes.json, the classes of the weights: 1 class of data.train not in it ('dog')")


@pytest.mark.parametrize("key", ["model.pretrained", "run.start_from"])
def test_a_run_begins_with_outputs_of_its_own_classes(key: str, place: Place, tmp_path: Path) -> None:
    """Another order is refused, with the key that keeps it; with that key the first evaluation is as good as the last
    one of the run before. Mutation: take the outputs by number."""
    train = ["train", place.config("begun"), *COMMON, *STAYS, f"--run.dir={tmp_path}", f"--{key}={place.run}"]
    line = refused(*train, *place.data("turned"))
    remedy = f"--data.classes {place.run}/classes.json"
    assert line.startswith(f"{key}: ") and line.endswith(remedy)
    assert "output 0 is 'ant' there, and 'cat' here" in line
    job = [*COMMON, *STAYS, f"--{key}={place.run}", *place.data("ours"), remedy.replace(" ", "=")]
    run_jobs(1, [{"name": "same", "argv": job}], tmp_path)
    assert metrics(tmp_path / "same", "val/top1") == [1.0]


def test_other_classes_leave_the_classifier_out(place: Place, tmp_path: Path) -> None:
    """Though it has the same shape. Mutation: take it; start_from would, so it is refused there."""
    run_jobs(1, [{"name": "tuned", "argv": [*COMMON, *STAYS, f"--model.pretrained={place.run}", *place.data("others")]}], tmp_path)  # fmt: skip  # noqa: E501
    report = json.loads((tmp_path / "tuned" / "pretrained.json").read_text())
    assert report["dropped"] == ["fc.weight of other classes", "fc.bias of other classes"]
    assert report["loaded"] == report["num_tensors"] - 2
    argv = ["train", place.config("begun"), *COMMON, *STAYS, f"--run.dir={tmp_path}", f"--run.start_from={place.run}"]
    assert "other classes than data.train; model.pretrained takes all but" in refused(*argv, *place.data("others"))


def test_runs_whose_outputs_mean_different_classes_are_not_averaged(place: Place, tmp_path: Path) -> None:
    """Their mean would be of no class. Mutation: average by number."""
    other = shutil.copytree(place.run, tmp_path / "other")
    class_list.write(other, NAMES[::-1])
    files = [newest(run) / "model.safetensors" for run in (place.run, other)]
    line = refused("average", place.run, f"--files=[{files[0]},{files[1]}]")
    assert line.startswith("--files: ") and "list another order: the same output means different classes" in line
    assert not (place.run / "average.safetensors").exists()


@pytest.mark.parametrize("content", ["[]", '["a", 1]', '{"a": 0}', "[", None])
def test_weights_without_a_list_of_names_have_none(content: str | None, place: Place, tmp_path: Path) -> None:
    """A run from before there was one, and files elsewhere."""
    old = shutil.copytree(place.run, tmp_path / "old")
    (old / "classes.json").unlink()
    if content is not None:
        (old / "classes.json").write_text(content)
    assert class_list.beside(str(newest(old)), Storage()) is None
    alone = Path(shutil.copy(newest(place.run) / "model.safetensors", tmp_path))
    assert class_list.beside(str(alone), Storage()) is None
    assert class_list.beside("model.safetensors", Storage()) is None
