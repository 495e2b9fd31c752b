"""Networks by name: those that were published, built as asked, and refused in one line where that cannot be."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import message
from torch import nn
from training import NUM_CLASSES, NUM_SLOTS, alone, build, micro_batch, train

from dist_trainer.commands.main import dispatch
from dist_trainer.errors import UserError
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.models.build import OWN
from dist_trainer.models.mobilenet_v1 import MobileNetV1
from dist_trainer.models.names import NAMES
from dist_trainer.models.trial import try_images

__all__ = ["alone"]

# Parameters; millions as published, and by whom.
PADDLE_RESNET = "PaddleClas, docs/en/models/ResNet_and_vd_en.md"
PADDLE_MOBILE = "PaddleClas, docs/en/models/Mobile_en.md"
PUBLISHED = {
    "resnet18": (11_689_512, 11.69, PADDLE_RESNET),
    "resnet50": (25_557_032, 25.56, PADDLE_RESNET),
    "resnet50_vd": (25_576_264, 25.58, PADDLE_RESNET),
    "mobilenet_v1_x0_25": (470_072, 0.46, PADDLE_MOBILE),
    "mobilenet_v2_x0_25": (1_517_312, 1.50, PADDLE_MOBILE),
    "mobilenet_v3_large": (5_483_032, 5.47, PADDLE_MOBILE),
    # PaddleClas's 2.94 is another network, with 1,280 channels before the classifier where the paper has 1,024.
    "mobilenet_v3_small": (2_542_856, 2.5, "Howard et al. 2019, table 3"),
    "efficientnet_b0": (5_288_548, 5.3, "Tan and Le 2019, table 2"),
}


def built(name: str, num_classes: int = NUM_CLASSES, **config: Any) -> Any:
    return build_model(ModelConfig(name=name, **config), num_classes, 0)


def refusal(name: str, **config: Any) -> str:
    with pytest.raises(UserError) as caught:
        built(name, **config)
    return message(caught)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_as_many_parameters_as_published(name: str) -> None:
    """At 1,000 classes; within 2.5%, since some tables leave batch-norm out and round down; and torchvision's own
    figure, exactly. Fails for another width, stem, block or classifier."""
    exact, millions, _ = PUBLISHED[name]
    assert count(built(name, 1000)) == exact
    assert exact / 1e6 == pytest.approx(millions, rel=0.025)
    source, preset = NAMES[name]
    if source.startswith("torchvision/") and not preset:
        weights = torchvision.models.get_model_weights(source.removeprefix("torchvision/"))
        assert weights.DEFAULT.meta["num_params"] == exact


@pytest.mark.parametrize(("width", "millions"), [(1.0, 4.2), (0.75, 2.6), (0.5, 1.3), (0.25, 0.5)])
def test_mobilenet_v1_has_the_size_of_its_paper_at_each_width(width: float, millions: float) -> None:
    """Howard et al. 2017, table 6. Fails when the classifier or the stem is not scaled."""
    assert round(count(MobileNetV1(width_mult=width)) / 1e6, 1) == millions


def test_mobilenet_v1_is_timms_where_timm_has_it() -> None:
    """At width 1, weights and statistics copied in order: the same logits, and the same gradient of each.

    Fails for a stride, an order, a padding or an activation of its own.
    """
    torch.manual_seed(0)
    theirs = timm.create_model("mobilenetv1_100", act_layer=nn.ReLU, num_classes=NUM_CLASSES)
    ours = MobileNetV1(NUM_CLASSES)
    with torch.no_grad():
        for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            if other.is_floating_point():
                mine.copy_(other.add_(0.01 * torch.rand_like(other)))
    x = torch.randn(2, 3, 96, 96)
    for model in (ours, theirs):
        model.eval()(x).square().sum().backward()
    assert float(ours(x).detach().std()) > 1e-4
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-6)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3 * float(other.grad.abs().max()))


def test_mobilenet_v2_keeps_a_quarter_of_each_width() -> None:
    """4, 6, 8, 16, 24, 40, 80 channels as PaddleClas's int(c * scale). Fails with torchvision's rounding to 8."""
    features = built("mobilenet_v2_x0_25").features
    widths = [block.conv[-1].num_features for block in features[1:-1]]
    assert sorted(set(widths)) == [4, 6, 8, 16, 24, 40, 80]


def test_resnet50_vd_is_resnet_d() -> None:
    """Deep stem, stride in the 3x3 convolution, shortcuts that average first (He et al. 2019, figure 2).

    Fails when the name leads to plain ResNet-50, or to a variant that projects with stride.
    """
    model = built("resnet50_vd")
    assert [layer.kernel_size for layer in model.conv1 if isinstance(layer, nn.Conv2d)] == [(3, 3)] * 3
    block = model.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))
    assert [type(layer) for layer in block.downsample] == [nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d]
    assert block.downsample[1].stride == (1, 1)


@pytest.mark.parametrize(
    ("name", "args", "zero"),
    [
        ("torchvision/resnet50", {"zero_init_residual": True}, True),
        ("torchvision/resnet50", {}, False),
        ("timm/resnet50", {}, True),
        ("timm/resnet50", {"zero_init_last": False}, False),
    ],
)
def test_last_gammas_begin_at_zero_where_asked(name: str, args: dict[str, Any], zero: bool) -> None:
    """All 16 blocks, and no other layer. timm's ResNets do so unasked. Fails when args do not reach the model."""
    model = built(name, args=args)
    gammas = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    last = [name for name in gammas if name.endswith("bn3")]
    assert len(last) == 16
    assert all(bool((gammas[name] == (0 if zero and name in last else 1)).all()) for name in gammas)


def test_our_own_networks_have_no_last_gamma() -> None:
    """small_resnet normalises before its convolutions, MobileNetV1 has no residual: all gammas are one."""
    for name in OWN:
        layers = [m for m in built(name).modules() if isinstance(m, nn.BatchNorm2d)]
        assert layers
        assert all(bool((layer.weight == 1).all()) for layer in layers)


QUICK = ("resnet18", "mobilenet_v1_x0_25", "mobilenet_v2_x0_25", "mobilenet_v3_small", "small_resnet")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in (*NAMES, *OWN)])
def test_each_network_trains_one_step(name: str, alone: None) -> None:
    """Finite losses; every parameter gets a gradient and moves; every batch-norm layer's statistics leave their start.

    Fails for a network that the engine, or running statistics by micro-batch, cannot handle.
    """
    model = built(name, args={"in_channels": 3} if name == "small_resnet" else {})
    before = copy.deepcopy(model.state_dict())
    trained = train(model, steps=1, lr=0.1)
    assert len(trained.losses) == NUM_SLOTS and all(0 < loss < 100 for loss in trained.losses)
    assert trained.gradients.keys() == {name for name, _ in model.named_parameters()}
    after = trained.engine.model_state()
    assert after.keys() == before.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key for key in before if "running_" in key or "num_batches" in key} <= moved
    assert {key for key in trained.gradients if trained.gradients[key].any()} <= moved


def test_a_seed_gives_the_weights() -> None:
    """Whatever was drawn before. Fails when the generator is not seeded, or the seed is not the config's."""
    first = built("small_resnet").stem.weight
    torch.rand(3)
    assert torch.equal(first, built("small_resnet").stem.weight)
    assert not torch.equal(first, build_model(ModelConfig(name="small_resnet"), NUM_CLASSES, 1).stem.weight)


# dropout, drop_path

RATES = [
    # Where branches begin at zero it makes no difference at first that one is dropped.
    ("timm/resnet18", {"zero_init_last": False}, "dropout"),
    ("timm/resnet18", {"zero_init_last": False}, "drop_path"),
    ("mobilenet_v3_small", {}, "dropout"),
    pytest.param("efficientnet_b0", {"dropout": 0.0}, "drop_path", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "args", "rate"), RATES)
def test_dropout_and_drop_path_act_and_belong_to_the_micro_batch(
    name: str, args: dict[str, Any], rate: str, alone: None
) -> None:
    """At 0.5 the loss is another than at 0; the same slot of the same step draws alike, another slot or step does not.

    All else is held: equal images, batch statistics. Fails when the rate does not reach the library under its own
    name, or the draw comes from the generator's state.
    """
    engines = {p: build(built(name, args=args, **{rate: p})) for p in (0.0, 0.5)}

    def loss(p: float, step: int, slot: int) -> float:
        batch = micro_batch(0, 0)
        batch.address.step, batch.address.slot = step, slot
        engines[p]._micro_step = 0
        return float(engines[p].forward_backward(batch))

    assert loss(0.5, 0, 0) == loss(0.5, 0, 0)
    assert len({loss(0.5, 0, 0), loss(0.5, 0, 1), loss(0.5, 1, 0)}) == 3
    assert loss(0.0, 0, 0) == loss(0.0, 0, 1) != loss(0.5, 0, 0)


def test_a_rate_of_null_leaves_the_models_own() -> None:
    """torchvision's MobileNetV3 has 0.2. Fails when null is handed over as 0."""
    assert built("mobilenet_v3_small").classifier[2].p == 0.2
    assert built("mobilenet_v3_small", dropout=0.0).classifier[2].p == 0.0


@pytest.mark.parametrize("name", ["resnet50", "small_resnet", "mobilenet_v3_small", "timm/vgg11"])
def test_a_model_without_stochastic_depth_refuses_drop_path(name: str) -> None:
    """torchvision's MobileNetV3 would swallow the argument. Fails when it is passed on unseen."""
    text = refusal(name, drop_path=0.1)
    assert text.startswith(f"model.drop_path: {name} takes no ")


def test_rates_that_cannot_be_are_refused() -> None:
    """Fails when 1, which divides by 0, goes through, or two places say different things."""
    assert refusal("timm/resnet18", drop_path=1.0).startswith("model.drop_path: 1.0")
    assert refusal("timm/resnet18", dropout=-0.1).startswith("model.dropout: -0.1")
    text = refusal("timm/resnet18", drop_path=0.1, args={"drop_path_rate": 0.2})
    assert text.startswith("model.args.drop_path_rate: is set by model.drop_path")


# What cannot be built


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/resnet5", "did you mean 'resnet50'"),
        ("torchvision/resnet5", "did you mean 'resnet50'"),
        ("resnet34", "did you mean 'torchvision/resnet34'"),
        ("vit_tiny_patch16_224", "did you mean 'timm/vit_tiny_patch16_224'"),
        ("mobilenet_v1_x025", "did you mean 'mobilenet_v1_x0_25'"),
        ("tim/resnet50", "'tim' is not a source of models"),
        ("nosuch.package:Net", "cannot import"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, expected: str) -> None:
    text = refusal(name)
    assert text.startswith("model.name: ")
    assert expected in text


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("timm/resnet18", {"wdith": 3}, "'wdith'"),
        ("torchvision/resnet18", {"zero_init": True}, "'zero_init'; did you mean 'zero_init_residual'"),
        # Its class swallows any keyword.
        ("mobilenet_v3_small", {"widht_mult": 0.5}, "'widht_mult'; did you mean 'width_mult'"),
        ("small_resnet", {"widht": 3}, "it accepts num_classes, in_channels, widths, depths, stem_width"),
        ("small_resnet", {"widths": [8]}, "zip()"),
        ("mobilenet_v1", {"width_mult": 0.01}, "width_mult 0.01"),
        ("torchvision/vit_b_16", {"image_size": 33}, "patch size"),
        ("timm/resnet18", {"act_layer": "nosuch"}, "KeyError: 'nosuch'"),
        ("timm/resnet18", {"pretrained": True}, "weights"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, "weights"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(name: str, args: dict[str, Any], expected: str) -> None:
    """Fails when a library's own exception comes through, or a misspelt argument has no effect."""
    text = refusal(name, args=args)
    assert text.startswith("model.args")
    assert expected in text


def test_arguments_reach_the_short_names_too() -> None:
    """Over the name's own. Fails when a preset wins over the config."""
    assert built("mobilenet_v1_x0_25", args={"width_mult": 0.5}).fc.in_features == 512
    assert built("mobilenet_v3_large", args={"width_mult": 0.5}).features[0][0].out_channels == 8


def test_a_name_that_builds_no_module_is_refused() -> None:
    """Mutation: whatever it is goes on to where named_modules is asked for."""
    text = refusal("collections:Counter")
    assert text == "model.name: collections:Counter gives a Counter, where a torch.nn.Module belongs"


# Images


def trial(name: str, shape: tuple[int, int, int], **args: Any) -> str:
    model = built(name, args=args)
    with pytest.raises(UserError) as caught:
        try_images(model, name, shape, NUM_CLASSES)
    return message(caught)


def test_images_that_a_network_does_not_take_are_refused() -> None:
    """Channels, a size below the network's or beside its patches, as many outputs as classes.

    Fails when the first training step is the first to know.
    """
    text = trial("timm/resnet18", (1, 28, 28))
    assert text.startswith("model.name: timm/resnet18 does not take images of 1 x 28 x 28: ")
    assert "model.args: {in_chans: 1}" in text and "data.channels: 3" in text
    text = trial("resnet18", (1, 28, 28))
    assert "data.channels: 3" in text and "in_chans" not in text
    assert "3 x 28 x 28" in trial("torchvision/alexnet", (3, 28, 28))
    assert "3 x 200 x 200" in trial("timm/vit_tiny_patch16_224", (3, 200, 200))
    assert "maps one image to [1, 7]" in trial("small_resnet", (1, 28, 28), num_classes=7)


def test_a_trial_changes_nothing() -> None:
    """Weights, buffers and modes, a frozen layer's included. Fails when batch-norm sees the image, or all is set to
    training afterwards."""
    model = built("small_resnet")
    model.bn.eval()
    before = copy.deepcopy(model.state_dict())
    try_images(model, "small_resnet", (1, 28, 28), NUM_CLASSES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and model.blocks.training and not model.bn.training


def test_ls_models_prints_names_parameters_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["ls", "models"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {*NAMES, *OWN}
    for name, (parameters, _, _) in PUBLISHED.items():
        assert f" {parameters:,} " in lines[name]
        assert NAMES[name][0] in lines[name]
    with pytest.raises(UserError) as caught:
        dispatch(["ls", "model"])
    assert "ls models" in message(caught)
