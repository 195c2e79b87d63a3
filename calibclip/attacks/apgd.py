"""Auto-PGD: projected gradient ascent that chooses its own step size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calibclip._checks import check_flag
from calibclip.attacks._attack import GradientAttack
from calibclip.attacks._model import Iterate
from calibclip.attacks._rows import Rule
from calibclip.attacks.objectives import Objective, at_least_float32, resolve_objective
from calibclip.attacks.threat import FeasibleSet, from_host, per_sample

# Share of the new direction in a step; the rest goes on as the step before.
_MIXING = 0.75
# A window in which no more than this share of the steps raised the loss ends with half the step.
_ENOUGH_INCREASES = 0.75


@dataclass(frozen=True)
class APGD(GradientAttack):
    r"""Auto-PGD, the step-size-free attack of AutoAttack.

    .. math::
        u_k = P(x_k + s \, d(g_k)), \quad
        x_{k+1} = P(x_k + a (u_k - x_k) + (1 - a)(x_k - x_{k-1})), \quad a = 0.75

    with ``a = 1`` in the first step, which starts on the surface of the ball with
    :math:`s = 2\varepsilon`. At checkpoints, after windows of steps that get shorter, each sample
    halves its step and returns to its best point if at most 75 % of the window's steps raised the
    loss, or if the step was not halved at the checkpoint before and the best loss has not risen
    since. The checkpoints are the official code's, which for few steps are not the paper's.

    Which image is returned, the random streams, ``stop_when_fooled``, and what happens to the model
    are as for `PGD`; so are the arguments of a call. ``steps + 1`` forward and ``steps`` backward
    passes per attempt.

    **APGD-T** of AutoAttack is ``objective="dlr-targeted"``: one attempt for each of the
    ``n_rivals`` classes ranked next on the clean image, success being any wrong class. With fewer
    than ``n_rivals + 1`` classes it aims at each other class.

    **Few classes.** "dlr" needs three classes and "dlr-targeted" four; with fewer they fall back to
    the margin (to that class), which has the same sign.

    Args:
        eps: Radius of the ball, >= 0, in the units of the images; the call can override it with
            one radius per image.
        steps: Gradient steps, >= 0.
        norm: ``"linf"`` or ``"l2"``.
        objective: ``"ce"``, ``"dlr"``, ``"dlr-targeted"``, or whatever `PGD` takes.
        restarts: Independent runs, >= 1; the best image per sample is kept.
        bounds: Lowest and highest pixel value.
        select: ``"worst"``, ``"last"`` or ``"first_success"``, see `PGD`.
        seed: Seed of the starts, >= 0, unless a generator is passed.
        compat: Reproduce two properties of the official code: in the first step it compares the
            loss with 0 instead of that at the start, and its cross-entropy is the textbook form,
            whose gradient loses its largest part where the confidence rounds to 1.
        stop_when_fooled: End a sample at its first success. For evaluation.
        targeted: Move towards ``target`` instead of away from it.
        n_rivals: Classes that "dlr-targeted" aims at.
        precision: See `PGD`.
        compile: See `PGD`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> attack = APGD(eps=0.1, steps=20, objective="margin")
        >>> result = attack(lambda x: x @ weight, torch.tensor([[0.5, 0.4]]), torch.tensor([1]))
        >>> result.images, result.success
        (tensor([[0.4000, 0.5000]]), tensor([True]))

    References:
        Croce and Hein (2020), Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks, section 3, https://arxiv.org/abs/2003.01690
    """

    eps: float
    steps: int = 100
    norm: str = "linf"
    objective: str | Objective | Callable[..., Tensor] = "ce"
    restarts: int = 1
    bounds: tuple[float, float] = (0.0, 1.0)
    select: str = "worst"
    seed: int = 0
    compat: bool = False
    _: KW_ONLY
    stop_when_fooled: bool = False
    targeted: bool = False
    n_rivals: int = 9
    precision: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        self._check_options()
        check_flag("compat", self.compat)

    def _resolved(self) -> Objective:
        objective = resolve_objective(self.objective)
        if self.compat and objective == resolve_objective("ce"):
            return replace(objective, loss=_textbook_cross_entropy)
        return objective

    def _random_points(self, feasible: FeasibleSet, seeds: list[int]) -> Tensor:
        return feasible.random_points(seeds, surface=True)

    def _rule(self) -> Rule:
        return _Adaptive(self)


def _textbook_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float32(logits), target, reduction="none")


def checkpoints(steps: int) -> dict[int, int]:
    """Return the checkpoints of a run, as steps taken, with the length of the window before each.

    Example:
        >>> list(checkpoints(100))
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    window = max(int(0.22 * steps), 1)
    shrink, shortest = max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    result, step = {}, window
    while step <= steps:
        result[step] = window
        window = max(window - shrink, shortest)
        step += window
    return result


class _Memory(NamedTuple):
    """What `APGD` remembers of each row."""

    before: Tensor  # the point before the present one
    best: Tensor  # the point of highest loss, with its gradient
    best_gradient: Tensor
    best_loss: Tensor
    loss_before: Tensor
    step_size: Tensor
    increases: Tensor  # of the loss in this window
    best_at_check: Tensor  # the highest loss at the last checkpoint
    halved: Tensor  # at the last checkpoint


class _Adaptive:
    """The update rule of `APGD`."""

    repeats = False

    def __init__(self, attack: APGD) -> None:
        self.compat = attack.compat
        self.window = np.zeros(attack.steps + 2, dtype=np.int64)
        for step, window in checkpoints(attack.steps).items():
            self.window[step] = window

    def begin(self, feasible: FeasibleSet, points: Tensor) -> _Memory:
        radius = feasible.radius.flatten()
        lowest = torch.full_like(radius, -torch.inf)
        return _Memory(
            before=points,
            best=points,
            best_gradient=torch.zeros_like(points),
            best_loss=lowest,
            loss_before=lowest,
            step_size=2 * radius,
            increases=torch.zeros_like(radius),
            best_at_check=lowest,
            # Until the second checkpoint there is no best loss of an earlier one to compare with.
            halved=torch.ones_like(radius, dtype=torch.bool),
        )

    def advance(
        self,
        memory: _Memory,
        feasible: FeasibleSet,
        iterate: Iterate,
        gradient: Tensor,
        ages: np.ndarray,
    ) -> tuple[Tensor, _Memory]:
        ages = np.minimum(ages, len(self.window) - 1)
        memory = self._take_in(memory, iterate, gradient, ages)
        points = iterate.images
        if self.window[ages].any():
            memory, points, gradient = self._check(memory, points, gradient, ages)
        reached = feasible.ascend(points, gradient, memory.step_size)
        # In half precision the sum would lose digits before the projection rounds the point.
        wide = torch.promote_types(points.dtype, torch.float32)
        now, ahead, before = (x.to(wide) for x in (points, reached, memory.before))
        mixed = now + _MIXING * (ahead - now) + (1 - _MIXING) * (now - before)
        begun = per_sample(_flags(ages == 0, points), points)
        moved = torch.where(begun, reached, feasible.project(mixed))
        return moved, memory._replace(before=points)

    def _take_in(
        self, memory: _Memory, iterate: Iterate, gradient: Tensor, ages: np.ndarray
    ) -> _Memory:
        """Count an increase of the loss, and keep the best point."""
        loss = iterate.loss.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        compared = memory.loss_before
        if self.compat:
            # The official code keeps no loss of the start: its place in the history reads 0.
            compared = compared.masked_fill(_flags(ages == 1, compared), 0.0)
        # Only steps count: at age 0 there is no earlier loss.
        increased = (loss > compared) & _flags(ages > 0, compared)
        better = (loss > memory.best_loss) | _flags(ages == 0, compared)
        wide = per_sample(better, gradient)
        return memory._replace(
            best=torch.where(wide, iterate.images, memory.best),
            best_gradient=torch.where(wide, gradient, memory.best_gradient),
            best_loss=torch.where(better, loss, memory.best_loss),
            loss_before=loss,
            increases=memory.increases + increased,
            best_at_check=torch.where(_flags(ages == 0, loss), loss, memory.best_at_check),
        )

    def _check(
        self, memory: _Memory, points: Tensor, gradient: Tensor, ages: np.ndarray
    ) -> tuple[_Memory, Tensor, Tensor]:
        """Halve the step of rows at a checkpoint that got on badly, and send them to their best."""
        window = from_host(self.window[ages], points)
        due = window > 0
        oscillates = memory.increases <= _ENOUGH_INCREASES * window
        stalls = ~memory.halved & (memory.best_at_check >= memory.best_loss)
        halve = due & (oscillates | stalls)
        wide = per_sample(halve, points)
        memory = memory._replace(
            step_size=torch.where(halve, memory.step_size / 2, memory.step_size),
            increases=memory.increases.masked_fill(due, 0.0),
            best_at_check=torch.where(due, memory.best_loss, memory.best_at_check),
            halved=torch.where(due, halve, memory.halved),
        )
        points = torch.where(wide, memory.best, points)
        return memory, points, torch.where(wide, memory.best_gradient, gradient)


def _flags(flags: np.ndarray, like: Tensor) -> Tensor:
    """Flags known on the host as a tensor, a scalar where they all agree."""
    if flags.all() or not flags.any():
        return torch.full((1,), bool(flags.all()), device=like.device)
    return from_host(flags, like)
