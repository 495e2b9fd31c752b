"""A run whose config changes between starts keeps its folder, its weights and its record, or is refused in a line."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import ROOT, Session, metrics, run_ranks, tensors, wait_for_step

from dist_trainer.commands.main import dispatch
from dist_trainer.run_folder import checkpoint
from dist_trainer.run_folder.identity import FREE, KEYS

OLD = "small-3cb02d9e"
SHORT = ["--duration=4step", "--lr.schedule.name=constant"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of data, a config and a run folder that stands at step 10 of 16."""
    monkeypatch.chdir(shutil.copytree(ROOT / "tests" / "fixtures" / "81fd9c4", tmp_path / "here"))
    return tmp_path / "here"


@pytest.fixture
def train(here: Path, tmp_path: Path) -> Any:
    def run(*argv: str, later: str = "") -> str:
        """What `train small.yaml` prints to its end."""
        run_ranks(1, "train_command", here, tmp_path / "said", later, "small.yaml", *argv)
        return (tmp_path / "said").read_text()

    return run


def new_folders(here: Path) -> list[Path]:
    return [path for path in (here / "runs").iterdir() if path.name != OLD]


def allow(*keys: str) -> str:
    return f"--run.allow_change={json.dumps(keys)}"


# Which keys


OTHER: dict[str, str] = {
    "averaging.greedy": "true",
    "averaging.metric": "val/loss",
    "averaging.top_k": "3",
    "checkpoint.background": "false",
    "checkpoint.best_metric": "val_ema/loss",
    "checkpoint.every": "3step",
    "checkpoint.grace": "19",
    "checkpoint.keep_best": "2",
    "checkpoint.keep_every": "2",
    "checkpoint.keep_last": "1",
    "checkpoint.max_failed": "2",
    "data.max_bad": "7",
    "ema.device": "cpu",
    "eval.bad": "fail",
    "eval.classes": "subset",
    "eval.batch": "18",
    "eval.crop": "24",
    "eval.every": "1step",
    "eval.interpolation": "bicubic",
    "eval.resize": "26",
    "eval.train_samples": "16",
    "log.csv": "true",
    "log.every": "1step",
    "log.tensorboard": "true",
    "log.verbose": "true",
    "precise_bn.num_samples": "48",
    "precise_bn.transform": "eval",
}
"""Another value of each key of evaluation, logging, saving and averaging. They change no bit of the weights."""
LATER = {
    *("log.csv", "log.tensorboard", "log.verbose", "eval.classes"),
    *(f"checkpoint.{key}" for key in ("background", "best_metric", "grace", "keep_best", "keep_every", "max_failed")),
}
"""Those that the version which made the folder did not have."""

ROUNDED: dict[str, str] = {
    "engine.backend": "torch",
    "engine.compile": "true",
    "engine.gradient_checkpointing": "true",
    "engine.zero": "3",
    "model.channels_last": "false",
    "run.deterministic": "true",
}
"""Of layout and engine: they add numbers in another order."""


def test_all_keys_that_are_free_to_change_are_tried_here() -> None:
    assert {*OTHER, *ROUNDED, "data.val_fingerprint"} == {key for key, row in KEYS.items() if row == FREE}


def test_no_key_of_evaluation_logging_or_saving_changes_a_weight(train: Any, here: Path) -> None:
    """Each alone is one line when the run goes on, in the same folder, and the weights are bit for bit the same.

    Mutations: evaluation draws from the training streams; one of the keys counts.
    """
    train(*SHORT, "--run.dir=a")
    (plain,) = (here / "a").iterdir()
    train(*SHORT, "--run.dir=b", *(f"--{key}={value}" for key, value in OTHER.items()))
    (other,) = (here / "b").iterdir()
    assert other.name == plain.name
    for kind in ("model", "ema", "optim"):
        ours, theirs = tensors(other, kind), tensors(plain, kind)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    said = train(*(f"--{key}={value}" for key, value in OTHER.items()))
    lines = [line for line in said.splitlines() if line.startswith("changed, without effect on training: ")]
    assert {line.split()[5] for line in lines} == set(OTHER) - LATER
    assert not new_folders(here)


COMPILE = pytest.param("engine.compile", marks=pytest.mark.slow)


@pytest.mark.parametrize("key", [*sorted(set(ROUNDED) - {"engine.compile"}), COMPILE])
def test_layout_and_engine_change_weights_by_rounding_alone(train: Any, here: Path, key: str) -> None:
    """4 steps in float32: within 1e-5 of weights of about 1."""
    train(*SHORT, "--run.dir=a")
    train(*SHORT, "--run.dir=b", f"--{key}={ROUNDED[key]}")
    (plain,), (other,) = (here / "a").iterdir(), (here / "b").iterdir()
    assert other.name == plain.name
    ours, theirs = tensors(other), tensors(plain)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)


# A later version


def test_a_version_with_one_more_key_goes_on_with_todays_run(train: Any, here: Path) -> None:
    """In the same folder to the same end. Mutation: keys at their first default count."""
    assert f"run folder runs/{OLD}, resuming from step_00000010" in train(later="yes")
    assert not new_folders(here)
    assert metrics(here / "runs" / OLD, "step")[-1] == 16


# Extending and changing


def test_a_finished_run_is_extended_as_if_it_had_been_that_long(train: Any, here: Path) -> None:
    """With a constant rate, 4 steps and then 8 are 8 at once, bit for bit. config.yaml, the summary and changes.json
    say since when.

    Mutations: a summary that says done ends the start; the plan keeps the old length.
    """
    said = train(*SHORT, "--run.dir=a")
    longer = [*SHORT, "--duration=8step", "--run.dir=a"]
    (folder,) = (here / "a").iterdir()
    assert ": complete" in train(*SHORT, "--run.dir=a")
    said = train(*longer, allow("duration"))
    assert "changed: duration '4step' -> '8step'" in said
    assert f"run folder a/{folder.name}, resuming from step_00000004" in said
    assert "from step 4: duration '4step' -> '8step'" in said
    assert [path.name for path in (here / "a").iterdir()] == [folder.name]
    assert (folder / "config.yaml").read_text().startswith("# from step 4: duration '4step' -> '8step'\n")
    assert yaml.safe_load((folder / "config.yaml").read_text())["duration"] == "8step"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["changes"] == [{"step": 4, "key": "duration", "old": "4step", "new": "8step"}]
    train(*SHORT, "--duration=8step", "--run.dir=b")
    (at_once,) = (here / "b").iterdir()
    ours, theirs = tensors(folder), tensors(at_once)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert metrics(folder, "train/lr") == metrics(at_once, "train/lr")
    assert f"a/{folder.name}: complete" in train(*longer)  # it is found by its new length, whatever it is called


def test_an_extended_run_that_is_killed_is_not_complete(train: Any, here: Path) -> None:
    """It was done once, and its summary still says so. Mutation: the summary decides, and nothing is trained."""
    train(*SHORT, "--run.dir=a", "--run.name=run")
    longer = [
        "--lr.schedule.name=constant",
        "--run.dir=a",
        "--run.name=run",
        "--duration=1000000step",
        "--log.every=1step",
    ]
    argv = [sys.executable, "-m", "dist_trainer", "train", "small.yaml", *longer]
    session = Session([*argv, "--eval.every=null", allow("duration")], here / "log", folder=here)
    wait_for_step(session, here / "a" / "run", 6)
    session.kill()
    assert (here / "a" / "run" / "STATE").read_text() == "running\n"
    assert json.loads((here / "a" / "run" / "summary.json").read_text())["state"] == "done"
    session = Session(argv, here / "log", folder=here)
    wait_for_step(session, here / "a" / "run", max(metrics(here / "a" / "run", "step")) + 2)
    session.process.terminate()
    assert session.wait(60) == 3
    assert "run: complete" not in session.log.read_text()


def test_another_rate_holds_from_the_checkpoint_on(train: Any, here: Path) -> None:
    """Mutation: the rate of the first start goes on."""
    train("--lr.schedule.name=constant", "--lr.peak=0.02", allow("lr.peak", "lr.schedule.name"))
    run = here / "runs" / OLD
    rates = metrics(run, "train/lr")  # of steps 2, 4, ... 16
    assert rates[5:] == pytest.approx([0.02] * 3)
    assert rates[4] != pytest.approx(0.02)
    assert {each["step"] for each in json.loads((run / "changes.json").read_text())} == {10}


def test_an_average_that_is_switched_on_begins_with_the_weights(train: Any, here: Path) -> None:
    """A run without EMA that goes on with one. At decay 0.5, the first average is half the old weights, half the new.
    It counts the updates before it: with a start at the second, it has begun.

    Mutations: begin with the initial weights; count updates from 0; look for ema.safetensors.
    """
    off = [*SHORT, "--run.dir=a", "--ema.decay=null"]
    train(*off)
    (run,) = (here / "a").iterdir()
    before = tensors(run)
    train(*off, "--ema.decay=0.5", "--ema.start=2step", "--duration=5step", allow("duration", "ema.decay", "ema.start"))
    after, ema = tensors(run), tensors(run, "ema")
    for name in (name for name in before if name.endswith("weight")):
        torch.testing.assert_close(ema[name], (before[name] + after[name]) / 2)
    train(*off, "--ema.decay=null", "--duration=6step", allow("duration", "ema.decay", "ema.start"))
    assert not (checkpoint.complete(run / "checkpoints")[0] / "ema.safetensors").exists()


def test_a_run_cannot_be_made_shorter_than_it_is(train: Any, here: Path) -> None:
    """Nothing in the folder changes. Mutation: it ends at once and says that it is done."""
    run = here / "runs" / OLD
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name[0] != "."}
    line = train("--duration=8step", allow("duration"))
    assert "refused: duration: 8step ends at step 8, and the run stands at step 10" in line
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name[0] != "."}
    assert {path.name for path in set(after) ^ set(before)} <= {"owner.json"}
    assert all(after[path] == data for path, data in before.items())


def test_what_a_run_cannot_change_is_refused(train: Any, here: Path) -> None:
    """Mutation: the order of samples changes under a checkpoint."""
    line = train("--batch.global_batch=32", f"--run.name={OLD}", allow("batch.global_batch"))
    assert f"refused: runs/{OLD} was started with other values, which a run cannot change: batch.global_batch" in line


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_an_argument_that_needs_the_state_of_former_steps_is_refused(train: Any, here: Path, zero: int) -> None:
    """In one line, before the folder changes; one that needs none is taken. Mutation: torch's KeyError at the step."""
    adam = ["--optimizer.name=adam", f"--engine.zero={zero}", "--run.dir=a", "--run.name=run", "--lr.peak=0.001"]
    train(*SHORT, *adam, "--optimizer.args={}")
    before = (here / "a" / "run" / "config.yaml").read_bytes()
    longer = [*SHORT, "--duration=8step", *adam]
    args = "optimizer.args", "optimizer.args.amsgrad", "optimizer.args.eps"
    line = train(*longer, "--optimizer.args={amsgrad: true}", allow("duration", *args))
    assert "refused: optimizer.args: Adam needs 'max_exp_avg_sq' of the steps before" in line
    assert (here / "a" / "run" / "config.yaml").read_bytes() == before
    assert (here / "a" / "run" / "STATE").read_text() == "done\n"
    assert "from step 4: " in train(*longer, "--optimizer.args={eps: 1.0e-6}", allow("duration", *args))


def test_a_new_run_says_how_to_continue_a_similar_one(train: Any, here: Path) -> None:
    """Mutation: it starts from step 0 without a word."""
    said = train("--duration=4step")
    assert f"to continue runs/{OLD} with other values (duration '16step' -> '4step')" in said
    assert len(new_folders(here)) == 1


# Scores that no longer compare


def test_another_validation_set_begins_the_ranking_anew(train: Any, here: Path) -> None:
    """The folder stays, the weights too; best and snapshots are of the new set alone, and one line says so.

    Mutation: the old best, scored on other images, stays the best.
    """
    run = here / "runs" / OLD
    said = train("--data.val=data/train")
    assert said.count("the validation set is another one: best weights and snapshots are chosen anew") == 1
    assert not new_folders(here)
    assert json.loads((run / "summary.json").read_text())["best"]["step"] > 10
    index = json.loads((run / "snapshots" / "index.json").read_text())
    assert all(each["step"] > 10 for each in index["snapshots"])
    assert "chosen anew" not in train("--data.val=data/train", "--duration=20step", allow("duration"))


def test_another_metric_begins_the_snapshots_anew(train: Any, here: Path) -> None:
    """Mutation: values of top-1 are ranked against losses."""
    argv = [*SHORT, "--run.dir=a", "--eval.every=2step"]
    train(*argv, "--averaging.metric=val/top1")
    said = train(*argv, "--averaging.metric=val/loss", "--duration=8step", allow("duration"))
    assert "snapshots are chosen anew: by val/loss, so far by val/top1" in said
    (run,) = (here / "a").iterdir()
    index = json.loads((run / "snapshots" / "index.json").read_text())
    assert index["metric"] == "val/loss"
    assert all(each["step"] > 4 for each in index["snapshots"])
    losses = metrics(run, "val/loss")
    assert {each["value"] for each in index["snapshots"] if each["displaced"] is None} <= set(losses)


# plan


def test_plan_says_which_run_and_where_it_stands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: print the name that a new run would get."""
    assert dispatch(["plan", "small.yaml", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["run"] == f"runs/{OLD}"
    assert figures["stands"].endswith("at step_00000010")
    assert dispatch(["plan", "small.yaml", "--duration=8step"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not begun" in said
    assert f"to continue runs/{OLD} with other values (duration '16step' -> '8step')" in said


# A new run with another one's weights


def test_a_run_begins_with_the_weights_of_another_and_its_momentum_if_asked(train: Any, here: Path) -> None:
    """One step each, from the same weights on the same samples, so with the same gradient g. SGD's momentum is then g,
    or 0.9 old + g; the average is 0.9 of the weights, or of the old average, + 0.1 of the new weights.

    Mutations: load the initial weights; load no momentum, or always; the average begins with the weights always.
    """
    train(*SHORT, "--run.dir=a", "--checkpoint.every=2step", "--checkpoint.keep_last=2")
    (source,) = (here / "a").iterdir()
    argv = ["--duration=1step", "--lr.schedule.name=constant", "--lr.warmup.duration=0ep", "--run.seed=5"]
    said = train(*argv, "--run.dir=b", f"--run.start_from=a/{source.name}")
    assert f"starting with weights of a/{source.name}/checkpoints/step_00000004" in said
    said = train(*argv, "--run.dir=c", f"--run.start_from=a/{source.name}@4+optimizer")
    assert f"starting with weights, momentum and EMA of a/{source.name}/checkpoints/step_00000004" in said
    (plain,), (whole,) = (here / "b").iterdir(), (here / "c").iterdir()
    for name, old in tensors(source, "optim").items():
        difference = tensors(whole, "optim")[name] - tensors(plain, "optim")[name]
        torch.testing.assert_close(difference, 0.9 * old, rtol=1e-4, atol=1e-6)
    weights, average = tensors(source), tensors(source, "ema")
    for name in (name for name in weights if name.endswith("weight")):
        torch.testing.assert_close(
            tensors(plain, "ema")[name], 0.9 * weights[name] + 0.1 * tensors(plain)[name], rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            tensors(whole, "ema")[name], 0.9 * average[name] + 0.1 * tensors(whole)[name], rtol=1e-4, atol=1e-6
        )
    said = train(*argv, "--run.dir=a", f"--run.start_from={source.name}@2")
    assert f"starting with weights of a/{source.name}/checkpoints/step_00000002" in said
    assert ": complete" in train(*argv, "--run.dir=a", f"--run.start_from={source.name}@2")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "run.start_from: nowhere: no run folder with checkpoints, here or in new"),
        ([f"runs/{OLD}@9"], f"run.start_from: runs/{OLD} has no checkpoint of step 9; it has 8, 10"),
        ([f"runs/{OLD}", "--model.pretrained=x"], "run.start_from: model.pretrained names initial weights too"),
        ([f"runs/{OLD}+optimizer", "--optimizer.name=sgdw"], f"the optimizer of runs/{OLD} is sgd, and"),
        ([f"runs/{OLD}", "--model.args.stem_width=8"], "step_00000010: does not fit the model ("),
    ],
)  # fmt: skip
def test_what_a_run_cannot_begin_with_is_refused(train: Any, here: Path, argv: list[str], said: str) -> None:
    """One line, and no folder is left. Mutation: claim the folder first."""
    line = train("--run.dir=new", f"--run.start_from={argv[0]}", *argv[1:])
    assert "refused: " in line
    assert said in line.partition("refused: ")[2]
    assert not (here / "new").exists()


def test_a_misspelt_allowed_key_is_refused_with_the_nearest(train: Any, here: Path) -> None:
    """Mutation: it allows nothing, and another run begins from step 0."""
    line = train("--duration=20step", allow("durations"))
    assert "refused: run.allow_change: no key 'durations'; did you mean 'duration'?" in line
    assert not new_folders(here)
