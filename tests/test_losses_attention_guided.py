import math

import numpy as np
import pytest
import torch
from loss_cases import (
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

from calibclip import CompTGALoss, TGALoss, comp_tga_loss, tga_loss

GUIDED = [case for name in ("tga", "comp_tga") for case in CASES[name]]
MAPS = ("attention_adv", "attention_ref", "attention_clean")
PUBLISHED = ((TGALoss, tga_loss, 0.08, 0.05), (CompTGALoss, comp_tga_loss, 0.10, 0.07))


def with_labels(dtype=F64, grad=(), **shape):
    inputs, target = make_inputs(("logits_adv", *MAPS), **shape)
    return tensors_of(inputs, dtype, grad), torch.from_numpy(target)


# Values and gradients


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_values_and_gradients(case, shape, dtype):
    check_against_oracle(case, *prepared(case, **SHAPES[shape]), dtype)


@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_terms(case):
    check_terms(case, *prepared(case, **SHAPES["ten classes"]), F64)


@pytest.mark.parametrize(("module", "function", "adv", "clean"), PUBLISHED)
def test_terms_sum_up_with_the_weights(module, function, adv, clean):
    tensors, target = with_labels()
    found = module().terms(**tensors, target=target)
    want = found.cross_entropy + adv * found.attention_adv + clean * found.attention_clean
    torch.testing.assert_close(found.total, want)
    assert found.attention_adv != found.attention_clean
    official = module.official()(**tensors, target=target)
    assert torch.equal(official, function(**tensors, target=target))


@pytest.mark.parametrize("module", [TGALoss, CompTGALoss])
def test_gradient_to_the_frozen_model(module):
    """Published: it flows on. Plain: it stops."""
    for loss, reached in ((module.official(), True), (module(), False)):
        tensors, target = with_labels(grad=MAPS)
        loss(**tensors, target=target).backward()
        assert (tensors["attention_ref"].grad is not None) == reached
        assert tensors["attention_adv"].grad.norm() > 0
        assert tensors["attention_clean"].grad.norm() > 0


# Distances


def test_the_distances_of_tga_have_scales_of_their_own():
    """0.1 everywhere on 224 x 224: |.|_2 is 22.4, its square 502, the mean 0.1."""
    logits, target = torch.zeros(2, 3, dtype=F64), torch.tensor([0, 1])
    ref = torch.rand(2, 224, 224, dtype=F64, generator=torch.Generator().manual_seed(0))
    maps = (ref + 0.1, ref, ref - 0.2)
    found = TGALoss.official().terms(logits, target, *maps)
    assert float(found.attention_adv) == pytest.approx(22.4, rel=1e-9)
    assert float(found.attention_clean) == pytest.approx(44.8, rel=1e-9)
    assert float(found.total) == pytest.approx(math.log(3) + 0.08 * 22.4 + 0.05 * 44.8, rel=1e-9)
    found = TGALoss(distance="l1").terms(logits, target, *maps)
    assert float(found.attention_adv) == pytest.approx(0.1, rel=1e-9)
    assert float(found.attention_clean) == pytest.approx(0.2, rel=1e-9)
    tripled = TGALoss(distance="cosine").terms(logits, target, 3 * ref, ref, 2 * ref)
    assert abs(tripled.attention_adv) < 1e-12
    other = comp_tga_loss(logits, target, *maps)
    assert float(other) == pytest.approx(math.log(3) + 0.10 * 22.4 + 0.07 * 44.8, rel=1e-9)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_no_difference_between_the_maps(distance, dtype):
    tensors, target = with_labels(dtype)
    adv = tensors["attention_ref"].clone()
    adv[1:] = tensors["attention_adv"][1:]
    adv.requires_grad_()
    clean = tensors["attention_ref"].clone().requires_grad_()
    ref = tensors["attention_ref"].requires_grad_()
    for detach in (True, False):
        adv.grad = clean.grad = ref.grad = None
        value = tga_loss(
            tensors["logits_adv"], target, adv, ref, clean, distance=distance, detach_ref=detach
        )
        value.backward()
        tiny = 0 if distance != "cosine" else 4 * torch.finfo(dtype).eps
        assert adv.grad[0].abs().max() <= tiny
        assert clean.grad.abs().max() <= tiny
        assert adv.grad[1:].norm() > 0
        assert adv.grad.isfinite().all()
    assert ref.grad.isfinite().all()
    assert ref.grad[1:].norm() > 0


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_maps_of_zeros(distance):
    """What text_guided_attention gives for a constant map."""
    maps = [torch.zeros(2, 4, 4, requires_grad=True) for _ in range(3)]
    maps[1] = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1))
    logits = torch.zeros(2, 3)
    value = tga_loss(logits, torch.tensor([0, 1]), *maps, distance=distance)
    value.backward()
    assert value.isfinite()
    assert maps[0].grad.isfinite().all()
    zeros = [torch.zeros(2, 4, 4, requires_grad=True) for _ in range(3)]
    value = tga_loss(logits, torch.tensor([0, 1]), *zeros, distance=distance, detach_ref=False)
    value.backward()
    apart = (0.08 + 0.05) if distance == "cosine" else 0
    assert value.item() == pytest.approx(math.log(3) + apart, rel=1e-6)
    assert all(m.grad.isfinite().all() for m in zeros)


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_maps_of_the_published_size_in_float32(distance):
    """50,176 pixels: a plain running sum in float32 is off by 3e-5 after so many."""
    rng = np.random.default_rng(0)
    maps = single(rng.uniform(0.2, 1, (3, 2, 224, 224)))
    maps[0, 1], maps[1, 1, 1:] = 0.5, single(0.6)  # smooth maps: the rounding is one-sided
    gaps = maps[0] - maps[1]
    flat = maps.reshape(3, 2, -1)
    if distance == "cosine":
        lengths = np.linalg.norm(flat, axis=-1)
        want = 1 - (flat[0] * flat[1]).sum(-1) / (lengths[0] * lengths[1])
        unit = maps / lengths[..., None, None]
        grad = ((1 - want)[:, None, None] * unit[0] - unit[1]) / lengths[0][:, None, None]
    elif distance == "l1":
        want, grad = np.abs(gaps).mean((1, 2)), np.sign(gaps) / 224**2
    else:
        want = np.sqrt((gaps**2).sum((1, 2)))
        grad = gaps / want[:, None, None]
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    adv, ref, clean = torch.from_numpy(maps).float()
    adv.requires_grad_()
    loss = TGALoss(adv_weight=1.0, clean_weight=0.0, distance=distance, reduction="none")
    terms = loss.terms(logits, target, adv, ref, clean)
    terms.total.sum().backward()
    assert error(terms.attention_adv.detach(), want) <= 2e-6
    assert error(adv.grad, grad) <= 2e-6


def test_flattened_maps_are_the_same():
    tensors, target = with_labels()
    want = tga_loss(**tensors, target=target)
    flat = {name: t.flatten(1) for name, t in tensors.items()}
    torch.testing.assert_close(tga_loss(**flat, target=target), want)


# Errors

Z, Y, A = torch.zeros(2, 3), torch.tensor([0, 2]), torch.ones(2, 3, 3)


@pytest.mark.parametrize(
    ("call", "error_type", "message"),
    [
        (
            lambda: tga_loss(Z, Y, A, A[:, :2], A),
            ValueError,
            r"^attention_ref: .*\(2, 2, 3\)",
        ),
        (lambda: tga_loss(Z, Y, A, A, A[..., 1:]), ValueError, r"^attention_clean: .*\(2, 3, 2\)"),
        (
            lambda: tga_loss(Z, Y, A, A, A.flatten(1)),
            ValueError,
            r"^attention_clean: .*\(2, 3, 3\), got \(2, 9\)",
        ),
        (
            lambda: tga_loss(Z, Y, A[:1], A[:1], A[:1]),
            ValueError,
            r"^attention_adv: expected .*, got .*1",
        ),
        (lambda: tga_loss(Z, Y, A, None, A), TypeError, r"^attention_ref: .*, got NoneType None"),
        (lambda: tga_loss(Z, Y[:1], A, A, A), ValueError, r"^target: .*\(2,\), got .*\(1,\)"),
        (lambda: comp_tga_loss(Z, Y, A, A, A.long()), TypeError, r"^attention_clean: .*int64"),
        (
            lambda: tga_loss(Z, Y, *[A[:, 0, 0]] * 3),
            ValueError,
            r"^attention_adv: expected .*, got .*\(2,\)$",
        ),
        (
            lambda: tga_loss(Z, Y, *[A.to("meta")] * 3),
            ValueError,
            r"^attention_adv: .* device of logits_adv, cpu, got meta",
        ),
        (lambda: tga_loss(Z, Y, A, A.to("meta"), A), ValueError, r"^attention_ref: .* got meta"),
        (lambda: tga_loss(Z, Y + 1, A, A, A), ValueError, r"^target: .* in \[0, 2\], got 3"),
        (lambda: tga_loss(Z[0], Y, A, A, A), ValueError, r"^logits_adv: .*\(B, C\).*\(3,\)"),
    ],
)
def test_bad_inputs(call, error_type, message):
    with pytest.raises(error_type, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "options", "error_type", "message"),
    [
        ("tga", {"distance": "cos"}, ValueError, r"^distance: .*'l2', 'l1', 'cosine', got 'cos'"),
        ("tga", {"adv_weight": -0.1}, ValueError, r"^adv_weight: .*, got -0\.1"),
        ("tga", {"detach_ref": 0}, TypeError, r"^detach_ref: .*, got int 0"),
        ("comp_tga", {"clean_weight": math.inf}, ValueError, r"^clean_weight: .*, got inf"),
    ],
)
def test_bad_options(name, options, error_type, message):
    case = Case(name, options)
    tensors, target = with_labels()
    with pytest.raises(error_type, match=message):
        case.build()
    with pytest.raises(error_type, match=message):
        case.call(tensors, target)
