"""With engine.sums: exact, a run ends with the same bits on any number of ranks and at ZeRO 0, 1 and 2."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from exact_reducer import NUM_SLOTS, Branches
from running import RANKS, ROOT, TINY, Session, metrics, newest, run_jobs, run_ranks, tensors, torchrun, wait_for_step
from safetensors.torch import load_file

from dist_trainer.commands.main import dispatch
from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig, Duration, make_plan
from dist_trainer.tensors import bit_sums
from dist_trainer.tensors import sha256 as digest_of

WORLDS = (1, 2, 3, 4)
# Each world at another stage, so that one comparison proves all. Of 4 micro-batches, 3 ranks run two ghosts.
STAGE = {1: "--engine.zero=0", 2: "--engine.zero=1", 3: "--engine.zero=2", 4: "--engine.backend=torch"}
POISONED = (6, 2)
"""The step and the micro-batch whose gradient is NaN."""
SETTINGS: dict[str, list[str]] = {
    "averaged": ["--ema.decay=0.9", "--precise_bn.num_samples=112", "--averaging.top_k=2", "--eval.every=5step",
                 "--mixing.mixup=0.4", "--mixing.cutmix=1", "--log.every=3step"],
    "bf16": ["--engine.precision=bf16", "--engine.clip_grad_norm=0.05", "--optimizer.name=adamw",
             "--optimizer.args={}", "--lr.peak=0.001", "--checkpoint.every=3step"],
    "blocks": ["--model.name=small_resnet", "--model.args={stem_width: 8, widths: [8, 12], depths: [1, 1]}",
               "--engine.gradient_checkpointing=true", "--batch.global_batch=96", "--batch.micro_batch=16",
               "--engine.precision=bf16", "--augment.flip=0.5"],
    "skipped": ["--model.freeze=[conv1]", "--checkpoint.every=4step", "--checkpoint.keep_last=9"],
    "rolled back": ["--engine.not_finite=roll_back", "--checkpoint.every=4step", "--ema.decay=0.5"],
}  # fmt: skip


def poison(world: int) -> str:
    """In the words of tiny:SmoothNet: the n-th forward of a rank. Exact sums run no ghosts."""
    plan = make_plan(
        BatchConfig(global_batch=64, micro_batch=16), Duration.parse("1ep", "duration"), world=world, num_samples=640
    )
    step, slot = POISONED
    (rank,) = [rank for rank in range(world) if slot in plan.slots_of(rank)]
    own = plan.slots_of(rank)
    return f"--model.args={{poison: [{step * len(own) + slot - own.start}, {rank}]}}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, fashion: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("same-bits")
    argv = [*TINY, *fashion, "--engine.sums=exact"]
    for world in WORLDS:
        for name, setting in SETTINGS.items():
            more = [poison(world)] if name in ("skipped", "rolled back") else []
            if name == "blocks":  # 500 samples in batches of 96: most of an epoch's last one is masked
                more = [fashion[1].replace("--data.val", "--data.train")]
            at = [f"--run.dir={folder}", f"--run.name={name}-{world}"]
            run_ranks(world, "train_command", folder, folder / "said", "", *argv, *setting, *more, STAGE[world], *at)
    return folder


def left(run: Path) -> dict[str, str]:
    """Digests of all that a run left: each tensor file of its checkpoints, best and average, and its lines of metrics
    without times, and without events, which tell the world.
    """
    found = {
        str(path.relative_to(run)): sha256(path.read_bytes()).hexdigest() for path in sorted(run.rglob("*.safetensors"))
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "run/event" not in row]
    untimed = [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]
    return {**found, "metrics": json.dumps(untimed)}


@pytest.mark.parametrize("name", SETTINGS)
def test_all_worlds_and_stages_end_with_the_same_bits(runs: Path, name: str) -> None:
    """Weights, momentum, average, statistics, re-estimated ones, the mean of the best, and every metric.

    Mutations: W / num_valid before backward; gradients accumulate in .grad; a ghost is counted; float64 without a grid;
    losses, batch-norm's or PreciseBN's sums in float64 alone; the norm by partitions.
    """
    one = left(runs / f"{name}-1")
    kinds = {Path(path).stem for path in one}
    assert {"model", "optim", "metrics"} <= kinds
    assert name != "averaged" or {"ema", "bn_model", "bn_ema"} <= kinds
    assert len(json.loads(one["metrics"].replace("NaN", "null"))) > 5
    for world in WORLDS[1:]:
        other = left(runs / f"{name}-{world}")
        assert other.keys() == one.keys()
        assert [path for path in one if other[path] != one[path]] == [], f"{world} ranks"


def test_the_settings_do_what_they_are_there_for(runs: Path) -> None:
    """A step is skipped, a roll-back passes some, clipping is felt, and the average has two members."""
    assert metrics(runs / "skipped-3", "train/skipped")[-1] == 1
    assert metrics(runs / "rolled back-2", "train/skipped")[-1] > 3
    assert min(metrics(runs / "bf16-1", "train/grad_norm")) > 0.05
    assert (runs / "averaged-4" / "average").is_dir()


@pytest.mark.parametrize("world", WORLDS)
def test_the_gradient_is_the_closed_form_in_any_buckets(tmp_path: Path, world: int) -> None:
    """Of 4 and of 12 micro-batches: each rounded to 2^-48, the sum rounded to float32, in seven buckets. What nothing
    reaches is zero, in the second step too.

    Mutations: float64 without the grid; what was not reached keeps its former value; the pieces of a bucket are cut
    elsewhere by sender and receiver.
    """
    run_ranks(world, "exact_reducer", tmp_path)
    for num_slots in NUM_SLOTS:
        found = load_file(tmp_path / f"{num_slots}-{world}.safetensors")
        for step in range(2):
            model = Branches()
            total = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in model.named_parameters()}
            for slot in range(num_slots):
                model.zero_grad()
                (model.loss(step, slot) / num_slots).backward()
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        total[name] += (parameter.grad.double() * 2**48).round() / 2**48
            for name, value in total.items():
                assert torch.equal(found[f"{step} {name}"], value.float()), (step, name)
    assert not found["1 never"].any() and found["0 rare.weight"].any() and found["1 layers.3.weight"].any()


def test_exact_sums_are_fast_ones_up_to_rounding(runs: Path, tmp_path: Path, fashion: list[str]) -> None:
    """20 steps of a smooth network. Mutation: forget a micro-batch."""
    run_jobs(2, [{"name": "fast", "argv": [*TINY, *fashion, *SETTINGS["averaged"]]}], tmp_path)
    fast, exact = tensors(tmp_path / "fast"), tensors(runs / "averaged-2")
    for name, value in fast.items():
        torch.testing.assert_close(exact[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_summary_says_what_is_promised_and_the_digests(runs: Path) -> None:
    """The digest is that of the weights in the checkpoint. Mutations: of the best weights; of bytes without names or
    shapes.
    """
    run = runs / "averaged-3"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["bits"].startswith("the same bits on any number of ranks")
    for name in ("model", "ema"):
        state = load_file(newest(run) / f"{name}.safetensors")
        assert summary["weights_sha256"][name] == digest_of(state)
        renamed = {f"{key}_": value for key, value in state.items()}
        reshaped = {key: value[None] for key, value in state.items()}
        assert len({digest_of(each) for each in (state, renamed, reshaped)}) == 3
    assert summary["weights_sha256"] == json.loads((runs / "averaged-1" / "summary.json").read_text())["weights_sha256"]


def test_eval_prints_the_digest_of_what_it_scores(runs: Path) -> None:
    """Of the average in the last checkpoint, here. Mutation: that of the model beside it."""
    run = runs / "averaged-1"
    argv = ["eval", str(run), "--weights", str(newest(run)), "--of", "ema"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{RANKS}"}
    command = [sys.executable, "-m", "dist_trainer", *argv]
    said = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    digest = json.loads((run / "summary.json").read_text())["weights_sha256"]["ema"]
    assert said.stdout.splitlines()[-1] == f"sha256 {digest}"


def test_values_beyond_the_bound_are_counted_and_said(tmp_path: Path, fashion: list[str]) -> None:
    """A loss times 10,000: the run goes on, metrics and summary say it, and the count is the same on 1 and 2 ranks.

    Mutation: no count where a rank has one micro-batch.
    """
    steep = ["--loss.name=tiny:Scaled", "--loss.args={factor: 10000}", "--loss.label_smoothing=0", "--lr.peak=1.0e-6",
             "--duration=5step", "--engine.sums=exact"]  # fmt: skip
    for world in (1, 2, 4):
        run_jobs(world, [{"name": f"steep-{world}", "argv": [*TINY, *fashion, *steep]}], tmp_path)
    counts = [metrics(tmp_path / f"steep-{world}", "train/beyond") for world in (1, 2, 4)]
    assert counts[0][-1] > 0 and counts[0] == sorted(counts[0])
    assert counts[0][0] == counts[1][0] == counts[2][0]  # of the first step, from equal weights
    summary = json.loads((tmp_path / "steep-2" / "summary.json").read_text())
    assert summary["bits"].startswith("up to rounding: ")


def test_a_rank_with_other_weights_is_named_and_nothing_is_saved(tmp_path: Path, fashion: list[str]) -> None:
    """One bit of one weight on the last of three ranks. Mutation: no comparison."""
    run_ranks(3, "one_bit", tmp_path, *TINY, *fashion, f"--run.dir={tmp_path}", "--run.name=run")
    for rank in range(3):
        said = (tmp_path / f"said-{rank}").read_text()
        assert said.startswith("rank 2: other weights than the other ranks have, first in conv2.weight; ")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_the_sum_of_bits_changes_with_each_bit() -> None:
    """Mutation: a sum of values, in which the last bit of a small one is lost."""
    weights = torch.linspace(-1e9, 1e9, 100)
    before = bit_sums([weights])
    for bit in range(31):
        weights.view(torch.int32)[50] ^= 1 << bit
        assert not torch.equal(bit_sums([weights]), before)
        weights.view(torch.int32)[50] ^= 1 << bit


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--engine.zero=3"], "engine.zero: 3"),
        (["--engine.compile=true"], "engine.compile: true"),
        (["--model.sync_bn=true"], "model.sync_bn: true"),
        (["--optimizer.args={fused: true, momentum: 0.9}"], "a fused optimizer"),
        (["--data.source=stream", "--data.num_samples=64", "--precise_bn.num_samples=0"], "data.source: stream"),
    ],
)
def test_what_cannot_be_promised_is_refused_by_name(argv: list[str], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By plan too. Mutation: train, and break the promise."""
    monkeypatch.chdir(ROOT / "tests" / "fixtures" / "81fd9c4")
    with pytest.raises(UserError) as caught:
        dispatch(["plan", "small.yaml", "--engine.sums=exact", *argv])
    assert str(caught.value) == f"engine.sums: exact cannot be promised with {key}; change one of them"


def test_threads_belong_to_exact_sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "tests" / "fixtures" / "81fd9c4")
    with pytest.raises(UserError, match=r"engine.threads: 2 is for engine.sums: exact; set OMP_NUM_THREADS"):
        dispatch(["plan", "small.yaml", "--engine.threads=2"])


def test_plan_says_what_is_promised(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT / "tests" / "fixtures" / "81fd9c4")
    for argv, line in (
        (["--engine.sums=exact"], "the same bits on any number of ranks (one kind of processor, the same versions)"),
        ([], "up to rounding on another number of ranks: engine.sums is fast"),
        (["--model.sync_bn=true"], "other weights on another number of ranks: model.sync_bn"),
    ):
        assert dispatch(["plan", "small.yaml", "--show=bits", *argv]) == 0
        assert capsys.readouterr().out == f"{line}\n"


def command(*argv: str) -> list[str]:
    return ["-m", "dist_trainer", "train", "small.yaml", "--run.name=run", "--batch.micro_batch=2",
            "--engine.sums=exact", *argv]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "tests" / "fixtures" / "81fd9c4", tmp_path / "here", ignore=shutil.ignore_patterns("runs"))
    return tmp_path / "here"


def test_threads_come_from_the_config_and_not_from_the_machine(here: Path) -> None:
    """OMP_NUM_THREADS of 1 and of 2 end alike. Mutation: leave it to the environment."""
    large = ["--model.args={stem_width: 64, widths: [64, 128], depths: [1, 1]}", "--duration=4step"]
    for threads in ("1", "2"):
        argv = [sys.executable, *command(*large, f"--run.dir=runs-{threads}")]
        assert Session(argv, here / "log", folder=here, OMP_NUM_THREADS=threads).wait() == 0
    ours, theirs = (left(here / f"runs-{threads}" / "run") for threads in ("1", "2"))
    assert ours == theirs


@pytest.mark.slow  # six starts of the ranks
def test_from_4_to_3_to_1_to_2_ranks_across_kills_is_the_run_of_one_that_was_not_disturbed(here: Path) -> None:
    """Each is killed by SIGKILL, all ranks at once, at another step after a checkpoint."""
    argv = command("--duration=60step", "--checkpoint.every=5step", "--eval.every=20step", "--log.every=1step")
    stages = {4: "--engine.zero=1", 3: "--engine.zero=0", 1: "--engine.backend=torch", 2: "--engine.zero=2"}
    for world, step in ((4, 12), (3, 26), (1, 41)):
        session = Session(torchrun(world, *argv, stages[world]), here / "log", folder=here)
        wait_for_step(session, here / "runs" / "run", step)
        session.kill()
    assert Session(torchrun(2, *argv, stages[2]), here / "log", folder=here).wait() == 0
    argv = [sys.executable, *argv, "--run.dir=undisturbed"]
    assert Session(argv, here / "log", folder=here).wait() == 0
    assert left(here / "runs" / "run") == left(here / "undisturbed" / "run")
