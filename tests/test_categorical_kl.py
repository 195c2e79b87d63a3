"""The categorical KL behind the baselines: against mpmath, wherever float32 has digits to give."""

import numpy as np
import oracles
import pytest
import torch
from torch.nn import functional as F

from calibclip._kernels import categorical_kl

mp = oracles.mpmath


def exact(logits_p, logits_q, scale=1.0):
    """KL(p || q) and its gradients in both logits, the textbook sums in 60 digits."""
    with mp.workdps(60):
        scale = oracles.number(scale)
        rows = [[scale * oracles.number(z) for z in row] for row in (logits_p, logits_q)]
        totals = [mp.log(mp.fsum(mp.exp(z) for z in row)) for row in rows]
        log_p, log_q = ([z - total for z in row] for row, total in zip(rows, totals, strict=True))
        ratio = [a - b for a, b in zip(log_p, log_q, strict=True)]
        kl = mp.fsum(mp.exp(a) * r for a, r in zip(log_p, ratio, strict=True))
        grad_p = [scale * mp.exp(a) * (r - kl) for a, r in zip(log_p, ratio, strict=True)]
        grad_q = [scale * (mp.exp(b) - mp.exp(a)) for a, b in zip(log_p, log_q, strict=True)]
        return float(kl), np.array(grad_p, dtype=float), np.array(grad_q, dtype=float)


def check(logits_p, logits_q, bound, scale=1.0):
    p, q = logits_p.clone().requires_grad_(), logits_q.clone().requires_grad_()
    upstream = torch.linspace(-1, 2, len(p), dtype=p.dtype)
    values = categorical_kl(p, q, scale)
    values.backward(upstream)
    for row in range(len(p)):
        kl, *grads = exact(logits_p[row], logits_q[row], scale)
        assert values[row].item() == pytest.approx(kl, rel=bound, abs=1e-40)
        for got, want in zip((p.grad, q.grad), grads, strict=True):
            want = want * upstream[row].item()
            error = np.linalg.norm(got[row].double().numpy() - want)
            assert error <= bound * np.linalg.norm(want) + 1e-38


@pytest.mark.parametrize("n_classes", [2, 3, 200])
@pytest.mark.parametrize("sd", [1e-5, 1e-3, 0.1, 3.0, 60.0])
@pytest.mark.parametrize("common", [0.0, 5.0])
def test_float32_at_every_distance(n_classes, sd, common):
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 100.0):
        noise = torch.randn((2, 4, n_classes), generator=generator)
        p = scale * (0.2 + 0.06 * noise[0])
        check(p, p + sd * noise[1] + common, 5e-6)


@pytest.mark.parametrize("scale", [1 / 7, 0.01, 14.3])
@pytest.mark.parametrize("sd", [1e-5, 1e-3, 0.1, 3.0])
def test_a_scale_comes_after_the_difference(scale, sd):
    """Scaled first, logits of 25 would be rounded by more than they differ."""
    noise = torch.randn((2, 4, 200), generator=torch.Generator().manual_seed(5))
    p = 100 * (0.2 + 0.06 * noise[0])
    check(p, p + sd * noise[1], 5e-6, scale)


@pytest.mark.parametrize("sd", [1e-4, 1e-2, 3.0])
def test_classes_left_out_of_both_change_nothing(sd):
    noise = torch.randn((2, 4, 50), generator=torch.Generator().manual_seed(6))
    p = 100 * (0.2 + 0.06 * noise[0])
    q = p + sd * noise[1]
    masked = [torch.cat((x, torch.full((4, 2), -torch.inf)), 1).requires_grad_() for x in (p, q)]
    kept = [x.clone().requires_grad_() for x in (p, q)]
    for pair in (masked, kept):
        categorical_kl(*pair).sum().backward()
    torch.testing.assert_close(categorical_kl(*masked), categorical_kl(*kept), rtol=1e-6, atol=0)
    for whole, part in zip(masked, kept, strict=True):
        assert not whole.grad[:, 50:].any()
        error = (whole.grad[:, :50] - part.grad).norm(dim=1) / part.grad.norm(dim=1)
        assert error.max() <= 1e-6


def test_blocks_of_rows_do_not_matter(monkeypatch):
    noise = torch.randn((2, 40, 9), generator=torch.Generator().manual_seed(7))
    noise[1, 30:] *= 1e-3  # of which some are near throughout
    pair = [noise[0], noise[0] + noise[1]]
    whole, blocks = ([x.clone().requires_grad_() for x in pair] for _ in range(2))
    categorical_kl(*whole).sum().backward()
    monkeypatch.setattr("calibclip._kernels.closed_form._BLOCK_ON_CPU", 45)
    categorical_kl(*blocks).sum().backward()
    torch.testing.assert_close(categorical_kl(*blocks), categorical_kl(*whole), rtol=2e-6, atol=0)
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-6, atol=1e-12)


def test_without_looking_at_values(monkeypatch):
    """As on an accelerator."""
    monkeypatch.setattr("calibclip._kernels.special.largest", lambda t: float("inf"))
    noise = torch.randn((2, 4, 20), generator=torch.Generator().manual_seed(8))
    for sd in (1e-5, 1e-2, 3.0):
        check(10 * noise[0], 10 * noise[0] + sd * noise[1], 5e-6)


def test_the_textbook_sum_has_no_digits_left_where_this_has_all():
    p = 100 * (0.2 + 0.06 * torch.randn(1, 200, generator=torch.Generator().manual_seed(1)))
    q = p + 1e-4 * torch.randn(1, 200, generator=torch.Generator().manual_seed(2))
    want, *_ = exact(p[0], q[0])
    textbook = F.kl_div(q.log_softmax(1), p.softmax(1), reduction="sum").item()
    assert abs(textbook - want) > want
    assert categorical_kl(p, q).item() == pytest.approx(want, rel=5e-6)


def test_float64():
    noise = torch.randn((2, 3, 10), generator=torch.Generator().manual_seed(3)).double()
    for sd in (1e-6, 1.0, 30.0):
        check(10 * noise[0], 10 * noise[0] + sd * noise[1], 1e-10)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([0.0, 200.0, -300.0], [150.0, -50.0, 0.0]),
        ([0.0, 0.0], [300.0, -300.0]),
        ([90.0, 0.0, 0.0], [0.0, 90.0, 0.0]),
        ([1e4, 0.0], [1e4, 1.0]),
    ],
)
def test_probabilities_that_underflow(p, q):
    check(torch.tensor([p]), torch.tensor([q]), 5e-6)


def test_equal_distributions_are_exactly_zero_and_nothing_is_negative():
    p = torch.randn((50, 7), generator=torch.Generator().manual_seed(4)).requires_grad_()
    values = categorical_kl(p, p.detach() + 3)
    assert values.min() >= 0
    same = categorical_kl(p, p.detach())
    same.sum().backward()
    assert same.tolist() == [0.0] * 50
    assert p.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_and_gets_its_gradient_back(dtype):
    p = (6e4 * torch.tensor([[1.0, -1.0, 0.5]])).to(dtype).requires_grad_()
    q = torch.tensor([[0.0, 1.0, 2.0]], dtype=dtype).requires_grad_()
    value = categorical_kl(p, q)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact(p.detach()[0].float(), q.detach()[0].float())[0])
    assert p.grad.dtype == q.grad.dtype == dtype
    assert q.grad.isfinite().all()


def test_nan_stays_in_its_row_and_sizes():
    p = torch.zeros(2, 3)
    p[0, 1] = torch.nan
    assert categorical_kl(p, torch.ones(2, 3)).isnan().tolist() == [True, False]
    assert categorical_kl(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
    assert categorical_kl(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)).shape == (2, 4)


def test_a_second_derivative_is_refused():
    p = torch.zeros(1, 2, requires_grad=True)
    q = torch.ones(1, 2) * torch.arange(2.0)
    (gradient,) = torch.autograd.grad(categorical_kl(p, q).sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated once only.*kl_div"):
        gradient.sum().backward()
