import math

import loss_oracles
import numpy as np
import pytest
import torch
from loss_cases import (
    CASES,
    F32,
    F64,
    LOSSES,
    SHAPES,
    check_against_oracle,
    check_terms,
    error,
    make_inputs,
    prepared,
    single,
    tensors_of,
)

from calibclip import (
    FAPLoss,
    SimCLIPLoss,
    TRADESLoss,
    fap_loss,
    fare_loss,
    simclip_loss,
    trades_loss,
)

REGULARIZERS = [case for name in ("trades", "fap", "simclip") for case in CASES[name]]
FAP = LOSSES["fap"].inputs
PAIR = ("logits_adv", "logits_clean")


def with_labels(names, dtype=F64, grad=(), **shape):
    inputs, target = make_inputs(names, **shape)
    return tensors_of(inputs, dtype, grad), torch.from_numpy(target)


# Values and gradients


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", REGULARIZERS, ids=str)
def test_values_and_gradients(case, shape, dtype):
    check_against_oracle(case, *prepared(case, **SHAPES[shape]), dtype)


@pytest.mark.parametrize("case", REGULARIZERS, ids=str)
def test_terms(case):
    check_terms(case, *prepared(case, **SHAPES["ten classes"]), F64)


@pytest.mark.parametrize("name", FAP)
def test_gradient_of_the_fap_oracle_is_its_derivative(name):
    inputs, _ = make_inputs(FAP, batch=1, classes=4, width=5)
    rows = [inputs[key][0] for key in FAP]

    def value(*rows):
        return loss_oracles.fap_kl(dict(zip(FAP, rows, strict=True)))[0]

    want = loss_oracles.difference_gradient(value, rows, FAP.index(name))
    with loss_oracles.mpmath.workdps(loss_oracles.DIGITS):
        numbers = [[loss_oracles.number(x) for x in row] for row in rows]
        found = loss_oracles.fap_kl(dict(zip(FAP, numbers, strict=True)))[1][name]
        gap = max(abs(a - b) for a, b in zip(found, want, strict=True))
    assert gap < 1e-20


@pytest.mark.parametrize("shift", [0.0, 20.0])
@pytest.mark.parametrize("sd", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("name", ["trades", "fap"])
def test_predictions_that_hardly_differ(name, sd, shift):
    """As in the first steps: float32 must not turn a KL of second order into noise.

    Nor must a change common to all logits, which changes no probability.
    """
    case = CASES[name][0]
    inputs, target = make_inputs(case.names, batch=6, classes=20)
    noise = np.random.default_rng(5).normal(0, sd, inputs["logits_clean"].shape)
    inputs["logits_adv"] = single(inputs["logits_clean"] + noise + shift)
    want = case.terms(inputs, target)["kl"]
    assert (want.values < 40 * sd**2).all()
    tensors = tensors_of(inputs, F32, PAIR)
    found = case.build("none").terms(**tensors, target=torch.from_numpy(target)).kl
    found.sum().backward()
    assert (found >= 0).all()
    assert error(found.detach(), want.values) <= 1e-5
    for key in PAIR:
        assert error(tensors[key].grad, want.grads[key]) <= 1e-5


# TRADES


def test_trades_by_hand():
    """p_clean = (1/4, 3/4), p_adv = (1/2, 1/2): CE ln 4 and KL = 3/4 ln 3 - ln 2."""
    clean, adv = torch.tensor([[0.0, math.log(3)]], dtype=F64), torch.zeros(1, 2, dtype=F64)
    found = TRADESLoss.official().terms(adv, torch.tensor([0]), clean)
    kl = 0.75 * math.log(3) - math.log(2)
    assert float(found.cross_entropy) == pytest.approx(math.log(4), rel=1e-12)
    assert float(found.kl) == pytest.approx(kl, rel=1e-12)
    assert float(found.total) == pytest.approx(math.log(4) + 6 * kl, rel=1e-12)
    other = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)  # KL the other way round
    assert abs(kl - other) > 1e-2


def test_trades_trains_the_clean_prediction_through_both_terms():
    grads = {}
    for detach in (False, True):
        tensors, target = with_labels(PAIR, grad=PAIR)
        trades_loss(**tensors, target=target, detach_clean=detach).backward()
        grads[detach] = tensors["logits_clean"].grad
    plain = tensors["logits_clean"].detach().requires_grad_()
    torch.nn.functional.cross_entropy(plain, target).backward()
    torch.testing.assert_close(grads[True], plain.grad)
    assert (grads[False] - plain.grad).norm() > 0.1 * plain.grad.norm()


def test_weight_zero_is_clean_training():
    tensors, target = with_labels(PAIR)
    clean = torch.nn.functional.cross_entropy(tensors["logits_clean"], target)
    torch.testing.assert_close(trades_loss(**tensors, target=target, weight=0.0), clean)
    tensors, target = with_labels(FAP)
    clean = torch.nn.functional.cross_entropy(tensors["logits_clean"], target)
    torch.testing.assert_close(fap_loss(**tensors, target=target, weight=0.0), clean)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_nothing_is_left_at_equality(dtype):
    tensors, target = with_labels(PAIR, dtype)
    adv, clean = (tensors["logits_clean"].clone().requires_grad_() for _ in range(2))
    found = TRADESLoss().terms(adv, target, clean)
    found.kl.backward()
    tiny = 16 * torch.finfo(dtype).eps
    assert abs(found.kl) <= tiny
    assert adv.grad.abs().max() <= tiny
    assert clean.grad.abs().max() <= tiny
    features, _ = with_labels(("features_clean",), dtype)
    row = features["features_clean"]
    found = FAPLoss().terms(adv.detach(), target, row, clean.detach(), row.clone())
    assert abs(found.kl) <= 2 * tiny


def test_predictions_without_a_doubt():
    """A probability that underflows is no 0 * inf."""
    adv = torch.tensor([[800.0, 0.0, -800.0], [0.0, 900.0, 0.0]], requires_grad=True)
    clean = torch.tensor([[-700.0, 0.0, 800.0], [0.0, 900.0, 0.0]], requires_grad=True)
    found = TRADESLoss(reduction="none").terms(adv, torch.tensor([2, 1]), clean)
    assert found.kl.tolist() == pytest.approx([1600.0, 0.0])
    found.total.sum().backward()
    assert adv.grad.isfinite().all()
    assert clean.grad.isfinite().all()


@pytest.mark.parametrize("both", [True, False])
def test_masked_classes(both):
    """A logit of -inf is a class that is not there: no 0 * inf, in value or gradient."""
    (adv, clean), target = (
        with_labels(PAIR, batch=3, classes=5)[0].values(),
        torch.tensor([0, 1, 2]),
    )
    adv[:, 3] = -torch.inf if both else -900.0
    kept = [z[:, [0, 1, 2, 4]].requires_grad_() for z in (adv, clean)]
    want = trades_loss(kept[0], target, kept[1])
    want.backward()
    clean[:, 3] = -torch.inf
    adv.requires_grad_()
    clean.requires_grad_()
    found = trades_loss(adv, target, clean)
    found.backward()
    torch.testing.assert_close(found, want)
    for whole, part in zip((adv, clean), kept, strict=True):
        assert not whole.grad[:, 3].any()
        torch.testing.assert_close(whole.grad[:, [0, 1, 2, 4]], part.grad)


# FAP


def test_fap_weighs_the_kl_by_the_features():
    """Equal features: twice the KL; opposite: none; at right angles: once. Per sample."""
    (adv, clean), target = with_labels(PAIR, batch=3)[0].values(), torch.tensor([0, 1, 2])
    kl = TRADESLoss(reduction="none").terms(adv, target, clean).kl
    ones = torch.tensor([[3.0, 0.0]] * 3, dtype=F64)
    others = torch.tensor([[5.0, 0.0], [-2.0, 0.0], [0.0, 7.0]], dtype=F64)
    found = FAPLoss(reduction="none").terms(adv, target, ones, clean, others)
    factor = torch.tensor([2.0, 0.0, 1.0], dtype=F64)
    torch.testing.assert_close(found.kl, factor * kl)
    # The mean is of the products, not the product of the means.
    mean = FAPLoss.official().terms(adv, target, ones, clean, others).kl
    torch.testing.assert_close(mean, (factor * kl).mean())
    assert (mean - factor.mean() * kl.mean()).abs() > 1e-3


def test_fap_detaches_nothing():
    tensors, target = with_labels(FAP, grad=FAP)
    FAPLoss.official()(**tensors, target=target).backward()
    assert all(t.grad.norm() > 1e-3 for t in tensors.values())


# Sim-CLIP


def test_published_simclip_is_half_of_a_cosine_fare():
    """The second term is constant: value -cos, gradient exactly half of FARE's."""
    grads = {}
    for name, loss in (("sim", SimCLIPLoss.official()), ("fare", None)):
        tensors, _ = with_labels(("features_adv", "features_ref"), grad=("features_adv",))
        value = loss(**tensors) if loss else fare_loss(**tensors, metric="cosine")
        value.backward()
        grads[name] = tensors["features_adv"].grad, value
    torch.testing.assert_close(grads["sim"][0], grads["fare"][0] / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads["sim"][1], grads["fare"][1] - 1, rtol=1e-12, atol=0)


def test_published_simclip_never_trains_the_reference():
    names = ("features_adv", "features_ref")
    tensors, _ = with_labels(names, grad=names)
    terms = SimCLIPLoss.official().terms(**tensors)
    terms.total.backward()
    assert tensors["features_ref"].grad is None
    assert terms.adv.requires_grad
    assert not terms.other.requires_grad


def test_simclip_with_clean_features_is_alive_twice():
    names = ("features_adv", "features_clean")
    tensors, _ = with_labels(names, grad=names)
    terms = SimCLIPLoss(frozen_reference=False).terms(**tensors)
    assert terms.other.requires_grad
    torch.testing.assert_close(terms.adv, terms.other)
    terms.other.backward()
    assert tensors["features_adv"].grad is None
    second = tensors["features_clean"].grad.clone()
    tensors["features_clean"].grad = None
    terms.adv.backward()
    assert tensors["features_clean"].grad is None
    assert tensors["features_adv"].grad.norm() > 0
    # Together: the gradient of -cos / 2 in each, as if nothing had been stopped.
    whole = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    (-torch.cosine_similarity(*whole.values()).mean() / 2).backward()
    torch.testing.assert_close(tensors["features_adv"].grad, whole["features_adv"].grad)
    torch.testing.assert_close(second, whole["features_clean"].grad)


@pytest.mark.parametrize("name", ["features_ref", "features_clean"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_simclip_of_equal_and_opposite_features(name, sign):
    tensors, _ = with_labels(("features_adv",), F32)
    adv = tensors["features_adv"].requires_grad_()
    value = simclip_loss(adv, **{name: sign * adv.detach()}, reduction="none")
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.full((4,), -sign))
    assert adv.grad.abs().max() <= 1e-6


def test_simclip_does_not_see_the_length():
    tensors, _ = with_labels(("features_adv", "features_ref"))
    longer = {name: 7 * t for name, t in tensors.items()}
    torch.testing.assert_close(simclip_loss(**longer), simclip_loss(**tensors))


# Errors

Z, Y = torch.zeros(2, 3), torch.tensor([0, 2])
F = torch.ones(2, 4)
EITHER = (TypeError, ValueError)


@pytest.mark.parametrize(
    ("call", "error_type", "message"),
    [
        (
            lambda: trades_loss(Z, Y, Z[:, :2]),
            ValueError,
            r"^logits_clean: .*\(2, 3\), got \(2, 2\)",
        ),
        (lambda: trades_loss(Z, Y, None), TypeError, r"^logits_clean: .*, got NoneType None"),
        (lambda: trades_loss(None, Y, Z), TypeError, r"^logits_adv: .*, got NoneType None"),
        (lambda: trades_loss(Z, Y - 1, Z), ValueError, r"^target: .* in \[0, 2\], got -1"),
        (lambda: trades_loss(Z, Y.int(), Z), TypeError, r"^target: .*int32.*; call target\.long"),
        (lambda: fap_loss(Z, Y, F, Z[:, :2], F), ValueError, r"^logits_clean: .*, got \(2, 2\)"),
        (lambda: fap_loss(Z, Y, F, Z, F[:, :3]), ValueError, r"^features_clean: .*, got \(2, 3\)"),
        (lambda: fap_loss(Z, Y, F[0], Z, F), ValueError, r"^features_adv: .*\(B, D\).*\(4,\)"),
        (
            lambda: fap_loss(Z, Y, F, Z, F[None]),
            ValueError,
            r"^features_clean: .*\(1, 2, 4",
        ),
        (
            lambda: fap_loss(Z, Y, F[:1], Z, F[:1]),
            ValueError,
            r"^features_adv: .*, got .*1",
        ),
        (lambda: fap_loss(Z, Y, F, Z, None), TypeError, r"^features_clean: .*, got NoneType None"),
        (lambda: fap_loss(Z, Y, None, Z, F), TypeError, r"^features_adv: .*, got NoneType None"),
        (
            lambda: fap_loss(Z, Y, F.to("meta"), Z, F.to("meta")),
            ValueError,
            r"^features_adv: .* device of logits_adv, cpu, got meta",
        ),
        (lambda: simclip_loss(F, F.to("meta")), ValueError, r"^features_ref: .* got meta"),
        (lambda: simclip_loss(F[0], F[0]), ValueError, r"^features_adv: .*\(B, D\).*\(4,\)"),
        (lambda: simclip_loss(F, F[:, :2]), ValueError, r"^features_ref: .*\(2, 4\), got \(2, 2\)"),
        (lambda: simclip_loss(F, None, F[:1]), ValueError, r"^features_clean: .*, got \(1, 4\)"),
        (
            lambda: simclip_loss(F, F, F),
            EITHER,
            r"^features_(ref|clean): expected .*, got .*features_ref",
        ),
        (
            lambda: simclip_loss(F),
            EITHER,
            r"^features_(ref|clean): .*, got neither",
        ),
        (
            lambda: SimCLIPLoss(frozen_reference=True)(F, features_clean=F),
            EITHER,
            r"^features_(ref|clean): expected .*, got ",
        ),
        (
            lambda: SimCLIPLoss(frozen_reference=False)(F, features_ref=F),
            EITHER,
            r"^features_(ref|clean): expected .*, got ",
        ),
        (
            lambda: SimCLIPLoss(frozen_reference=True)(F),
            EITHER,
            r"^features_ref: expected .*, got ",
        ),
        (
            lambda: SimCLIPLoss(frozen_reference=False).terms(F),
            EITHER,
            r"^features_clean: expected .*, got ",
        ),
    ],
)
def test_bad_inputs(call, error_type, message):
    with pytest.raises(error_type, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "options", "error_type", "message"),
    [
        (TRADESLoss, {"weight": -1.0}, ValueError, r"^weight: .*>= 0, got -1\.0"),
        (TRADESLoss, {"weight": torch.tensor(6.0)}, TypeError, r"^weight: .*; pass float\(weight"),
        (TRADESLoss, {"detach_clean": "no"}, TypeError, r"^detach_clean: .*, got str 'no'"),
        (FAPLoss, {"weight": math.nan}, ValueError, r"^weight: .*, got nan"),
        (FAPLoss, {"weight": "one"}, TypeError, r"^weight: .*, got str 'one'"),
        (SimCLIPLoss, {"frozen_reference": 1}, TypeError, r"^frozen_reference: .*, got int 1"),
    ],
)
def test_bad_options(module, options, error_type, message):
    with pytest.raises(error_type, match=message):
        module(**options)
    if module is not SimCLIPLoss:
        names = PAIR if module is TRADESLoss else FAP
        tensors, target = with_labels(names)
        function = trades_loss if module is TRADESLoss else fap_loss
        with pytest.raises(error_type, match=message):
            function(**tensors, target=target, **options)
