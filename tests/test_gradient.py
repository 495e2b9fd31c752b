"""The gradient of an accumulated, distributed, partly masked step."""

import json
from pathlib import Path

from running import RANKS, TINY, Session, torchrun


def test_the_reduced_gradient_is_that_of_the_whole_batch(tmp_path: Path, fashion: list[str]) -> None:
    """3 ranks, 4 micro-batches (one rank runs two, two run a ghost), a full step and an epoch's half-masked last one.

    Against torch.autograd over all valid samples at once, batch-norm frozen; float32 sums in another order.
    Mutations: divide by the number of micro-batches instead of valid samples; let ghosts weigh.
    """
    out = tmp_path / "gradient.json"
    argv = [*TINY, *fashion, "--duration=2ep", "--model.args={dropout: 0.0}"]
    session = Session(torchrun(3, str(RANKS / "gradient.py"), str(out), *argv), tmp_path / "log")
    assert session.wait() == 0, session.log.read_text()[-5000:]
    result = json.loads(out.read_text())
    for backend in ("torch", "deepspeed"):
        assert (result[f"{backend} 0 samples"], result[f"{backend} 937 samples"]) == (64, 32)
        assert result[f"{backend} 0"] < 2e-6
        assert result[f"{backend} 937"] < 2e-6
