"""A save changes nothing but the disk: neither when it happens, nor how, nor whether."""

import hashlib
from pathlib import Path

from running import TINY, run_jobs


def files(run: Path) -> dict[str, str]:
    """The digest of every file of tensors."""
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in run.rglob("*.safetensors")
    }


def test_background_and_synchronous_saves_have_the_same_bytes_and_neither_changes_a_weight(
    fashion: list[str], tmp_path: Path
) -> None:
    """Checkpoints, best weights, snapshots, the average, on two ranks; and a run that saves at its end alone.

    Mutations: hand over the live tensors; let a save draw a random number.
    """
    more = ["--ema.decay=0.9", "--averaging.top_k=2", "--precise_bn.num_samples=256", "--eval.every=4step"]
    often = [*TINY, *fashion, *more, "--checkpoint.every=2step", "--checkpoint.keep_last=99"]
    jobs = [
        {"name": "behind", "argv": often},
        {"name": "at_once", "argv": [*often, "--checkpoint.background=false"]},
        {"name": "at_the_end", "argv": [*TINY, *fashion, *more, "--checkpoint.every=null"]},
    ]
    run_jobs(2, jobs, tmp_path)
    behind, at_once, at_the_end = (files(tmp_path / job["name"]) for job in jobs)
    assert len([name for name in behind if name.startswith("checkpoints/") and "model" in name]) >= 10
    assert behind == at_once
    assert at_the_end.items() <= behind.items()
