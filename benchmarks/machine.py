"""What the benchmarks share: arguments, clocks, the machine's name, the table and the JSON file of figures."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, dict[str, Any]]
"""name -> {"ours": x, "peer": y, "ratio": r, "unit": "s"}; peer and ratio are null where there is nothing to compare"""

DATA = Path(__file__).parent.parent / "data"
SMOKE = "--smoke" in sys.argv
"""Whether this is a test that all sides still run. Known here, so that ranks and loader processes know it too."""


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark has; `quick` says what --quick leaves out."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    # With --smoke everything is as quick as it can be.
    arguments.add_argument("--quick", action="store_true", default=SMOKE, help=f"{quick}: within a minute")
    arguments.add_argument(
        "--smoke", action="store_true", help="run every side once, on little data, and show no figures: do they run?"
    )
    arguments.add_argument("--json", help="write the figures to this file")
    return arguments


def machine() -> str:
    """One line: processor, cores, GPU where there is one, torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.machine()
    devices = [f"{len(os.sched_getaffinity(0))} cores of {processor}"]
    devices += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return f"{', '.join(devices)}, torch {torch.__version__}, Python {platform.python_version()}"


def figure(ours: float, peer: float | None = None, unit: str = "s") -> dict[str, Any]:
    return {"ours": ours, "peer": peer, "ratio": ours / peer if peer else None, "unit": unit}


def save(path: str | None, figures: Figures) -> None:
    if path and not SMOKE:
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")


def table(title: str, figures: Figures, peer: str = "peer") -> None:
    """Print `figures`; times in the unit that suits them."""
    if SMOKE:
        print(f"{title}: ran: {'; '.join(figures)}", flush=True)
        return
    width = max([len(name) for name in figures] + [len(title)]) + 2
    print(f"\n{title:<{width}}{'ours':>12}{peer:>16}{'ratio':>8}")
    for name, each in figures.items():
        values = ["" if each[side] is None else text(each[side], each["unit"]) for side in ("ours", "peer")]
        ratio = "" if each["ratio"] is None else f"{each['ratio']:.{3 if each['ratio'] >= 0.1 else 1}g}"
        print(f"{name:<{width}}{values[0]:>12}{values[1]:>16}{ratio:>8}", flush=True)


def text(value: float, unit: str) -> str:
    """`1.3 ms`, `12 MB`, `1204 images/s`."""
    scales = {"s": [(1.0, "s"), (1e-3, "ms"), (1e-6, "us")], "B": [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]}.get(unit)
    if scales is None:
        return f"{value:.0f} {unit}"
    scale, name = next((each for each in scales if abs(value) >= each[0]), scales[-1])
    return f"{value / scale:.3g} {name}"


def interleaved(
    sides: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each side. Sides take turns in changing order, so that a slow moment of the machine meets all
    of them; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for number in range(2 if SMOKE else rounds + 1):
        order.append(order.pop(0))  # nobody always follows the same neighbour
        for name in order:
            start = clock()
            sides[name]()
            if number:
                times[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds on the clock, result)"""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


class PeakMemory:
    """How far this process's memory grew above where it stood, in bytes: `with PeakMemory() as memory: ...`."""

    growth = 0

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.growth = max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    lines: Iterator[str] = iter(Path("/proc/self/status").read_text().splitlines())
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
