"""Auto-PGD against a plain loop, against torchattacks, and against runs worked out by hand."""

import pickle

import numpy as np
import pytest
import torch
from attack_oracles import (
    SHAPE,
    RowWise,
    assert_same,
    evaluator,
    loss_and_slope,
    own_class,
    plain_apgd,
    project,
    some_images,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from calibclip.attacks import APGD
from calibclip.attacks.apgd import checkpoints
from calibclip.attacks.threat import add_inward

NAN, INF = float("nan"), float("inf")


def run(attack, model, images, target, **options):
    """The result and the visited points, shape (passes, B, ...)."""
    model.visited.clear()
    result = attack(model, images, target, **options)
    return result, torch.stack(model.visited)


# ---------------------------------------------------------------------------- the plain loop

STEPS = [0, 1, 2, 3, 7, 10, 33, 100]


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("objective", ["ce", "dlr", "margin"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.04), ("linf", 0.15), ("l2", 0.3)])
def test_trajectory_matches_a_plain_loop(norm, eps, objective, compat):
    model, images, start = RowWise(), some_images(4), some_images(4, seed=9)
    target = own_class(model, images)
    radius = eps * torch.tensor([1.0, 0.7, 1.3, 1.0], dtype=torch.float64)
    halved = 0
    for steps in STEPS:
        attack = APGD(eps, steps, norm, objective, compat=compat)
        result, visited = run(attack, model, images, target, start=start, eps=radius)
        assert (result.n_forward, result.n_backward) == (steps + 1, steps)
        for i, clean in enumerate(images.numpy()):
            evaluate = evaluator(model, objective, int(target[i]))
            first = project(start[i].numpy(), clean, float(radius[i]), norm)
            points, _, halvings = plain_apgd(
                evaluate, clean, first, float(radius[i]), steps, norm, compat
            )
            halved += len(halvings)
            np.testing.assert_allclose(visited[:, i].numpy(), points, rtol=0, atol=1e-9)
            # What is returned is the best of these points.
            losses = np.array([evaluate(point)[0] for point in points])
            fooled = np.array([model.one(point)[0].argmax() != target[i] for point in points])
            pool = losses[fooled] if fooled.any() else losses
            np.testing.assert_allclose(result.loss[i], pool.max(), rtol=1e-9)
            assert result.success[i] == fooled.any()
            assert result.steps_to_success[i] == (fooled.argmax() if fooled.any() else -1)
    assert halved > 50


def test_the_quirk_of_the_official_code_changes_trajectories():
    model, images = RowWise(), some_images(8)
    target = own_class(model, images)
    plain, quirk = (
        run(APGD(0.05, 9, objective="dlr", compat=compat), model, images, target)[1]
        for compat in (False, True)
    )
    same = (plain == quirk).flatten(2).all(2)
    # The first window is one step, so the first point that can differ is that of step 2.
    assert bool(same[:2].all())
    assert not bool(same[2].all())


@pytest.mark.parametrize("objective", ["ce", "dlr", "margin"])
def test_targeted_trajectory(objective):
    model, images, start = RowWise(), some_images(4), some_images(4, seed=9)
    target = model(images).argmin(1)
    for steps in (3, 33):
        attack = APGD(0.1, steps, "l2", objective, targeted=True)
        result, visited = run(attack, model, images, target, start=start)
        for i, clean in enumerate(images.numpy()):
            evaluate = evaluator(model, objective, int(target[i]), targeted=True)
            first = project(start[i].numpy(), clean, 0.1, "l2")
            points, *_ = plain_apgd(evaluate, clean, first, 0.1, steps, "l2")
            np.testing.assert_allclose(visited[:, i].numpy(), points, rtol=0, atol=1e-9)
        assert torch.equal(result.success, model(result.images).argmax(1) == target)


def test_targeted_reaches_the_wanted_class():
    # Independent classes: logit k is pixel k, so any class can be made the largest.
    images, target = 0.5 + 0.01 * torch.arange(12.0).view(3, 4), torch.tensor([0, 1, 2])
    for objective in ("ce", "margin", "dlr"):
        attack = APGD(0.1, 20, objective=objective, targeted=True)
        result = attack(lambda x: 10 * x, images, target)
        assert result.success.all()
        assert torch.equal(result.images.argmax(1), target)


# ---------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (50, [11, 21, 30, 38, 45]),
        (10, [2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (3, [1, 2, 3]),
        (1, [1]),
        (0, []),
    ],
)
def test_checkpoints(steps, expected):
    table = checkpoints(steps)
    assert list(table) == expected
    assert list(table.values()) == np.diff([0, *expected]).tolist()


class Scripted:
    """At call ``k`` the margin is ``losses[k]`` and its gradient ``slopes[k]``, for one image."""

    def __init__(self, losses, slopes):
        self.losses, self.slopes = losses, torch.as_tensor(np.asarray(slopes))
        self.visited = []

    def __call__(self, points):
        k = len(self.visited)
        self.visited.append(points.detach().clone())
        moved = points - points.detach()
        # Term by term, so that an infinite slope times a zero does not spoil the value.
        lead = _Line.apply(moved, self.slopes[k]).view(1, 1) + self.losses[k]
        # Through the true class, as a maximum hands no gradient on through -infinity.
        return torch.cat([7 - lead, torch.full_like(lead, 7.0)], 1)


class _Line(torch.autograd.Function):
    """Zero, with a given gradient."""

    @staticmethod
    def forward(ctx, moved, slope):
        ctx.save_for_backward(slope)
        return moved.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).unsqueeze(0), None


def run_script(losses, slopes, clean, start, eps, norm="linf", **options):
    """Points visited by APGD and by the plain loop on a script, and where the latter halved."""
    model = Scripted(losses, slopes)
    steps = len(losses) - 1
    attack = APGD(eps, steps, norm, "margin", **options)
    image, first = (torch.tensor([point], dtype=torch.float64) for point in (clean, start))
    result = attack(model, image, torch.tensor([0]), start=first)
    visited = torch.cat(model.visited).numpy()
    script = iter(zip(losses, np.asarray(slopes), strict=True))
    points, _, halvings = plain_apgd(
        lambda point: next(script), np.array(clean), np.array(start), eps, steps, norm,
        attack.compat,
    )  # fmt: skip
    return result, visited, np.stack(points), halvings


quietly = pytest.mark.filterwarnings("ignore::calibclip.attacks.result.AttackWarning")


@quietly
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 3, 5, 10, 19, 23, 27, 40]),
    st.sampled_from(["rising", "levels", "broken"]),
    st.sampled_from(["linf", "l2"]),
    st.booleans(),
)
def test_any_sequence_of_losses_and_gradients(seed, steps, kind, norm, compat):
    generator = np.random.default_rng(seed)
    jumps = generator.choice([0.25, 0.25, 0.25, 0.25, 0.0, -0.5], steps + 1)
    losses = generator.integers(-2, 3) + np.cumsum(jumps)
    if kind != "rising":
        losses = generator.integers(-3, 4, steps + 1).astype(float)
    slopes = generator.normal(size=(steps + 1, 3)) * 10.0 ** generator.integers(-9, 9, 3)
    if kind == "broken":
        faults = generator.random(steps + 1)
        losses[faults < 0.2] = generator.choice([NAN, INF, -INF])
        slopes[generator.random((steps + 1, 3)) < 0.1] = generator.choice([NAN, INF, 0.0])
    clean, start = generator.uniform(0.2, 0.8, (2, 3))
    start = project(start, clean, 0.3, norm)
    result, visited, points, _ = run_script(
        losses.tolist(), slopes, clean.tolist(), start.tolist(), 0.3, norm, compat=compat
    )
    np.testing.assert_allclose(visited, points, rtol=0, atol=1e-9)
    assert bool(result.images.isfinite().all())
    if not np.isnan(losses).all():
        usable = losses[~np.isnan(losses)]
        assert result.loss.item() == usable.max()
    assert result.success.item() == bool((losses > 0).any())


def test_halving_return_to_best_and_momentum_by_hand():
    # One pixel, checkpoints at 2, 3, 4, ... Step 2 is worse: half the step, back to the point of
    # step 1 and its gradient; the point before stays that of step 1, so that nothing is carried on.
    losses, slopes = [1.0, 2.0, 0.0, 3.0, 4.0] + [5.0] * 6, [[1.0], [-1.0], [1.0], [1.0]]
    slopes += [[1.0]] * 7
    _, visited, points, halvings = run_script(losses, slopes, [0.5], [0.5], 0.4)
    expected = [
        0.5,
        0.9,  # 0.5 + 0.8, clipped
        0.9 + 0.75 * (0.1 - 0.9) + 0.25 * (0.9 - 0.5),
        0.9 + 0.75 * (0.5 - 0.9) + 0.25 * (0.9 - 0.9),
        # At the checkpoint after one step the loss had risen and the step just been halved.
        0.6 + 0.75 * (0.9 - 0.6) + 0.25 * (0.6 - 0.9),
    ]
    np.testing.assert_allclose(visited[:5, 0], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(points[:5, 0], expected, rtol=0, atol=1e-12)
    assert halvings[:2] == [2, 6]


@pytest.mark.parametrize(
    ("losses", "compat", "halvings"),
    [
        # Checkpoints of 23 steps: 5, 9, 12, 14, 15, ... Steady progress: nothing is halved.
        (range(24), False, []),
        # The start was best of all. At the first checkpoint that is no reason to halve, at the
        # second it is, and never twice in a row.
        ([50, *range(23)], False, [9, 14, 16, 18, 20, 22]),
        # The first comparison is with 0 instead of the start; 5 rises of 5 instead of 4.
        ([50, *range(1, 24)], True, [9, 14, 16, 18, 20, 22]),
        # 3 rises of 5 in the first window, 4 as the official code counts.
        ([50, 20, 10, 11, 12, 13, *range(60, 78)], False, [5]),
        ([50, 20, 10, 11, 12, 13, *range(60, 78)], True, []),
        # 4 of 5, and 3 as the official code counts: the loss of step 1 is not above 0.
        ([-50, -10, -20, -15, -14, -13, *range(60, 78)], False, []),
        ([-50, -10, -20, -15, -14, -13, *range(60, 78)], True, [5]),
        # Exactly 75 % of the second window, steps 6 to 9, is too little.
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 7, *range(60, 74)], False, [9]),
        # Nothing ever rises.
        (range(0, -24, -1), False, [5, 9, 12, *range(14, 24)]),
    ],
)
def test_checks_by_hand(losses, compat, halvings):
    losses = [float(loss) for loss in losses]
    slopes = np.random.default_rng(3).normal(size=(24, 2))
    _, visited, points, found = run_script(
        losses, slopes, [0.5, 0.4], [0.4, 0.5], 0.4, "l2", compat=compat
    )
    assert found == halvings
    np.testing.assert_allclose(visited, points, rtol=0, atol=1e-9)


@quietly
def test_broken_losses():
    # All NaN: there is no best point, and the result is one that was visited.
    result, visited, *_ = run_script([NAN] * 8, np.ones((8, 1)), [0.5], [0.3], 0.4)
    assert result.loss.isnan().all()
    assert not result.success.any()
    assert result.images.numpy() in visited
    assert result.diagnostics is not None
    assert result.diagnostics.nonfinite.item() == 7
    # A number anywhere beats NaN, and NaN is no success.
    result, visited, *_ = run_script([NAN, NAN, -3.0, NAN], np.ones((4, 1)), [0.5], [0.3], 0.4)
    assert (result.loss.item(), result.success.item()) == (-3.0, False)
    assert result.images.numpy() == visited[2]


# ---------------------------------------------------------------------------- starts and restarts


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_lie_on_the_surface(norm):
    model, images = RowWise(), some_images(6, low=0.3, high=0.7)
    target = own_class(model, images)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, 1:] = True
    for options in ({}, {"mask": mask}):
        _, visited = run(
            APGD(0.1, 0, norm, restarts=3), model, images, target, batch_size=6, **options
        )
        offsets = (visited - images).flatten(2)
        length = offsets.abs().amax(2) if norm == "linf" else offsets.norm(dim=2)
        np.testing.assert_allclose(length, 0.1, rtol=1e-12)
        assert len(torch.unique(offsets.view(18, -1), dim=0)) == 18
        moving = offsets[..., mask.flatten()] if options else offsets
        if norm == "linf":
            # Uniform but for one entry, and not in a corner of the box.
            share = (moving.abs() / 0.1).flatten()
            assert 0.4 < share.mean() < 0.7
            assert ((share > 0.45) & (share < 0.55)).any()
            assert (share == 1).sum() < 60
        if options:
            assert bool((offsets[..., ~mask.flatten()] == 0).all())
        assert 0.3 < (moving > 0).double().mean() < 0.7


def test_seed_and_restart_decide_the_start():
    model, images = RowWise(), some_images()
    target = own_class(model, images)
    runs = [run(APGD(0.1, 2, seed=seed), model, images, target)[1] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert bool((runs[0][0] != runs[2][0]).flatten(1).any(1).all())
    _, both = run(APGD(0.1, 2, restarts=2), model, images, target)
    assert torch.equal(both[:3], runs[0])
    assert bool((both[0] != both[3]).flatten(1).any(1).all())


def test_a_given_start_is_for_the_first_restart_only():
    model, images, start = RowWise(), some_images(), some_images(seed=9)
    target = own_class(model, images)
    _, given = run(APGD(0.1, 1, restarts=2), model, images, target, start=start)
    _, drawn = run(APGD(0.1, 1, restarts=2), model, images, target)
    inside = [project(a, b, 0.1, "linf") for a, b in zip(start.numpy(), images.numpy())]  # noqa: B905
    np.testing.assert_allclose(given[0], np.stack(inside), rtol=0, atol=1e-12)
    assert torch.equal(given[2:], drawn[2:])


def test_the_best_restart_is_kept():
    model, images = RowWise(19), some_images(6, seed=19)
    target = own_class(model, images)
    result, visited = run(APGD(0.2, 5, restarts=4), model, images, target)
    assert (result.n_forward, result.n_backward) == (24, 20)
    losses = nn.functional.cross_entropy(
        model(visited.flatten(0, 1)), target.repeat(24), reduction="none"
    ).view(24, 6)
    fooled = (model(visited.flatten(0, 1)).argmax(1) != target.repeat(24)).view(24, 6)
    best = losses.masked_fill(~fooled & fooled.any(0), -torch.inf).max(0)
    assert torch.allclose(result.loss, best.values, rtol=1e-12)
    assert torch.equal(result.images, visited[best.indices, torch.arange(6)])
    assert len(set((best.indices // 6).tolist())) > 1


# ---------------------------------------------------------------------------- rows side by side


# With seeds of model and images for which the attack takes many different numbers of steps.
ATTACKS = [
    (23, APGD(0.1, 20, stop_when_fooled=True)),
    (16, APGD(0.3, 20, "l2", "dlr", stop_when_fooled=True, compat=True, restarts=2)),
    (11, APGD(0.1, 12, objective="dlr-targeted", stop_when_fooled=True, n_rivals=3, restarts=2)),
    (16, APGD(0.3, 12, "l2", "margin", stop_when_fooled=True, select="last")),
    (15, APGD(0.3, 10, stop_when_fooled=True, select="first_success", targeted=True)),
    (11, APGD(0.06, 10, objective="dlr-targeted", n_rivals=2)),
    (11, APGD(0.06, 10, restarts=2, select="first_success")),
]


@pytest.mark.filterwarnings("ignore:target:calibclip.attacks.result.AttackWarning")
@pytest.mark.parametrize(("seed", "attack"), ATTACKS, ids=range(len(ATTACKS)))
def test_rows_of_different_ages_do_not_disturb_each_other(seed, attack):
    model, images = RowWise(seed), some_images(11, seed)
    ranking = model(images).argsort(1, descending=True)
    # One is a success from the start.
    ranking[3] = ranking[3].flip(0) if not attack.targeted else ranking[3].roll(1)
    target = ranking[:, 1 if attack.targeted else 0]
    radius = attack.eps * torch.linspace(0.0, 1.5, 11, dtype=torch.float64)
    alone = [
        attack(model, images[i : i + 1], target[i : i + 1], eps=radius[i : i + 1])
        for i in range(11)
    ]
    if attack.stop_when_fooled:
        lives = {result.steps_to_success.item() for result in alone}
        assert {-1, 0} < lives
        assert len(lives) >= 5
    order = torch.from_numpy(np.random.default_rng(0).permutation(11))
    for batch_size in (1, 2, 3, 5, 8, 11, 64):
        whole = attack(model, images, target, eps=radius, batch_size=batch_size)
        widths = [len(points) for points in model.visited]
        assert max(widths[-whole.n_forward :]) <= batch_size
        shuffled = attack(
            model, images[order], target[order], eps=radius[order], batch_size=batch_size
        )
        for i, one in enumerate(alone):
            assert_same(one, whole, slice(i, i + 1))
        assert_same(shuffled, whole, order)


@pytest.mark.parametrize(
    ("objective", "eps", "seed"), [("ce", 0.04, 20), ("dlr-targeted", 0.05, 5)]
)
@pytest.mark.parametrize("batch_size", [7, 14, 3])
def test_stopping_equals_one_attempt_after_the_other(objective, eps, seed, batch_size):
    model, images = RowWise(seed), some_images(7, seed)
    target = own_class(model, images)
    options = {"steps": 6, "objective": objective, "restarts": 3, "n_rivals": 2}
    full, visited = run(APGD(eps, **options), model, images, target)
    attempts = 6 if objective == "dlr-targeted" else 3
    runs = visited[-attempts * 7 :].unflatten(0, (attempts, 7))
    fooled = (model(runs.flatten(0, 2)).argmax(1) != target.repeat(attempts * 7)).view(-1, 7, 7)
    attack = APGD(eps, **options, stop_when_fooled=True)
    result = attack(model, images, target, batch_size=batch_size)
    assert torch.equal(result.success, full.success)
    assert 0 < result.success.sum() < 7
    winners = set()
    for i in range(7):
        if fooled[:, :, i].any():
            attempt = int(fooled[:, :, i].any(1).byte().argmax())
            step = int(fooled[attempt, :, i].byte().argmax())
            winners.add(attempt)
            assert torch.equal(result.images[i], runs[attempt, step, i])
            assert result.steps_to_success[i] == step
        else:
            assert torch.equal(result.images[i], full.images[i])
            assert result.steps_to_success[i] == -1
    assert len(winners) > 1
    assert result.forward_images < full.forward_images


# ---------------------------------------------------------------------------- APGD-T


def test_rivals_are_the_classes_ranked_next_on_the_clean_image():
    model, images, start = RowWise(4), some_images(5), some_images(5, seed=9)
    target = own_class(model, images)
    clean_logits = model(images)
    target[0] = clean_logits[0].argsort()[-3]  # the true class need not be the first
    attack = APGD(0.05, 10, objective="dlr-targeted", n_rivals=3, compat=True)
    result, visited = run(attack, model, images, target, start=start)
    assert (result.n_forward, result.n_backward) == (1 + 3 * 11, 30)
    assert torch.equal(visited[0], images)
    for i, clean in enumerate(images.numpy()):
        ranking = [k for k in clean_logits[i].argsort().flip(0).tolist() if k != target[i]]
        first = project(start[i].numpy(), clean, 0.05, "linf")
        for attempt, rival in enumerate(ranking[:3]):
            evaluate = evaluator(model, "dlr-targeted", int(target[i]), rival)
            points, *_ = plain_apgd(evaluate, clean, first, 0.05, 10, "linf", compat=True)
            seen = visited[1 + 11 * attempt : 12 + 11 * attempt, i].numpy()
            np.testing.assert_allclose(seen, points, rtol=0, atol=1e-9)


def test_attempts_are_rivals_within_restarts_each_with_a_start_of_its_own():
    model, images = RowWise(4), some_images(5)
    target = own_class(model, images)
    attack = APGD(0.05, 2, "l2", "dlr-targeted", n_rivals=2, restarts=2)
    _, visited = run(attack, model, images, target)
    ranking = model(images).argsort(1, descending=True)
    starts = visited[1::3]
    assert len(torch.unique(starts.flatten(0, 1), dim=0)) == 20
    for i, clean in enumerate(images.numpy()):
        for attempt, rank in enumerate([1, 2, 1, 2]):
            evaluate = evaluator(model, "dlr-targeted", int(target[i]), int(ranking[i, rank]))
            points, *_ = plain_apgd(evaluate, clean, starts[attempt, i].numpy(), 0.05, 2, "l2")
            seen = visited[1 + 3 * attempt : 4 + 3 * attempt, i].numpy()
            np.testing.assert_allclose(seen, points, rtol=0, atol=1e-9)


def test_success_is_any_wrong_class():
    model, images = RowWise(0), some_images(40)
    target = own_class(model, images)
    rival = model(images).argsort(1, descending=True)[:, 1]
    result = APGD(0.1, 20, objective="dlr-targeted", n_rivals=1)(model, images, target)
    predicted = model(result.images).argmax(1)
    assert torch.equal(result.success, predicted != target)
    assert bool(((predicted != target) & (predicted != rival)).any())
    assert bool(((predicted != target) & (predicted == rival)).any())


@pytest.mark.parametrize(("n_classes", "n_rivals", "attempts"), [(5, 9, 4), (5, 4, 4), (5, 2, 2)])
def test_there_are_no_more_rivals_than_classes(n_classes, n_rivals, attempts):
    model, images = RowWise(0, n_classes), some_images()
    target = own_class(model, images)
    attack = APGD(0.05, 3, objective="dlr-targeted", n_rivals=n_rivals)
    assert attack(model, images, target).n_forward == 1 + 4 * attempts
    # Another objective has none.
    assert APGD(0.05, 3, objective="dlr", n_rivals=n_rivals)(model, images, target).n_forward == 4


# ---------------------------------------------------------------------------- few classes


@pytest.mark.parametrize("n_classes", [2, 3])
def test_few_classes_fall_back_to_the_margin(n_classes):
    model, images, start = RowWise(0, n_classes), some_images(), some_images(seed=9)
    target = own_class(model, images)
    result, visited = run(APGD(0.1, 9, objective="dlr"), model, images, target, start=start)
    if n_classes == 2:
        margin, same = run(APGD(0.1, 9, objective="margin"), model, images, target, start=start)
        assert torch.equal(visited, same)
        assert_same(result, margin)
    attack = APGD(0.1, 9, objective="dlr-targeted")
    result, visited = run(attack, model, images, target, start=start)
    assert result.n_forward == 1 + 10 * (n_classes - 1)
    for i, clean in enumerate(images.numpy()):
        rival = int(model(images[i : i + 1])[0].argsort()[-2])
        logits, _ = model.one(result.images[i].numpy())
        if n_classes == 2:
            value, _ = loss_and_slope("margin", logits, int(target[i]))
            np.testing.assert_allclose(result.loss[i], value, rtol=1e-9)
        evaluate = evaluator(model, "dlr-targeted", int(target[i]), rival)
        first = project(start[i].numpy(), clean, 0.1, "linf")
        points, *_ = plain_apgd(evaluate, clean, first, 0.1, 9, "linf")
        np.testing.assert_allclose(visited[1:11, i].numpy(), points, rtol=0, atol=1e-9)


@quietly
@pytest.mark.parametrize("objective", ["ce", "margin", "dlr", "dlr-targeted"])
def test_one_class(objective):
    model, images = RowWise(0, 1), some_images()
    result = APGD(0.1, 4, objective=objective, n_rivals=5)(model, images, torch.zeros(4).long())
    assert result.n_forward == (6 if objective == "dlr-targeted" else 5)
    assert not result.success.any()
    expected = -INF if objective in ("margin", "dlr") else 0.0
    assert result.loss.tolist() == [expected] * 4
    assert bool((result.images - images).abs().max() <= 0.1)
    assert result.diagnostics is not None
    assert result.diagnostics.blind.all()


# ---------------------------------------------------------------------------- torchattacks


class Network(nn.Sequential):
    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            super().__init__(
                nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(),
                nn.Linear(8 * 36, 16), nn.Tanh(), nn.Linear(16, 6),
            )  # fmt: skip
            self[5].weight.data *= 6
            # Multiples of 1/64: the bounds of the ball are exact, so that both codes clip alike.
            self.images = torch.randint(0, 65, (24, 3, 6, 6)) / 64
        self.eval()
        self.target = self(self.images).argmax(1).detach()


def official(torchattacks, network, objective, norm, eps, steps):
    """Best loss, whether robust, start and best image as torchattacks has them."""
    images, target = network.images, network.target
    with torch.random.fork_rng():
        if objective == "dlr-targeted":
            attack = torchattacks.APGDT(network, norm=norm, eps=eps, steps=steps, n_classes=6)
            attack.target_class = 2
        else:
            attack = torchattacks.APGD(network, norm=norm, eps=eps, steps=steps, loss=objective)
        torch.manual_seed(0)
        best, robust, loss, _ = attack.attack_single_run(images, target)
        torch.manual_seed(0)
        noise = torch.randn(images.shape)
        length = noise.flatten(1).norm(dim=1)
        if norm == "Linf":
            torch.manual_seed(0)
            noise = 2 * torch.rand(images.shape) - 1
            length = noise.flatten(1).abs().amax(1)
    start = images + eps * noise / length.view(-1, 1, 1, 1)
    return loss, robust, start.clamp(0, 1), best


def nearly_all(agrees):
    """All but two: rounding may flip the sign of a slope near zero and send a sample elsewhere."""
    return int(agrees.sum()) >= len(agrees) - 2


@pytest.mark.parametrize(
    ("objective", "norm", "eps"),
    [
        ("ce", "Linf", 1 / 16),
        ("ce", "Linf", 1 / 8),
        ("dlr", "Linf", 1 / 16),
        ("dlr-targeted", "Linf", 1 / 8),
        ("ce", "L2", 0.5),
        ("dlr", "L2", 0.5),
    ],
)
@pytest.mark.parametrize("steps", [10, 50])
def test_compat_equals_torchattacks(objective, norm, eps, steps):
    torchattacks = pytest.importorskip("torchattacks")
    network = Network()
    loss, robust, start, best = official(torchattacks, network, objective, norm, eps, steps)
    options = {"objective": objective, "n_rivals": 1}
    visited = []

    def model(points):
        visited.append(points.detach())
        return network(points)

    attack = APGD(eps, steps, norm.lower(), **options, compat=True)
    result = attack(model, network.images, network.target, start=start)
    assert nearly_all(result.success == ~robust)
    assert 0 < result.success.sum() < 24
    if objective != "ce":
        # There the loss decides on success, so that both keep the same iterate.
        assert nearly_all((result.loss - loss).abs() <= (2e-3 if norm == "L2" else 1e-6))
    points = torch.cat(visited[-steps - 1 :])
    if objective == "ce":
        losses = nn.functional.cross_entropy(
            network(points), network.target.repeat(steps + 1), reduction="none"
        ).view(steps + 1, 24)
        atol = 1e-5 if norm == "L2" else 1e-6
        assert nearly_all((losses.amax(0) - loss).abs() <= atol)
    if norm == "Linf":
        visits = points.view(steps + 1, 24, 3, 6, 6)
        nearest = (visits - best).abs().flatten(2).amax(2).amin(0)
        assert nearly_all(nearest < 1e-6)
    native = APGD(eps, steps, norm.lower(), **options)(
        network, network.images, network.target, start=start
    )
    assert (native.loss - loss).mean() > -1e-3


def test_compat_uses_the_textbook_cross_entropy():
    # The confidence rounds to 1: the textbook's gradient knows the second class only.
    def model(points):
        return torch.stack([30 + points[:, 0], points[:, 1]], 1)

    images, target = torch.full((1, 2), 0.5), torch.tensor([0])
    ends = [
        APGD(0.125, 1, compat=compat, select="last")(model, images, target, start=images).images
        for compat in (False, True)
    ]
    assert ends[0].tolist() == [[0.375, 0.625]]
    assert ends[1].tolist() == [[0.5, 0.625]]


# ---------------------------------------------------------------------------- the class


def test_defaults_are_the_public_contract():
    expected = (
        "APGD(eps=0.5, steps=100, norm='linf', objective='ce', restarts=1, bounds=(0.0, 1.0), "
        "select='worst', seed=0, compat=False, stop_when_fooled=False, targeted=False, "
        "n_rivals=9, precision=None, compile=False)"
    )
    attack = APGD(0.5)
    assert repr(attack) == expected
    assert pickle.loads(pickle.dumps(attack)) == attack == APGD(np.float32(0.5), np.int64(100))
    with pytest.raises(AttributeError):
        attack.eps = 1.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -1}, ValueError, "eps: expected a number >= 0, got -1"),
        ({"eps": 2}, ValueError, "eps: expected a number >= 0 and <= 1, the width of bounds, got"),
        ({"steps": 2.5}, TypeError, "steps: expected an integer >= 0, got float 2.5"),
        ({"norm": "l1"}, ValueError, "norm: expected one of 'linf', 'l2', got 'l1'"),
        ({"restarts": 0}, ValueError, "restarts: expected an integer >= 1, got 0"),
        ({"n_rivals": 0}, ValueError, "n_rivals: expected an integer >= 1, got 0"),
        ({"select": "best"}, ValueError, "select: expected one of 'worst', 'last', 'first_succes"),
        ({"compat": 1}, TypeError, "compat: expected True or False, got int 1"),
        ({"targeted": True, "objective": "dlr-targeted"}, ValueError,
         "targeted: expected False with objective 'dlr-targeted', which moves towards no class, "
         "got True; use 'ce', 'margin' or 'dlr'"),
    ],
)  # fmt: skip
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        APGD(**{"eps": 0.1, **options})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_rounded_once_a_step(dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 200, generator=generator).to(dtype)
    centre = images.double() + 0.02 * torch.randn(1, 200, generator=generator)
    visited = []

    def model(points):
        visited.append(points.detach())
        return -((points - centre) ** 2).sum(1, keepdim=True)

    attack = APGD(0.1, 10, objective=lambda logits, target: logits[:, 0])
    attack(model, images, None, start=images)
    start, first, second = (points.double() for points in visited[:3])

    def project(points):
        points = points.to(dtype)
        inside = points.clamp(0, 1)
        return add_inward(images, (inside.double() - images.double()).clamp(-0.1, 0.1)).double()

    ahead = project((first - 0.2 * (first - centre).sign()).float())
    mixed = project((first + 0.75 * (ahead - first) + 0.25 * (first - start)).float())
    assert torch.equal(second, mixed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_result_is_feasible_in_every_dtype(norm, dtype):
    model, images = RowWise(dtype=dtype), some_images(dtype=dtype)
    target = own_class(model, images)
    result = APGD(0.1, 12, norm, restarts=2)(model, images, target)
    offset = (result.images.double() - images.double()).flatten(1)
    length = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1) / (1 + 1e-12)
    assert length.max() <= 0.1
    assert length.min() > 0.01
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert result.images.dtype == dtype
    assert result.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_empty_batch():
    result = APGD(0.1)(RowWise(), some_images(0), torch.zeros(0).long())
    assert result.images.shape == (0, *SHAPE)
    assert (result.n_forward, len(result.success)) == (0, 0)
