import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip import (
    DirichletHead,
    cosine_similarity,
    log_concentration,
)
from calibclip.dirichlet import exact_dtype

F32, F64 = torch.float32, torch.float64


# The head


def cosines(n_rows=6, n_classes=9, seed=0, dtype=F32):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(0.2, 0.06, (n_rows, n_classes))).to(dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_log_concentration_is_the_affine_map(dtype, temperature):
    rows = cosines(dtype=dtype)
    log_alpha = log_concentration(rows, temperature)
    want = [[(float(c) + 1) / temperature for c in row] for row in rows]
    assert log_alpha.dtype == dtype
    np.testing.assert_allclose(log_alpha, want, rtol=3e-7 if dtype == F32 else 1e-15)
    scaled = log_concentration(30 * rows, temperature, logit_scale=30.0)
    np.testing.assert_allclose(scaled, want, rtol=3e-7 if dtype == F32 else 1e-15)


def test_default_temperature_is_the_papers():
    assert torch.equal(log_concentration(cosines()), log_concentration(cosines(), 0.07))
    assert log_concentration(torch.tensor([-1.0])).abs() < 1e-6
    assert torch.equal(DirichletHead()(cosines()), log_concentration(cosines()))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=8),
    st.floats(0.005, 10),
    st.sampled_from([1.0, 14.3, 100.0]),
)
def test_argmax_is_kept(row, temperature, logit_scale):
    logits = torch.tensor(row) * logit_scale
    log_alpha = log_concentration(logits, temperature, logit_scale=logit_scale)
    # Rounding may merge two neighbours into a tie, never swap them.
    assert log_alpha[logits.argmax()] == log_alpha.max()
    order = logits.sort().indices
    assert (log_alpha[order].diff() >= 0).all()
    if temperature <= 1 and logits.max() - logits.sort().values[-2] > 1e-5 * logit_scale:
        assert log_alpha.argmax() == logits.argmax()


@pytest.mark.parametrize("logit_scale", [14.3, 50.0, 100.0])
def test_inverse_scale_as_temperature_is_clips_softmax(logit_scale):
    logits = logit_scale * cosines()
    log_alpha = log_concentration(logits, 1 / logit_scale, logit_scale=logit_scale)
    # log_alpha is near 120, where float32 resolves 8e-6.
    torch.testing.assert_close(log_alpha.softmax(-1), logits.softmax(-1), rtol=2e-5, atol=1e-6)
    wide = logits.double()
    exact = log_concentration(wide, 1 / logit_scale, logit_scale=logit_scale)
    torch.testing.assert_close(exact.softmax(-1), wide.softmax(-1), rtol=1e-12, atol=0)
    mean = torch.exp(log_alpha.double() - log_alpha.double().logsumexp(-1, keepdim=True))
    torch.testing.assert_close(mean.float(), logits.softmax(-1), rtol=2e-5, atol=1e-6)


def test_head_takes_cosines_logits_or_features():
    rng = torch.Generator().manual_seed(0)
    image, text = torch.randn(5, 16, generator=rng), 3 * torch.randn(7, 16, generator=rng)
    rows = torch.tensor(
        [[float(i @ t) / math.sqrt(float(i @ i) * float(t @ t)) for t in text] for i in image]
    )
    torch.testing.assert_close(cosine_similarity(image, text), rows)
    want = (rows + 1) / 0.05
    head = DirichletHead(0.05)
    torch.testing.assert_close(head(rows), want)
    torch.testing.assert_close(head.from_features(image, text), want)
    scaled = DirichletHead(0.05, logit_scale=100.0)
    torch.testing.assert_close(scaled(100 * rows), want)
    torch.testing.assert_close(scaled.from_features(image, text), want)
    assert repr(scaled) == "DirichletHead(temperature=0.05, logit_scale=100)"
    assert not list(head.parameters())
    assert not head.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_upcast_before_the_affine_map(dtype, autocast):
    rows = cosines(64, 20).to(dtype)
    image, text = torch.randn(4, 8).to(dtype), torch.randn(5, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        log_alpha = log_concentration(rows)
        similarity = cosine_similarity(image, text)
    assert log_alpha.dtype == similarity.dtype == F32
    assert torch.equal(log_alpha, log_concentration(rows.float()))
    assert torch.equal(similarity, cosine_similarity(image.float(), text.float()))


def test_cosine_similarity_ignores_autocast():
    rng = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 32, generator=rng), torch.randn(9, 32, generator=rng)
    want = cosine_similarity(image, text)
    with torch.autocast("cpu", torch.bfloat16):
        assert (image @ text.T).dtype == torch.bfloat16
        found = cosine_similarity(image, text)
        log_alpha = DirichletHead().from_features(image, text)
    assert torch.equal(found, want)
    assert torch.equal(log_alpha, log_concentration(want))
    assert cosine_similarity(image.double(), text).dtype == F64
    assert cosine_similarity(image[:0], text).shape == (0, 9)


def test_gradients_of_the_head():
    rng = torch.Generator().manual_seed(0)
    image, text = (
        torch.randn(size, 5, generator=rng, dtype=F64).requires_grad_() for size in (3, 4)
    )
    head = DirichletHead(0.5)
    assert torch.autograd.gradcheck(head.from_features, (image, text))
    half = torch.randn(2, 3, generator=rng).half().requires_grad_()
    log_concentration(half).sum().backward()
    assert half.grad.dtype == torch.float16
    assert torch.allclose(half.grad.float(), torch.tensor(1 / 0.07), rtol=1e-3)


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: log_concentration([0.1]),
            TypeError,
            r"^cosine: expected a floating.*list \[0\.1\]",
        ),
        (
            lambda: log_concentration(torch.ones(3).int()),
            TypeError,
            r"got int32 tensor of shape \(3",
        ),
        (lambda: log_concentration(torch.tensor(0.2)), ValueError, r"\(\.\.\., C\), got float32"),
        (lambda: log_concentration(torch.ones(2), 0), ValueError, r"^temperature: .* > 0, got 0$"),
        (
            lambda: log_concentration(torch.ones(2), -0.07),
            ValueError,
            r"^temperature: .*got -0\.07$",
        ),
        (
            lambda: log_concentration(torch.ones(2), math.nan),
            ValueError,
            r"^temperature: .*got nan$",
        ),
        (
            lambda: log_concentration(torch.ones(2), math.inf),
            ValueError,
            r"^temperature: .*got inf$",
        ),
        (
            lambda: log_concentration(torch.ones(2), "warm"),
            TypeError,
            r"^temperature: .*str 'warm'$",
        ),
        (lambda: log_concentration(torch.ones(2), True), TypeError, r"^temperature: .*bool True$"),
        (
            lambda: log_concentration(torch.ones(2), logit_scale=torch.tensor(100.0)),
            TypeError,
            r"^logit_scale: .* > 0, got float32 tensor of shape \(\); pass float\(logit_scale\)$",
        ),
        (lambda: DirichletHead(0.0), ValueError, r"^temperature: expected a number > 0, got 0\.0$"),
        (lambda: DirichletHead(logit_scale=-1), ValueError, r"^logit_scale: .* > 0, got -1$"),
        (
            lambda: cosine_similarity(torch.ones(3), torch.ones(2, 3)),
            ValueError,
            r"^image_features: .* shape \(B, D\), got float32 tensor of shape \(3,\)$",
        ),
        (
            lambda: cosine_similarity(torch.ones(1, 3), torch.ones(3)),
            ValueError,
            r"^text_features: .* shape \(C, D\), got float32 tensor of shape \(3,\)$",
        ),
        (
            lambda: cosine_similarity(torch.ones(1, 3), torch.ones(2, 4)),
            ValueError,
            r"^image_features: expected features of size 4, as text_features, got .*\(1, 3\)$",
        ),
        (
            lambda: cosine_similarity(torch.ones(1, 3).long(), torch.ones(2, 3)),
            TypeError,
            r"^image_features: .* got int64 tensor",
        ),
    ],
)
def test_bad_arguments_of_the_head(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_cosines_do_not_follow_a_lowered_matmul_precision(precision):
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 512, generator=generator) for n in (32, 64))
    want = cosine_similarity(image.double(), text.double())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        got = cosine_similarity(image, text)
    finally:
        torch.set_float32_matmul_precision(before)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-7)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch 2.9")
@pytest.mark.parametrize(("backend", "precision"), [("cuda", "tf32"), ("mkldnn", "bf16")])
def test_cosines_do_not_follow_a_backends_lowered_precision(backend, precision):
    """PyTorch then refuses to tell ``get_float32_matmul_precision``."""
    image, text = torch.randn(2, 4, 512, generator=torch.Generator().manual_seed(0))
    want = cosine_similarity(image.double(), text.double())
    matmul = getattr(torch.backends, backend).matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = precision
        assert exact_dtype(torch.float32, image.device) == torch.float64
        got = cosine_similarity(image, text)
    finally:
        matmul.fp32_precision = before
    assert exact_dtype(torch.float32, image.device) == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-7)


def test_a_device_without_float64_multiplies_in_what_it_has():
    torch.set_float32_matmul_precision("high")
    try:
        assert exact_dtype(torch.float32, torch.device("mps")) == torch.float32
        assert exact_dtype(torch.float32, torch.device("cuda")) == torch.float64
    finally:
        torch.set_float32_matmul_precision("highest")


def test_cosines_on_a_device_without_autocast():
    image, text = (torch.ones(n, 3, device="meta") for n in (2, 4))
    assert cosine_similarity(image, text).shape == (2, 4)


def test_cosines_of_features_on_two_devices():
    with pytest.raises(ValueError, match=r"^text_features: .* cpu, got meta; move one of the two$"):
        cosine_similarity(torch.ones(2, 3), torch.ones(4, 3, device="meta"))
