"""Ball and box must hold exactly in float64, for every norm, dtype, start and step."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.attacks.threat import (
    FeasibleSet,
    add_inward,
    sample_keys,
    steepest_direction,
    stream_seed,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
quick = settings(max_examples=25, deadline=None, derandomize=True)
radii = st.one_of(
    st.sampled_from([0.0, 1e-9, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 0.5, 2.0]),
    st.floats(0.0, 3.0, allow_subnormal=False),
)


def assert_feasible(points, images, eps, norm, bounds=(0.0, 1.0)):
    """Check membership in NumPy's float64, away from the code under test."""
    distance = np.abs(points.double().numpy() - images.double().numpy())
    if norm == "linf":
        assert distance.max() <= eps
    else:
        assert np.sqrt((distance**2).reshape(len(distance), -1).sum(1)).max() <= eps * (1 + 1e-12)
    assert points.min() >= bounds[0]
    assert points.max() <= bounds[1]
    assert points.dtype == images.dtype
    assert points.shape == images.shape


def some_images(seed, dtype, shape=(3, 2, 3, 3)):
    """Pixels of every kind: the two walls of the box, 8-bit levels, and anything between."""
    generator = np.random.default_rng(seed)
    levels = generator.integers(0, 256, shape) / 255
    kind = generator.integers(0, 4, shape)
    values = np.select([kind == 0, kind == 1, kind == 2], [np.zeros(shape), np.ones(shape), levels])
    values = np.where(kind == 3, generator.random(shape) ** 8, values)
    return torch.from_numpy(values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [1, 2, 4, 8])
def test_every_grey_level_stays_in_the_linf_ball(dtype, level):
    images = (torch.arange(256) / 255).to(dtype).view(256, 1)
    eps = level / 255
    feasible = FeasibleSet(images, eps, "linf", (0.0, 1.0))
    for sign in (-1.0, 1.0):
        moved = feasible.ascend(images, torch.full_like(images, sign), 2 * eps)
        assert_feasible(moved, images, eps, "linf")
        # Not a grid point is given away: the next one outwards is outside the ball (up to one
        # rounding of the float64 sum) or the box.
        beyond = torch.nextafter(moved, torch.full_like(moved, sign * 9))
        outside = (beyond.double() - images.double()).abs() > eps - 2**-53
        assert bool((outside | (beyond < 0) | (beyond > 1)).all())


@quick
@given(st.integers(0, 2**20), st.sampled_from(DTYPES), radii)
def test_add_inward_never_passes_the_offset(seed, dtype, eps):
    anchor = some_images(seed, dtype)
    offset = eps * (2 * torch.from_numpy(np.random.default_rng(seed).random(anchor.shape)) - 1)
    moved = add_inward(anchor, offset)
    distance = (moved.double() - anchor.double()).abs()
    assert bool((distance <= offset.abs()).all())
    # Within one unit in the last place of the exact sum.
    spacing = torch.finfo(dtype).eps * torch.maximum(moved.abs(), anchor.abs()).double()
    assert bool((offset.abs() - distance <= spacing + torch.finfo(dtype).tiny).all())


@quick
@given(
    st.integers(0, 2**20), st.sampled_from(DTYPES), st.sampled_from(["linf", "l2"]), radii,
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
)  # fmt: skip
def test_project_start_and_step_are_feasible(seed, dtype, norm, eps, scale):
    images = some_images(seed, dtype)
    feasible = FeasibleSet(images, eps, norm, (0.0, 1.0))
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(images.shape))
    points = feasible.project(images.double() + scale * noise)
    assert_feasible(points, images, eps, norm)
    start = feasible.random_points(range(len(images)))
    assert_feasible(start, images, eps, norm)
    moved = feasible.ascend(start, (scale * noise).to(dtype), step_size=eps / 3 + 1e-6)
    assert_feasible(moved, images, eps, norm)
    if eps == 0:
        assert torch.equal(points, images)
        assert torch.equal(start, images)
        assert torch.equal(moved, images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bounds", [(0.3, 0.7), (-1.0, 1.0), (0.0, 255.0)])
def test_other_boxes(norm, bounds):
    low, high = (float(torch.tensor(bound)) for bound in bounds)
    images = torch.linspace(low, high, 64).clamp(*bounds).view(2, 32)
    for eps in (0.05, 1e4):
        feasible = FeasibleSet(images, eps, norm, bounds)
        for points in (images + 1e3, images - 1e3, feasible.random_points([0, 1])):
            assert_feasible(feasible.project(points), images, eps, norm, (low, high))


def test_steps_across_zero_and_near_the_overflow():
    anchor = torch.tensor([0.0, -0.0, 1e-45, -1e-3, 3e38])
    for offset in (1e-46, 1e-3, 1e300):
        for moved in (add_inward(anchor, offset), add_inward(anchor, -offset)):
            assert bool(moved.isfinite().all())
            assert bool(((moved.double() - anchor.double()).abs() <= offset).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_l2_direction_has_unit_length_for_any_gradient(dtype):
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    ones = torch.ones(2, 3, 4, dtype=dtype)
    for scale in (tiny, tiny * torch.finfo(dtype).eps, 1e-20, 1.0, 1e20, huge):
        direction = steepest_direction(scale * ones, "l2")
        assert torch.allclose(direction, torch.full_like(direction, 12**-0.5), rtol=1e-14)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_useless_gradients_do_not_move(norm):
    bad = torch.tensor([[0.0, 0.0], [torch.nan, torch.inf], [-torch.inf, 3.0]])
    expected = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    assert torch.equal(steepest_direction(bad, norm).float(), expected)


def test_l2_step_matches_a_plain_loop():
    images = some_images(3, torch.float64)
    gradient = torch.from_numpy(np.random.default_rng(0).standard_normal(images.shape))
    feasible = FeasibleSet(images, 0.4, "l2", (0.0, 1.0))
    points = feasible.random_points([5, 6, 7])
    moved = feasible.ascend(points, gradient, 0.3).numpy()
    for image, point, slope, result in zip(
        images.numpy(), points.numpy(), gradient.numpy(), moved, strict=True
    ):
        delta = point + 0.3 * slope / np.sqrt((slope**2).sum()) - image
        delta *= min(1.0, 0.4 / np.sqrt((delta**2).sum()))
        np.testing.assert_allclose(result, np.clip(image + delta, 0, 1), rtol=0, atol=1e-15)


def test_random_points_fill_the_ball_evenly():
    # In d dimensions a uniform point has radius**d uniform on [0, 1]; d is small enough to tell
    # this from a uniform radius. 4000 draws put the mean within 0.5 +- 0.02 (4 standard errors).
    images = torch.full((4000, 3), 0.5)
    seeds = [stream_seed(0, sample, 0) for sample in range(4000)]
    offset = FeasibleSet(images, 0.25, "l2", (0.0, 1.0)).random_points(seeds) - images
    filled = (offset.norm(dim=1) / 0.25) ** 3
    assert abs(filled.mean() - 0.5) < 0.02
    assert abs((filled < 0.1).float().mean() - 0.1) < 0.02
    assert offset.mean(0).abs().max() < 0.01
    offset = FeasibleSet(images, 0.25, "linf", (0.0, 1.0)).random_points(seeds) - images
    assert abs((offset.abs() < 0.125).float().mean() - 0.5) < 0.02
    assert offset.mean(0).abs().max() < 0.01
    # Neighbouring samples have unrelated draws.
    assert abs(torch.corrcoef(torch.stack([offset[:-1, 0], offset[1:, 0]]))[0, 1]) < 0.07


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_points_depend_on_the_seed_alone(norm):
    images = some_images(0, torch.float32, (5, 2, 3, 3))
    feasible = FeasibleSet(images, 0.1, norm, (0.0, 1.0))
    together = feasible.random_points([3, 1, 4, 1, 5])
    channels_last = FeasibleSet(
        images.contiguous(memory_format=torch.channels_last), 0.1, norm, (0.0, 1.0)
    ).random_points([3, 1, 4, 1, 5])
    assert torch.equal(channels_last, together)
    for sample, seed in enumerate([3, 1, 4, 1, 5]):
        alone = FeasibleSet(images[sample : sample + 1], 0.1, norm, (0.0, 1.0))
        assert torch.equal(alone.random_points([seed])[0], together[sample])


def test_random_points_leave_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    FeasibleSet(torch.zeros(3, 4), 0.1, "l2", (0.0, 1.0)).random_points([0, 1, 2])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_tell_images_apart_and_nothing_else(dtype):
    images = some_images(1, dtype, (40, 3, 4, 4))
    keys = sample_keys(images)
    assert len(set(keys)) == 40
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert sample_keys(images[order]) == [keys[index] for index in order]
    assert sample_keys(images.contiguous(memory_format=torch.channels_last)) == keys
    assert sample_keys(images[7:8]) == keys[7:8]


def test_key_matches_wide_integers():
    images = some_images(2, torch.float32, (2, 5))
    for image, key in zip(images.numpy(), sample_keys(images), strict=True):
        total = 0
        for position, bits in enumerate(image.view(np.int32).tolist(), start=1):
            weight = signed(position * 0x1E3779B97F4A7C15)
            weight = signed((weight ^ (weight >> 29)) * 0x3F58476D1CE4E5B9)
            total += bits * ((weight ^ (weight >> 32)) | 1)
        assert signed(total) == key


def signed(value):
    """Reduce a Python integer to the int64 that a wrapping machine register would hold."""
    return (value + 2**63) % 2**64 - 2**63


def test_key_sees_moved_pixels():
    images = torch.zeros(16, 16)
    images[torch.arange(16), torch.arange(16)] = 1.0
    assert len(set(sample_keys(images))) == 16


def test_stream_seeds_are_distinct_and_fit_a_generator():
    parts = list(itertools.product(range(6), (-(2**63), -1, 0, 1, 2**63 - 1), range(4)))
    seeds = [stream_seed(*part) for part in parts]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(parts)  # all that mt19937 reads
    assert all(0 <= seed < 2**63 for seed in seeds)
