"""Measures of a ranking, from the counts of both classes at each distinct score.

Counts are int64 arrays, ascending in the score, no entry without a sample. A measure takes the
samples of an entry as tied. Its range is that of all rankings with the samples of each entry in any
order, tied or not: what a sketch, which has merged scores, leaves open.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np

CONVENTIONS = ("mean", "trapezoid", "fd-shifts")

Range: TypeAlias = tuple[float, float]


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the share of pairs in which the positive one has the larger score, ties as a half."""
    n_pairs = float(positive.sum()) * float(negative.sum())
    if n_pairs == 0:
        return math.nan
    p, n = positive.astype(np.float64), negative.astype(np.float64)
    # Twice the number of pairs: a sum of integers, exact in float64 up to 2^53.
    return float(p @ (2 * np.cumsum(n) - n)) / (2 * n_pairs)


def auroc_range(positive: np.ndarray, negative: np.ndarray) -> Range:
    """Return the range of `auroc`: the pairs within an entry all lost, or all won."""
    n_pairs = float(positive.sum()) * float(negative.sum())
    if n_pairs == 0:
        return math.nan, math.nan
    value, half = auroc(positive, negative), float(positive @ negative) / (2 * n_pairs)
    return value - half, value + half


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the sum over thresholds of the precision times the step in recall."""
    if not positive.any():
        return math.nan
    p, n = positive[::-1].astype(np.float64), negative[::-1].astype(np.float64)
    return float(p @ (np.cumsum(p) / np.cumsum(p + n)) / p.sum())


def average_precision_range(positive: np.ndarray, negative: np.ndarray) -> Range:
    """Return the range of `average_precision`.

    A positive has at best the precision of all positives of its entry tied ahead of the negatives.
    The i-th has at worst that of the i-th place after all of the negatives.
    """
    if not positive.any():
        return math.nan, math.nan
    p, n = positive[::-1].astype(np.float64), negative[::-1].astype(np.float64)
    hits, total = np.cumsum(p), np.cumsum(p + n)
    # Where there is no positive the quotient, of 0 times it, may be 0 / 0.
    best = p @ np.divide(hits, total - n, out=np.zeros_like(p), where=p > 0)
    # Sum over i of (h + i) / (t + i), with the hits h and the total t ahead of the first of them.
    misses = np.cumsum(n)
    worst = (p - misses * harmonic_gap(total - p, p)).sum()
    return float(worst / p.sum()), float(best / p.sum())


def fpr_at_tpr(positive: np.ndarray, negative: np.ndarray, tpr: float) -> float:
    """Return the least false positive rate of the thresholds with at least a true positive rate."""
    return fpr_at_tpr_range(positive, negative, tpr)[1]


def fpr_at_tpr_range(positive: np.ndarray, negative: np.ndarray, tpr: float) -> Range:
    """Return the range of `fpr_at_tpr`: the negatives of the entry that decides out, or in."""
    if not positive.any() or not negative.any():
        return math.nan, math.nan
    hits, alarms = (np.cumsum(counts[::-1]) for counts in (positive, negative))
    if tpr <= 0:
        return 0.0, 0.0
    decisive = int(np.argmax(hits / hits[-1] >= tpr))
    least, most = alarms[decisive] - negative[::-1][decisive], alarms[decisive]
    return float(least / alarms[-1]), float(most / alarms[-1])


def harmonic_gap(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return the sum of 1 / k over ``start < k <= start + length``, to float64 precision.

    The difference of two harmonic numbers would lose digits where the sum is short.
    """
    table = np.concatenate([[0.0], np.cumsum(1 / np.arange(1.0, 65.0))])
    near = np.minimum(start + length, 64).astype(np.int64)
    head = table[near] - table[np.minimum(start, near).astype(np.int64)]
    # Beyond 64 the asymptotic series of H(b) - H(a) in x = 1/a and y = 1/b has converged.
    a = np.maximum(start, 64).astype(np.float64)
    b = np.maximum(start + length, a)
    x, y = 1 / a, 1 / b
    xx, yy = x * x, y * y
    series = xx * (1 / 12 - xx * (1 / 120 - xx / 252)) - yy * (1 / 12 - yy * (1 / 120 - yy / 252))
    return head + np.log1p((b - a) * x) - (b - a) * x * y / 2 + series


def aurc(
    errors: np.ndarray, correct: np.ndarray, convention: str, is_fine: np.ndarray | None = None
) -> float:
    """Return the area under the risk-coverage curve.

    Args:
        errors: Number of errors at each uncertainty.
        correct: Number of correct predictions.
        convention: One of `CONVENTIONS`.
        is_fine: Entries, of one class each, that stand for so many distinct uncertainties. Only
            "fd-shifts", which draws a chord over ties, makes a difference.

    Returns:
        The area; NaN without a sample.
    """
    if len(errors) == 0:
        return math.nan
    e, m = errors.astype(np.float64), (errors + correct).astype(np.float64)
    e_end, k_end = np.cumsum(e), np.cumsum(m)
    e_start, k_start = e_end - e, k_end - m
    n_samples, risk = k_end[-1], e_end / k_end
    # The expected risk after j of the m samples of an entry is (e_start + j e / m) / (k_start + j).
    gap = harmonic_gap(k_start, m)
    sums = e_start * gap + e / m * (m - k_start * gap)
    if convention == "mean":
        return float(sums.sum() / n_samples)
    if convention == "trapezoid":
        if n_samples == 1:
            return float(risk[0])
        return float((sums.sum() - (risk[0] + risk[-1]) / 2) / (n_samples - 1))
    before = np.concatenate([risk[:1], risk[:-1]])
    areas = m * (before + risk) / 2
    if is_fine is not None:
        areas = np.where(is_fine, sums + (before - risk) / 2, areas)
    return float(areas.sum() / n_samples)


def aurc_range(errors: np.ndarray, correct: np.ndarray, convention: str) -> Range:
    """Return the range of `aurc`.

    It is largest with the errors of each entry first. The chord of "fd-shifts" lies above the risk
    where that falls with more correct predictions, and below where it rises with more errors: hence
    the class that comes first at distinct uncertainties, the other one tied.
    """
    nothing = np.zeros_like(errors)
    errors, correct = np.stack([errors, nothing], 1), np.stack([nothing, correct], 1)
    areas = []
    for first in (slice(None, None, -1), slice(None)):
        e, c = errors[:, first].ravel(), correct[:, first].ravel()
        is_fine = np.arange(len(e)) % 2 == 0
        kept = e + c > 0
        areas.append(aurc(e[kept], c[kept], convention, is_fine[kept]))
    return areas[0], areas[1]


def optimal_aurc(n_errors: int, n_correct: int, convention: str) -> float:
    """Return the `aurc` of distinct uncertainties that are larger for every error."""
    errors, correct = np.array([0, n_errors]), np.array([n_correct, 0])
    kept = errors + correct > 0
    return aurc(errors[kept], correct[kept], convention, np.ones(int(kept.sum()), dtype=bool))


def augrc(errors: np.ndarray, correct: np.ndarray) -> float:
    """Return the area under the generalized-risk-coverage curve."""
    n_samples = float((errors + correct).sum())
    if n_samples == 0:
        return math.nan
    e, c = errors.astype(np.float64), correct.astype(np.float64)
    # Twice the pairs in which the error is accepted first, ties as a half.
    lost = e @ (2 * (c.sum() - np.cumsum(c)) + c)
    return float(lost + e.sum() ** 2) / (2 * n_samples**2)


def augrc_range(errors: np.ndarray, correct: np.ndarray) -> Range:
    """Return the range of `augrc`: the pairs within an entry all won, or all lost."""
    n_samples = float((errors + correct).sum())
    if n_samples == 0:
        return math.nan, math.nan
    value, half = augrc(errors, correct), float(errors @ correct) / (2 * n_samples**2)
    return value - half, value + half


def coverage_at_risk(errors: np.ndarray, correct: np.ndarray, risk: float) -> float:
    """Return the largest coverage of a threshold whose risk is no larger than asked."""
    if len(errors) == 0:
        return math.nan
    accepted = np.cumsum(errors + correct)
    allowed = accepted[np.cumsum(errors) / accepted <= risk]
    return float(allowed[-1] / accepted[-1]) if len(allowed) else 0.0


def coverage_at_risk_range(errors: np.ndarray, correct: np.ndarray, risk: float) -> Range:
    """Return bounds on `coverage_at_risk`.

    The end of every entry is a threshold. Within an entry there may be another that is allowed if
    the risk with only the correct predictions of the entry is.
    """
    if len(errors) == 0:
        return math.nan, math.nan
    accepted = np.cumsum(errors + correct)
    without = accepted - errors
    least = (np.cumsum(errors) - errors) / np.maximum(without, 1)
    end_allowed = np.cumsum(errors) / accepted <= risk
    reached = accepted[end_allowed | ((least <= risk) & (without > 0))]
    most = float(reached[-1] / accepted[-1]) if len(reached) else 0.0
    return coverage_at_risk(errors, correct, risk), most


def risk_bound(errors: np.ndarray, correct: np.ndarray) -> float:
    """Return how far a risk within an entry may be from the one expected at its coverage."""
    if len(errors) == 0:
        return math.nan
    total, smaller = errors + correct, np.minimum(errors, correct)
    # After j samples errors lie within [j - c, j]; they are furthest from j e / m at j = e or c.
    distance = errors / total * correct
    return float((distance / np.maximum(np.cumsum(total) - total + smaller, 1)).max())
