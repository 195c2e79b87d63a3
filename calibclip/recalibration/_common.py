"""What the recalibration maps share: reading of predictions, blocks of rows, plain state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import (
    check_count,
    check_flag,
    check_floating,
    check_number,
    describe,
    wrong,
)
from calibclip.metrics._predictions import (
    ArrayLike,
    Predictions,
    as_tensor,
    read_confidence,
    read_predictions,
)

State = TypeVar("State", bound="PlainState")

# Entries of a block of rows that is worked on in float64: 2 MB, which stay in the cache.
_BLOCK = 2**18


class RecalibrationWarning(UserWarning):
    """A map was fitted, but the data do not determine it, or the fit did not converge."""


@dataclass(frozen=True)
class PlainState:
    """Turns a dataclass of plain values into a dict and back."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name: plain values, which ``json`` takes.

        Returns:
            A new dict.
        """
        return dict(vars(self))

    @classmethod
    def from_dict(cls: type[State], state: Mapping[str, Any]) -> State:
        """Make the map again from what `to_dict` returned, also after a turn through JSON.

        Args:
            state: The fields by name.

        Returns:
            A map equal to the first one.

        Raises:
            TypeError: ``state`` is no mapping, or a field has the wrong type.
            ValueError: A field is missing, unknown or out of range.
        """
        names = [field.name for field in fields(cls)]
        expected, remedy = f"the fields {', '.join(names)}", "pass what to_dict returned"
        if not isinstance(state, Mapping):
            raise TypeError(wrong("state", expected, describe(state), remedy))
        odd = [f"no {name}" for name in names if name not in state]
        odd += [f"an unknown {key!r}" for key in state if key not in names]
        if odd:
            raise ValueError(wrong("state", expected, ", ".join(odd), remedy))
        return cls(**state)


def read_list(argument: str, given: object) -> tuple[Any, ...]:
    """Return a tuple, or a list as JSON makes it, as a tuple."""
    if not isinstance(given, (tuple, list)):
        remedy = "call its tolist()" if isinstance(given, (Tensor, np.ndarray)) else ""
        raise TypeError(wrong(argument, "a tuple", describe(given), remedy))
    return tuple(given)


def read_numbers(
    argument: str, given: object, *, at_least: float | None = None, at_most: float | None = None
) -> tuple[float, ...]:
    """Check finite numbers in range."""
    return tuple(
        check_number(f"{argument}[{i}]", number, at_least=at_least, at_most=at_most)
        for i, number in enumerate(read_list(argument, given))
    )


def check_length(argument: str, values: tuple[Any, ...], length: int, of_what: str) -> None:
    """Check that there is one entry for each of something."""
    if len(values) != length:
        raise ValueError(wrong(argument, f"{length} entries, one a {of_what}", len(values)))


def check_rising(argument: str, values: tuple[float, ...], *, strictly: bool) -> None:
    """Check that each number is larger, or not smaller, than the one before."""
    for i, (one, following) in enumerate(pairwise(values), 1):
        if not (one < following or (one == following and not strictly)):
            expected = f"a number {'>' if strictly else '>='} the one before, {one}"
            raise ValueError(wrong(f"{argument}[{i}]", expected, f"{following}"))


def check_fit(fit: Any) -> None:
    """Check the fields that maps fitted by maximum likelihood share."""
    check_number("nll_before", fit.nll_before, at_least=0)
    check_number("nll_after", fit.nll_after, at_least=0)
    check_flag("converged", fit.converged)
    check_count("n_iterations", fit.n_iterations, at_least=0)
    check_count("n_samples", fit.n_samples, at_least=1)


def read_samples(
    probs: ArrayLike | None, logits: ArrayLike | None, target: ArrayLike | None
) -> Predictions:
    """Check the predictions of a fit, of which there must be one at least."""
    predictions = _refuse_nonfinite(read_predictions(probs, logits, target, nan="propagate"))
    if len(predictions) == 0:
        raise ValueError(wrong("target", "at least one sample", "none"))
    return predictions


def read_scores(probs: ArrayLike | None, logits: ArrayLike | None) -> Predictions:
    """Check predictions whose target is not known; it is filled with zeros."""
    given = as_tensor(logits if probs is None else probs)
    rows = len(given) if isinstance(given, Tensor) and given.ndim else 0
    unknown = torch.zeros(rows, dtype=torch.int64)
    return _refuse_nonfinite(read_predictions(probs, logits, unknown, nan="propagate"))


def _refuse_nonfinite(predictions: Predictions) -> Predictions:
    argument = "logits" if predictions.are_logits else "probs"
    predictions.faults.check()
    count = int(predictions.faults.nonfinite)
    if count:
        expected = "finite probabilities"
        if predictions.are_logits:
            expected = "finite logits, -inf only for masked classes and not for all of a row"
        got = f"{count} of {len(predictions)} rows with others"
        raise ValueError(wrong(argument, expected, got, "leave these rows out"))
    return predictions


def read_logits(logits: ArrayLike) -> Tensor:
    """View logits of shape ``(..., K)`` as a tensor, in the autograd graph they came with."""
    return check_floating("logits", as_tensor(logits), shape="(..., K)")


def like(result: Tensor, given: object) -> Any:
    """Return a result in the dtype, on the device and of the type of what was given."""
    model = as_tensor(given)
    if isinstance(model, Tensor):
        result = result.to(model.dtype).to(model.device)
    return result.numpy() if isinstance(given, np.ndarray) else result


def in_blocks(scores: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split the rows, so that work in float64 on a block takes little memory."""
    rows = max(_BLOCK // scores.shape[1], 1)
    if scores.device.type != "cpu":
        rows *= 64  # few launches instead of a cache
    return zip(*(part.split(rows) for part in (scores, *columns)), strict=True)


def replace_confidence(predictions: Predictions, confidence: Tensor) -> Tensor:
    """Give the predicted class a new probability, and the other classes what is left of 1.

    The others keep their proportions; if all of them are 0 they share equally.

    Args:
        predictions: N predictions over K classes.
        confidence: New probabilities of the predicted classes, shape ``(N,)``, float64.

    Returns:
        Probabilities, shape ``(N, K)``, in the dtype of the scores.
    """
    parts = []
    # Rows of rounded probabilities may add up to a little more than 1.
    confidence = confidence.clamp(0, 1)
    blocks = in_blocks(predictions.probs, predictions.predicted, confidence)
    for block, predicted, new in blocks:
        probs, predicted, new = block.double(), predicted[:, None], new[:, None]
        others = probs.scatter(1, predicted, 0.0)
        total = others.sum(1, keepdim=True)
        # Dividing first keeps the quotient in [0, 1]; (1 - new) / total could overflow.
        shares = torch.where(total > 0, others / total, 1 / (predictions.n_classes - 1))
        parts.append((shares * (1 - new)).scatter(1, predicted, new).to(block.dtype))
    return torch.cat(parts)


def calibrate_confidence(confidence: ArrayLike, curve: Callable[[Tensor], Tensor]) -> Any:
    """Check confidences of any shape and send them through a curve."""
    given = check_floating("confidence", as_tensor(confidence), shape="(..., N)", empty=True)
    scores, _ = read_confidence("confidence", given.reshape(-1))
    odd = int((~scores.isfinite()).sum())
    if odd:
        raise ValueError(wrong("confidence", "confidences in [0, 1]", f"{odd} not finite"))
    return like(curve(scores).reshape(given.shape), confidence)
