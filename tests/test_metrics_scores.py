import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from calibclip.metrics import (
    BrierDecomposition,
    accuracy,
    brier_decomposition,
    brier_score,
    negative_log_likelihood,
)

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
TARGET = torch.tensor([0, 1, 2, 1])


def random_logits(seed, n=200, n_classes=7, scale=3.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, n_classes)) * scale, rng.integers(n_classes, size=n)


def test_hand_values():
    assert accuracy(PROBS, target=TARGET) == 0.75
    assert negative_log_likelihood(PROBS, target=TARGET) == pytest.approx(0.691155, abs=1e-6)
    assert brier_score(PROBS, target=TARGET) == pytest.approx(0.41, abs=1e-7)
    assert brier_score(PROBS, target=TARGET, scale="half") == pytest.approx(0.205, abs=1e-7)
    assert brier_score(PROBS, target=TARGET, scale="mean") == pytest.approx(0.136667, abs=1e-6)


def test_two_class_brier_is_twice_the_binary_score():
    positive = np.array([0.2, 0.2, 0.8, 0.8])
    probs, target = np.stack([1 - positive, positive], axis=1), np.array([0, 1, 1, 1])
    assert brier_score(probs, target=target, scale="half") == pytest.approx(0.19, abs=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_loops_and_scikit_learn(seed):
    logits, target = random_logits(seed)
    hits, surprise, distance = 0, 0.0, 0.0
    probs = np.empty_like(logits)
    for i, (row, y) in enumerate(zip(logits, target, strict=True)):
        weights = [math.exp(z) for z in row]
        probs[i] = [w / sum(weights) for w in weights]
        hits += int(max(range(len(row)), key=lambda k: row[k]) == y)
        surprise -= math.log(probs[i, y])
        distance += sum((p - (k == y)) ** 2 for k, p in enumerate(probs[i]))
    n, labels = len(target), list(range(logits.shape[1]))

    for given_as in ({"logits": logits}, {"probs": probs}):
        assert accuracy(**given_as, target=target) == hits / n
        nll = negative_log_likelihood(**given_as, target=target)
        assert nll == pytest.approx(surprise / n, rel=1e-12)
        assert nll == pytest.approx(log_loss(target, probs, labels=labels), rel=1e-12)
        brier = brier_score(**given_as, target=target)
        assert brier == pytest.approx(distance / n, rel=1e-12)
        assert brier == pytest.approx(
            brier_score_loss(target, probs, labels=labels, scale_by_half=False), rel=1e-12
        )
    assert accuracy(logits=logits, target=target) == accuracy_score(target, logits.argmax(1))


def test_float32_is_rounded_once_a_sample_and_summed_in_float64():
    logits, target = random_logits(3, n=20_000)
    logits = torch.from_numpy(logits).float()
    for metric in (negative_log_likelihood, brier_score):
        value = metric(logits=logits, target=target)
        assert value == pytest.approx(metric(logits=logits.double(), target=target), rel=1e-8)


def test_saturated_logits():
    logits = torch.tensor([[200.0, 0.0, -200.0]])
    values = [negative_log_likelihood(logits=logits, target=torch.tensor([y])) for y in range(3)]
    assert values == [0.0, 200.0, 400.0]
    assert math.copysign(1, values[0]) == 1.0  # not -0.0
    assert brier_score(logits=logits, target=torch.tensor([0])) == pytest.approx(0, abs=1e-80)
    assert brier_score(logits=logits, target=torch.tensor([1])) == 2.0


def test_nothing_is_clipped():
    probs, logits = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])
    for given_as in ({"probs": probs}, {"logits": logits}):
        assert negative_log_likelihood(**given_as, target=torch.tensor([0])) == 0.0
        assert negative_log_likelihood(**given_as, target=torch.tensor([1])) == math.inf


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([0.2, 0.2, 0.8, 0.8], [0, 1, 1, 1], (0.19, 0.065, 0.0625, 0.1875, 0.0, 0.0)),
        ([0.1, 0.3, 0.6, 0.9], [0, 1, 0, 1], (0.2175, 0.07625, 0.0, 0.25, 0.01625, 0.125)),
    ],
)
def test_brier_terms_by_hand(confidence, correct, expected):
    metric = BrierDecomposition(2)
    metric.take_pairs(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct).bool())
    terms = metric.compute()
    assert terms == pytest.approx(expected, abs=1e-12)
    assert terms.refinement == pytest.approx(expected[0] - expected[1])


@pytest.mark.parametrize("n_bins", [1, 7, 40])
def test_brier_terms_add_up_whatever_the_bins(n_bins):
    logits, target = random_logits(5, n=400)
    terms = brier_decomposition(logits=logits, target=target, n_bins=n_bins)
    probs = torch.from_numpy(logits).softmax(1)
    correct = probs.argmax(1) == torch.from_numpy(target)
    direct = float((probs.amax(1) - correct.double()).square().mean())
    assert terms.brier == pytest.approx(direct, rel=1e-12)
    bins = (probs.amax(1) * n_bins).ceil().long() - 1
    variance = sum(
        float((probs.amax(1)[bins == b] - probs.amax(1)[bins == b].mean()).square().sum())
        for b in bins.unique()
    )
    assert terms.within_variance == pytest.approx(variance / 400, rel=1e-9)


@pytest.mark.parametrize("scale", ["max", None, 1])
def test_unknown_scale(scale):
    with pytest.raises(
        ValueError, match=f"^scale: expected one of 'sum', 'half', 'mean', got {scale!r}"
    ):
        brier_score(PROBS, target=TARGET, scale=scale)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 30),
    n_classes=st.integers(2, 6),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_properties(seed, n, n_classes, scale):
    logits, target = random_logits(seed, n, n_classes, scale)
    brier = brier_score(logits=logits, target=target)
    nll = negative_log_likelihood(logits=logits, target=target)
    assert 0 <= accuracy(logits=logits, target=target) <= 1
    assert 0 <= brier <= 2
    assert nll >= 0
    assert brier_score(logits=logits, target=target, scale="half") == brier / 2
    assert brier_score(logits=logits, target=target, scale="mean") == pytest.approx(
        brier / n_classes, rel=1e-14
    )

    order, classes = (np.random.default_rng(seed).permutation(size) for size in (n, n_classes))
    for metric, value in ((brier_score, brier), (negative_log_likelihood, nll)):
        assert metric(logits=logits[order], target=target[order]) == pytest.approx(value)
        renamed = np.argsort(classes)[target]  # class k moves to where classes holds k
        assert metric(logits=logits[:, classes], target=renamed) == pytest.approx(value)
