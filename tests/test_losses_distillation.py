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
    DirichletAlignLoss,
    DistillationLoss,
    dirichlet_align_loss,
    distillation_loss,
)

DISTILLATION = CASES["distillation"]
PAIR = ("logits_adv", "logits_ref")


def with_labels(dtype=F64, grad=(), **shape):
    inputs, target = make_inputs(PAIR, **shape)
    return tensors_of(inputs, dtype, grad), torch.from_numpy(target)


def gradients(loss, names=PAIR, dtype=F64, target=True, **shape):
    """Value and gradients by input of a loss of logits_adv, logits_ref and, perhaps, labels."""
    tensors, labels = with_labels(dtype, names, **shape)
    value = loss(**tensors, **({"target": labels} if target else {"target": None}))
    value.backward()
    return value.detach(), {name: t.grad for name, t in tensors.items()}


def distance(got, want):
    return float((got - want).norm() / want.norm())


# Values and gradients


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", DISTILLATION, ids=str)
def test_values_and_gradients(case, shape, dtype):
    check_against_oracle(case, *prepared(case, **SHAPES[shape]), dtype)


@pytest.mark.parametrize("case", DISTILLATION, ids=str)
def test_terms(case):
    check_terms(case, *prepared(case, **SHAPES["ten classes"]), F64)


@pytest.mark.parametrize("temperature", [0.07, 0.01, 0.002])
def test_a_weight_that_no_float_reaches(temperature):
    """alpha_0 is e^130 at T = 0.01 and overflows float64 at 0.002; its product does not."""
    case = Case("distillation", {"temperature": temperature})
    inputs, target, terms = prepared(case, **SHAPES["ten classes"])
    for dtype in (F32, F64):
        check_against_oracle(case, inputs, target, terms, dtype)
        found = case.build("none").terms(
            **tensors_of(inputs, dtype), target=torch.from_numpy(target)
        )
        assert error(found.kl, terms["kl"].values) <= BOUNDS[dtype]
        if dtype == F64 or temperature > 0.005:
            assert error(found.effective_weight, terms["kl"].weight.mean()) <= BOUNDS[dtype]


# The paper's loss, without its Dirichlets


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("classes", [2, 10, 200])
def test_equals_the_papers_loss_at_its_temperature(classes, target, reduction):
    """Finding 1 of the reference: at T = 0.07 the Dirichlet KL is a weighted categorical one."""
    options = {"reduction": reduction, "detach_ref": False}
    value, grads = gradients(
        DistillationLoss.official() if reduction == "mean" else DistillationLoss(**options),
        PAIR[:1],
        target=target,
        classes=classes,
    )
    paper, paper_grads = gradients(
        DirichletAlignLoss(**options), PAIR[:1], target=target, classes=classes
    )
    assert distance(value, paper) <= 1e-6
    assert distance(grads["logits_adv"], paper_grads["logits_adv"]) <= 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_differs_from_the_papers_loss_where_evidence_is_scarce(temperature):
    options = {"temperature": temperature}
    _, grads = gradients(DistillationLoss(**options), PAIR[:1], target=False)
    _, paper = gradients(DirichletAlignLoss(**options), PAIR[:1], target=False)
    assert distance(grads["logits_adv"], paper["logits_adv"]) > 1e-2


def test_the_equivalent_direction():
    """KL(p_ref || p_adv), as the Dirichlet KL's first argument is the reference's partner."""
    tensors, _ = with_labels()
    paper = dirichlet_align_loss(**tensors)
    assert DistillationLoss().direction == "forward"
    forward, reverse = (
        distillation_loss(tensors["logits_adv"], None, tensors["logits_ref"], direction=direction)
        for direction in ("forward", "reverse")
    )
    assert distance(forward, paper) <= 1e-6
    assert distance(reverse, paper) > 1e-3


def test_a_common_shift_costs_nothing():
    """Less evidence everywhere: seen by the Dirichlet KL at T = 0.5, never by a softmax."""
    tensors, _ = with_labels()
    ref = tensors["logits_ref"]
    moved = distillation_loss(ref - 10, None, ref, temperature=0.5, weight=1.0)
    assert abs(moved) < 1e-12
    assert dirichlet_align_loss(ref - 10, ref, temperature=0.5, weight=1.0) > 1e-3


def test_the_weight_is_each_samples_own():
    """Samples on which the frozen model has more evidence count more."""
    cosines = torch.tensor([[0.30, 0.10], [0.20, 0.10]], dtype=F64)
    ref, adv = 100 * cosines, 100 * cosines.flip(1)
    rows = DistillationLoss(reduction="none").terms(adv, None, ref)
    strength = ((cosines + 1) / 0.07).exp().sum(-1)
    weight = 1e5 / (1 + math.exp(2 / 0.07)) * strength
    torch.testing.assert_close(rows.total, weight * rows.kl, rtol=1e-10, atol=0)
    torch.testing.assert_close(rows.effective_weight, weight.mean(), rtol=1e-10, atol=0)
    constant = DistillationLoss(weight=2.5, reduction="none").terms(adv, None, ref)
    torch.testing.assert_close(constant.total, 2.5 * constant.kl)
    assert float(constant.effective_weight) == pytest.approx(2.5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_terms_sum_up(reduction):
    tensors, target = with_labels()
    found = DistillationLoss(weight=1.5, reduction=reduction).terms(**tensors, target=target)
    torch.testing.assert_close(found.total, found.cross_entropy + 1.5 * found.kl)
    alone = DistillationLoss(weight=1.5, reduction=reduction).terms(**tensors, target=None)
    assert not alone.cross_entropy.any()
    torch.testing.assert_close(alone.total, 1.5 * alone.kl)


def test_the_weight_is_not_trained():
    """detach_ref=False lets the gradient into the reference's probabilities alone."""
    _, free = gradients(DistillationLoss(detach_ref=False), target=False, batch=1)
    tensors, _ = with_labels(batch=1)
    weight = float(DistillationLoss().terms(**tensors, target=None).effective_weight)
    _, fixed = gradients(DistillationLoss(weight=weight, detach_ref=False), target=False, batch=1)
    torch.testing.assert_close(free["logits_ref"], fixed["logits_ref"], rtol=1e-10, atol=0)


def test_cross_entropy_is_at_the_logits_own_scale():
    tensors, target = with_labels()
    want = torch.nn.functional.cross_entropy(tensors["logits_adv"], target)
    for options in ({}, {"temperature": 1.0}, {"logit_scale": 10.0}, {"weight": 0.0}):
        found = DistillationLoss(**options).terms(**tensors, target=target)
        torch.testing.assert_close(found.cross_entropy, want)
    torch.testing.assert_close(found.total, want)


def test_scale_and_temperature_act_as_a_product_at_a_constant_weight():
    tensors, _ = with_labels()
    values = [
        distillation_loss(**tensors, target=None, weight=1.0, logit_scale=s, temperature=t)
        for s, t in ((100.0, 0.07), (10.0, 0.7), (7.0, 1.0))
    ]
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(values[2], values[0])
    other = distillation_loss(**tensors, target=None, weight=1.0, temperature=0.7)
    assert distance(other, values[0]) > 0.1


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_nothing_is_left_at_equality(direction):
    tensors, _ = with_labels(F32)
    adv, ref = (tensors["logits_ref"].clone().requires_grad_() for _ in range(2))
    value = distillation_loss(adv, None, ref, direction=direction, weight=1.0, detach_ref=False)
    value.backward()
    assert abs(value) <= 1e-6
    assert adv.grad.abs().max() <= 1e-7
    assert ref.grad.abs().max() <= 1e-7


# DirichletAlignLoss, as the other losses


def test_align_loss_says_what_it_requires():
    assert DirichletAlignLoss().requires == frozenset(PAIR)
    assert isinstance(DirichletAlignLoss().requires, frozenset)
    tensors, _ = with_labels()
    assert DirichletAlignLoss()(**{name: tensors[name] for name in DirichletAlignLoss().requires})


def test_official_align_loss_has_the_papers_constants():
    tensors, target = with_labels()
    loss = DirichletAlignLoss.official()
    assert type(loss) is DirichletAlignLoss
    assert (loss.logit_scale, loss.temperature, loss.direction) == (100.0, 0.07, "reverse")
    assert loss.relative_weight is None
    terms = loss.terms(**tensors, target=target)
    kl = DirichletAlignLoss(weight=1.0).terms(**tensors, target=target)
    weight = 1e5 / (1 + math.exp(2 / 0.07))
    torch.testing.assert_close(terms.total, kl.cross_entropy + weight * kl.kl, rtol=1e-6, atol=0)
    other = DirichletAlignLoss.official(logit_scale=50.0)
    assert (other.logit_scale, other.temperature) == (50.0, 0.07)
    halved = {name: z / 2 for name, z in tensors.items()}
    torch.testing.assert_close(other(**halved), loss(**tensors), rtol=1e-6, atol=0)
    assert repr(eval(repr(other))) == repr(other)


def test_official_distillation_takes_the_logit_scale():
    tensors, _ = with_labels()
    loss = DistillationLoss.official()
    assert (loss.logit_scale, loss.temperature, loss.weight) == (100.0, 0.07, None)
    halved = {name: z / 2 for name, z in tensors.items()}
    other = DistillationLoss.official(logit_scale=50.0)
    torch.testing.assert_close(other(**halved, target=None), loss(**tensors, target=None))


# Errors

Z, Y = torch.zeros(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("inputs", "error_type", "message"),
    [
        ((Z[0], Y, Z), ValueError, r"^logits_adv: .*\(B, C\).*\(3,\)"),
        ((Z, Y, Z[:, :2]), ValueError, r"^logits_ref: .*\(2, 3\), got \(2, 2\)"),
        ((Z, Y, Z[:1]), ValueError, r"^logits_ref: .*\(2, 3\), got \(1, 3\)"),
        ((Z, Y, None), TypeError, r"^logits_ref: .*, got NoneType None"),
        ((None, Y, Z), TypeError, r"^logits_adv: .*, got NoneType None"),
        ((Z, Y + 1, Z), ValueError, r"^target: .* in \[0, 2\], got 3"),
        ((Z, Z, Y), TypeError, r"^(target|logits_ref): .*, got (float32|int64) tensor"),
        ((Z, Y, Z.to("meta")), ValueError, r"^logits_ref: .* device of logits_adv, cpu, got meta"),
    ],
)
def test_bad_inputs(inputs, error_type, message):
    for call in (distillation_loss, DistillationLoss(), DistillationLoss().terms):
        with pytest.raises(error_type, match=message):
            call(*inputs)


@pytest.mark.parametrize(
    ("options", "error_type", "message"),
    [
        ({"temperature": 0.0}, ValueError, r"^temperature: .* > 0, got 0\.0"),
        ({"logit_scale": -1.0}, ValueError, r"^logit_scale: .* > 0, got -1\.0"),
        ({"logit_scale": torch.tensor(100.0)}, TypeError, r"^logit_scale: .*; pass float\(logit_s"),
        ({"weight": -1.0}, ValueError, r"^weight: .*>= 0, got -1\.0"),
        ({"weight": "paper"}, TypeError, r"^weight: .*, got str 'paper'"),
        ({"direction": "both"}, ValueError, r"^direction: .*, got 'both'"),
        ({"detach_ref": "no"}, TypeError, r"^detach_ref: .*, got str 'no'"),
        ({"reduction": "max"}, ValueError, r"^reduction: .*, got 'max'"),
    ],
)
def test_bad_options(options, error_type, message):
    with pytest.raises(error_type, match=message):
        distillation_loss(Z, Y, Z, **options)
    with pytest.raises(error_type, match=message):
        DistillationLoss(**options)


def test_the_oracles_weight_is_the_papers():
    """lambda alpha_0 is about 170 for 200 CLIP-like cosines, as the reference measured."""
    rng = np.random.default_rng(0)
    cosines = 0.18 + rng.normal(0, 0.02, (16, 200))
    cosines[:, 0] += 0.08
    terms = loss_oracles.distillation({name: 100 * cosines for name in PAIR})
    assert 140 < terms["kl"].weight.mean() < 210


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("sd", [1e-2, 1e-4])
def test_predictions_that_hardly_differ(direction, sd):
    """The temperature must not round the logits before their difference is taken."""
    rng = np.random.default_rng(6)
    ref = single(100 * rng.normal(0.2, 0.06, (4, 200)))
    adv = single(ref + rng.normal(0, sd, ref.shape))
    results = []
    for dtype in (F32, F64):
        tensors = [torch.tensor(z, dtype=dtype, requires_grad=True) for z in (adv, ref)]
        value = distillation_loss(
            tensors[0], None, tensors[1], direction=direction, detach_ref=False, reduction="none"
        )
        value.sum().backward()
        results.append((value.detach(), *(z.grad for z in tensors)))
    for found, want in zip(*results, strict=True):
        assert (found - want).norm() <= 5e-6 * want.norm()
