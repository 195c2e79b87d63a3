"""Accuracy and the two common proper scores."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F

from calibclip._checks import check_choice
from calibclip.metrics._predictions import (
    ArrayLike,
    predicted_class,
    probabilities,
    read_predictions,
)


def accuracy(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
) -> float:
    r"""Share of samples whose predicted class is the true one.

    .. math:: \frac{1}{N} \sum_i [\operatorname{argmax}_k s_{ik} = y_i]

    with s the probabilities or logits and y the target. Of equal scores the lowest class index is
    predicted.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.

    Returns:
        A float in [0, 1]; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a dtype is wrong.
        ValueError: A shape or a class index is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> from calibclip import metrics
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 1.0], [1.0, 1.0]])
        >>> metrics.accuracy(logits=logits, target=torch.tensor([0, 1, 1, 0]))
        0.75
    """
    predictions = read_predictions(probs, logits, target)
    return (predicted_class(predictions) == predictions.target).double().mean().item()


def negative_log_likelihood(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
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

    Returns:
        A float, computed in float64; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a dtype is wrong.
        ValueError: A shape or a class index is wrong, or a row of scores is invalid.

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
    scores, are_logits, target = read_predictions(probs, logits, target)
    log_probs = scores.double().log_softmax(dim=1) if are_logits else scores.double().log()
    return F.nll_loss(log_probs, target).item()


def brier_score(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    scale: Literal["sum", "half", "mean"] = "sum",
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

    Returns:
        A float, computed in float64, in [0, 2], [0, 1] or [0, 2 / K]; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a dtype is wrong.
        ValueError: A shape or a class index is wrong, a row of scores is invalid, or ``scale`` is
            not one of the three.

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
    check_choice("scale", scale, ("sum", "half", "mean"))
    predictions = read_predictions(probs, logits, target)
    n_classes = predictions.scores.shape[1]
    wide = probabilities(predictions._replace(scores=predictions.scores.double()))
    true_class = predictions.target[:, None]
    # p - onehot(y), without an (N, K) one-hot matrix.
    residual = wide.scatter_add(1, true_class, wide.new_full(true_class.shape, -1.0))
    total = residual.square().sum(dim=1).mean().item()
    divisors = {"sum": 1, "half": 2, "mean": n_classes}
    return total / divisors[scale]
