"""Accuracy, proper scores and calibration error of class predictions.

Every function takes exactly one of ``probs=`` and ``logits=``, both of shape ``(N, K)`` with
``K >= 2``, and ``target=``, integer class indices of shape ``(N,)``. Which of the two was given is
never guessed from the values: CLIP's cosines often lie in [0, 1] and would pass for probabilities.
PyTorch tensors and NumPy arrays, on any device, may be mixed; they are never modified. Results are
Python floats without a unit, and NaN when ``N = 0``.
"""

from calibclip.metrics.calibration import (
    ReliabilityTable,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_table,
)
from calibclip.metrics.scores import accuracy, brier_score, negative_log_likelihood

__all__ = [
    "ReliabilityTable",
    "accuracy",
    "brier_score",
    "expected_calibration_error",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "reliability_table",
]
