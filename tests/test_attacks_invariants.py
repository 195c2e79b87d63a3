"""The invariants of every attack, by the numbers of the specification's list.

1 ball, 2 box and finite, 3 inputs and outputs, 4 nothing to do, 5 parameters, 6 modes, 7 random
state, 8 loss, 9 more effort, 10 success, 11 company in the batch, 12 stopping early,
13 surroundings, 14 linear models, 15 scale and shift, 16 confidence, 17 targets and rivals,
18 worst case, 19 files, 20 memory and passes. A test's name begins with the numbers it covers.
"""

import math
import random
import weakref
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_models import N_CLASSES, SHAPE, RowWise, assert_unchanged, busy_model, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from calibclip.attacks import APGD, PGD, AttackWarning, Square, WorstCase, _rows, pgd
from calibclip.attacks.export import to_uint8
from calibclip.attacks.objectives import OBJECTIVES, resolve_objective

# Random targets and broken models are warned about.
pytestmark = pytest.mark.filterwarnings("ignore::calibclip.attacks.result.AttackWarning")

several = settings(max_examples=25, deadline=None, derandomize=True)
many = settings(several, max_examples=60)
SHAPES = [SHAPE, (3, 4, 4), (5,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
RADII = {
    "linf": [0.0, 1e-7, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 0.1, 1.0],
    "l2": [0.0, 1e-7, 8 / 255, 0.2, 0.5, 1.0, 3.0],
}
FIELDS = ("images", "success", "loss", "steps_to_success")


# ---------------------------------------------------------------------------- strategies


@dataclass
class Case:
    """An attack and what it is called with; ``options`` are per image where they are tensors."""

    attack: Any
    model: RowWise
    images: torch.Tensor
    target: torch.Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, rows=slice(None), **changes):
        """Run on some rows, with changed fields of the attack, and with batch_size."""
        batch_size = changes.pop("batch_size", None)
        attack = replace(self.attack, **changes)
        target = None if self.target is None else self.target[rows]
        options = {
            name: value[rows] if isinstance(value, torch.Tensor) else value
            for name, value in self.options.items()
        }
        self.model.visited.clear()
        return attack(self.model, self.images[rows], target, batch_size=batch_size, **options)

    @property
    def radii(self):
        eps = self.options.get("eps")
        eps = torch.tensor(self.attack.eps, dtype=torch.float64) if eps is None else eps
        return eps.double().expand(len(self.images)).numpy()


def pixels(rng, shape, dtype):
    """Both walls of the box, 8-bit levels, and anything between."""
    kinds = [np.zeros(shape), np.ones(shape), rng.integers(0, 256, shape) / 255, rng.random(shape)]
    values = np.choose(rng.choice(4, shape, p=[0.1, 0.1, 0.4, 0.4]), kinds)
    return torch.from_numpy(values).to(dtype)


@st.composite
def gradient_attacks(draw, objectives=("ce", "margin", "dlr"), **fixed):
    norm = draw(st.sampled_from(["linf", "l2"]))
    eps = draw(st.sampled_from(RADII[norm]))
    options = {
        "eps": eps,
        "norm": norm,
        "steps": draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 12])),
        "objective": draw(st.sampled_from(list(objectives))),
        "restarts": draw(st.sampled_from([1, 2, 3, 4])),
        "select": draw(st.sampled_from(["worst", "last", "first_success"])),
        "stop_when_fooled": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
        "n_rivals": draw(st.integers(1, 4)),
    }
    options["targeted"] = resolve_objective(options["objective"]).targeted and draw(
        st.sampled_from([False, False, True])
    )
    kind = draw(st.sampled_from([PGD, PGD, APGD]))
    if kind is PGD:
        options |= {
            "step_size": draw(st.sampled_from([None, 0.3 * eps or 0.01, 2.5 * eps or 0.01])),
            # What looks at the distance from the clean image has no gradient there.
            "random_start": resolve_objective(options["objective"]).reference == "clean"
            or draw(st.booleans()),
            "schedule": draw(st.sampled_from(["constant", "constant", "linear", "cosine"])),
            "momentum": draw(st.sampled_from([0.0, 0.0, 0.9])),
        }
    else:
        options["compat"] = draw(st.booleans())
    names = {option.name for option in fields(kind)}
    return kind(**{name: value for name, value in (options | fixed).items() if name in names})


ANY_ATTACK = gradient_attacks()


@st.composite
def cases(draw, attacks=ANY_ATTACK, dtypes=(torch.float64,), batch=(1, 7), masks=True):
    attack, dtype = draw(attacks), draw(st.sampled_from(list(dtypes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    shape = draw(st.sampled_from(SHAPES))
    size, n_classes = draw(st.integers(*batch)), draw(st.integers(2, 12))
    gain = draw(st.sampled_from([2.0, 10.0, 40.0]))
    model = RowWise(
        int(rng.integers(99)), dtype, n_classes, shape=shape, activation=torch.sin, gain=gain
    )
    images = pixels(rng, (size, *shape), dtype)
    options, wide = {}, (size, *[1] * len(shape))
    objective = resolve_objective(attack.objective)
    if objective.target == "multilabel":
        target = torch.from_numpy(rng.integers(0, 2, (size, n_classes)))
    elif objective.target == "none":
        target = None
    else:
        # Mostly right at first, so that there is something to find.
        target = torch.from_numpy(rng.integers(0, n_classes, size))
        if not attack.targeted and size:
            known = torch.from_numpy(rng.random(size) < 0.8)
            target = torch.where(known, model(images).argmax(1), target)
    if size and draw(st.booleans()):
        share = rng.choice([0.0, 0.3, 1.0, 1.0], size)
        kind = draw(st.sampled_from([torch.float32, torch.float64]))
        options["eps"] = torch.from_numpy(attack.eps * share).to(kind)
    if masks and draw(st.booleans()):
        free = rng.random((size, *shape)) < rng.choice([0.0, 0.3, 0.9], wide, p=[0.1, 0.4, 0.5])
        options["mask"] = torch.from_numpy(free)
    if draw(st.sampled_from([False, False, True])):
        options["start"] = images + torch.from_numpy(rng.normal(0, 0.1, images.shape)).to(dtype)
    return Case(attack, model, images, target, options)


def label_rows(case):
    """Give each image a first pixel of its own that may not change; -> rows the model has met."""
    size = len(case.images)
    first = case.images.flatten(1)
    first[:, 0] = torch.arange(size) / 8
    case.images = first.view_as(case.images)
    mask = case.options.get("mask", torch.ones_like(case.images, dtype=torch.bool)).clone()
    mask.flatten(1)[:, 0] = False
    case.options["mask"] = mask
    objective = resolve_objective(case.attack.objective)
    if objective.target == "class" and not case.attack.targeted:
        case.target = case.model(case.images).argmax(1)

    def visited(sample):
        points = torch.cat(case.model.visited)
        return points[points.flatten(1)[:, 0].double() * 8 == sample]

    return visited


# ---------------------------------------------------------------------------- oracles


def assert_feasible(points, clean, radii, norm, mask=None):
    """Check in NumPy's float64; points of shape (N, ...) around one clean image or N."""
    distance = (points.double() - clean.double()).abs().flatten(1).numpy()
    if norm == "linf":
        assert (distance.max(1, initial=0) <= radii).all()
    else:
        assert (np.sqrt((distance**2).sum(1)) <= radii * (1 + 1e-12)).all()
    assert ((points >= 0) & (points <= 1)).all()
    if mask is not None:
        assert torch.equal(points[~mask], clean.expand_as(points)[~mask])


def judge(case, points, target, reference=None):
    """Loss and success at points, by the objective's own functions but nothing of the attack."""
    objective, logits = resolve_objective(case.attack.objective), case.model(points)
    if case.attack.objective == "ce" and getattr(case.attack, "compat", False):
        objective = replace(objective, loss=partial(F.cross_entropy, reduction="none"))
    if case.attack.targeted:
        return -objective.loss(logits, target), logits.argmax(1) == target
    arguments = (target,) if objective.reference == "none" else (target, reference)
    return objective.loss(logits, *arguments), objective.success(logits, *arguments)


def references(case):
    """Return what the objective compares with, by attempt, and how many passes that takes."""
    kind, size = resolve_objective(case.attack.objective).reference, len(case.images)
    if kind == "none":
        return [None] * case.attack.restarts, 0
    logits = case.model(case.images)
    if kind == "clean":
        return [logits] * case.attack.restarts, 1
    order = [
        sorted(set(range(logits.shape[1])) - {own}, key=lambda k, row=row: -row[k])
        for row, own in zip(logits.tolist(), case.target.tolist(), strict=True)
    ]
    n_rivals = min(case.attack.n_rivals, logits.shape[1] - 1)
    ranks = [torch.tensor([row[rank] for row in order]) for rank in range(n_rivals)]
    assert all(len(rank) == size for rank in ranks)
    return ranks * case.attack.restarts, 1


@dataclass
class History:
    """Every iterate of every attempt, from a plain run: shapes (attempts, steps + 1, B, ...)."""

    points: torch.Tensor
    losses: torch.Tensor
    fooled: torch.Tensor
    passes: int  # before the first attempt

    def first_success(self, sample):
        """Return (attempt, step) of the success that restarts one after the other would meet."""
        found = self.fooled[..., sample].nonzero().tolist()
        return tuple(found[0]) if found else None


def history(case):
    """Let all attempts run to the end, one after the other, and judge what was visited."""
    attempts, passes = references(case)
    case.run(stop_when_fooled=False, select="last")
    points = torch.stack(case.model.visited[passes:])
    points = points.view(len(attempts), case.attack.steps + 1, *case.images.shape)
    judged = [
        judge(case, iterate, case.target, reference)
        for run, reference in zip(points, attempts, strict=True)
        for iterate in run
    ]
    losses, fooled = (
        torch.stack(values).view(points.shape[:3]) for values in zip(*judged, strict=True)
    )
    return History(points, losses, fooled, passes)


def chosen(case, past, sample, *, stop):
    """Apply the documented rule to one sample; -> (attempt, step)."""
    attack, (attempts, iterates) = case.attack, past.losses.shape[:2]
    if stop and past.first_success(sample) is not None:
        return past.first_success(sample)
    entries = [(a, k) for a in range(attempts) for k in range(iterates)]
    if attack.select == "last":
        entries = [(a, iterates - 1) for a in range(attempts)]
    successes = [entry for entry in entries if past.fooled[(*entry, sample)]]
    if successes and attack.select == "first_success":
        return successes[0]
    n_rivals = attempts // attack.restarts

    def rank(entry):
        given = "start" in case.options and entry[0] < n_rivals
        at_clean = entry[1] == 0 and not attack.random_start and not given
        return -math.inf if at_clean else past.losses[(*entry, sample)].item()

    return max(successes or entries, key=rank)


def assert_follows(case, result, past, *, stop):
    for sample in range(len(case.images)):
        entry = (*chosen(case, past, sample, stop=stop), sample)
        assert torch.equal(result.images[sample], past.points[entry])
        assert result.loss[sample] == past.losses[entry]
        assert result.success[sample] == past.fooled[entry]
        first = past.first_success(sample)
        assert result.steps_to_success[sample] == (-1 if first is None else first[1])


def assert_same(result, other, rows=slice(None), names=FIELDS):
    for name in names:
        assert torch.equal(getattr(result, name), getattr(other, name)[rows]), name


# ---------------------------------------------------------------------------- feasible and finite


@many
@given(cases(dtypes=DTYPES, batch=(0, 7)))
def test_01_ball_and_mask_are_kept(case):
    result = case.run()
    mask = case.options.get("mask")
    assert_feasible(result.images, case.images, case.radii, case.attack.norm, mask)


@several
@given(cases(gradient_attacks(random_start=False), masks=False))
def test_01_a_mask_leaves_an_attack_on_fewer_pixels(case):
    # APGD starts at random, and a draw of fewer pixels is another draw.
    case.options.setdefault(
        "start", case.images if isinstance(case.attack, PGD) else 1 - case.images
    )
    shape = case.images.shape
    free = torch.from_numpy(np.random.default_rng(len(shape)).random(shape[1:]) < 0.6).flatten()
    rows, core = (case.images.flatten(1), case.options["start"].flatten(1)), case.model
    attack = replace(case.attack, restarts=1)
    whole = attack(
        core,
        case.images,
        case.target,
        **case.options | {"mask": free.view(shape[1:])},
    )
    clean = torch.cat([rows[0]] * 1)

    def fewer(points):
        full = torch.zeros_like(clean).masked_scatter(free, points) + clean * ~free
        return core(full.view(shape))

    options = case.options | {"start": rows[1][:, free]}
    found = replace(attack, stop_when_fooled=False)(fewer, rows[0][:, free], case.target, **options)
    whole = replace(attack, stop_when_fooled=False)(
        core, case.images, case.target, **case.options | {"mask": free.view(shape[1:])}
    )
    assert torch.allclose(found.images, whole.images.flatten(1)[:, free], rtol=0, atol=1e-9)
    assert torch.allclose(found.loss, whole.loss, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", [PGD(0.25, 0), APGD(0.25, 0)], ids=repr)
def test_01_starts_fill_the_ball_of_the_free_pixels(norm, attack):
    images = (
        torch.full((400, 2, 4), 0.5, dtype=torch.float64)
        + torch.linspace(0, 1e-9, 400)[:, None, None]
    )
    mask = torch.tensor([True, True, False, True])
    model = RowWise(shape=(2, 4))
    result = replace(attack, norm=norm)(model, images, torch.zeros(400).long(), mask=mask)
    offset = (result.images - images)[..., mask].flatten(1)
    length = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
    # Uniform in d = 6 dimensions: the share of the radius to the power d is uniform on [0, 1].
    share = (length / 0.25) ** 6
    if isinstance(attack, APGD):
        assert torch.allclose(share, torch.ones_like(share), atol=1e-6)
    else:
        assert (share.sort().values - torch.arange(1, 401) / 400).abs().max() < 0.1
    # Every image has a draw of its own, without a preferred direction.
    assert len(offset.unique(dim=0)) == 400
    assert (offset.sign().mean(0).abs() < 0.2).all()
    assert (torch.corrcoef(offset.T) - torch.eye(6)).abs().max() < 0.2


@many
@given(cases(dtypes=DTYPES), st.integers(1, 9))
def test_01_08_10_every_iterate(case, batch_size):
    visited = label_rows(case)
    result = case.run(batch_size=batch_size)
    seen, attack = [visited(sample) for sample in range(len(case.images))], case.attack
    for sample, points in enumerate(seen):
        mask = case.options["mask"][sample].expand_as(points)
        clean = case.images[sample]
        assert_feasible(points, clean, case.radii[sample], attack.norm, mask)
        target = None if case.target is None else case.target[sample].expand(len(points))
        losses, fooled = judge(case, points, target)
        # 10: what was found is kept, and judged by its own logits.
        loss, success = judge(case, result.images[[sample]], target[:1])
        assert result.success[sample] == success
        assert result.loss[sample] == loss
        if attack.select != "last":
            assert success == fooled.any()
        assert (result.steps_to_success[sample] >= 0) == fooled.any()
        # 8: nothing that was visited is worse for the model, the clean image aside.
        if attack.select == "worst" and not attack.stop_when_fooled:
            pool = points.flatten(1) != clean.flatten()
            pool = losses[(fooled == success) & pool.any(1)]
            assert (pool <= result.loss[sample]).all()


FAULTS = ["nan gradient", "inf gradient", "nan logits", "inf logits", "one class at -inf"]


@several
@given(cases(gradient_attacks(objectives=["ce", "margin", "dlr", "dlr-targeted", "kl"]), DTYPES),
       st.sampled_from(FAULTS))  # fmt: skip
def test_02_box_and_finite_whatever_the_gradients_are(case, fault):
    core = case.model

    def model(points):
        logits = core(points)
        nothing = (points - points.detach()).flatten(1).sum(1, keepdim=True)
        bright = points.flatten(1)[:, -1:] > 0.5
        if fault == "nan gradient":
            return logits + 0 * nothing.sqrt()
        if fault == "inf gradient":
            return logits * (1 + nothing.abs().sqrt())
        if fault == "nan logits":
            return torch.where(bright, torch.nan, logits)
        if fault == "inf logits":
            return torch.where(bright, torch.inf, logits)
        return torch.cat([logits[:, :-1], torch.full_like(nothing, -torch.inf)], 1)

    model.visited = core.visited
    case.model = model
    case.target = case.target.clamp(max=core.output.shape[0] - 2)
    result = case.run()
    assert result.images.isfinite().all()
    mask = case.options.get("mask")
    assert_feasible(result.images, case.images, case.radii, case.attack.norm, mask)
    assert not (result.success & result.loss.isnan()).any()
    for points in core.visited:
        assert ((points >= 0) & (points <= 1)).all()


# ---------------------------------------------------------------------------- arguments and results


@several
@given(cases(gradient_attacks(["ce", "margin", "embedding-l2", "kl", "bce"]), DTYPES, batch=(0, 4)),
       st.booleans())  # fmt: skip
def test_03_inputs_are_left_alone_and_outputs_are_like_them(case, channels_last):
    layout = torch.contiguous_format
    if channels_last and case.images.ndim == 4:
        layout = torch.channels_last
    case.images = case.images.contiguous(memory_format=layout).requires_grad_()
    objective = resolve_objective(case.attack.objective)
    if objective.reference == "clean":
        case.options["reference"] = case.model(case.images).detach() + 0.1
    inputs = [case.images, case.target, *case.options.values()]
    inputs = [tensor for tensor in inputs if tensor is not None]
    before = [(tensor.detach().clone(), tensor._version) for tensor in inputs]
    result = case.run(batch_size=2)
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version
        assert tensor.grad is None
    images = result.images
    assert (images.dtype, images.shape, images.device) == (
        case.images.dtype,
        case.images.shape,
        case.images.device,
    )
    assert images.is_contiguous(memory_format=layout)
    batch = (len(images),)
    assert [getattr(result, name).shape for name in FIELDS[1:]] == [batch] * 3
    assert (result.success.dtype, result.steps_to_success.dtype) == (torch.bool, torch.int64)
    assert result.loss.dtype == torch.promote_types(images.dtype, torch.float32)
    for name in FIELDS:
        value = getattr(result, name)
        assert not value.requires_grad
        assert value.grad_fn is None
        # What is returned is the caller's: writing to it changes nothing else.
        assert all(value.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
                   for tensor in inputs if tensor.numel())  # fmt: skip


@several
@given(cases(gradient_attacks(eps=0.0), DTYPES))
def test_04_without_a_radius_nothing_happens(case):
    result = case.run()
    assert torch.equal(result.images, case.images)
    hit = case.model(case.images).argmax(1) == case.target
    assert torch.equal(result.success, hit if case.attack.targeted else ~hit)
    assert torch.equal(result.steps_to_success, result.success.long() - 1)


@several
@given(cases(gradient_attacks(steps=0, restarts=1), masks=False))
def test_04_without_steps_the_start_is_judged(case):
    result = case.run()
    assert torch.equal(result.images, case.model.visited[-1])
    assert (len(case.model.visited), result.n_forward, result.n_backward) == (1, 1, 0)
    attack, clean, radii = case.attack, case.images.numpy(), case.radii
    radii = radii.reshape(-1, *[1] * (clean.ndim - 1))
    if "start" not in case.options:
        if not attack.random_start:
            assert torch.equal(result.images, case.images)
        return
    offset = case.options["start"].numpy() - clean
    if attack.norm == "linf":
        expected = np.clip(clean + np.clip(offset, -radii, radii), 0, 1)
    else:
        length = np.sqrt((offset**2).reshape(len(clean), -1).sum(1)).reshape(radii.shape)
        expected = np.clip(clean + offset * np.minimum(1, radii / length), 0, 1)
    np.testing.assert_allclose(result.images.numpy(), expected, rtol=0, atol=1e-15)


def test_04_an_empty_batch_takes_every_argument():
    images = torch.zeros(0, *SHAPE)
    result = PGD(0.1)(
        RowWise(), images, torch.zeros(0).long(), eps=torch.zeros(0), mask=images > 0, start=images
    )
    assert result.images.shape == images.shape


# ---------------------------------------------------------------------------- no trace

ATTACKS = {
    "pgd": PGD(0.1, 3, restarts=2),
    "pgd-l2": PGD(0.5, 3, norm="l2", momentum=0.9),
    "apgd": APGD(0.1, 4),
    "apgd-t": APGD(0.1, 2, "l2", "dlr-targeted", n_rivals=2, stop_when_fooled=True),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def busy_batch(seed=0):
    rng = np.random.default_rng(seed)
    images = pixels(rng, (4, *SHAPE), torch.float32)
    return images, torch.from_numpy(rng.integers(0, N_CLASSES, 4))


@every_attack
@pytest.mark.parametrize("fail_at", [None, 1, 2, 4])
def test_05_06_07_no_trace_is_left(attack, fail_at):
    model = busy_model()
    before = snapshot(model)
    model.fail_at = fail_at
    if fail_at is None:
        attack(model, *busy_batch())
    else:
        with pytest.raises(RuntimeError, match="the model failed"):
            attack(model, *busy_batch(), batch_size=3)
    assert model.modes
    assert not any(flag for modes in model.modes for flag in modes)
    assert_unchanged(model, before)


@several
@given(cases(gradient_attacks(random_start=True), masks=False), st.integers(0, 99))
def test_07_same_seed_same_result(case, seed):
    case.options.pop("start", None)
    # Away from the walls, to which starts are clipped.
    case.images = 0.25 + case.images / 2
    case.options |= {"eps": torch.full((len(case.images),), 0.1)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        first = case.run()
    assert_same(first, case.run())
    again = torch.Generator().manual_seed(seed)
    case.options["generator"] = again
    drawn = case.run()
    case.options["generator"] = torch.Generator().manual_seed(seed)
    assert_same(drawn, case.run())
    # A generator advances, and each seed, restart and draw has starts of its own.
    options = {"steps": 0, "restarts": 2, "stop_when_fooled": False}
    starts = []
    for seed, generator in enumerate((again, again, None, None)):
        case.options["generator"] = generator
        case.run(**options, seed=seed)
        starts += case.model.visited[-2:]
    assert [len(points) for points in starts] == [len(case.images)] * 8
    for one, two in combinations(starts, 2):
        assert (one != two).flatten(1).any(1).all()


# ---------------------------------------------------------------------------- effort


@several
@given(cases(gradient_attacks(schedule="constant", select="worst", stop_when_fooled=False)),
       st.integers(1, 3))  # fmt: skip
def test_08_09_more_steps_or_restarts_never_hurt(case, more):
    attack = case.attack
    base = case.run()
    others = [case.run(restarts=attack.restarts + more)]
    # The checkpoints of APGD move with the number of steps.
    if isinstance(attack, PGD):
        others.append(case.run(steps=attack.steps + more))
    for other in others:
        assert (other.success | ~base.success).all()
        clean = (base.images == case.images).flatten(1).all(1) & ~base.success
        comparable = (other.success == base.success) & ~clean
        assert (other.loss >= base.loss)[comparable].all()
        if attack.restarts == 1:
            found = base.steps_to_success >= 0
            assert torch.equal(other.steps_to_success[found], base.steps_to_success[found])


@several
@given(cases(), st.integers(1, 3))
def test_09_more_restarts_never_lose_a_success(case, more):
    base, other = case.run(), case.run(restarts=case.attack.restarts + more)
    assert (other.success | ~base.success).all()
    if case.attack.select == "first_success" or case.attack.stop_when_fooled:
        assert_same_where(base.success, base, other)


def assert_same_where(flags, result, other):
    for name in FIELDS:
        assert torch.equal(getattr(result, name)[flags], getattr(other, name)[flags]), name


# ---------------------------------------------------------------------------- the engine


@many
@given(cases(gradient_attacks(["ce", "margin", "dlr", "dlr-targeted", "kl"]), DTYPES, batch=(0, 7)),
       st.integers(0, 7), st.integers(1, 9), st.integers(0, 99))  # fmt: skip
def test_11_company_does_not_matter(case, cut, batch_size, seed):
    whole = case.run()
    for rows in (slice(cut), slice(cut, None)):
        assert_same(case.run(rows), whole, rows)
    assert_same(case.run(batch_size=batch_size), whole)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(case.images)))
    shuffled = case.run(order, batch_size=batch_size)
    assert_same(shuffled, whole, order)
    if not case.attack.stop_when_fooled:
        counts = ("judged", "zero_gradients", "nonfinite")
        assert_same(shuffled.diagnostics, whole.diagnostics, order, counts)


every_objective = gradient_attacks(["ce", "margin", "dlr", "dlr-targeted", "kl"])


@settings(many, max_examples=150)
@given(cases(every_objective), st.integers(1, 40))
def test_12_any_course_ends_where_plain_restarts_end(case, batch_size):
    past = history(case)
    result = case.run(batch_size=batch_size, stop_when_fooled=False)
    assert_follows(case, result, past, stop=False)
    assert (result.diagnostics.judged == past.losses[..., 0].numel()).all()
    stopped = case.run(batch_size=batch_size, stop_when_fooled=True)
    assert max(len(points) for points in case.model.visited) <= batch_size
    assert_follows(case, stopped, past, stop=True)
    # Up to eight rows close ranks at once.
    assert batch_size > 8 or stopped.forward_images <= result.forward_images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_11_rows_of_different_ages_take_the_same_steps(dtype, schedule):
    for seed in range(12):
        model = RowWise(seed, dtype, activation=torch.sin, gain=20.0)
        images = pixels(np.random.default_rng(seed), (6, *SHAPE), dtype)
        attack = PGD(0.1, 6, 0.01, schedule=schedule, restarts=2, stop_when_fooled=True)
        target = model(images).argmax(1)
        assert_same(attack(model, images, target, batch_size=2), attack(model, images, target))


class LateGlance(_rows._Glance):
    """Reads flags one call late, as from a CUDA device."""

    @staticmethod
    def is_free(tensor):
        return False

    def __call__(self, flags):
        arrived, self._pending = self._pending, flags.clone().numpy()
        return arrived


@several
@given(cases(every_objective), st.integers(1, 40))
def test_12_flags_that_arrive_late_change_nothing(case, batch_size):
    past = history(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rows, "_Glance", LateGlance)
        result = case.run(batch_size=batch_size, stop_when_fooled=True)
    assert_follows(case, result, past, stop=True)


@several
@given(cases(every_objective), st.integers(1, 40), st.booleans())
def test_12_compiled_batches_shrink_by_halves(case, batch_size, stop):
    past = history(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, **options: model)
        result = case.run(batch_size=batch_size, compile=True, stop_when_fooled=stop)
    assert_follows(case, result, past, stop=stop)
    if batch_size <= past.losses[:, 0].numel():
        asked = -(-len(case.images) // batch_size) * past.passes
        widths = [len(points) for points in case.model.visited[asked:]]
        assert set(widths) <= {batch_size >> k for k in range(9)}


@several
@given(
    cases(gradient_attacks(["ce", "margin", "dlr-targeted"], momentum=0.9, stop_when_fooled=True))
)
def test_12_one_at_a_time_no_pass_is_wasted(case):
    past = history(case)
    result = case.run(batch_size=1)
    attempts, iterates, size = past.fooled.shape
    forward = backward = 0
    for sample in range(size):
        attempt, step = past.first_success(sample) or (attempts, 0)
        # Attempts up to the first that succeeds, whose last point needs no gradient.
        forward += attempt * iterates + (step + 1) * (attempt < attempts)
        backward += attempt * (iterates - 1) + step * (attempt < attempts)
    assert result.n_forward == result.forward_images == forward + past.passes * size
    assert result.n_backward == result.backward_images == backward
    # Side by side: attempts after one that has succeeded hear of it a step later.
    if attempts * size <= 8:
        bound = 0
        for sample in range(size):
            attempt, step = past.first_success(sample) or (attempts, 0)
            later = max(attempts - attempt - 1, 0)
            own = (step + 1) * (attempt < attempts)
            bound += attempt * iterates + own + later * min(step + 2, iterates)
        result = case.run(batch_size=attempts * size)
        assert result.forward_images <= bound + past.passes * size


def hill(top, slope=10.0):
    """Margin of one pixel, highest at ``top``; always negative."""

    def model(points):
        lead = -1 - slope * (points - top).abs()
        return torch.cat([torch.zeros_like(lead), lead], 1)

    return model


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("top", [0.52, 0.56, 0.77])
@pytest.mark.parametrize("given", [False, True])
def test_12_to_and_fro_between_two_points(steps, top, given):
    # Steps of 0.1 alternate about the hill; from 0.52 one of the two points is the clean image.
    images, target = torch.full((1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    start = torch.full_like(images, 0.5) if given else None
    attack, core, counts = (
        PGD(0.4, steps, 0.1, objective="margin", random_start=False),
        hill(top),
        [],
    )
    results = []
    for stop in (False, True):
        visited = []

        def model(points, visited=visited):
            visited.append(points.item())
            return core(points)

        results.append(replace(attack, stop_when_fooled=stop)(model, images, target, start=start))
        counts.append(len(visited))
        pool = [point for point in visited if given or point != 0.5]
        best = min(pool, key=lambda point: abs(point - top))
        assert results[-1].images.item() == best
    assert_same(*results)
    # It ends at the first point it comes back to, which it need not judge again.
    assert counts[1] == min(counts[0], {0.52: 2, 0.56: 2, 0.77: 4}[top])


# ---------------------------------------------------------------------------- surroundings


@every_attack
@pytest.mark.parametrize(
    "outer", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_13_surroundings(attack, outer):
    model, (images, target) = busy_model().eval(), busy_batch()
    expected = attack(model, images, target)
    with outer():
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        # What is made here may be inference tensors.
        result = attack(
            model,
            images.clone(),
            target.clone(),
            eps=torch.full((4,), attack.eps),
            mask=torch.ones(images.shape, dtype=torch.bool),
        )
        assert state == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert result.images.dtype == torch.float32
    assert_feasible(result.images, images, np.float32(attack.eps).astype(float), attack.norm)
    assert not result.images.is_inference()
    if torch.is_autocast_enabled("cpu") or outer in (torch.no_grad, torch.inference_mode):
        assert torch.equal(result.success, expected.success)
        assert torch.allclose(result.images, expected.images, atol=1e-6)


@every_attack
def test_13_inside_a_training_step(attack):
    gradients = []
    for attacked in (False, True):
        model, (images, target) = busy_model(), busy_batch()
        torch.manual_seed(0)
        loss = torch.nn.functional.cross_entropy(model(images), target)
        if attacked:
            attack(model, images, target)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---------------------------------------------------------------------------- closed forms


@several
@given(gradient_attacks(["ce", "margin"], targeted=False, stop_when_fooled=False, compat=False,
                        schedule="constant", momentum=0.0, step_size=0.5, steps=12, select="worst"),
       st.integers(0, 999), st.booleans())  # fmt: skip
def test_14_linear_models_are_solved_and_their_bound_holds(attack, seed, walls):
    # Two classes with logits (0, <w, x>), label 1: the margin is -<w, x>.
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(0, 1, (1, *SHAPE)))
    linf = attack.norm == "linf"
    if walls and linf:
        images = pixels(rng, (5, *SHAPE), torch.float64)
    else:
        images, attack = (
            torch.from_numpy(rng.uniform(0.4, 0.6, (5, *SHAPE))),
            replace(attack, eps=0.2),
        )

    def model(points):
        score = (points * weight).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)

    result = attack(model, images, torch.ones(5, dtype=torch.int64))
    if linf:
        best = (images - attack.eps * weight.sign()).clamp(0, 1)
        assert torch.allclose(result.images, best, rtol=0, atol=1e-15)
    best = images - attack.eps * (weight.sign() if linf else weight / weight.norm())
    bound = -model(best if not walls or not linf else best.clamp(0, 1))[:, 1]
    reached = -model(result.images)[:, 1]
    # Certified: nothing in the ball is beyond it.
    assert (reached <= bound + 1e-12).all()
    assert torch.allclose(reached, bound, rtol=0, atol=1e-5)
    assert torch.equal(result.success, reached > 0)


@several
@given(
    cases(gradient_attacks(["ce", "margin", "dlr", "dlr-targeted"])), st.sampled_from([0.125, 64.0])
)
def test_15_scale_and_shift_of_the_logits(case, scale):
    core = case.model

    def exact(points):
        """Logits on a grid, so that shifts and scalings by powers of two are exact."""
        logits = core(points)
        return logits + ((logits * 2**20).round() / 2**20 - logits).detach()

    case.target = exact(case.images).argmax(1)
    results = {}
    for name, model in {
        "plain": exact,
        "shifted": lambda points: exact(points) - 509,
        "scaled": lambda points: scale * exact(points),
    }.items():
        model.visited = core.visited
        case.model = model
        results[name] = case.run()
    assert_same(results["shifted"], results["plain"])
    if case.attack.objective == "margin" or (
        len(core.output) == 2 and "dlr" in case.attack.objective
    ):
        assert_same(results["scaled"], results["plain"], names=("images", *FIELDS[1::2]))
        assert torch.equal(results["scaled"].loss, scale * results["plain"].loss)
    elif case.attack.objective == "dlr":
        # Up to the constant in its denominator.
        assert torch.allclose(results["scaled"].images, results["plain"].images, atol=1e-6)
        assert torch.allclose(results["scaled"].loss, results["plain"].loss, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [PGD, APGD])
def test_16_confidence_does_not_stop_the_attack(kind, dtype):
    # Pixels are classes: the margin is 100 * 0.375 = 37.5, and no more than 25 of it can go.
    target = torch.tensor([0, 1])
    own = torch.eye(2)[target] > 0
    images = torch.where(own, 0.75, 0.375).to(dtype)
    attack = kind(eps=0.125, steps=12)
    result = attack(lambda points: 100 * points, images, target)
    assert result.diagnostics.zero_gradients.tolist() == [0, 0]
    best = torch.where(own, 0.625, 0.5).to(dtype)
    assert torch.equal(result.images, best)
    if kind is APGD:
        # The textbook form has lost the gradient of the true class and says so: that happens
        # in float32 or less as soon as the margin is above 17.
        result = replace(attack, compat=True)(lambda points: 200 * points, images, target)
        assert result.diagnostics.saturated == 1
        assert (result.images[own] != best[own]).all()
    with pytest.warns(AttackWarning, match="blind for 2 of 2 samples"):
        result = attack(lambda points: 0 * points + images, images, target)
    assert result.diagnostics.zero_gradients.tolist() == [12, 12]


# ---------------------------------------------------------------------------- targets and rivals


@several
@given(cases(gradient_attacks(targeted=True)))
def test_17_a_targeted_success_is_the_target(case):
    result = case.run()
    predicted = case.model(result.images).argmax(1)
    assert torch.equal(predicted == case.target, result.success)


@several
@given(cases(gradient_attacks(["dlr-targeted"])), st.integers(1, 20))
def test_17_rivals_are_the_classes_ranked_next(case, batch_size):
    past = history(case)
    case.run(batch_size=batch_size)
    result = case.run(stop_when_fooled=False)
    attempts = case.attack.restarts * min(case.attack.n_rivals, len(case.model.output) - 1)
    assert past.losses.shape[0] == attempts
    assert result.n_forward == 1 + attempts * (case.attack.steps + 1)
    assert result.n_backward == attempts * case.attack.steps
    # Success is any wrong class, not the rival.
    assert torch.equal(result.success, case.model(result.images).argmax(1) != case.target)


def test_17_an_objective_is_its_name():
    model = RowWise()
    images = pixels(np.random.default_rng(0), (3, *SHAPE), torch.float64)
    target = model(images).argmax(1)
    for name, objective in OBJECTIVES.items():
        if objective.target == "class":
            named, given = (pgd(model, images, target, objective=o) for o in (name, objective))
            assert torch.equal(named, given)


@several
@given(cases(gradient_attacks(["dlr", "dlr-targeted"], targeted=False, n_rivals=1)))
def test_17_few_classes_fall_back_to_the_margin(case):
    core = case.model
    core.output = core.output[:2]
    case.target = core(case.images).argmax(1)
    result = case.run()
    assert_same(result, case.run(objective="margin"))
    assert result.loss.isfinite().all()


# ---------------------------------------------------------------------------- the worst case


@st.composite
def members(draw):
    """Two or three attacks of one radius, each with a seed of its own."""
    eps = draw(st.sampled_from([0.0, 1 / 255, 0.03, 0.06]))
    seeds = st.integers(0, 2**20)
    member = st.one_of(
        st.builds(PGD, st.just(eps), st.integers(0, 6), select=st.sampled_from(["last", "worst"]),
                  seed=seeds),
        st.builds(APGD, st.just(eps), st.integers(1, 6), stop_when_fooled=st.booleans(),
                  objective=st.sampled_from(["ce", "dlr-targeted"]), seed=seeds),
        st.builds(Square, st.just(eps), st.integers(1, 20), seed=seeds),
    )  # fmt: skip
    return draw(st.lists(member, min_size=2, max_size=3))


@several
@given(members(), st.integers(0, 99), st.sampled_from([1, 3, 8]), st.booleans())
def test_18_the_worst_case_is_no_better_than_a_member_in_any_order(attacks, seed, size, individual):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(8, *SHAPE, generator=generator, dtype=torch.float64)
    model = RowWise(seed)
    target = model(images).argmax(1)
    target[0] = (target[0] + 1) % N_CLASSES  # wrong from the start
    wrong = torch.stack(
        [model(attack(model, images, target).images).argmax(1) != target for attack in attacks]
    )
    wrong[:, 0] = True
    for order in (attacks, attacks[::-1]):
        worst = WorstCase(order, individual=individual)(model, images, target, batch_size=size)
        # What is broken is what a member breaks, not less and not more.
        assert torch.equal(worst.success, wrong.any(0))
        assert worst.robust_accuracy <= float((~wrong).double().mean(1).min())
        assert torch.equal(model(worst.images).argmax(1) != target, worst.success)
        assert float((worst.images - images).abs().max()) <= order[0].eps


# ---------------------------------------------------------------------------- files, memory


@several
@given(cases(gradient_attacks(["ce", "margin"]), [torch.float32], masks=False), st.integers(0, 8))
def test_19_files_stay_in_the_ball(case, level):
    case.options.clear()
    case.images = (case.images * 255).round() / 255
    eps = level / 255 if case.attack.norm == "linf" else level / 16
    case.attack = replace(case.attack, eps=eps)
    result = case.run()
    saved = to_uint8(result.images, case.images, eps, case.attack.norm).long()
    offset = saved - (case.images * 255).round().long()
    if case.attack.norm == "linf":
        assert offset.abs().max() <= level
        # Nothing is lost where the attack went all the way.
        edge = (result.images - case.images).abs() * 255 > level - 1e-3
        inside = (saved > 0) & (saved < 255)
        assert (offset.abs() == level)[edge & inside].all()
    else:
        assert ((offset**2).flatten(1).sum(1) <= (255 * eps) ** 2 * (1 + 1e-6)).all()


@several
@given(cases(gradient_attacks(["ce", "margin", "kl", "dlr-targeted"], stop_when_fooled=False)),
       st.integers(1, 40))  # fmt: skip
def test_20_passes_are_counted(case, batch_size):
    core, forward, backward = case.model, [], []

    def model(points):
        logits = core(points)
        forward.append(len(points))
        if logits.requires_grad:
            logits.register_hook(lambda gradient: backward.append(len(gradient)))
        return logits

    model.visited = core.visited
    attempts, passes = references(case)
    case.model = model
    result = case.run(batch_size=batch_size)
    size, steps = len(case.images), case.attack.steps
    batches = -(-size * len(attempts) // batch_size)
    asked = passes * -(-size // batch_size)
    assert result.n_forward == len(forward) == asked + batches * (steps + 1)
    assert result.n_backward == len(backward) == batches * steps
    assert result.forward_images == sum(forward) == size * (passes + len(attempts) * (steps + 1))
    assert result.backward_images == sum(backward) == size * len(attempts) * steps


@every_attack
def test_20_memory_is_flat(attack):
    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    live, peaks = weakref.WeakSet(), []

    def pack(tensor):
        # The output of a tanh, kept with its graph, would keep that graph.
        saved = Saved(tensor.detach())
        live.add(saved)
        return saved

    for steps in (5, 50):
        core, counts = RowWise(dtype=torch.float32), []

        def model(points, core=core, counts=counts):
            counts.append(len(live))
            return core(points)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            replace(attack, steps=steps)(model, *busy_batch(), batch_size=2)
        peaks.append(max(counts))
        assert len(live) == 0
    assert peaks[0] == peaks[1]
