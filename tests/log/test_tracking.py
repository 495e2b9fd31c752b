"""What a run tells in metrics.jsonl and its summary."""

import json
from pathlib import Path

import pytest
from running import ROOT, TINY, metrics, run_jobs

from dist_trainer.log.names import METRICS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fashion: list[str]) -> Path:
    """A run of two ranks, stopped after step 9 and continued."""
    folder = tmp_path_factory.mktemp("tracking")
    argv = [*TINY, *fashion, "--eval.every=10step"]
    run_jobs(2, [{"name": "run", "argv": argv, "stop_at": 8}, {"name": "run", "argv": argv}], folder)
    return folder / "run"


def test_metrics_are_documented_finite_and_complete(run: Path) -> None:
    """Every name stands in the README's table; each step comes once. Mutation: drop the truncation on resume."""
    readme = (ROOT / "README.md").read_text()
    written_out = {name for name in METRICS if not name.startswith(("val_bn", "val_ema", "val_avg"))}
    assert {name for name in written_out if f"`{name}`" not in readme} == set()
    assert [step for step in metrics(run, "step") if step not in (10, 20)] == [n for n in range(1, 20) if n != 10]
    assert metrics(run, "epoch")[-1] == pytest.approx(20 / 938)
    assert 0 <= min(metrics(run, "perf/data_wait")) <= max(metrics(run, "perf/data_wait")) <= 1


def test_the_summary_says_how_the_run_ended(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["state"], summary["steps"], summary["world"]) == ("done", 20, 2)
    assert summary["final"]["model"]["top1"] == metrics(run, "val/top1")[-1]
    assert summary["best"]["top1"] == max(metrics(run, "val/top1"))
    assert (run / "STATE").read_text() == "done\n"
    assert not (run / "owner.json").exists()
    assert len(list((run / "best").glob("step_*"))) == 1
