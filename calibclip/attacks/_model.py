"""The model under attack: borrowed, run, judged and differentiated, and every pass counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calibclip._checks import check_target, describe, wrong
from calibclip._modules import evaluation_mode, frozen, without_ddp
from calibclip.attacks.objectives import (
    Objective,
    at_least_float32,
    check_multilabel,
    misclassified,
    resolve_objective,
)
from calibclip.attacks.threat import per_sample

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Without autocast even where one is around the call; attacks confirm their successes so.
FULL = "full"


@contextmanager
def undisturbed(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Open a context in which gradients flow to the images, and leave the model as it was.

    A module runs in eval mode with frozen parameters, so that autograd neither computes nor stores
    anything for them.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if isinstance(model, nn.Module):
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(frozen(model))
        yield


@contextmanager
def borrowed(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`undisturbed`, for attacks of others: they may also write to the ``.grad`` of parameters."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        with undisturbed(model):
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


class Iterate(NamedTuple):
    """Points the model has judged, without a graph. ``rank``: the loss as selection sees it."""

    images: Tensor
    loss: Tensor
    fooled: Tensor
    rank: Tensor


class Labels(NamedTuple):
    """What goes with each point: the target, and what else the objective compares with."""

    target: Tensor | None
    reference: Tensor | None


class _Tape(NamedTuple):
    """What the backward pass needs: the loss was computed on ``logits``, a copy of ``outputs``."""

    points: Tensor
    outputs: Tensor
    logits: Tensor
    loss: Tensor


class AttackedModel:
    """The attacked model: judges points, differentiates the objective, counts passes."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        objective: Objective,
        check_classes: Callable[[int], object],
        *,
        targeted: bool = False,
        precision: str | None = None,
        compiled: bool = False,
    ) -> None:
        if not callable(model):
            raise TypeError(wrong("model", "a callable from images to logits", describe(model)))
        # The number of classes is known only once the model has run.
        self._check_classes = check_classes
        model = without_ddp(model)
        # One graph for each batch size: the search sees to it that there are few.
        self.model = torch.compile(model, dynamic=False) if compiled else model
        self.objective, self.targeted, self.precision = objective, targeted, precision
        self.n_forward = self.n_backward = self.forward_images = self.backward_images = 0
        self._probabilities: Tensor | None = None
        self._saturated: Tensor | int = 0
        self._observed = 0
        self._zeros: tuple[Tensor | int, Tensor | int] = (0, 0)
        self._tape: _Tape | None = None

    def outputs(self, points: Tensor) -> Tensor:
        """Run the model, check the shape of what comes back, and count the pass."""
        with self._autocast(points.device):
            outputs = self.model(points)
        self.n_forward += 1
        self.forward_images += len(points)
        expected = f"logits of shape (B, K) with B = {len(points)}"
        if not isinstance(outputs, Tensor):
            # The name of the type alone: a tuple of feature maps would print all of them.
            got = type(outputs).__name__
            raise TypeError(wrong("model", expected, got, "return the logits only"))
        if not outputs.is_floating_point():
            raise TypeError(wrong("model", expected, describe(outputs)))
        if outputs.ndim != 2 or len(outputs) != len(points):
            raise ValueError(wrong("model", expected, describe(outputs)))
        if self.n_forward == 1:
            self._check_classes(outputs.shape[1])
        return outputs

    def judge(self, points: Tensor, labels: Labels) -> Iterate:
        """Run the model on points; with gradients enabled, `gradient` can be called next."""
        points = points.detach().requires_grad_(torch.is_grad_enabled())
        outputs = self.outputs(points)
        # A copy in at least float32: the gradient of the loss is a probability per class, which
        # float16 rounds to zero long before float32 does.
        logits = at_least_float32(outputs.detach()).requires_grad_(torch.is_grad_enabled())
        loss = self._loss(logits, labels)
        # The search that follows may free the tape only after the model has run again.
        self._tape = _Tape(points, outputs, logits, loss) if points.requires_grad else None
        logits, loss = logits.detach(), loss.detach()
        # A model that breaks down is no adversarial example: NaN is no success and ranks last.
        broken = loss.isnan()
        fooled = self._fooled(logits, labels) & ~broken
        return Iterate(points.detach(), loss, fooled, loss.masked_fill(broken, -torch.inf))

    def verdict(
        self, points: Tensor, target: Tensor, batch_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return loss and success of points, in full precision; a loss of NaN stays NaN."""
        if len(points) == 0:
            return at_least_float32(points.new_empty(0)), target.bool()
        size = batch_size or len(points)
        pairs = zip(points.split(size), target.split(size), strict=True)
        with (
            undisturbed(self.model),
            torch.no_grad(),
            torch.autocast(points.device.type, enabled=False),
        ):
            judged = [self.judge(part, Labels(labels, None)) for part, labels in pairs]
        losses, fooled = ([getattr(each, name) for each in judged] for name in ("loss", "fooled"))
        return torch.cat(losses), torch.cat(fooled)

    def gradient(self) -> Tensor:
        """Differentiate the objective at the points judged last, each sample on its own.

        A step depends on the direction of a sample's gradient only, so each is scaled by a power
        of two that brings the largest entry at the logits near 1: exact, and nothing underflows
        on its way back through a half-precision model.
        """
        tape, self._tape = self._tape, None
        gradient = None
        if tape is not None and tape.outputs.requires_grad:
            # Each operation goes back in the dtype it went forward in; an autocast around the call
            # would lower some.
            with torch.autocast(tape.points.device.type, enabled=False):
                slope = _near_one(_slope(tape)).to(tape.outputs.dtype)
                (gradient,) = torch.autograd.grad(
                    tape.outputs, tape.points, slope, allow_unused=True
                )
        if gradient is None:
            raise ValueError(
                wrong(
                    "model",
                    "logits that depend on the images through autograd",
                    "logits without a gradient",
                    "remove no_grad, detach or argmax from the model",
                )
            )
        self.n_backward += 1
        self.backward_images += len(gradient)
        return gradient

    def observe(self, labels: Labels) -> None:
        """Note signs of a blind attack in the logits judged last; waits for no device."""
        if self._tape is None or not is_class_target(labels.target, len(self._tape.logits)):
            return
        logits = self._tape.logits.detach()
        if self._probabilities is None:
            adds_up = (logits.sum(1) - 1).abs() < 1e-3
            self._probabilities = (adds_up & (logits >= 0).all(1)).all()
        # The confidence rounds to 1: the other classes have all but vanished from the logits.
        self._saturated = self._saturated + (logits.softmax(1).amax(1) == 1).sum()
        self._observed += len(logits)

    def count_zeros(self, gradient: Tensor) -> None:
        """Count the zeros in those of the gradients, shape ``(B, D)``, that are not all zero."""
        empty = gradient == 0
        some = ~empty.all(1)
        zeros, entries = self._zeros
        self._zeros = (
            zeros + (empty.sum(1) * some).sum(),
            entries + some.sum() * gradient.shape[1],
        )

    def saw_probabilities(self) -> bool:
        """Whether the first outputs were probabilities rather than logits."""
        return self._probabilities is not None and bool(self._probabilities)

    def saturated_share(self) -> float:
        """Share of the observed logits whose largest probability rounds to 1."""
        return float(self._saturated) / max(self._observed, 1)

    def zero_share(self) -> float:
        """Share of zeros in the gradients that are not all zero."""
        zeros, entries = (float(count) for count in self._zeros)
        return zeros / max(entries, 1.0)

    def _loss(self, logits: Tensor, labels: Labels) -> Tensor:
        loss = self.objective.loss(logits, *self._arguments(labels))
        expected = f"a tensor of shape ({len(logits)},)"
        if not isinstance(loss, Tensor):
            raise TypeError(wrong("objective", expected, describe(loss)))
        if loss.shape != logits.shape[:1]:
            raise ValueError(
                wrong("objective", expected, describe(loss), "return one value per sample")
            )
        return -loss if self.targeted else loss

    def _fooled(self, logits: Tensor, labels: Labels) -> Tensor:
        target = labels.target
        known = target is not None and is_class_target(target, len(logits))
        if self.objective.target == "any" and not known:
            return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        if self.targeted and target is not None:
            return ~misclassified(logits, target)
        success = self.objective.success(logits, *self._arguments(labels))
        expected = f"a success of shape ({len(logits)},), bool"
        if not isinstance(success, Tensor) or success.dtype != torch.bool:
            raise TypeError(wrong("objective", expected, describe(success)))
        if success.shape != logits.shape[:1]:
            raise ValueError(wrong("objective", expected, describe(success)))
        return success

    def _arguments(self, labels: Labels) -> tuple[Tensor | None, ...]:
        if self.objective.reference == "none":
            return (labels.target,)
        return (labels.target, labels.reference)

    def _autocast(self, device: torch.device):
        if self.precision is None:
            return nullcontext()
        if self.precision == FULL:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, PRECISIONS[self.precision])


def attacked_by_margin(
    model: Callable[[Tensor], Tensor], target: Tensor, *, targeted: bool = False
) -> AttackedModel:
    """Return the model under an attack whose loss is the lead of the best wrong class."""
    check_classes = partial(check_target, target, len(target), device=target.device)
    return AttackedModel(model, resolve_objective("margin"), check_classes, targeted=targeted)


def is_class_target(target: object, batch: int) -> bool:
    return isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == (batch,)


def check_labels(
    target: object,
    objective: Objective,
    batch: int,
    device: torch.device,
    n_classes: int | None = None,
) -> Tensor | None:
    """Check the target for an objective; ``n_classes`` is None before the model has run."""
    if objective.target == "multilabel":
        columns = target.shape[-1] if isinstance(target, Tensor) and target.ndim else 0
        return check_multilabel(target, (batch, n_classes or columns), device)
    if objective.target == "none" or (objective.target == "any" and target is None):
        return None
    if objective.target == "class" or is_class_target(target, batch):
        return check_target(target, batch, n_classes, device)
    if not isinstance(target, Tensor) or target.shape[:1] != (batch,):
        raise ValueError(wrong("target", f"a tensor with {batch} rows, or None", describe(target)))
    if target.device != device:
        raise ValueError(wrong("target", f"a tensor on {device}", f"one on {target.device}"))
    return target


def _slope(tape: _Tape) -> Tensor:
    """Differentiate the loss by the logits; the sum gives each sample its own gradient."""
    slope = None
    if tape.loss.requires_grad:
        (slope,) = torch.autograd.grad(tape.loss.sum(), tape.logits, allow_unused=True)
    if slope is None:
        expected = "a loss that depends on the logits through autograd"
        raise ValueError(wrong("objective", expected, "one without a gradient"))
    return slope


def _near_one(slope: Tensor) -> Tensor:
    """Scale each row by the power of two that brings its largest entry into [1/2, 1)."""
    largest = slope.abs().amax(1)
    usable = (largest > 0) & largest.isfinite()
    exponent = torch.frexp(torch.where(usable, largest, 0.5)).exponent
    # In two factors, each of which is a number even where the whole would not be.
    half = torch.div(-exponent, 2, rounding_mode="floor")
    # Not ldexp, which up to PyTorch 2.5 computes float64 powers in float32.
    two = torch.full_like(largest, 2.0)
    for part in (half, -exponent - half):
        slope = slope * per_sample(two.pow(part), slope)
    return slope
