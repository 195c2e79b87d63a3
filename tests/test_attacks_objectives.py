import math

import pytest
import torch

from calibclip.attacks.objectives import OBJECTIVES, cross_entropy, margin, resolve_objective


def some_logits(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_against_plain_loops(dtype):
    logits, target = some_logits(dtype)
    for name, objective in OBJECTIVES.items():
        values = objective(logits, target)
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for row, label, value in zip(logits.tolist(), target.tolist(), values, strict=True):
            others = [entry for k, entry in enumerate(row) if k != label]
            expected = {
                "ce": math.log(math.fsum(math.exp(entry - row[label]) for entry in row)),
                "margin": max(others) - row[label],
            }[name]
            assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_gradients(objective):
    logits, target = some_logits()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective(z, target), (logits,))


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_permuting_classes_or_shifting_logits_changes_nothing(objective):
    logits, target = some_logits()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = torch.argsort(order)[target]
    assert torch.allclose(objective(logits[:, order] + 7.0, moved), objective(logits, target))


def test_half_precision_logits_are_not_computed_in_half():
    # CE = log(1 + e^-9) = 1.2e-4; the float16 steps around 9 are 8e-3 wide.
    value = cross_entropy(torch.tensor([[9.0, 0.0]]).half(), torch.tensor([0]))
    assert float(value) == pytest.approx(math.log1p(math.exp(-9)), rel=1e-3)


def test_margin_sends_the_gradient_of_a_tie_to_one_class():
    logits = torch.tensor([[1.0, 2.0, 2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(margin(logits, torch.tensor([0])).sum(), logits)
    assert sorted(gradient[0].tolist()) == [-1.0, 0.0, 1.0]


def test_margin_is_positive_exactly_for_a_wrong_prediction():
    logits, target = some_logits()
    assert torch.equal(margin(logits, target) > 0, logits.argmax(1) != target)


def test_names_and_callables():
    assert resolve_objective("ce") is cross_entropy
    assert resolve_objective(margin) is margin


def test_bad_objectives():
    with pytest.raises(ValueError, match=r"objective: expected one of 'ce', 'margin', got 'dl'"):
        resolve_objective("dl")
    with pytest.raises(
        TypeError,
        match=r"objective: expected a name or a callable \(logits, target\) -> \(B,\), got int 3",
    ):
        resolve_objective(3)
