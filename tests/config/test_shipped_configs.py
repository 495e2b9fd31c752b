"""The shipped ImageNet configs: each a document, each plans, each trains."""

import re
from pathlib import Path

import pytest
from helpers import sample_members, write_tar
from running import ROOT, metrics, run_jobs

from dist_trainer.commands.plan import plan_figures
from dist_trainer.config.arguments import new_parser, parse_config
from dist_trainer.shards.prepare import prepare_index

CONFIGS = sorted((ROOT / "configs" / "imagenet").glob("*.yaml"))
IMAGENET = 1_281_167


def test_each_line_of_the_guides_tables_has_its_config() -> None:
    """By the published accuracies: two tables of L2, smoothing, crop scale, nine rows of augmentation; and recipes."""
    published = [
        "50.41", "51.45", "77.65", "78.04", "77.9", "78.4", "70.98", "70.81", "52.35", "53.18", "77.31", "77.95",
        "78.28", "78.39", "78.01", "77.85", "77.70", "77.91", "77.43", "76.4", "76.3", "80.858", "80.38", "79.83",
        "78.05", "73.8",
    ]  # fmt: skip
    found = [re.search(r"^# Expected: ([\d.]+)%", path.read_text(), re.MULTILINE) for path in CONFIGS]
    assert sorted(match[1] for match in found if match) == sorted(published)
    assert len(CONFIGS) == len(published)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_says_what_it_is_and_plans(path: Path) -> None:
    """Command, hardware and expected accuracy on top; on 8 GPUs no forward is wasted, and all epochs are whole."""
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"configs/imagenet/{path.name}" in head[1]
    assert any(line.startswith("# Hardware") for line in head)
    config, _ = parse_config(new_parser("plan", ""), [str(path)])
    figures = plan_figures(config, "run", gpus=8, num_samples=IMAGENET)
    assert figures["efficiency"] == 1.0
    epochs = float(config.duration.removesuffix("ep"))
    assert figures["total_steps"] == pytest.approx(epochs * IMAGENET / config.batch.global_batch, rel=5e-3)


@pytest.mark.slow
def test_each_config_trains_at_tiny_size(tmp_path: Path) -> None:
    """A step of small images in small batches, everything else as it stands. Fails when keys do not go together."""
    write_tar(tmp_path / "0.tar", sample_members(48, size=72))
    prepare_index("data.train", str(tmp_path))
    small = [
        f"--data.train={tmp_path}", f"--data.val={tmp_path}", "--data.workers=0", "--wandb.mode=disabled",
        "--batch.global_batch=24", "--batch.micro_batch=2", "--augment.crop.size=64", "--eval.resize=72",
        "--eval.crop=64", "--precise_bn.num_samples=8", "--log.every=1step",
    ]  # fmt: skip
    grown = "--augment.crop.start_size=32"
    argv = {path: [str(path), *small, *([grown] if "start_size" in path.read_text() else [])] for path in CONFIGS}
    run_jobs(1, [{"name": path.stem, "argv": argv[path], "stop_at": 0} for path in CONFIGS], tmp_path, seconds=900)
    for path in CONFIGS:
        assert len(metrics(tmp_path / path.stem, "train/loss")) == 1
        assert (tmp_path / path.stem / "STATE").read_text() == "stopped\n"
