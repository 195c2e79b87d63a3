"""Vector scaling: a weight and a bias for each class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_count, check_number, describe, warn, wrong
from calibclip.metrics._predictions import ArrayLike, Predictions
from calibclip.recalibration._common import (
    PlainState,
    RecalibrationWarning,
    check_fit,
    check_length,
    in_blocks,
    like,
    read_logits,
    read_numbers,
    read_samples,
)
from calibclip.recalibration.temperature import search_temperature

# Norm of the gradient at which a fit counts as converged; the excess loss is about half its square.
_GRADIENT = 1e-6
# Nats per sample by which rounding may make an optimum worse than the start.
_ROUNDING = 1e-9


@dataclass(frozen=True, repr=False)
class VectorScaling(PlainState):
    """Weights and biases, as :func:`fit_vector_scaling` finds them; call it on logits.

    ``scaling(logits)`` is ``logits * weight + bias``, of the type, dtype and device of the logits,
    of any shape that ends in K, and differentiable. A class masked by ``-inf`` stays so. The
    predicted class may change, and with it the accuracy.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A number is not finite or out of range, or lengths differ.

    Example:
        >>> import torch
        >>> from calibclip import recalibration
        >>> scaling = recalibration.fit_vector_scaling(torch.eye(3), torch.tensor([0, 1, 2]))
        >>> scaling(torch.eye(3, dtype=torch.float64)).dtype
        torch.float64
        >>> recalibration.VectorScaling.from_dict(scaling.to_dict()) == scaling
        True
    """

    weight: tuple[float, ...]
    """Factor of each class, K numbers."""
    bias: tuple[float, ...]
    """Summand of each class, K numbers."""
    ridge: float
    """Strength of the pull towards temperature scaling."""
    nll_before: float
    """Mean negative log-likelihood of the samples in nats, of the logits as they were."""
    nll_after: float
    """Mean negative log-likelihood of the samples in nats, of the new logits; without the ridge."""
    gradient_norm: float
    """Norm of the gradient where the search ended, in units in which the curvature of a class is 1;
    infinite if it could not be computed."""
    converged: bool
    """Whether the norm of the gradient is below 1e-6; False if the temperature alone was kept."""
    n_iterations: int
    """Iterations of L-BFGS."""
    n_samples: int
    """Number of samples, N."""

    def __post_init__(self) -> None:
        weight, bias = read_numbers("weight", self.weight), read_numbers("bias", self.bias)
        if len(weight) < 2:
            raise ValueError(wrong("weight", "two numbers at least, one a class", len(weight)))
        check_length("bias", bias, len(weight), "weight")
        check_number("ridge", self.ridge, above=0)
        if self.gradient_norm != math.inf:
            check_number("gradient_norm", self.gradient_norm, at_least=0)
        check_fit(self)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", bias)

    @property
    def n_classes(self) -> int:
        """Number of classes, K."""
        return len(self.weight)

    @overload
    def __call__(self, logits: Tensor) -> Tensor: ...
    @overload
    def __call__(self, logits: np.ndarray) -> np.ndarray: ...
    def __call__(self, logits: ArrayLike) -> ArrayLike:
        """Scale and shift logits, in float32 at least.

        Args:
            logits: Shape ``(..., K)``, floating point.

        Returns:
            New logits, of the type, shape, dtype and device of ``logits``.

        Raises:
            TypeError: ``logits`` is no floating-point tensor or array.
            ValueError: The number of classes is not that of the fit.
        """
        scores = read_logits(logits)
        if scores.shape[-1] != self.n_classes:
            expected = f"shape (..., {self.n_classes}), the classes of the fit"
            raise ValueError(wrong("logits", expected, describe(logits)))
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weight, bias = (wide.new_tensor(values) for values in (self.weight, self.bias))
        # A factor <= 0 would turn the -inf of a masked class around.
        result = torch.where(wide == -torch.inf, wide, wide * weight + bias)
        return like(result.to(scores.dtype), logits)

    def __repr__(self) -> str:
        weight, bias = (
            f"{name}=[{min(values):.4g}, {max(values):.4g}]"
            for name, values in (("weight", self.weight), ("bias", self.bias))
        )
        failed = "" if self.converged else ", converged=False"
        return (
            f"VectorScaling({weight}, {bias}, ridge={self.ridge:g}, "
            f"nll_before={self.nll_before:.4f}, nll_after={self.nll_after:.4f}{failed}, "
            f"n_classes={self.n_classes}, n_samples={self.n_samples})"
        )


def fit_vector_scaling(
    logits: ArrayLike, target: ArrayLike, *, ridge: float = 1.0, max_iterations: int = 1000
) -> VectorScaling:
    r"""Fit a weight and a bias for each class by penalised maximum likelihood.

    .. math:: \min_{w, b} \sum_i -\ln \operatorname{softmax}(w \odot z_i + b)_{y_i}
        + \frac{\lambda}{2} \sum_k \left[ (T w_k - 1)^2 + (w_k m_k + b_k - m_k / T)^2 \right]

    with z the logits, T their best temperature, :math:`m_k` the mean logit of class k and
    :math:`\lambda` the ridge. The penalty pulls towards temperature scaling. Its two parts are the
    relative change of the scale and the shift, in nats, at the mean logit: a Gaussian prior with
    standard deviation :math:`\lambda^{-1/2}` on each. The solution is unique, with separable data
    too, and with few samples per class it is close to temperature scaling. Logits times a positive
    number give the same calibrated logits.

    The problem is strictly convex; L-BFGS solves it in float64 with exact gradients, from the
    temperature, with the curvature of each class scaled to 1. The norm of the gradient at the end
    is checked and reported. Memory on top of the logits is a few MB and a few numbers a sample
    (half precision is widened once).

    A class is masked by ``-inf`` only. A huge negative number, such as ``torch.finfo(...).min``, is
    a logit like any other: it moves the mean of its class, and next to it others are rounded away.
    Should the outcome fit worse than the temperature alone, the temperature is kept, with a warning
    (in exact arithmetic it cannot).

    Args:
        logits: Shape ``(N, K)``, floating point, ``N >= 1`` and ``K >= 2``; ``-inf`` masks a class.
        target: True classes, shape ``(N,)``, any integer dtype.
        ridge: Strength of the pull, > 0.
        max_iterations: Iterations of L-BFGS at most, at least 1.

    Returns:
        The weights and biases, to be called on logits.

    Raises:
        TypeError: A type or dtype is wrong.
        ValueError: A shape, a class index or an option is wrong, there is no sample, a row of
            logits holds NaN or +inf or only -inf, or the logit of a true class is -inf.

    Warns:
        RecalibrationWarning: The norm of the gradient is not below 1e-6 at the end, or the
            temperature alone was kept.

    Example:
        >>> import torch
        >>> from calibclip import recalibration
        >>> logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> target = torch.tensor([0, 0, 0, 1])
        >>> scaling = recalibration.fit_vector_scaling(logits, target, ridge=1e-6)
        >>> scaling(logits[2:3]).softmax(dim=1)  # of these two one is right
        tensor([[0.5000, 0.5000]])

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, section 4.2
        (matrix and vector scaling), https://arxiv.org/abs/1706.04599
    """
    check_number("ridge", ridge, above=0)
    check_count("max_iterations", max_iterations, at_least=1)
    # SciPy's optimisers take a while to load, and few who import calibclip fit with them.
    from scipy.optimize import minimize

    samples = read_samples(None, logits, target)
    start = search_temperature(samples)
    loss = _Loss(samples, start.temperature, ridge)
    solution = minimize(
        loss,
        np.zeros(2 * samples.n_classes),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations + 20,
            "maxcor": 20,
            "ftol": 0.0,
            "gtol": 1e-9,
        },
    )
    scale, shift = loss.parameters(solution.x)
    weight = scale / start.temperature
    bias = loss.mean / start.temperature + shift - weight * loss.mean
    # Of the logits as users will get them: next to huge ones those centred above are rounded away.
    nll = _likelihood(samples, weight, bias)
    norm = float(np.linalg.norm(loss(solution.x)[1]))
    norm = math.inf if math.isnan(norm) else norm
    kept = not nll <= start.nll_after + _ROUNDING
    if kept:
        nll = start.nll_after
        weight, bias = np.full_like(weight, 1 / start.temperature), np.zeros_like(bias)
    converged = norm <= _GRADIENT and not kept
    if not converged:
        text = (
            "rounding leaves a worse fit than the temperature alone, which is kept: mask classes "
            "by -inf, not by huge numbers"
            if kept
            else f"the norm of the gradient is {norm:.2g} after {solution.nit} iterations, "
            f"not <= {_GRADIENT:g}"
        )
        warn(f"fit_vector_scaling: {text}", RecalibrationWarning)
    return VectorScaling(
        weight=tuple(weight.tolist()),
        bias=tuple(bias.tolist()),
        ridge=float(ridge),
        nll_before=start.nll_before,
        nll_after=nll,
        gradient_norm=norm,
        converged=converged,
        n_iterations=int(solution.nit),
        n_samples=len(samples),
    )


def _likelihood(samples: Predictions, weight: np.ndarray, bias: np.ndarray) -> float:
    """Return the mean negative log-likelihood of scaled and shifted logits."""
    device = samples.scores.device
    factor, summand = (torch.from_numpy(values).to(device) for values in (weight, bias))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for scores, target in in_blocks(samples.scores, samples.target):
        logits = scores.double() * factor + summand
        logits.masked_fill_(scores == -torch.inf, -torch.inf)
        total -= logits.log_softmax(dim=1).gather(1, target[:, None]).sum()
    return total.item() / len(samples)


class _Loss:
    """Penalised loss per sample, of parameters in which each class has curvature 1 at the start.

    A class has a scale v and a shift s: its logit is ``v u + m / T + s`` with ``u = (z - m) / T``.
    """

    def __init__(self, samples: Predictions, temperature: float, ridge: float) -> None:
        self.samples, self.temperature, self.ridge = samples, temperature, ridge
        n_classes = samples.n_classes
        total, count, self.masked = self._zeros(n_classes), self._zeros(n_classes), False
        for (scores,) in in_blocks(samples.scores):
            open_ = scores > -torch.inf
            count += open_.sum(0)
            total += scores.double().where(open_, 0.0).sum(0)
        self.masked = bool((count < len(samples)).any())
        self._mean = total / count.clamp(min=1)
        self.mean = self._mean.cpu().numpy()
        # Sums over samples of u and of 1 at the true class: the part of the gradient that stays.
        own = self._zeros(n_classes, 2)
        for scores, target in in_blocks(samples.scores, samples.target):
            centred = self._centre(scores)[0].gather(1, target[:, None]).squeeze(1)
            own.index_add_(0, target, torch.stack([centred, torch.ones_like(centred)], dim=1))
        self.own = own.cpu().numpy()
        self.whiten = self._whitening()

    def __call__(self, y: np.ndarray) -> tuple[float, np.ndarray]:
        scale, shift = self.parameters(y)
        nll, gradient = self.likelihood(scale, shift)
        pull = np.stack([scale - 1, shift], axis=1)
        weight = self.ridge / len(self.samples)
        value = nll + weight / 2 * float((pull**2).sum())
        gradient = gradient + weight * pull
        return value, np.einsum("kij,kj->ki", self.whiten, gradient).ravel()

    def parameters(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return scales and shifts, from 1 and 0 on."""
        scale, shift = np.einsum("kji,kj->ik", self.whiten, y.reshape(-1, 2))
        return 1 + scale, shift

    def likelihood(self, scale: np.ndarray, shift: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean negative log-likelihood and its gradient, shape ``(K, 2)``."""
        device = self.samples.scores.device
        factor = torch.from_numpy(scale).to(device)
        summand = torch.from_numpy(shift).to(device) + self._mean / self.temperature
        sums, nll = self._zeros(len(scale), 2), self._zeros()
        for scores, target in in_blocks(self.samples.scores, self.samples.target):
            centred, log_probs = self._log_probs(scores, factor, summand)
            nll -= log_probs.gather(1, target[:, None]).sum()
            probs = log_probs.exp_()
            sums[:, 1] += probs.sum(0)
            sums[:, 0] += probs.mul_(centred).sum(0)
        count = len(self.samples)
        return nll.item() / count, (sums.cpu().numpy() - self.own) / count

    def _whitening(self) -> np.ndarray:
        """Return the inverse Cholesky factors of the curvature of each class at the start."""
        n_classes = self.samples.n_classes
        curvature = self._zeros(n_classes, 3)
        factor = self._zeros(n_classes) + 1
        for (scores,) in in_blocks(self.samples.scores):
            centred, log_probs = self._log_probs(scores, factor, self._mean / self.temperature)
            probs = log_probs.exp_()
            weight = probs * (1 - probs)
            for power in range(3):
                curvature[:, power] += weight.sum(0)
                weight.mul_(centred)
        one, first, second = curvature.T.cpu().numpy()
        block = np.array([[second + self.ridge, first], [first, one + self.ridge]])
        return np.linalg.inv(np.linalg.cholesky(block.transpose(2, 0, 1) / len(self.samples)))

    def _log_probs(self, scores: Tensor, factor: Tensor, summand: Tensor) -> tuple[Tensor, Tensor]:
        centred, masked = self._centre(scores)
        logits = centred * factor + summand
        if masked is not None:
            logits.masked_fill_(masked, -torch.inf)
        return centred, logits.log_softmax(dim=1)

    def _centre(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return u, 0 where the class is masked, and which are."""
        centred = (scores.double() - self._mean) / self.temperature
        if not self.masked:
            return centred, None
        masked = scores == -torch.inf
        return centred.masked_fill_(masked, 0.0), masked

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.samples.scores.device)
