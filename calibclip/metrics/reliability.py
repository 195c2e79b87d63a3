"""Accuracy against confidence, bin by bin: the table behind the calibration errors.

Predictions become a confidence and a correctness per sample (`Predictions`), these sums per bin,
and the sums a table (``_table.py``), whose errors are the metrics (``calibration.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calibclip._checks import check_choice, check_count, wrong
from calibclip.metrics._predictions import ArrayLike, Predictions, read_binary
from calibclip.metrics._streaming import Column, PredictionMetric, Value
from calibclip.metrics._table import (
    CLOSED,
    INTERVALS,
    BinSums,
    ReliabilityTable,
    bin_sums,
    mass_table,
    tabulate,
)

BINNINGS = ("width", "mass")


def reliability_table(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    n_bins: int = 15,
    *,
    binning: str = "width",
    closed: str = "right",
    interval: str = "wilson",
    nan: str = "raise",
) -> ReliabilityTable:
    """Accuracy against confidence of the predicted class, per bin of confidence.

    The confidence of a sample is its largest probability, and the sample is correct if that class
    is the true one (of equal scores the lowest index). With two classes, too, this is the predicted
    class and not the positive one, so that no confidence is below 1/K; `binary_reliability_table`
    is for the positive class. Bins of equal width are closed on the right: bin b of n holds
    confidences in ``(b/n, (b+1)/n]``, the first also 0.

    Confidences and bin edges are compared in one dtype, float64 for float64 input and else float32,
    with every edge rounded to it once. A confidence equal to ``float32(b/n)`` hence counts as b/n.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        n_bins: Number of bins, at least 1.
        binning: ``"width"`` or ``"mass"``, see `expected_calibration_error`.
        closed: Which edge belongs to a bin of equal width, ``"right"`` or ``"left"``.
        interval: Of the accuracies, 95 %: ``"wilson"``, or ``"clopper-pearson"``, which is wider
            and covers at least that.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        The table; with ``N = 0`` all its counts are 0 and its errors NaN.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

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
    metric = Reliability(n_bins, binning=binning, closed=closed, interval=interval, nan=nan)
    return metric.update(probs, logits, target).compute(sync=False)


def binary_reliability_table(
    probs: ArrayLike,
    target: ArrayLike,
    n_bins: int = 15,
    *,
    binning: str = "width",
    closed: str = "right",
    interval: str = "wilson",
    nan: str = "raise",
) -> ReliabilityTable:
    """Frequency of the positive class against its probability, per bin.

    What `reliability_table` is for the predicted class: the column ``confidence`` is the mean
    probability of the positive class, ``accuracy`` its share. The table's ``error`` gives the
    calibration errors.

    Args:
        probs: Probability of the positive class, shape ``(N,)``, floating point.
        target: Whether it is the true one, shape ``(N,)``, bool or 0 and 1.
        n_bins: Number of bins, at least 1.
        binning: ``"width"`` or ``"mass"``, see `expected_calibration_error`.
        closed: Which edge belongs to a bin of equal width, ``"right"`` or ``"left"``.
        interval: ``"wilson"`` or ``"clopper-pearson"``, see `reliability_table`.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        The table; with ``N = 0`` all its counts are 0 and its errors NaN.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape or an option is wrong, ``probs`` is outside [0, 1], or ``target`` is
            neither 0 nor 1.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> probs = torch.tensor([0.25, 0.25, 0.55, 0.75, 0.75])
        >>> target = torch.tensor([0, 0, 1, 1, 1])
        >>> table = metrics.binary_reliability_table(probs, target, n_bins=2)
        >>> round(table.ece, 4), round(table.mce, 4)
        (0.29, 0.3167)
    """
    metric = Reliability(n_bins, binning=binning, closed=closed, interval=interval, nan=nan)
    with torch.no_grad():
        confidence, correct, faults = read_binary(probs, target, nan)
        metric.take_pairs(confidence, correct)
        metric.count_faults(faults)
    return metric.compute(sync=False)


class Binned(PredictionMetric[Value]):
    """Base: sums per bin of equal width, or for bins of equal mass 5 bytes a sample."""

    def __init__(self, **options: Any) -> None:
        options["n_bins"] = check_count("n_bins", options["n_bins"], at_least=1)
        check_choice("binning", options["binning"], BINNINGS)
        check_choice("closed", options["closed"], CLOSED)
        if options["binning"] == "mass" and options["closed"] != "right":
            raise ValueError(
                wrong("closed", "'right' with binning='mass'", repr(options["closed"]))
            )
        super().__init__(**options)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        if self.options["binning"] == "mass":
            return {}, {"confidence": Column(torch.float32), "correct": Column(torch.uint8)}
        nothing = bin_sums(torch.zeros(0), torch.zeros(0).bool(), self.options["n_bins"])
        return nothing._asdict(), {}

    def _take(self, predictions: Predictions) -> None:
        self.take_pairs(predictions.confidence, predictions.correct)

    def take_pairs(self, confidence: Tensor, correct: Tensor) -> None:
        """Take in confidences, shape ``(N,)``, floating, and correctness, shape ``(N,)``, bool."""
        if self.options["binning"] == "mass":
            self._append(confidence=confidence, correct=correct)
        else:
            n_bins, closed = self.options["n_bins"], self.options["closed"]
            self._add(**bin_sums(confidence, correct, n_bins, closed)._asdict())

    def _table(self) -> ReliabilityTable:
        interval = self.options.get("interval", "wilson")
        if self.options["binning"] == "mass":
            confidence, correct = (self._columns[name].values for name in ("confidence", "correct"))
            return mass_table(confidence, correct, self.options["n_bins"], interval)
        return tabulate(BinSums(*(self._sums[name] for name in BinSums._fields)), None, interval)


class Reliability(Binned[ReliabilityTable]):
    """`reliability_table` of a stream.

    Args:
        n_bins: Number of bins.
        binning: ``"width"``, with a state of three sums a bin, or ``"mass"``, with 5 bytes a
            sample.
        closed: ``"right"`` or ``"left"``.
        interval: ``"wilson"`` or ``"clopper-pearson"``.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = Reliability(n_bins=2)
        >>> for probs in torch.tensor([[[0.75, 0.25]], [[0.0, 1.0]]]):
        ...     _ = metric.update(probs, target=torch.tensor([1]))
        >>> metric.compute()
        ReliabilityTable(n_bins=2, total=2, ece=0.3750, mce=0.3750)
    """

    def __init__(
        self,
        n_bins: int = 15,
        *,
        binning: str = "width",
        closed: str = "right",
        interval: str = "wilson",
        nan: str = "raise",
    ) -> None:
        check_choice("interval", interval, INTERVALS)
        super().__init__(n_bins=n_bins, binning=binning, closed=closed, interval=interval, nan=nan)

    def _value(self) -> ReliabilityTable:
        return self._table()
