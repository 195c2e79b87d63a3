"""Sums per confidence bin, and the table and the errors that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import scipy  # loads its parts when they are used
import torch
from torch import Tensor

from calibclip._checks import check_flag, describe, wrong
from calibclip.metrics._binning import equal_mass_cuts, equal_width_edges

NORMS = (1, 2, math.inf)
CLOSED = ("right", "left")
INTERVALS = ("wilson", "clopper-pearson")


@dataclass(frozen=True, eq=False, repr=False)
class ReliabilityTable:
    """Calibration per confidence bin, as `reliability_table` makes it.

    Columns are read-only arrays of shape ``(n_bins,)``, int64 for ``count`` and else float64. An
    empty bin has count 0 and NaN in the columns after it.
    """

    lower: np.ndarray
    """Lower edge; of bins closed on the right not part of the bin (except 0 of the first)."""
    upper: np.ndarray
    """Upper edge; of bins closed on the right part of the bin."""
    count: np.ndarray
    """Number of samples."""
    confidence: np.ndarray
    """Mean confidence."""
    accuracy: np.ndarray
    """Share of correct samples."""
    gap: np.ndarray
    """``confidence - accuracy``: positive where the model is over-confident."""
    ci_lower: np.ndarray
    """Lower end of the 95 % interval of the accuracy, Wilson's unless asked otherwise."""
    ci_upper: np.ndarray
    """Upper end of the 95 % interval of the accuracy."""

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
    def over_confidence(self) -> float:
        """Mean over samples of the gap where it is positive."""
        return self._mean_over_samples(np.maximum(self.gap, 0.0))

    @property
    def under_confidence(self) -> float:
        """Mean over samples of minus the gap where it is negative; with the above adds to ECE."""
        return self._mean_over_samples(np.maximum(-self.gap, 0.0))

    def error(
        self, norm: float = 1, *, debias: bool = False, squared: bool = False, min_count: int = 1
    ) -> float:
        """Return a norm of the gaps, weighted by the share of samples; see the ECE for formulas.

        Args:
            norm: 1 (ECE), 2 (RMS) or infinity (MCE).
            debias: Take off what chance alone adds; of norms 1 and 2.
            squared: Of norm 2: the square, which debiased is without bias and may be negative.
            min_count: Bins with fewer samples do not count; for the largest gap.

        Returns:
            The error; NaN if no bin counts.

        Raises:
            ValueError: An option is out of range, or does not go with the norm.
        """
        check_norm(norm, debias, squared)
        if min_count != 1 and norm != math.inf:
            raise ValueError(wrong("min_count", f"1 with norm={norm}", min_count))
        counted = self.count >= max(min_count, 1)
        if not counted.any():
            return math.nan
        count, gap, accuracy = (x[counted] for x in (self.count, self.gap, self.accuracy))
        if norm == math.inf:
            return float(np.abs(gap).max())
        weight, variance = count / count.sum(), accuracy * (1 - accuracy)
        if norm == 1:
            error = weight @ (_debiased_gap(gap, variance / count) if debias else np.abs(gap))
            return float(error)
        squares = gap**2
        if debias:
            # A bin of one sample says nothing of its variance.
            squares = np.where(count > 1, squares - variance / np.maximum(count - 1, 1), 0.0)
        error = float(weight @ squares)
        return error if squared else math.sqrt(max(error, 0.0))

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


def bin_sums(confidence: Tensor, correct: Tensor, n_bins: int, closed: str = "right") -> BinSums:
    """Sum samples per equal-width bin of their confidence.

    Args:
        confidence: Shape ``(N,)``, float32 or float64.
        correct: Shape ``(N,)``, bool, on the same device.
        n_bins: Number of bins.
        closed: Which edge belongs to a bin, ``"right"`` or ``"left"``.

    Returns:
        The sums.
    """
    # Interior edges only, so that 0 falls into the first bin and 1 into the last whatever the
    # closure.
    edges = equal_width_edges(n_bins, confidence.dtype, confidence.device)
    index = torch.bucketize(confidence, edges, right=closed == "left")
    zeros = torch.zeros(n_bins, dtype=torch.int64, device=confidence.device)
    return BinSums(
        n_samples=zeros.index_add(0, index, torch.ones_like(index)),
        sum_confidence=zeros.double().index_add(0, index, confidence.double()),
        n_correct=zeros.index_add(0, index, correct.long()),
    )


def mass_table(
    confidence: Tensor, correct: Tensor, n_bins: int, interval: str = "wilson"
) -> ReliabilityTable:
    """Tabulate bins of about equal numbers of samples; equal confidences stay together.

    Args:
        confidence: Shape ``(N,)``, float32 or float64.
        correct: Shape ``(N,)``, bool, on the same device.
        n_bins: Number of bins asked for; ties may leave fewer.
        interval: See `tabulate`.

    Returns:
        The table. A bin reaches from the largest confidence of the one before to its own largest.
    """
    if len(confidence) == 0:
        return tabulate(bin_sums(confidence, correct, 1), interval=interval)
    ranked, order = confidence.double().cpu().sort()
    cuts = equal_mass_cuts(ranked, n_bins)
    ends = torch.cat([cuts, cuts.new_tensor([len(ranked)])])
    index = torch.bucketize(torch.arange(len(ranked)), cuts, right=True)
    zeros = torch.zeros(len(ends), dtype=torch.int64)
    sums = BinSums(
        n_samples=zeros.index_add(0, index, torch.ones_like(index)),
        sum_confidence=zeros.double().index_add(0, index, ranked),
        n_correct=zeros.index_add(0, index, correct.cpu()[order].long()),
    )
    upper = ranked[ends - 1].numpy().copy()
    upper[-1] = max(upper[-1], 1.0)
    return tabulate(sums, np.concatenate([[0.0], upper]), interval)


def tabulate(
    sums: BinSums, edges: np.ndarray | None = None, interval: str = "wilson"
) -> ReliabilityTable:
    """Turn sums per bin into means, gaps and intervals.

    Args:
        sums: From `bin_sums`, of one batch or added up over several, on any device.
        edges: Of the bins, one more than there are bins; None: of equal width.
        interval: ``"wilson"``, or ``"clopper-pearson"``, which covers at least 95 %.

    Returns:
        The table, with NaN in the columns of an empty bin that would divide by its count.
    """
    count, confidence, correct = (column.cpu().numpy() for column in sums)
    samples = np.where(count > 0, count, np.nan)  # an empty bin becomes NaN without a 0 / 0
    mean_confidence, accuracy = confidence / samples, correct / samples
    if interval == "wilson":
        ci_lower, ci_upper = _wilson_interval(accuracy, samples)
    else:
        ci_lower, ci_upper = _clopper_pearson_interval(correct, samples)
    if edges is None:
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


def check_norm(norm: object, debias: bool = False, squared: bool = False) -> None:
    """Check the norm of an error, and whether the options go with it."""
    if isinstance(norm, bool) or not isinstance(norm, Real) or norm not in NORMS:
        raise ValueError(wrong("norm", "1, 2 or math.inf", describe(norm)))
    check_flag("debias", debias)
    check_flag("squared", squared)
    if debias and norm == math.inf:
        raise ValueError(wrong("debias", "False with norm=inf", debias))
    if squared and norm != 2:
        raise ValueError(wrong("squared", f"False with norm={norm}", squared))


def _wilson_interval(share: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a binomial share; unlike the normal one it has a width at 0 and 1, too."""
    z = NormalDist().inv_cdf(0.975)
    centre = share + z**2 / (2 * samples)
    half_width = z * np.sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2)
    lower, upper = (centre + sign * half_width for sign in (-1, 1))
    shrink = 1 + z**2 / samples
    # Rounding must leave neither [0, 1] nor the share itself outside.
    return np.clip(lower / shrink, 0, share), np.clip(upper / shrink, share, 1)


def _clopper_pearson_interval(
    successes: np.ndarray, samples: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a binomial share by inverting the exact test."""
    failures = samples - successes
    # At no success and at no failure an end is 0 or 1; the beta function has no such parameter.
    lower = scipy.special.betaincinv(np.maximum(successes, 1), failures + 1, 0.025)
    upper = scipy.special.betaincinv(successes + 1, np.where(failures == 0, 1, failures), 0.975)
    empty = np.isnan(samples)
    lower = np.where(empty, np.nan, np.where(successes == 0, 0.0, lower))
    return lower, np.where(empty, np.nan, np.where(failures == 0, 1.0, upper))


def _debiased_gap(gap: np.ndarray, variance: np.ndarray) -> np.ndarray:
    r"""Return ``2|d| - E|d + s z|`` for standard normal z, ``s^2`` the variance of the accuracy.

    :math:`E|d + s z| = s \sqrt{2/\pi} e^{-d^2/2s^2} + d \operatorname{erf}(d / s\sqrt 2)`; with
    s = 0 it is ``|d|``.
    """
    spread = np.sqrt(variance)
    ratio = np.abs(gap) / np.where(spread > 0, spread, 1.0)
    inflated = spread * math.sqrt(2 / math.pi) * np.exp(-(ratio**2) / 2)
    inflated = inflated + np.abs(gap) * scipy.special.erf(ratio / math.sqrt(2))
    return 2 * np.abs(gap) - np.where(spread > 0, inflated, np.abs(gap))
