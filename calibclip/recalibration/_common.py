"""What the recalibration maps share: reading of predictions, blocks of rows, plain state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_floating, wrong
from calibclip.metrics._predictions import ArrayLike, Predictions, as_tensor, read_predictions

State = TypeVar("State", bound="PlainState")

# Entries of a block of rows that is worked on in float64: 2 MB, which stay in the cache.
_BLOCK = 2**18


class RecalibrationWarning(UserWarning):
    """A map was fitted, but the data do not determine it, or the fit did not converge."""


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
        """
        return cls(**state)


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
    """Check confidences and send them through a curve, in the dtype in which it was fitted."""
    given = check_floating("confidence", as_tensor(confidence), shape="(..., N)").detach()
    outside = ~((given >= 0) & (given <= 1))
    if outside.any():
        got = f"{int(outside.sum())} of {given.numel()} that are not"
        raise ValueError(wrong("confidence", "numbers in [0, 1]", got))
    wide = given.to(torch.float64 if given.dtype == torch.float64 else torch.float32)
    if wide.device.type == "mps":
        wide = wide.cpu()  # MPS has no float64
    return like(curve(wide), confidence)
