"""The README's config is one that the program takes."""

import json
import re
from pathlib import Path

import pytest
import yaml
from running import ROOT

from dist_trainer.commands.main import dispatch
from dist_trainer.run_folder.identity import FREE, KEYS, PLACE, First


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
    assert "lr_advised" not in tuned  # for adamw, no rate is published
    assert dispatch(["plan", str(tmp_path / "tuned.yaml"), "--samples=1281167", "--optimizer.name=sgd", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lr_advised"] == 0.01


def test_the_readmes_table_of_keys_is_the_programs() -> None:
    """Mutation: a key moves to another row in one of the two."""
    lines = (ROOT / "README.md").read_text().partition("| keys | what a change does |")[2].splitlines()[2:7]
    free, val, rounded, place, fixed = (
        {key for name in re.findall(r"`([\w.*]+)`", line.split("|")[1]) for key in KEYS if fits(key, name)}
        for line in lines
    )
    assert val == {"data.val"}
    assert free | rounded == {key for key, row in KEYS.items() if row == FREE} - {"data.val_fingerprint"}
    assert place | val == {key for key, row in KEYS.items() if row == PLACE}
    assert fixed == {key for key, row in KEYS.items() if isinstance(row, First) and row.fixed} - {"data.fingerprint"}


def fits(key: str, name: str) -> bool:
    return key.startswith(name[:-1]) if name.endswith(".*") else key == name
