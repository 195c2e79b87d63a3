"""Ten thousand random and hostile inputs: a number in range or a clear error, never nonsense."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibclip import metrics

CLEAR = re.compile(r"^[a-z_, 0-9\[\]]+: expected .+, got .+", re.DOTALL)
SPECIAL = [0.0, -0.0, 1.0, 0.5, 1e-45, 1e-30, 1e30, 3e38, -1e30, math.nan, math.inf, -math.inf]

PREDICTION_METRICS = {
    "accuracy": (metrics.accuracy, 0, 1),
    "nll": (metrics.negative_log_likelihood, 0, math.inf),
    "brier": (metrics.brier_score, 0, 2),
    "brier terms": (lambda *a, **k: metrics.brier_decomposition(*a, **k).brier, 0, 1),
    "sharpness": (lambda *a, **k: metrics.sharpness(*a, **k).entropy, 0, math.log(7)),
    "ece": (metrics.expected_calibration_error, 0, 1),
    "rms": (lambda *a, **k: metrics.expected_calibration_error(*a, **k, norm=2), 0, 1),
    "mass": (lambda *a, **k: metrics.expected_calibration_error(*a, **k, binning="mass"), 0, 1),
    "mce": (metrics.maximum_calibration_error, 0, 1),
    "signed": (lambda *a, **k: sum(metrics.signed_calibration_error(*a, **k)[:2]), 0, 1),
    "classwise": (metrics.classwise_calibration_error, 0, 1),
    "smooth": (metrics.smooth_calibration_error, 0, 1),
    "sweep": (metrics.sweep_calibration_error, 0, 1),
    "kernel": (
        lambda *a, **k: metrics.kernel_calibration_error(*a, **k, estimator="biased"), 0, 2
    ),
}  # fmt: skip
RANKING_METRICS = {
    "failure auroc": (metrics.failure_auroc, 0, 1),
    "failure fpr95": (metrics.failure_fpr95, 0, 1),
    "aupr": (metrics.failure_aupr_error, 0, 1),
    "aurc": (metrics.aurc, 0, 1),
    "excess aurc": (metrics.excess_aurc, 0, 1),
    "augrc": (metrics.augrc, 0, 1),
}


@st.composite
def matrices(draw):
    """Scores that are anything from a proper softmax to garbage, and a target for them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, k = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["softmax", "softmax", "saturated", "logits", "onehot", "ties"]))
    scores = rng.normal(size=(n, k))
    if kind == "saturated":
        scores = scores * 10.0 ** rng.integers(0, 38)
    if kind in ("softmax", "saturated"):
        scores = np.exp(scores - scores.max(1, keepdims=True, initial=-math.inf))
        scores = scores / scores.sum(1, keepdims=True)
    elif kind == "onehot":
        scores = np.eye(k)[rng.integers(k, size=n)]
    elif kind == "ties":
        scores = np.full((n, k), 1 / k)
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
        if n:
            scores[rng.integers(n), rng.integers(k)] = value
    low, high = draw(st.sampled_from([(0, k), (0, k), (0, k), (-1, k), (0, k + 1)]))
    target = rng.integers(low, high, size=n)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    return torch.from_numpy(scores).to(dtype), torch.from_numpy(target)


def outcome(call):
    """The value, or the text of a refusal."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        return str(error)


def check(value, low, high, slack=1e-6):
    assert isinstance(value, float)
    assert math.isnan(value) or low - slack <= value <= high + slack


@pytest.mark.parametrize("name", PREDICTION_METRICS)
@settings(
    max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    given_scores=matrices(),
    argument=st.sampled_from(["probs", "logits"]),
    nan=st.sampled_from(["raise", "propagate"]),
)
def test_predictions(name, given_scores, argument, nan):
    metric, low, high = PREDICTION_METRICS[name]
    scores, target = given_scores
    before = scores.clone(), target.clone()
    value = outcome(lambda: metric(**{argument: scores}, target=target, nan=nan))
    if isinstance(value, str):
        assert CLEAR.match(value)
    else:
        check(value, low, high)
        if math.isnan(value):
            assert len(scores) == 0 or nan == "propagate"
    assert torch.equal(scores.nan_to_num(nan=7.0), before[0].nan_to_num(nan=7.0))
    assert torch.equal(target, before[1])


@pytest.mark.parametrize("name", RANKING_METRICS)
@settings(
    max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    values=st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), max_size=12),
    seed=st.integers(0, 2**32 - 1),
    hostile=st.booleans(),
    nan=st.sampled_from(["raise", "propagate"]),
)
def test_rankings(name, values, seed, hostile, nan):
    metric, low, high = RANKING_METRICS[name]
    uncertainty = torch.tensor(values, dtype=torch.float32)
    correct = torch.from_numpy(np.random.default_rng(seed).integers(2 + hostile, size=len(values)))
    value = outcome(lambda: metric(uncertainty, correct, nan=nan))
    if isinstance(value, str):
        assert CLEAR.match(value)
        assert bool(uncertainty.isnan().any()) or int(correct.max()) > 1
    else:
        check(value, low, high)
        if math.isnan(value):
            # Nothing to rank, or nothing to rank it against.
            both = len(correct.unique()) == 2
            assert not both or (nan == "propagate" and bool(uncertainty.isnan().any()))
