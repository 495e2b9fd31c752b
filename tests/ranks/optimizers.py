"""Each optimizer in each engine on the same batches: `main(world, [OUT.json])`, called by pool.py.

Writes how far each way's end is from that of the torch engine, relative to the largest value of each tensor: `peer` is
a plain loop over the library's class with hand-written groups, zero0 to zero3 are DeepSpeed's stages, and `chain` goes
on from stage to stage after every step, through files.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.optim
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from dist_trainer.data.batch import Batch, SlotAddress
from dist_trainer.distributed.world import World
from dist_trainer.engine.base import Engine, EngineConfig
from dist_trainer.engine.build import build_engine
from dist_trainer.engine.inference import Preprocess
from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig, Duration, make_plan
from dist_trainer.run_folder import checkpoint
from dist_trainer.run_folder.tensor_files import save_tensors
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.ema import Ema, EmaConfig
from dist_trainer.tricks.freezing import freeze
from dist_trainer.tricks.losses import CrossEntropy
from dist_trainer.tricks.mixing import Mixing, MixingConfig
from dist_trainer.tricks.optimizers import OptimizerConfig, build_optimizer

STEPS, SLOTS, MICRO, CLASSES = 5, 4, 8, 10
DECAY = 0.05
CHAIN = ["zero1", "zero3", "zero2", "torch", "zero1"]
RATES = [1.0, 0.9, 0.7, 0.4, 0.1]

# Optimizer, its arguments, peak rate, the peer with the same ones.
ELEMENT_WISE: dict[str, tuple[dict[str, Any], float, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": ({"nesterov": True}, 0.1, lambda g: torch.optim.SGD(g, 0, momentum=0.9, nesterov=True)),
    "sgdw": ({}, 0.1, lambda g: timm.optim.SGDW(g, 0, momentum=0.9)),
    "rmsprop": (
        {"alpha": 0.9, "eps": 0.0316, "momentum": 0.9}, 0.01,
        lambda g: torch.optim.RMSprop(g, 0, alpha=0.9, eps=0.0316, momentum=0.9),
    ),
    "rmsprop_tf": (
        {"eps": 0.001, "momentum": 0.9, "centered": True}, 0.02,
        lambda g: timm.optim.RMSpropTF(g, 0, eps=0.001, momentum=0.9, centered=True),
    ),
    "adam": ({"eps": 1e-4}, 0.01, lambda g: torch.optim.Adam(g, 0, eps=1e-4)),
    "adamw": (
        {"betas": [0.8, 0.9], "eps": 1e-4}, 0.01,
        lambda g: torch.optim.AdamW(g, 0, betas=(0.8, 0.9), eps=1e-4),
    ),
    "adadelta": ({}, 1.0, lambda g: torch.optim.Adadelta(g, 0)),
    "torch.optim:NAdam": ({}, 0.01, lambda g: torch.optim.NAdam(g, 0)),  # a product of numbers in its state
    "timm.optim:AdaBelief": ({"eps": 1e-6}, 0.01, lambda g: timm.optim.AdaBelief(g, 0, eps=1e-6)),  # Python's int
}  # fmt: skip
# The groups hold the step of these two: a tensor, Python's int.
LAYER_WISE: dict[str, tuple[dict[str, Any], float, Callable[..., torch.optim.Optimizer]]] = {
    "lars": ({"trust_coeff": 0.02}, 1.0, lambda g: timm.optim.Lars(g, 0, momentum=0.9, trust_coeff=0.02)),
    "lamb": (
        {"eps": 1e-4},
        0.02,
        lambda g: timm.optim.Lamb(g, 0, eps=1e-4, max_grad_norm=None),
    ),  # its step is the group's
    "timm.optim:Adan": ({}, 0.02, lambda g: timm.optim.Adan(g, 0)),
}


class Net(nn.Module):
    """Three layers of odd sizes. No bias before batch-norm: its gradient is rounding alone, which Adam scales up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 7, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(7)
        self.conv2 = nn.Conv2d(7, 15, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(15)
        self.fc = nn.Linear(15, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.bn1(self.conv1(x)))
        x = F.silu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build_net(frozen: list[str]) -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for layer in (model.bn1, model.bn2):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.uniform_(-0.5, 0.5)
    freeze(model, frozen)
    return model


def batch_of(step: int, slot: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + slot)
    images = torch.randint(0, 256, (MICRO, 1, 12, 12), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (MICRO,), generator=generator)
    return Batch(images, labels, torch.ones(MICRO), torch.arange(MICRO), SlotAddress(step, slot), MICRO)


class Case:
    """One optimizer with its settings, to be run in any engine."""

    def __init__(
        self, world: World, config: OptimizerConfig, rate: float, frozen: list[str], fused: bool = False
    ) -> None:
        self.world, self.config, self.rate, self.frozen, self.fused = world, config, rate, frozen, fused
        batch = BatchConfig(global_batch=SLOTS * MICRO, micro_batch=MICRO)
        duration = Duration.parse(f"{STEPS}step", "duration")
        self.plan = make_plan(batch, duration, world=world.size, num_samples=10_000)

    def engine(self, way: str, model: nn.Module) -> Engine:
        zero = 0 if way == "torch" else int(way[-1])
        optimizer = build_optimizer(self.config, model, self.rate, zero, fused=self.fused)
        assert self.fused == bool(optimizer.param_groups[0].get("fused"))
        config = EngineConfig(backend="torch" if way == "torch" else "deepspeed", zero=zero, precision="fp32")  # type: ignore[arg-type]
        preprocess = Preprocess(mean=[0.5], std=[0.3], channels_last=True)
        mixing = Mixing(MixingConfig(), self.plan, 0, None)
        return build_engine(
            config,
            model=model,
            optimizer=optimizer,
            loss=CrossEntropy(),
            mixing=mixing,
            plan=self.plan,
            world=self.world,
            preprocess=preprocess,
            seed=0,
        )

    def steps(self, engine: Engine, steps: range) -> dict[str, torch.Tensor]:
        """Model and optimizer state after these steps; where something is frozen, also the moving average."""
        statistics = RunningStatistics(engine.module)
        ema = Ema(EmaConfig(decay=0.9), engine.local_weights(), statistics.running, 0, STEPS)
        for step in steps:
            engine.set_lr(self.rate * RATES[step])
            for slot in self.plan.slots_of(self.world.rank):
                engine.forward_backward(batch_of(step, slot))
                statistics.add()
            assert engine.step()
            ema.update()
            dist.all_reduce(sums := statistics.take())
            statistics.update(sums, SLOTS)
        statistics.publish()
        state = {f"model/{name}": value for name, value in engine.model_state().items()}
        state |= {f"optim/{name}": value for name, value in engine.optimizer_state().items()}
        if self.frozen:
            state |= {f"ema/{name}": value for name, value in engine.to_full(ema.weights).items()}
            with engine.swapped_in(ema.weights):
                state |= {f"held/{name}": value.clone() for name, value in engine.model_state().items()}
        return {name: value.clone() for name, value in state.items()}

    def whole(self, way: str) -> dict[str, torch.Tensor]:
        engine = self.engine(way, build_net(self.frozen))
        state = self.steps(engine, range(STEPS))
        engine.close()
        return state

    def chain(self, ways: list[str], folder: Path) -> dict[str, torch.Tensor]:
        """One step in each engine, through files in between."""
        model, optim = build_net(self.frozen), {}
        for step, way in enumerate(ways):
            engine = self.engine(way, model)
            engine.load_optimizer_state(optim)
            state = self.steps(engine, range(step, step + 1))
            if self.world.is_main:
                for kind in ("model", "optim"):
                    saved = {k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{kind}/")}
                    save_tensors(saved, folder / f"{kind}.safetensors")
            dist.barrier()
            engine.close()
            model = build_net(self.frozen)
            checkpoint.load_into(model, load_file(folder / "model.safetensors"), "chain")
            optim = load_file(folder / "optim.safetensors")
            dist.barrier()
        return state

    def peer(self, build: Callable[..., torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
        """A plain loop over the whole batch, with groups written by hand."""
        model = build_net([])
        model.train()
        if self.frozen:
            model.conv1.requires_grad_(False)
            model.bn1.requires_grad_(False).eval()
        decay = self.config.layer_decay
        layers = {decay**2: [model.conv1, model.bn1], decay: [model.conv2, model.bn2], 1.0: [model.fc]}
        if decay == 1.0:
            layers = {1.0: list(model.children())}
        groups = [
            {
                "params": [parameter],
                "weight_decay": DECAY if name == "weight" and not isinstance(layer, nn.BatchNorm2d) else 0.0,
                "scale": scale,
            }
            for scale, parts in layers.items()
            for layer in parts
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        ]
        optimizer = build(groups)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * RATES[step] * group["scale"]
            optimizer.zero_grad()
            for slot in range(SLOTS):
                batch = batch_of(step, slot)
                images = (batch.images.float() / 255 - 0.5) / 0.3
                (F.cross_entropy(model(images), batch.labels, reduction="sum") / (SLOTS * MICRO)).backward()
            optimizer.step()
        return {f"model/{name}": value.detach() for name, value in model.named_parameters()}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], kind: str) -> float:
    """The largest difference among tensors of a kind that both have, relative to the largest value of each."""
    keys = sorted(key for key in a if key.startswith(f"{kind}/") and key in b)
    assert keys and all(bool(state[key].isfinite().all()) for state in (a, b) for key in keys)
    pairs = [(a[key].double(), b[key].double()) for key in keys]
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-12)) for x, y in pairs)


def run(
    world: World, name: str, layer_decay: float, frozen: list[str], folder: Path, fused: bool = False
) -> dict[str, Any]:
    args, rate, build = {**ELEMENT_WISE, **LAYER_WISE}[name]
    config = OptimizerConfig(name=name, args=args, weight_decay=DECAY, layer_decay=layer_decay)
    case = Case(world, config, rate, frozen, fused)
    if name in LAYER_WISE:
        ways, chain = [], ["zero0", "torch", "zero0", "torch", "torch"]
    else:
        ways, chain = ["zero3", *(["zero0", "zero1", "zero2"] if frozen else [])], CHAIN
    reference = case.whole("torch")
    others = {way: case.whole(way) for way in ways} | {"chain": case.chain(chain, folder)}
    peer = case.peer(build)
    if not world.is_main:
        return {}  # rank 0 alone has whole weights at every stage
    assert all(other.keys() == reference.keys() for other in others.values())
    before = build_net([]).state_dict()
    kinds = ("model", "optim", "ema", "held") if frozen else ("model", "optim")
    return {
        "kept as": sorted({key.split("/")[1] for key in reference if key.startswith("optim/")}),
        "peer": furthest(reference, peer, "model"),
        "others": {
            way: {kind: furthest(reference, other, kind) for kind in kinds if way != "chain" or kind in kinds[:2]}
            for way, other in others.items()
        },
        "unmoved": [name for name in before if torch.equal(before[name], reference[f"model/{name}"])],
    }


def main(world: World, argv: list[str]) -> None:
    out = Path(argv[0])
    cases: list[tuple[str, float, list[str]]] = [(name, 1.0, []) for name in (*ELEMENT_WISE, *LAYER_WISE)]
    cases += [("sgd", 0.7, []), ("lamb", 0.7, []), ("adamw", 1.0, ["conv1", "bn1"])]
    result: dict[str, dict[str, Any]] = {}
    for name, layer_decay, frozen in cases:
        label = name + (" layers" if layer_decay != 1.0 else "") + (" frozen" if frozen else "")
        result[label] = run(world, name, layer_decay, frozen, out.parent)
    for name in ("sgd", "adam", "adamw"):
        result[f"{name} fused"] = run(world, name, 1.0, [], out.parent, fused=True)
    for name, way in (
        ("tiny:NormKeeper", "torch"),
        ("tiny:NormKeeper", "zero1"),
        ("tiny:GroupKeeper", "zero3"),
        ("tiny:ListKeeper", "torch"),
    ):
        try:
            Case(world, OptimizerConfig(name=name), 0.1, []).whole(way)
            result[f"{name} {way}"] = {}
        except UserError as error:
            result[f"{name} {way}"] = {"refused": str(error)}
    if world.is_main:
        out.write_text(json.dumps(result, indent=1))
