"""Attacks of other libraries, run on the same model, in the same ball, judged by the same rule.

Neither library is imported before an attack of it runs.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from calibclip._checks import check_choice, check_count, check_flag, check_target, describe, wrong
from calibclip.attacks._arguments import (
    check_bounds,
    check_eps,
    check_found,
    check_images,
    draw_seed,
)
from calibclip.attacks._model import AttackedModel, attacked_by_margin, borrowed
from calibclip.attacks.result import AttackResult, nothing_to_attack, warn
from calibclip.attacks.threat import NORMS, FeasibleSet, per_sample

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Foreign:
    r"""Run an attack that is not of this package, and bring its images back into the ball.

    ``attack(model, images, target)`` returns images. `from_torchattacks` and `from_foolbox` make
    one of those libraries' attacks; any function will do.

    **What the attack gets to see** of the model is an ``nn.Module`` that maps images to logits and
    has one parameter of its own, frozen, which tells the device. The model behind it, a module in
    eval mode or any callable, cannot be changed through it, and gradients flow to the images only.
    What reads layers or weights of the model does not work, nor do second derivatives.

    **What comes back.** Other libraries leave the ball by float rounding, or clip after the
    projection. The images are projected onto the exact ball and box of `FeasibleSet`, and the model
    judges them again. An image with an entry that is NaN or infinite is replaced by the clean one.

    **Randomness.** The global generators of torch, NumPy and Python are seeded with ``seed`` while
    the attack runs, and have their states back afterwards. (Not so of a CUDA device that nobody has
    used yet: there is no state to keep.) Unlike attacks of this package, others draw for the batch
    as a whole: the same image in another batch may fare differently.

    Args:
        attack: Callable ``(model, images, target) -> images``.
        eps: Radius of the ball, in the units of the images. It must be told to ``attack`` too.
        norm: ``"linf"`` or ``"l2"``.
        bounds: Lowest and highest pixel value.
        name: What tables call the attack.
        targeted: The attack moves towards ``target``, and succeeds if that is predicted.
        seed: Seed of the global generators, >= 0, unless a generator is passed.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Example:
        >>> def brighten(model, images, target):
        ...     return images + 0.2
        >>> attack = Foreign(brighten, eps=0.1, name="brighten")
        >>> weight = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> images, target = torch.tensor([[0.5, 0.4]]), torch.tensor([1])
        >>> result = attack(lambda x: (x - 0.6).relu() @ weight, images, target)
        >>> result.images
        tensor([[0.6000, 0.5000]])
    """

    attack: Attack
    eps: float
    norm: str = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)
    name: str = "foreign"
    targeted: bool = field(default=False, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.attack):
            expected = "a callable (model, images, target) -> images"
            raise TypeError(wrong("attack", expected, describe(self.attack)))
        check_choice("norm", self.norm, NORMS)
        object.__setattr__(self, "bounds", check_bounds(self.bounds))
        object.__setattr__(self, "eps", check_eps(self.eps, self.norm, self.bounds))
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(wrong("name", "a string with at least one letter", describe(self.name)))
        check_flag("targeted", self.targeted)
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
            The images and their success. ``loss`` is the margin, the lead of the best wrong class.
            ``steps_to_success`` is -1, as it is not known. Passes are counted, the judgement at the
            end included.

        Raises:
            TypeError: An argument, or what the attack or the model returned, has the wrong type.
            ValueError: Images outside ``bounds``, classes out of range, or a wrong shape.

        Warns:
            AttackWarning: Images came back with entries that are NaN or infinite.
        """
        clean = check_images(images, self.bounds)
        target = check_target(target, len(clean), None, clean.device).clone()
        seed = draw_seed(generator, self.seed)
        feasible = FeasibleSet(clean, self.eps, self.norm, self.bounds)
        attacked = attacked_by_margin(model, target, targeted=self.targeted)
        if len(clean) == 0:
            return nothing_to_attack(clean)
        with borrowed(model), _own_random_state(seed):
            found = self.attack(_Box(attacked, clean), clean.clone(), target.clone())
        found = feasible.project(self._finite(check_found(found, clean, finite=False), clean))
        loss, fooled = attacked.verdict(found, target)
        return AttackResult(
            images=found,
            success=fooled,
            loss=loss,
            steps_to_success=torch.full_like(target, -1),
            n_forward=attacked.n_forward,
            n_backward=attacked.n_backward,
            forward_images=attacked.forward_images,
            backward_images=attacked.backward_images,
        )

    def _finite(self, found: Tensor, clean: Tensor) -> Tensor:
        """Return the clean image in place of one that is not finite."""
        broken = ~found.flatten(1).isfinite().all(1)
        count = int(broken.sum())
        if count:
            got = f"NaN or infinite entries in {count} of {len(found)}"
            remedy = "these stay clean and do not count as robust"
            warn(wrong(self.name, "finite images", got, remedy))
        return torch.where(per_sample(broken, found), clean.to(found.dtype), found)


def from_torchattacks(
    cls: Callable[..., Any],
    eps: float,
    norm: str = "linf",
    *,
    targeted: bool = False,
    **options: Any,
) -> Foreign:
    """Make an attack of torchattacks run like one of this package.

    torchattacks builds an attack for a model: ``cls(model, eps=eps, **options)``. Here that happens
    at each call. Where the constructor takes a ``norm`` it gets the one given here.

    Args:
        cls: A class of torchattacks.
        eps: Radius of the ball.
        norm: ``"linf"`` or ``"l2"``.
        targeted: Move towards the target (``set_mode_targeted_by_label``).
        **options: For the constructor.

    Returns:
        The attack.

    Raises:
        TypeError: ``cls`` is not a class, or its constructor takes no such option.
        ValueError: ``norm`` is not that of the class.

    Example:
        >>> import torchattacks
        >>> attack = from_torchattacks(torchattacks.PGD, eps=8 / 255, alpha=2 / 255, steps=10)
        >>> attack.name
        'torchattacks.PGD'

    References:
        https://github.com/Harry24k/adversarial-attacks-pytorch
    """
    if not inspect.isclass(cls):
        remedy = "pass the class itself: it is built anew for each model"
        raise TypeError(wrong("cls", "a class of torchattacks", type(cls).__name__, remedy))
    check_choice("norm", norm, NORMS)
    taken = inspect.signature(cls).parameters
    if "norm" not in taken:
        # The library does not tell: what is no L2 attack by its name is bounded pixel by pixel.
        l2 = "L2" in cls.__name__ or cls.__name__ in ("CW", "DeepFool")
        if (norm == "l2") != l2:
            expected = f"{'l2' if l2 else 'linf'!r} for {cls.__name__}"
            raise ValueError(wrong("norm", expected, repr(norm)))
    known = {"eps": eps, "norm": {"linf": "Linf", "l2": "L2"}[norm]}
    options = {**{name: value for name, value in known.items() if name in taken}, **options}
    try:
        inspect.signature(cls).bind(None, **options)
    except TypeError as error:
        raise TypeError(wrong("options", f"those of {cls.__name__}", str(error))) from error
    attack = _TorchAttack(cls, targeted, tuple(sorted(options.items())))
    return Foreign(attack, eps, norm, name=f"torchattacks.{cls.__name__}", targeted=targeted)


def from_foolbox(
    attack: Any, eps: float, *, bounds: tuple[float, float] = (0.0, 1.0), targeted: bool = False
) -> Foreign:
    """Make an attack of foolbox run like one of this package.

    The norm is that of the attack's distance. Of the three things foolbox returns the images
    clipped to the ball are taken.

    Args:
        attack: An instance of an attack of foolbox, for the L-infinity or L2 distance.
        eps: Radius of the ball.
        bounds: Lowest and highest pixel value.
        targeted: Move towards the target (``TargetedMisclassification``).

    Returns:
        The attack.

    Raises:
        TypeError: ``attack`` is a class, or not callable.
        ValueError: The attack has another distance, or none.

    Example:
        >>> import foolbox
        >>> from_foolbox(foolbox.attacks.L2PGD(steps=10), eps=0.5).norm
        'l2'

    References:
        https://github.com/bethgelab/foolbox
    """
    if not callable(attack) or inspect.isclass(attack):
        remedy = "pass an instance, such as foolbox.attacks.LinfPGD(steps=50)"
        raise TypeError(wrong("attack", "an attack of foolbox", describe(attack), remedy))
    distance = getattr(attack, "distance", None)
    norm = {float("inf"): "linf", 2: "l2"}.get(getattr(distance, "p", None))
    if norm is None:
        expected = "an attack of foolbox for the L-infinity or L2 distance"
        raise ValueError(wrong("attack", expected, f"one for {distance}"))
    name = f"foolbox.{type(attack).__name__}"
    run = _FoolboxAttack(attack, eps, bounds, targeted)
    return Foreign(run, eps, norm, bounds, name, targeted=targeted)


@dataclass(frozen=True)
class _TorchAttack:
    cls: Callable[..., Any]
    targeted: bool
    options: tuple[tuple[str, Any], ...]

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        attack = self.cls(model, **dict(self.options))
        if self.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        return attack(images, target)


@dataclass(frozen=True)
class _FoolboxAttack:
    attack: Any
    eps: float
    bounds: tuple[float, float]
    targeted: bool

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        foolbox = importlib.import_module("foolbox")
        criteria = foolbox.criteria
        criterion = (
            criteria.TargetedMisclassification if self.targeted else criteria.Misclassification
        )
        borrowed = foolbox.PyTorchModel(model, bounds=self.bounds, device=images.device)
        _, clipped, _ = self.attack(borrowed, images, criterion(target), epsilons=self.eps)
        return clipped


class _Box(nn.Module):
    """The model as other libraries see it: nothing but images in and logits out."""

    def __init__(self, attacked: AttackedModel, images: Tensor) -> None:
        super().__init__()
        self.device_and_dtype = nn.Parameter(images.new_zeros(()), requires_grad=False)
        self._attacked = attacked
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits; a backward pass ends at the images."""
        if not (torch.is_grad_enabled() and images.requires_grad):
            with torch.no_grad():
                return self._attacked.outputs(images)
        points = images.detach().requires_grad_()
        outputs = self._attacked.outputs(points)
        if not outputs.requires_grad:
            return outputs
        return _Bridge.apply(images, (points, outputs, self._attacked))


class _Bridge(torch.autograd.Function):
    """From the graph inside the box to the one outside: the slope at the images, nothing else."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, inside: tuple[Tensor, Tensor, AttackedModel]) -> Tensor:
        ctx.inside = inside
        return inside[1].detach()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, slope: Tensor
    ) -> tuple[Tensor, None]:
        points, outputs, attacked = ctx.inside
        attacked.n_backward += 1
        attacked.backward_images += len(points)
        # The outer graph decides when the inner one is freed: some attacks go back several times.
        (gradient,) = torch.autograd.grad(outputs, points, slope, retain_graph=True)
        return gradient, None


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seed the global random generators, and give each its own state back at the end."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    # The global states are what other libraries draw from.
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
