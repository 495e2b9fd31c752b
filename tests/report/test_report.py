"""`dist-trainer report`: what its figures say, and its page in a real browser."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from running import TINY, metrics, run_jobs
from sklearn.metrics import confusion_matrix

from dist_trainer.commands.main import dispatch
from dist_trainer.errors import UserError
from dist_trainer.report.mistakes import mistakes
from dist_trainer.report.read import differing_keys, read_run
from dist_trainer.run.pictures import best_predictions, surely_wrong

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, fashion: list[str]) -> list[Path]:
    """One that was stopped and went on with three ranks, and one of another rate."""
    folder = tmp_path_factory.mktemp("report")
    argv = [*TINY, *fashion, "--eval.every=5step", "--ema.decay=0.9", "--log.csv=true"]
    run_jobs(2, [{"name": "first", "argv": argv, "stop_at": 8}], folder)
    run_jobs(3, [{"name": "first", "argv": argv}], folder)
    run_jobs(2, [{"name": "second", "argv": [*argv, "--lr.peak=0.02"]}], folder)
    return [folder / "first", folder / "second"]


@pytest.fixture(scope="module")
def pages(runs: list[Path]) -> dict[str, Path]:
    """One of one run, one of both."""
    assert dispatch(["report", str(runs[0])]) == 0
    both = runs[0].parent / "both"
    assert dispatch(["report", *map(str, runs), "--out", str(both), "--sort", "val/loss"]) == 0
    return {"one": runs[0] / "report", "both": both}


def test_the_best_weights_predictions_are_those_that_were_scored(runs: list[Path]) -> None:
    """Their share of right ones is the best top-1, also from three ranks. Mutation: keep those of the last weights."""
    for run in runs:
        said = best_predictions(run)
        assert said is not None
        best = json.loads((run / "summary.json").read_text())["best"]
        right = (said["predicted"] == said["label"]).double().mean().item()
        assert right == pytest.approx(best["top1"], abs=1e-12)
        assert said["confidence"].min() > 0 and said["confidence"].max() <= 1
        wrong = surely_wrong(said, 5)
        assert all(said["predicted"][each] != said["label"][each] for each in wrong)
        others = said["confidence"][(said["predicted"] != said["label"])].sort(descending=True).values[:5]
        assert torch.equal(said["confidence"][wrong], others)


def test_confusion_is_that_of_scikit_learn() -> None:
    """With a class without a sample, and bad samples, which are wrong. Mutation: rows and columns change places."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (500,), generator=generator).int()
    predicted = torch.randint(0, 5, (500,), generator=generator).int()
    predicted[:7], label[7:9] = -1, -1
    found = mistakes({"label": label, "predicted": predicted}, ["a", "b", "c", "d", "e"])
    read = (label >= 0) & (predicted >= 0)
    expected = confusion_matrix(label[read], predicted[read], labels=range(5))
    assert np.array_equal(found.confusion, expected)
    assert found.totals.tolist() == [int((label == each).sum()) for each in range(5)]
    assert np.isnan(found.accuracy[4]) and len(found.worst_classes(9)) == 4
    off = expected - np.diag(expected.diagonal())
    name, other, count, share = found.confused_pairs(3)[0]
    assert count == off.max() == expected["abcde".index(name), "abcde".index(other)]
    assert share == count / found.totals["abcde".index(name)]


def test_the_page_tells_what_happened(runs: list[Path], pages: dict[str, Path]) -> None:
    """Mutations: sort by the name; leave out a differing key; the roll-back list of another run."""
    one, both = ((pages[name] / "index.html").read_text() for name in ("one", "both"))
    event = metrics(runs[0], "run/event")[0]
    assert event in one and "instead of 2" in event
    best = max(max(metrics(runs[0], f"{name}/top1")) for name in ("val", "val_ema"))
    assert f"{best:.2%}" in one
    assert differing_keys([read_run(run) for run in runs]) == [("lr.peak", ["0.1", "0.02"])]
    assert "lr.peak" in both and "0.02" in both
    losses = {run.name: min(metrics(run, "val/loss")) for run in runs}
    listed = re.findall(r"<tr><td>(first|second)</td>", both)
    assert listed == sorted(losses, key=lambda name: losses[name])
    for page in (one, both):
        assert not re.search(r"(src|href)=\"(?!data:|#)", page), "it needs nothing beside it"
        assert "<script" not in page
    for folder in pages.values():
        assert {file.stem for file in folder.glob("*.png")} == {"top1", "loss", "rate", "throughput", "phases"}
        assert all(file.read_bytes()[:4] == b"\x89PNG" for file in folder.glob("*.png"))


@pytest.fixture(scope="module")
def address(runs: list[Path], pages: dict[str, Path]) -> Iterator[str]:
    """A web server on loopback of the folder with both pages, and of one that measures them in a frame."""
    (runs[0].parent / "measure.html").write_text(MEASURE)
    handler = functools.partial(QuietHandler, directory=str(runs[0].parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


MEASURE = """<!doctype html>
<body style="margin:0"><iframe id="f" style="border:0;height:900px"></iframe><pre id="out"></pre>
<script>
const [page, width] = location.hash.slice(1).split(",");
const frame = document.getElementById("f");
frame.style.width = width + "px";
frame.onload = () => {
  const inside = frame.contentDocument, images = [...inside.images];
  const text = [...inside.querySelectorAll("svg text")].map(each => each.getBoundingClientRect().height);
  document.getElementById("out").textContent = JSON.stringify({
    width: inside.documentElement.clientWidth, scroll: inside.documentElement.scrollWidth, images: images.length,
    loaded: images.filter(each => each.naturalWidth > 0).length, plots: inside.querySelectorAll("svg").length,
    text: Math.min(...text), paper: frame.contentWindow.getComputedStyle(inside.body).backgroundColor});
};
frame.src = page;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: chromium)")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("page", "dark"), [("first/report", False), ("first/report", True), ("both", False)])
def test_the_page_in_a_browser(address: str, page: str, dark: bool, width: int, tmp_path: Path) -> None:
    """No console error, nothing wider than the window, every image and plot there, text large enough, both schemes.

    Mutations: a table without its own scroll bar; an image that does not decode; dark paper for a light scheme.
    """
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
        f"--user-data-dir={tmp_path}", "--window-size=1400,1000", "--virtual-time-budget=5000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"{address}/measure.html#/{page}/index.html,{width}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = json.loads(re.findall(r'<pre id="out">(.*?)</pre>', done.stdout)[0].replace("&quot;", '"'))
    assert "CONSOLE" not in done.stderr, done.stderr
    assert found["scroll"] <= found["width"], found
    assert width - 20 <= found["width"] <= width, "without the scroll bar"
    assert found["loaded"] == found["images"] >= 5
    assert found["plots"] == 5
    assert found["text"] >= 9, "in pixels"
    assert found["paper"] == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")


def test_a_run_that_still_trains_and_has_not_been_scored(tmp_path: Path, runs: list[Path]) -> None:
    """Only the first lines are there. Mutation: the page needs summary.json."""
    young = tmp_path / "young"
    young.mkdir()
    for name in ("config.yaml", "env.json", "classes.json"):
        shutil.copy(runs[0] / name, young)
    (young / "STATE").write_text("running\n")
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()[:2]
    (young / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "trai')
    assert dispatch(["report", str(young), "--sort", "train/loss"]) == 0
    page = (young / "report" / "index.html").read_text()
    assert "not scored yet" in page and "No evaluation yet" in page and '<figure id="plot-loss"' in page


def test_mistakes_cost_one_line(tmp_path: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is no run, one without metrics, other classes, one name twice, no such metric, no matplotlib."""
    with pytest.raises(UserError, match=f"^{tmp_path}: not a run folder"):
        dispatch(["report", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^--out: cannot write {tmp_path}/file: "):
        dispatch(["report", str(runs[0]), "--out", str(tmp_path / "file")])
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    (other / "classes.json").write_text(json.dumps(["cat", "dog"]))
    with pytest.raises(UserError, match="have different classes"):
        dispatch(["report", str(runs[0]), str(other)])
    with pytest.raises(UserError, match="called first"):
        dispatch(["report", str(runs[0]), str(runs[0])])
    with pytest.raises(UserError, match="--sort: no metric 'top1'"):
        dispatch(["report", str(runs[0]), "--sort", "top1"])
    (other / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no metrics yet"):
        dispatch(["report", str(other)])
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "dist_trainer.report.p"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"needs matplotlib: pip install 'dist_trainer\[report\]'"):
        dispatch(["report", str(runs[0])])


def test_without_the_data_the_rest_is_there(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes and confusion come from the run folder alone. Mutation: names from the index."""
    moved = shutil.copytree(runs[0], tmp_path / "moved")
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(re.sub(r"val: .*", f"val: {tmp_path / 'gone'}", text))
    assert dispatch(["report", str(moved)]) == 0
    page = (moved / "report" / "index.html").read_text()
    assert "no images of what is wrong" in capsys.readouterr().out
    assert "Most confused pairs" in page and "The images are left out" in page
    assert all(name in page for name in json.loads((runs[0] / "classes.json").read_text())[:3])
