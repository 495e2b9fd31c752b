"""Where the time of a batch goes: the parts of TrainSamples, each without those inside it."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from dist_trainer.data import decoder, read, samples
from dist_trainer.data.batch import SlotAddress
from dist_trainer.data.samples import TrainSamples

_PARTS: list[tuple[Any, str, str]] = [
    (TrainSamples, "_samples_at", "order: slot to sample ids and keys"),
    (read.Reader, "read", "read: rows of the index, zip"),
    (read.os, "pread", "read: pread"),
    (read.zlib, "crc32", "read: crc32"),
    (samples, "crop_boxes", "crop boxes"),
    (decoder.Decoder, "__call__", "decode"),
    (decoder, "decode_region", "decode"),
    (samples, "resize", "resize"),
    (TrainSamples, "_stack", "stack and flip"),
    (TrainSamples, "__getitem__", "the rest: loops, labels, Batch"),
]
_PIXELS = ("decode", "resize")


def measure_parts(source: TrainSamples, batches: int) -> dict[str, float]:
    """Seconds of CPU time per image by part, over `batches` batches, and of all but pixels; the clock adds a few us."""
    seconds: defaultdict[str, float] = defaultdict(float)
    inside: list[float] = []  # one entry per running part: what its own parts have taken

    def clocked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            inside.append(0.0)
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                taken = time.process_time() - start
                seconds[part] += taken - inside.pop()
                if inside:
                    inside[-1] += taken

        return run

    patches = [patch.object(owner, name, clocked(getattr(owner, name), part)) for owner, name, part in _PARTS]
    source[SlotAddress(0, 0)]
    for each in patches:
        each.start()
    try:
        images = sum(len(source[SlotAddress(step, 0)].ids) for step in range(1, batches + 1))
    finally:
        for each in patches:
            each.stop()
    parts = {part: seconds[part] / images for part in dict.fromkeys(part for *_, part in _PARTS)}
    total = sum(parts.values())
    besides = total - sum(parts[each] for each in _PIXELS)
    return parts | {"all": total, f"all but {' and '.join(_PIXELS)}: {besides / total:.1%}": besides}
