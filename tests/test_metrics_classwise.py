"""The classwise calibration error against a loop over classes and bins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.metrics import ClasswiseCalibrationError, classwise_calibration_error
from calibclip.metrics.classwise import _class_sums

HAND = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
HAND_TARGET = torch.tensor([0, 1, 2, 1])


def plain(probs, target, n_bins, norm=1, threshold=None, normalize="samples"):
    """The definition, class by class and bin by bin."""
    edges = [np.float32(k / n_bins) for k in range(n_bins + 1)]
    terms, gaps = [], []
    for k in range(probs.shape[1]):
        column = probs[:, k]
        kept = np.ones(len(column), bool) if threshold is None else column > threshold
        inside = 0.0
        for b in range(n_bins):
            lowest = (column >= edges[b]) if b == 0 else (column > edges[b])
            member = kept & lowest & (column <= edges[b + 1])
            if member.any():
                p = column[member].astype(np.float64).mean()
                gap = abs(p - (target[member] == k).mean())
                gaps.append(gap)
                total = kept.sum() if normalize == "kept" else len(column)
                inside += member.sum() / total * gap ** (1 if norm == math.inf else norm)
        terms.append(inside)
    if not gaps:
        return math.nan
    return max(gaps) if norm == math.inf else float(np.mean(terms)) ** (1 / norm)


def test_hand_value():
    value = classwise_calibration_error(HAND, target=HAND_TARGET, n_bins=2)
    assert value == pytest.approx(0.1, abs=1e-7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    n_classes=st.integers(2, 8),
    n_bins=st.integers(1, 20),
    norm=st.sampled_from([1, 2, math.inf]),
    threshold=st.sampled_from([None, 0.0, 0.01, 0.3]),
    normalize=st.sampled_from(["samples", "kept"]),
    on_edges=st.booleans(),
)
def test_against_a_loop(seed, n, n_classes, n_bins, norm, threshold, normalize, on_edges):
    rng = np.random.default_rng(seed)
    if on_edges:
        # Shares of the number of bins, zeros among them.
        parts = rng.multinomial(n_bins, np.full(n_classes, 1 / n_classes), size=n)
        probs = (parts / n_bins).astype(np.float32)
    else:
        probs = rng.dirichlet(np.full(n_classes, 0.3), size=n).astype(np.float32)
    target = rng.integers(n_classes, size=n)
    options = {"norm": norm, "threshold": threshold, "normalize": normalize}
    expected = plain(probs, target, n_bins, **options)
    value = classwise_calibration_error(probs, target=target, n_bins=n_bins, **options)
    assert value == pytest.approx(expected, abs=2e-7, nan_ok=True)


def test_the_two_ways_of_summing_agree():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(300, 40, generator=generator).mul(3).softmax(1)
    target = torch.randint(40, (300,), generator=generator)
    for threshold in (None, 0.01):
        sums = _class_sums(probs, target, 15, threshold)
        dense = [torch.zeros(40, 15, dtype=torch.float64) for _ in range(3)]
        for row, y in zip(probs, target, strict=True):
            for k, p in enumerate(row):
                cell = (k, max(math.ceil(float(p.double() * 15)) - 1, 0))
                if threshold is None or p > threshold:
                    dense[0][cell] += 1
                    dense[1][cell] += float(p)
                    dense[2][cell] += y == k
        for mine, theirs in zip(sums, dense, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-12)


def test_a_stream_learns_the_number_of_classes():
    metric, empty = ClasswiseCalibrationError(2), ClasswiseCalibrationError(2)
    assert math.isnan(metric.compute())
    metric.update(HAND[:1], target=HAND_TARGET[:1])
    later = ClasswiseCalibrationError(2).update(HAND[1:], target=HAND_TARGET[1:])
    empty.merge(metric, ClasswiseCalibrationError(2), later)
    assert empty.compute() == pytest.approx(0.1, abs=1e-7)
    with pytest.raises(ValueError, match="probs, logits: expected 3 classes, as before, got 2"):
        metric.update(torch.eye(2), target=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="others: expected 3 classes, as before, got 2"):
        metric.merge(ClasswiseCalibrationError(2).update(torch.eye(2), target=torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"norm": 0}, ValueError, "norm: expected 1, 2 or math.inf, got int 0"),
        ({"threshold": -0.1}, ValueError, "threshold: expected a number >= 0 and <= 1, got -0.1"),
        ({"threshold": "0"}, TypeError, "threshold: expected a number"),
        ({"normalize": "mean"}, ValueError, "normalize: expected one of 'samples', 'kept'"),
        ({"n_bins": 0}, ValueError, "n_bins: expected an integer >= 1, got 0"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        classwise_calibration_error(HAND, target=HAND_TARGET, **options)
