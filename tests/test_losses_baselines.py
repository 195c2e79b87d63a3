import math

import loss_oracles
import numpy as np
import pytest
import torch
from loss_cases import (
    BOUNDS,
    CASES,
    F32,
    F64,
    LOSSES,
    SHAPES,
    Case,
    check_against_oracle,
    check_terms,
    error,
    make_inputs,
    prepared,
    single,
    tensors_of,
)

from calibclip import (
    FARELoss,
    PMGAFTLoss,
    TeCoALoss,
    fare_loss,
    pmg_aft_loss,
    tecoa_loss,
)

NAMES = ("tecoa", "pmg_aft", "fare")
BASELINES = [case for name in NAMES for case in CASES[name]]
LOGITS = LOSSES["pmg_aft"].inputs
FEATURES = ("features_adv", "features_ref", "features_clean")


def with_labels(names, dtype=F64, grad=(), **shape):
    inputs, target = make_inputs(names, **shape)
    return tensors_of(inputs, dtype, grad), torch.from_numpy(target)


# The oracles


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "block",
    [
        lambda a, b: loss_oracles.categorical_kl(a, b, 1.7),
        loss_oracles.cosine,
        loss_oracles.squared_distance,
        lambda a, b: loss_oracles.squared_distance(a, b, normalize=True),
        lambda a, b: loss_oracles.map_distance(a, b, "l2"),
        lambda a, b: loss_oracles.map_distance(a, b, "l1"),
        lambda a, b: loss_oracles.map_distance(a, b, "cosine"),
    ],
    ids=["kl", "cosine", "squared", "normalized", "l2", "l1", "1 - cosine"],
)
def test_gradients_of_the_oracles_are_derivatives(block, which):
    rows = np.random.default_rng(3).normal(0, 2, (2, 5))
    want = loss_oracles.difference_gradient(lambda *rows: block(*rows)[0], rows, which)
    with loss_oracles.mpmath.workdps(loss_oracles.DIGITS):
        found = block(*[[loss_oracles.number(x) for x in row] for row in rows])[1 + which]
        gap = max(abs(a - b) for a, b in zip(found, want, strict=True))
    assert gap < 1e-20


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradient_of_the_cross_entropy_oracle_is_its_derivative(smoothing):
    row = np.random.default_rng(4).normal(0, 3, 6)

    def value(z):
        return loss_oracles.cross_entropy(z, 2, smoothing, 1.3)

    want = loss_oracles.difference_gradient(lambda z: value(z)[0], [row], 0)
    with loss_oracles.mpmath.workdps(loss_oracles.DIGITS):
        found = value([loss_oracles.number(x) for x in row])[1]
        gap = max(abs(a - b) for a, b in zip(found, want, strict=True))
    assert gap < 1e-20


def test_the_measure_of_error_can_fail():
    want = np.array([[3.0, 4.0], [0.0, 0.0], [300.0, 400.0]])
    assert error(want, want) == 0
    for row, scale in ((0, 5.0), (1, 5.0), (2, 500.0)):  # a hundredth of the longest row, at least
        got = want.copy()
        got[row, 0] += 1e-3
        assert error(got, want) == pytest.approx(1e-3 / scale)
    assert error(want * np.nan, want) == math.inf
    assert error(np.float64(2.0), np.float64(1.0)) == 1
    with pytest.raises(AssertionError):
        error(want[0], want)


# Values and gradients


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", BASELINES, ids=str)
def test_values_and_gradients(case, shape, dtype):
    check_against_oracle(case, *prepared(case, **SHAPES[shape]), dtype)


@pytest.mark.parametrize("case", BASELINES, ids=str)
def test_terms(case):
    check_terms(case, *prepared(case, **SHAPES["ten classes"]), F64)


def test_terms_sum_up_with_the_weights():
    tensors, target = with_labels((*LOGITS, *FEATURES))
    logits, features = ({name: tensors[name] for name in names} for names in (LOGITS, FEATURES))
    for kl_reduction in (None, "sum", "mean"):
        loss = PMGAFTLoss(ref_weight=0.4, clean_weight=2.0, kl_reduction=kl_reduction)
        found = loss.terms(**logits, target=target)
        want = found.cross_entropy + 0.4 * found.kl_ref + 2 * found.kl_clean
        torch.testing.assert_close(found.total, want)
    found = FARELoss(clean_weight=0.3).terms(**features)
    torch.testing.assert_close(found.total, 0.7 * found.adv + 0.3 * found.clean)
    features.pop("features_clean")
    found = FARELoss(reduction="none").terms(**features)
    torch.testing.assert_close(found.total, found.adv)
    assert not found.clean.any()


def test_label_smoothing_spreads_over_all_classes():
    logits = torch.tensor([[2.0, 0.0, 1.0]], dtype=F64)
    logs = logits.log_softmax(-1)[0].tolist()
    found = tecoa_loss(logits, torch.tensor([0]), label_smoothing=0.3)
    want = -(0.8 * logs[0] + 0.1 * logs[1] + 0.1 * logs[2])
    assert float(found) == pytest.approx(want, rel=1e-12)
    sharp = tecoa_loss(logits, torch.tensor([0]))
    assert float(sharp) == pytest.approx(-logs[0], rel=1e-12)


# PMG-AFT as published


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("scale", [100.0, 40.0])
def test_official_pmg_aft(scale, dtype):
    """Cosines instead of logits in all terms, KLs summed, nothing detached."""
    inputs, target = make_inputs(LOGITS)
    terms = loss_oracles.pmg_aft(inputs, target, temperature=scale, detach_ref=False)
    value, grads = loss_oracles.combine(terms, "mean", 1.0, ("kl_ref", "kl_clean"))
    tensors = tensors_of(inputs, dtype, LOGITS)
    loss = PMGAFTLoss.official() if scale == 100 else PMGAFTLoss.official(logit_scale=scale)
    found = loss(**tensors, target=torch.from_numpy(target))
    found.backward()
    assert error(found.detach(), value) <= BOUNDS[dtype]
    assert set(grads) == set(LOGITS)
    for name, grad in grads.items():
        assert error(tensors[name].grad, grad) <= BOUNDS[dtype]


def test_pmg_aft_lost_the_logit_scale():
    """Its cross-entropy hardly leaves ln C and its KLs vanish; at scale 100 they are 1e4 larger."""
    rng = np.random.default_rng(0)
    cosines = rng.normal(0.2, 0.03, (256, 200))
    inputs = {name: 100 * (cosines + rng.normal(0, 0.01, cosines.shape)) for name in LOGITS}
    tensors = tensors_of(inputs, F64)
    target = torch.from_numpy(cosines.argmax(-1))
    published = PMGAFTLoss.official().terms(**tensors, target=target)
    plain = PMGAFTLoss().terms(**tensors, target=target)
    assert float(published.cross_entropy) == pytest.approx(math.log(200), abs=0.1)
    assert plain.cross_entropy < 2
    assert 1e-2 < published.kl_ref < 5e-2
    assert 1e-2 < published.kl_clean < 5e-2
    assert 50 < 256 * plain.kl_ref < 500
    assert 50 < 256 * plain.kl_clean < 500


def test_a_doubled_batch_doubles_the_published_kl_alone():
    tensors, target = with_labels(LOGITS)
    twice = {name: torch.cat([z, z]) for name, z in tensors.items()}
    loss = PMGAFTLoss.official()
    once, double = (
        loss.terms(**z, target=y)
        for z, y in ((tensors, target), (twice, torch.cat([target, target])))
    )
    torch.testing.assert_close(double.cross_entropy, once.cross_entropy)
    torch.testing.assert_close(double.kl_ref, 2 * once.kl_ref)
    torch.testing.assert_close(double.kl_clean, 2 * once.kl_clean)
    for loss in (PMGAFTLoss(), PMGAFTLoss(kl_reduction="mean")):
        once = loss.terms(**tensors, target=target)
        double = loss.terms(**twice, target=torch.cat([target, target]))
        for a, b in zip(once, double, strict=True):
            torch.testing.assert_close(a, b)


def test_gradient_to_the_frozen_model():
    """Published: nothing is detached. Plain: it stops at the frozen model, not at the clean one."""
    for loss, reached in ((PMGAFTLoss.official(), True), (PMGAFTLoss(), False)):
        tensors, target = with_labels(LOGITS, grad=LOGITS)
        loss(**tensors, target=target).backward()
        assert (tensors["logits_adv_ref"].grad is not None) == reached
        assert tensors["logits_clean"].grad.norm() > 0


def test_kl_reduction_and_reduction():
    """None follows the reduction; the published sum goes with the mean only."""
    tensors, target = with_labels(LOGITS)
    rows = pmg_aft_loss(**tensors, target=target, reduction="none")
    entropy = torch.nn.functional.cross_entropy(tensors["logits_adv"], target, reduction="none")
    mean = pmg_aft_loss(**tensors, target=target, kl_reduction="mean")
    torch.testing.assert_close(mean, rows.mean())
    summed = pmg_aft_loss(**tensors, target=target, kl_reduction="sum")
    torch.testing.assert_close(summed, entropy.mean() + (rows - entropy).sum())
    summed = pmg_aft_loss(**tensors, target=target, reduction="sum")
    torch.testing.assert_close(summed, rows.sum())
    for options in (
        {"kl_reduction": "sum", "reduction": "none"},
        {"kl_reduction": "mean", "reduction": "none"},
        {"kl_reduction": "batchmean"},
        {"kl_reduction": "none"},
    ):
        with pytest.raises(ValueError, match=r"^kl_reduction: expected .*, got .*"):
            pmg_aft_loss(**tensors, target=target, **options)
        with pytest.raises(ValueError, match=r"^kl_reduction: expected .*, got .*"):
            PMGAFTLoss(**options)


# FARE


def test_fare_sums_over_the_width():
    """Not F.mse_loss, which divides by D too."""
    for width in (16, 512):
        tensors, _ = with_labels(FEATURES[:2], width=width)
        found = FARELoss.official()(**tensors)
        mse = torch.nn.functional.mse_loss(*tensors.values())
        torch.testing.assert_close(found, width * mse)
        assert found > 10 * mse


def test_fare_does_not_normalize_unless_told():
    tensors, _ = with_labels(FEATURES[:2])
    longer = {name: 3 * f for name, f in tensors.items()}
    torch.testing.assert_close(fare_loss(**longer), 9 * fare_loss(**tensors))
    for options in ({"normalize": True}, {"metric": "cosine"}):
        torch.testing.assert_close(fare_loss(**longer, **options), fare_loss(**tensors, **options))
    half = fare_loss(**tensors, normalize=True) / 2
    torch.testing.assert_close(half, fare_loss(**tensors, metric="cosine"))


def test_fare_trades_clean_for_adversarial():
    """w = 1 is the clean distance alone: nothing is learnt from the attack."""
    tensors, _ = with_labels(FEATURES, grad=FEATURES)
    found = fare_loss(**tensors, clean_weight=1.0)
    found.backward()
    clean = fare_loss(tensors["features_clean"], tensors["features_ref"])
    torch.testing.assert_close(found, clean)
    assert tensors["features_adv"].grad is None or not tensors["features_adv"].grad.any()
    assert tensors["features_clean"].grad.norm() > 0


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"normalize": True}], ids=str)
def test_equal_and_opposite_features(options, dtype):
    tensors, _ = with_labels(FEATURES[:1], dtype)
    ref = tensors["features_adv"]
    tiny = 8 * torch.finfo(dtype).eps
    for sign in (1.0, -1.0):
        adv = (sign * ref).requires_grad_()
        value = fare_loss(adv, ref, **options, reduction="none")
        value.sum().backward()
        if sign == 1:
            want, grad = torch.zeros(4, dtype=dtype), torch.zeros_like(ref)
        elif not options:
            want, grad = 4 * ref.square().sum(-1), -4 * ref
        else:
            want = torch.full((4,), 4.0 if "normalize" in options else 2.0, dtype=dtype)
            grad = torch.zeros_like(ref)
        torch.testing.assert_close(value.detach(), want, rtol=tiny, atol=tiny)
        torch.testing.assert_close(adv.grad, grad, rtol=tiny, atol=tiny)


@pytest.mark.parametrize("options", [{"metric": "cosine"}, {"normalize": True}], ids=str)
def test_features_that_hardly_differ(options):
    """1 - cos is 5e-5 here; taken literally in float32, it would be off by 1e-3."""
    inputs, _ = make_inputs(FEATURES[:2], batch=6, width=512)
    noise = np.random.default_rng(5).normal(0, 0.01 * 10 / 512**0.5, (6, 512))
    inputs["features_adv"] = single(inputs["features_ref"] + noise)
    want = loss_oracles.fare(inputs, **options)["adv"]
    tensors = tensors_of(inputs, F32, FEATURES[:1])
    found = fare_loss(**tensors, **options, reduction="none")
    found.sum().backward()
    assert error(found.detach(), want.values) <= 1e-4
    assert error(tensors["features_adv"].grad, want.grads["features_adv"]) <= 1e-4


@pytest.mark.parametrize("options", [{"metric": "cosine"}, {"normalize": True}], ids=str)
def test_features_of_length_zero(options):
    """Their cosine is 0 with every other; the row of two zeros is no distance apart in l2."""
    tensors, _ = with_labels(FEATURES[:2], F32)
    adv, ref = tensors.values()
    adv[1] = ref[2] = adv[3] = ref[3] = 0
    adv.requires_grad_()
    ref.requires_grad_()
    value = fare_loss(adv, ref, **options, detach_ref=False, reduction="none")
    value.sum().backward()
    want = [1.0, 1.0, 0.0 if "normalize" in options else 1.0]
    assert value[1:].tolist() == pytest.approx(want, rel=1e-6)
    assert adv.grad.isfinite().all()
    assert ref.grad.isfinite().all()


def test_tecoa_and_fare_are_published_as_they_are():
    tensors, target = with_labels(("logits_adv", *FEATURES[:2]))
    logits = tensors.pop("logits_adv")
    assert torch.equal(TeCoALoss.official()(logits, target), tecoa_loss(logits, target))
    assert torch.equal(FARELoss.official()(**tensors), fare_loss(**tensors))


# Errors

Z, Y = torch.zeros(2, 3), torch.tensor([0, 2])
F = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("call", "error_type", "message"),
    [
        (lambda: pmg_aft_loss(Z, Y, Z[:, :2], Z), ValueError, r"^logits_adv_ref: .*, got \(2, 2\)"),
        (lambda: pmg_aft_loss(Z, Y, Z, Z[:1]), ValueError, r"^logits_clean: .*\(2, 3\), got \(1,"),
        (lambda: pmg_aft_loss(Z, Y, Z, None), TypeError, r"^logits_clean: .*, got NoneType None"),
        (lambda: pmg_aft_loss(Z, Y, None, Z), TypeError, r"^logits_adv_ref: .*, got NoneType None"),
        (lambda: pmg_aft_loss(Z[0], Y, Z, Z), ValueError, r"^logits_adv: .*\(B, C\).* \(3,\)"),
        (lambda: tecoa_loss(Z, Y + 1), ValueError, r"^target: .* in \[0, 2\], got 3"),
        (lambda: tecoa_loss(Z, None), TypeError, r"^target: .*, got NoneType None"),
        (lambda: tecoa_loss(Z.long(), Y), TypeError, r"^logits_adv: .*got int64.*float\(\)"),
        (lambda: fare_loss(F[0], F[0]), ValueError, r"^features_adv: .*\(B, D\).* \(4,\)"),
        (lambda: fare_loss(F[None], F), ValueError, r"^features_adv: .*\(B, D\).* \(1, 2, 4\)"),
        (lambda: fare_loss(F, F[0]), ValueError, r"^features_ref: expected .*, got .*\(4,\)"),
        (lambda: fare_loss(F, F[:, :3]), ValueError, r"^features_ref: .*\(2, 4\), got \(2, 3\)"),
        (lambda: fare_loss(F, F[:1]), ValueError, r"^features_ref: .*\(2, 4\), got \(1, 4\)"),
        (lambda: fare_loss(F, None), TypeError, r"^features_ref: .*, got NoneType None"),
        (
            lambda: fare_loss(F, F, F[:, :3], clean_weight=0.5),
            ValueError,
            r"^features_clean: .*\(2, 4\), got \(2, 3\)",
        ),
        (
            lambda: fare_loss(F, F, clean_weight=0.5),
            (TypeError, ValueError),
            r"^features_clean: expected .*, got None",
        ),
        (lambda: fare_loss(F, F, F), ValueError, r"^features_clean: expected .*clean_weight"),
        (
            lambda: FARELoss(clean_weight=0.5)(F, F),
            (TypeError, ValueError),
            r"^features_clean: expected .*, got None",
        ),
        (lambda: FARELoss()(F, F, F), ValueError, r"^features_clean: expected .*clean_weight"),
    ],
)
def test_bad_inputs(call, error_type, message):
    with pytest.raises(error_type, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "options", "error_type", "message"),
    [
        (TeCoALoss, {"label_smoothing": -0.1}, ValueError, r"^label_smoothing: .*, got -0\.1"),
        (TeCoALoss, {"label_smoothing": 1.5}, ValueError, r"^label_smoothing: .*, got 1\.5"),
        (TeCoALoss, {"label_smoothing": "a"}, TypeError, r"^label_smoothing: .*, got str 'a'"),
        (PMGAFTLoss, {"temperature": 0.0}, ValueError, r"^temperature: .* > 0, got 0\.0"),
        (PMGAFTLoss, {"ref_weight": -1.0}, ValueError, r"^ref_weight: .*, got -1\.0"),
        (PMGAFTLoss, {"clean_weight": math.nan}, ValueError, r"^clean_weight: .*, got nan"),
        (PMGAFTLoss, {"detach_ref": "no"}, TypeError, r"^detach_ref: .*, got str 'no'"),
        (PMGAFTLoss, {"detach_clean": 1}, TypeError, r"^detach_clean: .*, got int 1"),
        (FARELoss, {"clean_weight": -0.1}, ValueError, r"^clean_weight: .*, got -0\.1"),
        (FARELoss, {"clean_weight": 1.1}, ValueError, r"^clean_weight: .*, got 1\.1"),
        (FARELoss, {"metric": "l1"}, ValueError, r"^metric: .*'l2', 'cosine', got 'l1'"),
        (FARELoss, {"normalize": "yes"}, TypeError, r"^normalize: .*, got str 'yes'"),
        (FARELoss, {"detach_ref": None}, TypeError, r"^detach_ref: .*, got NoneType None"),
    ],
)
def test_bad_options(module, options, error_type, message):
    with pytest.raises(error_type, match=message):
        module(**options)
    names = {TeCoALoss: "tecoa", PMGAFTLoss: "pmg_aft", FARELoss: "fare"}
    case = Case(names[module], options)
    tensors, target = with_labels(case.names)
    with pytest.raises(error_type, match=message):
        case.call(tensors, target)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_pmg_of_predictions_that_hardly_differ(temperature):
    """The temperature must not round the logits before their difference is taken."""
    rng = np.random.default_rng(6)
    ref = single(100 * rng.normal(0.2, 0.06, (4, 200)))
    others = [single(ref + rng.normal(0, 1e-4, ref.shape)) for _ in range(2)]
    results = []
    for dtype in (F32, F64):
        adv, ref_, clean = (torch.tensor(z, dtype=dtype) for z in (others[0], ref, others[1]))
        adv.requires_grad_()
        terms = PMGAFTLoss(temperature=temperature, reduction="none").terms(
            adv, torch.arange(4), ref_, clean
        )
        (terms.kl_ref + terms.kl_clean).sum().backward()
        results.append((terms.kl_ref.detach(), terms.kl_clean.detach(), adv.grad))
    for found, want in zip(*results, strict=True):
        assert (found - want).norm() <= 5e-6 * want.norm()
