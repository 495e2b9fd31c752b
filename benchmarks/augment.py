"""What each augmentation costs per image, on PIL images and on tensors: why policies run on the former.

    python benchmarks/augment.py [--quick] [--json FILE]

CPU time of one thread for photographs as a crop of 224 pixels gives them, uint8 [3, 224, 224], back to such, with the
seeding of each image's draws. PIL is how training runs policies and jitter, with both conversions; tensor is the same
torchvision class on the tensor. What erases runs on tensors alone. The crop itself, decoded and resized, stands beside.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from machine import Figures, figure, interleaved, machine, parser, save, table
from photographs import photographs
from PIL import Image
from torchvision.transforms import v2

from dist_trainer.by_name import Named
from dist_trainer.data.augment import CropConfig, crop_boxes
from dist_trainer.data.augment.pipeline import ERASERS
from dist_trainer.data.augment.policy import OFF, OnPil
from dist_trainer.data.decode import decode_region, resize

SIZE, FILL = 224, [124, 116, 104]
TENSOR: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "autoaugment": v2.AutoAugment(fill=FILL),
    "randaugment": v2.RandAugment(fill=FILL),
    "trivialaugment": v2.TrivialAugmentWide(fill=FILL),
    "colour jitter": v2.ColorJitter(0.4, 0.4, 0.4),
}


def on_pil(name: str) -> OnPil:
    jitter = name == "colour jitter"
    return OnPil(0.4 if jitter else 0.0, Named(name=OFF if jitter else name), FILL)


def each(transform: Callable[[torch.Tensor], Any], images: list[torch.Tensor]) -> None:
    for number, image in enumerate(images):
        torch.default_generator.manual_seed(number)
        transform(image)


def main() -> None:
    arguments = parser(__doc__, "fewer photographs and rounds").parse_args()
    torch.set_num_threads(1)
    print(machine())
    files = sorted(photographs().glob("train/*/*"))[:: 40 if arguments.quick else 10]
    data = [file.read_bytes() for file in files]
    sizes = np.array([Image.open(file).size for file in files])
    keys = np.arange(len(files), dtype=np.uint64)
    boxes: list[Any] = crop_boxes(CropConfig(size=SIZE), sizes[:, 0], sizes[:, 1], keys).tolist()

    def crops() -> list[torch.Tensor]:
        return [resize(decode_region(bytes_, 3, box), (SIZE, SIZE)) for bytes_, box in zip(data, boxes, strict=True)]

    images, fill = crops(), torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
    sides: dict[str, Callable[[], object]] = {"crop": crops}
    for name, transform in TENSOR.items():
        sides[name] = partial(each, on_pil(name), images)
        sides[f"{name}, tensor"] = partial(each, transform, images)
    for name, eraser in ERASERS.items():
        erase = eraser(fill)
        sides[name] = partial(each, partial(erase, epoch=1.0), images)
    seconds = {name: s / len(images) for name, s in interleaved(sides, 5 if arguments.quick else 15).items()}
    figures: Figures = {
        "crop, decoded and resized": figure(seconds["crop"]),
        **{name: figure(seconds[name], seconds[f"{name}, tensor"]) for name in TENSOR},
        **{name: figure(seconds[name]) for name in ERASERS},
    }
    table("CPU time per image", figures, peer="tensor")
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
