"""The gradient that each engine has reduced before an update, against plain autograd over the whole global batch.

torchrun gradient.py OUT.json ARGV...: writes {"backend step": largest difference, relative to the largest gradient}.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from dist_trainer import arguments, comm
from dist_trainer.data.stream import SlotAddress
from dist_trainer.log.console import Terminal
from dist_trainer.run import Run, finish_run, start_run

TAIL = 937  # 60,000 = 937 * 64 + 32: half of this step is masked


def main() -> None:
    out, argv = Path(sys.argv[1]), sys.argv[2:]
    world = comm.init()
    result = {}
    for backend in ("torch", "deepspeed"):
        name = [f"--engine.backend={backend}", f"--run.dir={out.parent}", f"--run.name=gradient-{backend}"]
        config, _ = arguments.parse_config(arguments.new_parser("train", ""), [*argv, *name])
        run = start_run(config, "gradient", world, Terminal(active=False), comm.StopRequest())
        assert isinstance(run, Run)
        model = run.engine.module.eval()  # batch-norm frozen, no dropout: the loss is a plain mean over samples
        for step in (0, TAIL):
            for slot in run.plan.slots_of(world.rank):
                run.engine.forward_backward(run.stream._samples[SlotAddress(step, slot)])
            for _ in range(run.plan.forwards - len(run.plan.slots_of(world.rank))):
                last = run.plan.slots_of(world.rank)[-1]
                run.engine.forward_backward(run.stream._samples[SlotAddress(step, last, ghost=True)])
            reduced = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

            batches = [run.stream._samples[SlotAddress(step, slot)] for slot in range(run.plan.num_slots)]
            images = torch.cat([b.images for b in batches])
            keep = torch.cat([b.weight for b in batches]) > 0
            labels = torch.cat([b.labels for b in batches])[keep]
            weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
            buffers = dict(model.named_buffers())
            logits = torch.func.functional_call(model, {**weights, **buffers}, run.engine._prepare(images)[keep])
            loss = F.cross_entropy(logits, labels, label_smoothing=config.loss.label_smoothing)
            whole = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
            scale = max(float(g.abs().max()) for g in whole.values())
            result[f"{backend} {step}"] = max(float((reduced[n] - whole[n]).abs().max()) for n in whole) / scale
            result[f"{backend} {step} samples"] = int(keep.sum())
            run.engine.step()
        finish_run(run, "test")
    if world.is_main:
        out.write_text(json.dumps(result))
    comm.shutdown()


if __name__ == "__main__":
    main()
