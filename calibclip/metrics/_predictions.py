"""What every metric reads: one of ``probs=`` and ``logits=``, and ``target=``."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_floating, check_target, describe, wrong

ArrayLike: TypeAlias = Tensor | np.ndarray


class Predictions(NamedTuple):
    """Checked predictions of ``N`` samples over ``K`` classes, cut from any autograd graph."""

    scores: Tensor
    """Probabilities or logits, shape ``(N, K)``, float64 if given so, else float32."""
    are_logits: bool
    """What ``scores`` holds."""
    target: Tensor
    """True classes, shape ``(N,)``, int64, on the device of ``scores``."""


def read_predictions(
    probs: ArrayLike | None, logits: ArrayLike | None, target: ArrayLike | None
) -> Predictions:
    """Check the three arguments that all metrics share.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a dtype is not floating (``probs``, ``logits``) or integer (``target``).
        ValueError: A shape is wrong, a probability row is not a distribution, a row of logits
            holds NaN or +inf or only -inf, or a class index lies outside ``[0, K)``.
    """
    if (probs is None) == (logits is None):
        got = "neither" if probs is None else "both"
        remedy = "name the arguments: probs= or logits=, and target="
        raise TypeError(wrong("probs, logits", "exactly one of the two", got, remedy))
    are_logits = probs is None
    argument, given = ("logits", logits) if are_logits else ("probs", probs)

    given = check_floating(argument, _as_tensor(given), shape="(N, K)", ndim=2).detach()
    if given.shape[1] < 2:
        remedy = "for a two-class score s pass torch.stack([1 - s, s], dim=1)"
        raise ValueError(wrong(argument, "shape (N, K) with K >= 2", describe(given), remedy))
    scores = given.to(torch.float64 if given.dtype == torch.float64 else torch.float32)
    if scores.device.type == "mps":
        scores = scores.cpu()  # MPS has no float64, in which all sums are kept
    if are_logits:
        _check_logit_rows(scores)
    else:
        # Rounding every entry moves a row sum by up to eps / 2; 1e-4 covers sums of many classes.
        _check_probability_rows(scores, tolerance=max(1e-4, torch.finfo(given.dtype).eps))
    return Predictions(scores, are_logits, _read_target(target, scores))


def probabilities(predictions: Predictions) -> Tensor:
    """Class probabilities, shape ``(N, K)``, in the dtype of the scores."""
    return predictions.scores.softmax(dim=1) if predictions.are_logits else predictions.scores


def predicted_class(predictions: Predictions) -> Tensor:
    """Class of the largest score, shape ``(N,)``; of equal scores the lowest index.

    Logits are compared as they are: softmax rounds close logits to equal probabilities.
    """
    return predictions.scores.argmax(dim=1)


def top_label(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """Probability of the predicted class, and whether that class is true (bool), both ``(N,)``."""
    predicted = predicted_class(predictions)
    confidence = probabilities(predictions).gather(1, predicted[:, None]).squeeze(1)
    return confidence, predicted == predictions.target


def _as_tensor(value: object) -> object:
    """View a numeric array as a tensor and leave anything else to the caller's checks."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        return value
    # torch reads neither long double nor a foreign byte order, and no negative strides.
    dtype = np.float64 if value.dtype.itemsize > 8 else value.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(value, dtype, ["C_CONTIGUOUS", "WRITEABLE"]))


def _read_target(target: object, scores: Tensor) -> Tensor:
    batch, n_classes = scores.shape
    expected = f"integer class indices of shape ({batch},)"
    if target is None:
        raise TypeError(wrong("target", expected, "nothing", "pass target="))
    indices = _as_tensor(target)
    if not isinstance(indices, Tensor):
        raise TypeError(wrong("target", expected, describe(target)))
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(wrong("target", expected, describe(target), "convert it to int64"))
    # On the CPU the range is checked too; on an accelerator a bad index would end the process.
    indices = check_target(
        indices.detach().cpu().long(), batch, n_classes, device=torch.device("cpu")
    )
    return indices.to(scores.device)


def _check_logit_rows(logits: Tensor) -> None:
    largest = logits.amax(dim=1)  # NaN if the row holds one
    bad = largest.isnan() | (largest == torch.inf)
    if bad.any():
        expected = "finite logits, or -inf for a masked class"
        raise ValueError(wrong("logits", expected, f"{_rows(bad)} with NaN or +inf"))
    masked = largest == -torch.inf
    if masked.any():
        expected = "at least one class above -inf in every row"
        raise ValueError(wrong("logits", expected, f"{_rows(masked)} of -inf only"))


def _check_probability_rows(probs: Tensor, tolerance: float) -> None:
    bad = ~probs.isfinite().all(dim=1)
    if bad.any():
        raise ValueError(wrong("probs", "finite values", f"{_rows(bad)} with NaN or infinity"))
    lowest, total = probs.amin(dim=1), probs.sum(dim=1)
    bad = (lowest < 0) | ((total - 1).abs() > tolerance)
    if bad.any():
        first = int(bad.nonzero()[0])
        expected = f"rows of probabilities in [0, 1] that sum to 1 within {tolerance:.2g}"
        got = (
            f"{_rows(bad)} that do not fit, first row {first} "
            f"with minimum {lowest[first]:.4g} and sum {total[first]:.4g}"
        )
        raise ValueError(wrong("probs", expected, got, "if these are logits pass logits="))


def _rows(bad: Tensor) -> str:
    return f"{int(bad.sum())} of {len(bad)} rows"
