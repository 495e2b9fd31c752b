"""The command line, in this process: what is refused and how, what overrides what, and the figures of a plan."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import refused
from running import ROOT, TINY, Session

from dist_trainer.commands import checkpoints, shards
from dist_trainer.commands.main import COMMANDS, dispatch
from dist_trainer.config.help import keys_help
from dist_trainer.config.tree import TrainConfig
from dist_trainer.config.values import keys_of

SUB_COMMANDS = [("shards", verb) for verb in shards.COMMANDS] + [("checkpoints", verb) for verb in checkpoints.VERBS]
FASHION = ROOT / "configs" / "fashion_mnist.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The smallest config there is."""
    path = tmp_path / "small.yaml"
    path.write_text("data: {train: t, val: v}\nlr: {base: 0.1}\n")
    return path


def printed(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """The whole config that --print_config shows."""
    with pytest.raises(SystemExit) as caught:
        dispatch([*(str(arg) for arg in argv), "--print_config"])
    assert not caught.value.code
    values: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return values


# What is refused


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("btch: {global_batch: 64}", "btch", "batch"),
        ("batch: {globl_batch: 64}", "batch.globl_batch", "batch.global_batch"),
        ("lr: {base: 0.1, schedule: {nmae: cosine}}", "lr.schedule.nmae", "lr.schedule.name"),
        ("optimizer: {agrs: {}}", "optimizer.agrs", "optimizer.args"),
        ("augment: {crop: {sze: 3}}", "augment.crop.sze", "augment.crop.size"),
    ],
)
def test_a_misspelt_key_in_a_file_is_refused_with_the_nearest(config: Path, text: str, key: str, nearest: str) -> None:
    """The whole path of the key, and the key that was meant. Fails when only the leaf is named, or any is let by."""
    config.write_text(f"data: {{train: t, val: v}}\n{text}\n")
    line = refused("plan", config, "--samples", 1000)
    assert line.startswith(key)
    assert "did you mean" in line
    assert nearest in line.partition("did you mean")[2]


def test_a_misspelt_key_inside_a_list_is_refused_by_the_name_of_the_list(config: Path) -> None:
    """Fails when it is held against the keys of the whole config: `nmae` is not run.name."""
    config.write_text("data: {train: t, val: v}\naugment: {transforms: [{nmae: RandomRotation}]}\n")
    line = refused("plan", config, "--samples", 1000)
    assert line.startswith("augment.transforms")
    assert "nmae" in line
    assert "run.name" not in line


@pytest.mark.parametrize(
    ("argument", "key", "nearest"),
    [
        ("--btch.global_batch=64", "btch.global_batch", "batch.global_batch"),
        ("--batch.globl_batch=64", "batch.globl_batch", "batch.global_batch"),
        ("--engine.precison=fp32", "engine.precison", "engine.precision"),
        ("--augment.crop.sze=32", "augment.crop.sze", "augment.crop.size"),
    ],
)
def test_a_misspelt_key_on_the_command_line_is_refused_with_the_nearest(
    config: Path, argument: str, key: str, nearest: str
) -> None:
    """Fails when what argparse does not know is passed on."""
    line = refused("plan", config, "--samples", 1000, argument)
    assert key in line.partition(":")[0]
    assert f"did you mean '{nearest}'?" in line


@pytest.mark.parametrize("argument", ["--batch.global=64", "--dur=1ep", "--sample=1000"])
def test_abbreviated_keys_are_not_accepted(config: Path, argument: str) -> None:
    """A key that is added later must not change what a script means. Fails when argparse may complete prefixes."""
    assert "no such key" in refused("plan", config, argument)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("batch.global_batch", "many", "a whole number, such as 256"),
        ("optimizer.weight_decay", "abc", "a number, such as 0.0"),
        ("engine.precision", "fp8", "one of bf16, fp32"),
        ("data.order", "random", "one of auto, window, full, balanced, none"),
        ("data.workers", "few", "a whole number or auto"),
        ("batch", "7", "global_batch"),
    ],
)
def test_a_wrong_type_or_choice_is_refused_with_key_value_and_what_is_allowed(
    config: Path, key: str, value: str, said: str
) -> None:
    """The same on the command line and in a file. Fails when a Python type or a traceback is printed instead."""
    nested: Any = yaml.safe_load(value)
    for part in reversed(key.split(".")):
        nested = {part: nested}
    file = config.with_name("wrong.yaml")
    file.write_text(yaml.safe_dump(nested))
    for line in (
        refused("plan", config, "--samples", 1000, f"--{key}", value),
        refused("plan", "--config", config, "--config", file, "--samples", 1000),
    ):
        assert line.startswith(f"{key}: ")
        assert value in line
        assert said in line
        assert "<class" not in line


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("optimizer.args={momentum:0.8}", "optimizer.args: {momentum:0.8} is not a group of keys with values; after a"),
        ("augment.crop={size:224}", "augment.crop.size:224: after a colon belongs a blank: {size: 224}"),
    ],
)
def test_a_colon_without_a_blank_is_said(config: Path, argument: str, said: str) -> None:
    """YAML reads a key of that name without a value. Mutation: take it for one, and let the parser speak."""
    assert refused("plan", config, "--samples", 1000, f"--{argument}").startswith(said)


def test_a_missing_key_is_named(config: Path) -> None:
    """Fails when the message names the first of several with its comma, or none."""
    config.write_text("data: {train: t}\n")
    assert refused("plan", config).startswith("data.val: ")
    config.write_text("duration: 3ep\n")
    assert refused("plan", config).startswith("data.train: ")
    assert refused("plan").startswith("data.train: ")


def test_a_file_that_is_missing_or_no_config_is_named(config: Path, tmp_path: Path) -> None:
    """Fails when the parser's own wording, without the file's name, gets through."""
    missing = tmp_path / "missing.yaml"
    assert refused("train", missing).startswith(f"{missing}: ")
    assert str(missing) in refused("plan", config, "--config", missing)
    for text in ("data: {train: [\n", "- 1\n", "", "1: 2\n"):
        config.write_text(text)
        assert str(config) in refused("plan", config)


def test_an_unknown_command_is_refused_with_the_nearest() -> None:
    """Fails when a KeyError gets through."""
    line = refused("trian", "x.yaml")
    assert "'trian'" in line
    assert "did you mean 'train'?" in line


def test_batches_and_rates_that_cannot_be_are_refused_by_plan_as_by_train(config: Path) -> None:
    """Fails when `plan` prints figures that `train` would refuse."""
    assert refused("plan", config, "--samples", 1000, "--gpus", 9).startswith("9 ranks")
    assert refused("plan", config, "--samples", 1000, "--batch.micro_batch", 33).startswith("batch.micro_batch: 33")
    assert refused("plan", config, "--samples", 1000, "--lr.peak", 0.1).startswith("lr: ")
    for key in ("eval.every", "checkpoint.every", "log.every"):
        assert refused("plan", config, "--samples", 1000, f"--{key}", "often").startswith(f"{key}: 'often'")


def test_the_process_ends_with_two_and_one_line(tmp_path: Path) -> None:
    """`python -m dist_trainer train missing.yaml`: nothing on stdout, no traceback. Fails when the error is raised."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "dist_trainer", "train", "missing.yaml"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dist-trainer: missing.yaml: ")
    assert done.stderr.count("\n") == 1


# What overrides what


def test_arguments_beat_files_and_later_files_beat_earlier_ones(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Key by key: what a later file leaves out stays. Fails when a file replaces a whole group or beats an argument."""
    second = config.with_name("second.yaml")
    second.write_text("batch: {global_batch: 512}\nlr: {base: 0.3}\nduration: 5ep\n")
    config.write_text("data: {train: t, val: v}\nbatch: {global_batch: 128, micro_batch: 16}\nlr: {base: 0.2}\n")
    values = printed(capsys, "train", "--config", config, "--config", second, "--duration", "7ep")
    assert values["batch"] == {"global_batch": 512, "micro_batch": 16}
    assert (values["lr"]["base"], values["duration"]) == (0.3, "7ep")
    values = printed(capsys, "train", config, "--config", second, "--batch.micro_batch=8")
    assert values["batch"] == {"global_batch": 512, "micro_batch": 8}
    values = printed(capsys, "train", "--config", second, "--config", config)
    assert values["batch"] == {"global_batch": 128, "micro_batch": 16}
    assert values["duration"] == "5ep"


def test_a_printed_config_is_the_same_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With nested lists, optional groups and free arguments. Fails when a key is lost or null cannot be read back."""
    arguments = [
        "--model.args", '{"widths": [8, 16], "depths": [1, 2]}', "--augment.crop.size", "32", "--eval.every", "null",
        "--augment.transforms", '[{"name": "RandomRotation", "args": {"degrees": 30}}]', "--lr.warmup.start", "base",
    ]  # fmt: skip
    values = printed(capsys, "train", config, *arguments)
    assert values["model"]["args"] == {"widths": [8, 16], "depths": [1, 2]}
    assert values["augment"]["crop"]["size"] == 32
    assert values["augment"]["transforms"] == [{"name": "RandomRotation", "args": {"degrees": 30}}]
    assert values["eval"]["every"] is None
    again = config.with_name("again.yaml")
    again.write_text(yaml.safe_dump(values))
    assert printed(capsys, "train", again) == values
    assert printed(capsys, "train", FASHION)["model"]["args"] == yaml.safe_load(FASHION.read_text())["model"]["args"]


# plan, ls, cp


def figures(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert dispatch(["plan", *(str(arg) for arg in argv), "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_the_figures_of_the_fashion_mnist_plan_are_those_worked_out_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """60,000 / 256 = 234 steps and 96 samples; 8 epochs of 235; one epoch of warm-up to 0.4; half a cosine of 1,645.

    Fails when any of these is rounded another way, or the last rate is that after the last update.
    """
    hand = {
        "world": 1,
        "parameters": 277_674 + 990 * 97,  # counted for 10 classes; without data there are 1,000
        "trained": 277_674 + 990 * 97,
        "decayed": 277_674 + 990 * 97 - 2 * 480 - 1000,  # without scale and shift of 480 channels, and the biases
        "lr_scale_least": 1.0,
        "global_batch": 256,
        "micro_batch": 128,
        "micro_batches_per_step": 2,
        "forwards_per_rank": 2,
        "efficiency": 1.0,
        "legal_worlds": "1 to 2",
        "full_worlds": [1, 2],
        "num_samples": 60_000,
        "steps_per_epoch": 235,
        "samples_in_last_step": 96,
        "total_steps": 1880,
        "warmup_steps": 235,
        "lr_first": 0.0,
        "lr_peak": 0.4,
        "lr_last": pytest.approx(0.4 * (3.14159265 / 1645) ** 2 / 4, rel=1e-5),  # 1 - cos x = x^2 / 2 for small x
        "bits": "up to rounding on another number of ranks: engine.sums is fast",
        "stop_seconds": 50,  # 20 without a step, 20 of checkpoint.grace, 10 for W&B
        "checkpoint_bytes": 8 * (277_674 + 990 * 97) + 960 * 4 + 7 * 8,  # weights, momentum, statistics of 7 layers
        "disk_bytes": 3 * (8 * 373_704 + 3896) + 2 * (4 * 373_704 + 3896),  # 2 kept, 1 written; best weights likewise
        "shared_bytes_per_rank": None,  # the images, and so their size, are not here
        "pinned_bytes_per_rank": None,
        "num_classes": 1000,
        "num_val": None,
        "lr_scaling": "0.4 x 256 / 256",
    }
    found = figures(capsys, FASHION, "--samples", 60_000, "--gpus", 1)
    small = [line.partition(":")[0] for line in found.pop("warnings")]
    assert small == ["loss.label_smoothing", "optimizer.weight_decay"]  # much for so small a network and 1,000 classes
    assert found == hand
    two = figures(capsys, FASHION, "--samples", 60_000, "--gpus", 2)
    assert {key: two[key] for key in hand} == {**hand, "world": 2, "forwards_per_rank": 1}
    tuned = figures(
        capsys, FASHION, "--samples", 60_000, "--gpus", 1, "--model.freeze=[stem]", "--optimizer.layer_decay=0.5"
    )
    assert tuned["trained"] == hand["trained"] - 9 * 32
    assert tuned["decayed"] == hand["decayed"] - 9 * 32
    assert tuned["lr_scale_least"] == 0.5**3  # above the stem lie three blocks and the head
    assert len(tuned["warnings"]) == len(small) + 2  # nothing pretrained


def test_ranks_that_do_not_divide_the_micro_batches_cost_efficiency_and_a_warning(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 micro-batches on 5 ranks take 2 x 5 forwards. Fails when more ranks are advised than are there."""
    arguments = [config, "--samples", 1000, "--gpus", 5]
    assert figures(capsys, *arguments)["efficiency"] == 0.8
    assert dispatch(["plan", *map(str, arguments)]) == 0
    warning = capsys.readouterr().out.partition("warning: ")[2]
    assert "4 ranks do it evenly" in " ".join(warning.split())
    assert dispatch(["plan", *map(str, arguments), "--show", "total_steps"]) == 0
    assert capsys.readouterr().out == f"{4 * 90}\n"


def test_shipped_files_are_listed_and_copied_but_overwrite_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when cp replaces a file, or ls forgets a config."""
    assert dispatch(["ls"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {path.relative_to(FASHION.parent).with_suffix("").as_posix() for path in FASHION.parent.rglob("*.yaml")} <= {
        *listed
    }
    target = tmp_path / "mine.yaml"
    assert dispatch(["cp", "fashion_mnist", str(target)]) == 0
    assert target.read_bytes() == FASHION.read_bytes()
    target.write_text("changed")
    assert refused("cp", "fashion_mnist", target).startswith(f"{target}: exists")
    assert target.read_text() == "changed"
    assert dispatch(["cp", "fashion_mnist.yaml", str(tmp_path)]) == 0
    assert (tmp_path / "fashion_mnist.yaml").read_bytes() == FASHION.read_bytes()
    assert "did you mean 'fashion_mnist'?" in refused("cp", "fashion_mnits", tmp_path / "x")
    assert refused("cp", "fashion_mnist", tmp_path / "no" / "folder").startswith(str(tmp_path / "no" / "folder"))


def helped(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    try:
        status = dispatch([*argv, "--help"])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [*COMMANDS, *(f"{group} {verb}" for group, verb in SUB_COMMANDS)])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On stdout, with status 0, and how it is called first. Fails when a new command has none."""
    text = helped(capsys, *command.split())
    assert text.startswith("usage: ")
    assert command in text.splitlines()[0]
    assert "SUPPRESS" not in text


def test_help_has_a_line_for_every_key_and_all_of_a_key_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By sections, a line a key, nested ones too; on a terminal no line is longer than it. Fails when a field has no
    text, or a group is left out.
    """
    text = helped(capsys, "train")
    lines = {match[1]: match[0] for match in re.finditer(r"^  --([a-z_]+(?:\.[a-z_]+)*) .*$", text, re.MULTILINE)}
    groups = {key.rpartition(".")[0] for key in keys_of(TrainConfig)}
    listed = {key for key in keys_of(TrainConfig) if key not in groups and not key.startswith("augment.transforms.")}
    assert listed <= lines.keys()
    for key in listed:
        assert len(lines[key].split()) >= 4, f"--{key} has no help"
    assert "--augment.crop.scale [X, X]" in lines["augment.crop.scale"]
    assert text.index("\ndata: ") < text.index("  --data.train") < text.index("\nrun: ")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert max(map(len, keys_help())) <= 80
    with pytest.raises(SystemExit):
        dispatch(["train", "--help", "lr.warmup"])
    whole = capsys.readouterr().out
    assert "--lr.warmup.start 0|base" in whole and "unscaled base rate (Goyal et al. 2017, section 2.2)." in whole
    assert "did you mean 'lr.warmup'?" in refused("train", "--help", "lr.warmp")


HEAVY = {
    "torch",
    "torch._dynamo",  # its compiler: as heavy as the rest of torch
    "torchvision",
    "timm",
    "deepspeed",
    "wandb",
    "webdataset",
    "matplotlib",
    "pandas",
    "botocore",
    "aiohttp",
}


@pytest.mark.parametrize(
    ("argv", "needed"),
    [
        (["--help"], set()),
        (["ls"], set()),
        (["plan", str(FASHION), "--samples=60000"], {"torch"}),
        (["plan", str(FASHION)], {"torch"}),
    ],
)
def test_what_is_heavy_is_imported_where_it_is_used(argv: list[str], needed: set[str]) -> None:
    """Counted in modules, since seconds depend on the machine. Mutations: torchvision on top of a file; torch's own
    wrappers around its optimizers left in place."""
    program = f"import sys; from dist_trainer.commands.main import dispatch; dispatch({argv!r}); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert HEAVY & set(done.stdout.splitlines()[-1].split()) == needed


def test_garbage_is_looked_for_once_the_command_is_imported() -> None:
    """Mutations: look for it all the time, which takes a fifth of the start of `plan`; never."""
    program = (
        "import gc, sys; from dist_trainer.commands.main import dispatch; looks = set(); "
        "imported = lambda: hasattr(sys.modules.get('dist_trainer.commands.plan'), 'command'); "
        "gc.callbacks.append(lambda phase, info: looks.add(imported())); "
        f"dispatch(['plan', {str(FASHION)!r}, '--samples=60000']); print(looks)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "{True}"


def test_one_process_needs_no_launcher(fashion: list[str], tmp_path: Path) -> None:
    """Fails when DeepSpeed misses a variable that torchrun would have set."""
    argv = [
        sys.executable,
        "-m",
        "dist_trainer",
        "train",
        *TINY,
        *fashion,
        "--duration=2step",
        "--lr.warmup.duration=0step",
    ]
    session = Session([*argv, f"--run.dir={tmp_path}", "--run.name=alone"], tmp_path / "log")
    assert session.wait() == 0, session.log.read_text()
    assert (tmp_path / "alone" / "STATE").read_text() == "done\n"
