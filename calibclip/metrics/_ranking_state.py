"""State of the metrics that rank samples: one score and one flag a sample, or their histogram.

Whatever the state, a value is worked out from a `Tally`: how many samples of either class there are
at each distinct score. The bins of a histogram are a tally, too, of scores that were rounded up.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from calibclip._checks import check_flag, check_floating, wrong
from calibclip.metrics._predictions import (
    REMEDY,
    ArrayLike,
    Faults,
    as_tensor,
    read_flags,
    widened,
)
from calibclip.metrics._streaming import Column, Metric, Value

N_BINS = 2**16
"""Bins of the sketch, one for each upper half of the bits of a float32."""

_INFINITY = 0x7F800000


class Tally(NamedTuple):
    """Samples at each distinct score, in ascending order of the score."""

    score: np.ndarray
    """The scores, float64."""
    positive: np.ndarray
    """Number of samples whose flag is set, int64."""
    negative: np.ndarray
    """Number of the other samples, int64."""

    def flipped(self) -> Tally:
        """Return the tally of minus the score, in which the other class is the positive one."""
        return Tally(-self.score[::-1], self.negative[::-1], self.positive[::-1])


def tally_columns(score: Tensor, flag: Tensor) -> Tally:
    """Count samples at each distinct score.

    Args:
        score: Shape ``(N,)``, floating, without NaN.
        flag: 0 or 1, shape ``(N,)``, on the same device.

    Returns:
        The tally.
    """
    if score.device.type == "cpu":
        order = torch.from_numpy(np.argsort(score.numpy()))  # in half the time of torch.sort
        ranked = score[order]
    else:
        ranked, order = score.sort()
    is_last = torch.ones_like(ranked, dtype=torch.bool)
    is_last[:-1] = ranked[1:] != ranked[:-1]
    ends = is_last.nonzero().squeeze(1)
    positive = flag[order].cumsum(0, dtype=torch.int64)[ends].cpu().numpy()
    total = ends.cpu().numpy() + 1
    positive, total = (np.diff(counts, prepend=0) for counts in (positive, total))
    return Tally(ranked[ends].double().cpu().numpy(), positive, total - positive)


def sketch_index(score: Tensor) -> Tensor:
    """Return the bin of the sketch of each score, int64, ascending in the score.

    A bin holds the numbers that agree in sign, exponent and the first 7 bits of the fraction: they
    are within 1 / 128 of each other's size.

    Args:
        score: Shape ``(N,)``, float32.
    """
    bits = (score + 0.0).view(torch.int32)  # -0 + 0 is 0: the two are equal numbers
    # As integers the bits of a float rank as it does, but backwards below zero.
    key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (key >> 16).long() + N_BINS // 2


def sketch_edges(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest number of bins of the sketch, float64."""
    lowest = (index.astype(np.int64) - N_BINS // 2) << 16
    # Beyond the keys of the two infinities are those of NaN.
    keys = np.clip([lowest, lowest + 0xFFFF], ~_INFINITY, _INFINITY).astype(np.int32)
    lower, upper = np.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(np.float32).astype(np.float64)
    return lower, upper


def read_ranked(argument: str, value: object, nan: str) -> tuple[Tensor, Tensor]:
    """Check scores; infinite ones are legal, they rank first or last.

    Args:
        argument: Name for messages.
        value: Shape ``(N,)``, floating, a tensor or an array.
        nan: What NaN does: ``"raise"`` (on the CPU at once), ``"omit"`` or ``"propagate"``.

    Returns:
        The scores, float64 if given so, else float32, and which of them are NaN.
    """
    given = check_floating(argument, as_tensor(value), shape="(N,)", ndim=1, empty=True)
    scores = widened(given)
    bad = scores.isnan()
    if nan == "raise" and bad.device.type == "cpu" and bad.any():
        got = f"{int(bad.sum())} of {len(bad)} that are NaN"
        raise ValueError(wrong(argument, "numbers", got, REMEDY))
    return scores, bad


class RankingMetric(Metric[Value]):
    """Base of the metrics that depend on the order of scores alone.

    Args:
        options: Options of the metric, among them ``nan`` and ``sketch``.
    """

    _INFINITY_IS_LEGAL = True

    def __init__(self, **options: Any) -> None:
        check_flag("sketch", options["sketch"])
        super().__init__(**options)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        if self.options["sketch"]:
            return {"counts": torch.zeros(2 * N_BINS, dtype=torch.int64)}, {}
        return {}, {"score": Column(torch.float32), "flag": Column(torch.uint8)}

    def _take(self, score: Tensor, flag: Tensor, bad: Tensor) -> None:
        """Take in scores, which of them are of the positive class, and which are NaN."""
        self.count_faults(Faults.none()._replace(nonfinite=bad.sum()))
        if self.options["nan"] == "omit":
            score, flag = score[~bad], flag[~bad]
        if self.options["sketch"]:
            self._count(sketch_index(score.float()) + N_BINS * flag.long())
        else:
            self._append(score=score, flag=flag)

    def _count(self, index: Tensor) -> None:
        """Count bins in place: adding 1 MB for a small batch would take longer than all else."""
        counts = self._sums["counts"]
        if counts.device != index.device or counts.is_inference():
            # A tensor made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                counts = self._sums["counts"] = counts.to(index.device, copy=True)
        counts.index_add_(0, index, torch.ones_like(index))

    def _tally(self) -> Tally:
        if not self.options["sketch"]:
            return tally_columns(self._columns["score"].values, self._columns["flag"].values)
        negative, positive = self._sums["counts"].view(2, N_BINS).cpu().numpy()
        index = np.flatnonzero(negative + positive)
        return Tally(sketch_edges(index)[1], positive[index], negative[index])

    def _value(self) -> Value:
        return self._measure(self._tally())

    @abstractmethod
    def _measure(self, tally: Tally) -> Value:
        """Return the value of a tally."""

    def _range(self, tally: Tally) -> tuple[float, float]:
        """Return the least and the largest value of the rankings that a sketch may stand for.

        This one promises nothing.
        """
        return -math.inf, math.inf

    def _bound(self, tally: Tally) -> float:
        value = self._measure(tally)
        if not isinstance(value, float) or math.isnan(value):
            return math.nan
        # Where both are the same infinity the difference would be NaN.
        return max(abs(value - end) if value != end else 0.0 for end in self._range(tally))

    def error_bound(self, sync: bool | dist.ProcessGroup | None = None) -> float:
        """Return how far the value of the sketch may be from that of all scores.

        The bound holds for the scores in float32, for any of their orders within the bins, up to
        rounding of the last digits; it is worked out from the counts and not an estimate.

        Args:
            sync: As of `compute`.

        Returns:
            The largest distance, 0 without a sketch; NaN where the value is.

        Raises:
            ValueError: As `compute`.

        Warns:
            MetricWarning: As `compute`.
        """
        metric = self._synced(sync)
        if not isinstance(metric, RankingMetric) or not self.options["sketch"]:
            return 0.0
        metric._checked_value()  # raises and warns
        if self.options["nan"] == "propagate" and metric.n_faulty:
            return math.nan
        return metric._bound(metric._tally())


class FailureMetric(RankingMetric[Value]):
    """Base of the metrics of failure detection, whose positive class is the error."""

    _SCORES = "uncertainty"

    def update(self, uncertainty: ArrayLike, correct: ArrayLike) -> FailureMetric[Value]:
        """Take in a batch.

        Args:
            uncertainty: Larger is less certain, shape ``(N,)``, floating point.
            correct: Whether the prediction is right, shape ``(N,)``, bool or 0 and 1.

        Returns:
            The metric itself.

        Raises:
            TypeError: ``uncertainty`` is not floating, or one of the two is no tensor or array.
            ValueError: A shape is wrong, a value is NaN, or ``correct`` is neither 0 nor 1.
        """
        score, bad = read_ranked("uncertainty", uncertainty, self.options["nan"])
        self._take(score, ~read_flags("correct", correct, score), bad)
        return self


class DetectionMetric(RankingMetric[Value]):
    """Base of the metrics of the detection of adversarial images, which are the flagged class."""

    _SCORES = "uncertainty_clean, uncertainty_adv"

    def update(
        self, uncertainty_clean: ArrayLike | None = None, uncertainty_adv: ArrayLike | None = None
    ) -> DetectionMetric[Value]:
        """Take in a batch of clean images, of adversarial images, or of both.

        Args:
            uncertainty_clean: Larger is less certain, shape ``(N,)``, floating point.
            uncertainty_adv: The same of adversarial images, shape ``(M,)``.

        Returns:
            The metric itself.

        Raises:
            TypeError: Neither is given, or one is no floating tensor or array.
            ValueError: A shape is wrong, or a value is NaN.
        """
        given = {"uncertainty_clean": uncertainty_clean, "uncertainty_adv": uncertainty_adv}
        if uncertainty_clean is None and uncertainty_adv is None:
            raise TypeError(wrong(", ".join(given), "one or both", "neither"))
        nan = self.options["nan"]
        batches = [
            (*read_ranked(name, value, nan), name == "uncertainty_adv")
            for name, value in given.items()
            if value is not None
        ]
        for score, bad, is_adv in batches:
            self._take(score, torch.full_like(bad, is_adv), bad)
        return self


AnyMetric = TypeVar("AnyMetric", bound=Metric[Any])


def in_float64(metric: AnyMetric, column: str = "score") -> AnyMetric:
    """Let an empty metric keep scores in float64, for a function, whose state is short-lived.

    In float32, which is enough to stream, float64 scores that are very close would tie.
    """
    metric._columns[column] = Column(torch.float64)
    return metric
