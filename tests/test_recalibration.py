import functools
import json
import math
import pickle
from dataclasses import FrozenInstanceError
from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize, minimize_scalar
from sklearn.isotonic import IsotonicRegression

from calibclip.metrics import expected_calibration_error
from calibclip.metrics._predictions import read_predictions
from calibclip.recalibration import (
    HistogramBinning,
    IsotonicCalibration,
    RecalibrationWarning,
    Temperature,
    VectorScaling,
    _common,
    fit_histogram_binning,
    fit_isotonic,
    fit_temperature,
    fit_vector_scaling,
    temperature,
)
from calibclip.recalibration._root import find_root
from calibclip.recalibration.isotonic import pool_adjacent_violators


def sample(seed, n=300, n_classes=5, sharpness=2.0):
    """Logits, and targets drawn from the softmax of the logits times ``sharpness``."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, n_classes))
    weights = np.exp(sharpness * logits)
    cumulative = (weights / weights.sum(1, keepdims=True)).cumsum(1)
    target = (rng.uniform(size=(n, 1)) > cumulative).sum(1).clip(max=n_classes - 1)
    return logits, target


def exact_nll(logits, target, beta=1.0):
    """Mean negative log-likelihood, its slope in beta and its curvature, by loops in mpmath."""
    with mpmath.workdps(60):
        beta, totals = mpmath.mpf(beta), [mpmath.mpf(0)] * 3
        for row, y in zip(np.asarray(logits, np.float64), target, strict=True):
            z = [mpmath.mpf(float(v)) for v in row if v > -math.inf]
            own = mpmath.mpf(float(row[y]))
            weights = [mpmath.exp(beta * (v - own)) for v in z]
            total = mpmath.fsum(weights)
            mean = mpmath.fsum(w * v for w, v in zip(weights, z, strict=True)) / total
            square = mpmath.fsum(w * (v - mean) ** 2 for w, v in zip(weights, z, strict=True))
            terms = (mpmath.log(total), mean - own, square / total)
            totals = [a + b for a, b in zip(totals, terms, strict=True)]
        return [t / len(target) for t in totals]


class TestTemperature:
    @pytest.mark.parametrize(
        ("n", "n_classes", "sharpness", "magnitude"),
        [
            (200, 2, 0.3, 1),
            (100, 3, 5.0, 1e4),
            (60, 40, 1.0, 100),
            (50, 5, 2.0, 1e-5),
            (9, 7, 1, 1),
        ],
    )
    def test_is_the_root_of_the_exact_derivative(self, n, n_classes, sharpness, magnitude):
        logits, target = sample(n, n, n_classes, sharpness)
        logits *= magnitude
        fit = fit_temperature(logits, target)
        assert fit.converged
        assert fit.bound is None
        assert fit.n_iterations <= 12
        nll, slope, curvature = exact_nll(logits, target, 1 / fit.temperature)
        assert abs(float(slope / curvature)) * fit.temperature < 1e-11  # of Newton's next step
        assert fit.nll_after == pytest.approx(float(nll), rel=1e-13)
        assert fit.nll_before == pytest.approx(float(exact_nll(logits, target)[0]), rel=1e-13)

    def test_agrees_with_scipy(self):
        logits, target = sample(1)
        logits *= 20

        def loss(log_temperature):
            z = logits / math.exp(log_temperature)
            log_total = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)
            return (log_total - z[np.arange(len(z)), target]).mean()

        found = minimize_scalar(loss, bounds=(-5, 8), method="bounded", options={"xatol": 1e-10})
        fit = fit_temperature(logits, target)
        assert fit.temperature == pytest.approx(math.exp(found.x), rel=1e-6)
        assert fit.nll_after == pytest.approx(found.fun, rel=1e-12)

    @pytest.mark.parametrize("margin", [0.01, 1.0, 8.0, 1e4])
    @pytest.mark.parametrize(("right", "wrong"), [(3, 1), (99, 1), (51, 49)])
    def test_two_classes_of_known_accuracy(self, margin, right, wrong):
        logits = torch.tensor([[0.0, margin]], dtype=torch.float64).repeat(right + wrong, 1)
        target = torch.tensor([1] * right + [0] * wrong)
        fit = fit_temperature(logits, target, logit_scale=50)
        # sigmoid(m / T) = a
        assert fit.temperature == pytest.approx(margin / math.log(right / wrong), rel=1e-12)
        assert fit.logit_scale == pytest.approx(50 / fit.temperature, rel=1e-15)
        assert fit(logits).softmax(1)[0, 1].item() == pytest.approx(right / (right + wrong))

    def test_scale_shift_and_order_do_not_matter(self):
        logits, target = sample(2)
        fit = fit_temperature(logits, target)
        for factor in (1e-30, 1e-4, 7, 1e4, 1e30):
            scaled = fit_temperature(logits * factor, target)
            assert scaled.temperature == pytest.approx(fit.temperature * factor, rel=1e-10)
            assert scaled.nll_after == pytest.approx(fit.nll_after, rel=1e-12)
        shifted = fit_temperature(logits + np.arange(len(logits))[:, None], target)
        assert shifted.temperature == pytest.approx(fit.temperature, rel=1e-9)
        order = np.random.default_rng(0).permutation(len(logits))
        assert fit_temperature(logits[order], target[order]).temperature == pytest.approx(
            fit.temperature, rel=1e-12
        )
        classes = np.array([3, 0, 4, 1, 2])
        permuted = fit_temperature(logits[:, classes], classes.argsort()[target])
        assert permuted.temperature == pytest.approx(fit.temperature, rel=1e-12)
        twice = fit_temperature(np.tile(logits, (2, 1)), np.tile(target, 2))
        assert twice.temperature == pytest.approx(fit.temperature, rel=1e-12)

    @pytest.mark.parametrize("mask", [-math.inf, -1e30, -1e300])
    def test_masked_classes(self, mask):
        logits, target = sample(3, n=40)
        hidden = np.random.default_rng(3).uniform(size=logits.shape) < 0.4
        hidden[np.arange(40), target] = False
        hidden[:2] = True  # of the first two rows only the true class is left
        hidden[np.arange(2), target[:2]] = False
        logits[hidden] = mask
        fit = fit_temperature(logits, target)
        _, slope, curvature = exact_nll(
            np.where(hidden, -math.inf, logits), target, 1 / fit.temperature
        )
        assert abs(float(slope / curvature)) * fit.temperature < 1e-11
        assert torch.isneginf(fit(torch.tensor([-math.inf, 1.0]))).tolist() == [True, False]

    def test_masked_true_class(self):
        logits = torch.tensor([[0.0, -math.inf], [1.0, 0.0], [1.0, -math.inf]])
        with pytest.raises(ValueError, match=r"target: expected classes whose .* 1 of 3 masked"):
            fit_temperature(logits, torch.tensor([0, 1, 1]))

    def test_blocks_do_not_matter(self, monkeypatch):
        logits, target = sample(4, n=101)
        whole = fit_temperature(logits, target)
        monkeypatch.setattr(_common, "_BLOCK", 35)
        parts = fit_temperature(logits, target)
        assert parts.temperature == pytest.approx(whole.temperature, rel=1e-13)
        assert parts.nll_after == pytest.approx(whole.nll_after, rel=1e-14)

    def test_logits_of_lower_precision(self):
        logits, target = sample(5)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            narrow = torch.from_numpy(logits).to(dtype)
            fit = fit_temperature(narrow, target)
            wide = fit_temperature(narrow.double(), target)
            assert fit.temperature == pytest.approx(wide.temperature, rel=1e-12)
            assert fit(narrow).dtype == dtype


class TestTemperatureWithoutOptimum:
    def test_separable(self):
        logits, _ = sample(6)
        target = logits.argmax(1)
        with pytest.warns(RecalibrationWarning, match="every sample is right.* stops at"):
            fit = fit_temperature(logits, target)
        assert fit.separable
        assert fit.bound == "lower"
        assert fit.converged
        assert 0 < fit.temperature < 1
        assert fit.nll_after == pytest.approx(1e-6, rel=1e-6)
        with pytest.warns(RecalibrationWarning):
            assert fit_temperature(logits * 64, target).temperature == pytest.approx(
                fit.temperature * 64, rel=1e-7
            )

    def test_separable_with_ties(self):
        logits = np.array([[1.0, 1.0, 0.0], [2.0, 0.0, 2.0], [2.0, 0.0, -1.0]])
        with pytest.warns(RecalibrationWarning, match="every sample is right"):
            fit = fit_temperature(logits, np.array([1, 0, 0]))
        assert fit.separable
        assert fit.nll_after == pytest.approx(2 / 3 * math.log(2) + 1e-6, rel=1e-9)

    def test_one_wrong_by_little_is_not_separable(self):
        logits = np.array([[1.0, 0.0]] * 20 + [[1e-9, 0.0]])
        fit = fit_temperature(logits, np.array([0] * 20 + [1]))
        assert not fit.separable
        assert fit.bound is None
        assert 0 < fit.temperature < 0.1

    def test_separable_and_already_there(self):
        logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
        with pytest.warns(RecalibrationWarning, match="every sample is right"):
            fit = fit_temperature(logits, torch.tensor([0, 1]))
        assert fit.temperature == 1
        assert fit.nll_after == fit.nll_before < 1e-40

    def test_one_sample(self):
        with pytest.warns(RecalibrationWarning, match="every sample is right"):
            fit = fit_temperature(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        # log(1 + exp(-1 / T)) = 1e-6
        assert fit.temperature == pytest.approx(-1 / math.log(math.expm1(1e-6)), rel=1e-8)
        with pytest.warns(RecalibrationWarning, match="no better than equal"):
            assert fit_temperature(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).bound == "upper"
        fit = fit_temperature(torch.tensor([[2.0, 1.9, 0.0]]), torch.tensor([1]))
        assert fit.bound is None

    def test_worse_than_uniform(self):
        logits, target = sample(7)
        with pytest.warns(RecalibrationWarning, match="no better than equal ones.* stops at"):
            fit = fit_temperature(-logits, target)
        assert fit.bound == "upper"
        assert not fit.separable
        assert 1 < fit.temperature < math.inf
        assert fit.nll_after == pytest.approx(math.log(5) + 1e-6, rel=1e-9)

    def test_worse_than_uniform_by_nothing(self):
        logits, target = sample(7)
        with pytest.warns(RecalibrationWarning, match="no better"):
            fit = fit_temperature(-1e-9 * logits, target)
        assert fit.bound == "upper"
        assert fit.temperature == 1

    def test_worse_than_uniform_with_masks_and_huge_logits(self):
        logits = torch.tensor([[0.0, 1e30, -math.inf], [0.0, 1e30, 1e30]])
        with pytest.warns(RecalibrationWarning, match="no better"):
            fit = fit_temperature(logits, torch.tensor([0, 0]))
        assert fit.nll_after == pytest.approx(math.log(6) / 2 + 1e-6, rel=1e-9)
        assert fit(logits).softmax(1)[0, 0].item() == pytest.approx(0.5, abs=1e-5)

    def test_as_good_as_uniform_but_for_rounding(self):
        logits = np.array([[0.1, 0.2, 0.3]] * 3) + 1000.0
        with pytest.warns(RecalibrationWarning, match="no better"):
            assert fit_temperature(logits, np.array([0, 1, 2])).bound == "upper"

    def test_equal_logits(self):
        with pytest.warns(RecalibrationWarning, match="logits of each sample are equal"):
            fit = fit_temperature(torch.ones(4, 3), torch.tensor([0, 1, 2, 0]))
        assert fit.temperature == 1
        assert fit.bound is None
        assert not fit.separable
        assert fit.nll_after == pytest.approx(math.log(3))

    def test_no_convergence(self, monkeypatch):
        monkeypatch.setattr(temperature, "find_root", lambda f, x: find_root(f, x, 1))
        with pytest.warns(RecalibrationWarning, match="no convergence in 1 iterations") as caught:
            fit = fit_temperature(*sample(8))
        assert caught[0].filename == __file__
        assert not fit.converged
        assert "converged=False" in repr(fit)

    @settings(max_examples=60, deadline=None)
    @given(
        hnp.arrays(
            np.float32,
            st.tuples(st.integers(1, 5), st.integers(2, 4)),
            elements=st.floats(-1e6, 1e6, width=32) | st.just(-math.inf),
        ),
        st.integers(0, 2**30),
    )
    @pytest.mark.filterwarnings("ignore::calibclip.recalibration.RecalibrationWarning")
    def test_is_always_positive_and_never_worse(self, logits, seed):
        target = np.random.default_rng(seed).integers(logits.shape[1], size=len(logits))
        rows = np.arange(len(logits))
        logits[rows, target] = np.maximum(logits[rows, target], -1e6)
        fit = fit_temperature(logits, target)
        assert 0 < fit.temperature < math.inf
        assert fit.converged
        assert fit.nll_after <= fit.nll_before * (1 + 1e-12)


class TestTemperatureObject:
    def test_call(self):
        fit = fit_temperature(*sample(9))
        logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        assert torch.equal(fit(logits), logits / fit.temperature)
        assert torch.autograd.gradcheck(fit, logits)
        array = np.ones((2, 5), np.float32)
        result = fit(array)
        assert isinstance(result, np.ndarray)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, np.float32(1) / np.float32(fit.temperature))
        assert (array == 1).all()
        with pytest.raises(TypeError, match="logits: expected a floating-point"):
            fit(torch.ones(2, 2, dtype=torch.int64))

    def test_inputs_are_left_alone(self):
        logits, target = sample(10)
        before = logits.copy(), target.copy()
        logits.setflags(write=False)
        fit_temperature(logits, target)
        np.testing.assert_array_equal(logits, before[0])
        np.testing.assert_array_equal(target, before[1])
        graph = torch.from_numpy(before[0]).requires_grad_()
        fit_temperature(graph, target)
        assert graph.grad is None

    def test_state(self):
        fit = fit_temperature(*sample(11))
        assert pickle.loads(pickle.dumps(fit)) == fit
        assert Temperature.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit
        with pytest.raises(FrozenInstanceError):
            fit.temperature = 2.0
        with pytest.raises(ValueError, match="temperature: expected a number > 0"):
            Temperature.from_dict({**fit.to_dict(), "temperature": -1.0})
        with pytest.raises(ValueError, match="bound: expected one of"):
            Temperature.from_dict({**fit.to_dict(), "bound": "left"})

    def test_repr(self):
        logits, target = torch.tensor([[8.0, 0.0]]).repeat(4, 1), torch.tensor([0, 0, 0, 1])
        assert repr(fit_temperature(logits, target)) == (
            "Temperature(temperature=7.282, logit_scale=13.73, nll_before=2.0003, "
            "nll_after=0.5623, n_samples=4)"
        )
        fit = fit_temperature(logits, target, logit_scale=None)
        assert fit.logit_scale is None
        assert "logit_scale" not in repr(fit)
        with pytest.warns(RecalibrationWarning):
            assert "bound='lower'" in repr(fit_temperature(logits[:3], target[:3]))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"logits": torch.zeros(0, 3), "target": torch.zeros(0).long()}, ValueError, "sample"),
            ({"logits": torch.tensor([[1.0, math.nan]] * 2)}, ValueError, "2 of 2 rows"),
            ({"logits": torch.tensor([[1.0, 2.0], [0.0, math.inf]])}, ValueError, "1 of 2 rows"),
            ({"logits": torch.full((2, 2), -math.inf)}, ValueError, "2 of 2 rows"),
            ({"logits": torch.zeros(2, 1)}, ValueError, "K >= 2"),
            ({"target": torch.tensor([0, 2])}, ValueError, r"class indices in \[0, 1\]"),
            ({"target": torch.tensor([0.0, 1.0])}, TypeError, "integer class indices"),
            ({"logit_scale": 0}, ValueError, "logit_scale: expected a number > 0"),
            ({"logit_scale": "100"}, TypeError, "logit_scale"),
        ],
    )
    def test_wrong_arguments(self, change, error, message):
        arguments = {"logits": torch.eye(2), "target": torch.tensor([0, 1])}
        with pytest.raises(error, match=message):
            fit_temperature(**{**arguments, **change})


class TestFindRoot:
    @pytest.mark.parametrize("start", [1e-250, 1e-3, 1.0, 3.0, 1e200])
    def test_far_starts(self, start):
        root = find_root(lambda x: (math.log(x / 3), -math.log(x / 3)), start)
        assert root.converged
        assert root.x == pytest.approx(3, rel=1e-12)
        assert root.n_iterations < 40

    def test_without_newton_steps(self):
        root = find_root(lambda x: (x - 3, math.nan), 1e-5)
        assert root.converged
        assert root.x == pytest.approx(3, rel=1e-13)

    def test_without_root(self):
        assert not find_root(lambda x: (1.0, math.nan), 1.0).converged
        assert not find_root(lambda x: (-1.0, math.nan), 1.0).converged


def vector_objective(logits, target, ridge, best):
    """The objective of the docstring, over weights and biases."""
    n, n_classes = logits.shape
    masked = np.isneginf(logits)
    z = np.where(masked, 0.0, logits)
    mean = z.sum(0) / np.maximum((~masked).sum(0), 1)

    def objective(parameters):
        weight, bias = parameters.reshape(2, n_classes)
        scores = np.where(masked, -np.inf, weight * z + bias)
        top = scores.max(1)
        exp = np.exp(scores - top[:, None])
        total = exp.sum(1)
        value = (top + np.log(total) - scores[np.arange(n), target]).sum()
        residual = exp / total[:, None] - np.eye(n_classes)[target]
        stretch = best * weight - 1
        shift = weight * mean + bias - mean / best
        value += ridge / 2 * (stretch**2 + shift**2).sum()
        slope_weight = (residual * z).sum(0) + ridge * (stretch * best + shift * mean)
        slope_bias = residual.sum(0) + ridge * shift
        return value / n, np.concatenate([slope_weight, slope_bias]) / n

    return objective


class TestVectorScaling:
    @pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
    @pytest.mark.parametrize("masked", [False, True])
    def test_gradient_is_zero_and_nothing_is_lower(self, ridge, masked):
        logits, target = sample(12, n=400, n_classes=4)
        logits = 5 + logits * [1, 2, 3, 0.5]
        if masked:
            hidden = np.random.default_rng(3).uniform(size=logits.shape) < 0.3
            hidden[np.arange(400), target] = False
            logits[hidden] = -math.inf
        fit = fit_vector_scaling(logits, target, ridge=ridge)
        assert fit.converged
        assert fit.gradient_norm < 1e-6
        best = fit_temperature(logits, target).temperature
        objective = vector_objective(logits, target, ridge, best)
        solution = np.concatenate([fit.weight, fit.bias])
        value, gradient = objective(solution)
        assert np.abs(gradient).max() < 1e-6
        # The oracle's gradient is that of its value.
        for k in range(8):
            step = np.eye(8)[k] * 1e-5
            slope = (objective(solution + 1 + step)[0] - objective(solution + 1 - step)[0]) / 2e-5
            assert objective(solution + 1)[1][k] == pytest.approx(slope, rel=1e-6, abs=1e-9)
        other = minimize(
            lambda x: objective(x), np.zeros(8), jac=True, method="BFGS", options={"gtol": 1e-9}
        )
        assert value <= other.fun + 1e-12
        np.testing.assert_allclose(solution, other.x, atol=1e-4)

    def test_likelihoods(self):
        logits, target = sample(13, n=60, n_classes=3)
        fit = fit_vector_scaling(logits, target)
        assert fit.nll_before == pytest.approx(float(exact_nll(logits, target)[0]), rel=1e-13)
        assert fit.nll_after == pytest.approx(float(exact_nll(fit(logits), target)[0]), rel=1e-13)
        assert fit.nll_after < fit_temperature(logits, target).nll_after < fit.nll_before

    def test_finds_the_scales_that_made_the_data(self):
        logits, target = sample(14, n=20000, n_classes=3, sharpness=1.0)
        weight, bias = np.array([0.5, 2.0, 4.0]), np.array([1.0, -2.0, 1.0])
        fit = fit_vector_scaling((logits - bias) / weight, target, ridge=1e-3)
        np.testing.assert_allclose(fit.weight, weight, rtol=0.1)
        np.testing.assert_allclose(fit.bias - np.mean(fit.bias), bias, atol=0.1)

    def test_mean_probabilities_are_class_frequencies(self):
        logits, target = sample(15, n_classes=3)
        fit = fit_vector_scaling(logits, target, ridge=1e-9)
        probs = torch.from_numpy(fit(logits)).softmax(1).mean(0)
        np.testing.assert_allclose(probs, np.bincount(target) / len(target), atol=1e-6)

    def test_strong_ridge_is_temperature_scaling(self):
        logits, target = sample(16)
        fit, scale = fit_vector_scaling(logits, target, ridge=1e9), fit_temperature(logits, target)
        np.testing.assert_allclose(fit.weight, 1 / scale.temperature, rtol=1e-5)
        np.testing.assert_allclose(fit.bias, 0, atol=1e-5)
        assert fit.nll_after == pytest.approx(scale.nll_after, rel=1e-6)

    def test_scale_and_shift_do_not_matter(self):
        logits, target = sample(17)
        calibrated = fit_vector_scaling(logits, target)(logits)
        for factor, shift in ((1e4, 0), (1e-4, 0), (1, 20), (100, 2000)):
            other = logits * factor + shift
            result = fit_vector_scaling(other, target)(other)
            np.testing.assert_allclose(
                result - result.mean(1, keepdims=True),
                calibrated - calibrated.mean(1, keepdims=True),
                atol=1e-5,
            )

    def test_blocks_do_not_matter(self, monkeypatch):
        logits, target = sample(18, n=101)
        whole = fit_vector_scaling(logits, target)
        monkeypatch.setattr(_common, "_BLOCK", 35)
        np.testing.assert_allclose(
            fit_vector_scaling(logits, target).weight, whole.weight, rtol=1e-6
        )

    @pytest.mark.parametrize(
        ("logits", "target"),
        [
            ([[1.0, 0.0]], [0]),  # one sample, separable
            ([[1.0, 0.0]], [1]),
            ([[0.0, 0.0], [0.0, 0.0]], [1, 1]),
            ([[1e4, 0.0], [0.0, 1e4], [1e4, 0.0]], [0, 1, 1]),
            ([[3.0, -math.inf, 0.0], [0.0, -math.inf, 1.0]], [0, 2]),  # a class masked throughout
        ],
    )
    def test_has_a_solution_whatever_the_data(self, logits, target):
        fit = fit_vector_scaling(np.array(logits), np.array(target))
        assert fit.converged
        assert np.isfinite(fit.weight).all()
        assert np.isfinite(fit.bias).all()
        assert fit.nll_after <= fit.nll_before

    def test_no_convergence(self):
        with pytest.warns(RecalibrationWarning, match="gradient is .* after 1 iter") as caught:
            fit = fit_vector_scaling(*sample(19), ridge=1e-6, max_iterations=1)
        assert caught[0].filename == __file__
        assert not fit.converged
        assert fit.gradient_norm > 1e-6

    def test_call(self):
        fit = fit_vector_scaling(*sample(20, n_classes=3))
        weight, bias = np.array(fit.weight), np.array(fit.bias)
        logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        expected = logits.detach().numpy() * weight + bias
        np.testing.assert_allclose(fit(logits).detach(), expected, rtol=1e-14)
        assert torch.autograd.gradcheck(fit, logits)
        for factor in (0.0, -1.0):
            turned = VectorScaling.from_dict({**fit.to_dict(), "weight": (1.0, factor, 1.0)})
            assert turned(torch.tensor([0.5, -math.inf, 1.0]))[1] == -math.inf
        masked = torch.tensor([0.5, -math.inf, 1.0], requires_grad=True)
        result = fit(masked)
        assert result[1] == -math.inf
        result[[0, 2]].sum().backward()
        np.testing.assert_allclose(masked.grad, weight * [1, 0, 1], rtol=1e-6)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert fit(logits.to(dtype)).dtype == dtype
        assert isinstance(fit(expected.astype(np.float32)), np.ndarray)
        with pytest.raises(ValueError, match=r"shape \(..., 3\), the classes of the fit"):
            fit(torch.zeros(2, 4))

    def test_state(self):
        fit = fit_vector_scaling(*sample(21, n_classes=3))
        assert fit.n_classes == 3
        assert pickle.loads(pickle.dumps(fit)) == fit
        assert VectorScaling.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit
        assert repr(fit).startswith("VectorScaling(weight=[")
        assert "n_classes=3, n_samples=300)" in repr(fit)
        with pytest.raises(ValueError, match=r"^bias: expected 3 entries, one a weight, got 1$"):
            VectorScaling.from_dict({**fit.to_dict(), "bias": (1.0,)})

    @pytest.mark.parametrize("mask", [-1e30, torch.finfo(torch.float32).min, np.finfo(float).min])
    def test_next_to_huge_numbers_the_temperature_is_kept(self, mask):
        logits, target = sample(3, n=200)
        hidden = np.random.default_rng(3).uniform(size=logits.shape) < 0.3
        hidden[np.arange(200), target] = False
        logits[hidden] = mask
        with pytest.warns(RecalibrationWarning, match="worse fit .* is kept: mask .* by -inf") as w:
            fit = fit_vector_scaling(logits, target)
        assert [warning.filename for warning in w] == [__file__]
        assert not fit.converged
        assert fit.bias == (0.0,) * 5
        assert len(set(fit.weight)) == 1
        assert fit.nll_after <= fit.nll_before
        assert fit.nll_after == pytest.approx(float(exact_nll(fit(logits), target)[0]), rel=1e-12)
        if mask > -1e300:
            best = fit_temperature(logits, target)
            assert fit.weight[0] == 1 / best.temperature
            assert fit.nll_after == best.nll_after
        assert VectorScaling.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit

    def test_large_numbers_are_data(self):
        logits, target = sample(3, n=200)
        low = np.random.default_rng(3).uniform(size=logits.shape) < 0.3
        low[np.arange(200), target] = False
        logits[low] = -1e8
        fit = fit_vector_scaling(logits, target)
        assert fit.nll_after == pytest.approx(float(exact_nll(fit(logits), target)[0]), rel=1e-12)

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="ridge: expected a number > 0"):
            fit_vector_scaling(*sample(0), ridge=0)
        with pytest.raises(ValueError, match="max_iterations: expected an integer >= 1"):
            fit_vector_scaling(*sample(0), max_iterations=0)
        with pytest.raises(ValueError, match="2 of 2 masked ones"):
            fit_vector_scaling(np.array([[0.0, -math.inf]] * 2), np.array([1, 1]))


def min_max(values, weights):
    """Isotonic regression by its min-max formula, in fractions."""
    n = len(values)
    total = [Fraction(0)] + [Fraction(0)] * n
    mass = [Fraction(0)] + [Fraction(0)] * n
    for i in range(n):
        total[i + 1] = total[i] + Fraction(values[i]) * Fraction(weights[i])
        mass[i + 1] = mass[i] + Fraction(weights[i])
    return [
        float(
            max(
                min((total[b] - total[a]) / (mass[b] - mass[a]) for b in range(i + 1, n + 1))
                for a in range(i + 1)
            )
        )
        for i in range(n)
    ]


def pooled(values, weights):
    """Isotonic regression by the package, a value for each input."""
    values, weights = np.array(values, np.float64), np.array(weights, np.float64)
    first, means = pool_adjacent_violators(values * weights, weights)
    return np.repeat(means, np.diff(np.append(first, len(values))))


def two_classes(confidence, correct, dtype=torch.float64):
    """Predictions of class 0 with given confidences, and targets that make them right or wrong."""
    confidence = torch.as_tensor(confidence, dtype=dtype)
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    return probs, 1 - torch.as_tensor(correct).long()


class TestPoolAdjacentViolators:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=14))
    def test_min_max_formula(self, pairs):
        values, weights = zip(*pairs, strict=True)
        np.testing.assert_allclose(pooled(values, weights), min_max(values, weights), rtol=1e-12)

    @pytest.mark.parametrize(
        "values",
        [
            [1000, *range(40)],  # one block that takes in its neighbours one by one
            [*range(40), -900],
            list(range(50, 0, -1)),
            [0] * 30,
            [*range(0, 45, 3), *range(14, 0, -1), *range(20)],
        ],
    )
    def test_slow_cases(self, values):
        weights = [1 + i % 3 for i in range(len(values))]
        np.testing.assert_allclose(pooled(values, weights), min_max(values, weights), rtol=1e-12)

    def test_blocks_rise_strictly(self):
        assert pool_adjacent_violators(np.zeros(3), np.ones(3))[0].tolist() == [0]
        # 6 and 4 become 5, which equals the block before.
        values = np.array([*range(6), 6.0, 4.0, *range(7, 47)])
        assert (np.diff(pool_adjacent_violators(values, np.ones(48))[1]) > 0).all()
        rng = np.random.default_rng(0)
        weight = rng.uniform(0.1, 1, 5000)
        first, means = pool_adjacent_violators(weight * rng.integers(2, size=5000), weight)
        assert first[0] == 0
        assert (np.diff(first) > 0).all()
        assert (np.diff(means) > 0).all()


class TestIsotonic:
    @pytest.mark.parametrize("digits", [2, 12])  # with ties and without
    @pytest.mark.parametrize("weighted", [False, True])
    def test_confidence_agrees_with_sklearn(self, digits, weighted):
        rng = np.random.default_rng(digits)
        confidence = rng.uniform(0.5, 1, 400).round(digits)
        correct = rng.uniform(size=400) < confidence**2
        weight = rng.integers(0, 4, 400) / 2 if weighted else None
        probs, target = two_classes(np.maximum(confidence, 0.501), correct)
        fit = fit_isotonic(probs, target=target, weight=weight)
        model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
        model.fit(probs[:, 0].numpy(), correct, sample_weight=weight)
        grid = np.concatenate([probs[:, 0].numpy(), np.linspace(0, 1, 300)])
        np.testing.assert_allclose(fit.confidence(grid), model.predict(grid), atol=1e-12)

    def test_one_vs_rest_agrees_with_sklearn(self):
        logits, target = sample(22, n_classes=4)
        probs = torch.from_numpy(logits).softmax(1).numpy()
        fit = fit_isotonic(probs, target=target, method="one-vs-rest")
        other = torch.from_numpy(sample(23, n_classes=4)[0]).softmax(1).numpy()
        expected = np.stack(
            [
                IsotonicRegression(out_of_bounds="clip")
                .fit(probs[:, k], target == k)
                .predict(other[:, k])
                for k in range(4)
            ],
            axis=1,
        )
        assert (expected.sum(1) > 0).all()
        np.testing.assert_allclose(
            fit(other), expected / expected.sum(1, keepdims=True), atol=1e-12
        )

    def test_row_that_maps_to_zero_stays(self):
        fit = IsotonicCalibration("one-vs-rest", ((0.5, 0.6),) * 3, ((0.0, 1.0),) * 3, 2)
        probs = torch.tensor([[0.4, 0.3, 0.3], [0.1, 0.7, 0.2], [0.55, 0.45, 0.0]])
        expected = torch.tensor([[0.4, 0.3, 0.3], [0, 1, 0], [1, 0, 0]])
        torch.testing.assert_close(fit(probs), expected)

    def test_one_vs_rest_of_probabilities_above_one_by_rounding(self):
        probs = torch.tensor([[1.00005, 0.0], [1.0, 0.0], [0.2, 0.8]])
        fit = fit_isotonic(probs, target=torch.tensor([0, 1, 1]), method="one-vs-rest")
        assert fit.knots[0][-1] == 1
        torch.testing.assert_close(fit(probs), torch.tensor([[0.5, 0.5], [0.5, 0.5], [0, 1]]))

    def test_one_level_of_confidence(self):
        probs, target = two_classes([0.8] * 4, [1, 0, 1, 1])
        fit = fit_isotonic(probs, target=target)
        assert fit.knots == ((0.8,),)
        assert fit.values == ((0.75,),)
        assert fit.confidence(np.array([0.1, 0.8, 1.0])).tolist() == [0.75] * 3

    def test_order_does_not_matter(self):
        logits, target = sample(24)
        logits = logits.round(1)
        order = np.random.default_rng(1).permutation(len(logits))
        for method in ("top-label", "one-vs-rest"):
            fit = fit_isotonic(logits=logits, target=target, method=method)
            assert fit == fit_isotonic(logits=logits[order], target=target[order], method=method)

    def test_weights_are_repetitions(self):
        logits, target = sample(25, n=50)
        weight = np.random.default_rng(2).integers(0, 4, 50)
        repeated = fit_isotonic(logits=logits.repeat(weight, 0), target=target.repeat(weight))
        weighted = fit_isotonic(logits=logits, target=target, weight=torch.from_numpy(weight))
        assert weighted.knots == repeated.knots
        np.testing.assert_allclose(weighted.values, repeated.values, rtol=1e-14)

    @pytest.mark.parametrize("weight", [[1, -1], [0, 0], [1, math.nan], [1, math.inf], [1, 1, 1]])
    def test_wrong_weights(self, weight):
        with pytest.raises(ValueError, match="weight: expected finite numbers >= 0"):
            fit_isotonic(torch.eye(2), target=torch.tensor([0, 1]), weight=np.array(weight))

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="method: expected one of 'top-label', 'one-vs-rest'"):
            fit_isotonic(torch.eye(2), target=torch.tensor([0, 1]), method="ovr")
        with pytest.raises(TypeError, match="weight: expected finite numbers"):
            fit_isotonic(torch.eye(2), target=torch.tensor([0, 1]), weight=[1, 1])
        fit = fit_isotonic(torch.eye(2), target=torch.tensor([0, 1]), method="one-vs-rest")
        with pytest.raises(ValueError, match=r"probs: expected shape \(N, 2\), the classes of"):
            fit(torch.eye(3))
        with pytest.raises(ValueError, match="method: expected 'top-label' for a confidence"):
            fit.confidence(torch.tensor([0.5]))


class TestHistogramBinning:
    @pytest.mark.parametrize("n_bins", [1, 4, 10])
    def test_equal_width_by_loops(self, n_bins):
        logits, target = sample(26, n=150, n_classes=3)
        probs = torch.from_numpy(logits).softmax(1)
        fit = fit_histogram_binning(probs, target=target, n_bins=n_bins)
        bins = [[] for _ in range(n_bins)]
        for row, y in zip(probs.tolist(), target, strict=True):
            index = next(b for b in range(n_bins) if max(row) <= (b + 1) / n_bins)
            bins[index].append(row.index(max(row)) == y)
        assert fit.count == tuple(len(members) for members in bins)
        assert fit.accuracy == tuple(
            sum(members) / len(members) if members else None for members in bins
        )
        assert fit.n_samples == 150
        grid = np.linspace(0, 1, 57)
        for c, value in zip(grid, fit.confidence(grid), strict=True):
            index = next(b for b in range(n_bins) if c <= (b + 1) / n_bins)
            expected = fit.accuracy[index]
            assert value == (c if expected is None else expected)

    @pytest.mark.parametrize("n_bins", [2, 3, 7, 40])
    def test_equal_mass_by_loops(self, n_bins):
        rng = np.random.default_rng(n_bins)
        confidence = np.sort(rng.integers(51, 65, 30) / 64)
        correct = rng.integers(2, size=30)
        order = rng.permutation(30)
        probs, target = two_classes(confidence[order], correct[order])
        fit = fit_histogram_binning(probs, target=target, n_bins=n_bins, binning="mass")
        ends = set()
        for k in range(1, n_bins + 1):
            end = math.floor(k * 30 / n_bins)
            while 0 < end < 30 and confidence[end] == confidence[end - 1]:
                end += 1
            ends.add(end)
        bounds = sorted(ends | {0})
        groups = [correct[a:b] for a, b in pairwise(bounds)]
        assert fit.count == tuple(len(group) for group in groups)
        assert fit.accuracy == tuple(group.mean() for group in groups)
        assert fit.n_bins <= n_bins

    def test_equal_mass_is_equal_without_ties(self):
        confidence = 0.5 + torch.arange(1, 21) / 50
        probs, target = two_classes(confidence, [1, 0] * 10)
        fit = fit_histogram_binning(probs, target=target, n_bins=5, binning="mass")
        assert fit.count == (4,) * 5
        probs, target = two_classes([0.7] * 6, [1, 1, 1, 0, 0, 0])
        fit = fit_histogram_binning(probs, target=target, n_bins=5, binning="mass")
        assert fit.count == (6,)
        assert fit.accuracy == (0.5,)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_edges_are_closed_on_the_right(self, dtype):
        confidence = (torch.arange(8, 16, dtype=torch.float64) / 15).to(dtype)
        probs, target = two_classes(confidence, [1] * 8, dtype)
        fit = fit_histogram_binning(probs, target=target, n_bins=15)
        assert fit.count == (0,) * 7 + (1,) * 8

    def test_rounding_moves_no_sample_across_an_edge_of_equal_mass(self):
        wide = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 1, 200))
        correct = torch.arange(200) % 3 > 0
        for confidence in (wide, wide.float()):
            probs, target = two_classes(confidence, correct, confidence.dtype)
            fit = fit_histogram_binning(probs, target=target, n_bins=15, binning="mass")
            numbered = {**fit.to_dict(), "accuracy": [k / 15 for k in range(15)]}
            fit = HistogramBinning.from_dict(numbered)
            for other in (wide, wide.float()):
                bins = (15 * fit.confidence(other)).round().long()
                assert tuple(bins.bincount().tolist()) == fit.count

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equal_mass_of_neighbouring_numbers(self, dtype):
        confidence = [torch.tensor(0.7, dtype=dtype)]
        for _ in range(7):
            confidence.append(torch.nextafter(confidence[-1], torch.ones((), dtype=dtype)))
        probs, target = two_classes(torch.stack(confidence), [0, 1] * 4, dtype)
        fit = fit_histogram_binning(probs, target=target, n_bins=8, binning="mass")
        assert fit.count == (1,) * 8
        assert fit.confidence(torch.stack(confidence)).tolist() == [0, 1] * 4

    def test_edges_of_equal_mass_are_midway(self):
        probs, target = two_classes([0.5, 0.625, 0.75, 0.75, 1.0], [1] * 5)
        fit = fit_histogram_binning(probs, target=target, n_bins=3, binning="mass")
        assert fit.edges == (0.5625, 0.875)

    def test_in_sample_error_of_the_bins_vanishes(self):
        logits, target = sample(27, n=500, n_classes=3, sharpness=1.5)
        logits *= 3
        fit = fit_histogram_binning(logits=logits, target=target, n_bins=10)
        probs = fit(logits=logits)
        before = expected_calibration_error(logits=logits, target=target, n_bins=10)
        kept = probs.argmax(1) == logits.argmax(1)
        assert kept.mean() > 0.9
        after = expected_calibration_error(probs=probs[kept], target=target[kept], n_bins=10)
        assert after < before / 2

    def test_wrong_arguments(self):
        probs, target = torch.eye(2), torch.tensor([0, 1])
        with pytest.raises(ValueError, match="n_bins: expected an integer >= 1"):
            fit_histogram_binning(probs, target=target, n_bins=0)
        with pytest.raises(ValueError, match="binning: expected one of 'width', 'mass'"):
            fit_histogram_binning(probs, target=target, binning="equal")

    def test_repr(self):
        fit = fit_histogram_binning(torch.eye(2), target=torch.tensor([0, 1]), n_bins=4)
        assert repr(fit) == "HistogramBinning(binning='width', n_bins=4, n_empty=3, n_samples=2)"


def fitted_to_confidence():
    logits, target = sample(28, sharpness=1.0)
    return [
        fit_isotonic(logits=logits, target=target),
        fit_isotonic(logits=logits, target=target, method="one-vs-rest"),
        fit_histogram_binning(logits=logits, target=target, n_bins=8),
        fit_histogram_binning(logits=logits, target=target, n_bins=8, binning="mass"),
    ]


@pytest.mark.parametrize("fit", fitted_to_confidence(), ids=repr)
class TestProbabilities:
    """What isotonic calibration and histogram binning have in common."""

    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
    )
    def test_rows_are_distributions(self, fit, dtype):
        logits, target = sample(29)
        probs = torch.from_numpy(logits).softmax(1).to(dtype)
        result = fit(probs)
        assert result.dtype == dtype
        assert (result >= 0).all()
        tolerance = {torch.float64: 1e-15, torch.float32: 2e-7}.get(dtype, 1e-2)
        torch.testing.assert_close(
            result.double().sum(1), torch.ones(300).double(), rtol=0, atol=tolerance
        )
        assert len(read_predictions(probs=result, target=target)) == 300

    def test_arrays_and_logits(self, fit):
        logits = sample(30)[0]
        probs = torch.from_numpy(logits).softmax(1)
        result = fit(probs.numpy().astype(np.float32))
        assert isinstance(result, np.ndarray)
        assert result.dtype == np.float32
        np.testing.assert_allclose(fit(logits=logits), fit(probs), atol=1e-9)
        assert fit(torch.zeros(0, 5)).shape == (0, 5)

    def test_inputs_are_left_alone(self, fit):
        probs = torch.from_numpy(sample(31)[0]).softmax(1).requires_grad_()
        before = probs.detach().clone()
        assert not fit(probs).requires_grad
        assert torch.equal(probs, before)

    def test_state(self, fit):
        assert pickle.loads(pickle.dumps(fit)) == fit
        assert type(fit).from_dict(json.loads(json.dumps(fit.to_dict()))) == fit
        assert hash(fit) == hash(type(fit).from_dict(fit.to_dict()))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({}, TypeError, "exactly one of the two, got neither"),
            ({"probs": torch.ones(1, 5), "logits": torch.ones(1, 5)}, TypeError, "got both"),
            ({"probs": torch.ones(1, 5)}, ValueError, "sum to 1"),
            ({"probs": torch.full((1, 5), math.nan)}, ValueError, "1 of 1 rows .* leave these"),
            ({"logits": torch.full((2, 5), -math.inf)}, ValueError, "2 of 2 rows"),
            ({"probs": [[1.0, 0.0]]}, TypeError, "probs: expected a floating-point tensor"),
            ({"probs": torch.ones(5)}, ValueError, r"shape \(N, K\)"),
        ],
    )
    def test_wrong_predictions(self, fit, arguments, error, message):
        with pytest.raises(error, match=message):
            fit(**arguments)


def half_right(fit):
    """A map from any confidence to 1/2."""
    probs, target = two_classes([0.9, 0.9], [1, 0])
    if fit is fit_histogram_binning:
        return fit(probs, target=target, n_bins=1)
    return fit(probs, target=target)


@pytest.mark.parametrize("fit", [fit_isotonic, fit_histogram_binning])
class TestTopLabel:
    def test_other_classes_keep_their_proportions(self, fit):
        half = half_right(fit)
        probs = torch.tensor([[0.1, 0.6, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
        expected = [[0.125, 0.5, 0.375, 0.0], [0.5, *[1 / 6] * 3]]
        np.testing.assert_allclose(half(probs), expected, rtol=1e-15)

    def test_tiny_probabilities_keep_their_proportions(self, fit):
        probs = torch.tensor([[1.0, 1e-40, 3e-40], [1.0, 5e-324, 0.0]], dtype=torch.float64)
        np.testing.assert_allclose(
            half_right(fit)(probs), [[0.5, 0.125, 0.375], [0.5, 0.5, 0.0]], rtol=1e-15
        )

    def test_prediction_may_change(self, fit):
        probs, target = two_classes([0.6, 0.6, 0.6, 0.6], [1, 0, 0, 0])
        result = fit(probs, target=target)(probs)
        np.testing.assert_allclose(result, [[0.25, 0.75]] * 4, rtol=1e-15)

    def test_confidence(self, fit):
        half = half_right(fit)
        values = torch.tensor([[0.2, 1.0, 0.0]], dtype=torch.bfloat16)
        result = half.confidence(values)
        assert result.dtype == torch.bfloat16
        assert result.tolist() == [[0.5] * 3]
        assert isinstance(half.confidence(np.array([0.5])), np.ndarray)
        for bad in ([1.001], [-0.1], [math.nan], [math.inf]):
            with pytest.raises(
                ValueError, match=r"^confidence: expected confidences in \[0, 1\], got 1"
            ):
                half.confidence(torch.tensor(bad))
        with pytest.raises(TypeError, match="confidence: expected a floating-point"):
            half.confidence(0.5)

    def test_no_confidence(self, fit):
        for shape in ((0,), (2, 0), (0, 3)):
            assert half_right(fit).confidence(torch.empty(shape)).shape == shape
        assert half_right(fit).confidence(np.empty(0, np.float32)).dtype == np.float32
        with pytest.raises(ValueError, match=r"^confidence: .*shape \(..., N\), got .* \(\)$"):
            half_right(fit).confidence(torch.tensor(0.5))

    def test_confidences_above_one_by_rounding(self, fit):
        above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
        probs = torch.tensor([[0.6, 0.4], [above, 0.0], [1.00005, 0.0], [0.9, 0.1]])
        fitted = fit(probs, target=torch.tensor([0, 0, 1, 0]))
        assert type(fitted).from_dict(fitted.to_dict()) == fitted
        one = fitted.confidence(torch.tensor([1.0])).item()
        assert fitted.confidence(torch.tensor([above, 1.0000001, 1.00009])).tolist() == [one] * 3

    def test_no_sample(self, fit):
        with pytest.raises(ValueError, match="target: expected at least one sample"):
            fit(torch.zeros(0, 2), target=torch.zeros(0).long())

    def test_nonfinite_rows(self, fit):
        with pytest.raises(ValueError, match=r"probs: .* 1 of 2 rows .*; leave these rows out"):
            fit(torch.tensor([[0.5, 0.5], [math.nan, 0.5]]), target=torch.tensor([0, 1]))


def test_confidences_a_rounding_above_one_leave_no_negative_probability():
    fitted = fit_histogram_binning(
        torch.tensor([[0.6, 0.4]] * 4), target=torch.tensor([0, 0, 0, 1]), n_bins=5
    )
    probs = fitted(probs=torch.tensor([[1.00005, 0.0, 0.0]]))
    assert probs.tolist() == [[1.0, 0.0, 0.0]]


# The state of the maps


STATES = {
    Temperature: {
        "temperature": 2.0,
        "logit_scale": 50.0,
        "nll_before": 1.0,
        "nll_after": 0.5,
        "bound": None,
        "converged": True,
        "n_iterations": 3,
        "n_samples": 4,
    },
    VectorScaling: {
        "weight": (1.0, 2.0),
        "bias": (0.0, -1.0),
        "ridge": 1.0,
        "nll_before": 1.0,
        "nll_after": 0.5,
        "gradient_norm": 1e-9,
        "converged": True,
        "n_iterations": 3,
        "n_samples": 4,
    },
    HistogramBinning: {
        "binning": "width",
        "edges": (0.25, 0.5),
        "accuracy": (None, 0.5, 1.0),
        "count": (0, 2, 1),
    },
    IsotonicCalibration: {
        "method": "one-vs-rest",
        "knots": ((0.5, 0.6), (0.1,)),
        "values": ((0.0, 1.0), (0.5,)),
        "n_samples": 4,
    },
}
FIT_FIELDS = [
    ({"nll_before": math.nan}, r"nll_before: expected a number >= 0, got nan"),
    ({"nll_after": -1.0}, r"nll_after: expected a number >= 0, got -1.0"),
    ({"nll_after": None}, r"nll_after: expected a number >= 0, got NoneType None"),
    ({"converged": "no"}, r"converged: expected True or False, got str 'no'"),
    ({"n_iterations": -1}, r"n_iterations: expected an integer >= 0, got -1"),
    ({"n_samples": 0}, r"n_samples: expected an integer >= 1, got 0"),
]
ENTRIES = r"entries, one a"
WRONG_STATES = {
    Temperature: [
        *FIT_FIELDS,
        ({"temperature": 0}, r"temperature: expected a number > 0, got 0"),
        ({"temperature": math.nan}, r"temperature: expected a number > 0, got nan"),
        ({"temperature": 1, "logit_scale": -3}, r"logit_scale: expected a number > 0, got -3"),
        ({"bound": "left"}, r"bound: expected one of 'lower', 'upper', got 'left'"),
    ],
    VectorScaling: [
        *FIT_FIELDS,
        ({"weight": ()}, r"weight: expected two numbers at least, one a class, got 0"),
        ({"weight": 1.0}, r"weight: expected a tuple, got float 1.0"),
        ({"weight": np.ones(2)}, r"weight: expected a tuple, got .* \(2,\); call its tolist\(\)"),
        ({"weight": (1.0, math.nan)}, r"weight\[1\]: expected a number, got nan"),
        ({"bias": (1.0, "2")}, r"bias\[1\]: expected a number, got str '2'"),
        ({"bias": (1.0,)}, rf"bias: expected 2 {ENTRIES} weight, got 1"),
        ({"ridge": 0.0}, r"ridge: expected a number > 0, got 0.0"),
        ({"gradient_norm": math.nan}, r"gradient_norm: expected a number >= 0, got nan"),
    ],
    HistogramBinning: [
        ({"binning": "equal"}, r"binning: expected one of 'width', 'mass', got 'equal'"),
        ({"edges": (0.5, 0.25)}, r"edges\[1\]: expected a number > the one before, 0.5, got 0.25"),
        ({"edges": (0.5, 0.5)}, r"edges\[1\]: expected a number > the one before, 0.5, got 0.5"),
        ({"edges": (0.5, math.nan)}, r"edges\[1\]: expected a number >= 0 and <= 1, got nan"),
        ({"edges": (0.5, 1.5)}, r"edges\[1\]: expected a number >= 0 and <= 1, got 1.5"),
        ({"edges": ()}, rf"accuracy: expected 1 {ENTRIES} bin, got 3"),
        ({"edges": "ab"}, r"edges: expected a tuple, got str 'ab'"),
        ({"count": (0, 2)}, rf"count: expected 3 {ENTRIES} bin, got 2"),
        ({"count": (0, 2, -1)}, r"count\[2\]: expected an integer >= 0, got -1"),
        (
            {"accuracy": (None, 0.5, 1.5)},
            r"accuracy\[2\]: expected a number .* <= 1, got 1.5",
        ),
        (
            {"accuracy": (None, None, 1.0)},
            r"accuracy\[1\]: expected a number .* NoneType None",
        ),
        ({"accuracy": (0.5, 0.5, 1.0)}, r"accuracy\[0\]: expected None for an empty bin, got 0.5"),
    ],
    IsotonicCalibration: [
        ({"method": "ovr"}, r"method: expected one of 'top-label', 'one-vs-rest', got 'ovr'"),
        ({"method": "top-label"}, r"knots: expected one curve, got 2"),
        ({"knots": ()}, r"knots: expected two curves at least, one a class, got 0"),
        ({"knots": ((0.5, 0.6),)}, r"knots: expected two curves at least, one a class, got 1"),
        ({"knots": (0.5, 0.6)}, r"knots\[0\]: expected a tuple, got float 0.5"),
        ({"knots": ((0.5, 0.6), ())}, r"knots\[1\]: expected at least one knot, got none"),
        ({"knots": ((0.6, 0.5), (0.1,))}, r"knots\[0\]\[1\]: expected .* before, 0.6, got 0.5"),
        ({"knots": ((0.5, math.nan), (0.1,))}, r"knots\[0\]\[1\]: expected a number .*, got nan"),
        ({"values": ((0.0, 1.0),)}, rf"values: expected 2 {ENTRIES} curve, got 1"),
        ({"values": ((0.0, 1.0), ())}, rf"values\[1\]: expected 1 {ENTRIES} knot, got 0"),
        ({"values": ((1.0, 0.0), (0.5,))}, r"values\[0\]\[1\]: .* >= the one before, 1.0, got 0.0"),
        ({"values": ((0.0, 1.1), (0.5,))}, r"values\[0\]\[1\]: expected a number .*, got 1.1"),
        ({"n_samples": 2.5}, r"n_samples: expected an integer >= 1, got float 2.5"),
    ],
}


@pytest.mark.parametrize("kind", STATES)
class TestState:
    def test_right_ones(self, kind):
        state = STATES[kind]
        fit = kind(**state)
        assert fit.to_dict() == state
        assert kind.from_dict(json.loads(json.dumps(state))) == fit
        assert repr(fit).startswith(kind.__name__)

    def test_wrong_fields(self, kind):
        for change, message in WRONG_STATES[kind]:
            state = {**STATES[kind], **change}
            for make in (kind.from_dict, lambda state: kind(**state)):
                with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
                    make(state)

    def test_wrong_keys(self, kind):
        first, *others = STATES[kind]
        state = {name: STATES[kind][name] for name in others}
        fields = f"^state: expected the fields {', '.join(STATES[kind])}, got"
        remedy = "pass what to_dict returned$"
        with pytest.raises(ValueError, match=f"{fields} no {first}; {remedy}"):
            kind.from_dict(state)
        with pytest.raises(ValueError, match=f"{fields} no {first}, an unknown 'x'; {remedy}"):
            kind.from_dict({**state, "x": 1})
        with pytest.raises(TypeError, match=rf"{fields} list \[\]; {remedy}"):
            kind.from_dict([])


def test_warnings_name_the_line_outside_of_the_package(monkeypatch):
    names = {"__name__": "calibclip.caller"}
    exec(compile("def call(f, *arguments):\n    return f(*arguments)", "caller.py", "exec"), names)
    short = functools.partial(fit_vector_scaling, ridge=1e-6, max_iterations=1)
    with pytest.warns(RecalibrationWarning, match="gradient") as caught:
        names["call"](short, *sample(19))
    assert caught[0].filename == __file__
    monkeypatch.setattr(temperature, "find_root", lambda f, x: find_root(f, x, 1))
    with pytest.warns(RecalibrationWarning, match="no convergence") as caught:
        names["call"](fit_temperature, *sample(8))
    assert caught[0].filename == __file__
