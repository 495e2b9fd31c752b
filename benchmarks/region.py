"""Decoding a random crop of a JPEG: our C decoder, nvImageCodec's CPU decoder, and whole images by torchvision.

    python benchmarks/region.py [--quick] [--json FILE]

CPU time per image of one thread, from bytes to uint8 pixels of the crop, and on to 224 x 224 by the product's resize.
Sides take turns. Crops are those of RandomResizedCrop's defaults. Every crop is held against the whole image by Pillow.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from machine import Figures, figure, interleaved, machine, parser, save, table
from ours import SIZE
from photographs import photographs
from PIL import Image

from dist_trainer.data import jpeg_region
from dist_trainer.data.augment import CropConfig, crop_boxes
from dist_trainer.data.decode import Box, decode, resize

Decoder = Callable[[bytes, Box], torch.Tensor]
"""uint8 [3, height, width] of the box"""


def own(data: bytes, box: Box) -> torch.Tensor:
    pixels = jpeg_region.decode_region(data, 3, box)
    assert pixels is not None
    return pixels


def torchvision(data: bytes, box: Box) -> torch.Tensor:
    left, top, width, height = box
    return decode(data, 3)[:, top : top + height, left : left + width]


def nvimagecodec() -> Decoder:
    from nvidia import nvimgcodec

    decoder = nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        max_num_cpu_threads=1,
    )
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def decode_region(data: bytes, box: Box) -> torch.Tensor:
        left, top, width, height = box
        region = nvimgcodec.Region(top, left, top + height, left + width)
        image = decoder.decode(nvimgcodec.CodeStream(data).get_sub_code_stream(region=region), params=params)
        return torch.from_numpy(np.asarray(image)).permute(2, 0, 1)

    return decode_region


def decoders() -> dict[str, Decoder]:
    """Those that are installed."""
    sides: dict[str, Decoder] = {"torchvision, whole": torchvision}
    if jpeg_region.is_available:
        sides["our C"] = own
    try:
        sides["nvImageCodec"] = nvimagecodec()
    except ImportError as error:
        print(f"skipped: nvImageCodec: {error} (pip install nvidia-nvimgcodec-cu12)")
    return sides


def main() -> None:
    values = parser(__doc__, "fewer rounds").parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(machine())
    files = sorted(photographs().glob("train/*/*"))[:: 12 if values.quick else 4]
    data = [file.read_bytes() for file in files]
    sizes = np.array([Image.open(file).size for file in files])
    boxes: list[Box] = crop_boxes(
        CropConfig(size=SIZE), sizes[:, 0], sizes[:, 1], np.arange(len(files), dtype=np.uint64)
    ).tolist()
    sides = decoders()
    whole = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]
    for name, side in sides.items():
        pairs = zip(data, boxes, whole, strict=True)
        equal = sum(
            torch.equal(side(each, box), image[:, box[1] : box[1] + box[3], box[0] : box[0] + box[2]])
            for each, box, image in pairs
        )
        print(f"{name}: {equal} of {len(files)} crops have the bits of Pillow's whole image")

    def run(side: Decoder, then: Callable[[torch.Tensor], Any]) -> None:
        for each, box in zip(data, boxes, strict=True):
            then(side(each, box))

    figures: Figures = {}
    for title, then in (("decoded", id), ("decoded, resized", partial(resize, size=(SIZE, SIZE)))):
        seconds = interleaved(
            {name: partial(run, side, then) for name, side in sides.items()}, 5 if values.quick else 15
        )
        ours = seconds.pop("our C") / len(files)
        figures |= {f"{title}, against {name}": figure(ours, each / len(files)) for name, each in seconds.items()}
    table("CPU time per image", figures)
    save(values.json, figures)


if __name__ == "__main__":
    main()
