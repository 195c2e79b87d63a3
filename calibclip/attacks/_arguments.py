"""Checks of the arguments that attacks have in common, and of what attacks return."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibclip._checks import (
    check_floating,
    check_number,
    check_same_device,
    describe,
    wrong,
)


def check_bounds(bounds: object) -> tuple[float, float]:
    """Return the box as two floats."""
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        raise TypeError(wrong("bounds", "a tuple (low, high)", describe(bounds)))
    low, high = (check_number("bounds", bound) for bound in bounds)
    if not low < high:
        raise ValueError(wrong("bounds", "(low, high) with low < high", (low, high)))
    return low, high


def check_eps(eps: object, norm: str, bounds: tuple[float, float]) -> float:
    """Return the radius as a float; an L-infinity ball wider than the box is a mistake of units."""
    if isinstance(eps, Tensor) and eps.ndim == 1:
        remedy = "pass radii per image to the call: attack(model, images, target, eps=radii)"
        raise TypeError(wrong("eps", "a number", describe(eps), remedy))
    eps = check_number("eps", eps, at_least=0)
    if eps > _widest(norm, bounds):
        raise ValueError(_too_wide("a number", bounds, f"{eps:g}"))
    return eps


def _widest(norm: str, bounds: tuple[float, float]) -> float:
    return bounds[1] - bounds[0] if norm == "linf" else math.inf


def _too_wide(expected: str, bounds: tuple[float, float], got: str) -> str:
    expected = f"{expected} >= 0 and <= {bounds[1] - bounds[0]:g}, the width of bounds"
    return wrong("eps", expected, got, "8 of 255 levels are eps=8/255")


def check_radii(eps: object, images: Tensor, norm: str, bounds: tuple[float, float]) -> Tensor:
    """Return one radius per image in float64; see `check_eps`."""
    expected = f"a floating-point tensor of shape ({len(images)},), one radius per image"
    if not isinstance(eps, Tensor) or not eps.is_floating_point():
        raise TypeError(wrong("eps", expected, describe(eps), "call eps.float()"))
    if eps.shape != images.shape[:1]:
        expected = f"one radius per image, shape ({len(images)},)"
        raise ValueError(wrong("eps", expected, describe(eps)))
    check_same_device("eps", eps, "images", images)
    eps = eps.detach().double()
    improper = eps[~((eps >= 0) & eps.isfinite())]
    if len(improper):
        raise ValueError(wrong("eps", "numbers >= 0", f"{float(improper[0]):g} among them"))
    if len(eps) and (largest := float(eps.max())) > _widest(norm, bounds):
        raise ValueError(_too_wide("numbers", bounds, f"{largest:g} among them"))
    return eps


def check_mask(mask: object, images: Tensor) -> Tensor | None:
    """Return the mask in the shape of the images."""
    if mask is None:
        return None
    expected = f"a bool tensor that broadcasts to {tuple(images.shape)}"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(wrong("mask", expected, describe(mask)))
    check_same_device("mask", mask, "images", images)
    try:
        return mask.expand(images.shape)
    except RuntimeError as error:
        raise ValueError(wrong("mask", expected, describe(mask))) from error


def check_reference(reference: object, images: Tensor) -> Tensor:
    """Return what an objective compares with: one row per image, no graph."""
    expected = f"a tensor with {len(images)} rows"
    if not isinstance(reference, Tensor):
        raise TypeError(wrong("reference", expected, describe(reference)))
    if reference.shape[:1] != images.shape[:1]:
        raise ValueError(wrong("reference", expected, describe(reference)))
    check_same_device("reference", reference, "images", images)
    return reference.detach().clone()


def check_images(images: object, bounds: tuple[float, float] | None) -> Tensor:
    """Return a private copy of the clean images after the one look at their values.

    Without bounds there is no look.
    """
    expected = "a floating-point tensor of shape (B, ...)"
    if isinstance(images, Tensor) and not images.is_floating_point():
        raise TypeError(wrong("images", expected, describe(images), "convert to float in [0, 1]"))
    images = check_floating("images", images, shape="(B, ...)")
    if images.ndim < 2:
        raise ValueError(wrong("images", expected, describe(images), "add a batch dimension"))
    # The clone is also what lets tensors made in inference mode take part in autograd.
    images = images.detach().clone()
    # Written with clamp, so that the bounds are rounded to the dtype as the attack rounds them.
    if bounds is not None and not bool((images == images.clamp(*bounds)).all()):
        lowest, highest = (float(extreme) for extreme in torch.aminmax(images))
        raise ValueError(
            wrong(
                "images",
                f"values in [{bounds[0]:g}, {bounds[1]:g}]",
                f"values in [{lowest:g}, {highest:g}]",
                "attack images before normalisation, and normalise inside the model",
            )
        )
    return images


def check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(wrong("generator", "a torch.Generator or None", describe(generator)))


def draw_seed(generator: torch.Generator | None, seed: int) -> int:
    """Return the seed of a call: the generator's next draw, or the attack's own seed."""
    check_generator(generator)
    if generator is None:
        return seed
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


def check_found(found: object, clean: Tensor, *, finite: bool = True) -> Tensor:
    """Return the images of what somebody's attack returned: images, or a result that holds them."""
    images = getattr(found, "images", found)
    expected = f"images of shape {tuple(clean.shape)}, or a result that holds them, from the attack"
    if not isinstance(images, Tensor):
        raise TypeError(wrong("attack", expected, describe(images), "return the images alone"))
    if not images.is_floating_point():
        raise TypeError(wrong("attack", expected, describe(images)))
    if images.shape != clean.shape:
        raise ValueError(wrong("attack", expected, describe(images)))
    images = images.detach().to(clean.device)
    if finite and not bool(images.isfinite().all()):
        remedy = "Foreign(attack, eps) replaces such images"
        raise ValueError(wrong("attack", "finite images", "NaN or infinity among them", remedy))
    return images
