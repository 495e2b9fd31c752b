"""`checkpoints ls|verify|show`, and runs at a URL for the commands that read them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import message

from dist_trainer.commands.main import dispatch
from dist_trainer.config.arguments import run_folder_argument
from dist_trainer.errors import UserError
from dist_trainer.run_folder import checkpoint, lineage
from dist_trainer.run_folder.fetch import local_run, local_weights, remove_copies
from dist_trainer.run_folder.mirror import Mirror
from dist_trainer.run_folder.retention import Retention
from dist_trainer.storage.storage import Storage


def model(value: float) -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.full((2, 3, 1, 1), float(value)), "conv.bias": torch.tensor([3.0, 4.0])}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, the later one right after its evaluation, and best weights."""
    folder = tmp_path / "runs" / "one.v2"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("duration: 9step\n")
    lineage.write(folder, [lineage.Begin("a", 0)])
    two = Retention(last=2)
    scores = {"model": {"top1": 0.25}, "ema_bn": {"top1": 0.5}}
    for step, evaluated in ((10, 5), (20, 20)):
        state: dict[str, Any] = {"step": step, "epoch": step / 8, "evaluated_step": evaluated, "last": scores}
        checkpoint.save(folder / "checkpoints", step, {"model": model(step), "optim": {}}, state, two)
    best = {"weights": "ema_bn", "step": 20, "top1": 0.5}
    checkpoint.save(folder / "best", 20, {"model": model(7)}, best)
    return folder


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]


def test_ls_has_a_line_for_each_and_says_why_one_is_not_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes are those of the files. Mutations: leave out what is damaged; scores of an older evaluation."""
    (run / "checkpoints" / "step_00000010" / "model.safetensors").unlink()
    assert dispatch(["checkpoints", "ls", str(run)]) == 0
    header, newest, older, best = rows(capsys)
    assert header == ["checkpoint", "step", "epoch", "age", "bytes", "state", "metrics"]
    size = sum(each.stat().st_size for each in (run / "checkpoints" / "step_00000020").iterdir())
    assert newest[:3] == ["checkpoints/step_00000020", "20", "2.50"]
    assert newest[4:] == [f"{size / 1000:.3g} kB", "whole", "val/top1 25.00%", "val_ema_bn/top1 50.00%"]
    assert older[5:] == ["not whole: model.safetensors is missing"]
    assert best[0] == "best/step_00000020" and best[-1] == "val_ema_bn/top1 50.00%"


def test_verify_reads_every_byte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ls` does not. Mutation: sizes alone."""
    assert dispatch(["checkpoints", "verify", str(run)]) == 0
    assert "3 of 3 are whole" in capsys.readouterr().out
    file = run / "checkpoints" / "step_00000020" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert dispatch(["checkpoints", "ls", str(run)]) == 0
    assert "not whole" not in capsys.readouterr().out
    assert dispatch(["checkpoints", "verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert "not whole: model.safetensors does not match its digest" in said and "2 of 3 are whole" in said


def test_show_names_shapes_types_norms_and_what_is_not_finite(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: 6 values of 10 have the norm 10 * sqrt(6). Mutation: count zeros."""
    assert dispatch(["checkpoints", "show", f"{run}@10"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^conv\.weight +float32 \(2, 3, 1, 1\) +24\.4949$", said, re.MULTILINE), said
    assert re.search(r"^conv\.bias +float32 \(2,\) +5$", said, re.MULTILINE)
    broken = {"w": torch.tensor([1.0, float("nan"), float("inf")])}
    checkpoint.save(run / "checkpoints", 30, {"model": broken}, {"step": 30}, Retention(last=3))
    for given in (str(run), str(run / "checkpoints" / "step_00000030")):
        assert dispatch(["checkpoints", "show", given]) == 0
        assert re.search(r"^w +float32 \(3,\) +nan +2$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["verfy", "x"], "checkpoints: no command 'verfy'; did you mean 'verify'?; there are ls, verify, show"),
        (["ls", "{tmp}"], "{tmp}: not a run folder: it has no config.yaml"),
        (["show", "{run}@15"], "{run}: no checkpoint of step 15; it has 10, 20"),
        (["ls", "file://{tmp}/none"], "file://{tmp}/none: not a run folder: it has no config.yaml"),
    ],
)
def test_what_is_not_there_is_one_line(run: Path, tmp_path: Path, argv: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        dispatch(["checkpoints", *(each.format(tmp=tmp_path, run=run) for each in argv)])
    assert message(caught) == line.format(tmp=tmp_path, run=run)


def test_a_run_at_a_url_is_read_as_one_in_a_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same table but the age; weights bit for bit; nothing is left behind. Mutation: trust what came."""
    place = tmp_path / "mirror" / "one.v2"
    Mirror(str(place), Storage()).bring_up_to_date(run, Retention(last=2))
    url = f"file://{place}"
    assert dispatch(["checkpoints", "verify", str(run)]) == 0
    here = rows(capsys)
    assert dispatch(["checkpoints", "verify", url]) == 0
    ageless = [[cell for cell in row if not re.fullmatch(r"\d:\d\d:\d\d", cell)] for row in here]
    assert rows(capsys) == ageless != here  # of a copy the age is not known
    for weights in (url, f"{url}/best/step_00000020", f"{url}/best/step_00000020/model.safetensors"):
        assert torch.equal(checkpoint.load_weights(local_weights(weights))["conv.weight"], model(7)["conv.weight"])
    assert dispatch(["checkpoints", "show", f"{url}@10"]) == 0
    assert "24.4949" in capsys.readouterr().out
    copies = [local_run(url, ["best"]), local_weights(url)]
    remove_copies()
    assert not any(copy.exists() for copy in copies)
    (place / "checkpoints" / "step_00000010" / "optim.safetensors").write_bytes(b"x")
    assert dispatch(["checkpoints", "verify", url]) == 1
    assert "step_00000010" in capsys.readouterr().out
    shutil.rmtree(place / "best")
    with pytest.raises(UserError) as caught:
        local_weights(url)
    assert message(caught) == f"{url}: no best weights yet"


def test_a_pickle_among_the_files_is_never_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that would write a file, under each name that is read. Mutation: torch.load or pickle.load of any of them."""
    planted = f"cbuiltins\nexec\n(S'open({str(tmp_path / 'run')!r}, \"w\")'\ntR.".encode()
    folder = run / "checkpoints" / "step_00000020"
    for name in ("model.safetensors", "optim.safetensors", "state.json"):
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(planted)
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        before = json.dumps(manifest)
        manifest["files"][name] = {"size": len(planted), "sha256": checkpoint.digest(folder / name)}
        (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises((UserError, ValueError)):
            dispatch(["checkpoints", "show", str(folder)])
        (folder / name).write_bytes(original)
        (folder / checkpoint.MANIFEST).write_text(before)
    assert not (tmp_path / "run").exists()


def test_weights_are_named_by_a_run_or_by_any_part_of_it(run: Path) -> None:
    """Mutations: the run folder itself is taken for a checkpoint; a part has no config."""
    (run / "identity.json").write_text("{}")
    best, last = run / "best" / "step_00000020", run / "checkpoints" / "step_00000020"
    for given, weights in ((run, best), (run / "best", best), (run / "checkpoints", last), (best, best), (last, last)):
        assert local_weights(str(given)) == weights
        folder, argv = run_folder_argument([str(given), "--of", "ema"])
        assert folder is not None and folder.samefile(run)
        assert argv == [str(folder / "config.yaml"), "--of", "ema"]
    file = best / "model.safetensors"
    assert local_weights(str(file)) == file
    shutil.rmtree(run / "best")
    with pytest.raises(UserError) as caught:
        local_weights(str(run))
    assert message(caught) == f"{run}: no best weights yet"
    with pytest.raises(UserError) as caught:
        run_folder_argument([str(run.parent)])
    assert "not a run folder" in message(caught)


def test_an_average_of_two_runs_says_how(run: Path) -> None:
    with pytest.raises(UserError) as caught:
        dispatch(["average", str(run), "runs/other"])
    assert message(caught).startswith("average: takes the config of one run, and runs/other is another; ")
