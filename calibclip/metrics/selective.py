"""Selective prediction: the error rate among the predictions that are certain enough to accept.

A prediction is accepted if its uncertainty is at most a threshold, so that equal uncertainties are
accepted together. The coverage is the share of predictions accepted, the risk the share of errors
among them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from calibclip._checks import check_choice, check_number
from calibclip.metrics import _ranking_measures as measures
from calibclip.metrics._predictions import ArrayLike
from calibclip.metrics._ranking_measures import CONVENTIONS
from calibclip.metrics._ranking_state import FailureMetric, Tally, in_float64


@dataclass(frozen=True, eq=False, repr=False)
class RiskCoverageCurve:
    """Risk and coverage at each distinct threshold, as `risk_coverage_curve` makes it.

    Columns are read-only float64 arrays of one entry a threshold, ascending; empty without samples.
    """

    coverage: np.ndarray
    """Share of samples whose uncertainty is at most the threshold; the last is 1."""
    risk: np.ndarray
    """Share of errors among them; the last is the error rate of all."""
    threshold: np.ndarray
    """The distinct uncertainties."""

    def __post_init__(self) -> None:
        for column in fields(self):
            values = np.array(getattr(self, column.name), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, column.name, values)

    def __len__(self) -> int:
        return len(self.coverage)

    def __repr__(self) -> str:
        if not len(self):
            return "RiskCoverageCurve(n_thresholds=0)"
        return (
            f"RiskCoverageCurve(n_thresholds={len(self)}, "
            f"coverage={self.coverage[0]:.4f}..1, risk={self.risk[0]:.4f}..{self.risk[-1]:.4f}, "
            f"threshold={self.threshold[0]:.4g}..{self.threshold[-1]:.4g})"
        )


def risk_coverage_curve(
    uncertainty: ArrayLike, correct: ArrayLike, *, nan: str = "raise"
) -> RiskCoverageCurve:
    r"""Risk against coverage, at every threshold that makes a difference.

    .. math:: \mathrm{coverage}(t) = P(u \le t), \qquad
        \mathrm{risk}(t) = P(\mathrm{error} \mid u \le t)

    Args:
        uncertainty: Larger is less certain, shape ``(N,)``, floating point; infinity is legal. They
            are compared in the dtype given. For a confidence c pass ``-c``; `failure_scores` gives
            one that does not saturate.
        correct: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.
        nan: What an uncertainty of NaN does: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the curve is empty).

    Returns:
        The curve.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape or an option is wrong, an uncertainty is NaN, or ``correct`` is neither
            0 nor 1.

    Example:
        >>> import torch
        >>> uncertainty, correct = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1, 0, 1, 1])
        >>> curve = risk_coverage_curve(uncertainty, correct)
        >>> curve
        RiskCoverageCurve(n_thresholds=3, coverage=0.2500..1, risk=0.0000..0.2500, threshold=1..3)
        >>> curve.risk.round(4).tolist()
        [0.0, 0.3333, 0.25]

    References:
        Geifman, El-Yaniv (2017), Selective Classification for Deep Neural Networks, section 2,
        https://arxiv.org/abs/1705.08500
    """
    metric = in_float64(RiskCoverage(nan=nan))
    return metric.update(uncertainty, correct).compute(sync=False)


def aurc(
    uncertainty: ArrayLike, correct: ArrayLike, convention: str = "mean", *, nan: str = "raise"
) -> float:
    r"""Area under the risk-coverage curve (AURC).

    With R(k) the risk of the k most certain of N predictions, among equal uncertainties its
    expectation over their orders, the conventions in use are

    .. math::
        \text{mean:}\quad & \frac1N \sum_{k=1}^{N} R(k) \\
        \text{trapezoid:}\quad & \frac{1}{N-1} \sum_{k=1}^{N-1} \frac{R(k) + R(k+1)}{2} \\
        \text{fd-shifts:}\quad & \sum_{t} (\kappa_t - \kappa_{t-1}) \frac{R_{t-1} + R_t}{2},
            \quad \kappa_0 = 0,\ R_0 = R_1

    where the last runs over the distinct thresholds t alone, of coverage :math:`\kappa_t` and risk
    :math:`R_t`. The second, of torch-uncertainty, is R(1) where N = 1. The package fd-shifts prints
    the third times 1000. They differ by about 1/N, and over ties: name the one you report.

    Args:
        uncertainty: Larger is less certain, shape ``(N,)``, floating point; see
            `risk_coverage_curve`.
        correct: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.
        convention: ``"mean"``, ``"trapezoid"`` or ``"fd-shifts"``.
        nan: What an uncertainty of NaN does: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float in [0, 1], small is good; the error rate for a useless uncertainty, NaN if N = 0.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape or an option is wrong, an uncertainty is NaN, or ``correct`` is neither
            0 nor 1.

    Example:
        >>> import torch
        >>> uncertainty, correct = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 0])
        >>> [round(aurc(uncertainty, correct, name), 4) for name in CONVENTIONS]
        [0.3333, 0.3611, 0.2708]

    References:
        Geifman, Uziel, El-Yaniv (2019), Bias-Reduced Uncertainty Estimation for Deep Neural
        Classifiers, section 3 (mean), https://arxiv.org/abs/1805.08206
    """
    metric = in_float64(AURC(convention, nan=nan))
    return metric.update(uncertainty, correct).compute(sync=False)


def excess_aurc(
    uncertainty: ArrayLike, correct: ArrayLike, convention: str = "mean", *, nan: str = "raise"
) -> float:
    r"""Excess area under the risk-coverage curve (E-AURC).

    The `aurc` minus that of distinct uncertainties that put all errors last, by the same
    convention. For the mean of N predictions with E errors that optimum is

    .. math:: \frac1N \sum_{k=N-E+1}^{N} \frac{k-(N-E)}{k}

    The limit :math:`r + (1-r) \ln (1-r)` of large N, with r the error rate, is often subtracted
    instead; a perfect ranking then has an excess other than 0. With ``"fd-shifts"`` the value can
    be negative, as its chords over tied errors lie below the optimum's curve.

    Args:
        uncertainty: Larger is less certain, shape ``(N,)``, floating point; see
            `risk_coverage_curve`.
        correct: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.
        convention: ``"mean"``, ``"trapezoid"`` or ``"fd-shifts"``, see `aurc`.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``, see `aurc`.

    Returns:
        A float, 0 for a perfect ranking; NaN if N = 0.

    Raises:
        TypeError: A type is wrong.
        ValueError: As `aurc`.

    Example:
        >>> import torch
        >>> uncertainty, correct = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 0])
        >>> round(excess_aurc(uncertainty, correct), 4)
        0.125

    References:
        Geifman, Uziel, El-Yaniv (2019), section 3, https://arxiv.org/abs/1805.08206
    """
    metric = in_float64(ExcessAURC(convention, nan=nan))
    return metric.update(uncertainty, correct).compute(sync=False)


def augrc(uncertainty: ArrayLike, correct: ArrayLike, *, nan: str = "raise") -> float:
    r"""Area under the generalized-risk-coverage curve (AUGRC).

    The generalized risk is the share of all predictions that are accepted and wrong. Its area over
    the coverage from (0, 0), by the trapezoidal rule, is

    .. math:: (1-r)\, r\, (1 - \mathrm{AUROC}) + r^2 / 2

    with r the error rate and the AUROC of `failure_auroc`; with ties, too. Unlike the AURC it does
    not give the few most certain predictions most of the weight.

    Args:
        uncertainty: Larger is less certain, shape ``(N,)``, floating point; see
            `risk_coverage_curve`.
        correct: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``, see `aurc`.

    Returns:
        A float in [0, 1/2], small is good: r^2 / 2 for a perfect ranking, r / 2 for a useless one.
        NaN if N = 0.

    Raises:
        TypeError: A type is wrong.
        ValueError: As `aurc`.

    Example:
        >>> import torch
        >>> augrc(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 0]))
        0.1875

    References:
        Traub et al. (2024), Overcoming Common Flaws in the Evaluation of Selective Classification
        Systems, section 3, https://arxiv.org/abs/2407.01032
    """
    metric = in_float64(AUGRC(nan=nan))
    return metric.update(uncertainty, correct).compute(sync=False)


def coverage_at_risk(
    uncertainty: ArrayLike, correct: ArrayLike, risk: float, *, nan: str = "raise"
) -> float:
    """Largest coverage at which the risk is no larger than asked.

    Over the distinct thresholds of `risk_coverage_curve`, without interpolation. The risk need not
    grow with the coverage: at smaller ones it may be above.

    Args:
        uncertainty: Larger is less certain, shape ``(N,)``, floating point; see
            `risk_coverage_curve`.
        correct: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.
        risk: Error rate among the accepted predictions, in [0, 1].
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``, see `aurc`.

    Returns:
        A float in [0, 1]: 0 if no threshold has so small a risk, NaN if N = 0. It is chosen on the
        data it is measured on, which is no guarantee for other data.

    Raises:
        TypeError: A type is wrong.
        ValueError: As `aurc`, or ``risk`` is outside [0, 1].

    Example:
        >>> import torch
        >>> uncertainty, correct = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 1, 0])
        >>> coverage_at_risk(uncertainty, correct, 0.4), coverage_at_risk(uncertainty, correct, 0.0)
        (0.75, 0.25)

    References:
        Geifman, El-Yaniv (2017), section 2, https://arxiv.org/abs/1705.08500
    """
    metric = in_float64(CoverageAtRisk(risk, nan=nan))
    return metric.update(uncertainty, correct).compute(sync=False)


class RiskCoverage(FailureMetric[RiskCoverageCurve]):
    """`risk_coverage_curve` of a stream.

    Args:
        sketch: Keep a histogram of 65,536 bins, 1 MB however many samples, instead of 5 bytes a
            sample. Every point is then one of the full curve, but there are fewer.
            ``error_bound()`` is the largest distance between a risk of the full curve and the risk
            expected at its coverage if uncertainties of one bin are ties. Either way uncertainties
            are rounded to float32.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``nan`` is none of the three.

    Example:
        >>> import torch
        >>> metric = RiskCoverage()
        >>> for uncertainty in torch.tensor([[1.0, 2.0], [2.0, 3.0]]):
        ...     _ = metric.update(uncertainty, torch.tensor([1, 0]))
        >>> metric.compute()
        RiskCoverageCurve(n_thresholds=3, coverage=0.2500..1, risk=0.0000..0.5000, threshold=1..3)
    """

    def __init__(self, *, sketch: bool = False, nan: str = "raise") -> None:
        super().__init__(sketch=sketch, nan=nan)

    def _measure(self, tally: Tally) -> RiskCoverageCurve:
        accepted = np.cumsum(tally.positive + tally.negative)
        n_samples = max(int(accepted[-1]), 1) if len(accepted) else 1
        risk = np.cumsum(tally.positive) / accepted
        return RiskCoverageCurve(accepted / n_samples, risk, tally.score)

    def _bound(self, tally: Tally) -> float:
        return measures.risk_bound(tally.positive, tally.negative)


class AURC(FailureMetric[float]):
    """`aurc` of a stream.

    Args:
        convention: ``"mean"``, ``"trapezoid"`` or ``"fd-shifts"``.
        sketch: Keep a histogram of 65,536 bins, 1 MB however many samples, instead of 5 bytes a
            sample. ``error_bound()`` tells how far the value may be off. Either way uncertainties
            are rounded to float32.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``convention`` or ``nan`` is none of its values.

    Example:
        >>> import torch
        >>> AURC().update(torch.tensor([0.1, 0.2]), torch.tensor([1, 0])).compute()
        0.25
    """

    def __init__(
        self, convention: str = "mean", *, sketch: bool = False, nan: str = "raise"
    ) -> None:
        check_choice("convention", convention, CONVENTIONS)
        super().__init__(convention=convention, sketch=sketch, nan=nan)

    def _measure(self, tally: Tally) -> float:
        return measures.aurc(tally.positive, tally.negative, self.options["convention"])

    def _range(self, tally: Tally) -> tuple[float, float]:
        return measures.aurc_range(tally.positive, tally.negative, self.options["convention"])


class ExcessAURC(AURC):
    """`excess_aurc` of a stream.

    Args:
        convention: ``"mean"``, ``"trapezoid"`` or ``"fd-shifts"``.
        sketch: Keep a histogram instead of 5 bytes a sample, see `AURC`.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``convention`` or ``nan`` is none of its values.

    Example:
        >>> import torch
        >>> ExcessAURC().update(torch.tensor([0.1, 0.2]), torch.tensor([1, 0])).compute()
        0.0
    """

    def _measure(self, tally: Tally) -> float:
        return super()._measure(tally) - self._optimum(tally)

    def _range(self, tally: Tally) -> tuple[float, float]:
        lower, upper = super()._range(tally)
        return lower - self._optimum(tally), upper - self._optimum(tally)

    def _optimum(self, tally: Tally) -> float:
        n_errors, n_correct = int(tally.positive.sum()), int(tally.negative.sum())
        return measures.optimal_aurc(n_errors, n_correct, self.options["convention"])


class AUGRC(FailureMetric[float]):
    """`augrc` of a stream.

    Args:
        sketch: Keep a histogram instead of 5 bytes a sample, see `AURC`.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``sketch`` is not a bool.
        ValueError: ``nan`` is none of the three.

    Example:
        >>> import torch
        >>> AUGRC().update(torch.tensor([0.1, 0.2]), torch.tensor([1, 0])).compute()
        0.125
    """

    def __init__(self, *, sketch: bool = False, nan: str = "raise") -> None:
        super().__init__(sketch=sketch, nan=nan)

    def _measure(self, tally: Tally) -> float:
        return measures.augrc(tally.positive, tally.negative)

    def _range(self, tally: Tally) -> tuple[float, float]:
        return measures.augrc_range(tally.positive, tally.negative)


class CoverageAtRisk(FailureMetric[float]):
    """`coverage_at_risk` of a stream.

    Args:
        risk: Error rate among the accepted predictions, in [0, 1].
        sketch: Keep a histogram instead of 5 bytes a sample, see `AURC`. The value is then never
            above that of all scores.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> CoverageAtRisk(0.1).update(torch.tensor([0.1, 0.2]), torch.tensor([1, 0])).compute()
        0.5
    """

    def __init__(self, risk: float, *, sketch: bool = False, nan: str = "raise") -> None:
        risk = check_number("risk", risk, at_least=0, at_most=1)
        super().__init__(risk=risk, sketch=sketch, nan=nan)

    def _measure(self, tally: Tally) -> float:
        return measures.coverage_at_risk(tally.positive, tally.negative, self.options["risk"])

    def _range(self, tally: Tally) -> tuple[float, float]:
        return measures.coverage_at_risk_range(tally.positive, tally.negative, self.options["risk"])
