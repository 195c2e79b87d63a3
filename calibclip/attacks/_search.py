"""What a search for adversarial images needs whatever its steps: the model, iterates, the choice.

``undisturbed`` borrows the model, ``AttackedModel`` judges points and differentiates, and ``merge``
keeps one iterate per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calibclip._checks import check_floating, check_target, describe, wrong
from calibclip._modules import evaluation_mode, frozen
from calibclip.attacks.objectives import Objective, at_least_float32
from calibclip.attacks.threat import per_sample


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


class Iterate(NamedTuple):
    """Points that the model has judged. ``rank`` is the loss as selection sees it."""

    images: Tensor
    loss: Tensor
    fooled: Tensor
    rank: Tensor

    def detach(self) -> Iterate:
        return self._replace(images=self.images.detach(), loss=self.loss.detach())


def _better(challenger: Iterate, incumbent: Iterate, select: str) -> Tensor:
    """Say for which samples the challenger replaces the incumbent.

    A success beats a failure; among equals the higher rank wins, except that "first_success"
    keeps the success it has.
    """
    gained = challenger.fooled & ~incumbent.fooled
    stronger = (challenger.fooled == incumbent.fooled) & (challenger.rank > incumbent.rank)
    if select == "first_success":
        stronger &= ~incumbent.fooled
    return gained | stronger


def merge(challenger: Iterate, incumbent: Iterate | None, select: str) -> Iterate:
    if incumbent is None:
        return challenger
    better = _better(challenger, incumbent, select)
    return Iterate(
        *(
            torch.where(per_sample(better, new), new, old)
            for new, old in zip(challenger, incumbent, strict=True)
        )
    )


class AttackedModel:
    """The attacked model: judges points, differentiates the objective, counts passes."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        target: Tensor,
        objective: Objective,
        targeted: bool,
    ) -> None:
        self.model, self.target = model, target
        self.objective, self.targeted = objective, targeted
        self.n_forward = self.n_backward = 0

    def judge(self, points: Tensor, *, clean: bool = False) -> Iterate:
        """Run the model; with gradients enabled, the loss carries the graph back to ``images``."""
        points = points.detach().requires_grad_(torch.is_grad_enabled())
        logits = self._check_logits(self.model(points), len(points))
        if self.n_forward == 0:
            # The first moment at which the number of classes is known.
            self.target = check_target(self.target, *logits.shape, device=logits.device).clone()
        self.n_forward += 1
        loss = self._check_loss(self.objective(logits, self.target))
        hit = logits.argmax(dim=1) == self.target
        if self.targeted:
            loss = -loss
        # A model that breaks down is no adversarial example: NaN is no success and ranks last.
        # The clean image ranks last too, since a report on attacked images must not contain it.
        broken = loss.isnan()
        fooled = (hit if self.targeted else ~hit) & ~broken
        rank = loss.detach().masked_fill(broken, -torch.inf)
        if clean:
            rank = torch.full_like(rank, -torch.inf)
        return Iterate(points, loss, fooled, rank)

    def gradient(self, iterate: Iterate) -> Tensor:
        """Differentiate; the sum over the batch gives each sample its own gradient."""
        gradient = None
        if iterate.loss.requires_grad:
            total = iterate.loss.sum()
            (gradient,) = torch.autograd.grad(total, iterate.images, allow_unused=True)
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
        return gradient

    def _check_logits(self, logits: object, batch: int) -> Tensor:
        expected = f"logits of shape (B, K) with B = {batch}"
        if not isinstance(logits, Tensor):
            # The name of the type alone: a tuple of feature maps would print all of them.
            got = type(logits).__name__
            raise TypeError(wrong("model", expected, got, "return the logits only"))
        if not logits.is_floating_point():
            raise TypeError(wrong("model", expected, describe(logits)))
        if logits.ndim != 2 or len(logits) != batch:
            raise ValueError(wrong("model", expected, describe(logits)))
        return at_least_float32(logits)

    def _check_loss(self, loss: object) -> Tensor:
        expected = f"a tensor of shape {tuple(self.target.shape)}"
        if not isinstance(loss, Tensor):
            raise TypeError(wrong("objective", expected, describe(loss)))
        if loss.shape != self.target.shape:
            raise ValueError(
                wrong("objective", expected, describe(loss), "return one value per sample")
            )
        return loss


def check_images(images: object, bounds: tuple[float, float]) -> Tensor:
    """Return a private copy of the clean images after the one look at their values."""
    expected = "a floating-point tensor of shape (B, ...)"
    if isinstance(images, Tensor) and not images.is_floating_point():
        raise TypeError(wrong("images", expected, describe(images), "convert to float in [0, 1]"))
    images = check_floating("images", images, shape="(B, ...)")
    if images.ndim < 2:
        raise ValueError(wrong("images", expected, describe(images), "add a batch dimension"))
    # The clone is also what lets tensors made in inference mode take part in autograd.
    images = images.detach().clone()
    # Written with clamp, so that the bounds are rounded to the dtype as the attack rounds them.
    if not bool((images == images.clamp(*bounds)).all()):
        lowest, highest = (float(extreme) for extreme in torch.aminmax(images))
        raise ValueError(
            wrong(
                "images",
                f"values in [{bounds[0]:g}, {bounds[1]:g}]",
                f"values in [{lowest:g}, {highest:g}]",
                "attack images before normalisation, and normalise inside the model",
            )
        )
    return images


def draw_seed(generator: torch.Generator | None, seed: int) -> int:
    if generator is None:
        return seed
    if not isinstance(generator, torch.Generator):
        raise TypeError(wrong("generator", "a torch.Generator or None", describe(generator)))
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
