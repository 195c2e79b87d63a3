"""Confidence and calibration under attack: how sure the errors are, how far the ECE moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import (
    check_choice,
    check_count,
    check_number,
    check_same_shape,
    describe,
    wrong,
)
from calibclip._tables import number
from calibclip.metrics._predictions import (
    ArrayLike,
    raise_nonfinite,
    read_confidence,
    read_flags,
)
from calibclip.metrics._streaming import Column, Metric
from calibclip.metrics._table import CLOSED, ReliabilityTable, bin_sums, tabulate
from calibclip.metrics.bootstrap import (
    Interval,
    binned_residuals,
    check_options,
    interval,
    keep_finite,
    resampled_sums,
    sums_without_one,
)
from calibclip.metrics.shift import Shown, over


@dataclass(frozen=True)
class OverconfidenceTerms:
    """How sure wrong predictions are, as `overconfidence_on_errors` finds it."""

    count: int
    """Number of predictions."""
    n_errors: int
    """Number of wrong ones."""
    mean_confidence: float
    """Mean confidence of the wrong predictions; NaN if there are none."""
    rate: Mapping[float, float]
    """By threshold: the share of all predictions that are wrong and more confident than it."""
    rate_among_errors: Mapping[float, float]
    """By threshold: the share of the wrong predictions that are more confident than it."""


def overconfidence_on_errors(
    confidence: ArrayLike,
    correct: ArrayLike,
    thresholds: Sequence[float] = (0.5, 0.9),
    *,
    nan: str = "raise",
) -> OverconfidenceTerms:
    r"""How confident the wrong predictions are.

    .. math::
        \frac{\sum_i [a_i = 0]\, c_i}{\sum_i [a_i = 0]}, \qquad
        \frac1N \sum_i [a_i = 0][c_i > t], \qquad
        \frac{\sum_i [a_i = 0][c_i > t]}{\sum_i [a_i = 0]}

    with confidence :math:`c_i` and correctness :math:`a_i`: their mean confidence, and for each
    threshold t the high-confidence error rate among all and among the wrong predictions.

    Args:
        confidence: Of the predicted class, shape ``(N,)``, floating point, in [0, 1].
        correct: Whether that is the true class, shape ``(N,)``, bool or 0 and 1.
        thresholds: In [0, 1]. They are compared in the dtype of the confidences, float64 or else
            float32: a confidence of ``float32(0.9)`` is not above 0.9.
        nan: What confidences that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how
            many) or ``"propagate"`` (the result is NaN).

    Returns:
        Counts, mean and rates; what divides by a count of 0 is NaN.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape, a value or an option is wrong.

    Example:
        >>> import torch
        >>> confidence = torch.tensor([0.75, 0.95, 0.25, 0.5])
        >>> terms = overconfidence_on_errors(confidence, torch.tensor([0, 1, 0, 1]))
        >>> terms.mean_confidence, terms.rate, terms.rate_among_errors
        (0.5, {0.5: 0.25, 0.9: 0.0}, {0.5: 0.5, 0.9: 0.0})
    """
    metric = OverconfidenceOnErrors(thresholds, nan=nan)
    return metric.update(confidence, correct).compute(sync=False)


class OverconfidenceOnErrors(Metric[OverconfidenceTerms]):
    """`overconfidence_on_errors` of a stream.

    Args:
        thresholds: In [0, 1].
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = OverconfidenceOnErrors([0.5])
        >>> for correct in (True, False):
        ...     _ = metric.update(torch.tensor([0.75]), torch.tensor([correct]))
        >>> metric.compute().rate
        {0.5: 0.5}
    """

    _SCORES = "confidence"
    _IMPROPER = ("confidence", "confidences in [0, 1]", "")

    def __init__(self, thresholds: Sequence[float] = (0.5, 0.9), *, nan: str = "raise") -> None:
        if isinstance(thresholds, str) or not isinstance(thresholds, Sequence):
            expected = "a sequence of numbers in [0, 1]"
            raise TypeError(wrong("thresholds", expected, describe(thresholds)))
        checked = (check_number("thresholds", t, at_least=0, at_most=1) for t in thresholds)
        super().__init__(thresholds=tuple(checked), nan=nan)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        zero = torch.zeros((), dtype=torch.int64)
        n_high = torch.zeros(len(self.options["thresholds"]), dtype=torch.int64)
        sums = {"n_samples": zero, "n_errors": zero, "confidence": zero.double(), "n_high": n_high}
        return sums, {}

    @torch.no_grad()
    def update(self, confidence: ArrayLike, correct: ArrayLike) -> OverconfidenceOnErrors:
        """Take in a batch.

        Args:
            confidence: Of the predicted class, shape ``(N,)``, floating point, in [0, 1].
            correct: Whether that is the true class, shape ``(N,)``, bool or 0 and 1.

        Returns:
            The metric itself.

        Raises:
            TypeError: A type is wrong.
            ValueError: A shape or a value is wrong.
        """
        scores, outside = read_confidence("confidence", confidence, look=False)
        flags = read_flags("correct", correct, scores)
        good = scores.isfinite()
        raise_nonfinite(self._SCORES, ~good, self.options["nan"])
        wrong_ones = good & ~flags
        # Float64 rounds once to the dtype of the confidences, as they did.
        thresholds = torch.tensor(self.options["thresholds"], dtype=torch.float64)
        above = scores > thresholds.to(scores.device, scores.dtype)[:, None]
        self._add(
            n_nonfinite=(~good).sum(),
            n_improper=outside.sum(),
            n_samples=good.sum(),
            n_errors=wrong_ones.sum(),
            confidence=scores.double().masked_fill(~wrong_ones, 0.0).sum(),
            n_high=(above & wrong_ones).sum(1),
        )
        return self

    def _value(self) -> OverconfidenceTerms:
        count, n_errors = int(self._sums["n_samples"]), int(self._sums["n_errors"])
        n_high = dict(zip(self.options["thresholds"], self._sums["n_high"].tolist(), strict=True))
        return OverconfidenceTerms(
            count=count,
            n_errors=n_errors,
            mean_confidence=over(float(self._sums["confidence"]), n_errors),
            rate={threshold: over(high, count) for threshold, high in n_high.items()},
            rate_among_errors={
                threshold: over(high, n_errors) for threshold, high in n_high.items()
            },
        )


@dataclass(frozen=True)
class CalibrationShiftSummary(Shown):
    """Calibration before and under an attack, as `calibration_shift` finds it."""

    count: int
    """Number of pairs."""
    ece_clean: Interval
    """Expected calibration error of the clean images."""
    ece_adv: Interval
    """The same of the adversarial images."""
    ece_difference: Interval
    """Adversarial minus clean."""
    gap_clean: Interval
    """Mean confidence minus accuracy: positive where the model is over-confident."""
    gap_adv: Interval
    """The same of the adversarial images."""
    gap_difference: Interval
    """Adversarial minus clean."""

    def _lines(self) -> list[list[str]]:
        level = f"{100 * self.ece_clean.level:g} %"
        lines = [["", "clean", "adv", "adv - clean", f"{level} interval of the difference"]]
        for name, label in (("ece", "ECE"), ("gap", "confidence - accuracy")):
            clean, adv, change = (
                getattr(self, f"{name}_{which}") for which in ("clean", "adv", "difference")
            )
            ends = f"[{number(change.lower, '+.4f')}, {number(change.upper, '+.4f')}]"
            style = "+.4f" if name == "gap" else ".4f"
            values = [number(clean.estimate, style), number(adv.estimate, style)]
            lines.append([label, *values, number(change.estimate, "+.4f"), ends])
        return lines


def calibration_shift(
    confidence_clean: ArrayLike,
    confidence_adv: ArrayLike,
    correct_clean: ArrayLike,
    correct_adv: ArrayLike,
    n_bins: int = 15,
    *,
    closed: str = "right",
    n_resamples: int = 1000,
    level: float = 0.95,
    method: str = "percentile",
    seed: int = 0,
    nan: str = "raise",
) -> CalibrationShiftSummary:
    """Calibration error and signed gap before and under an attack, and how they differ.

    Each image takes its clean and its adversarial prediction along into a resample, so that the
    intervals of the differences are paired; see `bootstrap_interval`.

    Args:
        confidence_clean: Of the predicted class of the clean images, shape ``(N,)``, floating
            point, in [0, 1].
        confidence_adv: The same of their adversarial versions, shape ``(N,)``.
        correct_clean: Whether the clean prediction is correct, shape ``(N,)``, bool or 0 and 1.
        correct_adv: The same of the adversarial image, shape ``(N,)``.
        n_bins: Number of bins of equal width, at least 1.
        closed: Which edge belongs to a bin, ``"right"`` or ``"left"``.
        n_resamples: Number of resamples, at least 1.
        level: Nominal coverage, between 0 and 1.
        method: ``"percentile"``, ``"basic"`` or ``"bca"``.
        seed: Of the resamples, at least 0.
        nan: What pairs with a confidence that is not finite do: ``"raise"``, ``"omit"`` (a warning
            tells how many) or ``"propagate"`` (the result is NaN).

    Returns:
        Six intervals; NaN if ``N = 0``. It prints as a table.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape, a value or an option is wrong.

    Example:
        >>> import torch
        >>> confidence = torch.full((100,), 0.75)
        >>> right = torch.arange(100) % 4 != 0
        >>> attacked = torch.arange(100) % 4 == 1
        >>> print(calibration_shift(confidence, confidence, right, attacked))
                                 clean      adv  adv - clean  95 % interval of the difference
        ECE                     0.0000   0.5000      +0.5000               [+0.3600, +0.5600]
        confidence - accuracy  +0.0000  +0.5000      +0.5000               [+0.4098, +0.5900]
    """
    options = check_options(n_resamples, level, method, seed)
    n_bins = check_count("n_bins", n_bins, at_least=1)
    check_choice("closed", closed, CLOSED)
    clean, _ = read_confidence("confidence_clean", confidence_clean)
    adv, _ = read_confidence("confidence_adv", confidence_adv)
    check_same_shape("confidence_adv", adv, "confidence_clean", clean)
    sides = [
        (clean, read_flags("correct_clean", correct_clean, clean)),
        (adv, read_flags("correct_adv", correct_adv, adv)),
    ]
    names = "confidence_clean, confidence_adv"
    kept = keep_finite(names, (clean, adv), nan, "calibration_shift")
    if kept is not None:
        sides = [(scores[kept], flags[kept]) for scores, flags in sides]
    count = len(sides[0][0])
    if count == 0:
        nothing = Interval(math.nan, math.nan, math.nan, options.level)
        return CalibrationShiftSummary(0, *[nothing] * 6)
    tables = [tabulate(bin_sums(*side, n_bins, closed)) for side in sides]
    rows = [binned_residuals(*side, n_bins, closed) for side in sides]
    replicates = _errors_and_gaps([resampled_sums(side, options) for side in rows], count)

    @cache
    def left_out() -> list[np.ndarray]:
        if count == 1:
            return [np.empty(0)] * len(replicates)
        return _errors_and_gaps([sums_without_one(side) for side in rows], count - 1)

    estimates = _with_difference(*(table.ece for table in tables))
    estimates += _with_difference(*map(_gap, tables))
    intervals = [
        interval(estimate, replicates[which], options, lambda which=which: left_out()[which])
        for which, estimate in enumerate(estimates)
    ]
    return CalibrationShiftSummary(count, *intervals)


def _errors_and_gaps(sums: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Return errors and signed gaps, each clean, adversarial and their difference.

    Args:
        sums: Residuals per bin, clean and adversarial, shape ``(B, n_bins)`` each.
        count: Number of samples they are of.
    """
    errors = [np.abs(side).sum(axis=1) / count for side in sums]
    gaps = [side.sum(axis=1) / count for side in sums]
    return [*_with_difference(*errors), *_with_difference(*gaps)]


def _with_difference(clean: Any, adv: Any) -> list[Any]:
    return [clean, adv, adv - clean]


def _gap(table: ReliabilityTable) -> float:
    return table.mean_confidence - table.mean_accuracy
