"""The threat model: which images an attack may visit, where it starts and how it steps.

The promise of this file is exactness. Every point it returns, compared with the clean image in
float64, is within ``eps`` and inside the box; rounding to the dtype of the images only ever
moves a point towards the clean image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

NORMS = ("linf", "l2")

_UINT64 = (1 << 64) - 1


def add_inward(anchor: Tensor, offset: Tensor | float) -> Tensor:
    """Return ``anchor + offset`` in the dtype of ``anchor``, never further away than ``offset``.

    The sum is taken in float64 and cast. Where the cast landed beyond ``|offset|`` the value is
    moved back by one unit in the last place; the sum was the nearest one, so one unit is enough.

    Args:
        anchor: The point to start from, any shape, any floating dtype.
        offset: float64 tensor that broadcasts to ``anchor``, or a number.

    Returns:
        Tensor ``r`` like ``anchor`` with ``|r - anchor| <= |offset|`` when computed in float64.

    Example:
        >>> black_to_white = torch.arange(256) / 255
        >>> naive = black_to_white + 8 / 255
        >>> bool(((naive.double() - black_to_white.double()) > 8 / 255).any())
        True
        >>> inward = add_inward(black_to_white, 8 / 255)
        >>> bool(((inward.double() - black_to_white.double()) > 8 / 255).any())
        False
    """
    exact = anchor.double()
    moved = (exact + offset).to(anchor.dtype)
    limit = offset.abs() if isinstance(offset, Tensor) else abs(offset)
    too_far = (moved.double() - exact).abs() > limit
    return torch.where(too_far, torch.nextafter(moved, anchor), moved)


def steepest_direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the unit step that increases a linear function fastest, one per sample.

    ``argmax <gradient, d>`` over ``||d|| <= 1`` is ``sign(g)`` for "linf" and ``g / ||g||_2`` for
    "l2". Entries that are not finite count as zero, and a zero gradient gives a zero direction.

    Args:
        gradient: Shape ``(B, ...)``.
        norm: ``"linf"`` or ``"l2"``.

    Returns:
        Same shape. The gradient's dtype for "linf", float64 for "l2".

    Example:
        >>> steepest_direction(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), "l2")
        tensor([[ 0.6000, -0.8000],
                [ 0.0000,  0.0000]], dtype=torch.float64)
    """
    gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if norm == "linf":
        return gradient.sign()
    # Dividing by the largest entry first keeps the squares of tiny or huge gradients in range.
    gradient = gradient.double()
    largest = per_sample(gradient.flatten(1).abs().amax(1), gradient)
    gradient = gradient / largest.masked_fill(largest == 0, 1.0)
    length = _length(gradient)
    return gradient / length.masked_fill(length == 0, 1.0)


class FeasibleSet:
    r"""All points within ``eps`` of each clean image that stay inside the box.

    ``{ p : ||p - x|| <= eps, low <= p <= high, p = x where the mask is False }``, on the
    floating-point grid of the images: a bfloat16 image has about 256 values per unit, so small
    steps from one are lost to the grid. For "linf" the set is itself a box, computed once, and the
    projection one clamp. For "l2" a point is scaled back to the ball and then clamped to the box.
    That is feasible, because the clamp moves every entry towards the clean image, but not always
    the nearest feasible point.

    Args:
        images: Clean images ``x``, shape ``(B, ...)``, inside the box.
        eps: Radius, in the units of the images: one for all, or shape ``(B,)``.
        norm: ``"linf"`` or ``"l2"``.
        bounds: The box ``(low, high)``, rounded to the images' dtype.
        mask: Where the images may change, bool, in the shape of the images; None is everywhere.

    Example:
        >>> feasible = FeasibleSet(torch.zeros(1, 2), eps=1.0, norm="l2", bounds=(0.0, 1.0))
        >>> feasible.project(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def __init__(
        self,
        images: Tensor,
        eps: float | Tensor,
        norm: str,
        bounds: tuple[float, float],
        mask: Tensor | None = None,
    ) -> None:
        self.images, self.norm, self.bounds, self.mask = images, norm, bounds, mask
        radius = torch.as_tensor(eps, dtype=torch.float64, device=images.device)
        self.radius = per_sample(radius.expand(len(images)), images)
        self.lower = self.upper = None
        if norm == "linf":
            self.lower = self._unmasked(add_inward(images, -self.radius).clamp(min=bounds[0]))
            self.upper = self._unmasked(add_inward(images, self.radius).clamp(max=bounds[1]))

    def with_rows(self, function: Callable[..., Tensor], *others: FeasibleSet) -> FeasibleSet:
        """Return the set whose tensors are ``function`` of this set's and the others' tensors.

        For functions that pick or join rows, such as ``torch.cat``.
        """
        result = copy(self)
        for name in ("images", "radius", "mask", "lower", "upper"):
            if getattr(self, name) is not None:
                tensors = (getattr(feasible, name) for feasible in (self, *others))
                setattr(result, name, function(*tensors))
        return result

    def project(self, points: Tensor) -> Tensor:
        """Return the points brought back into the set, in the dtype of the images."""
        if self.lower is not None:
            return points.to(self.images.dtype).clamp(self.lower, self.upper)
        offset = points.double() - self.images.double()
        offset = self.movable(offset)
        length = _length(offset)
        offset = offset * (self.radius / length).masked_fill(length <= self.radius, 1.0)
        return self._unmasked(add_inward(self.images, offset).clamp(*self.bounds))

    def ascend(self, points: Tensor, direction: Tensor, step_size: float | Tensor) -> Tensor:
        """Take one projected step, the steepest in the norm of the set.

        Args:
            points: Shape of the images.
            direction: Gradient, or what takes its place; its scale is of no effect.
            step_size: Length of the step: a number, or shape ``(B,)``.
        """
        direction = steepest_direction(self.movable(direction), self.norm)
        # In half precision a step would lose digits before the projection rounds the point.
        direction = direction.to(torch.promote_types(direction.dtype, torch.float32))
        if isinstance(step_size, Tensor):
            step_size = per_sample(step_size.to(direction.dtype), points)
        return self.project(points + step_size * direction)

    def random_points(self, seeds: Sequence[int], *, surface: bool = False) -> Tensor:
        """Draw one point per image, then project it.

        Args:
            seeds: One seed per image. The draw for an image depends on nothing but its seed, and
                not on the global random state.
            surface: Draw on the surface of the ball instead of uniformly from the ball: for "linf"
                a uniform draw stretched until its largest entry is ``eps``, for "l2" a uniform
                direction.

        Returns:
            Feasible points, like the images.
        """
        shape, device = self.images.shape, self.images.device
        noise = torch.empty(shape, dtype=torch.float32, device=device)
        # An l2 ball is filled evenly by a random direction times eps * u^(1/d).
        share = torch.ones(shape[0], dtype=torch.float64, device=device)
        generator = torch.Generator(device=device)
        for sample, seed in enumerate(seeds):
            generator.manual_seed(seed)
            if self.norm == "linf":
                noise[sample].uniform_(-1.0, 1.0, generator=generator)
            else:
                noise[sample].normal_(generator=generator)
                share[sample].uniform_(generator=generator)
        noise = self.movable(noise)
        offset = noise.double()
        if self.norm == "linf" and surface:
            largest = per_sample(offset.flatten(1).abs().amax(1), noise)
            offset = offset / largest.masked_fill(largest == 0, 1.0)
        elif self.norm == "l2":
            offset = steepest_direction(noise, "l2")
            if not surface:
                offset = offset * per_sample(share ** (1 / self._dimensions()), noise)
        return self.project(self.images.double() + self.radius * offset)

    def movable(self, values: Tensor) -> Tensor:
        """Return the values with zeros where an image may not change."""
        return values if self.mask is None else values.masked_fill(~self.mask, 0.0)

    def _dimensions(self) -> float | Tensor:
        """How many entries of an image may change."""
        if self.mask is None:
            return self.images[0].numel()
        return self.mask.flatten(1).sum(1).clamp(min=1)

    def _unmasked(self, points: Tensor) -> Tensor:
        return points if self.mask is None else torch.where(self.mask, points, self.images)


def sample_keys(images: Tensor) -> list[int]:
    """Return one integer per image that depends on that image's values only.

    The key is ``sum_i bits_i * w_i mod 2^64`` with ``bits_i`` the bit pattern of entry ``i`` and
    ``w_i`` a fixed odd pseudo-random weight. An integer sum is exact in any order, so a key does
    not depend on the batch the image came in, its memory format or the device. All keys reach the
    host in one transfer.

    Args:
        images: Shape ``(B, ...)``.

    Returns:
        ``B`` signed 64-bit integers.

    Example:
        >>> images = torch.rand(3, 2, 2)
        >>> sample_keys(images)[1:] == sample_keys(images[1:])
        True
    """
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[images.element_size()]
    bits = images.view(words).flatten(1).long()
    # splitmix64's constants with their top bits cleared, as int64 has no more; any mixing will do.
    weight = torch.arange(1, bits.shape[1] + 1, device=images.device) * 0x1E3779B97F4A7C15
    weight = (weight ^ (weight >> 29)) * 0x3F58476D1CE4E5B9
    weight = (weight ^ (weight >> 32)) | 1
    return (bits * weight).sum(1).tolist()


def stream_seed(seed: int, key: int, restart: int) -> int:
    """Mix three integers into a 63-bit seed; nearby inputs give unrelated seeds.

    A chain of splitmix64 steps, because the CPU generator of PyTorch reads 32 bits of its seed
    only and would otherwise repeat streams for related inputs.

    Example:
        >>> stream_seed(0, 1, 2) == stream_seed(0, 2, 1)
        False

    References:
        Steele, Lea and Flood (2014), Fast splittable pseudorandom number generators, figure 17,
        https://doi.org/10.1145/2660193.2660195
    """
    state = 0
    for part in (seed, key, restart):
        state = ((state ^ (part & _UINT64)) + 0x9E3779B97F4A7C15) & _UINT64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _UINT64
        state ^= state >> 31
    return state >> 1


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one value per sample so that it broadcasts over the entries of each sample.

    Args:
        values: Shape ``(B,)``, any dtype.
        like: Shape ``(B, ...)``; only its number of dimensions is used.

    Returns:
        A view of ``values``, shape ``(B, 1, ...)`` with as many dimensions as ``like``.
    """
    return values.view(-1, *[1] * (like.ndim - 1))


def from_host(numbers: np.ndarray, like: Tensor) -> Tensor:
    """Copy numbers to the device of a tensor without waiting for what the device is doing.

    Args:
        numbers: Any shape and dtype; not changed afterwards.
        like: Only its device is used.

    Returns:
        The numbers, of their shape and dtype.
    """
    return torch.from_numpy(numbers).to(like.device, non_blocking=True)


def _length(offset: Tensor) -> Tensor:
    """Euclidean length of each sample, shape ``(B, 1, ...)``."""
    return per_sample(torch.linalg.vector_norm(offset.flatten(1), dim=1), offset)
