"""What an attack returns, and what makes its success doubtful."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibclip._checks import warn as _warn
from calibclip._checks import wrong
from calibclip.attacks.objectives import at_least_float32


class AttackWarning(UserWarning):
    """The attack ran, but its result probably says less than it seems to."""


@dataclass(frozen=True, eq=False, repr=False)
class Diagnostics:
    """Signs that an attack could not see where to go.

    With ``precision`` the samples attacked again count with both attacks; the two shares are of the
    first.

    Attributes:
        judged: Iterates the model has judged, over all attempts, shape ``(B,)``, int64. Which
            attempts after a successful one still ran depends on the batch size.
        steps: Gradients computed, over all attempts, shape ``(B,)``, int64.
        zero_gradients: Steps at which a sample without a success had a gradient of all zeros,
            shape ``(B,)``, int64. Plain PGD stays where it is then. Pixels outside a mask do not
            count.
        nonfinite: Steps at which the loss or the gradient of a sample was NaN or infinite, shape
            ``(B,)``, int64. Entries that are not finite count as zero; the image stays feasible.
        saturated: Share of the logits, of iterates with a gradient, whose largest probability
            rounds to 1.
        zero_entries: Share of zeros among the entries of the gradients that are not all zero. In
            a float16 model a sign of underflow.
    """

    judged: Tensor
    steps: Tensor
    zero_gradients: Tensor
    nonfinite: Tensor
    saturated: float
    zero_entries: float

    @property
    def blind(self) -> Tensor:
        """Samples without a direction in at least half of their steps, shape ``(B,)``, bool."""
        return 2 * torch.maximum(self.zero_gradients, self.nonfinite) >= self.steps.clamp(min=1)

    def __repr__(self) -> str:
        batch, steps = max(len(self.judged), 1), max(int(self.steps.sum()), 1)
        return (
            f"Diagnostics({int(self.blind.sum()) / batch:.1%} of samples blind; of the steps "
            f"{int(self.zero_gradients.sum()) / steps:.1%} without a gradient, "
            f"{int(self.nonfinite.sum()) / steps:.1%} not finite; "
            f"{self.saturated:.1%} of logits saturated, {self.zero_entries:.1%} of entries zero)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class AttackResult:
    """What an attack found, one entry per sample.

    Attributes:
        images: Adversarial images: shape, dtype and device of the clean ones. No graph attached.
        success: Whether the returned image is misclassified (targeted: classified as the target),
            shape ``(B,)``, bool. Other objectives define a success of their own, or none. An image
            whose loss is NaN is no success.
        loss: Objective at the returned image, shape ``(B,)``, float32 or float64; larger is
            better for the attack, in targeted mode too.
        steps_to_success: Steps until the first successful iterate, shape ``(B,)``, int64: 0 if
            the start was one, -1 if there was none. With restarts: of the first that succeeded.
        n_forward: Forward passes, each over a batch.
        n_backward: Backward passes, each over a batch.
        forward_images: Images in all forward passes together.
        backward_images: Images in all backward passes together.
        diagnostics: What the attack saw on its way; None for an attack without gradients.
    """

    images: Tensor
    success: Tensor
    loss: Tensor
    steps_to_success: Tensor
    n_forward: int
    n_backward: int
    forward_images: int = 0
    backward_images: int = 0
    diagnostics: Diagnostics | None = None

    def __repr__(self) -> str:
        batch = len(self.success)
        fooled = 100 * int(self.success.sum()) / max(batch, 1)
        return (
            f"AttackResult({batch} images, {fooled:.1f} % fooled, "
            f"{self.n_forward} forward, {self.n_backward} backward)"
        )


def nothing_to_attack(images: Tensor) -> AttackResult:
    """Return the result for an empty batch, which no model needs to see.

    Args:
        images: Shape ``(0, ...)``, floating; they are the result's images.

    Returns:
        A result whose tensors have shape ``(0,)``, and no passes.
    """
    loss = at_least_float32(images.new_empty(0))
    none = loss.long()
    return AttackResult(
        images=images,
        success=loss > 0,
        loss=loss,
        steps_to_success=none,
        n_forward=0,
        n_backward=0,
        diagnostics=Diagnostics(none, none, none, none, 0.0, 0.0),
    )


def warn(message: str) -> None:
    """Warn of an attack, naming the line of the user that called this package.

    Args:
        message: Text of the warning, in the form of the error messages where it is of an argument.

    Warns:
        AttackWarning: Always.
    """
    _warn(message, AttackWarning)


def warn_if_doubtful(
    result: AttackResult, *, targeted: bool, looks_like_probabilities: bool
) -> None:
    """Warn where the figures of a result may not mean what they seem to.

    Args:
        result: Of the attack.
        targeted: Whether it went towards the target.
        looks_like_probabilities: Whether the first outputs were in [0, 1] and added up to 1.

    Warns:
        AttackWarning: Once for each thing found.
    """
    if looks_like_probabilities:
        warn(
            wrong(
                "model",
                "logits",
                "rows in [0, 1] that add up to 1, like probabilities",
                "return the logits: after a softmax gradients vanish and the attack is weak",
            )
        )
    batch, diagnostics = len(result.success), result.diagnostics
    if targeted and batch:
        already = int((result.steps_to_success == 0).sum())
        if already:
            got = f"{already} of {batch} that it predicts before the first step"
            remedy = (
                "their success is not the attack's doing; pass the wanted, not the true classes"
            )
            warn(wrong("target", "classes that the model does not predict", got, remedy))
    if diagnostics is None:
        return
    blind = int((diagnostics.blind & ~result.success).sum())
    if blind:
        warn(
            f"the attack was probably blind for {blind} of {batch} samples: in at least half of "
            "their steps the gradient was zero, infinite or NaN, so that they do not count as "
            "robust; see .diagnostics, try objective='margin', or Square, which needs no gradient"
        )
