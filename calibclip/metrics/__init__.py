"""Accuracy, proper scores, calibration, failure detection and uncertainty under attack.

A metric of class predictions takes exactly one of ``probs=`` and ``logits=``, both of shape
``(N, K)`` with ``K >= 2``, and ``target=``, integer class indices of shape ``(N,)``. Which of the
two was given is never guessed from the values: CLIP's cosines often lie in [0, 1] and would pass
for probabilities. PyTorch tensors and NumPy arrays, on any device, may be mixed; they are never
modified. Results are Python floats without a unit, and NaN when ``N = 0``.

Most functions have a class, with ``update``, ``compute``, ``merge``, ``reset`` and ``state_dict``,
for data that comes in batches or on several processes. ``calibclip.metrics.torchmetrics`` takes
them into a collection of torchmetrics.
"""

from calibclip.metrics._streaming import (
    MetricWarning,
)
from calibclip.metrics._table import ReliabilityTable
from calibclip.metrics.acceptance import (
    AcceptedAndWrong,
    CleanThreshold,
    accepted_and_wrong,
    clean_threshold,
)
from calibclip.metrics.bootstrap import (
    Interval,
    bootstrap_interval,
    calibration_error_interval,
)
from calibclip.metrics.calibration import (
    ExpectedCalibrationError,
    MaximumCalibrationError,
    SignedCalibrationError,
    SignedErrorTerms,
    expected_calibration_error,
    maximum_calibration_error,
    signed_calibration_error,
)
from calibclip.metrics.calibration_shift import (
    CalibrationShiftSummary,
    OverconfidenceOnErrors,
    OverconfidenceTerms,
    calibration_shift,
    overconfidence_on_errors,
)
from calibclip.metrics.classwise import (
    ClasswiseCalibrationError,
    classwise_calibration_error,
)
from calibclip.metrics.detection import (
    DetectionAUPR,
    DetectionAUROC,
    DetectionFPR95,
    detection_aupr,
    detection_auroc,
    detection_fpr95,
)
from calibclip.metrics.group import (
    MetricGroup,
)
from calibclip.metrics.kernel import (
    KernelCalibrationError,
    MaximumMeanCalibrationError,
    kernel_calibration_error,
    mmce,
)
from calibclip.metrics.multilabel import (
    AveragePrecisions,
    MeanAveragePrecision,
    MultilabelPrecisionRecallF1,
    PrecisionRecallF1,
    mean_average_precision,
    multilabel_precision_recall_f1,
)
from calibclip.metrics.ranking import (
    FailureAUPRError,
    FailureAUPRSuccess,
    FailureAUROC,
    FailureFPR95,
    FailureScores,
    FPRAtTPR,
    failure_aupr_error,
    failure_aupr_success,
    failure_auroc,
    failure_fpr95,
    failure_scores,
    fpr_at_tpr,
)
from calibclip.metrics.reliability import (
    Reliability,
    binary_reliability_table,
    reliability_table,
)
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
from calibclip.metrics.selective import (
    AUGRC,
    AURC,
    CoverageAtRisk,
    ExcessAURC,
    RiskCoverage,
    RiskCoverageCurve,
    augrc,
    aurc,
    coverage_at_risk,
    excess_aurc,
    risk_coverage_curve,
)
from calibclip.metrics.shift import (
    ShiftSummary,
    UncertaintyShift,
    harmonic_mean_accuracy,
    uncertainty_shift,
)
from calibclip.metrics.smooth import (
    SmoothCalibrationError,
    smooth_calibration_error,
)
from calibclip.metrics.sweep import (
    SweepCalibrationError,
    sweep_calibration_error,
)

__all__ = [
    "AUGRC",
    "AURC",
    "AcceptedAndWrong",
    "Accuracy",
    "AveragePrecisions",
    "BrierDecomposition",
    "BrierScore",
    "BrierTerms",
    "CalibrationShiftSummary",
    "ClasswiseCalibrationError",
    "CleanThreshold",
    "CoverageAtRisk",
    "DetectionAUPR",
    "DetectionAUROC",
    "DetectionFPR95",
    "ExcessAURC",
    "ExpectedCalibrationError",
    "FPRAtTPR",
    "FailureAUPRError",
    "FailureAUPRSuccess",
    "FailureAUROC",
    "FailureFPR95",
    "FailureScores",
    "Interval",
    "KernelCalibrationError",
    "MaximumCalibrationError",
    "MaximumMeanCalibrationError",
    "MeanAveragePrecision",
    "MetricGroup",
    "MetricWarning",
    "MultilabelPrecisionRecallF1",
    "NegativeLogLikelihood",
    "OverconfidenceOnErrors",
    "OverconfidenceTerms",
    "PrecisionRecallF1",
    "Reliability",
    "ReliabilityTable",
    "RiskCoverage",
    "RiskCoverageCurve",
    "Sharpness",
    "SharpnessTerms",
    "ShiftSummary",
    "SignedCalibrationError",
    "SignedErrorTerms",
    "SmoothCalibrationError",
    "SweepCalibrationError",
    "UncertaintyShift",
    "accepted_and_wrong",
    "accuracy",
    "augrc",
    "aurc",
    "binary_reliability_table",
    "bootstrap_interval",
    "brier_decomposition",
    "brier_score",
    "calibration_error_interval",
    "calibration_shift",
    "classwise_calibration_error",
    "clean_threshold",
    "coverage_at_risk",
    "detection_aupr",
    "detection_auroc",
    "detection_fpr95",
    "excess_aurc",
    "expected_calibration_error",
    "failure_aupr_error",
    "failure_aupr_success",
    "failure_auroc",
    "failure_fpr95",
    "failure_scores",
    "fpr_at_tpr",
    "harmonic_mean_accuracy",
    "kernel_calibration_error",
    "maximum_calibration_error",
    "mean_average_precision",
    "mmce",
    "multilabel_precision_recall_f1",
    "negative_log_likelihood",
    "overconfidence_on_errors",
    "reliability_table",
    "risk_coverage_curve",
    "sharpness",
    "signed_calibration_error",
    "smooth_calibration_error",
    "sweep_calibration_error",
    "uncertainty_shift",
]
