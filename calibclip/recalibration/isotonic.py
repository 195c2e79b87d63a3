"""Isotonic regression of correctness on confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_choice, check_count, describe, wrong
from calibclip.metrics._predictions import ArrayLike, Predictions, as_tensor
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

Method = Literal["top-label", "one-vs-rest"]


@dataclass(frozen=True, repr=False)
class IsotonicCalibration(PlainState):
    """Monotone curves, as :func:`fit_isotonic` finds them; call it on predictions.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A number is not finite or out of range, there is no knot or not one curve a
            class, lengths differ, or a curve does not rise.

    Example:
        >>> import torch
        >>> from calibclip import recalibration
        >>> probs = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.1, 0.2]])
        >>> curve = recalibration.fit_isotonic(probs, target=torch.tensor([0, 2]))
        >>> curve(probs[:1])  # one of the two is right; the others keep their proportion, 2 to 1
        tensor([[0.5000, 0.3333, 0.1667]])
        >>> recalibration.IsotonicCalibration.from_dict(curve.to_dict()) == curve
        True
    """

    method: Method
    """``"top-label"`` or ``"one-vs-rest"``."""
    knots: tuple[tuple[float, ...], ...]
    """Probabilities at which a curve is given, increasing; one tuple of them, or one a class."""
    values: tuple[tuple[float, ...], ...]
    """Calibrated probabilities at the knots, non-decreasing, in [0, 1]."""
    n_samples: int
    """Number of samples, N."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        check_count("n_samples", self.n_samples, at_least=1)
        knots, values = (
            tuple(
                read_numbers(f"{name}[{k}]", curve, at_least=0, at_most=1)
                for k, curve in enumerate(read_list(name, getattr(self, name)))
            )
            for name in ("knots", "values")
        )
        one = self.method == "top-label"
        if (len(knots) != 1) if one else (len(knots) < 2):
            expected = "one curve" if one else "two curves at least, one a class"
            raise ValueError(wrong("knots", expected, len(knots)))
        check_length("values", values, len(knots), "curve")
        for k, (curve, heights) in enumerate(zip(knots, values, strict=True)):
            if not curve:
                raise ValueError(wrong(f"knots[{k}]", "at least one knot", "none"))
            check_length(f"values[{k}]", heights, len(curve), "knot")
            check_rising(f"knots[{k}]", curve, strictly=True)
            check_rising(f"values[{k}]", heights, strictly=False)
        object.__setattr__(self, "knots", knots)
        object.__setattr__(self, "values", values)

    def __call__(self, probs: ArrayLike | None = None, logits: ArrayLike | None = None) -> Any:
        """Calibrate predictions.

        With ``"top-label"`` the predicted class gets the calibrated confidence and the other
        classes share what is left in their proportions. With ``"one-vs-rest"`` each class goes
        through its own curve and the row is divided by its sum; a row of which every class maps to
        0 stays as it was. Rows sum to 1, so that the result can be the ``probs=`` of a metric.

        Args:
            probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
            logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.

        Returns:
            Probabilities, shape ``(N, K)``, of the type, dtype and device of the input, outside of
            any autograd graph.

        Raises:
            TypeError: Not exactly one of ``probs`` and ``logits`` is given, or a type is wrong.
            ValueError: A shape or a row is wrong, or with ``"one-vs-rest"`` the number of
                classes is not that of the fit.
        """
        given = logits if probs is None else probs
        predictions = read_scores(probs, logits)
        if self.method == "top-label":
            confidence = self._curve(0, predictions.confidence)
            return like(replace_confidence(predictions, confidence), given)
        if predictions.n_classes != len(self.knots):
            expected = f"shape (N, {len(self.knots)}), the classes of the fit"
            argument = "logits" if probs is None else "probs"
            raise ValueError(wrong(argument, expected, describe(given)))
        return like(self._one_vs_rest(predictions), given)

    def confidence(self, confidence: ArrayLike) -> Any:
        """Calibrate confidences of the predicted class, whatever the other classes get.

        Args:
            confidence: Largest probabilities, any shape but 0-d, floating point, in [0, 1]; up to
                1e-4 more, as a softmax may have by rounding, counts as 1.

        Returns:
            Calibrated confidences, of the type, shape, dtype and device of the input.

        Raises:
            TypeError: ``confidence`` is no floating-point tensor or array.
            ValueError: The method is not ``"top-label"``, or a confidence is outside of [0, 1].
        """
        if self.method != "top-label":
            raise ValueError(wrong("method", "'top-label' for a confidence", repr(self.method)))
        return calibrate_confidence(confidence, lambda c: self._curve(0, c))

    def _curve(self, index: int, probs: Tensor) -> Tensor:
        """Interpolate between the knots and stay constant beyond, in float64."""
        knots, values = (
            torch.tensor(curves[index], dtype=torch.float64, device=probs.device)
            for curves in (self.knots, self.values)
        )
        if len(knots) == 1:
            return values.expand(probs.shape)
        probs = probs.double().clamp(knots[0], knots[-1])
        right = torch.searchsorted(knots, probs, right=True).clamp(max=len(knots) - 1)
        left = right - 1
        share = (probs - knots[left]) / (knots[right] - knots[left])
        return torch.lerp(values[left], values[right], share)

    def _one_vs_rest(self, predictions: Predictions) -> Tensor:
        probs = predictions.probs
        result = torch.empty_like(probs)
        for k in range(len(self.knots)):
            result[:, k] = self._curve(k, probs[:, k].contiguous())
        total = result.sum(1, keepdim=True)
        return torch.where(total > 0, result / total, probs)

    def __repr__(self) -> str:
        count = sum(len(curve) for curve in self.knots)
        return (
            f"IsotonicCalibration(method={self.method!r}, n_knots={count}, "
            f"n_samples={self.n_samples})"
        )


def fit_isotonic(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    method: Method = "top-label",
    weight: ArrayLike | None = None,
) -> IsotonicCalibration:
    r"""Fit the non-decreasing curve that is nearest to correctness, in squared error.

    .. math:: \min_F \sum_i \omega_i (a_i - F(c_i))^2 \quad \text{over non-decreasing } F

    With ``method="top-label"``, c is the confidence (largest probability) and a whether the
    predicted class is the true one. With ``"one-vs-rest"`` there is a curve for each class, of the
    event that it is the true one, on its probability. Samples of equal c count as one with their
    mean, so that their order does not matter. Pool-adjacent-violators finds the solution at the c
    of the samples; in between it is interpolated linearly, beyond it is constant.

    Three things to know. The predicted class may change: with ``"top-label"`` if the calibrated
    confidence is less than what the runner-up is then given, with ``"one-vs-rest"`` since every
    class has a curve of its own (confidences alone are calibrated by the ``confidence`` method of
    the result). The division by the row sum, too, moves one-vs-rest probabilities away from what
    was fitted. And a curve may reach 0 and 1 exactly, where a wrong sample has an infinite negative
    log-likelihood.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        method: ``"top-label"`` or ``"one-vs-rest"``.
        weight: Weights of the samples, shape ``(N,)``, finite, >= 0, with a sum > 0. None: all 1.

    Returns:
        The curves, to be called on predictions.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index, an option or a weight is wrong, a row of scores is
            invalid or not finite, or there is no sample.

    Example:
        >>> import torch
        >>> from calibclip import recalibration
        >>> probs = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]])
        >>> curve = recalibration.fit_isotonic(probs, target=torch.tensor([1, 0, 1, 0]))
        >>> curve.confidence(torch.tensor([0.6, 0.7, 0.8, 0.9]))
        tensor([0.0000, 0.5000, 0.5000, 1.0000])

    References:
        Zadrozny, Elkan (2002), Transforming Classifier Scores into Accurate Multiclass Probability
        Estimates, https://doi.org/10.1145/775047.775151
    """
    check_choice("method", method, get_args(Method))
    samples = read_samples(probs, logits, target)
    weights = _read_weight(weight, len(samples))
    if method == "top-label":
        confidence = samples.confidence.cpu().numpy()
        correct = samples.correct.cpu().numpy()
        curves = [_fit_curve(confidence.astype(np.float64), correct, weights)]
    else:
        columns, truth = samples.probs.clamp(max=1).T.cpu().numpy(), samples.target.cpu().numpy()
        curves = [
            _fit_curve(column.astype(np.float64), truth == k, weights)
            for k, column in enumerate(columns)
        ]
    return IsotonicCalibration(
        method=method,
        knots=tuple(tuple(curve.knots.tolist()) for curve in curves),
        values=tuple(tuple(curve.values.tolist()) for curve in curves),
        n_samples=len(samples),
    )


class _Curve(NamedTuple):
    knots: np.ndarray
    values: np.ndarray


def _fit_curve(x: np.ndarray, event: np.ndarray, weight: np.ndarray) -> _Curve:
    """Return the curve at both ends of every block of equal values."""
    x, event, weight = x[weight > 0], event[weight > 0], weight[weight > 0]
    x, group = np.unique(x, return_inverse=True)
    total = np.bincount(group, weights=weight)
    first, values = pool_adjacent_violators(np.bincount(group, weights=weight * event), total)
    last = np.append(first[1:], len(x)) - 1
    ends = np.stack([first, last], axis=1).ravel()
    values = np.repeat(values, 2)
    kept = np.append(True, ends[1:] != ends[:-1])  # the ends of a block of one x are the same
    return _Curve(x[ends[kept]], values[kept])


def pool_adjacent_violators(total: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the blocks of an isotonic regression begin, and their means.

    Whole falling runs are pooled at once, as long as that leaves clearly fewer blocks; a stack,
    which takes linear time in the worst case also, does the rest.

    Args:
        total: Weighted values, that is values times weights, shape ``(n,)``, n >= 1.
        weight: Weights, shape ``(n,)``, > 0.
    """
    first = np.arange(len(total))
    while True:
        mean = total / weight
        rises = np.append(True, mean[1:] > mean[:-1])
        if rises.all():
            return first, mean
        begins = rises.nonzero()[0]
        few = len(begins) > 0.9 * len(first)
        first = first[begins]
        total, weight = np.add.reduceat(total, begins), np.add.reduceat(weight, begins)
        if few:
            break
    blocks: list[tuple[int, float, float]] = []
    for start, value, mass in zip(first.tolist(), total.tolist(), weight.tolist(), strict=True):
        while blocks and blocks[-1][1] / blocks[-1][2] >= value / mass:
            start, more, extra = blocks.pop()
            value, mass = value + more, mass + extra
        blocks.append((start, value, mass))
    starts, totals, weights = (np.array(column) for column in zip(*blocks, strict=True))
    return starts, totals / weights


def _read_weight(weight: object, batch: int) -> np.ndarray:
    if weight is None:
        return np.ones(batch)
    expected = f"finite numbers >= 0 of shape ({batch},) with a sum > 0"
    values = as_tensor(weight)
    if not isinstance(values, Tensor) or values.is_complex():
        raise TypeError(wrong("weight", expected, describe(weight)))
    if values.shape != (batch,):
        raise ValueError(wrong("weight", expected, describe(weight)))
    values = values.detach().cpu().double().numpy()
    if not np.isfinite(values.sum()) or (values < 0).any() or values.sum() == 0:
        raise ValueError(wrong("weight", expected, "others"))
    return values
