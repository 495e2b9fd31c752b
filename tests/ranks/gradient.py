"""The gradient that each engine has reduced before an update, against plain autograd over the whole global batch.

`main(world, [OUT.json, ARGV...])`, called by pool.py, writes {"backend step": largest difference, relative to the
largest gradient}.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dist_trainer.config import arguments
from dist_trainer.data.batch import Batch, SlotAddress
from dist_trainer.distributed.processes import StopRequest
from dist_trainer.distributed.world import World
from dist_trainer.log.console import Terminal
from dist_trainer.run.start import build_run, prepare_run
from dist_trainer.run.state import Run
from dist_trainer.run.summary import finish_run
from dist_trainer.tensors import State

TAIL = 234  # 60,000 = 234 * 256 + 96: of four micro-batches of 64, one whole, one half masked, two masked


def loss_by_hand(run: Run, weights: State, batch: Batch) -> torch.Tensor:
    """Sum over one micro-batch, every sample mixed with its partner by indexing; by smoothed labels, one at a time."""
    address: Any = batch.address
    mix = run.learner.engine._mixing.draw(address.step, address.slot, batch.images.shape)
    smoothing, size = run.config.loss.label_smoothing, len(batch.labels)
    partner = [(i - mix.shift) % size for i in range(size)]
    images = run.learner.engine._prepare(batch.images, torch.float32)
    keep: torch.Tensor | float = mix.share
    if mix.box is not None:
        keep = torch.ones_like(images)
        keep[:, :, mix.box[0] : mix.box[1], mix.box[2] : mix.box[3]] = 0
    images = keep * images + (1 - keep) * images[partner]
    logits = torch.func.functional_call(run.learner.engine.module, weights, images)
    own, other = (
        F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        for labels in (batch.labels, batch.labels[partner])
    )
    return (mix.share * batch.weight * own + (1 - mix.share) * batch.weight[partner] * other).sum()


def main(world: World, argv: list[str]) -> None:
    out, argv = Path(argv[0]), argv[1:]
    result: dict[str, Any] = {}
    mixing = ["--mixing.mixup=1", "--mixing.cutmix=1"]
    for title, more in {"torch": [], "deepspeed": [], "torch mixed": mixing}.items():
        backend = title.split(" ", maxsplit=1)[0]
        name = [f"--engine.backend={backend}", f"--run.dir={out.parent}", f"--run.name={title.replace(' ', '-')}"]
        config, _ = arguments.parse_config(arguments.new_parser("train", ""), [*argv, *more, *name])
        silent = Terminal(active=False)
        prepared = prepare_run(config, stem="gradient", world=world, terminal=silent)
        run = build_run(prepared, config=config, world=world, terminal=silent, stop=StopRequest())
        model = run.learner.engine.module.eval()  # batch-norm frozen, no dropout: the loss is a plain mean over samples
        for step in (0, TAIL):
            for slot in run.plan.slots_of(world.rank):
                run.learner.engine.forward_backward(run.streams.train._samples[SlotAddress(step, slot)])
            for _ in range(run.plan.forwards - len(run.plan.slots_of(world.rank))):
                last = run.plan.slots_of(world.rank)[-1]
                run.learner.engine.forward_backward(run.streams.train._samples[SlotAddress(step, last, ghost=True)])
            reduced = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

            batches = [run.streams.train._samples[SlotAddress(step, slot)] for slot in range(run.plan.num_slots)]
            valid = int(sum(batch.weight.sum() for batch in batches))
            weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
            state = {**weights, **dict(model.named_buffers())}
            loss = torch.stack([loss_by_hand(run, state, batch) for batch in batches]).sum() / valid
            whole = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
            scale = max(float(g.abs().max()) for g in whole.values())
            result[f"{title} {step}"] = max(float((reduced[n] - whole[n]).abs().max()) for n in whole) / scale
            result[f"{title} {step} samples"] = valid
            result[f"{title} {step} fc"] = whole["fc.weight"].flatten().tolist()
            run.learner.engine.step()
        finish_run(run, "stopped", "test")
    if world.is_main:
        out.write_text(json.dumps(result))
