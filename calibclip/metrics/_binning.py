"""Where bins of confidence begin and end."""

from __future__ import annotations

import torch
from torch import Tensor


def equal_width_edges(
    n_bins: int, dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """Return the edges between bins of equal width, k/n for k in 1..n-1, correctly rounded.

    The ends 0 and 1 are not among them, so that ``torch.bucketize`` finds an index in 0..n-1
    whatever edge belongs to a bin.

    Args:
        n_bins: Number of bins n, at least 1.
        dtype: Of the confidences, which are to be compared in their own dtype.
        device: Where the edges are made.

    Returns:
        Shape ``(n_bins - 1,)``, ascending.

    Example:
        >>> equal_width_edges(4, torch.float32)
        tensor([0.2500, 0.5000, 0.7500])
    """
    steps = torch.arange(1, n_bins, dtype=torch.float64, device=device)
    # By a tensor: on CUDA a division by a number multiplies with its rounded reciprocal. Rounding
    # a float64 quotient of small integers to half as many digits is as if it was rounded once.
    return (steps / torch.full_like(steps, n_bins)).to(dtype)


def equal_mass_cuts(ranked: Tensor, n_bins: int) -> Tensor:
    """Return where to cut sorted values into bins of about equal numbers, none across a tie.

    The k-th cut comes after rank ``floor(k N / n)``; inside a run of equal values it moves to the
    run's end, and cuts that then coincide are one. The bins hence depend on the values alone, not
    on the order of the samples, and there may be fewer than asked for, at most one a distinct
    value.

    Args:
        ranked: Values in ascending order, shape ``(N,)``, no NaN.
        n_bins: Number of bins n asked for, at least 1.

    Returns:
        The index of the first value of each bin but the first, strictly ascending, int64: bin b of
        the ``len(cuts) + 1`` holds ``ranked[cuts[b - 1]:cuts[b]]``.

    Example:
        >>> equal_mass_cuts(torch.tensor([0.1, 0.2, 0.2, 0.2, 0.8, 0.9]), n_bins=3)
        tensor([4])
    """
    steps = torch.arange(1, n_bins, device=ranked.device)
    ranks = torch.div(steps * len(ranked), n_bins, rounding_mode="floor")
    ranks = ranks[ranks > 0]
    cuts = torch.searchsorted(ranked, ranked[ranks - 1], right=True).unique_consecutive()
    return cuts[cuts < len(ranked)]


def residuals_by_confidence(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct confidences, ascending, and the sum of ``confidence - correct`` at each.

    The sums come from counts, so that not even rounding depends on the order of the samples.

    Args:
        confidence: Shape ``(N,)``, floating.
        correct: 0 or 1, shape ``(N,)``.

    Returns:
        Two tensors of one entry a distinct value, float64.

    Example:
        >>> confidence, correct = torch.tensor([0.5, 1.0, 0.5]), torch.tensor([True, False, True])
        >>> residuals_by_confidence(confidence, correct)
        (tensor([0.5000, 1.0000], dtype=torch.float64), tensor([-1.,  1.], dtype=torch.float64))
    """
    values, which, counts = confidence.unique(return_inverse=True, return_counts=True)
    n_correct = torch.zeros_like(counts).index_add_(0, which, correct.to(counts.dtype))
    return values.double(), counts * values.double() - n_correct
