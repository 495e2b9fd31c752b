"""The README's config is one that the program takes."""

import json
import re
from pathlib import Path

import pytest
import yaml
from running import ROOT

from dist_trainer.commands.main import dispatch


def test_the_readmes_imagenet_config_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1,281,167 images, 256 a step, 90 epochs. Mutation: misspell a key in the README."""
    readme = (ROOT / "README.md").read_text()
    config, tuning, averages = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    file = tmp_path / "my.yaml"
    file.write_text(config + averages)
    assert dispatch(["plan", str(file), "--samples", "1281167", "--gpus", "8", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == 25_557_032
    assert (figures["steps_per_epoch"], figures["total_steps"]) == (5005, 450_450)
    assert (figures["warmup_steps"], figures["lr_first"], figures["lr_peak"]) == (25_025, 0.1, 0.1)
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump({**yaml.safe_load(config), **yaml.safe_load(tuning)}))
    assert dispatch(["plan", str(tmp_path / "tuned.yaml"), "--samples", "1281167", "--gpus", "8", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["parameters"] - tuned["trained"] == 9_408 + 128 + 215_808  # conv1, bn1, layer1
    assert tuned["lr_advised"] == 0.01
