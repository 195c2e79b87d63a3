"""The threat model: which images an attack may visit, where it starts and how it steps.

The promise of this file is exactness. Every point it returns, compared with the clean image in
float64, is within ``eps`` and inside the box; rounding to the dtype of the images only ever
moves a point towards the clean image.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    ``{ p : ||p - x|| <= eps, low <= p <= high }``, on the floating-point grid of the images: a
    bfloat16 image has about 256 values per unit, so small steps from one are lost to the grid.
    For "linf" the set is itself a box, and the projection one clamp. For "l2" a point is scaled
    back to the ball and then clamped to the box. That is feasible, because the clamp moves every
    entry towards the clean image, but not always the nearest feasible point.

    Args:
        images: Clean images ``x``, shape ``(B, ...)`` with ``B >= 1``, inside the box.
        eps: Radius, in the units of the images.
        norm: ``"linf"`` or ``"l2"``.
        bounds: The box ``(low, high)``, rounded to the images' dtype.

    Example:
        >>> feasible = FeasibleSet(torch.zeros(1, 2), eps=1.0, norm="l2", bounds=(0.0, 1.0))
        >>> feasible.project(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def __init__(self, images: Tensor, eps: float, norm: str, bounds: tuple[float, float]) -> None:
        self.images, self.eps, self.norm, self.bounds = images, eps, norm, bounds
        if norm == "linf":
            self.lower = add_inward(images, -eps).clamp(min=bounds[0])
            self.upper = add_inward(images, eps).clamp(max=bounds[1])

    def project(self, points: Tensor) -> Tensor:
        """Return the points brought back into the set, in the dtype of the images."""
        if self.norm == "linf":
            return points.to(self.images.dtype).clamp(self.lower, self.upper)
        offset = points.double() - self.images.double()
        length = _length(offset)
        offset = offset * (self.eps / length).masked_fill(length <= self.eps, 1.0)
        return add_inward(self.images, offset).clamp(*self.bounds)

    def ascend(self, points: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Take one projected step of length ``step_size``, steepest in the norm of the set."""
        return self.project(points + step_size * steepest_direction(gradient, self.norm))

    def random_points(self, seeds: Sequence[int]) -> Tensor:
        """Draw one point per image: uniform in the ball, then projected.

        Args:
            seeds: One seed per image. The draw for an image depends on nothing but its seed, and
                not on the global random state.

        Returns:
            Feasible points, like the images.
        """
        shape, device = self.images.shape, self.images.device
        noise = torch.empty(shape, dtype=torch.float32, device=device)
        # An l2 ball is filled evenly by a random direction times eps * u^(1/d).
        radius = torch.ones(shape[0], dtype=torch.float64, device=device)
        generator = torch.Generator(device=device)
        for sample, seed in enumerate(seeds):
            generator.manual_seed(seed)
            if self.norm == "linf":
                noise[sample].uniform_(-1.0, 1.0, generator=generator)
            else:
                noise[sample].normal_(generator=generator)
                radius[sample].uniform_(generator=generator)
        offset = noise.double()
        if self.norm == "l2":
            radius = per_sample(radius, noise) ** (1 / noise[0].numel())
            offset = steepest_direction(noise, "l2") * radius
        return self.project(self.images.double() + self.eps * offset)


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


def _length(offset: Tensor) -> Tensor:
    """Euclidean length of each sample, shape ``(B, 1, ...)``."""
    return per_sample(torch.linalg.vector_norm(offset.flatten(1), dim=1), offset)
