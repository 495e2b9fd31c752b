"""Fine-tuning: the advised rate, and a run that begins with the weights of another."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import pack_images
from pretrained_weights import refused, said_by
from running import TINY, tensors

from dist_trainer.commands.main import dispatch
from dist_trainer.models.pretrained import advised_rate

pytestmark = pytest.mark.usefixtures("process_group", "offline")


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
