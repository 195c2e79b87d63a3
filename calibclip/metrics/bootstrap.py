"""Bootstrap intervals: how far a value would move with another sample of the same size.

All arrays of a call are resampled together, row by row. That is what pairs clean and adversarial
results of the same images: what both share does not widen the interval of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy  # loads its parts when they are used
import torch
from torch import Tensor

from calibclip._checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    describe,
    warn,
    wrong,
)
from calibclip.metrics._binning import equal_width_edges
from calibclip.metrics._predictions import (
    NAN_POLICIES,
    ArrayLike,
    raise_nonfinite,
    read_confidence,
    read_flags,
)
from calibclip.metrics._streaming import MetricWarning
from calibclip.metrics._table import CLOSED, bin_sums, tabulate

METHODS = ("percentile", "basic", "bca")

# Numbers that are gathered at once: 32 MB of float64.
_BLOCK = 2**22


class Interval(NamedTuple):
    """An estimate and the ends of its bootstrap interval."""

    estimate: float
    """Of the sample as it is."""
    lower: float
    """Lower end."""
    upper: float
    """Upper end."""
    level: float
    """Nominal coverage, such as 0.95."""

    def __str__(self) -> str:
        return f"{self.estimate:.4f} [{self.lower:.4f}, {self.upper:.4f}]"


def bootstrap_interval(
    statistic: Callable[..., Any],
    *arrays: ArrayLike,
    n_resamples: int = 1000,
    level: float = 0.95,
    method: str = "percentile",
    vectorized: bool = False,
    seed: int = 0,
) -> Interval:
    r"""Bootstrap interval of any statistic.

    N rows are drawn with replacement, the same rows of all arrays, and the statistic of each such
    resample is taken. With :math:`\theta^*_q` the q-quantile of these values, :math:`\hat\theta`
    the estimate and :math:`\alpha = 1 - \mathrm{level}`, the interval is

    .. math::
        [\theta^*_{\alpha/2}, \theta^*_{1-\alpha/2}] \text{ (percentile)}, \qquad
        [2\hat\theta - \theta^*_{1-\alpha/2}, 2\hat\theta - \theta^*_{\alpha/2}] \text{ (basic)}

    and for ``"bca"`` that of the percentiles, moved for the bias of the median and for a standard
    error that changes with the value, the latter from N statistics that leave out one row each.
    The interval says what chance did in drawing the images; nothing of chance in training or in
    the attack.

    Args:
        statistic: Called with the resampled arrays, in the order given and of the type given;
            returns one number.
        *arrays: Tensors or NumPy arrays with one row a sample, shape ``(N, ...)``.
        n_resamples: Number of resamples B, at least 1.
        level: Nominal coverage, between 0 and 1.
        method: ``"percentile"``, ``"basic"`` or ``"bca"``.
        vectorized: The statistic takes many resamples at once, arrays of shape ``(B, N, ...)``,
            and returns shape ``(B,)``.
        seed: Of the resamples, at least 0: with the same seed and N they are the same in every
            call, whatever the arrays are.

    Returns:
        The interval; all NaN if ``N = 0`` or the estimate is NaN. Between an infinite and another
        statistic nothing is interpolated: the end is the outer of the two.

    Raises:
        TypeError: An array is neither a tensor nor a NumPy array, or an option has the wrong type.
        ValueError: The numbers of rows differ, an option is out of range, or the statistic returns
            another shape.

    Warns:
        MetricWarning: The statistic of some resamples is NaN, such as a rank statistic of one class
            only. They are left out. Or the estimate is infinite, and ``"basic"`` would subtract
            infinities: both ends are NaN.

    Example:
        >>> import torch
        >>> clean = torch.tensor([0.25, 0.5, 0.75, 1.0])
        >>> bootstrap_interval(lambda a, b: (b - a).mean(), clean, clean + 0.5)
        Interval(estimate=0.5, lower=0.5, upper=0.5, level=0.95)

    References:
        Efron, Tibshirani (1993), An Introduction to the Bootstrap, chapters 13 (percentiles) and
        14 (BCa).
    """
    check_flag("vectorized", vectorized)
    options = check_options(n_resamples, level, method, seed)
    size = _common_length(arrays)
    if size == 0:
        return Interval(math.nan, math.nan, math.nan, options.level)

    def values(rows: Iterator[np.ndarray], count: int) -> np.ndarray:
        if not vectorized:
            return np.array([_number(statistic(*_take(arrays, row))) for row in rows])
        width = max(math.prod(array.shape) for array in arrays)
        step = max(_BLOCK // max(width, 1), 1)
        return np.concatenate(
            [
                _numbers(statistic(*_take(arrays, block)), len(block))
                for block in _blocks(rows, count, step)
            ]
        )

    def left_out() -> np.ndarray:
        if size == 1:
            return np.empty(0)
        everyone = np.arange(size)
        return values((np.delete(everyone, row) for row in range(size)), size)

    estimate = float(values(iter([np.arange(size)]), 1)[0])
    replicates = values(_resamples(size, options), options.n_resamples)
    return interval(estimate, replicates, options, left_out)


def calibration_error_interval(
    confidence: ArrayLike,
    correct: ArrayLike,
    n_bins: int = 15,
    *,
    closed: str = "right",
    n_resamples: int = 1000,
    level: float = 0.95,
    method: str = "percentile",
    seed: int = 0,
    nan: str = "raise",
) -> Interval:
    """Bootstrap interval of the expected calibration error.

    What `bootstrap_interval` gives of the ECE with bins of equal width, at the cost of sums.
    The ECE of a calibrated model is above 0 by chance alone, and of a resample more so: near 0 the
    percentiles lie too high, which ``"basic"`` and ``"bca"`` make up for in part.

    Args:
        confidence: Of the predicted class, shape ``(N,)``, floating point, in [0, 1].
        correct: Whether that is the true class, shape ``(N,)``, bool or 0 and 1.
        n_bins: Number of bins, at least 1.
        closed: Which edge belongs to a bin, ``"right"`` or ``"left"``.
        n_resamples: Number of resamples, at least 1.
        level: Nominal coverage, between 0 and 1.
        method: ``"percentile"``, ``"basic"`` or ``"bca"``, see `bootstrap_interval`.
        seed: Of the resamples, at least 0.
        nan: What confidences that are not finite do: ``"raise"``, ``"omit"`` (a warning tells how
            many) or ``"propagate"`` (the result is NaN).

    Returns:
        The interval; NaN if ``N = 0``.

    Raises:
        TypeError: A type is wrong.
        ValueError: A shape, a value or an option is wrong.

    Example:
        >>> import torch
        >>> confidence, correct = torch.full((100,), 0.75), torch.arange(100) % 2 == 0
        >>> print(calibration_error_interval(confidence, correct))
        0.2500 [0.1500, 0.3500]
    """
    options = check_options(n_resamples, level, method, seed)
    n_bins = check_count("n_bins", n_bins, at_least=1)
    check_choice("closed", closed, CLOSED)
    scores, _ = read_confidence("confidence", confidence)
    flags = read_flags("correct", correct, scores)
    kept = keep_finite("confidence", (scores,), nan, "calibration_error_interval")
    if kept is not None:
        scores, flags = scores[kept], flags[kept]
    if len(scores) == 0:
        return Interval(math.nan, math.nan, math.nan, options.level)
    residuals = binned_residuals(scores, flags, n_bins, closed)
    estimate = tabulate(bin_sums(scores, flags, n_bins, closed)).ece

    def errors(sums: np.ndarray, count: int) -> np.ndarray:
        return np.abs(sums).sum(axis=1) / max(count, 1)

    replicates = errors(resampled_sums(residuals, options), len(scores))
    return interval(
        estimate,
        replicates,
        options,
        lambda: errors(sums_without_one(residuals), len(scores) - 1),
    )


class Options(NamedTuple):
    """Checked options of a bootstrap."""

    n_resamples: int
    level: float
    method: str
    seed: int


def check_options(n_resamples: object, level: object, method: object, seed: object) -> Options:
    """Check the options that all bootstraps share.

    Args:
        n_resamples: An integer >= 1.
        level: A number between 0 and 1, neither included.
        method: One of ``METHODS``.
        seed: An integer >= 0.

    Returns:
        The options, as plain Python values.

    Raises:
        TypeError: One has the wrong type.
        ValueError: One is out of range.
    """
    share = check_number("level", level, above=0)
    if share >= 1:
        raise ValueError(wrong("level", "a number between 0 and 1", f"{level!r}"))
    check_choice("method", method, METHODS)
    return Options(
        check_count("n_resamples", n_resamples, at_least=1),
        share,
        str(method),
        check_count("seed", seed, at_least=0),
    )


def interval(
    estimate: float,
    replicates: np.ndarray,
    options: Options,
    left_out: Callable[[], np.ndarray],
) -> Interval:
    """Turn the statistics of the resamples into an interval.

    Args:
        estimate: Of the sample as it is.
        replicates: Of the resamples, shape ``(B,)``; NaN are left out with a warning.
        options: Level and method.
        left_out: Returns the statistics without one row each, for ``"bca"``; of one row nothing.
    """
    level = options.level
    if math.isnan(estimate):
        return Interval(math.nan, math.nan, math.nan, level)
    undefined = np.isnan(replicates)
    if undefined.any():
        text = f"{int(undefined.sum())} of {len(replicates)} resamples were NaN and left out"
        warn(text, MetricWarning)
        replicates = replicates[~undefined]
        if len(replicates) == 0:
            return Interval(estimate, math.nan, math.nan, level)
    shares = np.array([(1 - level) / 2, (1 + level) / 2])
    if options.method == "bca":
        shares = _bca_shares(shares, estimate, replicates, left_out())
    lower, upper = _ends(replicates, shares)
    if options.method == "basic":
        if math.isinf(estimate):
            warn("the estimate is infinite: it has no basic interval", MetricWarning)
            return Interval(estimate, math.nan, math.nan, level)
        lower, upper = 2 * estimate - upper, 2 * estimate - lower
    return Interval(estimate, lower, upper, level)


def _ends(replicates: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """Return the quantiles of a lower and an upper share.

    Where one lies between an infinite and another replicate, it is the outer of the two.
    """
    below, above = (np.quantile(replicates, shares, method=side) for side in ("lower", "higher"))
    ends = np.array([below[0], above[1]])
    between = np.isfinite(below) & np.isfinite(above) & (below < above)
    ends[between] = np.quantile(replicates, shares[between])
    return float(ends[0]), float(ends[1])


def _bca_shares(
    shares: np.ndarray, estimate: float, replicates: np.ndarray, left_out: np.ndarray
) -> np.ndarray:
    """Return the shares whose quantiles are the ends of the BCa interval."""
    count = len(replicates)
    # What is equal but for the order of its sums is a tie.
    scale = np.abs(replicates[np.isfinite(replicates)]).max(initial=0.0)
    ties = np.isclose(replicates, estimate, rtol=1e-12, atol=1e-12 * scale)
    below = np.sum((replicates < estimate) & ~ties) + np.sum(ties) / 2
    # With all replicates on one side the bias would be infinite.
    bias = scipy.special.ndtri(np.clip(below / count, 0.5 / count, 1 - 0.5 / count))
    left_out = left_out[~np.isnan(left_out)]
    if not np.isfinite(left_out).all():
        left_out = left_out[:0]  # their skewness is not defined
    deviation = left_out.mean() - left_out if len(left_out) else left_out
    spread = float((deviation**2).sum())
    skew = float((deviation**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    moved = bias + scipy.special.ndtri(shares)
    return scipy.special.ndtr(bias + moved / (1 - skew * moved))


def _resamples(size: int, options: Options) -> Iterator[np.ndarray]:
    """Yield rows of one resample after the other: the same, in however large blocks they go."""
    generator = np.random.default_rng(options.seed)
    for _ in range(options.n_resamples):
        yield generator.integers(size, size=size)


def _blocks(rows: Iterator[np.ndarray], count: int, step: int) -> Iterator[np.ndarray]:
    for first in range(0, count, step):
        yield np.stack([next(rows) for _ in range(min(step, count - first))])


def resampled_sums(columns: scipy.sparse.csr_array, options: Options) -> np.ndarray:
    """Return the sum of each column over each resample, of rows as `bootstrap_interval` draws them.

    Args:
        columns: Numbers to be summed, shape ``(N, C)``.
        options: Number of resamples and seed.

    Returns:
        Shape ``(B, C)``, float64.
    """
    size = len(columns.indptr) - 1
    step = max(_BLOCK // (4 * size), 1)
    transposed = columns.T.tocsr()
    sums = []
    for block in _blocks(_resamples(size, options), options.n_resamples, step):
        counts = [np.bincount(row, minlength=size) for row in block]
        sums.append((transposed @ np.stack(counts, axis=1).astype(np.float64)).T)
    return np.concatenate(sums)


def sums_without_one(columns: scipy.sparse.csr_array) -> np.ndarray:
    """Return the sums over all rows but one, for each row that is left out.

    Args:
        columns: Shape ``(N, C)``, float64.

    Returns:
        Shape ``(N, C)``, float64, dense.
    """
    rows = columns.toarray()
    return rows.sum(axis=0) - rows


def binned_residuals(
    confidence: Tensor, correct: Tensor, n_bins: int, closed: str
) -> scipy.sparse.csr_array:
    """Return ``confidence - correct`` of each sample in the column of its bin.

    The ECE is the sum of the absolute column sums, over N.

    Args:
        confidence: Shape ``(N,)``, float32 or float64.
        correct: Shape ``(N,)``, bool.
        n_bins: Number of bins of equal width.
        closed: Which edge belongs to a bin.

    Returns:
        Shape ``(N, n_bins)``, one entry a row.
    """
    confidence, correct = confidence.cpu(), correct.cpu()
    edges = equal_width_edges(n_bins, confidence.dtype)
    index = torch.bucketize(confidence, edges, right=closed == "left").numpy()
    residual = (confidence.double() - correct.double()).numpy()
    size = len(residual)
    return scipy.sparse.csr_array((residual, index, np.arange(size + 1)), shape=(size, n_bins))


def keep_finite(name: str, scores: tuple[Tensor, ...], nan: str, owner: str) -> Tensor | None:
    """Decide on entries that are not finite in one of several tensors.

    Returns:
        None if all may stay, else which: none with ``nan="propagate"``.
    """
    check_choice("nan", nan, NAN_POLICIES)
    finite = torch.stack([score.isfinite() for score in scores]).all(dim=0)
    count = int((~finite).sum())
    if count == 0:
        return None
    raise_nonfinite(name, ~finite, nan, look=True)
    if nan == "propagate":
        return torch.zeros_like(finite)
    text = f"{owner}: {count} rows with NaN or infinity were left out"
    warn(text, MetricWarning)
    return finite


def _common_length(arrays: tuple[Any, ...]) -> int:
    if not arrays:
        raise ValueError(wrong("arrays", "at least one array", "none"))
    for array in arrays:
        if not isinstance(array, (Tensor, np.ndarray)):
            raise TypeError(wrong("arrays", "tensors or NumPy arrays", describe(array)))
        if array.ndim == 0 or len(array) != len(arrays[0]):
            expected = f"shape ({len(arrays[0])}, ...)" if arrays[0].ndim else "shape (N, ...)"
            raise ValueError(wrong("arrays", expected, describe(array)))
    return len(arrays[0])


def _take(arrays: tuple[Any, ...], rows: np.ndarray) -> list[Any]:
    return [
        array.detach()[torch.from_numpy(rows).to(array.device)]
        if isinstance(array, Tensor)
        else array[rows]
        for array in arrays
    ]


def _number(value: object) -> float:
    return float(_numbers(value, 1)[0])


def _numbers(value: object, count: int) -> np.ndarray:
    """Return what a statistic returned as ``count`` floats."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    values = np.asarray(value, dtype=np.float64)
    if values.size != count or values.ndim > 1:
        expected = f"{count} numbers, one a resample" if count > 1 else "one number"
        remedy = "vectorized=True passes arrays of shape (B, N, ...)"
        raise ValueError(wrong("statistic", expected, f"shape {values.shape}", remedy))
    return values.reshape(count)
