"""Histogram binning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from calibclip._checks import check_choice, check_count, check_number, wrong
from calibclip.metrics._binning import equal_mass_cuts, equal_width_edges
from calibclip.metrics._predictions import ArrayLike
from calibclip.recalibration._common import (
    PlainState,
    calibrate_confidence,
    check_length,
    check_rising,
    like,
    read_list,
    read_numbers,
    read_samples,
    read_scores,
    replace_confidence,
)

Binning = Literal["width", "mass"]


@dataclass(frozen=True, repr=False)
class HistogramBinning(PlainState):
    """Accuracies of bins, as :func:`fit_histogram_binning` finds them; call it on predictions.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A number is not finite or out of range, lengths differ, edges do not rise, or a
            bin without samples has an accuracy.

    Example:
        >>> import torch
        >>> from calibclip import recalibration
        >>> probs = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.1, 0.2]])
        >>> bins = recalibration.fit_histogram_binning(probs, target=torch.tensor([0, 2]))
        >>> bins(probs[:1])  # one of the two is right; the others keep their proportion, 2 to 1
        tensor([[0.5000, 0.3333, 0.1667]])
        >>> recalibration.HistogramBinning.from_dict(bins.to_dict()) == bins
        True
    """

    binning: Binning
    """``"width"`` or ``"mass"``."""
    edges: tuple[float, ...]
    """Edges between the bins, increasing, in [0, 1]; each belongs to the bin below it."""
    accuracy: tuple[float | None, ...]
    """Accuracy of each bin, one more than there are edges; None where a bin is empty."""
    count: tuple[int, ...]
    """Number of samples in each bin."""

    def __post_init__(self) -> None:
        check_choice("binning", self.binning, get_args(Binning))
        edges = read_numbers("edges", self.edges, at_least=0, at_most=1)
        check_rising("edges", edges, strictly=True)
        accuracy, count = read_list("accuracy", self.accuracy), read_list("count", self.count)
        check_length("accuracy", accuracy, len(edges) + 1, "bin")
        check_length("count", count, len(edges) + 1, "bin")
        for i, (share, number) in enumerate(zip(accuracy, count, strict=True)):
            if check_count(f"count[{i}]", number, at_least=0) == 0:
                if share is not None:
                    raise ValueError(wrong(f"accuracy[{i}]", "None for an empty bin", repr(share)))
            else:
                check_number(f"accuracy[{i}]", share, at_least=0, at_most=1)
        for name, values in (("edges", edges), ("accuracy", accuracy), ("count", count)):
            object.__setattr__(self, name, values)

    @property
    def n_bins(self) -> int:
        """Number of bins, empty ones included."""
        return len(self.edges) + 1

    @property
    def n_samples(self) -> int:
        """Number of samples, N."""
        return sum(self.count)

    def __call__(self, probs: ArrayLike | None = None, logits: ArrayLike | None = None) -> Any:
        """Calibrate predictions.

        The predicted class gets the accuracy of its bin and the other classes share what is left in
        their proportions; in a bin without a sample the confidence stays. Rows sum to 1, so that
        the result can be the ``probs=`` of a metric.

        Args:
            probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
            logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.

        Returns:
            Probabilities, shape ``(N, K)``, of the type, dtype and device of the input, outside of
            any autograd graph.

        Raises:
            TypeError: Not exactly one of ``probs`` and ``logits`` is given, or a type is wrong.
            ValueError: A shape or a row is wrong.
        """
        predictions = read_scores(probs, logits)
        result = replace_confidence(predictions, self._look_up(predictions.confidence))
        return like(result, logits if probs is None else probs)

    def confidence(self, confidence: ArrayLike) -> Any:
        """Calibrate confidences of the predicted class, whatever the other classes get.

        Args:
            confidence: Largest probabilities, any shape but 0-d, floating point, in [0, 1]; up to
                1e-4 more, as a softmax may have by rounding, counts as 1.

        Returns:
            Calibrated confidences, of the type, shape, dtype and device of the input.

        Raises:
            TypeError: ``confidence`` is no floating-point tensor or array.
            ValueError: A confidence is outside of [0, 1].
        """
        return calibrate_confidence(confidence, self._look_up)

    def _look_up(self, confidence: Tensor) -> Tensor:
        index = _index(confidence, self.edges, self.binning)
        accuracy = [float("nan") if value is None else value for value in self.accuracy]
        found = torch.tensor(accuracy, dtype=torch.float64, device=confidence.device)[index]
        return torch.where(found.isnan(), confidence.double(), found)

    def __repr__(self) -> str:
        empty = sum(count == 0 for count in self.count)
        return (
            f"HistogramBinning(binning={self.binning!r}, n_bins={self.n_bins}, n_empty={empty}, "
            f"n_samples={self.n_samples})"
        )


def fit_histogram_binning(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    n_bins: int = 15,
    binning: Binning = "width",
) -> HistogramBinning:
    r"""Replace confidences by the accuracy of their bin.

    .. math:: F(c) = \frac{1}{n_b} \sum_{i:\, c_i \in b} a_i \quad \text{for } c \in b

    with c the confidence (largest probability), a whether the predicted class is the true one, and
    :math:`n_b` the number of samples in bin b. Bins are closed on the right, as those of the
    expected calibration error: with ``binning="width"`` bin b of n is ``(b/n, (b+1)/n]``, the first
    also holding 0. With ``"mass"`` they hold as equal numbers of samples as can be with samples of
    equal confidence in one bin; there are fewer bins than asked for if there are too many of those.
    Edges then are midway between two samples, so that rounding moves none of them to another bin.
    An empty bin keeps the confidence as it is.

    The predicted class changes where the accuracy of a bin is less than what the runner-up is then
    given (confidences alone are calibrated by the ``confidence`` method of the result). A bin may
    hold right samples only, or wrong ones, and then give 1 or 0, where a sample of the other kind
    has an infinite negative log-likelihood.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        n_bins: Number of bins, at least 1.
        binning: ``"width"`` or ``"mass"``: what the bins have in common.

    Returns:
        The bins, to be called on predictions.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, a row of scores is invalid or not
            finite, or there is no sample.

    Example:
        >>> import torch
        >>> from calibclip import recalibration
        >>> probs = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]])
        >>> target = torch.tensor([1, 0, 0, 0])
        >>> bins = recalibration.fit_histogram_binning(probs, target=target, n_bins=4)
        >>> bins.confidence(torch.tensor([0.55, 0.95, 0.45]))  # none was in (0.25, 0.5]
        tensor([0.5000, 1.0000, 0.4500])

    References:
        Zadrozny, Elkan (2001), Obtaining Calibrated Probability Estimates from Decision Trees and
        Naive Bayesian Classifiers (ICML), for binary problems; Guo, Pleiss, Sun, Weinberger (2017),
        On Calibration of Modern Neural Networks, section 4.1, https://arxiv.org/abs/1706.04599
    """
    check_count("n_bins", n_bins, at_least=1)
    check_choice("binning", binning, get_args(Binning))
    samples = read_samples(probs, logits, target)
    confidence = samples.confidence
    if binning == "width":
        edges = tuple(equal_width_edges(n_bins, torch.float64).tolist())
    else:
        edges = _mass_edges(confidence, n_bins)
    index = _index(confidence, edges, binning)
    count = index.bincount(minlength=len(edges) + 1).tolist()
    correct = index[samples.correct].bincount(minlength=len(edges) + 1).tolist()
    return HistogramBinning(
        binning=binning,
        edges=edges,
        accuracy=tuple(c / n if n else None for c, n in zip(correct, count, strict=True)),
        count=tuple(count),
    )


def _index(confidence: Tensor, edges: tuple[float, ...], binning: Binning) -> Tensor:
    """Return the bin of each confidence."""
    bounds = torch.tensor(edges, dtype=torch.float64, device=confidence.device)
    if binning == "width":
        # Rounded once to the dtype in which confidences come: a float32 k/n equals edge k. Between
        # two float32 neighbours, on the other hand, only float64 has an edge of equal mass.
        bounds = bounds.to(confidence.dtype).double()
    return torch.bucketize(confidence.double(), bounds, right=False)


def _mass_edges(confidence: Tensor, n_bins: int) -> tuple[float, ...]:
    """Return numbers midway between the last confidence of a bin and the first of the next."""
    ranked = confidence.double().sort().values
    cuts = equal_mass_cuts(ranked, n_bins)
    lower, upper = ranked[cuts - 1], ranked[cuts]
    middle = lower + (upper - lower) / 2
    # Between float64 neighbours there is none: the edge belongs to the bin below.
    return tuple(torch.where(middle < upper, middle, lower).tolist())
