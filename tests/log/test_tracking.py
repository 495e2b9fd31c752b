"""What a run tells: metrics.jsonl, W&B's own offline files read back, the summary."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, TINY, metrics, run_jobs
from wandb.proto import wandb_internal_pb2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fashion: list[str]) -> Path:
    """A run of two ranks, stopped after step 9 and continued, tracked offline."""
    folder = tmp_path_factory.mktemp("tracking")
    argv = [*TINY, *fashion, "--wandb.mode=offline", "--eval.every=10step", "--wandb.project=test"]
    run_jobs(2, [{"name": "run", "argv": argv, "stop_at": 8}, {"name": "run", "argv": argv}], folder)
    return folder / "run"


BLOCK, HEADER = 32 * 1024, 7


def records(file: Path) -> list[Any]:
    """Every record of a .wandb file: LevelDB's log format after a header of 7 bytes.

    A chunk is crc32 (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last), data; none crosses a block.
    """
    data, at, payload, found = file.read_bytes(), HEADER, b"", []
    assert data[:4] == b":W&B"
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK  # the rest of a block is too short for a chunk
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        payload += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            found.append(record)
            payload = b""
    return found


def history(file: Path) -> list[dict[str, Any]]:
    rows = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb_holds_what_metrics_jsonl_holds_in_one_run(run: Path) -> None:
    """Value by value, from rank 0 alone, both parts under one id; that it went on is an event in both.

    Mutations: log on every rank; a new id on resume; the event goes to the terminal alone.
    """
    files = sorted(run.glob("wandb/*run-*/run-*.wandb"))
    assert len(files) == 2, "one file per process that trained"
    assert len({file.name for file in files}) == 1, "one run id"
    ours = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    theirs = [row for file in files for row in history(file)]
    assert len(ours) == 20 + 2 * 2 + 1 and len(theirs) == len(ours)
    assert [row["run/world"] for row in theirs if "run/event" in row] == [2]
    for a, b in zip(ours, theirs, strict=True):
        assert {key: b[key] for key in a} == a


def test_wandb_knows_the_config_and_the_world(run: Path) -> None:
    (file, *_) = sorted(run.glob("wandb/*run-*/run-*.wandb"))
    config = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "run":
            config |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
    assert config["batch"] == {"global_batch": 64, "micro_batch": 16}
    assert config["world"] == 2


def test_metrics_are_documented_finite_and_complete(run: Path) -> None:
    """Every name stands in the README's table; each step comes once. Mutation: drop the truncation on resume."""
    readme = (ROOT / "README.md").read_text()
    names = {key for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert {name for name in names if f"`{name}`" not in readme} == {"step", "epoch"}
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
