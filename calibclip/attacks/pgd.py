"""Projected gradient descent: repeat a steepest step and a projection, keep the point asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_choice, check_number
from calibclip.attacks._attack import Call, GradientAttack
from calibclip.attacks._model import Iterate, undisturbed
from calibclip.attacks._rows import Rule
from calibclip.attacks.objectives import Objective
from calibclip.attacks.threat import FeasibleSet, from_host, per_sample, sample_keys, stream_seed

# Share of the step size at step k of n.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda k, n: 1.0,
    "linear": lambda k, n: 1.0 - k / n,
    "cosine": lambda k, n: (1.0 + math.cos(math.pi * k / n)) / 2,
}


@dataclass(frozen=True)
class PGD(GradientAttack):
    r"""Projected gradient descent, the standard white-box attack.

    From a start in the ball around the clean image ``x``, repeat ``steps`` times

    .. math:: x_{k+1} = P(x_k + s_k \, d(g_k)), \quad g_k = \nabla_{x_k} f(z(x_k), y)

    with ``f`` the objective to maximise, ``z`` the model, ``d`` the steepest direction in the
    norm (``sign(g)`` or ``g / ||g||_2``) and ``P`` the projection on ball and box. It runs
    ``steps`` backward and ``steps + 1`` forward passes per restart, and one more forward pass where
    the objective looks at the clean outputs. The result is within ``eps`` and ``bounds`` exactly,
    not just up to float32 rounding.

    **Which image is returned**, per sample (it decides calibration numbers on the result):

    - ``"worst"``: the misclassified iterate of highest loss; if none, the iterate of highest loss.
    - ``"first_success"``: the first misclassified iterate, just across the decision boundary; if
      none, the iterate of highest loss.
    - ``"last"``: the last iterate, even if an earlier one was misclassified.

    The start is an iterate. Without ``random_start`` it is the clean image, which ``"worst"``
    returns only if it is the sole misclassified iterate, ``steps`` is 0, or no later iterate has a
    loss that is a number; ``"first_success"`` and ``stop_when_fooled`` return it if it is
    misclassified. A success found by any restart is kept.

    **Robust accuracy, fast:** ``stop_when_fooled`` ends a sample at its first success. What is
    left of the batch closes ranks, and with a ``batch_size`` waiting images take the free places.
    A sample that has come to alternate between two points ends too, as nothing new can come.
    Success and images are what the full run would have had up to there. Ranks of FSDP would make
    different numbers of passes and wait for each other forever: each attacks a plain copy instead
    (``docs/scale.md``).

    **Randomness.** The start of a sample depends on ``seed``, its own pixels, the restart and the
    kind of device only: not on the rest of the batch nor on the global random state. The same image
    therefore gets the same start in every call. For training pass a ``generator``: each call then
    draws its seed from it.

    **The model** is any callable from images ``(B, ...)`` to logits ``(B, K)``. An ``nn.Module``
    runs in eval mode with frozen parameters and is restored afterwards, also after an error. A
    plain function runs as it is: it accumulates no ``.grad``, but batch norm left in train mode
    inside it would update its statistics.

    Args:
        eps: Radius of the ball, >= 0, in the units of the images; the call can override it with
            one radius per image.
        steps: Gradient steps, >= 0. With 0 the projected start is evaluated.
        step_size: Length of a step, > 0; None means ``eps / 4``.
        norm: ``"linf"`` or ``"l2"``.
        objective: A name in ``calibclip.attacks.objectives.OBJECTIVES``, an ``Objective``, or any
            callable ``(logits, target) -> (B,)``.
        random_start: Start at a uniform draw from the ball instead of the clean image.
        restarts: Independent runs, >= 1; the best image per sample is kept.
        bounds: Lowest and highest pixel value, rounded to the dtype of the images.
        select: ``"worst"``, ``"last"`` or ``"first_success"``, see above.
        stop_when_fooled: End a sample at its first success. For evaluation.
        targeted: Move towards ``target`` instead of away from it: minimise the objective.
        seed: Seed of the starts, >= 0, unless a generator is passed.
        schedule: ``"constant"``, or step sizes that fall to 0 by ``"linear"`` or ``"cosine"``.
        momentum: ``mu`` >= 0 in :math:`m_k = \mu m_{k-1} + g_k / \|g_k\|_1`; steps follow ``m``.
            0 is plain PGD. (FARE's published momentum adds to the sign of a sum what is smaller
            than the sum: for "linf" it is plain PGD.)
        n_rivals: With ``objective="dlr-targeted"``: attempts per restart, each at another of the
            classes ranked next on the clean image.
        precision: ``"bfloat16"`` or ``"float16"`` runs the model under autocast; the iterates
            stay as they are, and every success is confirmed without autocast, or the sample is
            attacked again. None: no autocast of its own.
        compile: Run ``torch.compile(model)``. Batches then shrink by halves, so that
            few sizes are compiled.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> attack = PGD(eps=0.1, steps=8, objective="margin")
        >>> result = attack(lambda x: x @ weight, torch.tensor([[0.5, 0.4]]), torch.tensor([1]))
        >>> result
        AttackResult(1 images, 100.0 % fooled, 9 forward, 8 backward)
        >>> result.images
        tensor([[0.4000, 0.5000]])

    References:
        Madry et al. (2018), Towards deep learning models resistant to adversarial attacks,
        section 2.1, https://arxiv.org/abs/1706.06083; momentum: Dong et al. (2018), Boosting
        adversarial attacks with momentum, equation 6, https://arxiv.org/abs/1710.06081
    """

    eps: float
    steps: int = 10
    step_size: float | None = None
    norm: str = "linf"
    objective: str | Objective | Callable[..., Tensor] = "ce"
    random_start: bool = True
    restarts: int = 1
    bounds: tuple[float, float] = (0.0, 1.0)
    select: str = "worst"
    stop_when_fooled: bool = False
    targeted: bool = False
    seed: int = 0
    _: KW_ONLY
    schedule: str = "constant"
    momentum: float = 0.0
    n_rivals: int = 9
    precision: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        self._check_options()
        if self.step_size is not None:
            step_size = check_number("step_size", self.step_size, above=0)
            object.__setattr__(self, "step_size", step_size)
        check_choice("schedule", self.schedule, SCHEDULES)
        object.__setattr__(self, "momentum", check_number("momentum", self.momentum, at_least=0))

    def _rule(self) -> Rule:
        return _Steepest(self)

    def _last_iterate(self, call: Call) -> Tensor:
        """Run once from one start, track nothing, and do not judge where it ends."""
        batch, feasible, rule = len(call.images), call.feasible, self._rule()
        if batch == 0:
            return call.images
        attacked = self._attacked(call)
        call = self._with_reference(attacked, call, batch)
        points = call.images if call.start is None else call.start
        if self.random_start and call.start is None:
            keys = sample_keys(call.images)
            points = feasible.random_points([stream_seed(call.seed, key, 0) for key in keys])
        memory = rule.begin(feasible, points)
        for age in range(self.steps):
            iterate = attacked.judge(points, call.labels)
            ages = np.array([age])
            points, memory = rule.advance(memory, feasible, iterate, attacked.gradient(), ages)
        return points


class _Memory(NamedTuple):
    momentum: Tensor | None
    step_size: Tensor | None  # (rows,), where it differs between samples


class _Steepest:
    """The update rule of `PGD`."""

    def __init__(self, attack: PGD) -> None:
        self.attack = attack
        self.repeats = attack.momentum == 0 and attack.schedule == "constant"

    def begin(self, feasible: FeasibleSet, points: Tensor) -> _Memory:
        momentum = torch.zeros_like(points) if self.attack.momentum else None
        step_size = None
        if self.attack.step_size is None:
            step_size = feasible.radius.flatten() / 4
        return _Memory(momentum, step_size)

    def advance(
        self,
        memory: _Memory,
        feasible: FeasibleSet,
        iterate: Iterate,
        gradient: Tensor,
        ages: np.ndarray,
    ) -> tuple[Tensor, _Memory]:
        attack = self.attack
        step_size = attack.step_size if memory.step_size is None else memory.step_size
        step_size = 0.0 if step_size is None else step_size
        if attack.schedule != "constant":
            step_size = step_size * self._shares(ages, gradient)
        if memory.momentum is not None:
            gradient = _unit_sum(feasible.movable(gradient)) + attack.momentum * memory.momentum
            memory = memory._replace(momentum=gradient)
        return feasible.ascend(iterate.images, gradient, step_size), memory

    def _shares(self, ages: np.ndarray, like: Tensor) -> float | Tensor:
        """Share of the step size for each row; one number where all rows are equally old."""
        steps, share = self.attack.steps, SCHEDULES[self.attack.schedule]
        if (ages == ages[0]).all():
            return share(int(ages[0]), steps)
        shares = np.array([share(age, steps) for age in np.minimum(ages, steps).tolist()])
        return from_host(shares, like)


def _unit_sum(gradient: Tensor) -> Tensor:
    """Scale each gradient to an L1 norm of 1; what is not finite counts as zero."""
    gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    largest = per_sample(gradient.flatten(1).abs().amax(1), gradient)
    gradient = gradient / largest.masked_fill(largest == 0, 1.0)
    # Half precision cannot hold the sum over a large image.
    wide = torch.promote_types(gradient.dtype, torch.float32)
    total = per_sample(gradient.flatten(1).abs().sum(1, dtype=wide), gradient)
    return gradient.to(wide) / total.masked_fill(total == 0, 1.0)


def pgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    target: Tensor | None,
    eps: float = 1 / 255,
    step_size: float | None = 1 / 255,
    steps: int = 2,
    norm: str = "linf",
    generator: torch.Generator | None = None,
    *,
    objective: str | Objective | Callable[..., Tensor] = "ce",
    random_start: bool = True,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    select: str = "last",
    stop_when_fooled: bool = False,
    targeted: bool = False,
    seed: int = 0,
    schedule: str = "constant",
    momentum: float = 0.0,
    n_rivals: int = 9,
    precision: str | None = None,
    compile: bool = False,
    reference: Tensor | None = None,
    mask: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Return adversarial images; `PGD` as a function, with the defaults of adversarial training.

    With ``select="last"`` and one restart nothing is tracked and the last iterate is not
    evaluated: ``steps`` forward and ``steps`` backward passes, and no wait for the device once the
    images have been checked and the start is drawn.

    In a training loop pass a ``generator``. Without one an image that comes back unchanged in the
    next epoch gets the same start again.

    Args:
        model: Callable from images to logits ``(B, K)``, see `PGD`.
        images: Clean images, shape ``(B, ...)``, floating, inside ``bounds``. Not modified.
        target: Shape ``(B,)``, int64: true classes, or with ``targeted`` the wanted ones. What
            other objectives take, see `PGD.__call__`.
        eps: Radius of the ball, in the units of the images.
        step_size: Length of a step; None means ``eps / 4``.
        steps: Gradient steps.
        norm: ``"linf"`` or ``"l2"``.
        generator: Source of this call's seed; it advances, so that calls differ.
        objective: See `PGD`, like the options below.
        random_start: Start at a uniform draw from the ball instead of the clean image.
        restarts: Independent runs; the best image per sample is kept.
        bounds: Lowest and highest pixel value.
        select: Which image is returned.
        stop_when_fooled: End a sample at its first success.
        targeted: Move towards ``target``.
        seed: Seed of the starts unless a generator is passed.
        schedule: Of the step size.
        momentum: Of the gradients.
        n_rivals: Classes that "dlr-targeted" aims at.
        precision: Of the model's passes.
        compile: Run ``torch.compile(model)``.
        reference: See `PGD.__call__`, like the two below.
        mask: Where an image may change.
        start: Where to begin.

    Returns:
        Images like the clean ones in shape, dtype and device, without a graph.

    Raises:
        TypeError: As for `PGD`.
        ValueError: As for `PGD`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        >>> images, target = torch.rand(4, 3, 2, 2), torch.arange(4)
        >>> generator = torch.Generator().manual_seed(0)
        >>> images_adv = pgd(model, images, target, eps=1 / 255, generator=generator)
        >>> bool((images_adv.double() - images.double()).abs().max() <= 1 / 255)
        True
    """
    attack = PGD(
        eps=eps,
        steps=steps,
        step_size=step_size,
        norm=norm,
        objective=objective,
        random_start=random_start,
        restarts=restarts,
        bounds=bounds,
        select=select,
        stop_when_fooled=stop_when_fooled,
        targeted=targeted,
        seed=seed,
        schedule=schedule,
        momentum=momentum,
        n_rivals=n_rivals,
        precision=precision,
        compile=compile,
    )
    call_options = {"reference": reference, "mask": mask, "start": start, "generator": generator}
    several = restarts > 1 or attack._resolved().reference == "rival"
    if select != "last" or several or stop_when_fooled:
        return attack(model, images, target, **call_options).images
    with undisturbed(model):
        return attack._last_iterate(attack._check_call(model, images, target, **call_options))
