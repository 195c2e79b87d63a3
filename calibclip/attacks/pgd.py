"""Projected gradient descent: repeat a steepest step and a projection, keep the point asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calibclip._checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_target,
    describe,
    wrong,
)
from calibclip.attacks._search import (
    AttackedModel,
    Iterate,
    check_images,
    draw_seed,
    merge,
    undisturbed,
)
from calibclip.attacks.objectives import Objective, at_least_float32, resolve_objective
from calibclip.attacks.threat import NORMS, FeasibleSet, per_sample, sample_keys, stream_seed

SELECTIONS = ("worst", "last", "first_success")


@dataclass(frozen=True, eq=False, repr=False)
class AttackResult:
    """What an attack found, one entry per sample.

    Attributes:
        images: Adversarial images: shape, dtype and device of the clean ones. No graph attached.
        success: Whether the returned image is misclassified (targeted: classified as the target),
            shape ``(B,)``, bool. An image whose loss is NaN is no success.
        loss: Objective at the returned image, shape ``(B,)``, float32 or float64; larger is
            better for the attack, in targeted mode too.
        steps_to_success: Steps until the first successful iterate, shape ``(B,)``, int64: 0 if
            the start was one, -1 if there was none. With restarts: of the first that succeeded.
        n_forward: Forward passes run on the batch.
        n_backward: Backward passes run on the batch.
    """

    images: Tensor
    success: Tensor
    loss: Tensor
    steps_to_success: Tensor
    n_forward: int
    n_backward: int

    def __repr__(self) -> str:
        batch = len(self.success)
        fooled = 100 * int(self.success.sum()) / max(batch, 1)
        return (
            f"AttackResult({batch} images, {fooled:.1f} % fooled, "
            f"{self.n_forward} forward, {self.n_backward} backward)"
        )


def _nothing_to_attack(images: Tensor) -> AttackResult:
    """Return the result for an empty batch, which no model needs to see."""
    loss = at_least_float32(images.new_empty(0))
    return AttackResult(
        images=images,
        success=loss > 0,
        loss=loss,
        steps_to_success=loss.long(),
        n_forward=0,
        n_backward=0,
    )


@dataclass(frozen=True)
class PGD:
    r"""Projected gradient descent, the standard white-box attack.

    From a start in the ball around the clean image ``x``, repeat ``steps`` times

    .. math:: x_{k+1} = P(x_k + s \, d(\nabla_{x_k} f(z(x_k), y)))

    with ``f`` the objective to maximise, ``z`` the model, ``d`` the steepest direction in the
    norm (``sign(g)`` or ``g / ||g||_2``) and ``P`` the projection on ball and box. It runs
    ``steps`` backward and ``steps + 1`` forward passes per restart. The result is within ``eps``
    and ``bounds`` exactly, not just up to float32 rounding.

    **Which image is returned**, per sample (it decides calibration numbers on the result):

    - ``"worst"``: the misclassified iterate of highest loss; if none, the iterate of highest loss.
    - ``"first_success"``: the first misclassified iterate, just across the decision boundary; if
      none, the iterate of highest loss.
    - ``"last"``: the last iterate, even if an earlier one was misclassified.

    The start is an iterate. The clean image (the start without ``random_start``) is returned only
    if it is the sole misclassified iterate, ``steps`` is 0, or no later iterate has a loss that is
    a number. A success found by any restart is kept.

    **Randomness.** The start of a sample depends on ``seed``, its own pixels, the restart and the
    kind of device only: not on the rest of the batch nor on the global random state. The same image
    therefore gets the same start in every call. For training pass a ``generator``: each call then
    draws its seed from it.

    **The model** is any callable from images ``(B, ...)`` to logits ``(B, K)``. An ``nn.Module``
    runs in eval mode with frozen parameters and is restored afterwards, also after an error. A
    plain function runs as it is: it accumulates no ``.grad``, but batch norm left in train mode
    inside it would update its statistics.

    Args:
        eps: Radius of the ball, >= 0, in the units of the images.
        steps: Gradient steps, >= 0. With 0 the projected start is evaluated.
        step_size: Length of a step, > 0; None means ``eps / 4``.
        norm: ``"linf"`` or ``"l2"``.
        objective: ``"ce"``, ``"margin"``, or any callable ``(logits, target) -> (B,)``.
        random_start: Start at a uniform draw from the ball instead of the clean image.
        restarts: Independent runs, >= 1; the best image per sample is kept.
        bounds: Lowest and highest pixel value, rounded to the dtype of the images.
        select: ``"worst"``, ``"last"`` or ``"first_success"``, see above.
        stop_when_fooled: Freeze a sample at its first success, and end when all have one. For
            evaluation: it costs one wait for the device per step.
        targeted: Move towards ``target`` instead of away from it: minimise the objective.
        seed: Seed of the starts, >= 0, unless a generator is passed.

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
        section 2.1, https://arxiv.org/abs/1706.06083
    """

    eps: float
    steps: int = 10
    step_size: float | None = None
    norm: str = "linf"
    objective: str | Objective = "ce"
    random_start: bool = True
    restarts: int = 1
    bounds: tuple[float, float] = (0.0, 1.0)
    select: str = "worst"
    stop_when_fooled: bool = False
    targeted: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        # NumPy scalars become Python's: they would take over the arithmetic with tensors.
        object.__setattr__(self, "eps", check_number("eps", self.eps, at_least=0))
        object.__setattr__(self, "steps", check_count("steps", self.steps, at_least=0))
        if self.step_size is not None:
            step_size = check_number("step_size", self.step_size, above=0)
            object.__setattr__(self, "step_size", step_size)
        check_choice("norm", self.norm, NORMS)
        resolve_objective(self.objective)
        object.__setattr__(self, "restarts", check_count("restarts", self.restarts, at_least=1))
        if not isinstance(self.bounds, tuple) or len(self.bounds) != 2:
            raise TypeError(wrong("bounds", "a tuple (low, high)", describe(self.bounds)))
        low, high = (check_number("bounds", bound) for bound in self.bounds)
        if not low < high:
            raise ValueError(wrong("bounds", "(low, high) with low < high", (low, high)))
        object.__setattr__(self, "bounds", (low, high))
        check_choice("select", self.select, SELECTIONS)
        for flag in ("random_start", "stop_when_fooled", "targeted"):
            check_flag(flag, getattr(self, flag))
        object.__setattr__(self, "seed", check_count("seed", self.seed, at_least=0))

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        target: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: Callable from images to logits ``(B, K)``.
            images: Clean images, shape ``(B, ...)``, floating, inside ``bounds``. Not modified.
            target: Shape ``(B,)``, int64: true classes, or with ``targeted`` the wanted ones.
            generator: Source of this call's seed; it advances, so that calls differ.

        Returns:
            The chosen images with their success and loss, and the number of passes.

        Raises:
            TypeError: An argument, or what the model returned, has the wrong type.
            ValueError: Images outside ``bounds``, classes out of range, a wrong shape, or logits
                that do not depend on the images.
        """
        with undisturbed(model):
            attacked, feasible, starts = self._begin(model, images, target, generator)
            clean = feasible.images
            if len(clean) == 0:
                return _nothing_to_attack(clean)
            never = torch.full((len(clean),), -1, device=clean.device)
            best, steps_to_success = self._climb(attacked, feasible, next(starts), None, never)
            for points in starts:
                if self.stop_when_fooled:
                    if bool(best.fooled.all()):
                        break
                    points = torch.where(per_sample(best.fooled, points), best.images, points)
                best, steps_to_success = self._climb(
                    attacked, feasible, points, best, steps_to_success
                )
            return AttackResult(
                images=best.images,
                success=best.fooled,
                loss=best.loss,
                steps_to_success=steps_to_success,
                n_forward=attacked.n_forward,
                n_backward=attacked.n_backward,
            )

    def _climb(
        self,
        attacked: AttackedModel,
        feasible: FeasibleSet,
        points: Tensor,
        best: Iterate | None,
        steps_to_success: Tensor,
    ) -> tuple[Iterate, Tensor]:
        """Run once from the given points; return the best iterate so far and the first success."""
        step = 0
        while True:
            last = step == self.steps
            with torch.set_grad_enabled(not last):
                iterate = attacked.judge(points, clean=step == 0 and not self.random_start)
            first = iterate.fooled & (steps_to_success < 0)
            steps_to_success = steps_to_success.masked_fill(first, step)
            if last or (self.stop_when_fooled and bool(iterate.fooled.all())):
                return merge(iterate.detach(), best, self.select), steps_to_success
            if self.select != "last":
                best = merge(iterate.detach(), best, self.select)
            points = self._advance(attacked, feasible, iterate)
            step += 1

    def _begin(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        target: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[AttackedModel, FeasibleSet, Iterator[Tensor]]:
        """Check the arguments; return the model, the feasible set and the starts to come."""
        if not callable(model):
            raise TypeError(wrong("model", "a callable from images to logits", describe(model)))
        clean = check_images(images, self.bounds)
        # How many classes there are the model will tell; the rest can be checked now.
        check_target(target, len(clean), None, clean.device)
        seed = draw_seed(generator, self.seed)
        attacked = AttackedModel(model, target, resolve_objective(self.objective), self.targeted)
        feasible = FeasibleSet(clean, self.eps, self.norm, self.bounds)
        return attacked, feasible, self._starts(feasible, seed)

    def _starts(self, feasible: FeasibleSet, seed: int) -> Iterator[Tensor]:
        """Yield the starting points of one restart after the other."""
        if not self.random_start:
            yield from [feasible.images] * self.restarts
            return
        keys = sample_keys(feasible.images)
        for restart in range(self.restarts):
            yield feasible.random_points([stream_seed(seed, key, restart) for key in keys])

    def _advance(self, attacked: AttackedModel, feasible: FeasibleSet, iterate: Iterate) -> Tensor:
        """Return the next points."""
        step_size = self.eps / 4 if self.step_size is None else self.step_size
        gradient = attacked.gradient(iterate)
        points = iterate.images.detach()
        moved = feasible.ascend(points, gradient, step_size)
        if self.stop_when_fooled:
            return torch.where(per_sample(iterate.fooled, points), points, moved)
        return moved


def pgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    target: Tensor,
    eps: float = 1 / 255,
    step_size: float | None = 1 / 255,
    steps: int = 2,
    norm: str = "linf",
    generator: torch.Generator | None = None,
    *,
    objective: str | Objective = "ce",
    random_start: bool = True,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    select: str = "last",
    stop_when_fooled: bool = False,
    targeted: bool = False,
    seed: int = 0,
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
        target: Shape ``(B,)``, int64: true classes, or with ``targeted`` the wanted ones.
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
        stop_when_fooled: Freeze a sample at its first success.
        targeted: Move towards ``target``.
        seed: Seed of the starts unless a generator is passed.

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
    )
    if select != "last" or restarts > 1:
        return attack(model, images, target, generator=generator).images
    with undisturbed(model):
        attacked, feasible, starts = attack._begin(model, images, target, generator)
        if len(feasible.images) == 0:
            return feasible.images
        points = next(starts)
        for _ in range(steps):
            points = attack._advance(attacked, feasible, attacked.judge(points))
        return points
