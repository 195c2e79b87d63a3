"""Resizing image tensors as Pillow resizes images, differentiably."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

RESIZE_MODES = ("shortest", "shortest_floor", "squash")


def resize(images: Tensor, target: tuple[int, int], interpolation: str, resize_mode: str) -> Tensor:
    """Resize to ``target`` as Pillow would, except for its rounding to 8 bits."""
    height, width = _size_before_crop(images.shape[-2], images.shape[-1], target, resize_mode)
    if images.shape[-2:] != (height, width):
        # Bicubic weights are partly negative and overshoot at edges, where 8-bit images saturate:
        # in Pillow after each of two passes, width first. One pass was off by 27/255 there.
        for size in ((images.shape[-2], width), (height, width)):
            images = F.interpolate(images, size=size, mode=interpolation, antialias=True)
            images = images.clamp(0, 1)
    offset = math.floor if resize_mode == "shortest_floor" else round
    top, left = (
        offset((have - want) / 2) for have, want in zip((height, width), target, strict=True)
    )
    return images[..., top : top + target[0], left : left + target[1]]


def _size_before_crop(
    height: int, width: int, target: tuple[int, int], resize_mode: str
) -> tuple[int, int]:
    if resize_mode == "squash":
        return target
    if target[0] == target[1]:
        # torchvision's Resize truncates the longer side, where the general rule below rounds it.
        longer = int(target[0] * max(height, width) / min(height, width))
        return (target[0], longer) if height <= width else (longer, target[0])
    ratio = min(height / target[0], width / target[1])
    return round(height / ratio), round(width / ratio)
