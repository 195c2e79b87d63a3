"""``linear_dirichlet_align`` against the loss of the whole matrix of cosines."""

import pytest
import torch

from calibclip import cosine_similarity, dirichlet_align_loss, linear_dirichlet_align

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def features(batch=7, n_classes=11, size=16, dtype=F32, seed=0):
    """CLIP-like: all directions share a part, so that cosines lie around 0.3."""
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=rng)
    shapes = ((batch, size), (batch, size), (n_classes, size))
    adv, ref, text = (common + 1.5 * torch.randn(shape, generator=rng) for shape in shapes)
    adv = ref + 0.2 * adv
    target = torch.randint(n_classes, (batch,), generator=rng)
    return adv.to(dtype), ref.to(dtype), text.to(dtype), target


def whole(adv, ref, text, target, *, text_ref=None, logit_scale=100.0, **options):
    text_ref = text if text_ref is None else text_ref
    logits = logit_scale * cosine_similarity(adv, text)
    logits_ref = logit_scale * cosine_similarity(ref, text_ref)
    return dirichlet_align_loss(logits, logits_ref, target, logit_scale=logit_scale, **options)


def both(options, *, dtype=F32, with_target=True, text_grad=False, **more):
    adv, ref, text, target = features(dtype=dtype)
    target = target if with_target else None
    results = []
    for loss in (linear_dirichlet_align, whole):
        inputs = adv.clone().requires_grad_(), text.clone().requires_grad_(text_grad)
        extra = dict(more) if loss is linear_dirichlet_align else {}
        value = loss(inputs[0], ref, inputs[1], target, **options, **extra)
        (3 * value).backward()
        results.append((value.detach(), inputs[0].grad, inputs[1].grad))
    return results


def assert_alike(found, want, bound=1e-5):
    for got, expected in zip(found, want, strict=True):
        if expected is None:
            assert got is None
            continue
        assert got.dtype == expected.dtype
        got, expected = got.double(), expected.double()
        assert (got - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("text_grad", [False, True])
def test_chunks_do_not_matter(chunk_rows, text_grad):
    assert_alike(*both({}, chunk_rows=chunk_rows, text_grad=text_grad))


@pytest.mark.parametrize(
    "options",
    [
        {"weight": 0.3e-9},
        {"weight": 0.0},
        {"relative_weight": 5.0},
        {"relative_weight": 0.0},
        {"direction": "forward"},
        {"direction": "forward", "relative_weight": 2.0},
        {"reduction": "sum"},
        {"temperature": 0.5},
        {"temperature": 0.02, "relative_weight": 1.0},
        {"logit_scale": 30.0},
        {"impl": "reference"},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_target", [True, False])
def test_options(options, with_target):
    found, want = both(options, with_target=with_target, chunk_rows=2, text_grad=True)
    if options == {"weight": 0.0} or options == {"relative_weight": 0.0}:
        if not with_target:
            assert not any(value.any() for value in found)
            return
    assert_alike(found, want)


def test_float64_to_its_precision():
    assert_alike(*both({}, dtype=F64, chunk_rows=2, text_grad=True), bound=1e-12)


def test_a_reference_text_of_its_own():
    adv, ref, text, target = features()
    other = text + 0.1 * torch.randn(text.shape, generator=torch.Generator().manual_seed(5))
    found = linear_dirichlet_align(adv, ref, text, target, text_features_ref=other, chunk_rows=2)
    want = whole(adv, ref, text, target, text_ref=other)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
    assert abs(found / whole(adv, ref, text, target) - 1) > 1e-3


def test_half_precision_features_are_multiplied_in_float32():
    adv, ref, text, target = features(dtype=BF16)
    want = whole(adv.float(), ref.float(), text.float(), target)
    for dtype in (None, BF16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            leaf = adv.clone().requires_grad_()
            found = linear_dirichlet_align(leaf, ref, text, target, chunk_rows=2)
        found.backward()
        assert found.dtype == F32
        assert leaf.grad.dtype == BF16
        torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


def test_a_lowered_matmul_precision_does_not_reach_the_cosines():
    inputs = features()
    want = linear_dirichlet_align(*inputs)
    torch.set_float32_matmul_precision("medium")
    try:
        found = linear_dirichlet_align(*inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


def test_no_matrix_of_all_cosines_exists():
    """Of 40 images and 500 classes, five images at a time."""
    adv, ref, text, target = features(40, 500)
    adv.requires_grad_()
    largest = 0

    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for part in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(part, torch.Tensor):
                    largest = max(largest, part.numel())
            return result

    with Sizes():
        linear_dirichlet_align(adv, ref, text, target, chunk_rows=5).backward()
    assert 5 * 500 <= largest <= text.numel()  # the texts themselves are the largest
    assert text.numel() < 40 * 500


def test_empty_batch():
    adv, ref, text, target = features(0)
    leaf = adv.requires_grad_()
    assert linear_dirichlet_align(leaf, ref, text, target).isnan()
    total = linear_dirichlet_align(leaf, ref, text, target, reduction="sum", relative_weight=1.0)
    assert total == 0
    total.backward()
    assert leaf.grad.shape == adv.shape


def test_nothing_is_differentiated_that_need_not_be():
    adv, ref, text, target = features()
    assert not linear_dirichlet_align(adv, ref, text, target).requires_grad
    ref.requires_grad_()
    assert not linear_dirichlet_align(adv, ref, text, target).requires_grad


def test_double_backward_is_refused():
    adv, ref, text, target = features()
    adv.requires_grad_()
    loss = linear_dirichlet_align(adv, ref, text, target)
    (grad,) = torch.autograd.grad(loss, adv, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features_adv": [1.0]}, TypeError, "^features_adv: expected"),
        ({"features_ref": torch.ones(6, 16)}, ValueError, "^features_ref: expected"),
        ({"text_features": torch.ones(11, 4)}, ValueError, "^text_features: expected features of"),
        ({"text_features_ref": torch.ones(2, 16)}, ValueError, "^text_features_ref: expected"),
        ({"target": torch.full((7,), 11)}, ValueError, r"^target: expected class indices in \[0"),
        ({"weight": -1.0}, ValueError, "^weight: expected"),
        ({"weight": 1.0, "relative_weight": 1.0}, ValueError, "^weight: expected weight or"),
        ({"reduction": "none"}, ValueError, "^reduction: expected one of 'mean'"),
        ({"chunk_rows": 0}, ValueError, "^chunk_rows: expected"),
        ({"impl": "torch_distributions"}, ValueError, "^impl: expected an exact"),
        ({"impl": "triton"}, ValueError, "^impl: expected an implementation that can run"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, error, message):
    names = ("features_adv", "features_ref", "text_features", "target")
    arguments = dict(zip(names, features(), strict=True)) | change
    with pytest.raises(error, match=message):
        linear_dirichlet_align(**arguments)
