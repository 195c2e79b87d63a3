"""What is saved in 8 bits must be in the ball, counted in whole levels or exact fractions."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.attacks.export import to_uint8

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
quick = settings(max_examples=50, deadline=None, derandomize=True)
LEVELS = torch.arange(256).view(1, 256)


def as_images(levels, dtype=torch.float32):
    return (levels.double() / 255).to(dtype)


def some_levels(seed, shape=(3, 3, 4, 5)):
    """Levels with many black and white ones."""
    values = np.random.default_rng(seed).integers(-60, 316, shape).clip(0, 255)
    return torch.from_numpy(values)


def uniform(seed, shape, low, high):
    return torch.from_numpy(np.random.default_rng(seed).uniform(low, high, shape))


# ---------------------------------------------------------------------------- clean 8-bit images


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 4, 8, 16, 255])
def test_every_level_at_the_edge_of_the_ball(dtype, n):
    images = as_images(LEVELS, dtype)
    for sign in (-1, 1):
        expected = (LEVELS + sign * n).clamp(0, 255)
        for eps in (n / 255, float(torch.tensor(n / 255)), np.float64(n) / 255):
            saved = to_uint8(as_images(expected, dtype), images, eps)
            assert saved.dtype == torch.uint8
            assert torch.equal(saved.long(), expected)
            # Far outside the ball: brought in.
            beyond = as_images((LEVELS + sign * 300).clamp(0, 255), dtype)
            assert torch.equal(to_uint8(beyond, images, eps).long(), expected)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("way", ["divide", "multiply", "normalise", "from float32"])
def test_clean_levels_are_recognised_however_they_were_computed(dtype, way):
    pixels = LEVELS.to(dtype)
    if way == "divide":
        images = pixels / 255
    elif way == "multiply":
        images = (pixels * (1 / torch.tensor(255.0))).clamp(max=1)
    elif way == "normalise":
        images = (((pixels / 255 - 0.4815) / 0.2686) * 0.2686 + 0.4815).clamp(0, 1)
    else:
        images = (pixels.float() / 255).to(dtype)
    for n in (0, 3):
        saved = to_uint8(torch.ones_like(images), images, n / 255)
        assert torch.equal(saved.long(), (LEVELS + n).clamp(max=255))


@quick
@given(st.integers(0, 2**20), st.sampled_from(DTYPES), st.integers(0, 20), st.floats(0, 1))
def test_linf_is_the_nearest_level_within_the_budget(seed, dtype, n, fraction):
    clean = some_levels(seed)
    images = as_images(clean, dtype)
    eps = (n + 0.999 * fraction) / 255
    offset = uniform(seed, clean.shape, -1.2 * eps - 0.01, 1.2 * eps + 0.01)
    images_adv = (images.double() + offset).clamp(0, 1)
    saved = to_uint8(images_adv, images, eps)
    assert saved.shape == images.shape
    assert int((saved.long() - clean).abs().max()) <= n
    for level, wanted, pixel in zip(
        saved.flatten().tolist(), images_adv.flatten().tolist(), clean.flatten().tolist(),
        strict=True,
    ):  # fmt: skip
        allowed = range(max(pixel - n, 0), min(pixel + n, 255) + 1)
        distances = [abs(255 * wanted - other) for other in allowed]
        assert abs(255 * wanted - level) <= min(distances) + 2**-12
    again = to_uint8(as_images(saved, dtype), images, eps)
    assert torch.equal(again, saved)


@quick
@given(st.integers(0, 2**20), st.sampled_from(DTYPES), st.integers(1, 16))
def test_levels_are_returned_as_they_are(seed, dtype, n):
    clean = some_levels(seed)
    moved = clean + torch.from_numpy(np.random.default_rng(seed).integers(-n, n + 1, clean.shape))
    moved = moved.clamp(0, 255)
    images, images_adv = as_images(clean, dtype), as_images(moved, dtype)
    assert torch.equal(to_uint8(images_adv, images, n / 255).long(), moved)
    length = float((moved - clean).double().flatten(1).norm(dim=1).max()) / 255
    assert torch.equal(to_uint8(images_adv, images, length, norm="l2").long(), moved)


def test_the_middle_between_two_levels_keeps_the_perturbation():
    images = as_images(torch.tensor([[100, 100, 101, 101]]))
    images_adv = as_images(torch.tensor([[100.5, 99.5, 101.5, 100.5]]))
    expected = [[101, 99, 102, 100]]
    for dtype in DTYPES[:2]:
        saved = to_uint8(images_adv.to(dtype), images.to(dtype), 1 / 255)
        assert saved.tolist() == expected
    # 0.4 of a level is none.
    assert to_uint8(images + 0.4 / 255, images, 1 / 255).tolist() == [[100, 100, 101, 101]]


def test_one_radius_per_image():
    images = as_images(torch.full((4, 1, 2), 100))
    eps = torch.tensor([0, 1, 2.5, 8]) / 255
    for dtype in DTYPES:
        for norm in ("linf", "l2"):
            for images_adv in (torch.ones_like(images), torch.zeros_like(images)):
                saved = to_uint8(images_adv, images, eps.to(dtype), norm)
                one_by_one = [
                    to_uint8(images_adv[:1], image[None], float(radius), norm)
                    for image, radius in zip(images, eps, strict=True)
                ]
                assert torch.equal(saved, torch.cat(one_by_one))
    assert to_uint8(torch.ones_like(images), images, eps)[:, 0, 0].tolist() == [100, 101, 102, 108]


# ---------------------------------------------------------------------------- other clean images


@quick
@given(
    st.integers(0, 2**20), st.sampled_from(DTYPES[:2]),
    st.sampled_from([0.5, 0.75, 1.0, 1.5, 2.0, 8.0]),
)  # fmt: skip
def test_between_levels_the_nearest_level_inside_the_ball(seed, dtype, radius):
    shape, eps = (2, 3, 4), radius / 255 + 1e-9
    images = uniform(seed, shape, -0.1, 1.1).clamp(0, 1).to(dtype)
    images_adv = (images + uniform(seed + 1, shape, -1.5 * eps, 1.5 * eps)).clamp(0, 1)
    saved = to_uint8(images_adv, images, eps)
    for level, wanted, pixel in zip(
        saved.flatten().tolist(), images_adv.flatten().tolist(), images.flatten().tolist(),
        strict=True,
    ):  # fmt: skip

        def outside(candidate, pixel=pixel):
            return abs(Fraction(candidate, 255) - Fraction(pixel)) > Fraction(eps) + Fraction(1e-15)

        on_level = abs(255 * pixel - round(255 * pixel)) < 1e-4
        assert on_level or not outside(level)
        inside = [other for other in range(256) if not outside(other)]
        best = min(abs(255 * wanted - other) for other in inside)
        assert on_level or abs(255 * wanted - level) <= best + 2**-12


def test_a_level_at_the_very_edge_is_inside_and_one_beyond_is_not():
    pixel = 100.5 / 255
    images = torch.tensor([[pixel]], dtype=torch.float64)
    inside = float(max(Fraction(101, 255) - Fraction(pixel), Fraction(pixel) - Fraction(100, 255)))
    for wanted, expected in ((1.0, 101), (0.0, 100)):
        saved = to_uint8(torch.full_like(images, wanted), images, inside + 1e-15)
        assert saved.item() == expected
    with pytest.raises(ValueError, match=r"^eps: expected a radius with an 8-bit image inside"):
        to_uint8(images, images, inside - 1e-12)


def test_no_level_inside():
    images = torch.tensor([[0.0, 10.3, 20.4], [30.0, 40.0, 50.5]]) / 255
    remedy = "round the clean images to 8 bits before the attack, or save floats"
    message = rf"^eps: expected .*, got none for 2 of 6 pixels; {remedy}$"
    with pytest.raises(ValueError, match=message):
        to_uint8(images, images, 0.35 / 255)
    with pytest.raises(ValueError, match=r"none for 1 of 2 images"):
        to_uint8(images, images, torch.tensor([0.6, 0.49]) / 255, "l2")
    saved = to_uint8(images, images, torch.tensor([0.6, 0.51]) / 255, "l2")
    assert saved[0].tolist() == [0, 10, 20]


# ---------------------------------------------------------------------------- l2


@quick
@given(
    st.integers(0, 2**20),
    st.sampled_from(DTYPES),
    st.floats(0.0, 60.0),
    st.sampled_from([0.5, 1, 3]),
)
def test_l2_stays_in_the_ball_near_the_wanted_image(seed, dtype, radius, scale):
    clean = some_levels(seed)
    images, eps = as_images(clean, dtype), radius / 255
    offset = np.random.default_rng(seed).standard_normal(clean.shape)
    offset *= scale * eps / np.sqrt((offset**2).sum((1, 2, 3), keepdims=True))
    images_adv = (clean / 255 + torch.from_numpy(offset)).clamp(0, 1)
    saved = to_uint8(images_adv, images, eps, norm="l2")
    change = (saved.long() - clean).numpy()
    assert ((change**2).sum((1, 2, 3)) <= radius**2 * (1 + 1e-6)).all()
    # No pixel is further from the wanted one (inside the ball) than the next level.
    wanted = 255 * images_adv.double().numpy() - clean.numpy()
    length = np.sqrt((wanted**2).sum((1, 2, 3), keepdims=True))
    wanted *= np.minimum(1, radius / np.maximum(length, 1e-300))
    assert np.abs(change - wanted).max() < 1 + 1e-9
    if (
        dtype != torch.bfloat16
    ):  # whose levels are up to half a level off, out of the ball at its edge
        again = to_uint8(as_images(saved, dtype), images, eps, norm="l2")
        assert torch.equal(again, saved)


def test_l2_gives_up_no_more_than_it_must():
    """Against all 2^n ways to round a perturbation up or down."""
    generator = np.random.default_rng(0)
    kept, best = 0.0, 0.0
    for _ in range(40):
        offset = generator.uniform(-3, 3, 8)
        radius = float(np.sqrt((offset**2).sum()))
        images = as_images(torch.full((1, 8), 128), torch.float64)
        images_adv = images + torch.from_numpy(offset) / 255
        change = to_uint8(images_adv, images, radius / 255, norm="l2").double().numpy()[0] - 128
        assert (change**2).sum() <= radius**2 * (1 + 1e-6)
        ways = np.array(
            list(itertools.product(*zip(np.floor(offset), np.ceil(offset), strict=True)))
        )
        ways = ways[(ways**2).sum(1) <= radius**2]
        kept += ((change - offset) ** 2).sum()
        best += ((ways - offset) ** 2).sum(1).min()
        nearest = np.round(offset)
        if (nearest**2).sum() <= radius**2:
            np.testing.assert_array_equal(change, nearest)
    # Greedy, so not always the best; rounding all pixels towards the clean ones gives 3 times it.
    assert kept <= 1.05 * best


def test_l2_prefers_the_pixel_that_saves_most_for_what_it_loses():
    images = as_images(torch.full((1, 5), 100), torch.float64)
    offset = torch.tensor([1.55, 0.52, 0.53, 0.54, 1.34], dtype=torch.float64)
    saved = to_uint8(images + offset / 255, images, float(offset.norm()) / 255, norm="l2")
    # 2 1 1 1 1 is too long by 3: the first pixel saves that alone, at a lower loss than three.
    assert saved.tolist() == [[101, 101, 101, 101, 101]]


def test_l2_between_levels():
    images = torch.tensor([[10.4, 20.0], [30.6, 40.5], [50.0, 60.0]], dtype=torch.float64)
    images_adv = images + torch.tensor([[0.0, 3.0], [1.9, 0.0], [-1.6, 0.0]])
    # The first pixel must move by 0.4, which is at the cost of the second: 0.16 + 9 > 9.
    saved = to_uint8(images_adv / 255, images / 255, torch.tensor([3, 2, 2]).double() / 255, "l2")
    assert saved.tolist()[::2] == [[10, 22], [48, 60]]
    assert saved[1, 0] == 32
    high = torch.tensor([[10.9]], dtype=torch.float64) / 255
    assert to_uint8(high, high, 0.2 / 255, "l2").item() == 11
    # Half a level is needed, and nothing less will do.
    middle = torch.tensor([[100.5]], dtype=torch.float64) / 255
    assert to_uint8(middle, middle, 0.5 / 255 * (1 + 1e-12), "l2").item() in (100, 101)
    with pytest.raises(ValueError, match=r"none for 1 of 1 images"):
        to_uint8(middle, middle, 0.5 / 255 * (1 - 1e-9), "l2")


def test_l2_shortens_only_the_images_that_need_it():
    images = as_images(torch.full((2, 4), 100), torch.float64)
    offset = torch.tensor([[1.6, 1.6, 0.4, 0.4], [1.6, 0.0, 0.0, 0.0]], dtype=torch.float64)
    saved = to_uint8(images + offset / 255, images, 2.4 / 255, norm="l2")
    assert saved[1].tolist() == [102, 100, 100, 100]
    assert sorted(saved[0].tolist()) == [100, 100, 101, 102]


# ---------------------------------------------------------------------------- arguments


def test_layout_is_no_matter_and_nothing_is_modified():
    images = as_images(some_levels(0))
    images_adv = (images + 0.02).clamp(max=1).requires_grad_()
    expected = to_uint8(images_adv, images, 0.02)
    strided = images_adv.to(memory_format=torch.channels_last)
    assert torch.equal(to_uint8(strided, images, 0.02), expected)
    for norm in ("linf", "l2"):
        assert to_uint8(images[:0], images[:0], 0.1, norm).shape == (0, 3, 4, 5)
        assert not to_uint8(images_adv, images, 0.02, norm).requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images_adv": LEVELS}, TypeError, r"images_adv: expected a floating-point tensor"),
        ({"images": [0.5]}, TypeError, r"images: expected a floating-point tensor"),
        ({"images": torch.rand(4)}, ValueError, r"add a batch dimension"),
        ({"images_adv": torch.rand(2, 4)}, ValueError, r"images_adv: expected the shape of images"),
        ({"images_adv": torch.full((2, 3), 1.01)}, ValueError, r"images_adv: .* in \[0, 1\]"),
        ({"images": torch.full((2, 3), torch.nan)}, ValueError, r"images: .* in \[0, 1\]"),
        ({"eps": -0.1}, ValueError, r"eps: expected a number >= 0, got -0.1"),
        ({"eps": torch.ones(3)}, ValueError, r"eps: .*, shape \(2,\), got float32"),
        ({"eps": torch.ones(2).long()}, TypeError, r"eps: .*, got int64 tensor"),
        ({"eps": torch.tensor([0.1, torch.nan])}, ValueError, r"eps: expected numbers >= 0"),
        ({"eps": torch.tensor([0.1, -0.1])}, ValueError, r"eps: expected numbers >= 0"),
        ({"norm": "l1"}, ValueError, r"norm: expected one of 'linf', 'l2', got 'l1'"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, error, message):
    arguments = {"images_adv": torch.rand(2, 3), "images": torch.rand(2, 3), "eps": 0.1}
    with pytest.raises(error, match=message):
        to_uint8(**{**arguments, **changes})
