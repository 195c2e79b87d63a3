import math
from fractions import Fraction
from itertools import groupby, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.metrics._binning import (
    equal_mass_cuts,
    equal_width_edges,
    residuals_by_confidence,
)
from calibclip.metrics._streaming import MetricWarning
from calibclip.metrics.calibration import expected_calibration_error
from calibclip.metrics.sweep import (
    SweepCalibrationError,
    monotone_bins,
    sweep_calibration_error,
)

PAIRS = st.lists(st.tuples(st.integers(33, 48), st.booleans()), min_size=1, max_size=25)


def rows(confidence, correct):
    """Two-class probabilities and targets with these confidences of at least one half."""
    confidence = torch.as_tensor(confidence, dtype=torch.float32)
    return torch.stack([confidence, 1 - confidence], dim=1), 1 - torch.as_tensor(correct).long()


def sweep(pairs, **options):
    confidence, correct = zip(*pairs, strict=True)
    probs, target = rows(confidence, correct)
    return sweep_calibration_error(probs, target=target, **options)


def bins_of(pairs, n_bins):
    """Bins of samples as lists: runs of equal values are put whole into the bin they reach into."""
    pairs = sorted(pairs)
    runs = [list(run) for _, run in groupby(pairs, key=lambda pair: pair[0])]
    bounds = {k * len(pairs) // n_bins for k in range(1, n_bins)}
    bins, current, seen = [], [], 0
    for run in runs:
        current += run
        reached = any(seen < bound <= seen + len(run) for bound in bounds)
        seen += len(run)
        if reached:
            bins.append(current)
            current = []
    return [*bins, current] if current else bins


def loop_sweep(pairs, norm=1):
    """Number of bins and the error, by the definition and with fractions."""
    pairs = [(Fraction(c), Fraction(int(a))) for c, a in pairs]
    chosen = 1
    for n_bins in range(2, len(pairs) + 1):
        accuracies = [sum(a for _, a in b) / Fraction(len(b)) for b in bins_of(pairs, n_bins)]
        if any(left > right for left, right in pairwise(accuracies)):
            break
        chosen = n_bins
    bins = bins_of(pairs, chosen)
    gaps = [(len(b), abs(sum(c - a for c, a in b)) / len(b)) for b in bins]
    if norm == math.inf:
        return chosen, float(max(gap for _, gap in gaps))
    return chosen, float(sum(n * gap**norm for n, gap in gaps) / len(pairs)) ** (1 / norm)


def random_pairs(n, seed, digits=3):
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.uniform(0.5, 1, n), digits).astype(np.float32)
    return list(zip(confidence.tolist(), (rng.random(n) < confidence).tolist(), strict=True))


class TestEqualMassCuts:
    @settings(deadline=None)
    @given(PAIRS, st.integers(1, 30))
    def test_against_lists(self, pairs, n_bins):
        values = torch.tensor(sorted(c for c, _ in pairs)).double()
        cuts = equal_mass_cuts(values, n_bins).tolist()
        lengths = [len(b) for b in bins_of(pairs, n_bins)]
        assert [0, *cuts] == [sum(lengths[:b]) for b in range(len(lengths))]

    def test_distinct_values_differ_by_one_at_most(self):
        for n, n_bins in ((10, 3), (100, 7), (15, 15), (16, 15)):
            ends = [0, *equal_mass_cuts(torch.arange(n).float(), n_bins).tolist(), n]
            assert set(np.diff(ends)) <= {n // n_bins, n // n_bins + 1}
            assert len(ends) == n_bins + 1

    @pytest.mark.parametrize(
        ("values", "n_bins", "expected"),
        [
            ([], 5, []),
            ([0.5], 5, []),
            ([0.5, 0.5, 0.5], 3, []),
            ([0.1, 0.2, 0.3], 1, []),
            ([0.1, 0.2, 0.3], 100, [1, 2]),
            ([0.1, 0.2, 0.2, 0.3], 2, [3]),
            ([0.1, 0.1, 0.1, 0.9], 4, [3]),
            ([0.1, 0.9, 0.9, 0.9], 4, [1]),
        ],
    )
    def test_edges(self, values, n_bins, expected):
        cuts = equal_mass_cuts(torch.tensor(values), n_bins)
        assert cuts.tolist() == expected
        assert cuts.dtype == torch.int64


class TestEqualWidthEdges:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n_bins", [1, 2, 10, 15, 20, 30, 49, 1000])
    def test_correctly_rounded(self, dtype, n_bins):
        edges = equal_width_edges(n_bins, dtype)
        assert edges.shape == (n_bins - 1,)
        assert edges.dtype == dtype
        below = torch.nextafter(edges, torch.zeros_like(edges)).tolist()
        above = torch.nextafter(edges, torch.ones_like(edges)).tolist()
        for k, edge in enumerate(edges.tolist(), start=1):
            exact = Fraction(k, n_bins)
            distance = abs(Fraction(edge) - exact)
            assert distance <= abs(Fraction(below[k - 1]) - exact)
            assert distance <= abs(Fraction(above[k - 1]) - exact)


class TestResidualsByConfidence:
    @settings(deadline=None)
    @given(PAIRS)
    def test_against_loop(self, pairs):
        confidence = torch.tensor([c / 48 for c, _ in pairs], dtype=torch.float64)
        correct = torch.tensor([a for _, a in pairs])
        values, residuals = residuals_by_confidence(confidence, correct)
        expected = {}
        for c, a in pairs:
            expected[c] = expected.get(c, 0) + Fraction(c, 48) - a
        assert values.tolist() == [c / 48 for c in sorted(expected)]
        expected = [float(expected[c]) for c in sorted(expected)]
        assert residuals.tolist() == pytest.approx(expected, abs=1e-14)


class TestValue:
    def test_by_hand(self):
        # Two bins are in order, three are not: .5 .6 | .7 .8 has accuracies 1/2 and 1/2.
        pairs = [(0.5, False), (0.6, True), (0.7, False), (0.8, True)]
        assert monotone_bins(*map(torch.tensor, zip(*pairs, strict=True))) == 2
        assert sweep(pairs) == pytest.approx((0.05 + 0.25) / 2, abs=1e-7)
        assert sweep(pairs, norm=2) == pytest.approx(math.sqrt((0.05**2 + 0.25**2) / 2), abs=1e-7)
        assert sweep(pairs, norm=math.inf) == pytest.approx(0.25, abs=1e-7)

    def test_two_bins_out_of_order(self):
        pairs = [(0.6, True), (0.9, False)]
        assert monotone_bins(*map(torch.tensor, zip(*pairs, strict=True))) == 1
        assert sweep(pairs) == pytest.approx(abs(0.75 - 0.5), abs=1e-7)

    @settings(max_examples=60, deadline=None)
    @given(PAIRS, st.sampled_from([1, 2, math.inf]))
    def test_against_loop(self, pairs, norm):
        pairs = [(c / 48 if c > 40 else c / 64, a) for c, a in pairs]
        pairs = [(float(np.float32(max(c, 0.515))), a) for c, a in pairs]
        chosen, expected = loop_sweep(pairs, norm)
        assert monotone_bins(*map(torch.tensor, zip(*pairs, strict=True))) == chosen
        assert sweep(pairs, norm=norm) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("digits", [2, 6])
    def test_of_many_samples(self, seed, digits):
        pairs = random_pairs(400, seed, digits)
        chosen, expected = loop_sweep(pairs)
        assert sweep(pairs) == pytest.approx(expected, abs=1e-12)
        probs, target = rows(*zip(*pairs, strict=True))
        ece = expected_calibration_error(probs, target=target, n_bins=chosen, binning="mass")
        assert ece == sweep(pairs)

    def test_in_order_to_the_last_sample(self):
        n = 20_000
        confidence = torch.linspace(0.5, 1, n)
        assert monotone_bins(confidence, confidence > 0.8) == n
        probs, target = rows(confidence, confidence > 0.8)
        expected = (confidence - (confidence > 0.8).float()).double().abs().mean()
        value = sweep_calibration_error(probs, target=target)
        assert value == pytest.approx(float(expected), abs=1e-12)

    @pytest.mark.parametrize("n", [1, 5])
    def test_extremes(self, n):
        assert sweep([(1.0, True)] * n) == 0
        assert sweep([(1.0, False)] * n) == 1
        assert sweep([(0.75, True), (0.75, False)] * n) == 0.25
        probs = torch.zeros(0, 3)
        assert math.isnan(sweep_calibration_error(probs, target=torch.zeros(0).long()))

    def test_order_of_samples(self):
        pairs = random_pairs(500, 7, digits=2)
        order = np.random.default_rng(0).permutation(len(pairs))
        assert sweep([pairs[i] for i in order]) == pytest.approx(sweep(pairs), abs=1e-13)


class TestStream:
    def test_batches_and_merge(self):
        probs, target = rows(*zip(*random_pairs(300, 3), strict=True))
        expected = sweep_calibration_error(probs, target=target, norm=2)
        whole, merged = SweepCalibrationError(norm=2), SweepCalibrationError(norm=2)
        for batch, labels in zip(
            probs.split([1, 200, 99]), target.split([1, 200, 99]), strict=True
        ):
            whole.update(batch, target=labels)
            merged.merge(SweepCalibrationError(norm=2).update(batch, target=labels))
        assert whole.compute() == merged.compute() == expected
        again = SweepCalibrationError(norm=2).load_state_dict(whole.state_dict())
        assert again.compute() == expected
        assert math.isnan(whole.reset().compute())


class TestInputs:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype):
        probs = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.5, 0.5]], dtype=dtype)
        target = torch.tensor([0, 1, 1, 1])
        confidence = probs.amax(1).float().tolist()
        _, expected = loop_sweep(list(zip(confidence, [True, False, True, False], strict=True)))
        value = sweep_calibration_error(probs, target=target)
        assert value == pytest.approx(expected, abs=1e-7)

    def test_arrays_and_logits(self):
        logits = np.array([[1e30, 0.0], [2.0, 0.0], [0.0, 1.0]])
        target = np.array([0, 1, 1])
        probs = torch.tensor(logits).softmax(1)
        expected = sweep_calibration_error(probs, target=torch.tensor(target))
        assert sweep_calibration_error(logits=logits, target=target) == pytest.approx(expected)

    def test_nan(self):
        probs, target = torch.tensor([[torch.nan, 0.5], [0.75, 0.25]]), torch.zeros(2).long()
        with pytest.raises(ValueError, match="1 of 2 rows with NaN or infinity"):
            sweep_calibration_error(probs, target=target)
        assert math.isnan(sweep_calibration_error(probs, target=target, nan="propagate"))
        with pytest.warns(MetricWarning, match="1 rows"):
            assert sweep_calibration_error(probs, target=target, nan="omit") == 0.25

    @pytest.mark.parametrize("norm", [3, 0.5, True, "2", math.nan])
    def test_options(self, norm):
        with pytest.raises(ValueError, match=r"norm: expected 1, 2 or math\.inf"):
            SweepCalibrationError(norm=norm)

    def test_repr(self):
        assert repr(SweepCalibrationError()) == "SweepCalibrationError(norm=1, nan='raise')"
