"""Options of PGD and those the gradient attacks share: a plain loop or a promise for each."""

import math
import re
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from attack_oracles import (
    SHAPE,
    RowWise,
    assert_same,
    evaluator,
    own_class,
    plain_pgd,
    project,
    some_images,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from calibclip.attacks import APGD, PGD, AttackResult, AttackWarning, Diagnostics, WorstCase, pgd
from calibclip.attacks.objectives import OBJECTIVES, Objective, margin, misclassified

quietly = pytest.mark.filterwarnings("ignore::calibclip.attacks.result.AttackWarning")
NAN, INF = float("nan"), float("inf")


def problem(batch=4, seed=0, **options):
    """A model, images, and its own predictions as target."""
    model, images = RowWise(seed, **options), some_images(batch, seed)
    target = own_class(model, images)
    model.visited.clear()
    return model, images, target


# ---------------------------------------------------------------------------- PGD's steps


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.5])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_schedule_and_momentum_match_a_plain_loop(norm, schedule, momentum):
    model, images, target = problem()
    start, steps = some_images(seed=9), 7
    share = {
        "constant": [1.0] * steps,
        "linear": [1.0, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7],
        "cosine": [math.cos(math.pi * k / 14) ** 2 for k in range(steps)],
    }[schedule]
    radius = torch.tensor([0.2, 0.1, 0.3, 0.25], dtype=torch.float64)
    for step_size in (0.05, None):
        attack = PGD(0.2, steps, step_size, norm, schedule=schedule, momentum=momentum)
        model.visited.clear()
        attack(model, images, target, start=start, eps=radius)
        visited = torch.stack(model.visited).numpy()
        last = pgd(model, images, target, 0.2, step_size, steps, norm, start=start,
                   schedule=schedule, momentum=momentum)  # fmt: skip
        for i, clean in enumerate(images.numpy()):
            for eps in {float(radius[i]), 0.2}:
                sizes = [(eps / 4 if step_size is None else step_size) * part for part in share]
                first = project(start[i].numpy(), clean, eps, norm)
                evaluate = evaluator(model, "ce", int(target[i]))
                points = plain_pgd(evaluate, clean, first, eps, sizes, norm, momentum)
                if eps == radius[i]:
                    np.testing.assert_allclose(visited[:, i], points, rtol=0, atol=1e-9)
                if eps == 0.2:
                    np.testing.assert_allclose(last[i], points[-1], rtol=0, atol=1e-9)


class Slopes:
    """At call ``k`` the margin is 0 and its gradient ``slopes[k]``, for one image."""

    def __init__(self, slopes):
        self.slopes = torch.tensor(slopes, dtype=torch.float64)
        self.visited = []

    def __call__(self, points):
        slope = self.slopes[min(len(self.visited), len(self.slopes) - 1)]
        self.visited.append(points.detach().clone())
        # Entry by entry: a slope that is not a number must not reach the others.
        parts = [_Tilt.apply(points[:, j], slope[j]) for j in range(len(slope))]
        lead = torch.stack(parts).sum(0)
        return torch.stack([5 - lead, torch.full_like(lead, 5.0)], 1)


class _Tilt(torch.autograd.Function):
    """Zero, with a given slope."""

    @staticmethod
    def forward(ctx, value, slope):
        ctx.save_for_backward(slope)
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


@quietly
@pytest.mark.parametrize("scale", [1.0, 1e-290, 5e307])
def test_momentum_outlives_steps_without_a_gradient(scale):
    # L1-normalised: 3/4 and -1/4; nothing; not a number and nothing; then the other way.
    slopes = [[3 * scale, -scale], [0.0, 0.0], [NAN, 0.0], [INF, -2 * scale], [-scale, 0.0]]
    model = Slopes(slopes)
    attack = PGD(0.5, 5, 0.01, "l2", objective="margin", momentum=0.5, random_start=False)
    clean = torch.full((1, 2), 0.5, dtype=torch.float64)
    attack(model, clean, torch.tensor([0]))
    velocity, point = np.zeros(2), clean[0].numpy()
    added = np.array([[0.75, -0.25], [0, 0], [0, 0], [0, -1], [-1, 0]])
    for k, gradient in enumerate(added):
        velocity = 0.5 * velocity + gradient
        point = point + 0.01 * velocity / np.linalg.norm(velocity)
        np.testing.assert_allclose(model.visited[k + 1][0], point, rtol=0, atol=1e-12)


def test_momentum_follows_the_sum_not_the_last_gradient():
    model = Slopes([[4.0, -1.0], [-1.0, -1.0]])
    options = {"objective": "margin", "random_start": False, "select": "last"}
    clean = torch.full((1, 2), 0.5, dtype=torch.float64)
    ends = []
    for momentum in (0.0, 1.0):
        model.visited.clear()
        attack = PGD(0.5, 2, 0.125, momentum=momentum, **options)
        ends.append(attack(model, clean, torch.tensor([0])).images[0].tolist())
    assert ends == [[0.5, 0.25], [0.75, 0.25]]


# ---------------------------------------------------------------------------- the threat model


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack_type", [PGD, APGD])
def test_one_radius_per_image(attack_type, norm):
    model, images, target = problem(5)
    radius = torch.tensor([0.0, 0.05, 0.1, 0.3, 1e-6], dtype=torch.float64)
    result = attack_type(0.1, 6, norm=norm, restarts=2)(model, images, target, eps=radius)
    for i, eps in enumerate(radius.tolist()):
        single = attack_type(eps, 6, norm=norm, restarts=2)
        assert_same(single(model, images[i : i + 1], target[i : i + 1]), result, slice(i, i + 1))
    assert torch.equal(result.images[0], images[0])
    same = attack_type(0.1, 6, norm=norm)(model, images, target)
    # float32 radii are taken as they are, and a plain number is one radius for all.
    uniform = torch.full((5,), 0.1, dtype=torch.float64)
    assert_same(attack_type(0.4, 6, norm=norm)(model, images, target, eps=uniform), same)
    assert not torch.equal(same.images, result.images)


@pytest.mark.parametrize("attack_type", [PGD, APGD])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 3), (2, 1, 1), (4, 1, 3, 3), (4, *SHAPE), (1,)])
@quietly
def test_masked_pixels_stay(attack_type, norm, shape):
    model, images, target = problem()
    mask = torch.from_numpy(np.random.default_rng(1).random(shape) < 0.6)
    mask.view(-1)[0] = False
    wide = mask.expand(images.shape)
    result = attack_type(0.2, 5, norm=norm, restarts=2)(model, images, target, mask=mask)
    for points in (*model.visited, result.images):
        assert torch.equal(points[~wide], images[~wide])
    assert bool((result.images != images)[wide].any()) == bool(wide.any())
    if norm == "l2" and wide.any():
        # The whole radius is for the pixels that may move.
        length = (torch.stack(model.visited) - images).flatten(2).norm(dim=2)
        assert length.amax() > 0.199


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_mask_is_part_of_the_projection_and_of_the_direction(norm):
    model, images, target = problem()
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[0] = True
    start = some_images(seed=9)
    attack = PGD(0.3, 6, 0.1, norm)
    attack(model, images, target, mask=mask, start=start)
    allowed = mask.numpy()
    for i, clean in enumerate(images.numpy()):
        inner = evaluator(model, "ce", int(target[i]))

        def evaluate(point, inner=inner):
            loss, gradient = inner(point)
            return loss, gradient * allowed

        first = np.where(allowed, start[i].numpy(), clean)
        first = project(first, clean, 0.3, norm)
        points = plain_pgd(evaluate, clean, first, 0.3, [0.1] * 6, norm)
        visited = torch.stack(model.visited)[:, i]
        np.testing.assert_allclose(visited, points, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_start_is_projected_and_for_the_first_restart_only(norm):
    model, images, target = problem()
    start = some_images(seed=9)
    attack = PGD(0.1, 1, norm=norm, restarts=2)
    attack(model, images, target, start=start)
    given = list(model.visited)
    model.visited.clear()
    attack(model, images, target)
    assert torch.equal(given[2], model.visited[2])
    assert not torch.equal(given[0], model.visited[0])
    for point, clean, far in zip(given[0], images.numpy(), start.numpy(), strict=True):
        np.testing.assert_allclose(point, project(far, clean, 0.1, norm), rtol=0, atol=1e-12)
    # The start is an iterate, which may be the one that is returned.
    result = PGD(0.1, 0, norm=norm)(model, images, target, start=start)
    assert torch.equal(result.images, given[0])
    # Without random starts the second restart begins at the clean image.
    model.visited.clear()
    PGD(0.1, 0, norm=norm, restarts=2, random_start=False)(model, images, target, start=start)
    assert torch.equal(model.visited[0], given[0])
    assert torch.equal(model.visited[1], images)


@pytest.mark.parametrize("given", [False, True])
def test_a_given_start_may_be_returned_where_the_clean_image_would_not(given):
    # The gradient points to the right, where the loss is lower.
    def model(points):
        lead = (points - points.detach()) - (points.detach() - 0.5) - 0.1
        return torch.cat([torch.zeros_like(lead), lead], 1)

    clean = torch.full((1, 1), 0.5, dtype=torch.float64)
    attack = PGD(0.4, 3, 0.05, objective="margin", random_start=False)
    start = clean + 0.1 if given else None
    result = attack(model, clean, torch.tensor([0]), start=start)
    assert result.images.item() == pytest.approx(0.6 if given else 0.55)


# ---------------------------------------------------------------------------- references


def test_kl_is_taken_from_the_clean_outputs_or_from_what_is_passed():
    model, images, target = problem()
    other = RowWise(5)(images)
    for reference in (None, other):
        attack = PGD(0.05, 6, 0.02, objective="kl")
        result = attack(model, images, target, reference=reference)
        fixed = (model(images) if reference is None else reference).log_softmax(1)
        found = model(result.images).log_softmax(1)
        expected = (fixed.exp() * (fixed - found)).sum(1)
        assert torch.allclose(result.loss, expected, rtol=1e-9)
        start = (fixed.exp() * (fixed - model(images).log_softmax(1))).sum(1)
        assert bool((result.loss > start).all())
        # One more pass, over the clean images, if the model itself is the reference.
        assert result.n_forward == 7 + (reference is None)
        assert torch.equal(result.success, model(result.images).argmax(1) != target)


def test_embeddings_need_no_target():
    model, images, _ = problem(n_classes=7)
    frozen = RowWise(5, 7)(images)
    for reference in (None, frozen):
        attack = PGD(0.1, 8, 0.03, objective="embedding-l2")
        result = attack(model, images, reference=reference)
        assert_same(attack(model, images, None, reference=reference), result)
        fixed = model(images) if reference is None else reference
        expected = (model(result.images) - fixed).square().sum(1)
        assert torch.allclose(result.loss, expected, rtol=1e-9)
        assert bool((expected > (model(images) - fixed).square().sum(1)).all())
        assert not result.success.any()
        assert result.steps_to_success.tolist() == [-1] * 4
        stopped = PGD(0.1, 8, 0.03, objective="embedding-l2", stop_when_fooled=True)
        assert_same(stopped(model, images, reference=reference), result)


def test_underconfidence_succeeds_where_the_clean_outputs_were_surer():
    model, images, target = problem()

    def scaled(points):
        return 20 * model(points)

    attack = PGD(0.1, 8, 0.01, objective="underconfidence", random_start=True)
    result = attack(scaled, images, target)
    assert result.n_forward == 10
    assert result.success.any()
    objective = OBJECTIVES["underconfidence"]
    expected = objective.success(scaled(result.images), target, scaled(images))
    assert torch.equal(result.success, expected)
    # Against a reference that is all doubt there is none.
    doubtful = torch.zeros(4, 5, dtype=torch.float64)
    assert not attack(scaled, images, target, reference=doubtful).success.any()


def aligned(logits, target, reference):
    """A loss that tells which rows of target and reference came along."""
    assert len(logits) == len(target) == len(reference)
    assert reference.shape[1:] == (3, 2)
    return (logits * reference[:, 0, :1]).sum(1) + 1000 * target + 100 * reference[:, 2, 1]


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 10])
def test_a_callable_gets_the_reference_row_by_row(batch_size):
    model, images, target = problem()
    reference = torch.arange(24.0).view(4, 3, 2) + 1
    attack = PGD(0.1, 5, objective=aligned, restarts=2)
    result = attack(model, images, target, reference=reference, batch_size=batch_size)
    expected = aligned(model(result.images), target, reference)
    assert torch.allclose(result.loss, expected, rtol=1e-12)
    # The target is class indices, so that success is known.
    assert torch.equal(result.success, misclassified(model(result.images), target))
    assert_same(attack(model, images, target, reference=reference), result)
    assert bool((result.loss > aligned(model(images), target, reference)).all())


def test_a_callable_may_take_any_target():
    model, images, _ = problem()

    def towards(logits, target):
        return -(logits - target).square().sum(1)

    wanted = model(images).flip(0)
    for targeted, sign in ((False, 1), (True, -1)):
        attack = PGD(0.1, 5, objective=towards, targeted=targeted, stop_when_fooled=True)
        result = attack(model, images, wanted, batch_size=3)
        assert torch.allclose(result.loss, sign * towards(model(result.images), wanted))
        assert not result.success.any()
    result = PGD(0.1, 5, objective=lambda logits, target: logits[:, 0])(model, images)
    assert bool((result.loss > model(images)[:, 0]).all())
    assert not result.success.any()


def test_an_objective_of_ones_own():
    model, images, target = problem()

    def close_call(logits, target):
        return logits.topk(2, dim=1).values.diff(dim=1).squeeze(1).abs() < 0.5

    own = Objective(lambda logits, target: -logits.amax(1), success=close_call)
    attack = PGD(0.2, 30, 0.01, objective=own, stop_when_fooled=True)
    result = attack(model, images, target, batch_size=2)
    assert result.success.any()
    assert torch.equal(result.success, close_call(model(result.images), target))


# ---------------------------------------------------------------------------- every objective


def arguments(name, model, images):
    objective = OBJECTIVES[name]
    target = own_class(model, images)
    if objective.target == "multilabel":
        target = (model(images) > model(images).median(1, keepdim=True).values).long()
    return objective, target


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("attack_type", "norm"), [(PGD, "linf"), (PGD, "l2"), (APGD, "linf")])
def test_named_objective_end_to_end(name, attack_type, norm):
    model, images = RowWise(2), some_images(7)
    objective, target = arguments(name, model, images)
    eps = 0.03 if norm == "linf" else 0.15
    attack = attack_type(eps, 8, norm=norm, objective=name, n_rivals=2)
    result = attack(model, images, target)

    def both(points):
        logits = model(points)
        if objective.reference == "none":
            return objective.loss(logits, target), objective.success(logits, target)
        reference = model(images)
        if objective.reference == "clean":
            return (
                objective.loss(logits, target, reference),
                objective.success(logits, target, reference),
            )
        ranking = model(images).argsort(1, descending=True)
        losses = [objective.loss(logits, target, ranking[:, rank]) for rank in (1, 2)]
        # The attempt that won is not told; one of the two must fit.
        nearest = torch.where((losses[0] - result.loss).abs() < 1e-9, *losses)
        return nearest, misclassified(logits, target)

    loss, success = both(result.images)
    assert torch.allclose(result.loss, loss, rtol=1e-9, atol=1e-12)
    assert torch.equal(result.success, success)
    assert torch.equal(result.success, result.steps_to_success >= 0)
    if objective.reference != "rival":
        assert bool((loss > both(images)[0]).all())
    if name not in ("embedding-l2", "dirichlet-kl"):
        assert success.any()
    assert not result.images.requires_grad

    # The passes for the clean outputs are counted, and whatever shares a batch is of no effect.
    attempts = 2 if objective.reference == "rival" else 1
    extra = objective.reference in ("clean", "rival")
    assert result.n_forward == attempts * 9 + extra
    assert result.n_backward == attempts * 8
    parts = attack(model, images, target, batch_size=3)
    assert_same(parts, result)
    assert parts.n_forward == math.ceil(7 * attempts / 3) * 9 + 3 * extra
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    assert_same(attack(model, images[order], target[order]), result, order)
    stopped = attack_type(
        eps, 8, norm=norm, objective=name, n_rivals=2, stop_when_fooled=True, select="first_success"
    )
    first = stopped(model, images, target, batch_size=3)
    assert torch.equal(first.success, result.success)
    assert torch.equal(first.images[~first.success], result.images[~first.success])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_training_path_takes_every_objective(name):
    model, images = RowWise(2), some_images(5)
    _, target = arguments(name, model, images)
    options = {"objective": name, "select": "last", "n_rivals": 2}
    expected = PGD(0.03, 3, **options)(model, images, target).images
    assert torch.equal(pgd(model, images, target, 0.03, None, 3, **options), expected)


def test_the_training_path_takes_objectives_as_objects():
    model, images, target = problem()
    for name, objective in OBJECTIVES.items():
        if objective.target == "class":
            found = pgd(model, images, target, objective=objective)
            assert torch.equal(found, pgd(model, images, target, objective=name))


# ---------------------------------------------------------------------------- rows side by side


def test_restarts_run_side_by_side():
    model, images, target = problem(6)
    attack = PGD(0.02, 5, restarts=4)
    result = attack(model, images, target)
    assert (result.n_forward, result.n_backward) == (24, 20)
    assert (result.forward_images, result.backward_images) == (144, 120)
    for batch_size, passes in ((24, 1), (12, 2), (100, 1), (7, 4), (1, 24)):
        model.visited.clear()
        other = attack(model, images, target, batch_size=batch_size)
        assert_same(other, result)
        assert (other.n_forward, other.n_backward) == (6 * passes, 5 * passes)
        assert (other.forward_images, other.backward_images) == (144, 120)
        widths = [len(points) for points in model.visited]
        assert max(widths) <= batch_size


ATTACKS = [
    PGD(0.15, 20, 0.01, stop_when_fooled=True),
    PGD(0.15, 20, 0.01, stop_when_fooled=True, select="last", restarts=2),
    PGD(0.6, 20, 0.05, "l2", stop_when_fooled=True, select="first_success", restarts=3),
    PGD(0.15, 20, 0.02, stop_when_fooled=True, schedule="linear", momentum=0.9, restarts=2),
    PGD(0.15, 20, stop_when_fooled=True, schedule="cosine", objective="dlr-targeted", n_rivals=3),
    PGD(0.15, 20, 0.01, stop_when_fooled=True, random_start=False, objective="margin"),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_places_are_refilled_without_a_trace(attack):
    model, images, target = problem(13, 7)
    target[4] = (target[4] + 1) % 5
    radius = attack.eps * torch.linspace(0.0, 1.5, 13, dtype=torch.float64)
    mask = torch.from_numpy(np.random.default_rng(2).random((13, *SHAPE)) < 0.9)
    rows = {"eps": radius, "mask": mask, "start": some_images(13, 8)}
    if attack.restarts == 3:
        del rows["start"]
    alone = [
        attack(model, images[i : i + 1], target[i : i + 1],
               **{name: value[i : i + 1] for name, value in rows.items()})
        for i in range(13)
    ]  # fmt: skip
    lives = {result.steps_to_success.item() for result in alone}
    assert {-1, 0} < lives
    assert len(lives) >= 5
    for batch_size in (2, 4, 9, 13, 40):
        model.visited.clear()
        result = attack(model, images, target, batch_size=batch_size, **rows)
        widths = [len(points) for points in model.visited]
        assert max(widths) <= batch_size
        assert sum(widths) == result.forward_images
        assert len(widths) == result.n_forward
        if batch_size <= 4:
            # A small batch is full until the queue is empty; the clean outputs come first.
            clean = math.ceil(13 / batch_size) if attack.objective == "dlr-targeted" else 0
            assert widths[clean:] == sorted(widths[clean:], reverse=True)
            assert widths.count(batch_size) > 10
        for i, one in enumerate(alone):
            assert_same(one, result, slice(i, i + 1))


@quietly
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(["linf", "l2"]),
    st.sampled_from([0.01, 0.05, 0.3, 1.0]),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from(["worst", "first_success"]),
    st.sampled_from([None, 1, 3]),
)
def test_alternating_rows_end_early_with_the_same_result(
    norm, step, restarts, seed, select, batch_size
):
    model, images, target = problem(5, seed)
    options = {"norm": norm, "restarts": restarts, "select": select}
    full = PGD(0.03, 15, step, **options)(model, images, target)
    stopped = PGD(0.03, 15, step, stop_when_fooled=True, **options)
    result = stopped(model, images, target, batch_size=batch_size)
    assert torch.equal(result.success, full.success)
    assert torch.equal(result.steps_to_success, full.steps_to_success)
    assert torch.equal(result.images[~full.success], full.images[~full.success])
    assert torch.equal(result.loss[~full.success], full.loss[~full.success])


def test_alternating_rows_save_passes_where_nothing_new_can_come():
    model, images, target = problem(5, 1)
    options = {"stop_when_fooled": True, "random_start": False}
    never = OBJECTIVES["margin"].loss

    def hopeless(logits, target):
        return never(logits, target) - 100

    def no(logits, target):
        return torch.zeros(len(logits), dtype=torch.bool)

    objective = Objective(hopeless, success=no)
    result = PGD(0.01, 30, 1.0, objective=objective, **options)(model, images, target)
    assert result.n_forward < 31
    for other in ({"momentum": 0.5}, {"schedule": "linear"}, {"select": "last"}):
        result = PGD(0.01, 30, 1.0, objective=objective, **options, **other)(model, images, target)
        assert (result.n_forward, result.n_backward) == (31, 30)
    assert APGD(0.01, 30, objective=objective, stop_when_fooled=True)(
        model, images, target
    ).n_forward == 31  # fmt: skip


# ---------------------------------------------------------------------------- precision


class Linear(nn.Module):
    """Two classes; matrix products are what autocast rounds. Records how it was run."""

    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(len(weight[0]), len(weight), bias=False)
        self.layer.weight.data = torch.tensor(weight)
        self.seen = []

    def forward(self, images):
        logits = self.layer(images)
        self.seen.append((images.dtype, logits.dtype, len(images)))
        return logits


HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("precision", HALVES)
def test_a_success_of_low_precision_alone_is_none(precision):
    # In full precision the second class leads by less than half precision can tell apart.
    model = Linear([[1.0, 1.0], [1.0001, 1.0001]])
    images, target = torch.full((3, 2), 0.5), torch.tensor([1, 1, 0])
    half = HALVES[precision]
    result = PGD(0.0, 2, precision=precision)(model, images, target)
    assert result.success.tolist() == [False, False, True]
    assert result.steps_to_success.tolist()[:2] == [-1, -1]
    assert torch.equal(result.images, images)
    assert result.loss.dtype == torch.float32
    assert torch.allclose(result.loss, nn.functional.cross_entropy(
        model(images), target, reduction="none"))  # fmt: skip
    # Three low-precision passes, one to confirm, three to attack the two again.
    assert [(dtype, width) for _, dtype, width in model.seen[:-1]] == (
        [(half, 3)] * 3 + [(torch.float32, 3)] + [(torch.float32, 2)] * 3
    )
    assert {dtype for dtype, *_ in model.seen} == {torch.float32}
    assert result.diagnostics.judged.tolist() == [6, 6, 3]
    assert result.diagnostics.steps.tolist() == [4, 4, 2]
    assert (result.n_forward, result.n_backward) == (7, 4)
    assert (result.forward_images, result.backward_images) == (3 * 3 + 3 + 3 * 2, 2 * 3 + 2 * 2)


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("stop", [False, True])
def test_a_sample_that_was_fooled_by_rounding_alone_is_attacked_again(precision, stop):
    model = Linear([[1.0, 0.0], [0.0, 1.0]])
    # The lead of the true class vanishes in half precision, yet a ball of 0.01 can overcome it.
    images = torch.tensor([[0.7, 0.70001], [0.2, 0.8], [0.7, 0.705]])
    target = torch.ones(3, dtype=torch.int64)
    options = {"steps": 4, "step_size": 0.001, "stop_when_fooled": stop, "random_start": False}
    options["select"] = "first_success"
    result = PGD(0.01, precision=precision, **options)(model, images, target)
    exact = PGD(0.01, **options)(model, images, target)
    assert result.success.tolist() == exact.success.tolist() == [True, False, True]
    assert_same(
        *(AttackResult(r.images[:2], r.success[:2], r.loss[:2], r.steps_to_success[:2], 0, 0)
          for r in (result, exact))
    )  # fmt: skip
    assert result.steps_to_success[0] == 1


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", ["ce", "margin", "dlr", "dlr-targeted", "overconfidence"])
def test_low_precision_finds_about_the_same(precision, name):
    generator = torch.Generator().manual_seed(0)
    model = Linear((5 * torch.randn(5, 18, generator=generator)).tolist())
    images = torch.rand(12, 18, generator=generator)
    target = model(images).argmax(1).detach()
    options = {"objective": name, "restarts": 2}
    exact = PGD(0.04, 8, **options)(model, images, target)
    result = PGD(0.04, 8, precision=precision, **options)(model, images, target, batch_size=5)
    assert result.images.dtype == torch.float32
    assert 0 < exact.success.sum() < 12
    assert (result.success == exact.success).sum() >= 11
    assert torch.equal(result.success, model(result.images).argmax(1) != target)
    if name != "dlr-targeted":
        loss = OBJECTIVES[name].loss(model(result.images).detach(), target)
        assert torch.allclose(result.loss, loss, rtol=1e-5, atol=1e-6)
    else:
        # The best attempt is as a rule the one whose rival leads most.
        logits, ranking = model(result.images).detach(), model(images).argsort(1, descending=True)
        losses = [OBJECTIVES[name].loss(logits, target, ranking[:, rank]) for rank in range(1, 5)]
        near = torch.isclose(torch.stack(losses).amax(0), result.loss, rtol=1e-5, atol=1e-6)
        assert near.sum() >= 10
    assert not torch.is_autocast_enabled("cpu")
    restored = all(p.requires_grad for p in model.parameters())
    assert restored
    assert model.training


def test_a_reference_made_in_inference_mode_is_taken():
    model, images, target = problem()
    with torch.inference_mode():
        reference = model(images)
    kept = PGD(0.1, 2, objective="kl")(model, images, target, reference=reference)
    assert_same(kept, PGD(0.1, 2, objective="kl")(model, images, target, reference=model(images)))


@pytest.mark.parametrize("precision", HALVES)
def test_the_reference_of_a_confirmation_is_in_full_precision_too(precision):
    generator = torch.Generator().manual_seed(0)
    model = Linear((20 * torch.randn(5, 18, generator=generator)).tolist())
    images = torch.rand(30, 18, generator=generator)
    target = model(images).argmax(1).detach()
    # Nothing moves, so that nothing can be less certain than it was.
    attack = PGD(0.0, 2, objective="underconfidence", precision=precision)
    assert not attack(model, images, target).success.any()


@pytest.mark.parametrize("precision", [None, *HALVES])
def test_a_lost_success_keeps_its_step(precision):
    # Targeted at the class it leaves, the second step leads back into the first class.
    model = Linear([[1.0, 0.0], [0.0, 1.0]])
    images, target = torch.tensor([[0.5, 0.25]]), torch.tensor([0])
    lead = Objective(lambda logits, target: -((logits[:, 0] - logits[:, 1]).abs()))
    attack = PGD(0.5, 2, 0.25, objective=lead, random_start=False, select="last",
                 precision=precision)  # fmt: skip
    result = attack(model, images, target)
    assert not result.success.any()
    assert result.steps_to_success.tolist() == [1]


def test_every_success_has_a_step_in_low_precision_too():
    # bfloat16 sees a tie, of which the first class is the winner; float32 sees the second ahead.
    model = Linear([[1.0, 1.0], [1.0001, 1.0001]])
    result = PGD(0.0, 1, precision="bfloat16")(
        model, torch.full((1, 2), 0.5), torch.tensor([0])
    )  # fmt: skip
    assert torch.equal(result.success, result.steps_to_success >= 0)


def test_a_confirmation_is_exact_under_autocast_too():
    model = Linear([[1.0, 1.0], [1.0001, 1.0001]])
    images, target = torch.full((1, 2), 0.5), torch.tensor([1])
    with torch.autocast("cpu", torch.bfloat16):
        result = PGD(0.0, 1, precision="bfloat16")(model, images, target)
    assert not result.success.any()
    # So is the backward pass, whose product would be 0 in bfloat16.
    assert result.diagnostics.zero_gradients.tolist() == [0]


# ---------------------------------------------------------------------------- compile


@pytest.mark.parametrize(
    ("restarts", "batch_size"),
    [
        (1, None),
        (1, 8),
        (2, 8),
        (2, 5),
        (1, 5),
    ],
)
def test_compiled_batches_shrink_by_halves(monkeypatch, restarts, batch_size):
    calls = []

    def compiler(model, **options):
        calls.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compiler)
    model, images, target = problem(21, 1)
    options = {"steps": 40, "step_size": 0.004, "stop_when_fooled": True, "restarts": restarts}
    plain = PGD(0.08, **options)(model, images, target, batch_size=batch_size)
    assert calls == []
    model.visited.clear()
    result = PGD(0.08, **options, compile=True)(model, images, target, batch_size=batch_size)
    assert calls == [{"dynamic": False}]
    assert_same(result, plain)
    widths = [len(points) for points in model.visited]
    distinct = sorted(set(widths), reverse=True)
    assert widths == sorted(widths, reverse=True)
    assert distinct[0] == (batch_size or 21)
    assert len(distinct) > 1
    width = distinct[0]
    halves = [width := width // 2 for _ in range(6)]
    assert distinct[1:] == halves[: len(distinct) - 1]


def test_compiled_model_gives_the_same_result():
    pytest.importorskip("torch._dynamo")
    from torch._dynamo.testing import CompileCounter

    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 5), nn.Tanh(), nn.Linear(5, 5))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    images = torch.rand(16, *SHAPE, generator=generator)
    target = model(images).argmax(1)
    options = {"steps": 30, "step_size": 0.005, "stop_when_fooled": True}
    plain = PGD(0.1, **options)(model, images, target)
    counter, compiler = CompileCounter(), torch.compile
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        # Without a code generator: what counts is how often a graph is captured.
        patch.setattr(
            torch, "compile", lambda f, **options: compiler(f, backend=counter, **options)
        )
        for _ in range(2):
            result = PGD(0.1, **options, compile=True)(model, images, target)
            assert torch.equal(result.success, plain.success)
            assert torch.allclose(result.images, plain.images, rtol=0, atol=1e-6)
    # Widths 16, 8, 4, 2, 1, and the last pass without gradients; nothing new in the second call.
    assert 2 <= counter.frame_count <= 6


# ---------------------------------------------------------------------------- diagnostics


def test_counts_of_the_diagnostics():
    model, images, target = problem()

    def half_blind(points):
        # Half of the entries never reach the logits.
        pixels = points.flatten(1)
        return 1e-3 * model(torch.cat([pixels[:, :9], pixels[:, 9:].detach()], 1).view_as(points))

    result = PGD(0.01, 5, restarts=3)(half_blind, images, target)
    diagnostics = result.diagnostics
    assert isinstance(diagnostics, Diagnostics)
    assert diagnostics.judged.tolist() == [18] * 4
    assert diagnostics.zero_gradients.tolist() == diagnostics.nonfinite.tolist() == [0] * 4
    assert diagnostics.zero_entries == 0.5
    assert diagnostics.saturated == 0.0
    assert not diagnostics.blind.any()
    assert repr(diagnostics) == (
        "Diagnostics(0.0% of samples blind; of the steps 0.0% without a gradient, 0.0% not "
        "finite; 0.0% of logits saturated, 50.0% of entries zero)"
    )
    sure = PGD(0.01, 5)(lambda points: 1000 * model(points), images, target)
    assert sure.diagnostics is not None
    assert sure.diagnostics.saturated > 0.5


def test_a_model_that_hides_its_gradient_is_reported():
    model, images, target = problem()

    def masked(points):
        logits = model(points)
        nothing = 0 * points.flatten(1).sum(1, keepdim=True)
        return torch.where(target[: len(points), None] % 2 == 0, logits, logits.detach() + nothing)

    target = torch.tensor([0, 1, 1, 2])
    images = images[torch.tensor([0, 1, 2, 3])]
    expected = int(((target % 2 == 1) & (model(images).argmax(1) == target)).sum())

    def always(logits, target):
        return torch.zeros(len(logits), dtype=torch.bool)

    objective = Objective(OBJECTIVES["margin"].loss, success=always)
    with pytest.warns(AttackWarning, match=re.escape(
        "the attack was probably blind for 2 of 4 samples: in at least half of their steps the "
        "gradient was zero, infinite or NaN, so that they do not count as robust; see "
        ".diagnostics, try objective='margin', or Square, which needs no gradient"
    )) as caught:  # fmt: skip
        result = PGD(0.1, 5, objective=objective)(masked, images, target)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert expected <= 2
    assert result.diagnostics is not None
    assert result.diagnostics.zero_gradients.tolist() == [0, 5, 5, 0]
    assert result.diagnostics.blind.tolist() == [False, True, True, False]
    # Gradients that are all zero have a count of their own.
    assert result.diagnostics.zero_entries == 0.0
    assert "50.0% of samples blind; of the steps 50.0% without" in repr(result.diagnostics)


def test_a_gradient_outside_the_mask_is_no_direction():
    mask = torch.tensor([[[True]], [[False]]])
    images = torch.full((3, 2, 2, 2), 0.5)

    def model(images):
        second = images[:, 1].flatten(1).sum(1)
        return torch.stack([second, -second], 1)

    with pytest.warns(AttackWarning, match="probably blind for 3 of 3 samples"):
        result = PGD(0.1, 4)(model, images, torch.zeros(3).long(), mask=mask)
    assert result.diagnostics.zero_gradients.tolist() == [4, 4, 4]
    # What a backward pass lost is another matter: half of the entries.
    assert result.diagnostics.zero_entries == 0.5


def test_warnings_name_the_line_of_the_user():
    images, target = torch.full((2, 3), 0.5), torch.zeros(2).long()

    def model(images):
        return images.softmax(1)

    for attack in (
        PGD(0.1, 1),
        lambda *call: pgd(*call, steps=1, restarts=2),
        WorstCase([PGD(0.1, 1)]),
    ):
        with pytest.warns(AttackWarning, match="probabilities") as caught:
            attack(model, images, target)
        assert {warning.filename for warning in caught} == {__file__}


def test_no_success_is_called_blind():
    # The gradient vanishes behind the boundary, where nothing is left to do.
    def model(points):
        lead = (points[:, :1] - 0.5).clamp(max=0.0) + 1e-3
        return torch.cat([torch.zeros_like(lead), lead], 1)

    images, target = torch.full((2, 2), 0.45, dtype=torch.float64), torch.tensor([0, 0])
    result = PGD(0.1, 10, 0.06, random_start=False)(model, images, target)
    assert result.steps_to_success.tolist() == [1, 1]
    assert result.diagnostics is not None
    assert result.diagnostics.zero_gradients.tolist() == [0, 0]


@pytest.mark.parametrize("fault", ["nan loss", "nan gradient", "inf loss"])
def test_numbers_that_are_none_are_reported(fault):
    model, images, target = problem()

    def broken(points):
        logits = model(points)
        if fault == "nan loss":
            return logits * NAN
        if fault == "nan gradient":
            return logits + 0 * (points - points.detach()).flatten(1).sum(1, keepdim=True).sqrt()
        return torch.cat([logits[:, :1] * 0 + INF, logits[:, 1:]], 1)

    # Not the class that argmax finds in a row of NaN, or such a row would be no success anyway.
    target = torch.full_like(target, 0 if fault == "inf loss" else 1)
    objective = "margin" if fault == "inf loss" else "ce"
    if fault == "nan gradient":
        target = own_class(model, images)
    with pytest.warns(AttackWarning, match="blind for 4 of 4 samples"):
        result = PGD(1e-3, 4, objective=objective)(broken, images, target)
    assert result.diagnostics is not None
    assert result.diagnostics.nonfinite.tolist() == [4] * 4
    assert not result.success.any()
    assert bool(result.images.isfinite().all())


@pytest.mark.parametrize("steps", [2, 4])
def test_half_of_the_steps_is_at_least_half(steps):
    slopes = [[1.0, 1.0], [0.0, 0.0]] * 3
    attack = PGD(1e-3, steps, objective="margin", random_start=False)
    with pytest.warns(AttackWarning, match="blind"):
        attack(Slopes(slopes), torch.full((1, 2), 0.5, dtype=torch.float64), torch.tensor([0]))


@quietly
def test_diagnostics_do_not_depend_on_the_batch():
    model, images, target = problem(9, 5)

    def broken(points):
        return torch.where(points.flatten(1)[:, :1] > 0.5, torch.nan, model(points))

    attack = PGD(0.1, 6, momentum=0.9, stop_when_fooled=True)
    whole = attack(broken, images, target).diagnostics
    parts = attack(broken, images, target, batch_size=3).diagnostics
    assert torch.equal(whole.judged, parts.judged)
    assert torch.equal(whole.zero_gradients, parts.zero_gradients)
    assert torch.equal(whole.nonfinite, parts.nonfinite)


def test_waiting_in_the_batch_is_no_work():
    # Rows that are done stay until they are an eighth of the batch.
    model, images, target = problem(40, 5)
    attack = PGD(0.06, 15, 0.01, momentum=0.5, stop_when_fooled=True)
    one = attack(model, images, target, batch_size=1)
    assert len(set(one.steps_to_success.tolist())) > 5
    assert one.diagnostics is not None
    for batch_size in (20, 40):
        result = attack(model, images, target, batch_size=batch_size)
        assert_same(result, one)
        assert result.diagnostics is not None
        assert bool((result.diagnostics.judged >= one.diagnostics.judged).all())
        assert result.diagnostics.judged.max() <= 16
        unbroken = ~result.success
        assert result.diagnostics.judged[unbroken].tolist() == [16] * int(unbroken.sum())
        assert not result.diagnostics.zero_gradients.any()


# ---------------------------------------------------------------------------- warnings


@pytest.mark.parametrize("attack_type", [PGD, APGD])
def test_probabilities_are_warned_about(attack_type):
    model, images, target = problem()
    expected = (
        "model: expected logits, got rows in [0, 1] that add up to 1, like probabilities; return "
        "the logits: after a softmax gradients vanish and the attack is weak"
    )
    with pytest.warns(AttackWarning, match=re.escape(expected)) as caught:
        attack_type(0.01, 2)(lambda points: model(points).softmax(1), images, target)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    # Neither rows that add up to 1 nor rows in [0, 1] alone: warnings are errors here.
    attack_type(0.01, 2)(lambda x: model(x) - model(x).mean(1, keepdim=True) + 0.2, images, target)
    attack_type(0.01, 2)(lambda points: model(points).sigmoid(), images, target)


def test_targets_that_are_predicted_already_are_warned_about():
    model, images, target = problem()
    target[1] = (target[1] + 1) % 5
    expected = (
        "target: expected classes that the model does not predict, got 3 of 4 that it predicts "
        "before the first step; their success is not the attack's doing; pass the wanted, not the "
        "true classes"
    )
    with pytest.warns(AttackWarning, match=re.escape(expected)) as caught:
        PGD(1e-3, 2, targeted=True)(model, images, target)
    assert len(caught) == 1
    PGD(1e-3, 2, targeted=True)(model, images, model(images).argmin(1))
    # Untargeted, a wrong label is a success at step 0, and nothing to warn about.
    result = PGD(1e-3, 2)(model, images, model(images).argmin(1))
    assert result.steps_to_success.tolist() == [0] * 4


def test_a_good_attack_says_nothing():
    model, images, target = problem()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for norm in ("linf", "l2"):
            for options in ({}, {"stop_when_fooled": True}, {"restarts": 2}, {"steps": 0}):
                for attack_type in (PGD, APGD):
                    attack_type(0.01, norm=norm, **{"steps": 5, **options})(model, images, target)
    assert caught == []


# ---------------------------------------------------------------------------- progress


@pytest.fixture
def bars(monkeypatch):
    """Bars that record what they are told, in place of tqdm's."""
    made = []

    class Bar:
        def __init__(self, **options):
            self.options, self.updates, self.closed = options, [], False
            made.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.closed = True

        def update(self, count):
            self.updates.append(count)

    tqdm = pytest.importorskip("tqdm.auto")
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    return made


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_progress_ends_at_the_total(bars, stop, batch_size):
    model, images, target = problem()
    attack = PGD(0.3, 10, restarts=5, stop_when_fooled=stop)
    expected = attack(model, images, target)
    assert bars == []
    assert_same(attack(model, images, target, progress=True, batch_size=batch_size), expected)
    (bar,) = bars
    assert bar.options == {"total": 20, "desc": "PGD", "unit": "image"}
    assert sum(bar.updates) == 20
    assert len(bar.updates) > 1
    assert bar.closed


def test_progress_is_closed_when_the_model_fails(bars):
    def model(points):
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        PGD(0.1)(model, some_images(), torch.zeros(4).long(), progress=True)
    assert bars[0].closed


def test_progress_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    model, images, target = problem()
    with pytest.raises(ImportError, match="progress=True needs tqdm; pip install tqdm"):
        PGD(0.1)(model, images, target, progress=True)


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": 1.5}, ValueError, "eps: expected a number >= 0 and <= 1, the width of bounds, got "
         "1.5; 8 of 255 levels are eps=8/255"),
        ({"eps": 8, "bounds": (-1.0, 2.5)}, ValueError, "<= 3.5, the width of bounds, got 8"),
        ({"schedule": "poly"}, ValueError,
         "schedule: expected one of 'constant', 'linear', 'cosine', got 'poly'"),
        ({"schedule": ["linear"]}, ValueError, r"schedule: .*, got \['linear'\]"),
        ({"momentum": -1}, ValueError, "momentum: expected a number >= 0, got -1"),
        ({"momentum": "0"}, TypeError, "momentum: expected a number >= 0, got str '0'"),
        ({"n_rivals": 0}, ValueError, "n_rivals: expected an integer >= 1, got 0"),
        ({"n_rivals": 1.0}, TypeError, "n_rivals: expected an integer >= 1, got float 1.0"),
        ({"precision": "float32"}, ValueError,
         "precision: expected one of 'bfloat16', 'float16', got 'float32'"),
        ({"random_start": 1}, TypeError, "random_start: expected True or False, got int 1"),
        ({"stop_when_fooled": 0}, TypeError, "stop_when_fooled: expected True or False, got int 0"),
        ({"targeted": None}, TypeError, "targeted: expected True or False, got NoneType None"),
        ({"compile": "yes"}, TypeError, "compile: expected True or False, got str 'yes'"),
        ({"bounds": (0.0, 1.0, 2.0)}, TypeError, r"bounds: expected a tuple \(low, high\), got"),
        *(
            ({"targeted": True, "objective": name}, ValueError,
             f"targeted: expected False with objective '{name}', which moves towards no class, got "
             "True; use 'ce', 'margin' or 'dlr'")
            for name in ("kl", "bce", "embedding-l2", "dlr-targeted", "underconfidence")
        ),
    ],
)  # fmt: skip
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        PGD(**{"eps": 0.1, **options})


def test_a_ball_of_l2_may_be_wider_than_the_box():
    model, images, target = problem()
    result = PGD(3.0, 2, norm="l2")(model, images, target)
    assert bool(((result.images - images).flatten(1).norm(dim=1) <= 3.0).all())


CLASS, MULTI = torch.zeros(4).long(), torch.zeros(4, 5)
BAD_CALLS = [
    ({"eps": 0.1}, TypeError, r"eps: expected a floating-point tensor of shape \(4,\), one radius "
     "per image, got float 0.1"),
    ({"eps": torch.ones(4).long()}, TypeError, r"eps: .* got int64 tensor .*; call eps.float\(\)"),
    ({"eps": torch.ones(3)}, ValueError,
     r"eps: expected one radius per image, shape \(4,\), got float32 tensor of shape \(3,\)"),
    ({"eps": torch.ones(4, 1)}, ValueError, r"eps: .* shape \(4,\), got .* of shape \(4, 1\)"),
    ({"eps": torch.tensor([0.1, -0.5, 0.1, 0.1])}, ValueError,
     "eps: expected numbers >= 0, got -0.5 among them"),
    ({"eps": torch.tensor([0.1, NAN, 0.1, 0.1])}, ValueError, "eps: .* >= 0, got nan among them"),
    ({"eps": torch.tensor([0.1, INF, 0.1, 0.1])}, ValueError, "eps: .* >= 0, got inf among them"),
    ({"eps": torch.tensor([0.1, 8.0, 0.1, 0.1])}, ValueError, "eps: expected numbers >= 0 and "
     "<= 1, the width of bounds, got 8 among them; 8 of 255 levels are eps=8/255"),
    ({"mask": torch.ones(SHAPE)}, TypeError, r"mask: expected a bool tensor that broadcasts to "
     r"\(4, 2, 3, 3\), got float32 tensor of shape \(2, 3, 3\)"),
    ({"mask": True}, TypeError, "mask: expected a bool tensor .*, got bool True"),
    ({"mask": torch.ones(2, 3, 4) > 0}, ValueError, r"mask: .*, got bool tensor of .*\(2, 3, 4\)"),
    ({"mask": torch.ones(SHAPE, device="meta") > 0}, ValueError,
     "mask: expected the device of images, cpu, got meta; move one of the two"),
    ({"start": torch.ones(3, *SHAPE)}, ValueError,
     r"start: expected the shape of images, \(4, 2, 3, 3\), got \(3, 2, 3, 3\)"),
    ({"start": torch.ones(4, *SHAPE).long()}, TypeError, r"start: .*; call start.float\(\)"),
    ({"start": 0.5}, TypeError, "start: expected a floating-point tensor .*, got float 0.5"),
    ({"start": torch.ones(4, *SHAPE, device="meta")}, ValueError,
     "start: expected the device of images, cpu, got meta"),
    ({"reference": [1]}, TypeError, r"reference: expected a tensor with 4 rows, got list \[1\]"),
    ({"reference": torch.ones(3, 5)}, ValueError,
     r"reference: expected a tensor with 4 rows, got float32 tensor of shape \(3, 5\)"),
    ({"reference": torch.tensor(1.0)}, ValueError, r"reference: .* with 4 rows, got .* shape \(\)"),
    ({"reference": torch.ones(4, 5, device="meta")}, ValueError,
     "reference: expected the device of images, cpu, got meta"),
    ({"reference": torch.ones(4, 6), "objective": "kl"}, ValueError,
     r"reference: expected the shape of logits, \(4, 5\), got \(4, 6\)"),
    ({"reference": torch.ones(4, 6), "objective": "embedding-l2", "target": None}, ValueError,
     r"reference: expected the shape of features, \(4, 5\), got \(4, 6\)"),
    ({"reference": torch.ones(4, 5)}, ValueError, "reference: expected None with objective 'ce', "
     "which compares with nothing, got float32 tensor .*; remove it, or use 'kl'"),
    ({"reference": torch.ones(4, 5), "objective": "dlr-targeted"}, ValueError,
     "reference: expected None with objective 'dlr-targeted'"),
    ({"objective": Objective(margin, lambda z, y: z.argmax(1))}, TypeError,
     r"objective: expected a success of shape \(4,\), bool, got int64 tensor of shape \(4,\)"),
    ({"objective": Objective(margin, lambda z, y: z > 0)}, ValueError,
     r"objective: expected a success of shape \(4,\), bool, got bool tensor of shape \(4, 5\)"),
    ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
    ({"batch_size": 2.0}, TypeError, "batch_size: expected an integer >= 1, got float 2.0"),
    ({"progress": 1}, TypeError, "progress: expected True or False, got int 1"),
    ({"target": None}, TypeError, r"target: expected .* of shape \(4,\), got NoneType None"),
    ({"target": CLASS + 5}, ValueError, r"target: expected class indices in \[0, 4\], got 5"),
    ({"target": CLASS.to("meta")}, ValueError, "target: expected a tensor on cpu, got one on meta"),
    ({"target": CLASS - 1, "objective": lambda z, y: z[:, 0]}, ValueError,
     r"target: expected class indices in \[0, 4\], got -1"),
    ({"target": CLASS, "objective": "bce"}, ValueError, "target: expected a tensor of 0 and 1 .*; "
     "one-hot class indices, or use an objective for classes"),
    ({"target": MULTI[:, :3], "objective": "bce"}, ValueError,
     r"target: expected a tensor of 0 and 1 of shape \(4, 5\), .*, got .* \(4, 3\)"),
    ({"target": MULTI + 0.5, "objective": "bce"}, ValueError,
     "target: expected 0 or 1 for each class, got 0.5"),
    ({"target": None, "objective": "bce"}, TypeError, "target: expected a tensor of 0 and 1"),
    ({"target": MULTI[:3], "objective": lambda z, y: z[:, 0]}, ValueError,
     r"target: expected a tensor with 4 rows, or None, got float32 tensor of shape \(3, 5\)"),
    ({"target": MULTI.to("meta"), "objective": lambda z, y: z[:, 0]}, ValueError,
     "target: expected a tensor on cpu, got one on meta"),
    ({"objective": lambda z, y: z[:, 0].detach()}, ValueError,
     "objective: expected a loss that depends on the logits through autograd, got one without a "
     "gradient"),
    ({"objective": lambda z, y: torch.ones(4, requires_grad=True)}, ValueError,
     "objective: expected a loss that depends on the logits through autograd"),
    ({"objective": lambda z, y: z}, ValueError, r"objective: expected a tensor of shape \(4,\), "
     r"got float64 tensor of shape \(4, 5\); return one value per sample"),
    ({"model": None}, TypeError, "model: expected a callable from images to logits, got None"),
    ({"model": lambda x: [x]}, TypeError, "model: .* B = 4, got list; return the logits only"),
    ({"model": lambda x: x.flatten(1)[:2]}, ValueError, r"model: .* with B = 4, got .* \(2, 18\)"),
    ({"generator": 1}, TypeError, "generator: expected a torch.Generator or None, got int 1"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS)
@pytest.mark.parametrize("attack_type", [PGD, APGD])
def test_bad_arguments(attack_type, arguments, error, message):
    call = {"model": RowWise(), "images": some_images(), "target": CLASS, **arguments}
    attack = attack_type(0.1, 2, objective=call.pop("objective", "ce"))
    with pytest.raises(error, match=message):
        attack(**call)


@pytest.mark.parametrize("name", ["kl", "dirichlet-kl", "embedding-l2", "underconfidence"])
def test_the_clean_image_is_no_start_for_a_distance_from_it(name):
    model, images, target = problem()
    attack = PGD(0.1, 2, objective=name, random_start=False)
    expected = (
        f"random_start: expected True with objective '{name}', unless reference is set, or start "
        "with restarts=1, got False"
    )
    with pytest.raises(ValueError, match=expected):
        attack(model, images, target)
    with pytest.raises(ValueError, match=expected):
        pgd(model, images, target, objective=name, random_start=False)
    start = images + 0.01 * (0.5 - images).sign()
    attack(model, images, target, start=start)
    with pytest.raises(ValueError, match=expected):
        replace(attack, restarts=2)(model, images, target, start=start)
    attack(model, images, target, reference=RowWise(5)(images))


def test_the_model_is_restored_after_an_error_in_the_arguments():
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 5)).double()
    images, target = some_images(), CLASS
    with pytest.raises(ValueError, match="batch_size"):
        PGD(0.1)(model, images, target, batch_size=0)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("attack_type", [PGD, APGD])
def test_empty_batches(attack_type):
    nothing, model = some_images(0), RowWise()
    for name, target in (("ce", CLASS[:0]), ("bce", MULTI[:0]), ("embedding-l2", None)):
        attack = attack_type(0.1, 2, objective=name)
        options = {"start": nothing, "mask": torch.ones(SHAPE) > 0, "batch_size": 3}
        result = attack(model, nothing, target, **options)
        assert result.images.shape == nothing.shape
        assert (result.n_forward, result.n_backward) == (0, 0)
        assert result.diagnostics is not None
        assert repr(result.diagnostics).startswith("Diagnostics(0.0% of samples blind")
    assert model.visited == []


def test_an_empty_batch_has_no_radii():
    result = PGD(0.1)(RowWise(), some_images(0), CLASS[:0], eps=torch.zeros(0))
    assert result.images.shape == some_images(0).shape


@quietly
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_start_that_is_not_a_number_does_not_get_through(norm):
    model, images, target = problem()
    try:
        result = PGD(0.1, 2, norm=norm)(model, images, target, start=images * NAN)
    except ValueError:
        return
    assert bool(result.images.isfinite().all())


def test_momentum_on_a_large_image_in_half_precision():
    # 3 * 160 * 160 gradients of equal size sum to more than float16 holds.
    images = torch.full((1, 3, 160, 160), 0.5, dtype=torch.float16)
    result = PGD(0.1, 2, 0.05, momentum=0.9, random_start=False)(
        lambda x: torch.stack([-x.float().flatten(1).mean(1), x.float().flatten(1).mean(1)], 1),
        images,
        torch.zeros(1, dtype=torch.int64),
    )
    assert float((result.images - images).abs().min()) > 0.04
