"""Adversarial images for files of 8 bits per channel, still inside their ball."""

from __future__ import annotations

import torch
from torch import Tensor

from calibclip._checks import (
    check_choice,
    check_floating,
    check_same_shape,
    describe,
    wrong,
)
from calibclip.attacks._arguments import check_eps, check_radii
from calibclip.attacks.threat import NORMS, per_sample

_WHITE = 255
# Pixels this close to a level, in levels, are on it: a few roundings of float32 near white.
_ON_LEVEL = 2.0**-13


def to_uint8(images_adv: Tensor, images: Tensor, eps: float | Tensor, norm: str = "linf") -> Tensor:
    r"""Round adversarial images to 8 bits, losing as little of the perturbation as possible.

    The common ``(images_adv * 255).to(uint8)`` cuts off the fraction: it shifts pixels by up to
    a level, and carries some out of the ball. Here every result is in the ball around ``images``.

    **Clean images from 8-bit files.** A pixel that is ``q / 255`` up to the rounding of its dtype
    is taken to be the level ``q`` itself. The budget is then a whole number of levels,
    ``n = floor(255 eps)``, and what is returned is an integer with ``|q' - q| <= n``: the nearest
    to the adversarial pixel, of two the one that keeps more of the perturbation. An ``eps`` of
    ``8/255`` in float32 is 8 levels. For "l2", ``sum (q' - q)^2 <= (255 eps)^2``.

    **Other clean pixels** (after resizing, say) get the nearest level within ``eps`` of them,
    computed in float64. Below half a level such a one need not exist.

    **L2.** Rounding to the nearest level can lengthen a perturbation. Where it then exceeds
    ``eps``, some of its pixels go one level inward, those first that lose least for what they save.
    Perturbations below half a level per pixel, as of a large image, are lost whatever one does.

    Rounding may undo a success: judge the images again as they are in the file,
    ``model(saved / 255)``.

    Args:
        images_adv: Adversarial images in [0, 1], shape ``(B, ...)``, floating. Where they are
            outside the ball they are brought into it.
        images: Clean images in [0, 1], of the same shape.
        eps: Radius, >= 0, in the units of the images: a number, or one for each image, shape
            ``(B,)``.
        norm: ``"linf"`` or ``"l2"``.

    Returns:
        Levels from 0 to 255, uint8, in the shape and on the device of ``images_adv``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Values outside [0, 1], shapes that differ, or clean images so far from 8-bit
            levels that no 8-bit image is within ``eps``.

    Example:
        >>> images = torch.tensor([[10, 100, 255]]) / 255
        >>> images_adv = images - 8 / 255
        >>> to_uint8(images_adv, images, eps=8 / 255)
        tensor([[  2,  92, 247]], dtype=torch.uint8)
        >>> (images_adv * 255).to(torch.uint8)  # nine levels away from 10
        tensor([[  1,  92, 247]], dtype=torch.uint8)
    """
    images_adv = _check_pixels("images_adv", images_adv)
    images = _check_pixels("images", images)
    check_same_shape("images_adv", images_adv, "images", images)
    check_choice("norm", norm, NORMS)
    radius, rounding = _check_radius(eps, images, norm)
    pixels, on_level = _clean_levels(images)
    wanted = _WHITE * images_adv.double()
    round_into = _round_into_box if norm == "linf" else _round_into_ball
    return round_into(wanted, pixels, on_level, radius, rounding).to(torch.uint8)


def _check_pixels(argument: str, images: object) -> Tensor:
    images = check_floating(argument, images, shape="(B, ...)").detach()
    if images.ndim < 2:
        raise ValueError(
            wrong(argument, "shape (B, ...)", describe(images), "add a batch dimension")
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(wrong(argument, "values in [0, 1]", "values outside, or NaN"))
    return images


def _check_radius(eps: float | Tensor, images: Tensor, norm: str) -> tuple[Tensor, float]:
    """Return the radius in levels, float64 ``(B, 1, ...)``, and its relative rounding error."""
    rounding = torch.finfo(torch.float32).eps
    if isinstance(eps, Tensor):
        radius = check_radii(eps, images, norm, (0.0, 1.0))
        rounding = max(rounding, torch.finfo(eps.dtype).eps)
    else:
        radius = torch.tensor(check_eps(eps, norm, (0.0, 1.0)), dtype=torch.float64)
    radius = radius.to(images.device).expand(len(images))
    return _WHITE * per_sample(radius, images), rounding


def _clean_levels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the clean pixels in levels, float64, and where they are whole ones.

    In half precision an image's level is known by its rounding: float16 and bfloat16 numbers are
    up to 0.06 and 0.5 levels away from the ones they stand for.
    """
    exact = _WHITE * images.double()
    nearest = exact.round()
    on_level = (nearest / _WHITE).to(images.dtype) == images
    on_level |= (exact - nearest).abs() <= _ON_LEVEL
    return torch.where(on_level, nearest, exact), on_level


def _round_into_box(
    wanted: Tensor, pixels: Tensor, on_level: Tensor, radius: Tensor, rounding: float
) -> Tensor:
    """Return the nearest levels within the radius of each pixel."""
    whole = (radius * (1 + rounding)).floor()
    lower, upper = (pixels - radius).ceil(), (pixels + radius).floor()
    lower = torch.where(on_level, pixels - whole, lower)
    upper = torch.where(on_level, pixels + whole, upper)
    _check_possible(lower <= upper, "pixels")
    return _nearest(wanted, pixels).clamp(lower, upper)


def _round_into_ball(
    wanted: Tensor, pixels: Tensor, on_level: Tensor, radius: Tensor, rounding: float
) -> Tensor:
    """Return levels within the radius of each image, near the wanted ones."""
    # Where a clean pixel is between levels, its distances are no whole numbers and need no slack.
    whole = per_sample(on_level.flatten(1).all(1), wanted)
    radius = torch.where(whole, radius * (1 + rounding), radius)
    offset = wanted - pixels
    length = per_sample(_squares(offset).sqrt(), offset)
    wanted = pixels + offset * (radius / length).masked_fill(length <= radius, 1.0)
    limit = radius.flatten() ** 2
    _check_possible(_squares(pixels.round() - pixels) <= limit, "images")
    levels = _nearest(wanted, pixels)
    while True:
        excess = _squares(levels - pixels) - limit
        if not bool((excess > 0).any()):
            return levels
        inward = levels - (levels - pixels).sign()
        levels = _shorten(levels, inward, wanted, pixels, excess)


def _shorten(
    levels: Tensor, inward: Tensor, wanted: Tensor, pixels: Tensor, excess: Tensor
) -> Tensor:
    """Move inward by a level as many pixels of each image as its excess of squared length takes.

    Those go first that move least further from the wanted level for what they save in length.
    """
    saved = ((levels - pixels) ** 2 - (inward - pixels) ** 2).flatten(1)
    price = ((inward - wanted) ** 2 - (levels - wanted) ** 2).flatten(1) / saved
    order = price.masked_fill(saved <= 0, torch.inf).argsort(dim=1)
    gains = saved.gather(1, order)
    needed = (gains.cumsum(1) - gains < excess.unsqueeze(1)) & (gains > 0)
    moved = torch.zeros_like(needed).scatter(1, order, needed)
    return torch.where(moved.view_as(levels), inward, levels)


def _nearest(wanted: Tensor, pixels: Tensor) -> Tensor:
    """Round to the nearest level; from the middle between two, away from the clean pixel."""
    direction = torch.where(wanted < pixels, -1.0, 1.0).double()
    return direction * (direction * wanted + (0.5 + _ON_LEVEL)).floor()


def _squares(offset: Tensor) -> Tensor:
    """Squared length of each sample, shape ``(B,)``."""
    return (offset**2).flatten(1).sum(1)


def _check_possible(possible: Tensor, things: str) -> None:
    impossible = int((~possible).sum())
    if impossible:
        raise ValueError(
            wrong(
                "eps",
                "a radius with an 8-bit image inside",
                f"none for {impossible} of {possible.numel()} {things}",
                "round the clean images to 8 bits before the attack, or save floats",
            )
        )
