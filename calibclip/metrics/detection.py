"""Detection of adversarial images: does the uncertainty tell them from clean ones?

The two sets need not be of equal size or of the same images. What is ranked is the uncertainty,
larger for the adversarial image; the positive class is named where it makes a difference.
"""

from __future__ import annotations

from calibclip._checks import check_choice
from calibclip.metrics import _ranking_measures as measures
from calibclip.metrics._predictions import ArrayLike
from calibclip.metrics._ranking_state import DetectionMetric, Tally, in_float64

POSITIVES = ("adv", "clean")


def detection_auroc(
    uncertainty_clean: ArrayLike, uncertainty_adv: ArrayLike, *, nan: str = "raise"
) -> float:
    r"""Area under the ROC curve of adversarial against clean images.

    .. math:: P(u_\mathrm{adv} > u_\mathrm{clean}) + \tfrac12 P(u_\mathrm{adv} = u_\mathrm{clean})

    over all pairs of a clean and an adversarial image, not only those of one image. Below 0.5 the
    attack makes the model more certain. Exchanging the classes and the sign of the score leaves it
    as it is.

    Args:
        uncertainty_clean: Larger is less certain, shape ``(N,)``, floating point; infinity is
            legal. Compared in the dtype given.
        uncertainty_adv: The same of adversarial images, shape ``(M,)``.
        nan: What an uncertainty of NaN does: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float in [0, 1]; NaN unless there are images of both kinds.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape or an option is wrong, or an uncertainty is NaN.

    Example:
        >>> import torch
        >>> detection_auroc(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.3, 0.4]))
        0.75
    """
    metric = in_float64(DetectionAUROC(nan=nan))
    return metric.update(uncertainty_clean, uncertainty_adv).compute(sync=False)


def detection_aupr(
    uncertainty_clean: ArrayLike,
    uncertainty_adv: ArrayLike,
    *,
    positive: str = "adv",
    nan: str = "raise",
) -> float:
    """Area under the precision-recall curve of adversarial images: the average precision.

    As `failure_aupr_error`, of the positive class named. It depends on the share of adversarial
    images in the data.

    Args:
        uncertainty_clean: Larger is less certain, shape ``(N,)``, floating point.
        uncertainty_adv: The same of adversarial images, shape ``(M,)``.
        positive: ``"adv"``: found where the uncertainty is at least a threshold. ``"clean"``: where
            it is at most one.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``, see `detection_auroc`.

    Returns:
        A float in [0, 1]; NaN if there is no image of the positive class.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape or an option is wrong, or an uncertainty is NaN.

    Example:
        >>> import torch
        >>> clean, adv = torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.4])
        >>> round(detection_aupr(clean, adv), 4)  # (1 + 2/3) / 2
        0.8333
    """
    metric = in_float64(DetectionAUPR(positive=positive, nan=nan))
    return metric.update(uncertainty_clean, uncertainty_adv).compute(sync=False)


def detection_fpr95(
    uncertainty_clean: ArrayLike,
    uncertainty_adv: ArrayLike,
    *,
    positive: str = "adv",
    nan: str = "raise",
) -> float:
    """False positive rate at a true positive rate of 95 %, of the positive class named.

    With ``"adv"``: the share of clean images that is rejected when at least 95 % of the adversarial
    ones are. With ``"clean"``, as is usual in the detection of out-of-distribution data: the share
    of adversarial images that is accepted when at least 95 % of the clean ones are. The two are
    different numbers. Ties count against the detector, see `fpr_at_tpr`.

    Args:
        uncertainty_clean: Larger is less certain, shape ``(N,)``, floating point.
        uncertainty_adv: The same of adversarial images, shape ``(M,)``.
        positive: ``"adv"`` or ``"clean"``.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``, see `detection_auroc`.

    Returns:
        A float in [0, 1], small is good; NaN unless there are images of both kinds.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape or an option is wrong, or an uncertainty is NaN.

    Example:
        >>> import torch
        >>> clean, adv = torch.tensor([0.1, 0.2, 0.3, 0.6]), torch.tensor([0.4, 0.5, 0.7, 0.8])
        >>> detection_fpr95(clean, adv), detection_fpr95(clean, adv, positive="clean")
        (0.25, 0.5)

    References:
        Liang, Li, Srikant (2018), Enhancing the Reliability of Out-of-distribution Image Detection
        in Neural Networks, section 4 (with in-distribution data as positive),
        https://arxiv.org/abs/1706.02690
    """
    metric = in_float64(DetectionFPR95(positive=positive, nan=nan))
    return metric.update(uncertainty_clean, uncertainty_adv).compute(sync=False)


class DetectionAUROC(DetectionMetric[float]):
    """`detection_auroc` of a stream.

    Args:
        sketch: Keep a histogram of 65,536 bins, 1 MB however many samples, instead of 5 bytes a
            sample. ``error_bound()`` tells how far the value may be off. Either way uncertainties
            are rounded to float32.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``nan`` is none of the three.

    Example:
        >>> import torch
        >>> metric = DetectionAUROC().update(torch.tensor([0.1, 0.3]))
        >>> metric.update(uncertainty_adv=torch.tensor([0.2, 0.3, 0.4])).compute()
        0.75
    """

    def __init__(self, *, sketch: bool = False, nan: str = "raise") -> None:
        super().__init__(sketch=sketch, nan=nan)

    def _measure(self, tally: Tally) -> float:
        return measures.auroc(tally.positive, tally.negative)

    def _range(self, tally: Tally) -> tuple[float, float]:
        return measures.auroc_range(tally.positive, tally.negative)


class _OfPositive(DetectionMetric[float]):
    """Base of the metrics that depend on which class is called positive."""

    def __init__(self, *, positive: str = "adv", sketch: bool = False, nan: str = "raise") -> None:
        check_choice("positive", positive, POSITIVES)
        super().__init__(positive=positive, sketch=sketch, nan=nan)

    def _tally(self) -> Tally:
        tally = super()._tally()
        return tally if self.options["positive"] == "adv" else tally.flipped()


class DetectionAUPR(_OfPositive):
    """`detection_aupr` of a stream.

    Args:
        positive: ``"adv"`` or ``"clean"``.
        sketch: Keep a histogram instead of 5 bytes a sample, see `DetectionAUROC`.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``positive`` or ``nan`` is none of its values.

    Example:
        >>> import torch
        >>> DetectionAUPR().update(torch.tensor([0.2]), torch.tensor([0.1])).compute()
        0.5
    """

    def _measure(self, tally: Tally) -> float:
        return measures.average_precision(tally.positive, tally.negative)

    def _range(self, tally: Tally) -> tuple[float, float]:
        return measures.average_precision_range(tally.positive, tally.negative)


class DetectionFPR95(_OfPositive):
    """`detection_fpr95` of a stream.

    Args:
        positive: ``"adv"`` or ``"clean"``.
        sketch: Keep a histogram instead of 5 bytes a sample, see `DetectionAUROC`.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``positive`` or ``nan`` is none of its values.

    Example:
        >>> import torch
        >>> DetectionFPR95().update(torch.tensor([0.2]), torch.tensor([0.1])).compute()
        1.0
    """

    def _measure(self, tally: Tally) -> float:
        return measures.fpr_at_tpr(tally.positive, tally.negative, 0.95)

    def _range(self, tally: Tally) -> tuple[float, float]:
        return measures.fpr_at_tpr_range(tally.positive, tally.negative, 0.95)
