"""``linear_dirichlet_align`` against the loss of the whole matrix of cosines."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calibclip import cosine_similarity, dirichlet_align_loss, linear_dirichlet_align
from calibclip._kernels import closed_form

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Record(TorchDispatchMode):
    """Keep the operators' names, and the dtypes and sizes of what they take and make."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        taken, made = ([x for x in xs if isinstance(x, torch.Tensor)] for xs in (args, made))
        name = function.overloadpacket.__name__
        self.calls.append((name, {x.dtype for x in taken}, max([x.numel() for x in made] + [0])))
        return result


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


def test_a_reference_text_in_the_same_memory():
    """As many texts as numbers in each, and the reference's are the transposed."""
    adv, ref, text, target = features(n_classes=16)
    found = linear_dirichlet_align(adv, ref, text, target, text_features_ref=text.T)
    want = whole(adv, ref, text, target, text_ref=text.T)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("text_grad", [False, True])
def test_the_texts_themselves_as_reference(text_grad):
    adv, ref, text, target = features()
    text.requires_grad_(text_grad)
    found = linear_dirichlet_align(adv, ref, text, target, text_features_ref=text)
    assert found == linear_dirichlet_align(adv, ref, text, target)
    assert linear_dirichlet_align(ref, ref, text, text_features_ref=text) == 0


@pytest.mark.parametrize("wide", ["features_adv", "features_ref", "text", "text_ref"])
@pytest.mark.parametrize("narrow", [F32, BF16], ids=str)
def test_one_float64_input_is_enough(wide, narrow):
    adv, ref, text, target = features()
    inputs = {"features_adv": adv, "features_ref": ref, "text": text, "text_ref": 1.5 * text + 1}
    inputs = {name: x.to(F64 if name == wide else narrow) for name, x in inputs.items()}
    image, ref, text, text_ref = inputs.values()
    leaf = image.requires_grad_()
    found = linear_dirichlet_align(leaf, ref, text, target, text_features_ref=text_ref)
    found.backward()
    assert found.dtype == F64
    assert leaf.grad.dtype == image.dtype
    want = whole(*(x.double() for x in (image, ref, text)), target, text_ref=text_ref.double())
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)


def test_half_precision_features_are_multiplied_in_float32():
    adv, ref, text, target = features(dtype=BF16)
    want = whole(adv.float(), ref.float(), text.float(), target)
    exact = [x.float().requires_grad_() for x in (adv, text)]
    linear_dirichlet_align(exact[0], ref, exact[1], target, chunk_rows=2).backward()
    for dtype in (None, BF16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            leaves = [x.clone().requires_grad_() for x in (adv, text)]
            found = linear_dirichlet_align(leaves[0], ref, leaves[1], target, chunk_rows=2)
        found.backward()
        assert found.dtype == F32
        torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
        for leaf, leaf_exact in zip(leaves, exact, strict=True):
            assert leaf.grad.dtype == BF16
            assert leaf.grad.equal(leaf_exact.grad.to(BF16))


@pytest.mark.parametrize("temperature", [0.005, 0.001])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_low_temperatures_and_wide_gaps(temperature, direction):
    """The attack turns half of the images around, so that cosines differ by up to 1.6."""
    adv, ref, text, target = features()
    adv[::2] *= -1
    options = {"temperature": temperature, "direction": direction, "relative_weight": 1.0}
    results = []
    for dtype in (F32, F64):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (adv, text)]
        loss = linear_dirichlet_align(
            leaves[0], ref.to(dtype), leaves[1], target, chunk_rows=2, **options
        )
        loss.backward()
        assert loss.isfinite()
        results.append([x.double() for x in (loss.detach(), *(leaf.grad for leaf in leaves))])
    # Over T, the last bit of a cosine counts the more the lower T is.
    assert_alike(*results, bound=2**-24 / temperature)
    if direction == "reverse":
        plain = linear_dirichlet_align(adv, ref, text, target, relative_weight=0.0)
        assert float(results[0][0]) > 2 * float(plain)  # the KL is what is looked at


def test_a_divergence_that_fits_no_float32():
    """The clean images lie off all texts, and the first attacked one is a text."""
    adv, _, text, target = features()
    ref = 0.3 * adv - text.mean(0)
    adv = 1.01 * ref
    adv[0] = text[0]
    adv.requires_grad_()
    text.requires_grad_()
    options = {"temperature": 0.001, "direction": "forward", "relative_weight": 1.0}
    loss = linear_dirichlet_align(adv, ref, text, target, **options)
    loss.backward()
    assert loss == torch.inf
    assert adv.grad[0].isnan().all()
    assert adv.grad[1:].isfinite().all()
    assert text.grad.isnan().all()


def test_a_lowered_matmul_precision_does_not_reach_the_cosines():
    inputs = features()
    want = linear_dirichlet_align(*inputs)
    torch.set_float32_matmul_precision("medium")
    try:
        found = linear_dirichlet_align(*inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_every_product_is_in_float64_next_to_a_lowered_precision(precision):
    adv, ref, text, target = features()
    leaves = [x.requires_grad_() for x in (adv, text)]
    torch.set_float32_matmul_precision(precision)
    try:
        with Record() as record:
            loss = linear_dirichlet_align(adv, ref, text, target, relative_weight=1.0, chunk_rows=4)
            loss.backward()
    finally:
        torch.set_float32_matmul_precision("highest")
    products = [dtypes for name, dtypes, _ in record.calls if "mm" in name]
    assert len(products) == 2 * 5  # of each chunk: cosines, the reference's twice, two gradients
    assert all(dtypes == {F32 if precision == "highest" else F64} for dtypes in products)
    assert all(leaf.grad.dtype == F32 for leaf in leaves)


def test_no_matrix_of_all_cosines_exists():
    """Of 40 images and 500 classes, five images at a time."""
    adv, ref, text, target = features(40, 500)
    adv.requires_grad_()
    with Record() as record:
        linear_dirichlet_align(adv, ref, text, target, chunk_rows=5).backward()
    largest = max(size for *_, size in record.calls)
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
    options = {"text_features_ref": text.clone().requires_grad_()}
    assert not linear_dirichlet_align(adv, ref, text, target, **options).requires_grad


def test_no_gradient_is_computed_that_nobody_needs(monkeypatch):
    adv, ref, text, target = features()
    want = linear_dirichlet_align(adv.clone().requires_grad_(), ref, text, target)

    def refuse(*_):
        raise AssertionError("backward of the kernel")

    monkeypatch.setattr(closed_form, "backward", refuse)
    with Record() as record:
        assert linear_dirichlet_align(adv, ref, text, target) == want
        adv.requires_grad_()
        text.requires_grad_()
        with torch.no_grad():
            found = linear_dirichlet_align(adv, ref, text, target)
    torch.testing.assert_close(found, want.detach())
    assert not any("scatter_add" in name for name, *_ in record.calls)
    with pytest.raises(AssertionError, match="backward of the kernel"):
        linear_dirichlet_align(adv, ref, text, target)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_transforms_of_torch_func_are_refused(transform):
    adv, *others = features()
    adv = adv[None] if transform is torch.func.vmap else adv
    with pytest.raises(RuntimeError, match=r"^linear_dirichlet_align: expected tensors"):
        transform(lambda x: linear_dirichlet_align(x, *others))(adv)


def test_mapped_labels_are_refused_before_they_are_looked_at():
    adv, ref, text, target = features()
    with pytest.raises(RuntimeError, match=r"^linear_dirichlet_align: expected tensors"):
        torch.func.vmap(lambda y: linear_dirichlet_align(adv, ref, text, y))(target[None])


@pytest.mark.filterwarnings("ignore")  # PyTorch's, on where and how it breaks
def test_torch_compile_breaks_the_graph_and_gets_the_same():
    adv, *others = features()
    results = []
    for loss in (linear_dirichlet_align, torch.compile(linear_dirichlet_align, backend="eager")):
        leaf = adv.clone().requires_grad_()
        value = loss(leaf, *others)
        value.backward()
        results.append((value.detach(), leaf.grad))
    assert_alike(*results, bound=1e-6)


@pytest.mark.parametrize("number", [np.float32, Fraction], ids=lambda kind: kind.__name__)
def test_numbers_of_any_kind(number):
    inputs = features()
    numbers = {"logit_scale": 96, "temperature": 0.125, "relative_weight": 2.5}
    for name, value in numbers.items():
        found = linear_dirichlet_align(*inputs, **{name: number(value)})
        assert found == linear_dirichlet_align(*inputs, **{name: value})
    found = linear_dirichlet_align(*inputs, chunk_rows=np.int64(2), weight=number(0.5))
    assert found == linear_dirichlet_align(*inputs, chunk_rows=2, weight=0.5)


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
        ({"text_features": torch.ones(0, 16)}, ValueError, r"^text_features: .* size >= 1, got"),
        ({"text_features_ref": torch.ones(2, 16)}, ValueError, "^text_features_ref: expected"),
        ({"features_ref": torch.ones(7, 16, device="meta")}, ValueError, "^features_ref: .* meta"),
        (
            {"text_features": torch.ones(11, 16, device="meta")},
            ValueError,
            "^text_features: .* meta",
        ),
        (
            {"text_features_ref": torch.ones(11, 16, device="meta")},
            ValueError,
            "^text_features_ref: .* meta",
        ),
        ({"target": torch.full((7,), 11)}, ValueError, r"^target: expected class indices in \[0"),
        ({"weight": -1.0}, ValueError, "^weight: expected"),
        ({"weight": 1.0, "relative_weight": 1.0}, ValueError, "^weight: expected weight or"),
        ({"reduction": "none"}, ValueError, "^reduction: expected one of 'mean'"),
        ({"chunk_rows": 0}, ValueError, "^chunk_rows: expected"),
        ({"impl": "torch_distributions"}, ValueError, "^impl: expected an exact"),
        ({"impl": "triton"}, ValueError, "^impl: expected an implementation that can run"),
        (
            {"impl": "triton", "features_adv": torch.ones(0, 16), "features_ref": torch.ones(0, 16)}
            | {"target": torch.zeros(0, dtype=torch.int64)},
            ValueError,
            "^impl: expected an implementation that can run",
        ),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, error, message):
    names = ("features_adv", "features_ref", "text_features", "target")
    arguments = dict(zip(names, features(), strict=True)) | change
    with pytest.raises(error, match=message):
        linear_dirichlet_align(**arguments)
