"""Failure detection: does the uncertainty tell wrong predictions from right ones?

The positive class is the error and its score the uncertainty, unless a name says otherwise. All
that counts is the order of the uncertainties, equal ones being ties.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calibclip._checks import check_number, warn
from calibclip.metrics import _ranking_measures as measures
from calibclip.metrics._predictions import ArrayLike, read_flags, read_predictions
from calibclip.metrics._ranking_state import (
    FailureMetric,
    RankingMetric,
    Tally,
    in_float64,
    read_ranked,
)
from calibclip.metrics._streaming import MetricWarning


class FailureScores(NamedTuple):
    """What the metrics of failure detection take, as `failure_scores` returns it."""

    uncertainty: Tensor
    """Minus the log-odds of the predicted class, shape ``(N,)``, float64."""
    correct: Tensor
    """Whether the predicted class is the true one, shape ``(N,)``, bool."""


def failure_scores(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    nan: str = "raise",
) -> FailureScores:
    r"""Uncertainty and correctness of class predictions, by their maximum probability.

    The uncertainty is :math:`\ln (1-p)/p` of the predicted class. It ranks as :math:`1 - p` does,
    and of logits still tells samples apart whose p rounds to 1: with CLIP's logits that are most,
    and they would be ties.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        nan: ``"raise"``; ``"omit"`` leaves rows out that are not finite; ``"propagate"`` gives them
            an uncertainty of NaN.

    Returns:
        The two, on the device of the scores.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape or a class index is wrong, or a row of scores is invalid.

    Example:
        >>> logits = torch.tensor([[40.0, 0.0], [50.0, 0.0]])
        >>> uncertainty, correct = failure_scores(logits=logits, target=torch.tensor([1, 0]))
        >>> uncertainty.round(decimals=4).tolist(), correct.tolist()
        ([-40.0, -50.0], [False, True])
    """
    with torch.no_grad():
        predictions = read_predictions(probs, logits, target, nan)
        predictions.faults.check()
        count = int(predictions.faults.nonfinite) if nan == "omit" else 0
        if count:
            warn(f"failure_scores: {count} rows with NaN or infinity were left out", MetricWarning)
        bad = ~predictions.scores.amax(dim=1).isfinite()
        uncertainty = (-predictions.log_odds).masked_fill(bad, torch.nan)
        return FailureScores(uncertainty, predictions.correct)


def failure_auroc(uncertainty: ArrayLike, correct: ArrayLike, *, nan: str = "raise") -> float:
    r"""Area under the ROC curve of errors against correct predictions.

    .. math:: P(u_\mathrm{error} > u_\mathrm{correct}) + \tfrac12 P(u_\mathrm{error} =
        u_\mathrm{correct})

    Exchanging the classes and the sign of the score leaves it as it is. 0.5 is chance.

    Args:
        uncertainty: Larger is less certain, shape ``(N,)``, floating point; infinity is legal. They
            are compared in the dtype given. For a confidence c pass ``-c``, and see
            `failure_scores` for one that does not saturate.
        correct: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.
        nan: What an uncertainty of NaN does: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float in [0, 1]; NaN unless there are errors and correct predictions.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape or an option is wrong, an uncertainty is NaN, or ``correct`` is neither
            0 nor 1.

    Example:
        >>> failure_auroc(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 0]))
        0.75

    References:
        Hendrycks, Gimpel (2017), A Baseline for Detecting Misclassified and Out-of-Distribution
        Examples in Neural Networks, section 2, https://arxiv.org/abs/1610.02136
    """
    metric = in_float64(FailureAUROC(nan=nan))
    return metric.update(uncertainty, correct).compute(sync=False)


def failure_aupr_error(uncertainty: ArrayLike, correct: ArrayLike, *, nan: str = "raise") -> float:
    r"""Area under the precision-recall curve of errors: the average precision.

    .. math:: \mathrm{AP} = \sum_t (\mathrm{recall}_t - \mathrm{recall}_{t-1})\,
        \mathrm{precision}_t

    over the distinct uncertainties in descending order. The positive class is the error, found
    where the uncertainty is at least a threshold; of a random ranking it is the error rate.

    Args:
        uncertainty: Larger is less certain, shape ``(N,)``, floating point; see `failure_auroc`.
        correct: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``, see `failure_auroc`.

    Returns:
        A float in [0, 1]; NaN if there is no error.

    Raises:
        TypeError: A type is wrong.
        ValueError: As `failure_auroc`.

    Example:
        >>> uncertainty, correct = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 0])
        >>> round(failure_aupr_error(uncertainty, correct), 4)  # (1 + 2/3) / 2
        0.8333

    References:
        Hendrycks, Gimpel (2017), section 2, https://arxiv.org/abs/1610.02136
    """
    metric = in_float64(FailureAUPRError(nan=nan))
    return metric.update(uncertainty, correct).compute(sync=False)


def failure_aupr_success(
    uncertainty: ArrayLike, correct: ArrayLike, *, nan: str = "raise"
) -> float:
    """Area under the precision-recall curve of correct predictions: the average precision.

    That of `failure_aupr_error` with the correct prediction as the positive class, found where the
    uncertainty is at most a threshold; of a random ranking it is the accuracy.

    Args:
        uncertainty: Larger is less certain, shape ``(N,)``, floating point; see `failure_auroc`.
        correct: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``, see `failure_auroc`.

    Returns:
        A float in [0, 1]; NaN if no prediction is correct.

    Raises:
        TypeError: A type is wrong.
        ValueError: As `failure_auroc`.

    Example:
        >>> uncertainty, correct = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 0])
        >>> round(failure_aupr_success(uncertainty, correct), 4)  # (1 + 2/3) / 2
        0.8333

    References:
        Hendrycks, Gimpel (2017), section 2, https://arxiv.org/abs/1610.02136
    """
    metric = in_float64(FailureAUPRSuccess(nan=nan))
    return metric.update(uncertainty, correct).compute(sync=False)


def failure_fpr95(uncertainty: ArrayLike, correct: ArrayLike, *, nan: str = "raise") -> float:
    """Share of correct predictions rejected by the threshold that rejects 95 % of the errors.

    The positive class is the error. Of all thresholds that reject at least 95 % of the errors, ties
    rejected, it is the one that rejects fewest correct predictions. Exchanging the classes gives
    another number.

    Args:
        uncertainty: Larger is less certain, shape ``(N,)``, floating point; see `failure_auroc`.
        correct: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``, see `failure_auroc`.

    Returns:
        A float in [0, 1], small is good; NaN unless there are errors and correct predictions.

    Raises:
        TypeError: A type is wrong.
        ValueError: As `failure_auroc`.

    Example:
        >>> failure_fpr95(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 0]))
        0.5
    """
    metric = in_float64(FailureFPR95(nan=nan))
    return metric.update(uncertainty, correct).compute(sync=False)


def fpr_at_tpr(
    score: ArrayLike, positive: ArrayLike, tpr: float = 0.95, *, nan: str = "raise"
) -> float:
    r"""False positive rate at a true positive rate, of any score and any positive class.

    .. math:: \min_t \{ P(s \ge t \mid \mathrm{negative}) :
        P(s \ge t \mid \mathrm{positive}) \ge \mathrm{tpr} \}

    The true positive rate reached is never below the one asked for, and not interpolated.

    Args:
        score: Larger is more likely positive, shape ``(N,)``, floating point; infinity is legal.
        positive: Whether a sample is of the positive class, shape ``(N,)``, bool or 0 and 1.
        tpr: True positive rate in [0, 1].
        nan: What a score of NaN does, see `failure_auroc`.

    Returns:
        A float in [0, 1]; NaN unless there are samples of both classes.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape or an option is wrong, a score is NaN, or ``positive`` is neither 0 nor
            1.

    Example:
        >>> score, positive = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 1, 0, 1])
        >>> fpr_at_tpr(score, positive, 0.5), fpr_at_tpr(score, positive, 0.51)
        (0.0, 0.5)
    """
    metric = in_float64(FPRAtTPR(tpr, nan=nan))
    return metric.update(score, positive).compute(sync=False)


class FailureAUROC(FailureMetric[float]):
    """`failure_auroc` of a stream.

    Args:
        sketch: Keep a histogram of 65,536 bins, 1 MB however many samples, instead of 5 bytes a
            sample. ``error_bound()`` tells how far the value may be off. Either way uncertainties
            are rounded to float32.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``nan`` is none of the three.

    Example:
        >>> metric = FailureAUROC()
        >>> for uncertainty in torch.tensor([[0.1, 0.2], [0.3, 0.4]]):
        ...     _ = metric.update(uncertainty, torch.tensor([1, 0]))
        >>> metric.compute()
        0.75
        >>> metric = FailureAUROC(sketch=True)
        >>> _ = metric.update(torch.tensor([0.1, 0.4, 0.4001]), torch.tensor([1, 1, 0]))
        >>> metric.compute(), metric.error_bound()
        (0.75, 0.25)
    """

    def __init__(self, *, sketch: bool = False, nan: str = "raise") -> None:
        super().__init__(sketch=sketch, nan=nan)

    def _measure(self, tally: Tally) -> float:
        return measures.auroc(tally.positive, tally.negative)

    def _range(self, tally: Tally) -> tuple[float, float]:
        return measures.auroc_range(tally.positive, tally.negative)


class FailureAUPRError(FailureMetric[float]):
    """`failure_aupr_error` of a stream.

    Args:
        sketch: Keep a histogram instead of 5 bytes a sample, see `FailureAUROC`.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``nan`` is none of the three.

    Example:
        >>> FailureAUPRError().update(torch.tensor([0.1, 0.2]), torch.tensor([0, 1])).compute()
        0.5
    """

    def __init__(self, *, sketch: bool = False, nan: str = "raise") -> None:
        super().__init__(sketch=sketch, nan=nan)

    def _measure(self, tally: Tally) -> float:
        return measures.average_precision(tally.positive, tally.negative)

    def _range(self, tally: Tally) -> tuple[float, float]:
        return measures.average_precision_range(tally.positive, tally.negative)


class FailureAUPRSuccess(FailureAUPRError):
    """`failure_aupr_success` of a stream.

    Args:
        sketch: Keep a histogram instead of 5 bytes a sample, see `FailureAUROC`.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``nan`` is none of the three.

    Example:
        >>> FailureAUPRSuccess().update(torch.tensor([0.1, 0.2]), torch.tensor([0, 1])).compute()
        0.5
    """

    def _measure(self, tally: Tally) -> float:
        return super()._measure(tally.flipped())

    def _range(self, tally: Tally) -> tuple[float, float]:
        return super()._range(tally.flipped())


class FailureFPR95(FailureMetric[float]):
    """`failure_fpr95` of a stream.

    Args:
        sketch: Keep a histogram instead of 5 bytes a sample, see `FailureAUROC`.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``nan`` is none of the three.

    Example:
        >>> FailureFPR95().update(torch.tensor([0.1, 0.2]), torch.tensor([0, 1])).compute()
        1.0
    """

    def __init__(self, *, sketch: bool = False, nan: str = "raise") -> None:
        super().__init__(sketch=sketch, nan=nan)

    def _measure(self, tally: Tally) -> float:
        return measures.fpr_at_tpr(tally.positive, tally.negative, 0.95)

    def _range(self, tally: Tally) -> tuple[float, float]:
        return measures.fpr_at_tpr_range(tally.positive, tally.negative, 0.95)


class FPRAtTPR(RankingMetric[float]):
    """`fpr_at_tpr` of a stream.

    Args:
        tpr: True positive rate in [0, 1].
        sketch: Keep a histogram instead of 5 bytes a sample, see `FailureAUROC`.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> FPRAtTPR(0.9).update(torch.tensor([0.1, 0.2]), torch.tensor([0, 1])).compute()
        0.0
    """

    _SCORES = "score"

    def __init__(self, tpr: float = 0.95, *, sketch: bool = False, nan: str = "raise") -> None:
        tpr = check_number("tpr", tpr, at_least=0, at_most=1)
        super().__init__(tpr=tpr, sketch=sketch, nan=nan)

    def update(self, score: ArrayLike, positive: ArrayLike) -> FPRAtTPR:
        """Take in a batch.

        Args:
            score: Larger is more likely positive, shape ``(N,)``, floating point.
            positive: Whether a sample is of the positive class, shape ``(N,)``, bool or 0 and 1.

        Returns:
            The metric itself.

        Raises:
            TypeError: ``score`` is not floating, or one of the two is no tensor or array.
            ValueError: A shape is wrong, a score is NaN, or ``positive`` is neither 0 nor 1.
        """
        values, bad = read_ranked("score", score, self.options["nan"])
        self._take(values, read_flags("positive", positive, values), bad)
        return self

    def _measure(self, tally: Tally) -> float:
        return measures.fpr_at_tpr(tally.positive, tally.negative, self.options["tpr"])

    def _range(self, tally: Tally) -> tuple[float, float]:
        return measures.fpr_at_tpr_range(tally.positive, tally.negative, self.options["tpr"])
