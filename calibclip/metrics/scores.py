"""Accuracy and proper scores, and what a proper score consists of."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_choice, check_count
from calibclip.metrics._binning import equal_width_edges
from calibclip.metrics._predictions import ArrayLike, Predictions
from calibclip.metrics._streaming import Column, PredictionMetric

SCALES = ("sum", "half", "mean")


def accuracy(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    nan: str = "raise",
) -> float:
    r"""Share of samples whose predicted class is the true one.

    .. math:: \frac{1}{N} \sum_i [\operatorname{argmax}_k s_{ik} = y_i]

    with s the probabilities or logits and y the target. Of equal scores the lowest class index is
    predicted.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float in [0, 1]; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 1.0], [1.0, 1.0]])
        >>> metrics.accuracy(logits=logits, target=torch.tensor([0, 1, 1, 0]))
        0.75
    """
    return Accuracy(nan=nan).update(probs, logits, target).compute(sync=False)


def negative_log_likelihood(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    nan: str = "raise",
) -> float:
    r"""Mean negative log-probability of the true class, in nats.

    .. math:: -\frac{1}{N} \sum_i \ln p_{i y_i}

    with p = softmax(logits), taken in the log domain, or the given probabilities. Nothing is
    clipped: a true class of probability 0 (or of logit -inf) makes the result infinite. Prefer
    ``logits``, since a saturated softmax has already rounded small probabilities to 0.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float, computed in float64; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> logits = torch.tensor([[1000.0, 0.0], [0.0, 0.0]])
        >>> round(metrics.negative_log_likelihood(logits=logits, target=torch.tensor([1, 0])), 4)
        500.3466

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, eq. 6 (there
        a sum over samples), https://arxiv.org/abs/1706.04599
    """
    return NegativeLogLikelihood(nan=nan).update(probs, logits, target).compute(sync=False)


def brier_score(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    scale: Literal["sum", "half", "mean"] = "sum",
    nan: str = "raise",
) -> float:
    r"""Mean squared distance between the probabilities and the one-hot target.

    .. math:: \frac{1}{N} \sum_i \sum_k (p_{ik} - [y_i = k])^2

    Publications differ by a factor, so a value needs its scale: ``"sum"`` is the formula above,
    ``"half"`` is half of it, which for two classes is the usual binary score, and ``"mean"``
    divides it by the number of classes K.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        scale: ``"sum"``, ``"half"`` or ``"mean"``.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float, computed in float64, in [0, 2], [0, 1] or [0, 2 / K]; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> probs, target = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1])
        >>> metrics.brier_score(probs, target=target)
        0.3125
        >>> metrics.brier_score(probs, target=target, scale="half")
        0.15625

    References:
        Brier (1950), Verification of Forecasts Expressed in Terms of Probability, eq. 2,
        https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2
    """
    return BrierScore(scale=scale, nan=nan).update(probs, logits, target).compute(sync=False)


class BrierTerms(NamedTuple):
    """What the Brier score of the predicted class consists of; see `brier_decomposition`."""

    brier: float
    """The score: mean of ``(confidence - correct)^2``."""
    reliability: float
    """Of the bins' mean confidences from their accuracies: calibration, 0 is best."""
    resolution: float
    """Of the bins' accuracies from the accuracy over all: larger is better."""
    uncertainty: float
    """Variance of the correctness: not the model's doing."""
    within_variance: float
    """Variance of the confidences inside the bins."""
    within_covariance: float
    """Twice their covariance with the correctness inside the bins."""

    @property
    def refinement(self) -> float:
        """What is left of the score without ``reliability``."""
        return self.brier - self.reliability


def brier_decomposition(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    n_bins: int = 15,
    *,
    nan: str = "raise",
) -> BrierTerms:
    r"""Parts of the Brier score of the predicted class, which add up to it exactly.

    .. math::
        \underbrace{\tfrac1N \textstyle\sum_i (c_i - a_i)^2}_{\text{brier}} =
        \underbrace{\textstyle\sum_b w_b (\bar c_b - \bar a_b)^2}_{\text{reliability}}
        - \underbrace{\textstyle\sum_b w_b (\bar a_b - \bar a)^2}_{\text{resolution}}
        + \underbrace{\bar a (1 - \bar a)}_{\text{uncertainty}}
        + \underbrace{\tfrac1N \textstyle\sum_i (c_i - \bar c_b)^2}_{\text{within variance}}
        - \underbrace{\tfrac2N \textstyle\sum_i (c_i - \bar c_b)(a_i - \bar a_b)}_{\text{within
        covariance}}

    with the confidence c, the correctness a and the share :math:`w_b` of bin b, of equal width and
    closed on the right. The first three alone, as often printed, miss the score by what the
    confidences vary inside a bin.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        n_bins: Number of bins, at least 1.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        The score and its five parts, floats, from sums in float64; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 1.0], [0.5, 0.5]])
        >>> terms = metrics.brier_decomposition(probs, target=torch.tensor([0, 1, 1, 0]))
        >>> terms.brier, terms.reliability, terms.resolution, terms.uncertainty
        (0.21875, 0.09375, 0.0625, 0.1875)

    References:
        Murphy (1973), A new vector partition of the probability score (three terms); Stephenson,
        Coelho, Jolliffe (2008), Two extra components in the Brier score decomposition.
    """
    return BrierDecomposition(n_bins, nan=nan).update(probs, logits, target).compute(sync=False)


class SharpnessTerms(NamedTuple):
    """How far the predictions are from undecided, right or wrong; see `sharpness`."""

    confidence: float
    """Mean probability of the predicted class."""
    variance: float
    """Variance of that probability over samples."""
    entropy: float
    """Mean entropy of the probabilities, in nats."""


def sharpness(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    nan: str = "raise",
) -> SharpnessTerms:
    r"""How decided the predictions are, whether right or wrong.

    .. math::
        \bar c = \frac1N \sum_i \max_k p_{ik}, \qquad \frac1N \sum_i (c_i - \bar c)^2, \qquad
        -\frac1N \sum_i \sum_k p_{ik} \ln p_{ik}

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: Of no effect, but checked if given: so that all metrics are called alike.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        The three, floats, from sums in float64; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> terms = metrics.sharpness(torch.tensor([[0.75, 0.25], [0.0, 1.0]]))
        >>> terms.confidence, terms.variance, round(terms.entropy, 4)
        (0.875, 0.015625, 0.2812)
    """
    return Sharpness(nan=nan).update(probs, logits, target).compute(sync=False)


class _Mean(PredictionMetric[float]):
    """Base: the mean of one number a sample."""

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        return {"n_samples": _count(), "total": _total()}, {}

    def _value(self) -> float:
        return _ratio(self._sums["total"], self._sums["n_samples"])


class Accuracy(_Mean):
    """`accuracy` of a stream.

    Args:
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        ValueError: ``nan`` is another.

    Example:
        >>> import torch
        >>> metric = Accuracy()
        >>> metric.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([0])).compute()
        1.0
    """

    def __init__(self, *, nan: str = "raise") -> None:
        super().__init__(nan=nan)

    def _take(self, predictions: Predictions) -> None:
        self._add(n_samples=_length(predictions.correct), total=predictions.correct.sum())


class NegativeLogLikelihood(_Mean):
    """`negative_log_likelihood` of a stream.

    Args:
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        ValueError: ``nan`` is another.

    Example:
        >>> import torch
        >>> metric = NegativeLogLikelihood()
        >>> value = metric.update(logits=torch.zeros(1, 2), target=torch.tensor([0])).compute()
        >>> round(value, 4)
        0.6931
    """

    def __init__(self, *, nan: str = "raise") -> None:
        super().__init__(nan=nan)

    def _take(self, predictions: Predictions) -> None:
        self._add(n_samples=_length(predictions.nll), total=predictions.nll.sum())


class BrierScore(_Mean):
    """`brier_score` of a stream.

    Args:
        scale: ``"sum"``, ``"half"`` or ``"mean"``.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        ValueError: An option is not one of those.

    Example:
        >>> import torch
        >>> metric = BrierScore(scale="half")
        >>> metric.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([0])).compute()
        0.0625
    """

    def __init__(self, *, scale: str = "sum", nan: str = "raise") -> None:
        check_choice("scale", scale, SCALES)
        super().__init__(scale=scale, nan=nan)

    def _take(self, predictions: Predictions) -> None:
        divisor = {"sum": 1, "half": 2, "mean": predictions.n_classes}[self.options["scale"]]
        self._add(n_samples=_length(predictions.brier), total=predictions.brier.sum() / divisor)


class BrierDecomposition(PredictionMetric[BrierTerms]):
    """`brier_decomposition` of a stream; five sums a bin.

    Args:
        n_bins: Number of bins.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``n_bins`` is no integer.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = BrierDecomposition()
        >>> metric.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([0])).compute().brier
        0.0625
    """

    def __init__(self, n_bins: int = 15, *, nan: str = "raise") -> None:
        super().__init__(n_bins=check_count("n_bins", n_bins, at_least=1), nan=nan)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        zeros = torch.zeros(self.options["n_bins"], dtype=torch.float64)
        sums = {name: zeros.clone() for name in ("c", "cc", "ca")}
        return {"n": zeros.long(), "a": zeros.long(), **sums}, {}

    def _take(self, predictions: Predictions) -> None:
        self.take_pairs(predictions.confidence, predictions.correct)

    def take_pairs(self, confidence: Tensor, correct: Tensor) -> None:
        """Take in confidences, shape ``(N,)``, floating, and correctness, shape ``(N,)``, bool."""
        n_bins, device = self.options["n_bins"], confidence.device
        edges = equal_width_edges(n_bins, confidence.dtype, device)
        index = torch.bucketize(confidence, edges)
        # From the middle of the bin, so that its variance is no difference of large numbers.
        offset = confidence.double() - (index + 0.5) / n_bins
        zeros = torch.zeros(n_bins, dtype=torch.float64, device=device)
        hits = correct.long()
        self._add(
            n=zeros.long().index_add(0, index, torch.ones_like(index)),
            a=zeros.long().index_add(0, index, hits),
            c=zeros.index_add(0, index, offset),
            cc=zeros.index_add(0, index, offset.square()),
            ca=zeros.index_add(0, index, offset * hits),
        )

    def _value(self) -> BrierTerms:
        n, a, c, cc, ca = (self._sums[name].double().cpu() for name in ("n", "a", "c", "cc", "ca"))
        total = n.sum()
        filled = n > 0
        n, a, c, cc, ca = (column[filled] for column in (n, a, c, cc, ca))
        middle = (filled.nonzero().flatten() + 0.5) / self.options["n_bins"]
        accuracy, offset = a / n, c / n
        mean = a.sum() / total
        reliability = (n * (middle + offset - accuracy).square()).sum() / total
        resolution = (n * (accuracy - mean).square()).sum() / total
        uncertainty = mean * (1 - mean)
        within_variance = (cc - c * offset).sum() / total
        within_covariance = 2 * (ca - c * accuracy).sum() / total
        brier = reliability - resolution + uncertainty + within_variance - within_covariance
        terms = (
            brier, reliability, resolution, uncertainty, within_variance, within_covariance
        )  # fmt: skip
        return BrierTerms(*(float(term) for term in terms))


class Sharpness(PredictionMetric[SharpnessTerms]):
    """`sharpness` of a stream.

    Args:
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        ValueError: ``nan`` is another.

    Example:
        >>> import torch
        >>> Sharpness().update(torch.tensor([[0.75, 0.25]])).compute().confidence
        0.75
    """

    def __init__(self, *, nan: str = "raise") -> None:
        super().__init__(nan=nan)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        return {"n_samples": _count(), "c": _total(), "cc": _total(), "entropy": _total()}, {}

    def update(
        self,
        probs: ArrayLike | None = None,
        logits: ArrayLike | None = None,
        target: ArrayLike | None = None,
    ) -> Sharpness:
        """Take in a batch, of which the target is not looked at; see `sharpness`."""
        scores = logits if probs is None else probs
        if target is None and isinstance(scores, (Tensor, np.ndarray)):
            target = torch.zeros(len(scores), dtype=torch.int64)
            target = target.to(scores.device) if isinstance(scores, Tensor) else target
        super().update(probs, logits, target)
        return self

    def _take(self, predictions: Predictions) -> None:
        # From 1/2, so that the variance is no difference of large numbers.
        offset = predictions.confidence.double() - 0.5
        self._add(
            n_samples=_length(offset),
            c=offset.sum(),
            cc=offset.square().sum(),
            entropy=predictions.entropy.sum(),
        )

    def _value(self) -> SharpnessTerms:
        n = self._sums["n_samples"]
        mean, square, entropy = (_ratio(self._sums[name], n) for name in ("c", "cc", "entropy"))
        return SharpnessTerms(mean + 0.5, max(square - mean**2, 0.0) if n else square, entropy)


def _count() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def _total() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def _length(like: Tensor) -> Tensor:
    return torch.full((), len(like), dtype=torch.int64, device=like.device)


def _ratio(total: Tensor, count: Tensor) -> float:
    """Return ``total / count``; NaN of nothing."""
    return float(total.double() / count)
