"""Calibration of every class, not of the predicted one only."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_choice, check_count, check_number
from calibclip.metrics._binning import equal_width_edges
from calibclip.metrics._predictions import ArrayLike, Predictions
from calibclip.metrics._streaming import Column, PerClass, PredictionMetric
from calibclip.metrics._table import check_norm

# Entries of a block of rows that is summed at once: 2 MB in float64.
_BLOCK = 2**18
NORMALIZATIONS = ("samples", "kept")


def classwise_calibration_error(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    n_bins: int = 15,
    *,
    norm: float = 1,
    threshold: float | None = None,
    normalize: str = "samples",
    nan: str = "raise",
) -> float:
    r"""Classwise (static) calibration error, SCE: the ECE of each class, averaged over classes.

    .. math::
        \Big( \frac1K \sum_k \sum_b \frac{n_{bk}}{N}
        \Big| \overline{p}_{bk} - \overline{[y = k]}_{bk} \Big|^q \Big)^{1/q}

    where class k bins all N samples by their probability of k, in bins of equal width closed on the
    right. With many classes nearly all of these are near 0 and next to nothing is left to see: a
    ``threshold`` leaves the small ones out.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        n_bins: Number of bins, at least 1.
        norm: The exponent q: 1, 2, or ``math.inf`` for the largest gap of any class and bin.
        threshold: Leave out probabilities not above it (TACE), those of true classes too.
        normalize: With a threshold: divide the counts :math:`n_{bk}` by the number of
            ``"samples"`` N, or of the probabilities of class k that were ``"kept"``.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float in [0, 1], summed in float64; NaN if ``N = 0`` or nothing is kept.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75]])
        >>> target = torch.tensor([0, 1, 1])
        >>> round(metrics.classwise_calibration_error(probs, target=target, n_bins=2), 4)
        0.25

    References:
        Nixon et al. (2019), Measuring calibration in deep learning, equations 2 (SCE) and 4 (the
        threshold), https://arxiv.org/abs/1904.01685
    """
    metric = ClasswiseCalibrationError(
        n_bins, norm=norm, threshold=threshold, normalize=normalize, nan=nan
    )
    return metric.update(probs, logits, target).compute(sync=False)


class _ClassSums(NamedTuple):
    """Sums per class and bin, each of shape ``(K, n_bins)``; K is 0 before the first batch."""

    n_samples: Tensor
    sum_probs: Tensor
    n_true: Tensor


class ClasswiseCalibrationError(PerClass[float], PredictionMetric[float]):
    """`classwise_calibration_error` of a stream; three sums for each class and bin.

    Args:
        n_bins: Number of bins.
        n_classes: K, if known. Processes that may see no sample must be told, as their state has
            the same shape then.
        norm: 1, 2 or ``math.inf``.
        threshold: Leave out probabilities not above it.
        normalize: ``"samples"`` or ``"kept"``.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = ClasswiseCalibrationError(n_bins=2)
        >>> metric.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([0])).compute()
        0.25
    """

    _PER_CLASS = _ClassSums._fields

    def __init__(
        self,
        n_bins: int = 15,
        *,
        n_classes: int | None = None,
        norm: float = 1,
        threshold: float | None = None,
        normalize: str = "samples",
        nan: str = "raise",
    ) -> None:
        n_bins = check_count("n_bins", n_bins, at_least=1)
        check_norm(norm)
        if n_classes is not None:
            n_classes = check_count("n_classes", n_classes, at_least=2)
        if threshold is not None:
            threshold = check_number("threshold", threshold, at_least=0, at_most=1)
        check_choice("normalize", normalize, NORMALIZATIONS)
        super().__init__(
            n_bins=n_bins,
            n_classes=n_classes,
            norm=norm,
            threshold=threshold,
            normalize=normalize,
            nan=nan,
        )

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        zeros = torch.zeros(self.options["n_classes"] or 0, self.options["n_bins"])
        sums = _ClassSums(zeros.long(), zeros.double(), zeros.long())
        return {"n_rows": torch.zeros((), dtype=torch.int64), **sums._asdict()}, {}

    def prepare(self, predictions: Predictions) -> None:
        """Refuse predictions of another number of classes."""
        self._grow(predictions.n_classes, "probs, logits")

    def _take(self, predictions: Predictions) -> None:
        self._grow(predictions.n_classes, "probs, logits")
        probs, target = predictions.probs, predictions.target
        sums = _class_sums(probs, target, self.options["n_bins"], self.options["threshold"])
        rows = torch.full((), len(probs), dtype=torch.int64, device=probs.device)
        self._add(n_rows=rows, **sums._asdict())

    def _value(self) -> float:
        n, sum_probs, n_true = (self._sums[name].double().cpu() for name in _ClassSums._fields)
        rows = int(self._sums["n_rows"])
        filled = n > 0
        if rows == 0 or not bool(filled.any()):
            return math.nan
        gap = torch.where(filled, (sum_probs - n_true) / n.clamp(min=1), 0.0).abs()
        norm = self.options["norm"]
        if norm == math.inf:
            return float(gap.max())
        kept = n.sum(1, keepdim=True).clamp(min=1)
        weight = n / (kept if self.options["normalize"] == "kept" else rows)
        return float((weight * gap**norm).sum(1).mean()) ** (1 / norm)


def _class_sums(probs: Tensor, target: Tensor, n_bins: int, threshold: float | None) -> _ClassSums:
    """Sum a batch per class and bin."""
    n_classes, device = probs.shape[1], probs.device
    edges = equal_width_edges(n_bins, probs.dtype, device)
    n_samples = torch.zeros(n_classes * n_bins, dtype=torch.int64, device=device)
    sum_probs = n_samples.double()
    true_probs = probs.gather(1, target[:, None]).squeeze(1)
    true_cell = target * n_bins + torch.bucketize(true_probs, edges)
    is_true = torch.ones_like(target)
    if threshold is not None:
        is_true = is_true * (true_probs > threshold)
    n_true = n_samples.index_add(0, true_cell, is_true)
    if device.type == "cpu":
        # No row has more than n_bins probabilities above the first bin: only those are binned one
        # by one, the first bin is what is left of the whole column.
        lowest = 1 / n_bins if threshold is None else threshold
        bound = torch.tensor(lowest, dtype=torch.float64).to(probs.dtype).numpy()
        # NumPy compares several times as fast as torch does on the CPU.
        above = _where(torch.from_numpy(np.greater(probs.numpy(), bound)))
        chosen = probs.flatten()[above]
        cell = (above % n_classes) * n_bins + torch.bucketize(chosen, edges)
        n_samples.index_add_(0, cell, torch.ones_like(cell))
        sum_probs.index_add_(0, cell, chosen.double())
        n_samples, sum_probs = n_samples.view(-1, n_bins), sum_probs.view(-1, n_bins)
        if threshold is None:
            n_samples[:, 0] += len(probs) - n_samples.sum(1)
            sum_probs[:, 0] += _column_sums(probs) - sum_probs.sum(1)
    else:
        classes = torch.arange(n_classes, device=device) * n_bins
        cell = (torch.bucketize(probs, edges) + classes).flatten()
        counted = torch.ones_like(cell) if threshold is None else (probs > threshold).flatten()
        n_samples.index_add_(0, cell, counted.long())
        sum_probs.index_add_(0, cell, probs.flatten().double() * counted)
        n_samples, sum_probs = n_samples.view(-1, n_bins), sum_probs.view(-1, n_bins)
    return _ClassSums(n_samples, sum_probs, n_true.view(-1, n_bins))


def _column_sums(probs: Tensor) -> Tensor:
    rows = max(_BLOCK // probs.shape[1], 1)
    total = torch.zeros(probs.shape[1], dtype=torch.float64)
    # One tensor for all blocks: to ask the system for memory takes longer than to add.
    wide = torch.empty(min(rows, len(probs)), probs.shape[1], dtype=torch.float64)
    for block in probs.split(rows):
        total += wide[: len(block)].copy_(block).sum(0)
    return total


def _where(flags: Tensor) -> Tensor:
    """Return the flat indices of the few flags that are set, on the CPU."""
    flags = flags.flatten()
    if len(flags) % 8:
        return flags.nonzero().squeeze(1)
    # Eight flags at a time: to look for them one by one is what takes longest.
    words = flags.view(torch.int64).nonzero()
    candidates = (8 * words + torch.arange(8)).flatten()
    return candidates[flags[candidates]]
