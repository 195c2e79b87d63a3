"""Smooth calibration error: residuals smoothed over the confidence instead of binned."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import scipy  # loads its parts when they are used
import torch
from torch import Tensor

from calibclip._checks import check_number
from calibclip.metrics._binning import residuals_by_confidence
from calibclip.metrics._predictions import ArrayLike, Predictions
from calibclip.metrics._streaming import Column, PredictionMetric

# Up to this many samples, widths that the grid resolves less well are worked out without it.
MAX_EXACT = 2000

_CELLS = 8192
_RESOLVED = 0.01
_NODES_PER_WIDTH = 16
_REACH = 7.0  # widths at which the kernel has fallen to 2e-11 of its height
_NARROWEST = 1e-12
_START = 0.05


def smooth_calibration_error(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    bandwidth: float | None = None,
    nan: str = "raise",
) -> float:
    r"""Smooth calibration error (smooth ECE) of the predicted class.

    .. math::
        \mathrm{smECE}_\sigma = \int_0^1 \Big| \frac{1}{N} \sum_i (c_i - a_i) K_\sigma(t, c_i)
        \Big| \, dt, \qquad \mathrm{smECE} = \mathrm{smECE}_{\sigma^*} \text{ where }
        \mathrm{smECE}_{\sigma^*} = \sigma^*

    with confidence :math:`c_i`, correctness :math:`a_i` 0 or 1, and K the normal density of width
    :math:`\sigma` around :math:`c_i`, folded back into [0, 1] at the ends. There are no bins to
    choose, and the value changes continuously with the confidences. The error falls as the width
    grows, so that there is one fixed point; it is never below the mean gap
    :math:`|\bar c - \bar a|`.

    The residuals are split onto 8193 points such that the moments of each up to the third stay, and
    smoothed by a cosine transform. Measured against the sum itself this moves a fixed point above
    0.001 by less than 1e-7, one above 0.0002 by less than 1e-6 and any by less than 1e-4, about the
    spacing of the points; for a given ``bandwidth`` of 0.001 the error moves by less than 1e-5 and
    for one from 0.003 on by less than 1e-7. Up to 2000 samples, widths below 0.01 are smoothed by
    the sum over samples instead, which is right to 1e-7 for all. Which of the two it is does not
    depend on how the samples came in batches.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        bandwidth: A fixed width :math:`\sigma` in [0.001, 1] instead of the fixed point.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float in [0, 1], summed in float64; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> smooth_calibration_error(probs, target=torch.tensor([0, 1]))  # |0.75 - 0.5|
        0.25

    References:
        Błasiok, Nakkiran (2024), Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing,
        https://arxiv.org/abs/2309.12236
    """
    metric = SmoothCalibrationError(bandwidth=bandwidth, nan=nan)
    return metric.update(probs, logits, target).compute(sync=False)


class SmoothCalibrationError(PredictionMetric[float]):
    """`smooth_calibration_error` of a stream.

    The state is 8193 sums and at most 2001 samples, whatever N is.

    Args:
        bandwidth: A fixed width in [0.001, 1] instead of the fixed point.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = SmoothCalibrationError()
        >>> for label in (0, 1):
        ...     _ = metric.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([label]))
        >>> metric.compute()
        0.25
    """

    def __init__(self, *, bandwidth: float | None = None, nan: str = "raise") -> None:
        if bandwidth is not None:
            bandwidth = check_number("bandwidth", bandwidth, at_least=0.001, at_most=1)
        super().__init__(bandwidth=bandwidth, nan=nan)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        sums = {
            "n_samples": torch.zeros((), dtype=torch.int64),
            "residual": torch.zeros(_CELLS + 1, dtype=torch.float64),
        }
        columns: dict[str, Column] = {
            "confidence": _FirstSamples(torch.float64),
            "correct": _FirstSamples(torch.uint8),
        }
        return sums, columns

    def _take(self, predictions: Predictions) -> None:
        # A row that is no distribution gets a place on the grid, too: what its residual does there
        # is never read.
        confidence = predictions.confidence.double().nan_to_num(0.0).clamp(min=0.0)
        correct = predictions.correct
        self._add(
            n_samples=torch.full((), len(confidence), device=confidence.device),
            residual=split_residuals(confidence, correct),
        )
        self._append(confidence=confidence, correct=correct)

    def _value(self) -> float:
        n_samples = int(self._sums["n_samples"])
        if n_samples == 0:
            return math.nan
        width = self.options["bandwidth"]
        masses = self._sums["residual"].cpu().numpy() / n_samples
        on_grid = partial(grid_error, masses)
        found = on_grid(width) if width else _fixed_point(on_grid, _START)
        # With so few samples no state that was merged has left out one.
        if n_samples <= MAX_EXACT and (width or found) < _RESOLVED:
            confidence, correct = (self._columns[n].values.cpu() for n in ("confidence", "correct"))
            values, residuals = residuals_by_confidence(confidence, correct)
            exact = partial(exact_error, values.numpy(), residuals.numpy() / n_samples)
            found = exact(width) if width else _fixed_point(exact, found)
        # Bounds of the value, which rounding may miss.
        return min(max(found, abs(float(masses.sum()))), 1.0)


class _FirstSamples(Column):
    """Column that stops one past the number up to which it is used."""

    def append(self, values: Tensor) -> None:
        super().append(values[: max(MAX_EXACT + 1 - len(self.values), 0)])


def split_residuals(confidence: Tensor, correct: Tensor) -> Tensor:
    """Split the residual ``c - a`` of each sample onto the four grid points around c.

    The weights are those of cubic interpolation: integrals of cubic polynomials stay what they are.

    Args:
        confidence: In [0, 1], shape ``(N,)``, float64.
        correct: Shape ``(N,)``, bool.

    Returns:
        Sums on the points k / 8192, k in 0..8192; shape ``(8193,)``, float64.
    """
    residual = confidence - correct.double()
    place = confidence * _CELLS
    cell = place.floor().clamp(max=_CELLS - 1)
    u = place - cell
    cell = cell.long()
    before, after, beyond = u + 1, 1 - u, 2 - u
    weights = (
        -u * after * beyond / 6,
        before * after * beyond / 2,
        before * u * beyond / 2,
        -before * u * after / 6,
    )
    # One point more at either end, folded back as the kernel is.
    sums = confidence.new_zeros(_CELLS + 3)
    for offset, weight in enumerate(weights):
        sums.index_add_(0, cell + offset, weight * residual)
    grid = sums[1:-1].clone()
    grid[1] += sums[0]
    grid[-2] += sums[-1]
    return grid


def grid_error(masses: np.ndarray, width: float) -> float:
    """Return the error at a width from residuals on equidistant points over [0, 1].

    A cosine series has the reflection at 0 and 1 built in, and smoothing scales its terms.
    """
    n_cells = len(masses) - 1
    halved = masses / 2  # the transform counts all points but the ends twice
    halved[[0, -1]] *= 2
    damping = np.exp(-((np.pi * width * np.arange(n_cells + 1)) ** 2) / 2)
    smoothed = np.asarray(
        scipy.fft.dct(np.asarray(scipy.fft.dct(halved, type=1)) * damping, type=1)
    )
    ends = (abs(smoothed[0]) + abs(smoothed[-1])) / 2
    return float(np.abs(smoothed).sum() - ends + _kinks(smoothed)) / n_cells


def exact_error(values: np.ndarray, masses: np.ndarray, width: float) -> float:
    """Return the error at a width, the kernel evaluated at every sample.

    Points of integration are laid only where a kernel reaches, so that no width is too small.

    Args:
        values: Confidences.
        masses: Sum of the residuals at each, over N.
        width: Of the kernel, above 0.
    """
    n_cells = math.ceil(_NODES_PER_WIDTH / width)
    reach = _REACH * width
    # Folding the kernel back at 0 and 1 is the same as adding mirror images of the samples.
    turns = math.ceil((reach + 1) / 2)
    shifts = 2.0 * np.arange(-turns, turns + 1)[:, None]
    centres = np.concatenate([shifts + values, shifts - values]).ravel()
    masses = np.tile(masses, 2 * len(shifts))
    near = (centres >= -reach) & (centres <= 1 + reach)
    order = np.argsort(centres[near], kind="stable")
    centres, masses = centres[near][order], masses[near][order]

    first = np.ceil((centres - reach) * n_cells).astype(np.int64)
    span = np.arange(int(2 * reach * n_cells) + 1)
    nodes = first[:, None] + span
    distance = (nodes / n_cells - centres[:, None]) / width
    heights = masses[:, None] * np.exp(-(distance**2) / 2)
    # Stretches of points out of every kernel's reach get no slot.
    slots = np.cumsum(np.minimum(np.diff(first, prepend=first[0]), len(span)))[:, None] + span
    smoothed = np.bincount(slots.ravel(), heights.ravel())
    node = np.full(len(smoothed), -1)
    node[slots] = nodes
    inside = (node >= 0) & (node <= n_cells)
    smoothed, node = smoothed[inside], node[inside]
    ends = np.abs(smoothed[(node == 0) | (node == n_cells)]).sum() / 2
    total = np.abs(smoothed).sum() - ends + _kinks(smoothed)
    return float(total / (n_cells * width * math.sqrt(2 * math.pi)))


def _kinks(smoothed: np.ndarray) -> float:
    r"""Return what the trapezoidal rule misses where the sign changes, in units of the spacing.

    Of a smooth function that is even at both ends the rule is all but exact; a kink, of slopes
    :math:`\mp s` at a fraction u of a cell, costs :math:`s (u^2 - u + 1/6)`
    (Euler-Maclaurin formula).
    """
    negative = smoothed < 0
    crossed = negative[:-1] != negative[1:]
    before, after = np.abs(smoothed[:-1][crossed]), np.abs(smoothed[1:][crossed])
    slope = before + after
    return float((slope / 6 - before * after / slope).sum())


def _fixed_point(error: Callable[[float], float], start: float) -> float:
    """Return the width that equals the error at it, from any start; a good one saves time.

    As the error does not grow with the width, the fixed point lies between a width and its error.
    """
    error = cache(error)
    width = max(start, _NARROWEST)
    lower, upper = sorted((width, error(width)))
    if upper - lower <= _NARROWEST or upper <= _NARROWEST:
        return lower
    lower = max(lower, _NARROWEST)
    excess = [error(width) - width for width in (lower, upper)]
    if excess[0] <= 0 or excess[1] >= 0:
        return error(lower) if excess[0] <= 0 else upper
    root = scipy.optimize.brentq(lambda width: error(width) - width, lower, upper, xtol=_NARROWEST)
    return float(root)
