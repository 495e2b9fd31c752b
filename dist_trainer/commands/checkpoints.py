"""`checkpoints`: what a run has saved, whether it is whole, and what is in it."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dist_trainer.config.arguments import new_parser, parse
from dist_trainer.errors import UserError, nearest, readable_size
from dist_trainer.log.names import SCORES
from dist_trainer.report.table import aligned
from dist_trainer.run_folder import checkpoint
from dist_trainer.run_folder.fetch import local_run, local_weights
from dist_trainer.run_folder.mirror import KINDS
from dist_trainer.storage.storage import is_remote
from dist_trainer.tensors import kind

USAGE = """usage: dist-trainer checkpoints ls|verify|show RUN

  ls RUN       step, epoch, age, bytes, whole or why not, and metrics of every checkpoint
  verify RUN   the same, with the digest of every file; status 1 if one is damaged
  show RUN     tensors of the newest checkpoint: shapes, types, norms, values that are not finite; or of RUN@STEP

RUN is a run folder, also at a URL; show takes a checkpoint folder too.
"""


def command(argv: list[str]) -> int:
    """Raises UserError for what is no run folder."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    verb, *rest = argv
    if verb not in VERBS:
        raise UserError(f"checkpoints: no command {verb!r}{nearest(verb, VERBS)}; there are {', '.join(VERBS)}")
    parser = new_parser(f"checkpoints {verb}", "What a run has saved.", config=False)
    parser.add_argument("run", type=str, help="a run folder, also at a URL")
    return VERBS[verb](str(parse(parser, rest).run))


def ls(given: str) -> int:
    run = _run(given)
    print(aligned([HEADER, *(_row(run, each, digests=False, is_here=not is_remote(given)) for each in _folders(run))]))
    return 0


def verify(given: str) -> int:
    run = _run(given)
    rows = [_row(run, each, digests=True, is_here=not is_remote(given)) for each in _folders(run)]
    print(aligned([HEADER, *rows]))
    damaged = [row for row in rows if row[5] != WHOLE]
    print(f"{len(rows) - len(damaged)} of {len(rows)} are whole, by the size and digest of every file")
    return 1 if damaged else 0


def show(given: str) -> int:
    folder = _one(given)
    if reason := checkpoint.fault(folder):
        raise UserError(f"{given}: {folder.name} is not a complete checkpoint ({reason})")
    state = checkpoint.load_state(folder)
    plain = {key: value for key, value in state.items() if not isinstance(value, dict | list)}
    print(f"{folder.parent.name}/{folder.name}")
    print("\n".join(f"  {key}: {json.dumps(value)}" for key, value in plain.items()))
    for name in checkpoint.tensor_names(folder):
        rows = [("tensor", "type and shape", "norm", "not finite")]
        for key, value in checkpoint.load_tensors(folder, name).items():
            numbers = value.double() if value.numel() else torch.zeros(1, dtype=torch.float64)
            bad = int((~numbers.isfinite()).sum())
            rows.append((key, kind(value), f"{float(numbers.norm()):.6g}", str(bad) if bad else ""))
        print(f"\n{name}.safetensors\n{aligned(rows)}")
    return 0


WHOLE = "whole"
HEADER = ("checkpoint", "step", "epoch", "age", "bytes", "state", "metrics")


def _run(given: str) -> Path:
    run = local_run(given, ["checkpoints", "best"])
    if not (run / "config.yaml").is_file():
        raise UserError(f"{given}: not a run folder: it has no config.yaml")
    return run


def _one(given: str) -> Path:
    """The checkpoint that RUN, RUN@STEP or a checkpoint folder names. Raises UserError where there is none."""
    name, sign, step = given.rpartition("@") if given.rpartition("@")[2].isdigit() else (given, "", "")
    if not sign and ((folder := Path(given)) / checkpoint.MANIFEST).is_file():
        return folder
    if not sign and Path(given.rstrip("/")).name.startswith("step_"):
        return local_weights(given)
    there = {checkpoint.step_of(each): each for each in checkpoint.complete(_run(name) / "checkpoints")}
    if not there:
        raise UserError(f"{name}: has no complete checkpoint")
    if sign and int(step) not in there:
        raise UserError(f"{name}: no checkpoint of step {step}; it has {', '.join(map(str, sorted(there)))}")
    return there[int(step) if sign else max(there)]


def _folders(run: Path) -> Iterator[Path]:
    """All of them, whole or not, the newest first; then the best weights and the average."""
    for name in ("checkpoints", *KINDS):
        yield from checkpoint.steps(run / name)


def _row(run: Path, folder: Path, *, digests: bool, is_here: bool) -> tuple[str, ...]:
    reason = checkpoint.fault(folder, digests=digests)
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        state = {}
    files = [each.stat() for each in folder.iterdir()]
    age = time.time() - max((each.st_mtime for each in files), default=time.time())
    return (
        str(folder.relative_to(run)),
        f"{checkpoint.step_of(folder):,}",
        f"{state['epoch']:.2f}" if "epoch" in state else "",
        str(timedelta(seconds=round(age))) if is_here else "",
        readable_size(sum(each.st_size for each in files)),
        WHOLE if reason is None else f"not whole: {reason}",
        _metrics(state),
    )


def _metrics(state: dict[str, Any]) -> str:
    """Top-1 of all weights that were scored at this very step."""
    if "weights" in state:  # best/
        return f"{SCORES[state['weights']][0]}/top1 {state['top1']:.2%}"
    scores = state.get("last") if state.get("evaluated_step") == state.get("step") else None
    scores = scores or {name: value for name, value in state.items() if name in SCORES}  # average/
    return "  ".join(f"{SCORES[name][0]}/top1 {value['top1']:.2%}" for name, value in scores.items() if name in SCORES)


VERBS: dict[str, Callable[[str], int]] = {"ls": ls, "verify": verify, "show": show}
