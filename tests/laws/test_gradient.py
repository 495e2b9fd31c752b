"""The gradient of an accumulated, distributed, partly masked step."""

import json
from pathlib import Path

from running import TINY, run_ranks


def test_the_reduced_gradient_is_that_of_the_whole_batch(tmp_path: Path, fashion: list[str]) -> None:
    """3 ranks, 4 micro-batches (one rank runs two, two run a ghost), a full step and an epoch's last, which is masked
    from the middle of a micro-batch on; plain, and with Mixup and CutMix.

    Against torch.autograd over all samples' losses, written out, batch-norm frozen; float32 sums in another order.
    Mutations: divide by the number of micro-batches instead of valid samples; let ghosts weigh; mix the images alone;
    weigh a mixed sample by its own weight.
    """
    out = tmp_path / "gradient.json"
    batch = ["--batch.global_batch=256", "--batch.micro_batch=64", "--duration=2ep"]
    argv = [*TINY, *fashion, *batch, "--model.args={dropout: 0.0}"]
    run_ranks(3, "gradient", out, *argv)
    result = json.loads(out.read_text())
    for kind in ("torch", "deepspeed", "torch mixed"):
        assert (result[f"{kind} 0 samples"], result[f"{kind} 234 samples"]) == (256, 96)
        assert result[f"{kind} 0"] < 2e-6
        assert result[f"{kind} 234"] < 2e-6
    assert result["torch 0 fc"] != result["torch mixed 0 fc"]
