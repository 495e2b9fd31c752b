"""`doctor`: each of its crosses provoked, and nothing crossed where all is well."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from running import ROOT
from safetensors.torch import load_file

from dist_trainer.commands import doctor
from dist_trainer.commands.main import dispatch
from dist_trainer.engine import numerics

Doctor = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Doctor]:
    """(exit status, lines) of `dist-trainer doctor small.yaml ARGV...` in a folder with data."""
    source = ROOT / "tests" / "fixtures" / "81fd9c4"
    monkeypatch.chdir(shutil.copytree(source, tmp_path / "here", ignore=shutil.ignore_patterns("runs")))
    monkeypatch.setattr("dist_trainer.run.measure.SECONDS", 0.3)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv: str) -> tuple[int, list[str]]:
        status = dispatch(["doctor", "small.yaml", "--engine.backend=torch", *argv])
        return status, capsys.readouterr().out.splitlines()

    yield run
    if dist.is_initialized():  # the command failed
        dist.destroy_process_group()


def crosses(lines: list[str]) -> list[str]:
    return [line.removeprefix("✗ ") for line in lines if line.startswith("✗")]


def test_all_is_well_where_it_is(said: Doctor) -> None:
    """One line of each kind, and status 0; the folder is as it was. Mutations: no look at one of them; a file stays."""
    status, lines = said("--duration=200step", "--run.mirror=mirror")
    kinds = [
        "versions",
        "devices",
        "clocks",
        "W&B",
        "run.dir",
        "run.mirror",
        "data",
        "cores",
        "storage",
        "loader",
        "space",
    ]
    assert [line.partition(":")[0].removeprefix("✓ ").removeprefix("✗ ") for line in lines] == [
        *kinds,
        "ready to train",
    ]
    assert not [line for line in crosses(lines) if not line.startswith(("storage", "loader"))]  # a busy machine
    assert status == 0
    assert list(Path("runs").iterdir()) == list(Path("mirror").iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "cross", "stops"),
    [
        (["--data.train=data/nowhere"], "data.train: ", True),
        (["--run.mirror=small.yaml/mirror"], "run.mirror: ", True),
        (["--run.dir=small.yaml/runs"], "run.dir: cannot write small.yaml/runs: Not a directory; choose another", True),
        (["--lr.warmup.duration=200ep"], "lr.warmup.duration: 200ep is ", True),
        (["--data.workers=1"], "1 rank with 1 loader process each on this host want 2 cores, and there is 1", False),
    ],
)
def test_what_would_stop_the_run_has_status_1(
    said: Doctor, monkeypatch: pytest.MonkeyPatch, argv: list[str], cross: str, stops: bool
) -> None:
    """And what would only slow it down has not. Mutations: a mistake is a status 2 and no line; 1 for any cross."""
    monkeypatch.setattr("dist_trainer.data.stream.cores", lambda: 1)
    if argv == ["--data.train=data/nowhere"]:
        Path("data/nowhere").mkdir()
    status, lines = said(*argv)
    assert any(cross in line for line in crosses(lines)), lines
    assert status == int(stops)
    assert lines[0].startswith("✓ versions: ")


def test_a_sample_that_cannot_be_read_is_found_before_the_run(said: Doctor) -> None:
    """A tar that the index knows, and that is gone. Mutation: the loader's error ends the command."""
    assert said("--duration=4step")[0] == 0
    for tar in Path("data/train").glob("*.tar"):
        tar.unlink()
    status, lines = said("--duration=4step")
    assert status == 1 and any("data/train" in line and "index" in line for line in crosses(lines)), lines


def test_a_server_that_does_not_answer_is_named_and_does_not_stop(
    said: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key, made up here; without one it is said that nothing is sent. Mutation: 90 s of silence."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(Path.cwd()))  # no netrc
    assert "✓ W&B: no API key set up: writes offline" in said("--wandb.mode=online")[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    status, lines = said("--wandb.mode=online")
    assert any(line.startswith("W&B: 127.0.0.1:9 cannot be reached: Connection refused") for line in crosses(lines))
    assert status == 0
    assert "0" * 40 not in "".join(lines)


def test_slow_data_and_a_slow_network_are_said_with_their_figures(
    said: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured speeds in place of real ones. Mutations: compare the wrong way round; forget the size of a sample."""
    monkeypatch.setattr(doctor, "storage_bytes_per_s", lambda *_: 1e3)
    monkeypatch.setattr(doctor, "loader_images_per_s", slow_loader)
    monkeypatch.setattr(doctor, "all_reduce_bytes_per_s", lambda *_: 1e3)
    status, lines = said()
    starts = [
        "network: ",
        "storage: 0 MB/s over all ranks; the step uses ",
        "loader: 7 images/s over all ranks; the step",
    ]
    for cross, start in zip(crosses(lines)[-3:], starts, strict=True):
        assert cross.startswith(start)
    assert status == 0


def slow_loader(stream: object, micro_batch: int) -> tuple[list[object], float]:
    from dist_trainer.run.measure import loader_images_per_s

    return loader_images_per_s(stream, micro_batch)[0], 7.0  # type: ignore[arg-type, return-value]


def test_a_gpu_without_bf16_is_told_to_take_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: ask whether it can at all, which emulation can."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    device = torch.device("cuda", 0)
    note = numerics.precision_note("bf16", device)
    assert note == "engine.precision: Tesla V100 has no bf16 and emulates it: fp32 is faster there"
    assert numerics.precision_note("fp32", device) is None
    assert numerics.precision_note("bf16", torch.device("cpu")) is None


def test_a_disk_that_is_too_small_for_the_checkpoints_stops(said: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a byte: two checkpoints and the one being written, the best weights twice, two snapshots, one for each kept
    checkpoint, one more, and the average, of tensors as an earlier revision left them.

    Mutations: count one checkpoint; forget EMA, its statistics, or snapshots.
    """
    (kept,) = (ROOT / "tests" / "fixtures" / "81fd9c4").glob("runs/*/checkpoints/step_00000010")
    sizes = {
        file.stem: sum(value.numel() * value.element_size() for value in load_file(file).values())
        for file in kept.glob("*.safetensors")
    }
    weights = load_file(kept / "model.safetensors").items()
    statistics = sum(value.nbytes for name, value in weights if "running" in name)
    whole = 3 * (sizes["model"] + sizes["optim"] + sizes["ema"] + 2 * statistics) + (2 + 6) * sizes["model"]
    for free, status in ((whole, 0), (whole - 1, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        ended, lines = said("--duration=20step")
        assert ended == status, lines
    (cross,) = [line for line in crosses(lines) if line.startswith("space: ")]
    assert cross.startswith(f"space: a run takes {whole / 1e3:.3g} kB at most, and {whole / 1e3:.3g} kB are free in ")
    assert cross.endswith("make room, choose another --run.dir, or keep fewer")


def test_more_ranks_than_the_batch_feeds_are_counted(said: Doctor, tmp_path: Path) -> None:
    """On two ranks: a real start. Mutation: compare with the largest divisor."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dist_trainer",
        "doctor", "small.yaml", "--batch.micro_batch=16",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert crosses(done.stdout.splitlines())[0].startswith("devices: 2 ranks on 1 host: ")
    assert "the batch feeds 1: start 1, or raise batch.global_batch" in done.stdout
