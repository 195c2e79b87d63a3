"""Binned calibration of the predicted class.

Four stages, each a function of the one before: predictions, then confidence and correctness per
sample (:func:`~calibclip.metrics._predictions.top_label`), then sums per bin (:func:`bin_sums`),
then the table (:func:`tabulate`), whose properties are the errors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_count
from calibclip.metrics._predictions import ArrayLike, read_predictions, top_label


def expected_calibration_error(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    n_bins: int = 15,
) -> float:
    r"""Expected calibration error (ECE) of the predicted class.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|

    over the bins of :func:`reliability_table`, with conf the mean confidence of a bin rather than
    its midpoint. An empty bin contributes 0.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        n_bins: Number of bins, at least 1.

    Returns:
        A float in [0, 1], summed in float64; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or ``n_bins`` is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0]])
        >>> ece = metrics.expected_calibration_error(probs, target=torch.tensor([0, 1, 1]))
        >>> round(ece, 4)  # (2 * |1/2 - 0.75| + 1 * |1 - 1|) / 3
        0.1667

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, eq. 3,
        https://arxiv.org/abs/1706.04599
    """
    return reliability_table(probs, logits, target, n_bins).ece


def maximum_calibration_error(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    n_bins: int = 15,
) -> float:
    r"""Maximum calibration error (MCE) of the predicted class.

    .. math:: \mathrm{MCE} = \max_{b:\, n_b > 0} |\mathrm{acc}_b - \mathrm{conf}_b|

    over the bins of :func:`reliability_table`. One sample in an otherwise empty bin can decide the
    value: read it next to the counts of the table.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        n_bins: Number of bins, at least 1.

    Returns:
        A float in [0, 1], summed in float64; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or ``n_bins`` is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0]])
        >>> metrics.maximum_calibration_error(probs, target=torch.tensor([0, 1, 1]))
        0.25

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, eq. 5,
        https://arxiv.org/abs/1706.04599
    """
    return reliability_table(probs, logits, target, n_bins).mce


def reliability_table(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    n_bins: int = 15,
) -> ReliabilityTable:
    """Accuracy against confidence of the predicted class, per bin of confidence.

    The confidence of a sample is its largest probability, and the sample is correct if that class
    is the true one (of equal scores the lowest index). With two classes, too, this is the predicted
    class and not the positive one, so that no confidence is below 1/K. Bins have equal width and
    are closed on the right: bin b of n holds confidences in ``(b/n, (b+1)/n]``, the first also 0.

    Confidences and bin edges are compared in one dtype, float64 for float64 input and else float32,
    with every edge rounded to it once. A confidence equal to ``float32(b/n)`` hence counts as b/n.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        n_bins: Number of bins, at least 1.

    Returns:
        The table; with ``N = 0`` all its counts are 0 and its errors NaN.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or ``n_bins`` is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0], [0.6, 0.4]])
        >>> target = torch.tensor([0, 1, 1, 0])
        >>> print(metrics.reliability_table(probs, target=target, n_bins=4))
         lower   upper  count  confidence  accuracy      gap  ci_lower  ci_upper
        0.0000  0.2500      0           -         -        -         -         -
        0.2500  0.5000      0           -         -        -         -         -
        0.5000  0.7500      3      0.7000    0.6667  +0.0333    0.2077    0.9385
        0.7500  1.0000      1      1.0000    1.0000  +0.0000    0.2065    1.0000
        N = 4, ECE = 0.0250, MCE = 0.0333

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, section 2
        (confidence and accuracy of a bin), https://arxiv.org/abs/1706.04599. Brown, Cai, DasGupta
        (2001), Interval Estimation for a Binomial Proportion, eq. 4 (the Wilson interval),
        https://doi.org/10.1214/ss/1009213286
    """
    check_count("n_bins", n_bins, at_least=1)
    confidence, correct = top_label(read_predictions(probs, logits, target))
    return tabulate(bin_sums(confidence, correct, n_bins))


@dataclass(frozen=True, eq=False, repr=False)
class ReliabilityTable:
    """Calibration per confidence bin, as :func:`reliability_table` makes it.

    Columns are read-only arrays of shape ``(n_bins,)``, int64 for ``count`` and else float64. An
    empty bin has count 0 and NaN in the columns after it.
    """

    lower: np.ndarray
    """Lower edge, not part of the bin (except 0 of the first)."""
    upper: np.ndarray
    """Upper edge, part of the bin."""
    count: np.ndarray
    """Number of samples."""
    confidence: np.ndarray
    """Mean confidence."""
    accuracy: np.ndarray
    """Share of correct samples."""
    gap: np.ndarray
    """``confidence - accuracy``: positive where the model is over-confident."""
    ci_lower: np.ndarray
    """Lower end of the 95 % Wilson interval of the accuracy."""
    ci_upper: np.ndarray
    """Upper end of the 95 % Wilson interval of the accuracy."""

    def __post_init__(self) -> None:
        for column in fields(self):
            values = np.array(getattr(self, column.name))  # a copy, so that nobody else writes it
            values.setflags(write=False)
            object.__setattr__(self, column.name, values)

    @property
    def n_bins(self) -> int:
        """Number of bins, empty ones included."""
        return len(self.count)

    @property
    def total(self) -> int:
        """Number of samples, N."""
        return int(self.count.sum())

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean of ``|gap|`` over samples."""
        return self._mean_over_samples(np.abs(self.gap))

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest ``|gap|`` of a non-empty bin."""
        return float(np.abs(self.gap[self.count > 0]).max()) if self.total else float("nan")

    @property
    def mean_confidence(self) -> float:
        """Mean confidence over samples. Minus ``mean_accuracy`` it is the mean signed gap."""
        return self._mean_over_samples(self.confidence)

    @property
    def mean_accuracy(self) -> float:
        """Accuracy over samples."""
        return self._mean_over_samples(self.accuracy)

    def _mean_over_samples(self, column: np.ndarray) -> float:
        filled = self.count > 0
        if not filled.any():
            return float("nan")
        return float(self.count[filled] @ column[filled] / self.total)

    def __repr__(self) -> str:
        return (
            f"ReliabilityTable(n_bins={self.n_bins}, total={self.total}, "
            f"ece={self.ece:.4f}, mce={self.mce:.4f})"
        )

    def __str__(self) -> str:
        lines = [self._names(), *self._cells()]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        aligned = (
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )
        return "\n".join([*aligned, self._summary()])

    def _repr_html_(self) -> str:
        """Table for notebooks."""
        head = "".join(f"<th>{name}</th>" for name in self._names())
        body = "".join(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>"
            for line in self._cells()
        )
        return (
            f'<table style="text-align: right"><caption>{self._summary()}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def _names(self) -> list[str]:
        return [column.name for column in fields(self)]

    def _cells(self) -> list[list[str]]:
        formats = {"count": "d", "gap": "+.4f"}
        columns = [
            [
                "-" if np.isnan(value) else format(value, formats.get(name, ".4f"))
                for value in getattr(self, name)
            ]
            for name in self._names()
        ]
        return [list(line) for line in zip(*columns, strict=True)]

    def _summary(self) -> str:
        return f"N = {self.total}, ECE = {self.ece:.4f}, MCE = {self.mce:.4f}"


class BinSums(NamedTuple):
    """Sums per bin, each of shape ``(n_bins,)``; those of several batches may be added."""

    n_samples: Tensor
    """Number of samples, int64."""
    sum_confidence: Tensor
    """Sum of confidences, float64."""
    n_correct: Tensor
    """Number of correct samples, int64."""


def bin_sums(confidence: Tensor, correct: Tensor, n_bins: int) -> BinSums:
    """Sum samples per equal-width, right-closed bin of their confidence.

    Args:
        confidence: Shape ``(N,)``, float32 or float64.
        correct: Shape ``(N,)``, bool, on the same device.
        n_bins: Number of bins.
    """
    # Interior edges only, so that 0 falls into the first bin and 1 into the last whatever the
    # closure. Dividing in float64 and rounding once matters: float32 linspace misplaces edges.
    edges = (torch.arange(1, n_bins, dtype=torch.float64) / n_bins).to(confidence)
    index = torch.bucketize(confidence, edges, right=False)
    zeros = torch.zeros(n_bins, dtype=torch.int64, device=confidence.device)
    return BinSums(
        n_samples=zeros.index_add(0, index, torch.ones_like(index)),
        sum_confidence=zeros.double().index_add(0, index, confidence.double()),
        n_correct=zeros.index_add(0, index, correct.long()),
    )


def tabulate(sums: BinSums) -> ReliabilityTable:
    """Turn sums per bin into means, gaps and intervals.

    Args:
        sums: From :func:`bin_sums`, of one batch or added up over several, on any device.

    Returns:
        The table, with NaN in the columns of an empty bin that would divide by its count.
    """
    count, confidence, correct = (column.cpu().numpy() for column in sums)
    samples = np.where(count > 0, count, np.nan)  # an empty bin becomes NaN without a 0 / 0
    mean_confidence, accuracy = confidence / samples, correct / samples
    ci_lower, ci_upper = _wilson_interval(accuracy, samples)
    edges = np.arange(len(count) + 1) / len(count)
    return ReliabilityTable(
        lower=edges[:-1],
        upper=edges[1:],
        count=count,
        confidence=mean_confidence,
        accuracy=accuracy,
        gap=mean_confidence - accuracy,
        ci_lower=ci_lower,
        ci_upper=ci_upper,
    )


def _wilson_interval(share: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a binomial share; unlike the normal one it has a width at 0 and 1, too."""
    z = NormalDist().inv_cdf(0.975)
    centre = share + z**2 / (2 * samples)
    half_width = z * np.sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2)
    lower, upper = (centre + sign * half_width for sign in (-1, 1))
    shrink = 1 + z**2 / samples
    # Rounding must leave neither [0, 1] nor the share itself outside.
    return np.clip(lower / shrink, 0, share), np.clip(upper / shrink, share, 1)
