"""Any function as an attack: what comes back, and what it may touch."""

import copy
import functools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from calibclip.attacks import AttackWarning
from calibclip.attacks.foreign import Foreign
from calibclip.attacks.objectives import margin

SHAPE = (3, 4, 4)
N_CLASSES = 5


class Busy(nn.Module):
    """A module with everything an attack could disturb."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen_norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 16, N_CLASSES)
        self.modes, self.builds_graph = [], []

    def forward(self, images):
        self.modes.append([module.training for module in self.modules()])
        self.builds_graph.append(torch.is_grad_enabled())
        features = self.frozen_norm(self.norm(self.conv(images)).tanh())
        return 3 * self.head(self.dropout(features).flatten(1))


def busy_model(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Busy().to(dtype).train()
        model.frozen_norm.eval()
        model.conv.bias.requires_grad_(False)
        model.conv.weight.grad = torch.randn_like(model.conv.weight)
    return model


def some_images(batch=6, dtype=torch.float64, seed=0):
    values = np.random.default_rng(seed).uniform(-0.2, 1.2, (batch, *SHAPE)).clip(0, 1)
    return torch.from_numpy(values).to(dtype)


def predictions(model, images):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images).argmax(1)


def sign_step(model, images, target, eps=0.1, factor=1.0):
    """One long step, by ``backward()`` as careless code does it."""
    images = images.clone().requires_grad_()
    F.cross_entropy(model(images), target).backward()
    return images + factor * eps * images.grad.sign()


def traces(model):
    """Everything of a model that an attack must leave alone."""
    parameters = list(model.parameters())
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in parameters],
        "gradients": [parameter.grad for parameter in parameters],
        "values": [None if p.grad is None else p.grad.clone() for p in parameters],
    }


def assert_no_trace(before, after):
    assert before["modes"] == after["modes"]
    assert before["flags"] == after["flags"]
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name])
    for old, new in zip(before["gradients"], after["gradients"], strict=True):
        assert old is new
    for old, new in zip(before["values"], after["values"], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)


def random_states():
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global state is what is looked at
    return (
        torch.get_rng_state().tolist(),
        numpy_state[1].tolist(),
        numpy_state[2:],
        random.getstate(),
    )


# ---------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_images_come_back_into_ball_and_box_and_are_judged_again(norm, dtype):
    model, images, eps = busy_model(dtype), some_images(dtype=dtype), 0.3
    target = predictions(model, images)
    attack = Foreign(functools.partial(sign_step, factor=1.5), eps, norm, name="step")
    result = attack(model, images, target)
    distance = (result.images.double() - images.double()).flatten(1)
    length = distance.abs().amax(1) if norm == "linf" else distance.norm(dim=1)
    assert bool((length <= eps * (1 + 1e-12)).all())
    assert bool((length > 0.5 * eps).all())
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert result.images.dtype == dtype
    with torch.no_grad():
        logits = model.eval()(result.images)
    assert torch.equal(result.success, logits.argmax(1) != target)
    assert torch.allclose(result.loss, margin(logits, target))
    assert bool(result.success.any())
    assert not bool(result.success.all())
    assert bool((result.steps_to_success == -1).all())
    assert (result.n_forward, result.n_backward) == (2, 1)
    assert (result.forward_images, result.backward_images) == (12, 6)
    assert not result.images.requires_grad


def test_targeted_success_is_the_target():
    model, images = busy_model(), some_images()
    target = (predictions(model, images) + 1) % N_CLASSES
    attack = functools.partial(sign_step, eps=0.3, factor=-1.0)
    result = Foreign(attack, 0.3, targeted=True)(model, images, target)
    with torch.no_grad():
        logits = model.eval()(result.images)
    assert torch.equal(result.success, logits.argmax(1) == target)
    assert torch.allclose(result.loss, -margin(logits, target))
    assert bool(result.success.any())


def test_images_that_are_not_finite_stay_clean_and_are_reported():
    def attack(model, images, target):
        images = images + 0.05
        images[1, 0, 0, 0], images[3, 1] = torch.nan, torch.inf
        return images

    model, images = busy_model(), some_images()
    target = predictions(model, images)
    for norm in ("linf", "l2"):
        message = r"^odd: expected finite images, got NaN or infinite entries in 2 of 6; these"
        with pytest.warns(AttackWarning, match=message) as caught:
            result = Foreign(attack, 0.1, norm, name="odd")(model, images, target)
        assert caught[0].filename == __file__
        same = (result.images == images).flatten(1).all(1)
        assert same.tolist() == [False, True, False, True, False, False]


def test_other_bounds_and_an_empty_batch():
    images = 255 * some_images()
    attack = Foreign(lambda model, images, target: images + 90, 8, bounds=(0.0, 255.0))
    model = lambda images: images.flatten(1)[:, :N_CLASSES]  # noqa: E731
    result = attack(model, images, torch.zeros(6).long())
    assert torch.allclose(result.images, (images + 8).clamp(max=255), rtol=1e-14)
    assert len(attack(model, images[:0], torch.zeros(0).long()).images) == 0


# ---------------------------------------------------------------------------- what it may touch


class Vandal:
    """Disturbs all it can reach: the model it is given and the one behind it."""

    def __init__(self, model, fail=False):
        self.model, self.fail = model, fail

    def __call__(self, model, images, target):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        images_adv = images.clone().requires_grad_()
        F.cross_entropy(model(images_adv), target).backward()
        for module in (model, self.model):
            module.train()
            module.requires_grad_(True)
        F.cross_entropy(model(images_adv), target).backward()
        self.model.zero_grad(set_to_none=False)
        self.model.head.weight.grad = torch.ones_like(self.model.head.weight)
        if self.fail:
            raise RuntimeError("the attack failed")
        images.add_(1.0)
        target.add_(1)
        return (images_adv + 0.1 * images_adv.grad.sign()).detach()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("fail", [False, True])
def test_no_trace_is_left(fail, norm):
    model, images = busy_model(), some_images()
    target = predictions(model, images)
    kept, labels = images.clone(), target.clone()
    before, states = traces(model), random_states()
    attack = Foreign(Vandal(model, fail), 0.1, norm)
    if fail:
        with pytest.raises(RuntimeError, match="the attack failed"):
            attack(model, images, target)
    else:
        result = attack(model, images, target)
        assert (result.images - images).abs().max() <= 0.1
        assert not bool(result.success.all())
    # The running statistics apart: with the model's own hands on it an attack can do anything.
    state = {name: value for name, value in before["state"].items() if "running" not in name}
    state = {name: value for name, value in state.items() if "num_batches" not in name}
    assert_no_trace({**before, "state": state}, traces(model))
    assert states == random_states()
    assert torch.equal(images, kept)
    assert torch.equal(target, labels)


def test_the_model_is_out_of_reach_through_what_the_attack_is_given():
    model, images = busy_model(), some_images()

    def attack(box, images, target):
        assert not box.training
        assert [parameter.requires_grad for parameter in box.parameters()] == [False]
        assert next(box.parameters()).dtype == images.dtype
        assert list(box.modules()) == [box]
        box.train()
        box.requires_grad_(True)
        box.zero_grad()
        return sign_step(box, images, target)

    before = traces(model)
    Foreign(attack, 0.1)(model, images, predictions(model, images))
    assert_no_trace(before, traces(model))
    assert not any(map(any, model.modes))
    assert model.builds_graph == [True, False]


def test_a_plain_function_gets_no_gradients_in_its_parameters():
    model = busy_model().eval()
    model.zero_grad()
    images = some_images()
    result = Foreign(sign_step, 0.1)(lambda x: model(x), images, predictions(model, images))
    assert result.n_backward == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_through_the_box():
    model, images = busy_model().eval(), some_images()
    weight = torch.randn(6, N_CLASSES, generator=torch.Generator().manual_seed(0)).double()
    points = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad((weight * model(points)).sum(), points)
    seen = {}

    def attack(box, images, target):
        points = images.clone().requires_grad_()
        # The input need not be a leaf, and the graph may be walked several times.
        logits = box(2 * points - points)
        for _ in range(2):
            (gradient,) = torch.autograd.grad((weight * logits).sum(), points, retain_graph=True)
            assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-15)
        with torch.no_grad():
            seen["no_grad"] = box(points)
        seen["constant"] = box(images)
        loss = (box(points) ** 2).sum()
        (gradient,) = torch.autograd.grad(loss, points, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
        return images

    with torch.no_grad():
        result = Foreign(attack, 0.1)(model, images, predictions(model, images))
    assert not seen["no_grad"].requires_grad
    assert not seen["constant"].requires_grad
    # No graph is built where none was asked for.
    assert model.builds_graph[1:] == [True, False, False, True, False]
    assert torch.equal(seen["constant"], model(images))
    assert (result.n_forward, result.n_backward) == (5, 3)


def test_a_model_without_gradient_stays_one():
    def attack(box, images, target):
        assert not box(images.requires_grad_()).requires_grad
        return images

    Foreign(attack, 0.1)(lambda x: x.detach().flatten(1), some_images(), torch.arange(6))


def noisy(model, images, target, eps=0.1):
    shift = random.random() + np.random.rand()  # noqa: NPY002
    return images + eps * (2 * torch.rand_like(images) - 1) * shift / 2


def test_randomness_is_the_seeds_and_not_the_global_states():
    model, images = busy_model(), some_images()
    target = predictions(model, images)
    run = lambda seed, **options: Foreign(noisy, 0.1, seed=seed)(model, images, target, **options)  # noqa: E731
    first = run(0).images
    for disturb in (torch.rand, np.random.rand, lambda count: random.random()):
        disturb(3)
        assert torch.equal(run(0).images, first)
    assert not torch.equal(run(1).images, first)
    assert len(run(2**40 + 1).images) == 6
    generator = torch.Generator().manual_seed(0)
    drawn = [run(0, generator=generator).images for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(run(0, generator=torch.Generator().manual_seed(0)).images, drawn[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attack": 3}, TypeError, r"^attack: expected a callable \(model, images, target\)"),
        ({"eps": -1.0}, ValueError, r"^eps: expected a number >= 0"),
        ({"eps": 8.0}, ValueError, r"^eps: .* the width of bounds"),
        ({"norm": "l1"}, ValueError, r"^norm: expected one of"),
        ({"bounds": (1.0, 0.0)}, ValueError, r"^bounds: "),
        ({"name": ""}, TypeError, r"^name: expected a string"),
        ({"targeted": 1}, TypeError, r"^targeted: expected True or False"),
        ({"seed": -1}, ValueError, r"^seed: expected an integer >= 0"),
    ],
)
def test_bad_options(changes, error, message):
    with pytest.raises(error, match=message):
        Foreign(**{"attack": noisy, "eps": 0.1, **changes})


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (lambda images: (images, images), TypeError, r"got tuple of 2 tensors; return the images"),
        (lambda images: None, TypeError, r"attack: expected images of shape \(6, 3, 4, 4\)"),
        (lambda images: images.long(), TypeError, r"got int64 tensor"),
        (lambda images: images[:3], ValueError, r"got float64 tensor of shape \(3, 3, 4, 4\)"),
    ],
)
def test_what_an_attack_must_return(found, error, message):
    attack = Foreign(lambda model, images, target: found(images), 0.1)
    with pytest.raises(error, match=message):
        attack(lambda x: x.flatten(1), some_images(), torch.zeros(6).long())


def test_bad_arguments():
    model, images, target = busy_model(), some_images(), torch.zeros(6).long()
    attack = Foreign(noisy, 0.1)
    with pytest.raises(TypeError, match=r"^model: expected a callable"):
        attack(None, images, target)
    with pytest.raises(ValueError, match=r"^images: expected values in \[0, 1\]"):
        attack(model, images + 1, target)
    with pytest.raises(ValueError, match=r"^target: expected class indices in \[0, 4\], got 7"):
        attack(model, images, target + 7)
    with pytest.raises(TypeError, match=r"^model: expected logits .* got tuple"):
        Foreign(sign_step, 0.1)(lambda x: (x, x), images, target)


def test_neither_library_is_imported():
    code = (
        "import sys, calibclip, calibclip.attacks.foreign; "
        "print(*({'torchattacks', 'foolbox', 'eagerpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
