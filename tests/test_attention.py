"""Text-guided attention against plain loops in float64 that share no code with it."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from calibclip.attention import (
    complementary_attention,
    text_guided_attention,
    upsample_attention,
)

# ---------------------------------------------------------------- the oracle


def loop_grid_map(tokens, text, norm_axis, rows, columns):
    """One image: tokens (1 + N, D) and text (D,) as nested lists of Python floats."""
    count, width = len(tokens), len(text)
    if norm_axis == "token":
        norms = [math.sqrt(sum(tokens[n][d] ** 2 for n in range(count))) for d in range(width)]
        scaled = [[tokens[n][d] / norms[d] for d in range(width)] for n in range(count)]
    else:
        norms = [math.sqrt(sum(value**2 for value in token)) for token in tokens]
        scaled = [[value / norms[n] for value in token] for n, token in enumerate(tokens)]
    scores = [sum(scaled[n][d] * text[d] for d in range(width)) for n in range(1, count)]
    lowest, highest = min(scores), max(scores)
    flat = [(score - lowest) / (highest - lowest) for score in scores]
    return [flat[row * columns : (row + 1) * columns] for row in range(rows)]


def loop_upsample(grid, height, width):
    rows, columns = len(grid), len(grid[0])

    def place(position, size, target):
        # Pixel centres are aligned; beyond the outermost centres the border is repeated.
        x = min(max((position + 0.5) * size / target - 0.5, 0.0), size - 1.0)
        low = math.floor(x)
        return low, min(low + 1, size - 1), x - low

    result = []
    for i in range(height):
        top, bottom, down = place(i, rows, height)
        line = []
        for j in range(width):
            left, right, across = place(j, columns, width)
            above = grid[top][left] * (1 - across) + grid[top][right] * across
            below = grid[bottom][left] * (1 - across) + grid[bottom][right] * across
            line.append(above * (1 - down) + below * down)
        result.append(line)
    return result


def loop_attention(tokens, text, norm_axis, grid, size):
    maps = []
    for one, t in zip(tokens.double().tolist(), text.double().tolist(), strict=True):
        grid_map = loop_grid_map(one, t, norm_axis, *grid)
        maps.append(grid_map if size is None else loop_upsample(grid_map, *size))
    return torch.tensor(maps, dtype=torch.float64)


def einsum_attention(tokens, text, norm_axis="token", size=None):
    """The published order of steps with other operations, for autograd to differentiate."""
    axis = {"token": 1, "channel": 2}[norm_axis]
    scaled = tokens * tokens.pow(2).sum(axis, keepdim=True).rsqrt()
    scores = torch.einsum("bnd,bd->bn", scaled, text)[:, 1:]
    ordered = scores.sort(dim=1).values
    flat = (scores - ordered[:, :1]) / (ordered[:, -1:] - ordered[:, :1])
    side = math.isqrt(flat.shape[1])
    maps = flat.reshape(-1, side, side)
    if size is None:
        return maps
    return torch.einsum("hi,bij,wj->bhw", weights(side, size), maps, weights(side, size))


def weights(side, size):
    rows = [loop_upsample([[float(i == k) for i in range(side)]], 1, size)[0] for k in range(side)]
    return torch.tensor(rows, dtype=torch.float64).T


def inputs(batch=3, patches=9, width=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 1 + patches, width), (batch, width), (batch, width))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[0][:, 0] *= 4  # a class token that shows in a norm
    return [tensor.to(dtype) for tensor in tensors]


SIZES = [
    pytest.param(9, None, None, id="grid"),
    pytest.param(9, None, 7, id="enlarged"),
    pytest.param(9, None, (12, 5), id="rectangle"),
    pytest.param(9, None, 2, id="reduced"),
    pytest.param(6, (2, 3), (8, 9), id="grid-of-2-by-3"),
    pytest.param(6, (6, 1), 6, id="one-column"),
    pytest.param(49, None, 224, id="ViT-B-32"),
]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("norm_axis", ["token", "channel"])
@pytest.mark.parametrize(("patches", "grid_size", "image_size"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values(patches, grid_size, image_size, norm_axis, dtype, tolerance):
    tokens, text, negative = inputs(batch=2, patches=patches, dtype=dtype)
    side = math.isqrt(patches)
    grid = grid_size or (side, side)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    options = {"image_size": image_size, "norm_axis": norm_axis, "grid_size": grid_size}
    positive_map, negative_map = (
        loop_attention(tokens, t, norm_axis, grid, size) for t in (text, negative)
    )
    actual = text_guided_attention(tokens, text, **options)
    assert actual.dtype == dtype
    assert actual.shape == (2, *(size or grid))
    torch.testing.assert_close(actual.double(), positive_map, atol=tolerance, rtol=0)
    both = complementary_attention(tokens, text, negative, **options)
    assert both.dtype == dtype
    expected = positive_map * (1 - negative_map)
    torch.testing.assert_close(both.double(), expected, atol=tolerance, rtol=0)


def test_the_defaults_are_the_published_ones():
    tokens, text, negative = inputs(patches=49)
    options = {"norm_axis": "token", "image_size": 224, "grid_size": (7, 7)}
    published = text_guided_attention(tokens, text, **options)
    assert torch.equal(text_guided_attention(tokens, text), published)
    assert published.shape == (3, 224, 224)
    both = complementary_attention(tokens, text, negative, **options)
    assert torch.equal(complementary_attention(tokens, text, negative), both)


def test_the_axes_give_different_maps():
    tokens, text, _ = inputs()
    maps = [
        text_guided_attention(tokens, text, image_size=None, norm_axis=axis)
        for axis in ("token", "channel")
    ]
    assert (maps[0] - maps[1]).abs().max() > 0.1


def test_the_class_token_counts_in_the_token_norm_and_only_there():
    tokens, text, _ = inputs()
    other = tokens.clone()
    other[:, 0] = other[:, 0].flip(-1) + 1
    for axis, changes in (("token", True), ("channel", False)):
        before, after = (
            text_guided_attention(t, text, image_size=None, norm_axis=axis) for t in (tokens, other)
        )
        assert ((before - after).abs().max() > 1e-3) == changes


def test_maps_run_from_0_to_1_in_each_image():
    tokens, text, _ = inputs(batch=4, patches=16)
    maps = text_guided_attention(tokens, text, image_size=None)
    assert torch.equal(maps.amin(dim=(1, 2)), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(maps.amax(dim=(1, 2)), torch.ones(4, dtype=torch.float64))
    enlarged = text_guided_attention(tokens, text)
    assert enlarged.min() >= 0
    assert enlarged.max() <= 1


def test_the_product_is_taken_after_the_enlargement():
    tokens, text, negative = inputs()
    on_grid = complementary_attention(tokens, text, negative, image_size=None)
    late = upsample_attention(on_grid, 24)
    assert (
        complementary_attention(tokens, text, negative, image_size=24) - late
    ).abs().max() > 0.01


def test_enlarging_later_is_the_same():
    tokens, text, _ = inputs()
    on_grid = text_guided_attention(tokens, text, image_size=None)
    assert torch.equal(
        upsample_attention(on_grid, (24, 31)),
        text_guided_attention(tokens, text, image_size=(24, 31)),
    )


def test_a_patch_lands_where_it_lies_in_the_image():
    tokens = torch.zeros(1, 1 + 4 * 4, 2)
    tokens[0, 1 + 2 * 4 + 3] = 1  # row 2, column 3
    largest = text_guided_attention(tokens, torch.ones(1, 2), image_size=32)[0].argmax()
    row, column = divmod(int(largest), 32)
    assert (row // 8, column // 8) == (2, 3)


@pytest.mark.parametrize("norm_axis", ["token", "channel"])
def test_the_length_of_the_text_and_the_scale_of_an_image_do_not_matter(norm_axis):
    tokens, text, _ = inputs()
    maps = text_guided_attention(tokens, text, norm_axis=norm_axis)
    scale = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    scaled = text_guided_attention(
        tokens * scale.view(3, 1, 1), text * scale.flip(0).view(3, 1), norm_axis=norm_axis
    )
    torch.testing.assert_close(scaled, maps, atol=1e-12, rtol=0)


def test_images_do_not_see_each_other():
    tokens, text, negative = inputs(batch=4)
    together = complementary_attention(tokens, text, negative)
    singly = [
        complementary_attention(*(x[i : i + 1] for x in (tokens, text, negative))) for i in range(4)
    ]
    assert torch.equal(torch.cat(singly), together)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("norm_axis", ["token", "channel"])
def test_gradients_equal_those_of_another_formula(norm_axis):
    leaves = [x.requires_grad_() for x in inputs()]
    upstream = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    ours = complementary_attention(*leaves, image_size=8, norm_axis=norm_axis)
    tokens, text, negative = leaves
    positive, other = (einsum_attention(tokens, t, norm_axis, 8) for t in (text, negative))
    theirs = positive * (1 - other)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    actual = torch.autograd.grad((ours * upstream).sum(), leaves)
    expected = torch.autograd.grad((theirs * upstream).sum(), leaves)
    for a, b in zip(actual, expected, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("norm_axis", ["token", "channel"])
@pytest.mark.parametrize("image_size", [None, 5])
def test_gradients_equal_finite_differences(norm_axis, image_size):
    leaves = [x.requires_grad_() for x in inputs(batch=2, patches=4, width=3)]
    assert torch.autograd.gradcheck(
        lambda *x: complementary_attention(*x, image_size=image_size, norm_axis=norm_axis), leaves
    )


def test_minimum_maximum_and_norm_are_not_detached():
    tokens, text, _ = inputs(batch=1)
    tokens.requires_grad_()
    maps = text_guided_attention(tokens, text, image_size=None)
    # The extremes are 0 and 1 whatever happens: an attached formula has no gradient there.
    for extreme in (maps.amin(), maps.amax()):
        (gradient,) = torch.autograd.grad(extreme, tokens, retain_graph=True)
        assert gradient.abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(maps.square().sum(), tokens)
    assert gradient[:, 0].abs().max() > 1e-3  # through the norm, which has the class token in it


# ---------------------------------------------------------------- nothing is NaN


def published(tokens, text):
    """The published formula, word for word in torch."""
    tokens = tokens / tokens.norm(dim=1, keepdim=True)
    scores = (tokens[:, 1:] @ text.unsqueeze(-1)).squeeze(-1)
    low, high = scores.min(dim=1, keepdim=True).values, scores.max(dim=1, keepdim=True).values
    return (scores - low) / (high - low)


def test_a_map_without_contrast_is_zero_where_the_published_one_is_nan():
    tokens, text, negative = inputs(dtype=torch.float32)
    tokens[1, 1:] = tokens[1, 1].clone()
    assert published(tokens, text)[1].isnan().all()
    leaves = [x.requires_grad_() for x in (tokens, text, negative)]
    maps = text_guided_attention(tokens, text)
    assert not maps[1].any()
    torch.testing.assert_close(
        text_guided_attention(tokens, text, image_size=None).flatten(1)[[0, 2]],
        published(tokens, text)[[0, 2]],
        atol=1e-5,
        rtol=0,
    )
    gradients = torch.autograd.grad(complementary_attention(*leaves).sum(), leaves)
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient[0].abs().max() > 0
        assert not gradient[1].any()


def test_complementary_attention_without_negative_contrast_is_the_positive_map():
    tokens, text, _ = inputs()
    maps = complementary_attention(tokens, text, torch.zeros_like(text))
    assert torch.equal(maps, text_guided_attention(tokens, text))


@pytest.mark.parametrize("norm_axis", ["token", "channel"])
def test_zero_norms(norm_axis):
    tokens, text, _ = inputs()
    tokens[:, :, 2] = 0  # a channel
    tokens[:, 3] = 0  # a token
    tokens[2] = 0
    tokens.requires_grad_()
    maps = text_guided_attention(tokens, text, norm_axis=norm_axis)
    assert maps.isfinite().all()
    assert not maps[2].any()
    (gradient,) = torch.autograd.grad(maps.square().sum(), tokens)
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() > 0
    kept = [0, 1, 3, 4]
    if norm_axis == "token":  # a dead channel is as if it were not there
        rest = text_guided_attention(tokens[..., kept], text[:, kept])
        torch.testing.assert_close(maps, rest, atol=1e-12, rtol=0)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_input_is_upcast_first(dtype):
    tokens, text, negative = inputs(patches=49, dtype=dtype)
    expected = complementary_attention(tokens.double(), text.double(), negative.double())
    actual = complementary_attention(tokens, text, negative)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)
    assert upsample_attention(tokens, 9).dtype == torch.float32


def test_the_largest_float16_numbers():
    tokens, text, negative = (60000 * x.sign().half() for x in inputs(patches=49))
    tokens[:, 1::2] *= 0.5
    leaves = [x.requires_grad_() for x in (tokens, text, negative)]
    maps = complementary_attention(*leaves)
    assert maps.isfinite().all()
    gradients = torch.autograd.grad(maps.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("norm_axis", ["token", "channel"])
def test_autocast_lowers_nothing(norm_axis):
    leaves = [x.requires_grad_() for x in inputs(patches=49, dtype=torch.float32)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            maps = complementary_attention(*leaves, norm_axis=norm_axis)
        results.append([maps, *torch.autograd.grad(maps.square().sum(), leaves)])
    for plain, lowered in zip(*results, strict=True):
        assert lowered.dtype == torch.float32
        assert torch.equal(plain, lowered)


def test_dtypes_are_promoted():
    tokens, text, _ = inputs()
    assert text_guided_attention(tokens.half(), text).dtype == torch.float64
    assert text_guided_attention(tokens, text.float()).dtype == torch.float64


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    tensors = inputs(batch=batch)
    assert complementary_attention(*tensors).shape == (batch, 224, 224)
    assert text_guided_attention(*tensors[:2], image_size=None).shape == (batch, 3, 3)


def test_one_patch_and_one_channel():
    assert not text_guided_attention(*inputs(patches=1)[:2]).any()
    assert text_guided_attention(*inputs(width=1)[:2]).isfinite().all()


def test_inputs_are_not_changed_and_may_be_views():
    tokens, text, _ = inputs()
    tokens_view = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    text_view = text.repeat_interleave(2, dim=1)[:, ::2]
    assert not tokens_view.is_contiguous()
    before = tokens.clone(), text.clone()
    assert torch.equal(
        text_guided_attention(tokens_view, text_view), text_guided_attention(tokens, text)
    )
    assert torch.equal(tokens, before[0])
    assert torch.equal(text, before[1])


def test_nothing_waits_for_the_device():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # a value read here raises
        tensors = [mode.from_tensor(x) for x in inputs()]
        assert complementary_attention(*tensors).shape == (3, 224, 224)


TOKENS, TEXT = torch.ones(2, 5, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("tokens", "text", "options", "error", "message"),
    [
        (
            np.ones((2, 5, 3)),
            TEXT,
            {},
            TypeError,
            r"^tokens: .*, got float64 array of .*from_numpy",
        ),
        (TOKENS.int(), TEXT, {}, TypeError, r"^tokens: .*, got int32 tensor .*; call tokens.float"),
        (TOKENS[0], TEXT, {}, ValueError, r"^tokens: expected .* \(B, 1 \+ N, D\), got float32 te"),
        (TOKENS[:, :1], TEXT, {}, ValueError, r"^tokens: expected a class token and at least one"),
        (TOKENS[:, 1:], TEXT, {}, ValueError, r"^tokens: .* square number, got .*; keep the class"),
        (TOKENS, TEXT[0], {}, ValueError, r"^text_features: expected .* \(B, D\), got float32 ten"),
        (TOKENS, torch.ones(4, 3), {}, ValueError, r"^text_features: .* shape \(2, 3\), .*\[targe"),
        (TOKENS, torch.ones(2, 4), {}, ValueError, r"^text_features: expected one row .* \(2, 4\)"),
        (TOKENS, TEXT.to("meta"), {}, ValueError, r"^text_features: expected the device of tokens"),
        (TOKENS, TEXT, {"norm_axis": 1}, ValueError, r"^norm_axis: expected one of 'token', 'chan"),
        (TOKENS, TEXT, {"grid_size": (3, 2)}, ValueError, r"^grid_size: .* of 4 patches, got \(3,"),
        (TOKENS, TEXT, {"grid_size": (4,)}, ValueError, r"^grid_size: expected \(height, width\)"),
        (TOKENS, TEXT, {"image_size": 0}, ValueError, r"^image_size: expected an integer >= 1, go"),
        (TOKENS, TEXT, {"image_size": 2.0}, TypeError, r"^image_size: expected an integer >= 1, g"),
    ],
)
def test_errors(tokens, text, options, error, message):
    with pytest.raises(error, match=message):
        text_guided_attention(tokens, text, **options)
    with pytest.raises(error, match=message):
        complementary_attention(tokens, text, text, **options)


def test_errors_of_the_other_arguments():
    with pytest.raises(
        ValueError, match=r"^negative_text_features: expected the shape of text_fea"
    ):
        complementary_attention(TOKENS, TEXT, TEXT[:1])
    with pytest.raises(TypeError, match=r"^negative_text_features: expected a floating-point tens"):
        complementary_attention(TOKENS, TEXT, None)
    with pytest.raises(ValueError, match=r"^maps: expected a floating-point tensor .* \(B, h, w\)"):
        upsample_attention(torch.ones(2, 2), 4)
    with pytest.raises(
        TypeError, match=r"^image_size: expected an integer >= 1, got NoneType None"
    ):
        upsample_attention(torch.ones(1, 2, 2), None)


def test_enlargement_equals_torchs_antialiased_resize():
    # Comp-TGA resizes with antialiasing, which does nothing where an image grows.
    maps = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0))
    other = F.interpolate(maps[:, None], size=224, mode="bilinear", antialias=True)[:, 0]
    torch.testing.assert_close(upsample_attention(maps, 224), other, atol=1e-6, rtol=0)
