"""Uncertainty and accuracy under attack, against exact fractions and SciPy."""

import io
import math
import pickle
import statistics
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.metrics import MetricWarning
from calibclip.metrics._streaming import Column
from calibclip.metrics.shift import UncertaintyShift, harmonic_mean_accuracy, uncertainty_shift

SUBSETS = {
    "all": lambda clean, adv: True,
    "flipped": lambda clean, adv: clean and not adv,
    "survived": lambda clean, adv: clean and adv,
    "always wrong": lambda clean, adv: not clean and not adv,
    "repaired": lambda clean, adv: not clean and adv,
}
NUMBERS = (
    "rise",
    "tie",
    "non_drop",
    "mean_clean",
    "mean",
    "median",
    "relative_mean",
    "standard_deviation",
    "effect_size",
    "rank_biserial",
)


def pairs(seed=0, n=90, dtype=torch.float64, coarse=False):
    generator = torch.Generator().manual_seed(seed)
    clean, adv = torch.rand(2, n, generator=generator, dtype=torch.float64)
    if coarse:
        clean, adv = (clean * 4).round() / 4, (adv * 4).round() / 4
    correct_clean, correct_adv = torch.rand(2, n, generator=generator) < 0.6
    return clean.to(dtype), adv.to(dtype), correct_clean, correct_adv


def plain(clean, adv, tolerance=0.0):
    """All numbers of one subset from exact fractions."""
    clean, adv = ([Fraction(float(u)) for u in side] for side in (clean, adv))
    n, t = len(clean), Fraction(tolerance)
    if n == 0:
        return dict.fromkeys(NUMBERS, math.nan)
    d = [b - a for a, b in zip(clean, adv, strict=True)]
    mean, mean_clean = sum(d) / n, sum(clean) / n
    deviation = math.sqrt(sum((x - mean) ** 2 for x in d) / (n - 1)) if n > 1 else math.nan
    moved = [x for x in d if abs(x) > t]
    ranks = {}
    for x in moved:
        below = sum(abs(y) < abs(x) for y in moved)
        same = sum(abs(y) == abs(x) for y in moved)
        ranks[abs(x)] = below + Fraction(same + 1, 2)
    weight = sum(ranks[abs(x)] for x in moved)
    signed = sum(ranks[abs(x)] * (1 if x > 0 else -1) for x in moved)
    if deviation == 0:
        effect = math.copysign(math.inf, mean) if mean else math.nan
    else:
        effect = float(mean) / deviation
    return {
        "rise": sum(x > t for x in d) / n,
        "tie": sum(abs(x) <= t for x in d) / n,
        "non_drop": sum(x >= -t for x in d) / n,
        "mean_clean": float(mean_clean),
        "mean": float(mean),
        "median": float(statistics.median(d)),
        "relative_mean": float(mean / abs(mean_clean)) if mean_clean else math.nan,
        "standard_deviation": deviation,
        "effect_size": effect,
        "rank_biserial": float(signed / weight) if moved else math.nan,
    }


def numbers(summary):
    return {name: getattr(summary, name) for name in NUMBERS}


def assert_like(summary, expected, rel=1e-9):
    for name, value in expected.items():
        found = getattr(summary, name)
        assert found == pytest.approx(value, rel=rel, abs=1e-12, nan_ok=True), name


# Uncertainty


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 25),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    tolerance=st.sampled_from([0.0, 0.25]),
    coarse=st.booleans(),
)
def test_against_fractions(seed, n, dtype, tolerance, coarse):
    clean, adv, correct_clean, correct_adv = pairs(seed, n, dtype, coarse)
    found = uncertainty_shift(clean, adv, correct_clean, correct_adv, tolerance=tolerance)
    assert list(found.subsets) == list(SUBSETS)
    for name, belongs in SUBSETS.items():
        chosen = [i for i in range(n) if belongs(bool(correct_clean[i]), bool(correct_adv[i]))]
        assert found.subsets[name].count == len(chosen)
        assert not found.subsets[name].subsets
        assert_like(found.subsets[name], plain(clean[chosen], adv[chosen], tolerance))
    np.testing.assert_equal(numbers(found), numbers(found.subsets["all"]))


@pytest.mark.parametrize("coarse", [False, True])
def test_ranks_agree_with_wilcoxon(coarse):
    clean, adv, *_ = pairs(coarse=coarse)
    d = (adv - clean).numpy()
    test = scipy.stats.wilcoxon(d[d != 0], alternative="greater")
    n = (d != 0).sum()
    expected = 2 * test.statistic / (n * (n + 1) / 2) - 1
    found = uncertainty_shift(clean, adv)
    assert found.rank_biserial == pytest.approx(expected, abs=1e-12)
    t = scipy.stats.ttest_rel(adv, clean).statistic
    assert found.effect_size == pytest.approx(t / math.sqrt(len(d)), rel=1e-12)


def test_without_correctness_there_is_one_subset():
    clean, adv, *_ = pairs()
    assert list(uncertainty_shift(clean, adv).subsets) == ["all"]
    assert list(uncertainty_shift(clean[:0], adv[:0]).subsets) == list(SUBSETS)
    metric = UncertaintyShift().update(clean, adv)
    metric.update(clean, adv, torch.ones(90), torch.zeros(90))
    counts = {name: subset.count for name, subset in metric.compute().subsets.items()}
    assert counts == {"all": 180, "flipped": 90, "survived": 0, "always wrong": 0, "repaired": 0}


def test_extremes():
    ones = torch.ones(50)
    same = uncertainty_shift(ones, ones)
    assert (same.rise, same.tie, same.non_drop, same.mean) == (0.0, 1.0, 1.0, 0.0)
    assert math.isnan(same.effect_size)
    assert math.isnan(same.rank_biserial)
    # 0.1 is no binary fraction, so that the sums round.
    up = uncertainty_shift(0 * ones, 0.1 * ones)
    assert (up.rise, up.standard_deviation, up.effect_size) == (1.0, 0.0, math.inf)
    assert up.rank_biserial == 1.0
    assert math.isnan(up.relative_mean)
    down = uncertainty_shift(0.1 * ones, 0 * ones)
    assert (down.non_drop, down.effect_size, down.rank_biserial) == (0.0, -math.inf, -1.0)
    one = uncertainty_shift(ones[:1], 3 * ones[:1])
    assert (one.count, one.mean, one.median, one.relative_mean) == (1, 2.0, 2.0, 2.0)
    assert math.isnan(one.effect_size)
    nothing = uncertainty_shift(ones[:0], ones[:0])
    assert nothing.count == 0
    assert all(math.isnan(value) for value in numbers(nothing).values())
    # Of a negative uncertainty, such as a differential entropy, a rise is a rise.
    assert uncertainty_shift(-4 * ones, -3 * ones).relative_mean == 0.25


def test_of_one_group_overflow_does_not_reach_the_others():
    clean = torch.tensor([0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    adv = torch.tensor([1e200, -1e200, 1.0, 2.0], dtype=torch.float64)
    right, flips = torch.ones(4), torch.tensor([0, 0, 1, 1])
    found = uncertainty_shift(clean, adv, right, flips).subsets
    assert found["survived"].effect_size == pytest.approx(1.5 / math.sqrt(0.5))
    assert found["flipped"].mean == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale):
    clean, adv, *flags = pairs()
    usual, scaled = (
        uncertainty_shift(clean, adv, *flags),
        uncertainty_shift((scale * clean).float(), (scale * adv).float(), *flags),
    )
    for name in ("rise", "relative_mean", "effect_size", "rank_biserial"):
        assert getattr(scaled, name) == pytest.approx(getattr(usual, name), rel=1e-5)


def test_far_from_zero():
    clean, adv, *_ = pairs()
    found = uncertainty_shift(clean, adv + 1e3)
    expected = plain(clean, adv + 1e3)
    # The squares leave eps * (mean / deviation)^2 of the variance.
    assert_like(found, expected, rel=1e-8)


@pytest.mark.parametrize("scatter", [1e-2, 3e-7, 1e-10, 1e-12])
@pytest.mark.parametrize("n_parts", [1, 7, 400])
def test_a_scatter_that_is_small_next_to_the_mean(scatter, n_parts):
    rng = np.random.default_rng(0)
    adv = 7.3 * (1 + scatter * rng.normal(size=400))
    expected = plain(np.zeros(400), adv)
    parts = [UncertaintyShift().update(np.zeros(len(a)), a) for a in np.array_split(adv, n_parts)]
    merged = UncertaintyShift().merge(*parts).compute()
    stream = UncertaintyShift()
    for part in np.array_split(adv, n_parts):
        stream.update(np.zeros(len(part)), part)
    for found in (merged, stream.compute()):
        # Of the standard deviation 1e-15 of the mean is lost.
        deviation = expected["standard_deviation"]
        assert found.standard_deviation == pytest.approx(deviation, rel=1e-12, abs=7.3e-15)
        assert found.effect_size == pytest.approx(
            expected["effect_size"], rel=1e-12 + 1e-15 / scatter
        )
        assert found.mean == pytest.approx(expected["mean"], rel=1e-14)


def test_moments_of_several_processes():
    # What `synced` and torchmetrics make of the columns: a row of each process, or none.
    clean, adv, *flags = pairs()
    parts = [
        UncertaintyShift().update(clean[rows], adv[rows], *(flag[rows] for flag in flags))
        for rows in (slice(0, 1), slice(1, 1), slice(1, 90))
    ]
    whole, gathered = UncertaintyShift().merge(*parts), Column(torch.float64)
    for part in parts:
        gathered.append(part._columns["moments"].values)
    assert len(whole._columns["moments"].values) == 18
    whole._columns["moments"] = gathered
    found, expected = whole.compute(), UncertaintyShift().update(clean, adv, *flags).compute()
    for name in SUBSETS:
        assert_like(found.subsets[name], numbers(expected.subsets[name]), rel=1e-12)


@pytest.mark.parametrize("ranks", [False, True])
def test_stream(ranks):
    clean, adv, correct_clean, correct_adv = pairs(coarse=True)
    whole = uncertainty_shift(clean, adv, correct_clean, correct_adv)
    metrics = [UncertaintyShift(ranks=ranks) for _ in range(3)]
    for rows, metric in zip(
        (slice(0, 1), slice(1, 1), slice(1, 40), slice(40, 90)),
        (metrics[0], metrics[1], metrics[1], metrics[2]),
        strict=True,
    ):
        metric.update(clean[rows], adv[rows].numpy(), correct_clean[rows], correct_adv[rows])
    buffer = io.BytesIO()
    torch.save(metrics[0].merge(*metrics[1:]).state_dict(), buffer)
    buffer.seek(0)
    loaded = UncertaintyShift(ranks=ranks).load_state_dict(torch.load(buffer))
    for name, subset in loaded.compute().subsets.items():
        expected = numbers(whole.subsets[name])
        if not ranks:
            expected |= {"median": math.nan, "rank_biserial": math.nan}
            assert {n: len(c) for n, c in loaded.state_dict()["columns"].items()} == {"moments": 18}
        assert_like(subset, expected)
    assert loaded.reset().compute().count == 0
    with pytest.raises(ValueError, match=r"^others: expected options"):
        loaded.merge(UncertaintyShift(ranks=not ranks))


def test_an_accelerator_is_not_waited_for():
    # A look at a tensor without values raises.
    nothing = torch.ones(3, device="meta")
    flags = nothing.bool()
    for ranks in (False, True):
        metric = UncertaintyShift(ranks=ranks)
        assert metric.update(nothing, nothing, flags, flags) is metric


def test_order_does_not_matter():
    given = pairs(coarse=True)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    whole, shuffled = uncertainty_shift(*given), uncertainty_shift(*(x[order] for x in given))
    for name in SUBSETS:
        assert_like(shuffled.subsets[name], numbers(whole.subsets[name]), rel=1e-12)


def test_inputs_stay_and_gradients_are_cut():
    clean, adv, *flags = pairs()
    copies = clean.clone(), adv.clone()
    expected = uncertainty_shift(clean, adv, *flags)
    found = uncertainty_shift(clean.requires_grad_(), adv, *(f.numpy().astype(int) for f in flags))
    np.testing.assert_equal(numbers(found), numbers(expected))
    assert torch.equal(clean, copies[0])
    assert torch.equal(adv, copies[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_policy_for_nan(bad):
    clean, adv, *flags = pairs()
    adv[[3, 7]] = bad
    kept = [i for i in range(90) if i not in (3, 7)]
    message = "^uncertainty_clean, uncertainty_adv: expected finite values, got 2 of 90 rows"
    with pytest.raises(ValueError, match=message):
        uncertainty_shift(clean, adv, *flags)
    with pytest.warns(MetricWarning, match="UncertaintyShift: 2 rows with NaN"):
        found = uncertainty_shift(clean, adv, *flags, nan="omit")
    expected = uncertainty_shift(clean[kept], adv[kept], *(flag[kept] for flag in flags))
    for name in SUBSETS:
        assert found.subsets[name].count == expected.subsets[name].count
        assert_like(found.subsets[name], numbers(expected.subsets[name]))
    assert math.isnan(uncertainty_shift(clean, adv, *flags, nan="propagate").rise)


def test_prints_as_a_table():
    clean, adv = torch.tensor([0.25, 0.5, 0.5, 1.0]), torch.tensor([0.5, 0.5, 1.5, 0.5])
    found = uncertainty_shift(clean, adv, torch.tensor([1, 1, 1, 0]), torch.tensor([1, 1, 0, 0]))
    lines = str(found).splitlines()
    assert lines[0].split()[:4] == ["subset", "count", "rise", "tie"]
    assert len({len(line) for line in lines}) == 1
    assert [line[:12].strip() for line in lines[1:]] == list(SUBSETS)
    assert lines[2].split() == (
        "flipped 1 1.0000 0.0000 1.0000 0.5 +1 +1 +2.0000 - - +1.0000".split()
    )
    assert set(lines[-1].split()[2:]) == {"-"}
    markup = found._repr_html_()
    assert markup.count("<tr>") == 6
    assert markup.count("<td>") == 5 * 12
    assert repr(found).startswith("ShiftSummary(count=4, rise=0.5000, tie=0.2500, non_drop=0.7500")
    assert len(str(found.subsets["flipped"]).splitlines()) == 2
    assert pickle.loads(pickle.dumps(found)) is not found


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([0.5], torch.ones(1)), {}, TypeError, "uncertainty_clean: expected a floating-point"),
        ((torch.ones(1), torch.ones(1, 1)), {}, ValueError, "uncertainty_adv: expected a float"),
        ((torch.ones(1), torch.ones(2)), {}, ValueError, "uncertainty_adv: expected the shape of"),
        ((torch.ones(1), torch.ones(1).int()), {}, TypeError, "uncertainty_adv: expected a float"),
        (
            (torch.ones(1), torch.ones(1), torch.ones(1)),
            {},
            TypeError,
            "correct_clean, correct_adv: expected both or neither, got only correct_clean",
        ),
        (
            (torch.ones(1), torch.ones(1), torch.ones(1), torch.tensor([2])),
            {},
            ValueError,
            "correct_adv: expected bool, or 0 and 1",
        ),
        ((torch.ones(1), torch.ones(1)), {"tolerance": -1}, ValueError, "tolerance: expected a nu"),
        ((torch.ones(1), torch.ones(1)), {"nan": "keep"}, ValueError, "nan: expected one of"),
    ],
)
def test_refuses(arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        uncertainty_shift(*arguments, **options)


# Accuracy


@pytest.mark.parametrize(("clean", "robust"), [(0.75, 0.25), (1, 1), (62.5, 31), (0.3, 0.0)])
def test_harmonic_mean(clean, robust):
    numbers = [Fraction(clean), Fraction(robust)]
    expected = 0 if 0 in numbers else 2 / sum(1 / x for x in numbers)
    assert harmonic_mean_accuracy(clean, robust) == pytest.approx(float(expected), rel=1e-15)
    assert harmonic_mean_accuracy(robust, clean) == harmonic_mean_accuracy(clean, robust)


def test_harmonic_mean_at_the_edges():
    assert harmonic_mean_accuracy(0.0, 0.0) == 0.0
    assert math.isnan(harmonic_mean_accuracy(math.nan, 0.5))
    assert math.isnan(harmonic_mean_accuracy(0.0, math.nan))
    with pytest.raises(ValueError, match=r"^robust_accuracy: expected a number >= 0, got -0.5"):
        harmonic_mean_accuracy(0.5, -0.5)
    with pytest.raises(TypeError, match=r"^clean_accuracy: expected a number >= 0, got float32"):
        harmonic_mean_accuracy(torch.tensor(0.5), 0.5)
