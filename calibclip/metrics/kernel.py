"""Kernel calibration errors: residuals of pairs of samples, weighted by how alike they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import threshold

from calibclip._checks import check_choice, check_count, check_number, wrong
from calibclip.metrics._binning import residuals_by_confidence
from calibclip.metrics._predictions import ArrayLike, Predictions
from calibclip.metrics._streaming import Column, PredictionMetric

CALIBRATIONS = ("full", "top-label")
ESTIMATORS = ("block", "biased", "unbiased")

# The largest exponent of the kernel is sqrt(2) / bandwidth, and exp must not overflow.
_NARROWEST = 0.01
# Pairs that are worked on at once, 512 KB of float64 that stay in the cache, and entries of
# probabilities for them, 8 MB.
_PAIRS = 2**16
_ENTRIES = 2**20


def kernel_calibration_error(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    estimator: str = "block",
    calibration: str = "full",
    bandwidth: float = 1.0,
    block_size: int = 64,
    nan: str = "raise",
) -> float:
    r"""Squared kernel calibration error (SKCE).

    .. math::
        h_{ij} = (e_{y_i} - p_i)^\top (e_{y_j} - p_j) \, \exp(-\lVert p_i - p_j \rVert / \nu)

    with the probability vector :math:`p_i`, the one-hot target :math:`e_{y_i}` and the bandwidth
    :math:`\nu`. Its mean over independent pairs is 0 for a model whose vector :math:`p` is right in
    all its entries, and positive for any other. For ``calibration="top-label"`` the residual is
    that of the predicted class, :math:`a_i - c_i` of correctness and confidence, and the distance
    :math:`|c_i - c_j|`.

    - ``"biased"``: the mean over all i and j; never negative, and above 0 by chance alone.
    - ``"unbiased"``: the mean over :math:`i < j`; may be negative.
    - ``"block"``: the mean over :math:`i < j` inside blocks of consecutive samples; also without
      bias, with more scatter. It depends on the order of the samples, which should be random, and
      leaves out what does not fill the last block.

    The cost is :math:`N^2 K` for the first two, and :math:`N B K` for blocks of B samples; of the
    top label it is :math:`N \log N` for the first two. All pairs of 10,000 samples take one core of
    a CPU about 1 s at K = 10 and 10 s at K = 1000, in tiles of a few MB.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        estimator: ``"block"``, ``"biased"`` or ``"unbiased"``.
        calibration: ``"full"`` or ``"top-label"``.
        bandwidth: :math:`\nu`, at least 0.01, in units of probability. For a valid test it must
            not be chosen from the same samples.
        block_size: Samples in a block, at least 2; the estimator of linear cost of the authors has
            2.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float, in [-2, 2], summed in float64 over probabilities in float32; NaN if there is no
        pair: for ``N = 0``, for ``N = 1`` unless biased, and below one block.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> probs, target = torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1])
        >>> kernel_calibration_error(probs, target=target, estimator="unbiased")
        -0.375
        >>> kernel_calibration_error(
        ...     probs, target=target, estimator="biased", calibration="top-label"
        ... )  # (0.25 - 0.75)^2 / 4
        0.0625

    References:
        Widmann, Lindsten, Zachariah (2019), Calibration tests in multi-class classification: A
        unifying framework, https://arxiv.org/abs/1910.11385
    """
    metric = KernelCalibrationError(
        estimator=estimator,
        calibration=calibration,
        bandwidth=bandwidth,
        block_size=block_size,
        nan=nan,
    )
    return metric.update(probs, logits, target).compute(sync=False)


def mmce(
    probs: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    target: ArrayLike | None = None,
    *,
    bandwidth: float = 0.4,
    nan: str = "raise",
) -> float:
    r"""Maximum mean calibration error (MMCE) of the predicted class.

    .. math::
        \mathrm{MMCE}^2 = \frac{1}{N^2} \sum_{i,j} (a_i - c_i) (a_j - c_j)
        \exp(-|c_i - c_j| / \nu)

    the root of the biased top-label `kernel_calibration_error`. It is positive by chance alone,
    falling as :math:`1 / \sqrt N` for a calibrated model. The cost is :math:`N \log N`: in one
    dimension the sum over pairs is one over sorted samples.

    Args:
        probs: Probabilities, shape ``(N, K)``, floating point. Give this or ``logits``.
        logits: Logits, shape ``(N, K)``, floating point. Give this or ``probs``.
        target: True classes, shape ``(N,)``, any integer dtype. Required.
        bandwidth: :math:`\nu`, at least 0.01, in units of probability.
        nan: What rows that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how many) or
            ``"propagate"`` (the result is NaN).

    Returns:
        A float in [0, 1], summed in float64; NaN if ``N = 0``.

    Raises:
        TypeError: Not exactly one of ``probs`` and ``logits`` is given, ``target`` is missing, or
            a type is wrong.
        ValueError: A shape, a class index or an option is wrong, or a row of scores is invalid.

    Example:
        >>> import torch
        >>> mmce(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), target=torch.tensor([0, 1]))
        0.25

    References:
        Kumar, Sarawagi, Jain (2018), Trainable Calibration Measures for Neural Networks from Kernel
        Mean Embeddings, https://proceedings.mlr.press/v80/kumar18a.html
    """
    metric = MaximumMeanCalibrationError(bandwidth=bandwidth, nan=nan)
    return metric.update(probs, logits, target).compute(sync=False)


class KernelCalibrationError(PredictionMetric[float]):
    """`kernel_calibration_error` of a stream.

    The state of ``"block"`` is two sums and the samples of a block that is not yet full. It carries
    over batches; after a merge, what was left in each part makes new blocks. The other estimators
    keep all samples, of ``"full"`` 4 K + 8 bytes each and of ``"top-label"`` 9. With ``"full"`` all
    samples must have the same number of classes K.

    Args:
        estimator: ``"block"``, ``"biased"`` or ``"unbiased"``.
        calibration: ``"full"`` or ``"top-label"``.
        bandwidth: Of the kernel, at least 0.01.
        block_size: Samples in a block, at least 2.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = KernelCalibrationError(block_size=2)
        >>> for label in (0, 1):
        ...     _ = metric.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([label]))
        >>> metric.compute()
        -0.375
    """

    def __init__(
        self,
        *,
        estimator: str = "block",
        calibration: str = "full",
        bandwidth: float = 1.0,
        block_size: int = 64,
        nan: str = "raise",
    ) -> None:
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("calibration", calibration, CALIBRATIONS)
        super().__init__(
            estimator=estimator,
            calibration=calibration,
            bandwidth=check_number("bandwidth", bandwidth, at_least=_NARROWEST),
            block_size=check_count("block_size", block_size, at_least=2),
            nan=nan,
        )

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        sums = {}
        if self.options["estimator"] == "block":
            sums["n_blocks"] = torch.zeros((), dtype=torch.int64)
            sums["block_means"] = torch.zeros((), dtype=torch.float64)
        columns = self._no_samples()
        if self.options["calibration"] == "full":
            columns["n_classes"] = _Distinct(torch.int64)
        return sums, columns

    def _no_samples(self) -> dict[str, Column]:
        # Of "full" a row of probabilities after the other, so that K need not be known before.
        if self.options["calibration"] == "full":
            return {"scores": Column(torch.float32), "outcome": Column(torch.int64)}
        return {"scores": Column(torch.float64), "outcome": Column(torch.uint8)}

    def prepare(self, predictions: Predictions) -> None:
        """Refuse predictions of another number of classes than those that are kept."""
        if self.options["calibration"] == "full" and len(predictions):
            _check_one("probs, logits", [*self._n_classes(), predictions.n_classes])

    def _take(self, predictions: Predictions) -> None:
        if self.options["calibration"] == "full":
            self._append(scores=predictions.probs.flatten(), outcome=predictions.target)
            if len(predictions):
                self._append(n_classes=torch.tensor([predictions.n_classes]))
        else:
            self._append(scores=predictions.confidence, outcome=predictions.correct)
        if self.options["estimator"] == "block":
            n_blocks, block_means, rest = self._full_blocks()
            self._add(n_blocks=n_blocks, block_means=block_means)
            self._columns |= self._no_samples()
            self._append(**rest)

    def _n_classes(self) -> list[int]:
        return self._columns["n_classes"].values.tolist() if "n_classes" in self._columns else []

    def _check_mergeable(self, others: Iterable[Any]) -> None:
        others = list(others)
        super()._check_mergeable(others)
        _check_one("others", [k for metric in (self, *others) for k in metric._n_classes()])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if self.options["calibration"] == "full":
            columns = state["columns"]
            scores, outcome, found = (columns[n] for n in ("scores", "outcome", "n_classes"))
            _check_one("state", found.tolist())
            if len(scores) != len(outcome) * int(found.sum()):
                expected = f"{found.tolist()} scores a sample, {len(outcome)} samples"
                raise ValueError(wrong("state", expected, f"{len(scores)} scores"))

    def _samples(self) -> tuple[Tensor, Tensor]:
        scores, outcome = (self._columns[name].values for name in ("scores", "outcome"))
        return scores.view(len(outcome), -1) if len(outcome) else scores.view(0, 1), outcome

    def _full_blocks(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the number of full blocks, the sum of their means and the columns after them."""
        size, width = self.options["block_size"], self.options["bandwidth"]
        scores, outcome = self._samples()
        n_blocks = len(outcome) // size
        end = n_blocks * size
        total = torch.zeros((), dtype=torch.float64, device=scores.device)
        if n_blocks:
            blocks = scores[:end].view(n_blocks, size, -1), outcome[:end].view(n_blocks, size)
            pairs = _full_pairs if self.options["calibration"] == "full" else _top_label_pairs
            at_once = max(
                min(_pairs_at_once(scores) // size**2, _ENTRIES // blocks[0][0].numel()), 1
            )
            for x, y in zip(*(part.split(at_once) for part in blocks), strict=True):
                terms = pairs(x, y, x, y, width)
                total += terms.sum() - terms.diagonal(dim1=1, dim2=2).sum()
        rest = {"scores": scores[end:].flatten(), "outcome": outcome[end:]}
        count = torch.full((), n_blocks, device=scores.device)
        return count, total / (size * (size - 1)), rest

    def _value(self) -> float:
        _check_one("probs, logits", self._n_classes())  # of all processes
        estimator, width = self.options["estimator"], self.options["bandwidth"]
        if estimator == "block":
            n_blocks, block_means, _ = self._full_blocks()
            count = int(self._sums["n_blocks"]) + int(n_blocks)
            total = float(self._sums["block_means"]) + float(block_means)
            return total / count if count else math.nan
        scores, outcome = self._samples()
        count = len(outcome)
        if count < (1 if estimator == "biased" else 2):
            return math.nan
        of = _sum_of_pairs if self.options["calibration"] == "full" else _sum_of_top_label_pairs
        total, diagonal = of(scores, outcome, width)
        if estimator == "biased":
            return max(total, 0.0) / count**2
        return (total - diagonal) / (count * (count - 1))


class MaximumMeanCalibrationError(PredictionMetric[float]):
    """`mmce` of a stream, with a state of 9 bytes a sample.

    Args:
        bandwidth: Of the kernel, at least 0.01.
        nan: ``"raise"``, ``"omit"`` or ``"propagate"``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> metric = MaximumMeanCalibrationError()
        >>> for label in (0, 1):
        ...     _ = metric.update(torch.tensor([[0.75, 0.25]]), target=torch.tensor([label]))
        >>> metric.compute()
        0.25
    """

    def __init__(self, *, bandwidth: float = 0.4, nan: str = "raise") -> None:
        bandwidth = check_number("bandwidth", bandwidth, at_least=_NARROWEST)
        super().__init__(bandwidth=bandwidth, nan=nan)

    def _begin(self) -> tuple[dict[str, Tensor], dict[str, Column]]:
        return {}, {"confidence": Column(torch.float64), "correct": Column(torch.uint8)}

    def _take(self, predictions: Predictions) -> None:
        self._append(confidence=predictions.confidence, correct=predictions.correct)

    def _value(self) -> float:
        confidence, correct = (self._columns[name].values for name in ("confidence", "correct"))
        if len(correct) == 0:
            return math.nan
        total, _ = _sum_of_top_label_pairs(confidence, correct, self.options["bandwidth"])
        return math.sqrt(max(total, 0.0)) / len(correct)


class _Distinct(Column):
    """Column of distinct numbers, on the CPU, where a look at them waits for nothing."""

    def append(self, values: Tensor) -> None:
        self._data = torch.cat([self.values, values.cpu()]).unique()
        self._length = len(self._data)


def _check_one(argument: str, n_classes: list[int]) -> None:
    for other in n_classes[1:]:
        if other != n_classes[0]:
            raise ValueError(wrong(argument, f"{n_classes[0]} classes, as before", other))


def _pairs_at_once(scores: Tensor) -> int:
    # On an accelerator few launches count more than a cache.
    return _PAIRS if scores.device.type == "cpu" else 64 * _PAIRS


def _full_pairs(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor, width: float) -> Tensor:
    """Return h of samples, shapes ``(..., A, K)`` and ``(..., A)``, and others: ``(..., A, B)``."""
    x, other_x = x.double(), other_x.double()
    squares, other_squares = x.square().sum(-1), other_x.square().sum(-1)
    distance = (x @ other_x.mT).mul_(-2).add_(squares[..., None]).add_(other_squares[..., None, :])
    # Equal rows differ by rounding, whose root would be 1e-8.
    distance = threshold(distance, 1e-15, 0)
    residual, other_residual = (
        p.neg().scatter_add(-1, target[..., None], p.new_ones(*target.shape, 1))
        for p, target in ((x, y), (other_x, other_y))
    )
    return distance.sqrt_().div_(-width).exp_().mul_(residual @ other_residual.mT)


def _top_label_pairs(
    x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor, width: float
) -> Tensor:
    """Return h as `_full_pairs` does, of confidences, ``(..., A, 1)``, and correctness."""
    x, other_x = x[..., 0], other_x[..., 0]
    residual = (y - x)[..., None] * (other_y - other_x)[..., None, :]
    return residual * (x[..., None] - other_x[..., None, :]).abs().div(-width).exp()


def _sum_of_pairs(probs: Tensor, target: Tensor, width: float) -> tuple[float, float]:
    """Return the sum of h over all i and j, and over i = j alone."""
    rows = max(min(math.isqrt(_pairs_at_once(probs)), _ENTRIES // probs.shape[1]), 1)
    tiles = list(zip(probs.split(rows), target.split(rows), strict=True))
    total = diagonal = torch.zeros((), dtype=torch.float64, device=probs.device)
    for i, (x, y) in enumerate(tiles):
        own = _full_pairs(x, y, x, y, width)
        total, diagonal = total + own.sum(), diagonal + own.diagonal().sum()
        for other_x, other_y in tiles[i + 1 :]:
            total = total + 2 * _full_pairs(x, y, other_x, other_y, width).sum()
    return float(total), float(diagonal)


def _sum_of_top_label_pairs(
    confidence: Tensor, correct: Tensor, width: float
) -> tuple[float, float]:
    r"""Return the sum of h over all i and j, and over i = j alone, in the time of a sort.

    Of sorted confidences :math:`e^{-|c_i - c_j|/\nu} = e^{c_i/\nu} e^{-c_j/\nu}` for i < j, and the
    sum over i is a running one. Its terms have the size of its last one at most, so that no digits
    are lost.
    """
    confidence = confidence.flatten()
    values, residuals = residuals_by_confidence(confidence, correct)
    scale = values.div(width).exp()
    before = (residuals * scale).cumsum(0) - residuals * scale
    total = residuals.square().sum() + 2 * (residuals / scale * before).sum()
    return float(total), float((correct - confidence).square().sum())
