"""Square: its promises, what it is for, and its random streams."""

import numpy as np
import pytest
import torch
from attack_models import RowWise, busy_model

from calibclip.attacks import Square
from calibclip.attacks.square import patch_side
from calibclip.attacks.threat import sample_keys, stream_seed

SHAPE = (2, 6, 5)


def images_of(batch, seed=0, shape=SHAPE, dtype=torch.float64):
    values = np.random.default_rng(seed).uniform(-0.2, 1.2, (batch, *shape)).clip(0, 1)
    return torch.from_numpy(values).to(dtype)


def linear(shape=SHAPE, seed=0):
    """Two classes with logits 0 and <w, x>, summed row by row."""
    weight = torch.from_numpy(np.random.default_rng(seed).normal(size=int(np.prod(shape))))

    def model(points):
        score = (points.flatten(1) * weight).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)

    return model, weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [0.0, 4 / 255, 0.3, 1.0])
def test_every_query_is_in_ball_and_box(dtype, eps):
    clean, visited = images_of(3, dtype=dtype), []
    core = RowWise(0, dtype, shape=SHAPE)

    def model(points):
        visited.append(points)
        return core(points)

    # No lead is above 0, so that no row leaves and the rows of a query are those of the images.
    target = core(clean).argmax(1)
    far = torch.nn.functional.one_hot(target, 4) * 1e3
    result = Square(eps, queries=40)(lambda points: model(points) + far, clean, target)
    assert len(visited) == 40
    for points in (*visited, result.images):
        assert points.dtype == dtype
        assert points.shape == clean.shape
        assert points.min() >= 0
        assert points.max() <= 1
        assert (points.double() - clean.double()).abs().max() <= eps


def plain_square(model, image, label, attack):
    """One sample of (C, H, W), one query at a time, from the same stream of random numbers."""
    channels, height, width = image.shape
    (key,) = sample_keys(image[None])

    def draws(block, *shape):
        generator = torch.Generator().manual_seed(stream_seed(attack.seed, key, block))
        return torch.empty(shape).uniform_(generator=generator)

    def lead(points):
        (logits,) = model(points[None]).tolist()
        return max(z for k, z in enumerate(logits) if k != label) - logits[label]

    high = (image + attack.eps).clamp(max=attack.bounds[1])
    low = (image - attack.eps).clamp(min=attack.bounds[0])
    stripes = draws(0, channels, 1, width)
    best = torch.where(stripes < 0.5, high, low)
    most, found = lead(best), 0
    for query in range(1, attack.queries):
        if most > 0:
            break
        block, place = divmod(query - 1, 128)
        top, left, *signs = draws(block + 1, 128, 2 + channels)[place].tolist()
        side = patch_side(query, attack, image[None])
        tall, wide = min(side, height), min(side, width)
        top, left = int(top * (height - tall + 1)), int(left * (width - wide + 1))
        tried = best.clone()
        for channel, sign in enumerate(signs):
            rows, columns = slice(top, top + tall), slice(left, left + wide)
            bound = high if sign < 0.5 else low
            tried[channel, rows, columns] = bound[channel, rows, columns]
        if lead(tried) > most:
            best, most, found = tried, lead(tried), query
    return best, most, found if most > 0 else -1


@pytest.mark.parametrize("plateaus", [False, True])
def test_against_a_plain_loop(plateaus):
    core = RowWise(1, shape=SHAPE)
    images = images_of(6, 4)

    def model(points):
        return (core(points) * 2).round() / 2 if plateaus else core(points)

    target = model(images).argmax(1)
    attack = Square(0.06 if plateaus else 0.04, queries=300, seed=2)
    result = attack(model, images, target)
    for i in range(6):
        best, most, found = plain_square(model, images[i], int(target[i]), attack)
        assert torch.allclose(result.images[i], best, rtol=0, atol=1e-12)
        assert float(result.loss[i]) == pytest.approx(most, abs=1e-9)
        assert int(result.steps_to_success[i]) == found
    assert 0 < int(result.success.sum()) < 6
    assert result.n_forward == 300
    # Broken samples have left the batch.
    assert 300 < result.forward_images < 6 * 300


@pytest.mark.parametrize("options", [{"p_init": 0.1}, {"bounds": (-0.5, 1.25)}])
def test_options_against_a_plain_loop(options):
    core, images = RowWise(1, shape=SHAPE), images_of(4, 4)
    target = core(images).argmax(1)
    results = []
    for attack in (Square(0.04, queries=60), Square(0.04, queries=60, **options)):
        results.append(attack(core, images, target))
        for i in range(4):
            best, _, found = plain_square(core, images[i], int(target[i]), attack)
            assert torch.allclose(results[-1].images[i], best, rtol=0, atol=1e-12)
            assert int(results[-1].steps_to_success[i]) == found
    assert not torch.equal(results[0].images, results[1].images)


def test_a_generator_gives_fresh_streams():
    core, images = RowWise(1, shape=SHAPE), images_of(4, 4)
    target, attack = core(images).argmax(1), Square(0.04, queries=9)
    generator = torch.Generator().manual_seed(0)
    first, second = (attack(core, images, target, generator=generator).images for _ in range(2))
    assert not torch.equal(first, second)
    again = attack(core, images, target, generator=generator.manual_seed(0)).images
    assert torch.equal(first, again)


def test_linear_optimum_is_approached():
    # The largest lead is eps times the dual norm away; patches of one pixel can take it all.
    model, weight = linear()
    images = 0.3 + 0.4 * images_of(4)
    target = torch.ones(4).long()
    eps, far = 0.1, 1e9  # nothing succeeds, so that the search goes on

    def hard(points):
        return model(points) + torch.tensor([-far, 0.0], dtype=torch.float64)

    bound = -model(images)[:, 1] + eps * weight.abs().sum()
    short, long = (
        Square(eps, queries=queries)(hard, images, target).loss + far for queries in (20, 4000)
    )
    assert bool((long <= bound + 1e-6).all())
    gained = (long + model(images)[:, 1]) / (eps * weight.abs().sum())
    assert float(gained.min()) > 0.9
    assert bool((short < long).all())


def test_a_model_without_gradients_is_broken():
    model, _ = linear()
    images = images_of(8)
    target = model(images).argmax(1)
    visited = []

    def blind(points):
        assert not torch.is_grad_enabled()
        visited.append(len(points))
        return (model(points) * 4).round() / 4

    result = Square(0.3, queries=300)(blind, images, target)
    assert bool(result.success.all())
    with torch.no_grad():
        assert torch.equal(blind(result.images).argmax(1) != target, result.success)
    assert result.n_backward == 0
    assert result.n_forward == len(visited) - 1 < 300
    assert result.forward_images == sum(visited[:-1])


def test_steps_to_success_and_loss():
    core = RowWise(1, shape=SHAPE)
    images = images_of(10, 1)
    target = core(images).argmax(1)
    found = {}
    for queries in (1, 5, 60):
        found[queries] = Square(0.1, queries=queries)(core, images, target)
        result = found[queries]
        assert torch.equal(result.success, result.steps_to_success >= 0)
        assert torch.equal(result.success, core(result.images).argmax(1) != target)
        logits = core(result.images)
        own = logits.gather(1, target[:, None]).squeeze(1)
        others = logits.scatter(1, target[:, None], -torch.inf).amax(1)
        assert torch.allclose(result.loss, others - own)
        assert result.steps_to_success.max() < queries
    late = (found[60].steps_to_success >= 5) | (found[60].steps_to_success < 0)
    assert not found[5].success[late].any()
    assert found[5].success[~late].all()
    assert 0 < int(late.sum()) < 10


@pytest.mark.parametrize("shape", [SHAPE, (1, 3, 9), (7,), (3, 1, 1)])
def test_company_in_the_batch_does_not_matter(shape):
    core = RowWise(2, shape=shape)
    images = images_of(9, 2, shape)
    target = core(images).argmax(1)
    attack = Square(0.08, queries=150, seed=3)
    whole = attack(core, images, target)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])
    mixed = attack(core, images[order], target[order])
    for name in ("images", "success", "loss", "steps_to_success"):
        assert torch.equal(getattr(mixed, name), getattr(whole, name)[order])
        for sample in range(0, 9, 4):
            row = slice(sample, sample + 1)
            alone = attack(core, images[row], target[row])
            assert torch.equal(getattr(alone, name), getattr(whole, name)[row])
    other = Square(0.08, queries=150, seed=4)(core, images, target)
    assert not torch.equal(other.images, whole.images)


def test_targeted_reaches_the_wanted_class():
    images = 0.5 + 0.01 * torch.arange(12.0).view(3, 4)
    target = torch.tensor([0, 1, 2])
    result = Square(0.1, queries=300, targeted=True)(lambda x: 10 * x, images, target)
    assert torch.equal(result.images.argmax(1), target)
    assert bool(result.success.all())


def test_a_model_that_breaks_down_is_no_success():
    def model(points):
        logits = torch.stack([points.flatten(1).mean(1), 1 - points.flatten(1).mean(1)], 1)
        return torch.where(points.flatten(1)[:, :1] > 0.5, torch.nan, logits)

    images = torch.full((2, *SHAPE), 0.45, dtype=torch.float64)
    result = Square(0.2, queries=40)(model, images, torch.tensor([1, 1]))
    assert not model(result.images).isnan().any()
    assert torch.equal(result.success, model(result.images).argmax(1) != 1)


def test_no_trace_is_left():
    model = busy_model()
    state, random_state = (
        {k: v.clone() for k, v in model.state_dict().items()},
        torch.get_rng_state(),
    )
    images = torch.rand(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    Square(0.1, queries=5)(model, images, torch.tensor([0, 1, 2]))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training


def test_patches_shrink_as_published():
    images, attack = torch.zeros(1, 3, 224, 224), Square(0.1, queries=10_000)
    halvings = [0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    for count, query in enumerate(halvings):
        side = round((0.8 / 2**count * 224 * 224) ** 0.5)
        assert patch_side(max(query, 1), attack, images) == side
        if query:
            assert patch_side(query - 1, attack, images) == round(
                (0.8 / 2 ** (count - 1)) ** 0.5 * 224
            )
    # The schedule is stretched to the number of queries.
    assert patch_side(6, Square(0.1, queries=5000), images) == patch_side(12, attack, images)


def test_empty_batch():
    result = Square(0.1)(uncalled, torch.zeros(0, *SHAPE), torch.zeros(0).long())
    assert result.images.shape == (0, *SHAPE)
    assert result.n_forward == 0
    with pytest.raises(TypeError, match="model: expected a callable from images to logits"):
        Square(0.1)(None, torch.zeros(0, *SHAPE), torch.zeros(0).long())


def uncalled(points):
    raise RuntimeError("not to be called")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps: expected a number >= 0, got -1"),
        ({"eps": 8.0}, ValueError, "eps: expected .* <= 1, the width of bounds, got 8"),
        ({"queries": 0}, ValueError, "queries: expected an integer >= 1, got 0"),
        ({"norm": "l2"}, ValueError, "norm: expected one of 'linf', got 'l2'"),
        ({"p_init": 0}, ValueError, "p_init: expected a number > 0, got 0"),
        ({"p_init": 1.5}, ValueError, "p_init: expected a number > 0 and <= 1, got 1.5"),
        ({"targeted": 1}, TypeError, "targeted: expected True or False, got int 1"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Square(**{"eps": 0.1, **options})


def test_bad_images():
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, H, W\) or \(B, D\), got"):
        Square(0.1)(RowWise(), torch.zeros(2, 3, 3), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"target: expected class indices in \[0, 3\], got 7"):
        Square(0.1)(RowWise(shape=SHAPE), images_of(1), torch.tensor([7]))
