"""Binned calibration of the predicted class: is it right as often as its probability says?

The errors are norms of the gaps in a table, see ``_table.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from calibclip._checks import check_count
from calibclip.metrics._predictions import ArrayLike
from calibclip.metrics._table import check_norm
from calibclip.metrics.reliability import Binned


def expected_calibration_error(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    n_bins: int = 15,
    norm: float = 1,
    binning: str = "width",
    debias: bool = False,
    *,
    closed: str = "right",
    squared: bool = False,
    nan: str = "raise",
) -> float:
    r"""Expected calibration error (ECE) of the predicted class.

    .. math::
        \mathrm{ECE}_q
        = \Big( \sum_b \frac{n_b}{N} |\mathrm{conf}_b - \mathrm{acc}_b|^q \Big)^{1/q}

    over the bins of `reliability_table`, with conf the mean confidence of a bin rather than its
    midpoint. An empty bin contributes 0.

    **Debiased.** With few samples a bin the accuracies scatter, and the error of a calibrated model
    is not 0. For ``norm=2`` a bin contributes
    :math:`\mathrm{gap}^2 - \mathrm{acc}_b (1 - \mathrm{acc}_b)/(n_b - 1)`, 0 if it has one
    sample, and the root is of the sum where that is positive; ``squared=True`` returns the sum
    itself, which alone is without bias. For ``norm=1`` it is :math:`2|d| - E|d + s Z|` with d the
    gap, Z normal and :math:`s^2 = \mathrm{acc}_b (1 - \mathrm{acc}_b)/n_b`, in closed form; it may
    be negative.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        n_bins: Number of bins, at least 1.
        norm: The exponent q: 1, 2 (RMS calibration error) or ``math.inf`` (the largest gap).
        binning: ``"width"``: bins of equal width. ``"mass"``: of about equal numbers of samples;
            equal confidences, in float32, stay in one bin, so that there may be fewer.
        debias: Take off what chance alone adds.
        closed: Which edge belongs to a bin of equal width, ``"right"`` or ``"left"``.
        squared: Return the sum for ``norm=2`` without its root.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float in [0, 1] unless debiased, summed in float64; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0]])
        >>> ece = metrics.expected_calibration_error(probs, target=torch.tensor([0, 1, 1]))
        >>> round(ece, 4)  # (2 * |1/2 - 0.75| + 1 * |1 - 1|) / 3
        0.1667

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, eq. 3,
        https://arxiv.org/abs/1706.04599. Debiased: Kumar, Liang, Ma (2019), Verified Uncertainty
        Calibration, section 4 (L2), https://arxiv.org/abs/1909.10155
    """
    metric = ExpectedCalibrationError(
        n_bins, norm, binning, debias, closed=closed, squared=squared, nan=nan
    )
    return metric.update(probs, logits, target).compute(sync=False)


def maximum_calibration_error(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    n_bins: int = 15,
    *,
    binning: str = "width",
    closed: str = "right",
    min_count: int = 1,
    nan: str = "raise",
) -> float:
    r"""Maximum calibration error (MCE) of the predicted class.

    .. math:: \mathrm{MCE} = \max_{b:\, n_b \ge m} |\mathrm{acc}_b - \mathrm{conf}_b|

    over the bins of `reliability_table`. One sample in an otherwise empty bin can decide the
    value: read it next to the counts of the table, or ask for a ``min_count``.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        n_bins: Number of bins, at least 1.
        binning: ``"width"`` or ``"mass"``, see `expected_calibration_error`.
        closed: Which edge belongs to a bin of equal width, ``"right"`` or ``"left"``.
        min_count: m, the number of samples from which a bin counts.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float in [0, 1], summed in float64; NaN if no bin counts.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

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
    metric = MaximumCalibrationError(
        n_bins, binning=binning, closed=closed, min_count=min_count, nan=nan
    )
    return metric.update(probs, logits, target).compute(sync=False)


class SignedErrorTerms(NamedTuple):
    """The two sides of the calibration error, as `signed_calibration_error` returns them."""

    over_confidence: float
    """Mean over samples of ``conf - acc`` of their bin where it is positive."""
    under_confidence: float
    """Mean over samples of ``acc - conf`` of their bin where it is positive."""
    mean_gap: float
    """Mean confidence minus accuracy: the difference of the two, whatever the bins."""


def signed_calibration_error(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    n_bins: int = 15,
    *,
    binning: str = "width",
    closed: str = "right",
    nan: str = "raise",
) -> SignedErrorTerms:
    r"""Over- and under-confidence, the two parts of the ECE.

    .. math::
        \mathrm{OE} = \sum_b \frac{n_b}{N} (\mathrm{conf}_b - \mathrm{acc}_b)_+, \qquad
        \mathrm{UE} = \sum_b \frac{n_b}{N} (\mathrm{acc}_b - \mathrm{conf}_b)_+

    so that OE + UE is the ECE, and OE - UE the mean confidence minus the accuracy.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        n_bins: Number of bins, at least 1.
        binning: ``"width"`` or ``"mass"``, see `expected_calibration_error`.
        closed: Which edge belongs to a bin of equal width, ``"right"`` or ``"left"``.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        Both, and their difference, floats; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0]])
        >>> terms = metrics.signed_calibration_error(probs, target=torch.tensor([0, 1, 1]))
        >>> round(terms.over_confidence, 4), terms.under_confidence
        (0.1667, 0.0)
    """
    metric = SignedCalibrationError(n_bins, binning=binning, closed=closed, nan=nan)
    return metric.update(probs, logits, target).compute(sync=False)


class ExpectedCalibrationError(Binned[float]):
    """`expected_calibration_error` of a stream.

    Args:
        n_bins: Number of bins.
        norm: 1, 2 or ``math.inf``.
        binning: ``"width"``, with a state of three sums a bin, or ``"mass"``, with 5 bytes a
            sample.
        debias: Take off what chance alone adds.
        closed: ``"right"`` or ``"left"``.
        squared: Return the sum for ``norm=2`` without its root.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = ExpectedCalibrationError()
        >>> for probs in torch.tensor([[[0.75, 0.25]], [[0.75, 0.25]], [[0.0, 1.0]]]):
        ...     _ = metric.update(probs, target=torch.tensor([1]))
        >>> round(metric.compute(), 4)  # (2 * |0 - 0.75| + 1 * |1 - 1|) / 3
        0.5
    """

    def __init__(
        self,
        n_bins: int = 15,
        norm: float = 1,
        binning: str = "width",
        debias: bool = False,
        *,
        closed: str = "right",
        squared: bool = False,
        nan: str = "raise",
    ) -> None:
        check_norm(norm, debias, squared)
        super().__init__(
            n_bins=n_bins,
            norm=norm,
            binning=binning,
            debias=debias,
            closed=closed,
            squared=squared,
            nan=nan,
        )

    def _value(self) -> float:
        norm, debias, squared = (self.options[name] for name in ("norm", "debias", "squared"))
        return self._table().error(norm, debias=debias, squared=squared)


class MaximumCalibrationError(Binned[float]):
    """`maximum_calibration_error` of a stream.

    Args:
        n_bins: Number of bins.
        binning: ``"width"`` or ``"mass"``.
        closed: ``"right"`` or ``"left"``.
        min_count: Samples from which a bin counts.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = MaximumCalibrationError()
        >>> metric.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([1])).compute()
        0.75
    """

    def __init__(
        self,
        n_bins: int = 15,
        *,
        binning: str = "width",
        closed: str = "right",
        min_count: int = 1,
        nan: str = "raise",
    ) -> None:
        min_count = check_count("min_count", min_count, at_least=1)
        super().__init__(
            n_bins=n_bins, binning=binning, closed=closed, min_count=min_count, nan=nan
        )

    def _value(self) -> float:
        return self._table().error(math.inf, min_count=self.options["min_count"])


class SignedCalibrationError(Binned[SignedErrorTerms]):
    """`signed_calibration_error` of a stream.

    Args:
        n_bins: Number of bins.
        binning: ``"width"`` or ``"mass"``.
        closed: ``"right"`` or ``"left"``.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = SignedCalibrationError()
        >>> metric.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([1])).compute()
        SignedErrorTerms(over_confidence=0.75, under_confidence=0.0, mean_gap=0.75)
    """

    def __init__(
        self,
        n_bins: int = 15,
        *,
        binning: str = "width",
        closed: str = "right",
        nan: str = "raise",
    ) -> None:
        super().__init__(n_bins=n_bins, binning=binning, closed=closed, nan=nan)

    def _value(self) -> SignedErrorTerms:
        table = self._table()
        gap = table.mean_confidence - table.mean_accuracy
        return SignedErrorTerms(table.over_confidence, table.under_confidence, gap)
