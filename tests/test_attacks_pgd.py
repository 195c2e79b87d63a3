"""PGD against plain loops, closed forms and the promises of its docstring."""

import pickle
import weakref

import numpy as np
import pytest
import torch
from attack_models import N_CLASSES, SHAPE, RowWise, assert_unchanged, busy_model, snapshot
from attack_oracles import own_class, some_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from calibclip.attacks import PGD, AttackResult, pgd
from calibclip.attacks.objectives import resolve_objective

# Random targets and broken models are warned about; test_attacks_result.py looks at the warnings.
pytestmark = pytest.mark.filterwarnings("ignore::calibclip.attacks.result.AttackWarning")

quick = settings(max_examples=25, deadline=None, derandomize=True)
quicker = settings(quick, max_examples=12)  # for properties that run several attacks


def some_target(batch=4, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, N_CLASSES, batch))


# ---------------------------------------------------------------------------- oracles


def plain_pgd(model, image, label, eps, step_size, steps, norm, objective, targeted):
    """One sample in NumPy float64 with the gradient of RowWise and its losses by hand."""
    hidden, output = model.hidden.numpy(), model.output.numpy()
    clean, point = image.numpy().reshape(-1), image.numpy().reshape(-1).copy()
    for _ in range(steps):
        features = np.tanh(hidden @ (point - 0.5))
        logits = output @ features
        if objective == "ce":
            slope = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        else:
            slope = np.zeros(len(logits))
            slope[max((z, k) for k, z in enumerate(logits) if k != label)[1]] = 1
        slope[label] -= 1
        gradient = hidden.T @ ((1 - features**2) * (output.T @ slope))
        if targeted:
            gradient = -gradient
        if norm == "linf":
            point = point + step_size * np.sign(gradient)
            point = np.clip(np.clip(point, clean - eps, clean + eps), 0, 1)
        else:
            point = point + step_size * gradient / np.linalg.norm(gradient)
            delta = point - clean
            point = np.clip(clean + delta * min(1, eps / np.linalg.norm(delta)), 0, 1)
    return point.reshape(image.shape)


def plain_selection(losses, fooled, attack):
    """Apply the documented rule to one sample; arrays of shape (restarts, steps + 1)."""
    restarts, iterates = losses.shape
    entries = [(r, k) for r in range(restarts) for k in range(iterates)]
    clean = {(r, 0) for r in range(restarts)} if attack.steps and not attack.random_start else set()
    if attack.select == "last":
        entries = [(r, iterates - 1) for r in range(restarts)]
    successes = [entry for entry in entries if fooled[entry]]
    if successes and attack.select == "first_success":
        return successes[0]
    pool = [entry for entry in successes if entry not in clean] or successes
    pool = pool or [entry for entry in entries if entry not in clean]
    return max(pool, key=lambda entry: losses[entry])


attacks = st.builds(
    PGD,
    eps=st.sampled_from([0.0, 1e-6, 0.05, 0.2, 1.0]),
    steps=st.integers(0, 4),
    step_size=st.sampled_from([None, 0.03, 0.5]),
    norm=st.sampled_from(["linf", "l2"]),
    objective=st.sampled_from(["ce", "margin"]),
    random_start=st.booleans(),
    restarts=st.integers(1, 3),
    select=st.sampled_from(["worst", "last", "first_success"]),
    targeted=st.booleans(),
    seed=st.integers(0, 9),
)


def test_trajectory_matches_a_plain_loop():
    images, target, model = some_images(), some_target(), RowWise()
    for norm, eps, step_size in (("linf", 0.1, 0.03), ("l2", 0.5, 0.2)):
        for objective in ("ce", "margin"):
            for targeted in (False, True):
                options = {"objective": objective, "targeted": targeted, "random_start": False}
                found = pgd(model, images, target, eps, step_size, 7, norm, **options)
                for image, label, result in zip(images, target.tolist(), found, strict=True):
                    expected = plain_pgd(
                        model, image, label, eps, step_size, 7, norm, objective, targeted
                    )
                    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-9)


@quick
@given(attacks, st.integers(1, 5), st.integers(0, 99))
def test_returned_image_follows_the_rule(attack, batch, seed):
    images, target, model = some_images(batch, seed=seed), some_target(batch, seed), RowWise(seed)
    result = attack(model, images, target)
    visited = torch.stack(model.visited)
    assert result.n_forward == len(visited) == attack.restarts * (attack.steps + 1)
    assert result.n_backward == attack.restarts * attack.steps

    logits = torch.stack([model(points) for points in visited])
    sign = -1 if attack.targeted else 1
    objective = resolve_objective(attack.objective).loss
    losses = sign * torch.stack([objective(z, target) for z in logits]).view(
        attack.restarts, attack.steps + 1, batch
    )
    hit = (logits.argmax(-1) == target).view(losses.shape)
    fooled = hit if attack.targeted else ~hit
    visited = visited.view(*losses.shape, *SHAPE)
    for i in range(batch):
        chosen = plain_selection(losses[..., i].numpy(), fooled[..., i].numpy(), attack)
        assert torch.equal(result.images[i], visited[(*chosen, i)])
        assert result.loss[i] == losses[(*chosen, i)]
        assert result.success[i] == fooled[(*chosen, i)]
        first = next((k for run in fooled[..., i] for k, hit in enumerate(run) if hit), -1)
        assert result.steps_to_success[i] == first


@quick
@given(attacks, st.sampled_from(["sane", "nan gradient", "inf gradient", "nan logits"]),
       st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))  # fmt: skip
def test_result_is_feasible_and_finite(attack, fault, dtype):
    clean, images, target = some_images(3, dtype=dtype), some_images(3, dtype=dtype), some_target(3)
    core = RowWise(dtype=dtype)

    def model(points):
        logits = core(points)
        nothing = (points - points.detach()).flatten(1).sum(1, keepdim=True)
        if fault == "nan gradient":
            logits = logits + 0 * nothing.sqrt()
        elif fault == "inf gradient":
            logits = logits * (1 + nothing.abs().sqrt())
        elif fault == "nan logits":
            logits = torch.where(points.flatten(1)[:, :1] > 0.5, torch.nan, logits)
        return logits

    result = attack(model, images, target)
    distance = np.abs(result.images.double().numpy() - clean.double().numpy()).reshape(3, -1)
    if attack.norm == "linf":
        assert distance.max() <= attack.eps
    else:
        assert np.sqrt((distance**2).sum(1)).max() <= attack.eps * (1 + 1e-12)
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert result.images.dtype == dtype
    assert result.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.steps_to_success.dtype == torch.int64
    assert torch.equal(images, clean)
    if attack.eps == 0:
        assert torch.equal(result.images, clean)
    if attack.select != "last":
        assert torch.equal(result.success, result.steps_to_success >= 0)


def test_defaults_are_the_public_contract():
    expected = (
        "PGD(eps=0.5, steps=10, step_size=None, norm='linf', objective='ce', random_start=True, "
        "restarts=1, bounds=(0.0, 1.0), select='worst', stop_when_fooled=False, targeted=False, "
        "seed=0, schedule='constant', momentum=0.0, n_rivals=9, precision=None, compile=False)"
    )
    assert repr(PGD(0.5)) == expected
    model, images, target = RowWise(), some_images(), some_target()
    result = PGD(1 / 255, 2, 1 / 255, "linf", select="last")(model, images, target)
    assert torch.equal(pgd(model, images, target), result.images)
    quarter = PGD(0.1, step_size=0.025)(model, images, target)
    assert torch.equal(PGD(0.1)(model, images, target).images, quarter.images)


# ---------------------------------------------------------------------------- linear models


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", ["ce", "margin"])
def test_linear_model_has_a_closed_form(norm, objective):
    # Two classes with logits (0, <w, x>) and label 1: the margin of class 0 is -<w, x>.
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(18, generator=generator, dtype=torch.float64)
    images = 0.4 + 0.2 * torch.rand(5, *SHAPE, generator=generator, dtype=torch.float64)
    target = torch.ones(5, dtype=torch.int64)
    eps = 0.1

    def model(points):
        score = points.flatten(1) @ weight
        return torch.stack([torch.zeros_like(score), score], 1)

    direction = weight.sign() if norm == "linf" else weight / weight.norm()
    dual_norm = weight.abs().sum() if norm == "linf" else weight.norm()
    best = images - eps * direction.view(SHAPE)
    bound = -model(images)[:, 1] + eps * dual_norm
    # From the clean image one step of length eps is enough; a random start has to travel.
    for options in (
        {"steps": 1, "step_size": eps, "random_start": False},
        {"steps": 20, "step_size": 0.2},
        {"steps": 20, "step_size": 0.2, "restarts": 2},
    ):
        result = PGD(eps, norm=norm, objective=objective, **options)(model, images, target)
        reached = -model(result.images)[:, 1]
        assert torch.allclose(reached, bound, rtol=1e-9)
        assert torch.allclose(result.images, best, atol=1e-6 if norm == "l2" else 1e-12)
        assert bool((reached <= bound + 1e-12).all())
        if objective == "margin":
            assert torch.allclose(result.loss, bound)
    # Certified: a target that the dual norm says cannot fall does not fall.
    assert torch.equal(result.success, bound > 0)


def test_targeted_reaches_the_wanted_class():
    # Independent classes: logit k is pixel k, so any class can be made the largest.
    images = 0.5 + 0.01 * torch.arange(12.0).view(3, 4)
    target = torch.tensor([0, 1, 2])
    for objective in ("ce", "margin"):
        result = PGD(0.1, steps=20, objective=objective, targeted=True)(
            lambda x: 10 * x, images, target
        )
        assert result.success.tolist() == [True] * 3
        assert torch.equal(result.images.argmax(1), target)
        sign_of_target = torch.nn.functional.one_hot(target, 4) * 2 - 1
        if objective == "ce":
            assert torch.allclose(result.images, images + 0.1 * sign_of_target)
    result = PGD(0.001, targeted=True)(lambda x: 10 * x, images, target)
    assert not result.success.any()


def test_custom_objective_is_maximised_and_in_targeted_mode_minimised():
    def first_logit(logits, target):
        assert logits.dtype == torch.float32
        return logits[:, 0] + 0 * target

    images = torch.full((2, 3), 0.5)
    target = torch.zeros(2, dtype=torch.int64)
    for targeted, sign in ((False, 1), (True, -1)):
        attack = PGD(0.1, steps=9, objective=first_logit, targeted=targeted, select="last")
        result = attack(lambda x: (2 * x).half(), images, target)
        assert torch.allclose(result.images[:, 0], 0.5 + sign * torch.tensor(0.1))
        assert torch.allclose(result.loss, sign * 2 * result.images[:, 0], atol=1e-3)


# ---------------------------------------------------------------------------- selection


def walk_to_the_right(*losses):
    """Model of one pixel on which step k of size 0.1 meets ``losses[k]`` as its margin."""

    def model(points):
        step = (points.detach().double() * 10).round().long().clamp(0, len(losses) - 1)
        lead = torch.tensor(losses, dtype=points.dtype)[step] + (points - points.detach())
        return torch.cat([torch.zeros_like(lead), lead], 1)

    return model


@pytest.mark.parametrize(
    ("select", "margins", "expected"),
    [
        ("worst", (-1, 1, 3, 2), 2),
        ("worst", (-1, -4, -2, -3), 2),  # not the clean image, though its loss is highest
        ("worst", (5, -4, -2, -3), 0),  # the clean image, because nothing else is misclassified
        ("worst", (5, -4, 1, -3), 2),
        ("worst", (-1, float("nan"), -3, float("nan")), 2),
        ("worst", (-1, float("nan"), float("nan"), float("nan")), 0),
        ("worst", (-1, -2, float("inf"), -2), 2),
        ("first_success", (-1, 1, 3, 2), 1),
        ("first_success", (5, 6, 7, 8), 0),
        ("first_success", (-1, -4, -2, -3), 2),
        ("last", (-1, 1, 3, -2), 3),
    ],
)
def test_selection_on_a_known_path(select, margins, expected):
    images, target = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0])
    model = walk_to_the_right(*margins)
    attack = PGD(1.0, 3, 0.1, objective="margin", random_start=False, select=select)
    result = attack(model, images, target)
    assert round(10 * result.images.item()) == expected
    assert result.loss.item() == margins[expected]
    assert result.success.item() == (margins[expected] > 0)
    steps_to_success = next((k for k, lead in enumerate(margins) if lead > 0), -1)
    assert result.steps_to_success.item() == steps_to_success


@quicker
@given(attacks, st.integers(0, 99))
def test_more_steps_or_restarts_never_hurt(attack, seed):
    images, target, model = some_images(seed=seed), some_target(seed=seed), RowWise(seed)
    options = {**vars(attack), "select": "worst", "step_size": 0.03}
    base = PGD(**options)(model, images, target)
    longer = PGD(**{**options, "steps": attack.steps + 2})(model, images, target)
    wider = PGD(**{**options, "restarts": attack.restarts + 1})(model, images, target)
    for other in (longer, wider):
        assert bool((other.success | ~base.success).all())
        same = other.success == base.success
        if attack.random_start or attack.steps > 0:
            assert bool((other.loss >= base.loss)[same].all())


@quicker
@given(attacks, st.integers(0, 99))
def test_stopping_early_finds_the_same_successes(attack, seed):
    images, target, model = some_images(seed=seed), some_target(seed=seed), RowWise(seed)
    options = {**vars(attack), "select": "first_success"}
    full = PGD(**options)(model, images, target)
    stopped = PGD(**{**options, "stop_when_fooled": True})(model, images, target)
    assert torch.equal(stopped.success, full.success)
    assert torch.equal(stopped.steps_to_success, full.steps_to_success)
    assert torch.equal(stopped.images[full.success], full.images[full.success])
    for select in ("worst", "last"):
        other = PGD(**{**options, "select": select, "stop_when_fooled": True})
        result = other(model, images, target)
        assert torch.equal(result.success, full.success)
        assert torch.equal(result.images[full.success], full.images[full.success])


def test_stopping_early_saves_passes():
    images = some_images()
    model = RowWise()
    target = own_class(model, images)
    result = PGD(1.0, 50, 0.05, stop_when_fooled=True, restarts=3)(model, images, target)
    needed = int(result.steps_to_success.max())
    assert result.success.all()
    assert needed < 50
    assert (result.n_forward, result.n_backward) == (needed + 1, needed)
    wrong_target = (target + 1) % N_CLASSES
    result = PGD(0.0, 50, stop_when_fooled=True)(model, images, wrong_target)
    assert (result.n_forward, result.n_backward) == (1, 0)
    assert result.steps_to_success.tolist() == [0] * 4
    assert torch.equal(pgd(model, images, wrong_target, stop_when_fooled=True),
                       PGD(1 / 255, 0)(model, images, wrong_target).images)  # fmt: skip


# ---------------------------------------------------------------------------- randomness


@quicker
@given(attacks, st.integers(0, 99), st.integers(0, 5))
def test_batch_split_and_order_do_not_matter(attack, seed, cut):
    images, target = some_images(5, seed=seed), some_target(5, seed)
    model = RowWise(seed)
    whole = attack(model, images, target)
    parts = [attack(model, images[s], target[s]) for s in (slice(cut), slice(cut, None))]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(5))
    shuffled = attack(model, images[order], target[order])
    for name in ("images", "success", "loss", "steps_to_success"):
        value = getattr(whole, name)
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value)
        assert torch.equal(getattr(shuffled, name), value[order])


def test_seed_decides_the_start():
    images, target, model = some_images(), some_target(), RowWise()
    starts = [PGD(0.1, 0, seed=seed)(model, images, target).images for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert bool((starts[0] != starts[2]).flatten(1).any(1).all())
    assert not torch.equal(starts[0], images)
    PGD(0.1, 0, restarts=2)(model, images, target)
    first, second = model.visited[-2:]
    assert torch.equal(first, starts[0])
    assert bool((first != second).flatten(1).any(1).all())


def test_generator_gives_fresh_starts_and_can_be_replayed():
    images, target, model = some_images(), some_target(), RowWise()
    generator = torch.Generator().manual_seed(3)
    options = {"step_size": 0.1 / 255, "generator": generator}
    first, second = (pgd(model, images, target, **options) for _ in range(2))
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    attack = PGD(1 / 255, 2, 0.1 / 255, select="last")
    assert torch.equal(attack(model, images, target, generator=generator).images, first)
    assert torch.equal(pgd(model, images, target, **options), second)


# ---------------------------------------------------------------------------- no trace


@pytest.mark.parametrize("fail_at", [None, 1, 2, 4])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nothing_is_left_behind(norm, fail_at):
    model = busy_model()
    before = snapshot(model)
    model.fail_at = fail_at
    images, target = some_images(dtype=torch.float32), some_target()
    attack = PGD(0.1, 3, norm=norm, restarts=2)
    if fail_at is None:
        attack(model, images, target)
        pgd(model, images, target, norm=norm)
        assert len(model.modes) == 10
    else:
        with pytest.raises(RuntimeError, match="the model failed"):
            attack(model, images, target)
    assert not any(flag for modes in model.modes for flag in modes)
    assert_unchanged(model, before)


def test_plain_callable_collects_no_parameter_gradients():
    model = busy_model().eval()
    before = snapshot(model)
    pgd(lambda points: model(points), some_images(dtype=torch.float32), some_target())
    assert_unchanged(model, before)


def test_modes_are_set_without_calling_train():
    class Particular(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("train() may do more than set a flag")

    model = nn.Sequential(nn.Flatten(), Particular(18, N_CLASSES), nn.Dropout())
    pgd(model, some_images(dtype=torch.float32), some_target())
    assert all(module.training for module in model.modules())


def test_frozen_parameters_save_no_activations_for_their_gradients():
    model = busy_model()
    needs = []
    model.head.register_forward_hook(lambda module, *_: needs.append(module.weight.requires_grad))
    pgd(model, some_images(dtype=torch.float32), some_target())
    assert needs == [False, False]


@pytest.mark.parametrize("flag", [True, False])
def test_parameters_swapped_during_the_attack_have_the_flag_of_their_name(flag):
    """FSDP2 swaps so."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, N_CLASSES))
    layer = model[1]
    before = layer.weight.requires_grad_(flag)

    def swap(module, arguments):
        module.weight = nn.Parameter(before.detach().clone(), requires_grad=before.requires_grad)

    layer.register_forward_pre_hook(swap)
    PGD(eps=0.1, steps=1)(model, some_images(dtype=torch.float32), some_target())
    assert layer.weight is not before
    assert (before.requires_grad, layer.weight.requires_grad) == (flag, flag)
    assert layer.bias.requires_grad


def test_training_step_is_not_affected():
    images, target = some_images(dtype=torch.float32), some_target()
    gradients = []
    for attack_first in (False, True):
        model = busy_model().eval()
        model.conv.weight.grad = None
        loss = nn.functional.cross_entropy(model(images), target)
        if attack_first:
            pgd(model, images, target)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("select", ["last", "worst"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inputs_are_not_modified_and_output_is_like_them(select, layout):
    model = busy_model()
    images = some_images(dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
    target = some_target()
    saved = images.detach().clone(), target.clone()
    versions = images._version, target._version
    for options in (
        {},
        {"norm": "l2"},
        {"steps": 0, "random_start": False},
        {"restarts": 2, "stop_when_fooled": True},
    ):
        found = pgd(model, images, target, select=select, **options)
        assert found.is_contiguous(memory_format=layout)
        assert not found.requires_grad
        assert found.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
        found.zero_()
    assert torch.equal(images, saved[0])
    assert torch.equal(target, saved[1])
    assert (images._version, target._version) == versions
    assert images.grad is None


# ---------------------------------------------------------------------------- surroundings


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_works_inside_no_grad_and_inference_mode(outer):
    model = busy_model()
    expected = PGD(0.1, 3)(model, some_images(dtype=torch.float32), some_target())
    with outer():
        images, target = some_images(dtype=torch.float32), some_target()
        result = PGD(0.1, 3)(model, images.clone(), target.clone())
        assert torch.equal(pgd(model, images.clone(), target.clone(), 0.1, 0.025, 3),
                           PGD(0.1, 3, select="last")(model, images, target).images)  # fmt: skip
        assert not torch.is_grad_enabled()
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.loss, expected.loss)
    result.images.requires_grad_()  # an ordinary tensor, fit for a training step


def test_works_under_autocast():
    model = busy_model()
    images, target = some_images(dtype=torch.float32), some_target()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = PGD(0.1, 3)(model, images, target)
        model.eval()
        again = nn.functional.cross_entropy(model(result.images).float(), target, reduction="none")
    assert result.images.dtype == torch.float32
    assert result.loss.dtype == torch.float32
    assert torch.allclose(result.loss, again)
    assert (result.images - images).abs().max() > 0.09


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_training_path_evaluates_nothing_twice(steps):
    core, graphs, backward = RowWise(), [], []

    def model(points):
        logits = core(points)
        graphs.append(logits.requires_grad)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: backward.append(gradient.shape))
        return logits

    images, target = some_images(), some_target()
    pgd(model, images, target, steps=steps)
    assert (len(core.visited), len(backward)) == (steps, steps)
    result = PGD(0.1, steps)(model, images, target)
    assert (len(core.visited), len(backward)) == (2 * steps + 1, 2 * steps)
    assert (result.n_forward, result.n_backward) == (steps + 1, steps)
    assert graphs == [True] * (2 * steps) + [False]


def test_memory_does_not_grow_with_steps():
    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    live, peaks = weakref.WeakSet(), []

    def pack(tensor):
        saved = Saved(tensor)
        live.add(saved)
        return saved

    for steps in (5, 50):
        core, counts = RowWise(), []

        def model(points, core=core, counts=counts):
            counts.append(len(live))
            return core(points)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            PGD(0.1, steps, restarts=2)(model, some_images(), some_target())
        peaks.append(max(counts))
        assert len(live) == 0
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_empty_batch_and_single_image(norm):
    model = RowWise()
    images, target = some_images(0), some_target(0)
    result = PGD(0.1, norm=norm)(model, images, target)
    assert result.images.shape == images.shape
    assert [len(v) for v in (result.success, result.loss, result.steps_to_success)] == [0, 0, 0]
    assert (result.success.dtype, result.loss.dtype) == (torch.bool, torch.float64)
    assert result.steps_to_success.dtype == torch.int64
    assert pgd(model, images, target, norm=norm).shape == images.shape
    assert repr(result) == "AttackResult(0 images, 0.0 % fooled, 0 forward, 0 backward)"
    assert model.visited == []
    assert PGD(0.1, norm=norm)(model, some_images(1), some_target(1)).success.shape == (1,)


def test_two_classes_one_class_and_flat_inputs():
    images = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    for n_classes in (1, 2):
        weight = torch.linspace(-1, 1, 7 * n_classes).view(7, n_classes)
        target = torch.zeros(3, dtype=torch.int64)
        for objective in ("ce", "margin"):
            result = PGD(0.1, objective=objective)(lambda x, w=weight: x @ w, images, target)
            assert bool((result.images.double() - images.double()).abs().max() <= 0.1)


def test_attacks_are_values():
    attack = PGD(np.float32(0.5), step_size=np.float64(0.25), bounds=(0, 1))
    assert attack == PGD(0.5, step_size=0.25)
    assert repr(attack) == repr(PGD(0.5, step_size=0.25))
    assert attack != PGD(0.5)
    assert len({attack, PGD(0.5, step_size=0.25)}) == 1
    assert pickle.loads(pickle.dumps(attack)) == attack
    assert eval(repr(attack)) == attack
    with pytest.raises(AttributeError):
        attack.eps = 1.0


def test_result_repr():
    success = torch.arange(16) > 0
    result = AttackResult(torch.zeros(16, 1), success, torch.zeros(16), torch.zeros(16), 11, 10)
    assert repr(result) == "AttackResult(16 images, 93.8 % fooled, 11 forward, 10 backward)"


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps: expected a number >= 0, got -0.1"),
        ({"eps": float("nan")}, ValueError, "eps: expected a number >= 0, got nan"),
        ({"eps": "8/255"}, TypeError, "eps: expected a number >= 0, got str '8/255'"),
        ({"steps": -1}, ValueError, "steps: expected an integer >= 0, got -1"),
        ({"steps": 2.0}, TypeError, "steps: expected an integer >= 0, got float 2.0"),
        ({"step_size": 0}, ValueError, "step_size: expected a number > 0, got 0"),
        ({"norm": "l1"}, ValueError, "norm: expected one of 'linf', 'l2', got 'l1'"),
        ({"objective": "dlr?"}, ValueError, "objective: expected one of 'ce', 'margin', .*got"),
        ({"restarts": 0}, ValueError, "restarts: expected an integer >= 1, got 0"),
        ({"bounds": 1.0}, TypeError, r"bounds: expected a tuple \(low, high\), got float 1.0"),
        ({"bounds": (1, 0)}, ValueError, r"bounds: expected \(low, high\) with low < high, got"),
        ({"bounds": ("0", 1)}, TypeError, "bounds: expected a number, got str '0'"),
        ({"select": "best"}, ValueError, "select: expected one of 'worst', 'last', 'first_succes"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        PGD(**{"eps": 0.1, **options})
    with pytest.raises(error, match=message):
        pgd(RowWise(), some_images(), some_target(), **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": torch.zeros(4, *SHAPE, dtype=torch.uint8)}, TypeError,
         r"images: expected a floating-point tensor of shape \(B, ...\), got uint8 tensor of shape "
         r"\(4, 2, 3, 3\); convert to float in \[0, 1\]"),
        ({"images": [0.5]}, TypeError, r"images: expected a floating-point tensor .*, got list"),
        ({"images": torch.zeros(4)}, ValueError, "images: .*; add a batch dimension"),
        ({"images": some_images() * 2}, ValueError,
         r"images: expected values in \[0, 1\], got values in \[0, 2\]; attack images before norm"),
        ({"images": some_images() - 0.25}, ValueError, r"got values in \[-0.25, 0.75\]"),
        ({"images": some_images() * torch.nan}, ValueError, r"got values in \[nan, nan\]"),
        ({"target": some_target(3)}, ValueError,
         r"target: expected .* of shape \(4,\), got int64 tensor of shape \(3,\)"),
        ({"target": some_target().int()}, TypeError, "got int32 tensor .*; call target.long()"),
        ({"target": [0, 1, 2, 3]}, TypeError, "target: expected a tensor of int64 .*, got list"),
        ({"target": some_target() + 4}, ValueError, r"target: expected class indices in \[0, 3\]"),
        ({"target": some_target() - 9}, ValueError, r"target: expected class indices in \[0, 3\]"),
        ({"model": None}, TypeError, "model: expected a callable from images to logits, got None"),
        ({"model": lambda x: x}, ValueError,
         r"model: expected logits of shape \(B, K\) with B = 4, got float64 tensor of shape \(4"),
        ({"model": lambda x: x.flatten(1)[:1]}, ValueError, r"B = 4, got .* \(1, 18\)"),
        ({"model": lambda x: (x.flatten(1), x)}, TypeError, "got tuple; return the logits only"),
        ({"model": lambda x: x.flatten(1).argmax(1)}, TypeError, "model: .* got int64 tensor"),
        ({"model": lambda x: x.flatten(1).detach()}, ValueError,
         "model: expected logits that depend on the images through autograd, got logits without a "
         "gradient; remove no_grad, detach or argmax from the model"),
        ({"model": lambda x: torch.ones(4, 9, requires_grad=True)}, ValueError,
         "model: expected logits that depend on the images through autograd"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int 3"),
        ({"objective": lambda z, y: z.sum()}, ValueError,
         r"objective: expected a tensor of shape \(4,\), got float64 tensor of shape \(\); return"),
        ({"objective": lambda z, y: 1.0}, TypeError, r"objective: .* \(4,\), got float 1.0"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    call = {"model": RowWise(), "images": some_images(), "target": some_target(), **arguments}
    for select in ("last", "worst"):
        with pytest.raises(error, match=message):
            pgd(**call, select=select)


def test_empty_batch_still_needs_a_sensible_target():
    with pytest.raises(
        ValueError, match=r"target: expected a tensor of int64 class indices of shape \(0,\)"
    ):
        PGD(0.1)(RowWise(), some_images(0), some_target(3))


def test_numpy_integers_become_pythons():
    attack = PGD(eps=0.1, steps=np.int64(3), restarts=np.int64(2), seed=np.int64(5))
    assert [type(value) for value in (attack.steps, attack.restarts, attack.seed)] == [int] * 3
    assert attack(RowWise(), some_images(), some_target()).images.shape == some_images().shape
