"""Objectives for a single true class: away from it, or with ``targeted`` towards it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calibclip.attacks.objectives._numbers import at_least_float32, never_flat

# The constant of the published DLR losses: three or four logits may tie.
_NO_SPREAD = 1e-12


def misclassified(outputs: Tensor, target: Tensor, reference: Tensor | None = None) -> Tensor:
    """Return whether the predicted class, the first of those with the largest logit, is wrong.

    Args:
        outputs: Logits, shape ``(B, K)``.
        target: Class indices, shape ``(B,)``, int64.
        reference: Not looked at, so that objectives with and without one can share this function.

    Returns:
        Shape ``(B,)``, bool.

    Example:
        >>> misclassified(torch.tensor([[1.0, 4.0], [1.0, 4.0]]), torch.tensor([0, 1]))
        tensor([ True, False])
    """
    return outputs.argmax(dim=1) != target


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Cross-entropy, with a gradient that points the right way however sure the prediction is.

    .. math::
        \log \sum_j e^{z_j} - z_y = \log(1 + e^d), \qquad d = \log \sum_{j \ne y} e^{z_j} - z_y

    Textbook forms compute the slope of the true logit as :math:`p_y - 1`. In float32 that is 0 as
    soon as :math:`p_y` rounds to 1, at a lead of 17, while the slopes of the others live on: the
    direction is off by half. Through :math:`d` the true logit gets minus the sum of the others'.
    Beyond a lead of 100 all slopes underflow. As an attack follows the direction only, the slope
    of :math:`d` is therefore raised by :math:`2^{-100}`, to :math:`\sigma(d) + 2^{-100}`; the
    value is unchanged.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32. A class at
            :math:`-\infty` takes no part.
        target: ``y``, class indices, shape ``(B,)``, int64.

    Returns:
        Shape ``(B,)``, float32 or float64. 0 if there is no class but the true one.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([0.6931])
        >>> sure = torch.tensor([[500.0, 0.0]], requires_grad=True)
        >>> torch.autograd.grad(cross_entropy(sure, torch.tensor([0])), sure)
        (tensor([[-7.8886e-31,  7.8886e-31]]),)
    """
    logits = at_least_float32(logits)
    own, others = _split(logits, target)
    # The largest is taken out before the sum, and its distance from the true logit rounded once:
    # at logits in the thousands a plain logsumexp would have lost the digits of the gap.
    top = others.detach().amax(1)
    # Without another class the sum is empty: keep its logarithm finite, d is -infinity by top.
    alone = top == -torch.inf
    total = torch.exp(others - top.masked_fill(alone, 0.0).unsqueeze(1)).sum(1)
    lead = top - own + total.masked_fill(alone, 1.0).log()
    return never_flat(-F.logsigmoid(-lead), lead)


def margin(logits: Tensor, target: Tensor) -> Tensor:
    r"""Lead of the best other class, :math:`\max_{j \ne y} z_j - z_y`; positive when fooled.

    Unlike cross-entropy its gradient does not vanish for a confident prediction.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32.
        target: ``y``, class indices, shape ``(B,)``, int64.

    Returns:
        Shape ``(B,)``, float32 or float64; :math:`-\infty` if there is no other class.

    Example:
        >>> margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]))
        tensor([-2.])

    References:
        Carlini and Wagner (2017), Towards evaluating the robustness of neural networks,
        objective f6 for the true class in place of the target's, without the hinge, and maximised,
        https://arxiv.org/abs/1608.04644
    """
    own, others = _split(at_least_float32(logits), target)
    # max, not amax: among tied classes the gradient goes to one instead of being shared.
    return others.max(dim=1).values - own


def dlr(logits: Tensor, target: Tensor) -> Tensor:
    r"""Difference of logits ratio: the margin, in units of the spread of the three best classes.

    .. math::
        -\frac{z_y - \max_{j \ne y} z_j}{z_{(1)} - z_{(3)} + 10^{-12}}

    with :math:`z_{(r)}` the r-th largest logit. Neither a shift nor a scaling of the logits changes
    it, CLIP's ``logit_scale`` included. It is flat at 1 while the true class ranks third, where
    the image is misclassified already.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32. With two classes
            (left, if others are at :math:`-\infty`) nothing spreads, and this is `margin`.
        target: ``y``, class indices, shape ``(B,)``, int64.

    Returns:
        Shape ``(B,)``, float32 or float64; positive when fooled.

    Example:
        >>> dlr(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]))
        tensor([-0.6667])

    References:
        Croce and Hein (2020), Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks, equation 6, https://arxiv.org/abs/2003.01690. The constant
        is that of their code.
    """
    logits = at_least_float32(logits)
    return _per_spread(margin(logits, target), logits, 3)


def dlr_targeted(logits: Tensor, target: Tensor, rival: Tensor) -> Tensor:
    r"""Difference of logits ratio towards one rival class, which need not be the strongest.

    .. math::
        -\frac{z_y - z_t}{z_{(1)} - (z_{(3)} + z_{(4)})/2 + 10^{-12}}

    Maximised for one rival :math:`t` after the other, while success remains any misclassification.

    Args:
        logits: ``z``, shape ``(B, K)``. Half precision is computed in float32. With two or three
            classes (left, if others are at :math:`-\infty`) this is :math:`z_t - z_y`.
        target: ``y``, the true classes, shape ``(B,)``, int64.
        rival: ``t``, the classes aimed at, shape ``(B,)``, int64.

    Returns:
        Shape ``(B,)``, float32 or float64; positive when the rival leads the true class.

    Example:
        >>> logits = torch.tensor([[1.0, 4.0, 2.0, 1.0]])
        >>> dlr_targeted(logits, torch.tensor([1]), torch.tensor([0]))
        tensor([-1.])

    References:
        Croce and Hein (2020), equation 7, https://arxiv.org/abs/2003.01690
    """
    logits = at_least_float32(logits)
    lead = logits.gather(1, rival.unsqueeze(1)) - logits.gather(1, target.unsqueeze(1))
    return _per_spread(lead.squeeze(1), logits, 4)


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the true class's logit, ``(B,)``, and the logits with -infinity in its place."""
    index = target.unsqueeze(1)
    return logits.gather(1, index).squeeze(1), logits.scatter(1, index, -torch.inf)


def _per_spread(lead: Tensor, logits: Tensor, ranks: int) -> Tensor:
    """Divide by how far the best logit is above the mean of those from rank 3 to ``ranks``."""
    if logits.shape[1] < ranks:
        return lead
    top = logits.topk(ranks, dim=1).values
    low = top[:, 2:].mean(1)
    # An infinite lead stays infinite, and its gradient a number, if nothing divides it.
    undivided = (low == -torch.inf) | lead.isinf()
    return lead / torch.where(undivided, 1.0, top[:, 0] - low + _NO_SPREAD)
