"""What one GPU shows, in one command: is everything right there, and how fast is a step?

    make gpu                                    (or: PYTHONPATH=. python3 benchmarks/gpu.py)
    make gpu GPU="--device cpu --quick"         a dry run, which shows that all of it runs, and no figure of a GPU

Needs torch 2.6 or newer, and of this package only its files; what else is missing is skipped by name. Writes
gpu-NAME.json and gpu-NAME.md into --out, which is benchmarks/results. Exit status 1: a check failed.
"""

import os
import sys
import time

STARTED = time.monotonic()
if "cpu" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for run.deterministic; read when cuBLAS starts

import importlib.util  # noqa: E402
import json  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

NEEDED = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "fsspec": "fsspec",
          "rich": "rich", "yaml": "pyyaml"}  # fmt: skip
OPTIONAL = {"deepspeed": "ZeRO 0 to 3", "torchvision": "ResNet-50", "timm": "its optimizers and SyncBatchNorm"}
BUDGET_S = 440.0
"""After that no new measurement begins."""


def absent(names: dict[str, str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def main() -> int:
    if missing := [NEEDED[name] for name in absent(NEEDED)]:
        print(f"gpu.py needs packages that this Python does not have: pip install {' '.join(missing)}")
        return 2
    import torch
    from machine import SMOKE, machine, parser

    from dist_trainer.distributed.world import init_world, shutdown_world
    from dist_trainer.engine.numerics import set_numerics

    options = parser(__doc__, "small networks, few rounds")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder of the result files")
    arguments = options.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: torch finds no GPU here; --device cpu is a dry run")
        return 2
    set_numerics(deterministic=False)
    world = init_world()
    skipped = [f"no {name}: {what} left out" for name, what in OPTIONAL.items() if name in absent(OPTIONAL)]
    print("\n".join([machine(), *skipped]), flush=True)
    checks = checked(world, arguments.quick)
    rows, notes, goals = measured(world, arguments.quick)
    result = {"machine": machine(), "seconds": time.monotonic() - STARTED, "checks": checks, "goals": goals}
    result["left_out"] = [*skipped, *notes]
    page = report(result, rows, figures=not SMOKE)
    print(page[page.index("\n## Steps") :], flush=True)
    if not SMOKE:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else "dry run on the CPU"
        write(Path(arguments.out), f"gpu-{name.replace(' ', '-')}", {**rows, **result}, page)
    shutdown_world()
    failed = [check["name"] for check in checks if check["verdict"] == "FAILED"]
    failed += [note for note in notes if note.startswith("FAILED")]
    if failed:
        print(f"gpu.py: failed: {'; '.join(note.removeprefix('FAILED: ') for note in failed)}")
    return 1 if failed else 0


def checked(world: Any, quick: bool) -> list[dict[str, str]]:
    from gpu_checks import all_checks

    checks = []
    for name, verdict, line in all_checks(world, quick):
        checks.append({"name": name, "verdict": verdict, "line": line})
        print(f"{verdict:<8}{name}: {line}", flush=True)
    return checks


def measured(world: Any, quick: bool) -> tuple[Any, list[str], list[str]]:
    """(rows of figures, what was left out, goals)."""
    from gpu_checks import SMALL
    from gpu_speed import held_to_goals, other_rows, step_rows
    from steps import Task

    if quick or world.device.type == "cpu" or absent({"torchvision": ""}):
        tasks = [replace(SMALL, batch=4) if world.device.type == "cpu" else SMALL]
    else:
        tasks = [Task(model="torchvision/resnet50", batch=batch, pixels=224, classes=1000) for batch in (256, 32)]
    rows, notes = {}, []
    for number, task in enumerate(tasks):
        left = STARTED + BUDGET_S - time.monotonic()
        deadline = time.monotonic() + left / (len(tasks) - number)
        rounds, count = (1, 2) if quick else (7, 6 if task.batch >= 256 else 20)
        found, left_out = step_rows(task, world, rounds=rounds, count=count, deadline=deadline)
        rows |= found
        notes += left_out
    rows |= other_rows(tasks[0], world, quick)
    return rows, notes, held_to_goals(rows)


def write(folder: Path, stem: str, result: dict[str, Any], page: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(page)
    print(f"{folder / stem}.json, {folder / stem}.md", flush=True)


def report(result: dict[str, Any], rows: Any, *, figures: bool) -> str:
    """The result as a Markdown page. Without `figures`, only what ran."""
    from machine import text

    lines = [f"# {result['machine']}", "", f"`make gpu`, {result['seconds']:.0f} s.", "", "## Checks", ""]
    lines += ["| | check | |", "|---|---|---|"]
    lines += [f"| {each['verdict']} | {each['name']} | {each['line']} |" for each in result["checks"]]
    lines += ["", "## Steps", ""]
    steps = {name: row for name, row in rows.items() if "images_per_s" in row}
    if not figures:
        lines += [f"ran: {'; '.join(rows)}"]
    else:
        lines += [
            "bf16, channels_last, one rank. ms of a step: median, least and most of the rounds; the ratio is to the",
            "bare loop. Between: ms on the device from the end of backward to the next forward.",
            "",
            "| | ms | least | most | ratio | images/s | between | peak memory |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in steps.items():
            between, peak = row.get("between_backward_and_forward_s"), row.get("peak_bytes")
            cells = [f"{1e3 * row[key]:.2f}" for key in ("ours", "least", "most")]
            cells += [f"{row['ratio']:.3f}", f"{row['images_per_s']:.0f}"]
            cells += ["" if between is None else f"{1e3 * between:.2f}", "" if peak is None else text(peak, "B")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += [
            "",
            *(f"- {name}: {text(row['ours'], row['unit'])}" for name, row in rows.items() if name not in steps),
        ]
        lines += [f"- goal: {line}" for line in result["goals"]]
    lines += [f"- left out: {line}" for line in result["left_out"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # engines of DeepSpeed are not built to be torn down several at a time
