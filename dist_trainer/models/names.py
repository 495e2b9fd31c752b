"""Short names of networks from PaddleClas's and super-gradients' training guides, and what builds them."""

from typing import Any

NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("torchvision/resnet18", {}),
    "resnet50": ("torchvision/resnet50", {}),
    # vd: a stem of three 3x3 convolutions, shortcuts that average before they project (He et al. 2019, ResNet-D).
    "resnet50_vd": ("timm/resnet50d", {}),
    "mobilenet_v1_x0_25": ("mobilenet_v1", {"width_mult": 0.25}),
    # PaddleClas takes a quarter of the channels as it is, 16 to 4; torchvision would round them to multiples of 8.
    "mobilenet_v2_x0_25": ("torchvision/mobilenet_v2", {"width_mult": 0.25, "round_nearest": 1}),
    "mobilenet_v3_large": ("torchvision/mobilenet_v3_large", {}),
    "mobilenet_v3_small": ("torchvision/mobilenet_v3_small", {}),
    "efficientnet_b0": ("torchvision/efficientnet_b0", {}),
}
