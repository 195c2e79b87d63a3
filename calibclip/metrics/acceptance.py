"""What a threshold set on clean data lets through when the images are adversarial."""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_number, describe, wrong
from calibclip.metrics._predictions import ArrayLike, Faults, read_flags
from calibclip.metrics._ranking_state import (
    RankingMetric,
    Tally,
    in_float64,
    read_ranked,
    sketch_edges,
    sketch_index,
)
from calibclip.metrics._streaming import Column, Metric


def clean_threshold(
    uncertainty_clean: ArrayLike, coverage: float = 0.95, *, nan: str = "raise"
) -> float:
    """Smallest threshold that accepts a share of the clean predictions.

    A prediction is accepted if its uncertainty is at most the threshold, which is the k-th smallest
    uncertainty with k the least integer of at least ``coverage * N``: never interpolated, so that
    the coverage is reached; ties may take it beyond.

    Args:
        uncertainty_clean: Larger is less certain, shape ``(N,)``, floating point; infinity is
            legal.
        coverage: Share to accept, in [0, 1].
        nan: What an uncertainty of NaN does: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        The threshold, a float in the unit of the uncertainty: minus infinity for a coverage of 0,
        NaN if N = 0.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape or an option is wrong, or an uncertainty is NaN.

    Example:
        >>> clean_threshold(torch.tensor([1.0, 2.0, 3.0, 4.0]), coverage=0.75)
        3.0
    """
    metric = in_float64(CleanThreshold(coverage, nan=nan))
    return metric.update(uncertainty_clean).compute(sync=False)


def accepted_and_wrong(
    uncertainty_adv: ArrayLike, correct_adv: ArrayLike, threshold: float, *, nan: str = "raise"
) -> float:
    r"""Share of all predictions that are accepted and wrong, at a threshold set elsewhere.

    .. math:: P(u_\mathrm{adv} \le t,\ \mathrm{error})

    with t from `clean_threshold`, since who sets it has not seen the attack. An attack does harm
    where the model is wrong without knowing it.

    Args:
        uncertainty_adv: Larger is less certain, shape ``(N,)``, floating point; infinity is legal.
        correct_adv: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.
        threshold: Predictions of at most this uncertainty are accepted, ties included.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``, see `clean_threshold`.

    Returns:
        A float in [0, 1], relative to all N and not only those accepted or wrong; NaN if N = 0 or
        the threshold is NaN.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape or an option is wrong, an uncertainty is NaN, or ``correct_adv`` is
            neither 0 nor 1.

    Example:
        >>> threshold = clean_threshold(torch.tensor([1.0, 2.0, 3.0, 4.0]), coverage=0.75)
        >>> uncertainty, correct = torch.tensor([1.0, 3.0, 3.5, 9.0]), torch.tensor([1, 0, 0, 0])
        >>> accepted_and_wrong(uncertainty, correct, threshold)
        0.25
    """
    metric = AcceptedAndWrong(threshold, nan=nan)
    return metric.update(uncertainty_adv, correct_adv).compute(sync=False)


class CleanThreshold(RankingMetric[float]):
    """`clean_threshold` of a stream.

    Args:
        coverage: Share to accept, in [0, 1].
        sketch: Keep a histogram of 65,536 bins, 1 MB however many samples, instead of 5 bytes a
            sample. The value is the largest number of the decisive bin, so that the coverage is
            reached; ``error_bound()`` is the width of the bin, at most 1 / 128 of its size. Either
            way uncertainties are rounded to float32.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> metric = CleanThreshold(0.75)
        >>> for uncertainty in torch.tensor([[1.0, 2.0], [3.0, 4.0]]):
        ...     _ = metric.update(uncertainty)
        >>> metric.compute()
        3.0
    """

    _SCORES = "uncertainty_clean"

    def __init__(self, coverage: float = 0.95, *, sketch: bool = False, nan: str = "raise") -> None:
        coverage = check_number("coverage", coverage, at_least=0, at_most=1)
        super().__init__(coverage=coverage, sketch=sketch, nan=nan)

    def update(self, uncertainty_clean: ArrayLike) -> CleanThreshold:
        """Take in a batch.

        Args:
            uncertainty_clean: Larger is less certain, shape ``(N,)``, floating point.

        Returns:
            The metric itself.

        Raises:
            TypeError: It is no floating tensor or array.
            ValueError: Its shape is wrong, or a value is NaN.
        """
        score, bad = read_ranked("uncertainty_clean", uncertainty_clean, self.options["nan"])
        self._take(score, torch.zeros_like(bad), bad)
        return self

    def _measure(self, tally: Tally) -> float:
        if not len(tally.score):
            return math.nan
        if self.options["coverage"] == 0:
            return -math.inf
        accepted = np.cumsum(tally.positive + tally.negative)
        return float(tally.score[np.argmax(accepted / accepted[-1] >= self.options["coverage"])])

    def _range(self, tally: Tally) -> tuple[float, float]:
        value = self._measure(tally)
        index = sketch_index(torch.tensor([value], dtype=torch.float32))
        return float(sketch_edges(index.numpy())[0].item()), value


class AcceptedAndWrong(Metric[float]):
    """`accepted_and_wrong` of a stream: two counts, whatever the number of samples.

    Args:
        threshold: From `clean_threshold`. A `CleanThreshold` has rounded float64 uncertainties to
            float32; pass float32 to both, then ties are ties.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: ``threshold`` is not a number.
        ValueError: ``nan`` is none of the three.

    Example:
        >>> metric = AcceptedAndWrong(threshold=2.0)
        >>> metric.update(torch.tensor([2.0, 3.0]), torch.tensor([0, 0])).compute()
        0.5
    """

    _SCORES = "uncertainty_adv"
    _INFINITY_IS_LEGAL = True

    def __init__(self, threshold: float, *, nan: str = "raise") -> None:
        if isinstance(threshold, Tensor):
            remedy = "pass float(threshold)"
            raise TypeError(wrong("threshold", "a number", describe(threshold), remedy))
        if isinstance(threshold, bool) or not isinstance(threshold, Real):
            raise TypeError(wrong("threshold", "a number", describe(threshold)))
        super().__init__(threshold=float(threshold), nan=nan)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        names = ("n_samples", "n_accepted_wrong")
        return {name: torch.zeros((), dtype=torch.int64) for name in names}, {}

    def update(self, uncertainty_adv: ArrayLike, correct_adv: ArrayLike) -> AcceptedAndWrong:
        """Take in a batch.

        Args:
            uncertainty_adv: Larger is less certain, shape ``(N,)``, floating point.
            correct_adv: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.

        Returns:
            The metric itself.

        Raises:
            TypeError: ``uncertainty_adv`` is not floating, or one of the two is no tensor or array.
            ValueError: A shape is wrong, a value is NaN, or ``correct_adv`` is neither 0 nor 1.
        """
        score, bad = read_ranked("uncertainty_adv", uncertainty_adv, self.options["nan"])
        wrongly = ~read_flags("correct_adv", correct_adv, score)
        self.count_faults(Faults.none()._replace(nonfinite=bad.sum()))
        # NaN is not accepted, and with nan="omit" it does not count either.
        accepted = score.double() <= self.options["threshold"]
        self._add(n_samples=(~bad).sum(), n_accepted_wrong=(accepted & wrongly).sum())
        return self

    def _value(self) -> float:
        n_samples = int(self._sums["n_samples"])
        if n_samples == 0 or math.isnan(self.options["threshold"]):
            return math.nan
        return int(self._sums["n_accepted_wrong"]) / n_samples
