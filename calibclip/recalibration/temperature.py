"""Temperature scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from calibclip._checks import check_choice, check_number, warn, wrong
from calibclip.metrics._predictions import ArrayLike, Predictions
from calibclip.recalibration._common import (
    PlainState,
    RecalibrationWarning,
    check_fit,
    in_blocks,
    like,
    read_logits,
    read_samples,
)
from calibclip.recalibration._root import Root, find_root

# Nats per sample within which the infimum of the loss counts as reached.
_TOLERANCE = 1e-6
# exp of less is 0, also next to a factor.
_UNDERFLOW = -1000.0
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, repr=False)
class Temperature(PlainState):
    """A temperature, as :func:`fit_temperature` finds it; call it on logits.

    ``temperature(logits)`` is ``logits / temperature``, of the type, dtype and device of the
    logits, of any shape, and differentiable. The predicted class stays.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A number is not finite or out of range, or ``bound`` is unknown.

    Example:
        >>> import torch
        >>> from calibclip import recalibration
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> scale = recalibration.fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
        >>> scale(logits[:1]).softmax(dim=1)  # three out of four are right
        tensor([[0.7500, 0.2500]])
        >>> recalibration.Temperature.from_dict(scale.to_dict()) == scale
        True
    """

    temperature: float
    """T, what logits are divided by; > 0."""
    logit_scale: float | None
    """Scale of CLIP's cosines after recalibration, or None."""
    nll_before: float
    """Mean negative log-likelihood of the samples in nats, at T = 1."""
    nll_after: float
    """Mean negative log-likelihood of the samples in nats, at T."""
    bound: Literal["lower", "upper"] | None
    """Which way T would go on without end, if the likelihood has no maximum."""
    converged: bool
    """Whether T is the optimum, or has reached the bound, to rounding."""
    n_iterations: int
    """Passes over the data that the search took."""
    n_samples: int
    """Number of samples, N."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)
        if self.logit_scale is not None:
            check_number("logit_scale", self.logit_scale, above=0)
        if self.bound is not None:
            check_choice("bound", self.bound, ("lower", "upper"))
        check_fit(self)

    @property
    def separable(self) -> bool:
        """Whether every sample is right, so that no temperature but 0 is optimal."""
        return self.bound == "lower"

    @overload
    def __call__(self, logits: Tensor) -> Tensor: ...
    @overload
    def __call__(self, logits: np.ndarray) -> np.ndarray: ...
    def __call__(self, logits: ArrayLike) -> ArrayLike:
        """Divide logits by the temperature.

        Args:
            logits: Shape ``(..., K)``, floating point.

        Returns:
            ``logits / temperature``, of the type, dtype and device of ``logits``.

        Raises:
            TypeError: ``logits`` is no floating-point tensor or array.
            ValueError: ``logits`` has no classes.
        """
        return like(read_logits(logits) / self.temperature, logits)

    def __repr__(self) -> str:
        parts = [f"temperature={self.temperature:.4g}"]
        if self.logit_scale is not None:
            parts.append(f"logit_scale={self.logit_scale:.4g}")
        parts += [f"nll_before={self.nll_before:.4f}", f"nll_after={self.nll_after:.4f}"]
        if self.bound is not None:
            parts.append(f"bound={self.bound!r}")
        if not self.converged:
            parts.append("converged=False")
        return f"Temperature({', '.join(parts)}, n_samples={self.n_samples})"


def fit_temperature(
    logits: ArrayLike, target: ArrayLike, *, logit_scale: float | None = 100.0
) -> Temperature:
    r"""Fit the temperature that maximises the likelihood of the target.

    .. math:: T = \operatorname{argmin}_{T > 0} \frac{1}{N} \sum_i -\ln
        \operatorname{softmax}(z_i / T)_{y_i}

    The loss is convex in :math:`1/T`, in which Newton's method runs, safeguarded by a bracket of
    positive numbers, in float64 and without a learning rate. A row of logits takes part only
    through its differences, so logits of any magnitude will do; a class may be masked by ``-inf``.
    Memory on top of the logits is a few MB and a few numbers a sample (half precision is widened
    once).

    There may be no best temperature. If every sample is right (its true class has the largest
    logit, ties included), the data are separable and ever smaller temperatures fit ever better. If
    the logits are no better than equal ones, ever larger temperatures do. Then the temperature is
    the one at which the loss comes within 1e-6 nats of its infimum, or 1 if that does already;
    ``bound`` says so and a warning is given. A `Temperature` is never 0, negative or infinite.

    CLIP's logits are cosines times a scale. Divided by T they are cosines times
    ``logit_scale / T``, which is reported.

    Args:
        logits: Shape ``(N, K)``, floating point, ``N >= 1`` and ``K >= 2``.
        target: True classes, shape ``(N,)``, any integer dtype.
        logit_scale: The scale within the logits, already exponentiated; None for other logits
            than CLIP's.

    Returns:
        The temperature, to be called on logits.

    Raises:
        TypeError: A type or dtype is wrong.
        ValueError: A shape, a class index or ``logit_scale`` is wrong, there is no sample, a row of
            logits holds NaN or +inf or only -inf, or the logit of a true class is -inf.

    Warns:
        RecalibrationWarning: A bound was reached, no logits of a sample differ, or the search did
            not converge.

    Example:
        >>> import torch
        >>> from calibclip import recalibration
        >>> logits = torch.tensor([[8.0, 0.0], [8.0, 0.0], [8.0, 0.0], [8.0, 0.0]])
        >>> scale = recalibration.fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
        >>> round(scale.temperature, 4), round(scale.logit_scale, 4)  # T = 8 / ln 3
        (7.2819, 13.7327)

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, section 4.2
        (temperature scaling), https://arxiv.org/abs/1706.04599
    """
    if logit_scale is not None:
        logit_scale = check_number("logit_scale", logit_scale, above=0)
    fit = search_temperature(read_samples(None, logits, target))
    if fit.complaint:
        warn(fit.complaint, RecalibrationWarning)
    return Temperature(
        temperature=fit.temperature,
        logit_scale=None if logit_scale is None else logit_scale / fit.temperature,
        nll_before=fit.nll_before,
        nll_after=fit.nll_after,
        bound=fit.bound,
        converged=fit.root.converged,
        n_iterations=fit.root.n_iterations,
        n_samples=fit.n_samples,
    )


class Search(NamedTuple):
    """Result of `search_temperature`; ``complaint`` is the text of a warning, or empty."""

    temperature: float
    nll_before: float
    nll_after: float
    bound: Literal["lower", "upper"] | None
    root: Root
    complaint: str
    n_samples: int


def search_temperature(samples: Predictions) -> Search:
    """Find the temperature of least negative log-likelihood; the caller warns.

    Args:
        samples: N logits over K classes with their targets, N >= 1.

    Returns:
        The temperature, the losses before and after, and what is odd about the data, if anything.
    """
    loss = _Loss(samples)
    before = loss(1.0).nll
    bound, root, complaint = None, Root(1.0, True, 0), ""
    if loss.flat:
        complaint = "the logits of each sample are equal: the temperature has no effect and is 1"
    elif loss.separable:
        bound = "lower"
        complaint = "every sample is right: the smaller the temperature the better, without end"
        if before - loss.infimum_at_0 > _TOLERANCE:
            root = find_root(loss.above_infimum_at_0, loss.start)
    elif loss.no_better_than_uniform:
        bound = "upper"
        complaint = (
            "the logits are no better than equal ones: the larger the temperature the better, "
            "without end"
        )
        if before - loss.infimum_at_infinity > _TOLERANCE:
            root = find_root(loss.above_infimum_at_infinity, loss.start)
    else:
        root = find_root(loss.derivative, loss.start)
    temperature = 1 / root.x
    if bound:
        complaint += f"; it stops at {temperature:.4g}"
    if not root.converged:
        complaint = f"no convergence in {root.n_iterations} iterations, at {temperature:.4g}"
    after = loss(1 / temperature).nll
    return Search(
        temperature,
        before,
        after,
        bound,
        root,
        complaint and f"fit_temperature: {complaint}",
        len(samples),
    )


class _Terms(NamedTuple):
    """Means over samples at one beta."""

    nll: float
    first: float
    """beta times the derivative of the loss."""
    second: float
    """beta squared times its second derivative."""


class _Loss:
    """Mean negative log-likelihood as a function of beta = 1/T, with all that its limits tell."""

    def __init__(self, samples: Predictions) -> None:
        self.scores, self.predicted = samples.scores, samples.predicted
        columns = [
            _look(*block) for block in in_blocks(self.scores, self.predicted, samples.target)
        ]
        own, spread, slope, variance, ties, classes = (
            torch.cat(column) for column in zip(*columns, strict=True)
        )
        masked = int((own == -torch.inf).sum())
        if masked:
            expected = "classes whose logits are above -inf"
            raise ValueError(wrong("target", expected, f"{masked} of {len(own)} masked ones"))
        self.own = own
        self.flat = bool((spread == 0).all())
        self.separable = bool((own == 0).all())
        self.infimum_at_0 = ties.log().mean().item()
        self.infimum_at_infinity = classes.log().mean().item()
        derivative, curvature = slope.mean().item(), variance.mean().item()
        width = spread.mean().item()
        # Rounding alone must not make an optimum of a derivative that is 0.
        self.no_better_than_uniform = derivative >= -1e-12 * width
        newton = -derivative / curvature if curvature else math.nan
        self.start = newton if 0 < newton < math.inf else 1 / max(width, _EPS)

    def __call__(self, beta: float) -> _Terms:
        sums = torch.zeros(3, dtype=torch.float64, device=self.scores.device)
        for scores, predicted, own in in_blocks(self.scores, self.predicted, self.own):
            scores, predicted, own = scores.double(), predicted[:, None], own * beta
            gap = scores - scores.gather(1, predicted)
            gap.mul_(beta).clamp_(min=_UNDERFLOW)
            # Without the largest class, next to whose 1 the others' shares would vanish.
            share = gap.exp().scatter_(1, predicted, 0.0)
            others = share.sum(1)
            first = share.mul_(gap).sum(1) / (1 + others)
            second = share.mul_(gap).sum(1) / (1 + others)
            terms = (others.log1p() - own, first - own, second - first.square())
            sums += torch.stack([term.sum() for term in terms])
        return _Terms(*(sums / len(self.own)).tolist())

    def derivative(self, beta: float) -> tuple[float, float]:
        terms = self(beta)
        return terms.first, _ratio(-terms.first, terms.second)

    def above_infimum_at_0(self, beta: float) -> tuple[float, float]:
        # The excess falls exponentially: its logarithm is what Newton's method can follow.
        terms = self(beta)
        excess = max(terms.nll - self.infimum_at_0, _EPS)
        value = math.log(_TOLERANCE / excess)
        return value, _ratio(value * excess, terms.first)

    def above_infimum_at_infinity(self, beta: float) -> tuple[float, float]:
        terms = self(beta)
        value = terms.nll - self.infimum_at_infinity - _TOLERANCE
        return value, _ratio(-value, terms.first)


def _ratio(step: float, slope: float) -> float:
    return step / slope if slope else math.nan


def _look(scores: Tensor, predicted: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return, per row, what the loss does at beta = 0 and at infinity."""
    scores = scores.double()
    gap = scores - scores.gather(1, predicted[:, None])
    masked = scores == -torch.inf
    classes = (~masked).sum(1).double()
    own = gap.gather(1, target[:, None]).squeeze(1)
    ties = (gap == 0).sum(1).double()
    gap.masked_fill_(masked, 0.0)
    mean = gap.sum(1) / classes
    variance = gap.square().sum(1) / classes - mean.square()
    return own, -gap.amin(1), mean - own, variance, ties, classes
