import math
from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.metrics import smooth
from calibclip.metrics._binning import residuals_by_confidence
from calibclip.metrics._streaming import MetricWarning
from calibclip.metrics.smooth import (
    MAX_EXACT,
    SmoothCalibrationError,
    exact_error,
    grid_error,
    smooth_calibration_error,
    split_residuals,
)


def rows(confidence, correct, dtype=torch.float64):
    """Probabilities and targets with these confidences, of enough classes for small ones."""
    confidence = torch.as_tensor(confidence, dtype=torch.float64)
    others = (1 - confidence)[:, None].expand(-1, 59) / 59
    probs = torch.cat([confidence[:, None], others], dim=1)
    return probs.to(dtype), 1 - torch.as_tensor(correct).long()


def smooth_ece(confidence, correct, **options):
    probs, target = rows(confidence, correct)
    return smooth_calibration_error(probs, target=target, **options)


def random_pairs(n, seed=0, power=1.5):
    rng = np.random.default_rng(seed)
    confidence = rng.beta(4, 1.3, n).clip(0.05, 1)
    return confidence, rng.random(n) < confidence**power


def quadrature(confidence, correct, width, points=100_001):
    """The definition: kernels and their mirror images at every point of a dense grid."""
    t = np.linspace(0, 1, points)
    curve = np.zeros(points)
    reach = math.ceil(10 * width / 2) + 1
    for c, a in zip(confidence, correct, strict=True):
        for turn in range(-reach, reach + 1):
            for centre in (2 * turn + c, 2 * turn - c):
                if -10 * width <= centre <= 1 + 10 * width:
                    curve += (c - a) * np.exp(-(((t - centre) / width) ** 2) / 2)
    curve = np.abs(curve) / (len(confidence) * width * math.sqrt(2 * math.pi))
    return (curve.sum() - (curve[0] + curve[-1]) / 2) / (points - 1)


def two_sided(a, width):
    """Half at 0.25 with mean residual -a, half at 0.75 with +a: one change of sign, at 0.5."""
    cdf = [
        mpmath.ncdf((mpmath.mpf(t) - centre) / width)
        for turn in range(-4, 5)
        for c in (0.25, 0.75)
        for centre in (2 * turn + c, 2 * turn - c)
        for t in (0.5, 0)
    ]
    mass = [cdf[2 * k] - cdf[2 * k + 1] for k in range(len(cdf) // 2)]
    kept = sum((1 if k % 4 < 2 else -1) * m for k, m in enumerate(mass))
    return a * kept


def grid_masses(confidence, correct):
    confidence = torch.as_tensor(confidence, dtype=torch.float64)
    return split_residuals(confidence, torch.as_tensor(correct)).numpy() / len(confidence)


class TestHandValues:
    @pytest.mark.parametrize("repeats", [1, 1000])
    def test_one_confidence(self, repeats):
        value = smooth_ece([0.8, 0.8] * repeats, [True, False] * repeats)
        assert value == pytest.approx(0.3, abs=1e-14)

    # By frequencies of 0.25 -+ a and 0.75 +- a: 20 samples each.
    @pytest.mark.parametrize(
        ("a", "bandwidth", "expected"),
        [(0.1, None, 0.0988559), (0.1, 0.1, 0.0987581), (0.2, None, None), (0.05, None, None)],
    )
    @pytest.mark.parametrize("repeats", [1, 60])
    def test_two_sides(self, a, bandwidth, expected, repeats):
        correct = [k < 20 * (0.25 + a) - 1e-9 for k in range(20)]
        correct += [k < 20 * (0.75 - a) - 1e-9 for k in range(20)]
        value = smooth_ece(
            ([0.25] * 20 + [0.75] * 20) * repeats, correct * repeats, bandwidth=bandwidth
        )
        if expected is None:
            expected = mpmath.findroot(lambda s: two_sided(a, s) - s, (0.01, a), solver="anderson")
        assert value == pytest.approx(float(expected), abs=1e-7)

    def test_large_width_of_two_sides(self):
        masses = np.array([-0.15, 0.15])
        error = partial(exact_error, np.array([0.25, 0.75]), masses)
        assert smooth._fixed_point(error, 0.05) == pytest.approx(0.2218476, abs=2e-6)
        # What `split_residuals` makes of it: both lie on points of the grid.
        masses = np.zeros(8193)
        masses[[2048, 6144]] = -0.15, 0.15
        assert smooth._fixed_point(partial(grid_error, masses), 0.05) == pytest.approx(
            0.2218476, abs=1e-7
        )

    # Opposite residuals close to each other: the error is 2 m (2 Phi(d / 2 s) - 1).
    @pytest.mark.parametrize("distance", [1e-5, 1e-6, 1e-8])
    @pytest.mark.parametrize("repeats", [1, MAX_EXACT // 2])
    def test_close_pair(self, distance, repeats):
        value = smooth_ece([0.5, 0.5 + distance] * repeats, [True, False] * repeats)
        mass = mpmath.mpf(0.25)
        gap = mpmath.mpf(0.5 + distance) - mpmath.mpf(0.5)
        expected = mpmath.findroot(
            lambda s: 2 * mass * (2 * mpmath.ncdf(gap / (2 * s)) - 1) - s,
            math.sqrt(0.2 * distance),
        )
        assert value == pytest.approx(float(expected), abs=1e-7)
        assert value > 1e-5

    @pytest.mark.parametrize("n", [1, 3, MAX_EXACT + 1])
    def test_extremes(self, n):
        assert smooth_ece([1.0] * n, [True] * n) == 0
        assert smooth_ece([1.0] * n, [False] * n) == 1
        assert smooth_ece([0.75] * n, [True] * n) == pytest.approx(0.25, abs=1e-12)
        assert smooth_ece([0.75] * 4 * n, [True, True, False, True] * n) == 0

    def test_no_samples(self):
        assert math.isnan(smooth_calibration_error(torch.zeros(0, 3), target=torch.zeros(0).long()))
        assert math.isnan(SmoothCalibrationError(bandwidth=0.1).compute())


class TestAgainstQuadrature:
    @pytest.mark.parametrize("width", [0.7, 0.1, 0.02, 0.004])
    def test_given_width(self, width):
        confidence, correct = random_pairs(30)
        confidence[:4], correct[:2] = 1.0, False  # at the end, where the kernel folds back
        expected = quadrature(confidence, correct, width)
        assert smooth_ece(confidence, correct, bandwidth=width) == pytest.approx(expected, abs=1e-7)
        on_grid = grid_error(grid_masses(confidence, correct), width)
        assert on_grid == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("power", [1.0, 3.0])
    def test_fixed_point(self, power):
        confidence, correct = random_pairs(60, seed=5, power=power)
        value = smooth_ece(confidence, correct)
        assert quadrature(confidence, correct, value) == pytest.approx(value, abs=1e-7)
        on_grid = smooth._fixed_point(partial(grid_error, grid_masses(confidence, correct)), 0.05)
        assert on_grid == pytest.approx(value, abs=1e-7)

    def test_fixed_point_of_many_samples(self):
        confidence, correct = random_pairs(2100, seed=2, power=1.05)
        value = smooth_ece(confidence, correct)
        assert 0.01 < value < 0.05
        expected = quadrature(confidence, correct, value, points=10_001)
        assert value == pytest.approx(expected, abs=1e-6)


class TestGrid:
    def test_keeps_the_first_moments(self):
        confidence, correct = random_pairs(500)
        confidence = confidence.clip(0.1, 0.999)
        grid = grid_masses(confidence, correct)
        for power in range(4):
            of_grid = grid @ (np.arange(8193) / 8192) ** power
            of_samples = ((confidence - correct) * confidence**power).mean()
            assert of_grid == pytest.approx(of_samples, abs=1e-14)

    def test_ends_fold_back(self):
        # At c the mirror images lie at -c and 2 - c; the cosines of the transform see to both.
        for c in (0.2 / 8192, 0.7 / 8192, 1 - 0.2 / 8192, 0.0, 1.0):
            masses = grid_masses([c], [c < 0.5])
            assert masses.sum() == pytest.approx(c - (c < 0.5), abs=1e-15)
            cosine = masses @ np.cos(np.pi * 10 * np.arange(8193) / 8192)
            expected = (c - (c < 0.5)) * math.cos(np.pi * 10 * c)
            assert cosine == pytest.approx(expected, abs=1e-11)

    # What the docstring promises of the split onto the grid, next to the sum over samples.
    @pytest.mark.parametrize(
        ("distance", "fixed_point", "tolerance"),
        [(1e-3, 0.0106, 1e-7), (1e-5, 0.00154, 1e-7), (1e-7, 0.000189, 1e-6), (1e-9, 2e-5, 1e-4)],
    )
    def test_small_fixed_points(self, distance, fixed_point, tolerance):
        # Errors that nearly cancel: right just above where it is wrong, at half the confidence.
        centres = np.random.default_rng(3).uniform(0.4, 0.6, 50)
        confidence = torch.as_tensor(np.concatenate([centres, centres + distance]))
        mass = torch.ones(100, dtype=torch.float64) / 100
        mass[50:] *= -1
        on_grid = torch.zeros(8193, dtype=torch.float64)
        for half, sign in ((slice(50), 1), (slice(50, 100), -1)):
            # A residual of -1/2 or 1/2 divided by itself leaves the weights of the split.
            for c in confidence[half]:
                share = split_residuals(c[None], torch.tensor([False])) / c
                on_grid += sign * share / 100
        exact = partial(exact_error, confidence.numpy(), mass.numpy())
        value = smooth._fixed_point(exact, 0.05)
        assert value == pytest.approx(fixed_point, rel=0.05)
        found = smooth._fixed_point(partial(grid_error, on_grid.numpy()), 0.05)
        assert found == pytest.approx(value, abs=tolerance)

    @pytest.mark.parametrize(
        ("width", "tolerance"), [(0.001, 1e-5), (0.003, 1e-7), (0.01, 1e-7), (0.3, 1e-7)]
    )
    def test_given_width(self, width, tolerance):
        confidence, correct = random_pairs(3000, seed=8, power=1.0)
        values, residuals = residuals_by_confidence(*map(torch.as_tensor, (confidence, correct)))
        exact = exact_error(values.numpy(), residuals.numpy() / 3000, width)
        value = smooth_ece(confidence, correct, bandwidth=width)
        assert value == pytest.approx(exact, abs=tolerance)


class TestProperties:
    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(st.integers(4, 64), st.booleans()), min_size=1, max_size=12))
    def test_bounds(self, pairs):
        confidence = np.array([c / 64 for c, _ in pairs])
        correct = np.array([a for _, a in pairs])
        residual = confidence - correct
        value = smooth_ece(confidence, correct)
        assert abs(residual.mean()) - 1e-12 <= value <= np.abs(residual).mean() + 1e-12
        on_grid = smooth._fixed_point(partial(grid_error, grid_masses(confidence, correct)), 0.05)
        assert on_grid == pytest.approx(value, abs=1e-6)

    @pytest.mark.parametrize("n", [200, 2500])
    def test_falls_with_the_width(self, n):
        confidence, correct = random_pairs(n)
        widths = (0.001, 0.01, 0.05, 0.3, 1.0)
        values = [smooth_ece(confidence, correct, bandwidth=width) for width in widths]
        assert values == sorted(values, reverse=True)
        assert values[-1] == pytest.approx(abs((confidence - correct).mean()), abs=1e-3)

    @pytest.mark.parametrize("n", [300, 2500])
    def test_order_of_samples(self, n):
        confidence, correct = random_pairs(n)
        confidence[: n // 2] = np.round(confidence[: n // 2], 2)
        order = np.random.default_rng(1).permutation(n)
        for options in ({}, {"bandwidth": 0.004}):
            shuffled = smooth_ece(confidence[order], correct[order], **options)
            value = smooth_ece(confidence, correct, **options)
            assert shuffled == pytest.approx(value, abs=1e-13)

    def test_start_does_not_matter(self):
        error = partial(grid_error, grid_masses(*random_pairs(400)))
        values = [smooth._fixed_point(error, start) for start in (0.0, 1e-3, 0.05, 1.0)]
        assert values == pytest.approx(values[:1] * 4, abs=1e-11)


class TestStream:
    @pytest.mark.parametrize("n", [MAX_EXACT - 1, MAX_EXACT, MAX_EXACT + 1, 5000])
    def test_batches_and_merge(self, n):
        probs, target = rows(*random_pairs(n, seed=n))
        expected = smooth_calibration_error(probs, target=target)
        sizes = [1, 7, 700, n - 708]
        parts = list(zip(probs.split(sizes), target.split(sizes), strict=True))
        whole, *others = (SmoothCalibrationError() for _ in range(4))
        for batch, labels in parts:
            whole.update(batch, target=labels)
        assert whole.compute() == pytest.approx(expected, abs=1e-13)
        assert whole.compute() == whole.compute()
        metrics = [SmoothCalibrationError().update(batch, target=labels) for batch, labels in parts]
        merged = others[0].merge(*metrics)
        assert merged.compute() == pytest.approx(expected, abs=1e-13)
        merged.merge(others[1])
        again = SmoothCalibrationError().load_state_dict(merged.state_dict())
        assert again.compute() == merged.compute()

    def test_the_exact_sum_is_used_up_to_its_limit(self):
        confidence, correct = random_pairs(MAX_EXACT + 1)
        values, residuals = residuals_by_confidence(
            *(torch.as_tensor(x[:MAX_EXACT]) for x in (confidence, correct))
        )
        exact = exact_error(values.numpy(), residuals.numpy() / MAX_EXACT, 0.002)
        value = smooth_ece(confidence[:MAX_EXACT], correct[:MAX_EXACT], bandwidth=0.002)
        assert value == exact
        expected = grid_error(grid_masses(confidence, correct), 0.002)
        value = smooth_ece(confidence, correct, bandwidth=0.002)
        assert value == pytest.approx(expected, abs=1e-15)

    def test_state_is_bounded(self):
        probs, target = rows(*random_pairs(1500))
        metric = SmoothCalibrationError()
        for _ in range(3):
            metric.update(probs, target=target)
        metric.merge(metric)
        state = metric.state_dict()
        assert {len(column) for column in state["columns"].values()} == {MAX_EXACT + 1}
        assert state["sums"]["residual"].shape == (8193,)
        assert int(state["sums"]["n_samples"]) == 9000

    def test_reset(self):
        metric = SmoothCalibrationError().update(torch.eye(2), target=torch.tensor([0, 0]))
        assert metric.compute() == pytest.approx(0.5, abs=1e-14)
        assert math.isnan(metric.reset().compute())


class TestInputs:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype):
        probs = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.5, 0.5]], dtype=dtype)
        target = torch.tensor([0, 1, 1, 1])
        confidence = probs.double().amax(1).numpy()
        expected = smooth_ece(confidence, [True, False, True, False])
        assert smooth_calibration_error(probs, target=target) == pytest.approx(expected, abs=1e-12)
        if dtype == torch.float32:
            of_arrays = smooth_calibration_error(probs.numpy(), target=target.numpy())
            assert of_arrays == pytest.approx(expected, abs=1e-12)

    def test_logits(self):
        logits = torch.tensor([[1e30, 0.0, -1e30], [2.0, 1.0, 0.0]])
        target = torch.tensor([1, 0])
        probs = logits.double().softmax(1)
        expected = smooth_calibration_error(probs, target=target)
        value = smooth_calibration_error(logits=logits, target=target)
        assert value == pytest.approx(expected, abs=1e-7)
        assert logits[0, 0] == 1e30

    def test_probabilities_above_one_by_rounding(self):
        probs = torch.tensor([[1.00005, 0.0]] * 2)
        assert smooth_calibration_error(probs, target=torch.tensor([0, 0])) == 0
        assert smooth_calibration_error(probs, target=torch.tensor([1, 1])) == 1

    @pytest.mark.parametrize("n", [1, MAX_EXACT])
    def test_nan(self, n):
        probs = torch.tensor([[0.75, 0.25]]).repeat(n + 1, 1)
        target = torch.zeros(n + 1).long()
        probs[0] = torch.nan
        with pytest.raises(ValueError, match=f"1 of {n + 1} rows with NaN or infinity"):
            smooth_calibration_error(probs, target=target)
        assert math.isnan(smooth_calibration_error(probs, target=target, nan="propagate"))
        with pytest.warns(MetricWarning, match="1 rows"):
            value = smooth_calibration_error(probs, target=target, nan="omit")
        assert value == 0.25

    @pytest.mark.parametrize(
        ("bandwidth", "error", "message"),
        [
            (0, ValueError, "bandwidth: expected a number >= 0.001 and <= 1, got 0"),
            (1.5, ValueError, "bandwidth: expected a number >= 0.001 and <= 1, got 1.5"),
            ("wide", TypeError, "bandwidth: expected a number"),
        ],
    )
    def test_options(self, bandwidth, error, message):
        with pytest.raises(error, match=message):
            SmoothCalibrationError(bandwidth=bandwidth)
        with pytest.raises(ValueError, match="nan: expected one of"):
            smooth_calibration_error(torch.eye(2), target=torch.tensor([0, 1]), nan="drop")

    def test_repr(self):
        expected = "SmoothCalibrationError(bandwidth=0.1, nan='raise')"
        assert repr(SmoothCalibrationError(bandwidth=0.1)) == expected
