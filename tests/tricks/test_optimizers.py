"""Parameter groups counted by hand and by a peer, and optimizers by name and path."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import message
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from dist_trainer.config.arguments import new_parser, parse_config
from dist_trainer.engine.base import EngineConfig
from dist_trainer.errors import UserError
from dist_trainer.models.small_resnet import SmallResNet
from dist_trainer.run.blueprint import make_blueprint
from dist_trainer.tricks.layer_decay import layers_by_structure, layers_of
from dist_trainer.tricks.no_decay import decaying_vectors, is_norm
from dist_trainer.tricks.optimizers import OptimizerConfig, param_groups
from dist_trainer.tricks.optimizers import build_optimizer as build_optimizer_at


def build_optimizer(config: OptimizerConfig, model: nn.Module, zero: int = 0) -> torch.optim.Optimizer:
    return build_optimizer_at(config, model, 0.1, zero)


def groups_of(model: nn.Module, **config: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(with, without) weight decay, told apart by the groups' own weight decay."""
    groups = param_groups(model, 0.1, config.get("no_decay", ["norm", "bias"]))
    found: dict[float, list[nn.Parameter]] = {0.1: [], 0.0: []}
    for group in groups:
        found[group["weight_decay"]] += group["params"]
    return found[0.1], found[0.0]


def build(name: str) -> nn.Module:
    """An architecture without memory for its weights: torchvision's or timm's."""
    library, _, name = name.rpartition("/")
    with torch.device("meta"):
        return torchvision.models.get_model(name) if library == "torchvision" else timm.create_model(name)


@pytest.mark.parametrize(
    ("name", "num_decayed", "num_free"),
    [
        # 53 convolutions and fc.weight; 53 batch-norms of two and fc.bias
        ("torchvision/resnet50", 54, 107),
        # stem, 2 of the separable block, 14 x 3, the last 1x1, 8 squeeze-excite x 2, conv_head, classifier;
        # (1 + 2 + 14 x 3 + 1) batch-norms of two, 16 squeeze-excite biases, those of conv_head and classifier
        ("mobilenetv3_large_100", 64, 110),
        # 12 x (qkv, proj, fc1, fc2), patch_embed, head, cls_token, pos_embed;
        # 12 x (two norms of two, four biases), norm of two, biases of patch_embed and head
        ("vit_tiny_patch16_224", 52, 100),
    ],
)
def test_decay_groups_are_those_counted_by_hand_and_those_of_timm(name: str, num_decayed: int, num_free: int) -> None:
    """timm tells parameters apart by their number of dimensions, we by their module; here both must agree.

    Fails when norms are found by name (torchvision's `downsample.1`), or biases of convolutions are forgotten.
    """
    model = build(name)
    decayed, free = groups_of(model)
    assert (len(decayed), len(free)) == (num_decayed, num_free)
    peer = {group["weight_decay"]: {id(p) for p in group["params"]} for group in param_groups_weight_decay(model, 0.1)}
    assert {id(p) for p in decayed} == peer[0.1]
    assert {id(p) for p in free} == peer[0.0]


def test_what_the_model_names_itself_does_not_decay() -> None:
    """ViT's cls_token and pos_embed, two of the 52 above, as timm has it. Fails when no_weight_decay() is not asked.

    A network may give patterns (nextvit's `*.bias_table`), and one without the method gives none.
    """
    vit = build("vit_tiny_patch16_224")
    decayed, free = groups_of(vit, no_decay=["norm", "bias", "model"])
    assert (len(decayed), len(free)) == (50, 102)
    peer = param_groups_weight_decay(vit, 0.1, no_weight_decay_list=vit.no_weight_decay())  # type: ignore[operator]
    assert {id(p) for p in decayed} == {id(p) for group in peer if group["weight_decay"] for p in group["params"]}
    assert OptimizerConfig().no_decay == ["norm", "bias", "model"]

    layer = nn.Linear(2, 2)
    layer.no_weight_decay = lambda: {"wei*"}  # type: ignore[assignment]
    assert [len(kind) for kind in groups_of(layer, no_decay=["model"])] == [1, 1]


NORMS = {
    nn.BatchNorm1d: (4,), nn.SyncBatchNorm: (4,), nn.GroupNorm: (2, 4), nn.LayerNorm: ([4, 4],), nn.RMSNorm: (4,),
    timm.layers.BatchNormAct2d: (4,), timm.layers.GroupNormAct: (4, 2), timm.layers.GroupNorm1: (4,),
    timm.layers.LayerNorm2d: (4,), timm.layers.LayerNormAct2d: (4,), timm.layers.RmsNorm: (4,),
    timm.layers.RmsNorm2d: (4,), timm.layers.SimpleNorm: (4,), timm.layers.EvoNorm2dS0: (4, 2),
    timm.layers.FilterResponseNormAct2d: (4,), timm.layers.grn.GlobalResponseNorm: (4,),
    torchvision.models.convnext.LayerNorm2d: (4,),
}  # fmt: skip


@pytest.mark.parametrize("cls", NORMS, ids=lambda cls: f"{cls.__module__.split('.')[0]}-{cls.__name__}")
def test_norms_of_torch_timm_and_torchvision_do_not_decay(cls: Any) -> None:
    """Scale and shift alike. Fails when timm's RmsNorm, which derives from none of torch's, is taken for a matrix."""
    decayed, free = groups_of(cls(*NORMS[cls]), no_decay=["norm"])
    assert not decayed and free


@pytest.mark.parametrize(
    "layer",
    [
        torchvision.ops.Conv2dNormActivation(2, 2),
        timm.layers.ConvNormAct(2, 2),
        timm.layers.ScaledStdConv2d(2, 2, 1),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        nn.LocalResponseNorm(2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_only_called_norm_is_none(layer: nn.Module) -> None:
    """Fails when the name of a class that merely holds a norm counts: its convolution would not decay."""
    assert not any(p.dim() > 1 for p in groups_of(layer, no_decay=["norm"])[1])
    assert not is_norm(layer)


def scales_of(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """Parameter -> (scale, decay)."""
    return {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize(("name", "num_layers"), [("vit_tiny_patch16_224", 14), ("resnet50", 18)])
def test_layer_decay_of_a_timm_model_is_timms(name: str, num_layers: int) -> None:
    """The same rates, bit for bit, and decays as param_groups_layer_decay; counted by hand: embedding or stem, 12 or 16
    blocks, head. Fails when the head is not at the full rate, or layers are counted from the wrong end."""
    model = build(name)
    names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    ours = param_groups(model, 0.1, ["norm", "bias", "model"], layer_decay=0.75)
    assert scales_of(ours) == scales_of(param_groups_layer_decay(model, 0.1, names, layer_decay=0.75))
    assert len({group["lr_scale"] for group in ours}) == num_layers
    by_name = {name: scales_of(ours)[id(p)][0] for name, p in model.named_parameters()}
    assert by_name[model.pretrained_cfg["classifier"] + ".weight"] == 1.0  # type: ignore[index, operator]
    assert next(iter(by_name.values())) == pytest.approx(0.75 ** (num_layers - 1))


def spans(model: nn.Module) -> list[tuple[str, str]]:
    """Of each layer, from the stem: the parts that its first and last parameter belong to."""
    layers = layers_by_structure(model)
    rows: list[list[str]] = [[] for _ in range(max(layers.values()) + 1)]
    for name, layer in layers.items():
        rows[layer].append(name.rpartition(".")[0])
    return [(row[0], row[-1]) for row in rows]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet50", "resnet18d"])
def test_layers_found_by_structure_are_those_that_timm_writes_down(name: str) -> None:
    """For networks that have both. Fails when a stem is split, a final norm becomes a layer, or a block is entered."""
    model = build(name)
    assert layers_by_structure(model) == layers_of(model)


def test_layers_of_torchvisions_networks_are_those_that_one_would_count() -> None:
    """By hand. Fails when a block that derives from Sequential is entered, or a container is one layer."""
    resnet = spans(build("torchvision/resnet18"))
    assert resnet[:3] == [("conv1", "bn1"), ("layer1.0.conv1", "layer1.0.bn2"), ("layer1.1.conv1", "layer1.1.bn2")]
    assert resnet[-1] == ("fc", "fc") and len(resnet) == 10

    vit = spans(build("torchvision/vit_b_16"))
    assert vit[0] == ("", "encoder")  # class_token, conv_proj, encoder.pos_embedding
    assert vit[1] == ("encoder.layers.encoder_layer_0.ln_1", "encoder.layers.encoder_layer_0.mlp.3")
    assert vit[12] == ("encoder.layers.encoder_layer_11.ln_1", "encoder.ln")
    assert vit[13] == ("heads.head", "heads.head") and len(vit) == 14

    mobilenet = spans(build("torchvision/mobilenet_v3_small"))
    assert mobilenet[0] == ("features.0.0", "features.0.1")
    assert mobilenet[12] == ("features.12.0", "features.12.1")
    assert mobilenet[13] == ("classifier.0", "classifier.3") and len(mobilenet) == 14

    vgg = spans(build("torchvision/vgg11_bn"))  # 8 convolutions, each with its batch-norm; three linear layers
    assert vgg[0] == ("features.0", "features.1") and vgg[8] == ("classifier.0", "classifier.6") and len(vgg) == 9

    dense = spans(build("torchvision/densenet121"))  # stem, 4 dense blocks with 3 transitions between, classifier
    assert dense[2] == ("features.transition1.norm", "features.transition1.conv") and len(dense) == 9

    own = spans(SmallResNet())
    assert own[0] == ("stem", "stem") and own[3] == ("blocks.2.bn1", "bn") and own[4] == ("fc", "fc") and len(own) == 5

    wrapped = nn.ModuleDict({"net": build("torchvision/resnet18")})
    assert [first for first, _ in spans(wrapped)] == [f"net.{first}" for first, _ in resnet]
    assert spans(nn.Linear(2, 2)) == [("", "")]


def test_layer_decay_changes_the_rate_of_the_stem_alone() -> None:
    """Two layers at 0.5: the lower one at half the rate. Off, no group carries a scale. Fails when 1.0 makes groups."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    groups = build_optimizer(OptimizerConfig(layer_decay=0.5), model).param_groups
    assert [(group["params"][0] is model[n].weight, group["lr_scale"]) for n, group in enumerate(groups)] == [
        (True, 0.5), (True, 1.0)
    ]  # fmt: skip
    assert all("lr_scale" not in group for group in build_optimizer(OptimizerConfig(), model).param_groups)


def test_the_decayed_elements_of_resnet50_are_all_but_norms_and_the_last_bias() -> None:
    """25,557,032 parameters less 2 x 26,560 of batch-norm and 1,000 biases. Fails with the group of `fc` exchanged."""
    decayed, _ = groups_of(build("torchvision/resnet50"))
    assert sum(p.numel() for p in decayed) == 25_557_032 - 53_120 - 1_000


@pytest.mark.parametrize(
    "name", ["cait_xxs24_224", "convnext_atto", "vit_small_patch16_224", "resnet18", "volo_d1_224"]
)
def test_with_vectors_the_groups_are_timms(name: str) -> None:
    """Against timm's own function, LayerScale's gammas included. Mutation: parameters without a dimension decay."""
    model = timm.create_model(name)
    named = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=named)
    free = {id(p) for group in theirs if not group["weight_decay"] for p in group["params"]}
    assert {id(p) for p in groups_of(model, no_decay=["norm", "bias", "vector", "model"])[1]} == free
    assert not decaying_vectors(model, ["norm", "bias", "vector", "model"])


def test_vectors_that_decay_are_named() -> None:
    model = timm.create_model("cait_xxs24_224")
    found = decaying_vectors(model, ["norm", "bias", "model"])
    assert len(found) == 2 * 26 and all("gamma" in name for name in found)
    assert decaying_vectors(model, []) == []


def test_no_decay_chooses_norms_and_biases_separately() -> None:
    """A convolution with bias and a batch-norm. Fails when a norm's bias is counted as a bias only."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    names = {id(p): name for name, p in model.named_parameters()}
    free = {key: {names[id(p)] for p in groups_of(model, no_decay=list(key))[1]} for key in ((), ("norm",), ("bias",))}
    assert free == {(): set(), ("norm",): {"1.weight", "1.bias"}, ("bias",): {"0.bias", "1.bias"}}


def test_biases_of_attention_are_biases() -> None:
    """nn.MultiheadAttention calls one of its biases in_proj_bias. Fails when a bias must be called just `bias`."""
    model = nn.MultiheadAttention(4, 2)
    assert {tuple(p.shape) for p in groups_of(model)[1]} == {(12,), (4,)}


def test_tied_parameters_are_in_one_group_once_and_frozen_ones_in_none() -> None:
    """Fails when torch would refuse the parameter that appears in two groups, or a frozen weight decays."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "frozen": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    model["frozen"].requires_grad_(False)
    decayed, free = groups_of(model)
    assert [id(p) for p in decayed] == [id(model["a"].weight)]
    assert {id(p) for p in free} == {id(model["a"].bias), id(model["b"].bias)}

    shared = nn.ParameterDict({"scale": nn.Parameter(torch.ones(3))})
    norm = nn.LayerNorm(3)
    norm.weight = shared["scale"]
    decayed, free = groups_of(nn.ModuleList([shared, norm]))  # what one of its modules frees is free
    assert not decayed and len(free) == 2


def test_optimizers_are_built_by_name_and_by_path() -> None:
    """With decay in the right group, at the peak rate, which some keep. Fails when args are dropped."""
    model = nn.Linear(2, 2)
    sgd = build_optimizer(OptimizerConfig(weight_decay=0.3, args={"momentum": 0.8, "nesterov": True}), model)
    adamw = build_optimizer(OptimizerConfig(name="torch.optim:AdamW", args={"betas": [0.8, 0.9]}), model)
    assert type(sgd) is torch.optim.SGD
    assert type(adamw) is torch.optim.AdamW
    assert [(g["lr"], g["weight_decay"], g["momentum"]) for g in sgd.param_groups] == [(0.1, 0.3, 0.8), (0.1, 0, 0.8)]
    assert [tuple(g["betas"]) for g in adamw.param_groups] == [(0.8, 0.9)] * 2


def test_a_gpu_gets_fused_updates_where_torch_has_them_and_nobody_chose() -> None:
    """Mutations: fuse what has no such kernel; overrule the config."""

    def fused(name: str, **args: Any) -> bool:
        config = OptimizerConfig(name=name, args=args, weight_decay=0.01)
        built = build_optimizer_at(config, nn.Linear(2, 2), 0.1, 0, fused=True)
        return bool(built.param_groups[0].get("fused"))

    names = ("sgd", "sgdw", "rmsprop", "rmsprop_tf", "adam", "adamw", "adadelta", "lars", "lamb")
    assert [name for name in names if fused(name)] == ["sgd", "adam", "adamw"]
    assert not fused("sgd", fused=False) and not fused("adam", foreach=True) and not fused("adamw", capturable=True)


def test_exact_sums_are_never_fused() -> None:
    """It would round by an element's place in memory, which the number of ranks decides at ZeRO 1. Mutation: fuse."""
    argv = ["--model.name=small_resnet", "--data.train=x", "--data.val=x", "--data.channels=1", "--lr.peak=0.1"]
    for sums, fused in (("fast", True), ("exact", None)):
        config, _ = parse_config(new_parser("plan", ""), [*argv, "--duration=9step", f"--engine.sums={sums}"])
        for on_gpu in (False, True):
            optimizer = make_blueprint(config, 10_000, 10, 1, on_gpu=on_gpu).optimizer
            assert optimizer.param_groups[0]["fused"] == (fused if on_gpu else None)


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("sgd", "torch", {"momentum": 0.9}),
        ("sgdw", "timm", {"momentum": 0.9}),
        ("rmsprop", "torch", {"momentum": 0, "alpha": 0.99}),
        ("rmsprop_tf", "timm", {"momentum": 0.0, "alpha": 0.9}),
        ("adam", "torch", {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("adamw", "torch", {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("adadelta", "torch", {"rho": 0.9, "eps": 1e-6}),
        ("lars", "timm", {"momentum": 0.9, "trust_coeff": 0.001}),
        ("lamb", "timm", {"max_grad_norm": None, "betas": (0.9, 0.999)}),
    ],
)
def test_names_are_torchs_and_timms_with_their_defaults(name: str, module: str, expected: dict[str, Any]) -> None:
    """Momentum of sgd, sgdw and lars and LAMB's own clipping aside. Fails when a name leads elsewhere."""
    optimizer = build_optimizer(OptimizerConfig(name=name, weight_decay=0.01), nn.Linear(2, 2))
    assert type(optimizer).__module__.startswith(module)
    assert type(optimizer).__name__.lower() == name.replace("_", "")
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


@pytest.mark.parametrize("name", ["sgd", "sgdw", "rmsprop", "rmsprop_tf", "adam", "adamw", "adadelta"])
def test_decay_is_coupled_or_decoupled_as_the_help_says(name: str) -> None:
    """A weight of 1 without a gradient, decay 0.1, rate 0.1, two steps: decoupled, it is 0.99 squared.

    Fails when the help calls adam decoupled.
    """
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = build_optimizer(OptimizerConfig(name=name, weight_decay=0.1), layer)
    for _ in range(2):
        layer.weight.grad = torch.zeros(1, 1)
        optimizer.step()
    assert (abs(layer.weight.item() - 0.99**2) < 1e-6) == (name in ("sgdw", "adamw"))
    assert layer.weight.item() < 1


class Halves(torch.optim.SGD):
    """Marked as ours to refuse."""

    layer_wise = True


class Lamb(torch.optim.SGD):
    """Called like one that looks at layers, and marked as none."""

    layer_wise = False


class MyLars(timm.optim.Lars):
    """Derives from one."""


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("lars", {}), ("lamb", {}), ("timm.optim:Lars", {}), ("timm.optim:Lamb", {}), ("timm.optim:AdamP", {}),
        ("timm.optim:NvNovoGrad", {}), ("timm.optim:Adafactor", {}), ("timm.optim:Adan", {}), ("torch.optim:Muon", {}),
        ("torch.optim:Adafactor", {}), ("timm.optim:NAdamW", {"caution": True}), (f"{__name__}:Halves", {}),
        (f"{__name__}:MyLars", {}),
    ],
)  # fmt: skip
def test_what_looks_at_whole_layers_is_refused_above_zero_0(name: str, args: dict[str, Any]) -> None:
    """By name, by path, by base class, by argument and by mark. Fails when one would be silently wrong there."""
    config = OptimizerConfig(name=name, args=args, weight_decay=0.1, no_decay=[])
    model = nn.Linear(2, 2, bias=False)
    build_optimizer(config, model)
    for zero in (1, 2, 3):
        with pytest.raises(UserError) as caught:
            build_optimizer(config, model, zero)
        text = message(caught)
        assert text.startswith(f"engine.zero: {zero} ") and name in text and text.endswith("set engine.zero: 0")


def test_what_is_element_wise_may_run_at_every_stage() -> None:
    """All other names, and a class whose mark says so. Fails when the list of class names refuses too much."""
    for name in ("sgd", "sgdw", "rmsprop", "rmsprop_tf", "adam", "adamw", "adadelta", "timm.optim:Lion"):
        build_optimizer(OptimizerConfig(name=name), nn.Linear(2, 2), zero=3)
    build_optimizer(OptimizerConfig(name=f"{__name__}:Lamb"), nn.Linear(2, 2), zero=3)


def test_a_rule_that_keeps_the_peak_rate_gets_it() -> None:
    """timm's corrected decay, lr ** 2 / peak. Fails when optimizers are built at 0, which timm refuses."""
    config = OptimizerConfig(name="sgdw", args={"corrected_weight_decay": True})
    assert build_optimizer(config, nn.Linear(2, 2)).param_groups[0]["max_lr_snapshot"] == 0.1


def test_lars_and_lamb_need_decay_or_are_told_to_adapt_all() -> None:
    """timm's adapt groups with decay alone. Fails when `lars` without decay becomes plain SGD in silence."""
    for name in ("lars", "lamb", "timm.optim:Lars"):
        with pytest.raises(UserError) as caught:
            build_optimizer(OptimizerConfig(name=name), nn.Linear(2, 2))
        assert "always_adapt: true" in message(caught)
        build_optimizer(OptimizerConfig(name=name, args={"always_adapt": True}), nn.Linear(2, 2))


def test_engines_that_cannot_be_are_refused() -> None:
    """A gradient is not scaled to nothing, and DDP is stage 0. Fails when `plan` learns of it from `train`."""
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError) as caught:
            EngineConfig(clip_grad_norm=clip).check()
        assert message(caught) == f"engine.clip_grad_norm: {clip} is not positive; null does not clip"
    with pytest.raises(UserError, match=r"needs engine\.backend"):
        EngineConfig(backend="torch", zero=1).check()
    EngineConfig(clip_grad_norm=1.0, zero=3).check()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "sdg"}, ["optimizer.name: 'sdg'", "did you mean 'sgd'?"]),
        ({"name": "torch.optim:AdamX", "args": {}}, ["optimizer.name: 'torch.optim:AdamX'", "did you mean 'Adam"]),
        ({"name": "no_such:Thing"}, ["optimizer.name: 'no_such:Thing'", "cannot import 'no_such'"]),
        (
            {"args": {"momentun": 0.9}},
            ["optimizer.args.momentun: sgd takes no", "did you mean 'momentum'?"],
        ),
        (
            {"name": "torch.optim:AdamW", "args": {"momentum": 0.9}},
            ["optimizer.args.momentum: torch.optim:AdamW takes no momentum"],
        ),
        ({"args": {"momentum": -1.0}}, ["optimizer: sgd: ", "momentum"]),
        ({"args": {"lr": 0.1}}, ["optimizer.args.lr: ", "lr.base"]),
        ({"args": {"weight_decay": 0.1}}, ["optimizer.args.weight_decay: ", "optimizer.weight_decay"]),
        ({"weight_decay": -0.1}, ["optimizer.weight_decay: -0.1"]),
        ({"weight_decay": float("nan")}, ["optimizer.weight_decay: nan"]),
        ({"layer_decay": 0.0}, ["optimizer.layer_decay: 0.0", "1.0 is off"]),
        ({"layer_decay": 1.5}, ["optimizer.layer_decay: 1.5"]),
        ({"name": "lamb", "args": {"max_grad_norm": 1.0}}, ["optimizer.args.max_grad_norm: ", "engine.clip_grad_norm"]),
        ({"name": "adam", "args": {"betas": [2.0, 0.9]}}, ["optimizer: adam: ", "beta"]),
    ],
)
def test_optimizers_that_cannot_be_are_refused_with_what_would_do(config: dict[str, Any], said: list[str]) -> None:
    """Fails when a TypeError of the optimizer's gets through, or the rate is set twice without a word."""
    with pytest.raises(UserError) as caught:
        build_optimizer(OptimizerConfig(**config), nn.Linear(2, 2))
    text = message(caught)
    assert text.startswith(said[0])
    assert all(part in text for part in said)
