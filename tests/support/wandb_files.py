"""W&B's own files and lines, read back."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from dist_trainer.log.metrics_file import by_step, read_rows

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


def compared(rows: Iterable[dict[str, Any]], *but: str) -> list[dict[str, Any]]:
    """Rows without what W&B adds, without the picture, and without metrics that begin with one of `but`."""
    hidden = ("_", "predictions", *but)
    return [{name: value for name, value in row.items() if not name.startswith(hidden)} for row in rows]


def record(run: Path, *but: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one per step."""
    return compared(by_step(read_rows(run / "metrics.jsonl")), *but)
