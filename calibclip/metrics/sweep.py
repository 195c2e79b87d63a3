"""Calibration error over as many bins of equal mass as keep the accuracies in order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibclip.metrics._binning import equal_mass_cuts
from calibclip.metrics._predictions import ArrayLike, Predictions
from calibclip.metrics._streaming import Column, PredictionMetric
from calibclip.metrics._table import check_norm, mass_table


def sweep_calibration_error(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    norm: float = 1,
    nan: str = "raise",
) -> float:
    r"""Equal-mass calibration error with the number of bins set by monotonicity (ECE-sweep).

    .. math::
        \mathrm{ECE}_{\mathrm{sweep}} = \Big( \sum_{b=1}^{n^*} \frac{n_b}{N}
        |\mathrm{conf}_b - \mathrm{acc}_b|^q \Big)^{1/q}, \qquad
        n^* = \max \{ n \le N : \mathrm{acc}_1 \le \dots \le \mathrm{acc}_{n'}
        \text{ for all } n' \le n \}

    A larger confidence should mean a larger accuracy. The number of bins grows from 1 until a bin
    is less accurate than the one before, which few samples a bin bring about by chance; the last
    number before that is used. The value is that of `expected_calibration_error` with
    ``binning="mass"`` and this number: equal confidences, in float32, stay in one bin, and the
    order of the samples does not matter.

    The search takes time in proportion to the square of the number of bins. That is around
    :math:`N^{1/3}` for confidences that are about right; only of classes that the confidence
    separates all but perfectly can it come near N.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        norm: The exponent q: 1, 2 (as in the authors' code unless asked otherwise) or ``math.inf``.
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
        >>> probs = torch.tensor([[0.5, 0.5], [0.625, 0.375], [0.75, 0.25], [0.875, 0.125]])
        >>> target = torch.tensor([1, 0, 1, 0])  # wrong, right, wrong, right: two bins, not three
        >>> sweep_calibration_error(probs, target=target)  # (|0.5625 - 0.5| + |0.8125 - 0.5|) / 2
        0.1875

    References:
        Roelofs, Cain, Shlens, Mozer (2022), Mitigating Bias in Calibration Error Estimation,
        https://arxiv.org/abs/2012.08668
    """
    metric = SweepCalibrationError(norm=norm, nan=nan)
    return metric.update(probs, logits, target).compute(sync=False)


class SweepCalibrationError(PredictionMetric[float]):
    """`sweep_calibration_error` of a stream, with a state of 5 bytes a sample.

    Args:
        norm: 1, 2 or ``math.inf``.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = SweepCalibrationError()
        >>> for row, label in (([0.75, 0.25], 0), ([0.5, 0.5], 1)):
        ...     _ = metric.update(torch.tensor([row]), target=torch.tensor([label]))
        >>> metric.compute()  # two bins: (|0.5 - 0| + |0.75 - 1|) / 2
        0.375
    """

    def __init__(self, *, norm: float = 1, nan: str = "raise") -> None:
        check_norm(norm)
        super().__init__(norm=norm, nan=nan)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        return {}, {"confidence": Column(torch.float32), "correct": Column(torch.uint8)}

    def _take(self, predictions: Predictions) -> None:
        self._append(confidence=predictions.confidence, correct=predictions.correct)

    def _value(self) -> float:
        confidence, correct = (self._columns[n].values.cpu() for n in ("confidence", "correct"))
        if len(confidence) == 0:
            return math.nan
        n_bins = monotone_bins(confidence, correct)
        return mass_table(confidence, correct, n_bins).error(self.options["norm"])


def monotone_bins(confidence: Tensor, correct: Tensor) -> int:
    """Return up to which number of bins of equal mass the accuracies never fall.

    Args:
        confidence: Shape ``(N,)``, N at least 1, floating.
        correct: 0 or 1, shape ``(N,)``.

    Returns:
        A number in 1..N.
    """
    n_samples = len(confidence)
    ranked, order = confidence.sort()
    n_correct = torch.cat([torch.zeros(1).long(), correct[order].long().cumsum(0)])
    # Bins are unions of neighbouring runs of equal values: if those are in order, all bins are.
    if _ascending(equal_mass_cuts(ranked, n_samples), n_correct):
        return n_samples
    n_bins = 2
    while _ascending(equal_mass_cuts(ranked, n_bins), n_correct):
        n_bins += 1
    return n_bins - 1


def _ascending(cuts: Tensor, n_correct: Tensor) -> bool:
    """Whether no bin is less accurate than the one before; fractions compared without rounding."""
    n_samples = len(n_correct) - 1
    borders = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), n_samples)])
    counts, successes = borders.diff(), n_correct[borders].diff()
    return bool((successes[1:] * counts[:-1] >= successes[:-1] * counts[1:]).all())
