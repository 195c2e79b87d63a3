"""Accuracy, proper scores, calibration, failure detection and uncertainty under attack.

A metric of class predictions takes exactly one of ``probs=`` and ``logits=``, both of shape
``(N, K)`` with ``K >= 2``, and ``target=``, integer class indices of shape ``(N,)``. Which of the
two was given is never guessed from the values: CLIP's cosines often lie in [0, 1] and would pass
for probabilities. PyTorch tensors and NumPy arrays, on any device, may be mixed; they are never
modified. Results are Python floats without a unit, and NaN when ``N = 0``.

Each function has a class of the same name in capitals, with ``update``, ``compute``, ``merge``,
``reset`` and ``state_dict``, for data that comes in batches or on several processes.
"""

from calibclip.metrics._streaming import MetricWarning
from calibclip.metrics.calibration import (
    ExpectedCalibrationError,
    MaximumCalibrationError,
    Reliability,
    SignedCalibrationError,
    SignedErrorTerms,
    binary_reliability_table,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_table,
    signed_calibration_error,
)
from calibclip.metrics.classwise import ClasswiseCalibrationError, classwise_calibration_error
from calibclip.metrics.group import MetricGroup
from calibclip.metrics.reliability import ReliabilityTable
from calibclip.metrics.scores import (
    Accuracy,
    BrierDecomposition,
    BrierScore,
    BrierTerms,
    NegativeLogLikelihood,
    Sharpness,
    SharpnessTerms,
    accuracy,
    brier_decomposition,
    brier_score,
    negative_log_likelihood,
    sharpness,
)

__all__ = [
    "Accuracy",
    "BrierDecomposition",
    "BrierScore",
    "BrierTerms",
    "ClasswiseCalibrationError",
    "ExpectedCalibrationError",
    "MaximumCalibrationError",
    "MetricGroup",
    "MetricWarning",
    "NegativeLogLikelihood",
    "Reliability",
    "ReliabilityTable",
    "Sharpness",
    "SharpnessTerms",
    "SignedCalibrationError",
    "SignedErrorTerms",
    "accuracy",
    "binary_reliability_table",
    "brier_decomposition",
    "brier_score",
    "classwise_calibration_error",
    "expected_calibration_error",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "reliability_table",
    "sharpness",
    "signed_calibration_error",
]
