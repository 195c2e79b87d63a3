r"""Differences of gamma functions at a concentration and at the total of its row.

The entropies of a Dirichlet are sums of :math:`\psi(\alpha_0 + 1) - \psi(\alpha_k + 1)` and the
like. Here every such difference is the share :math:`1 - p_k = (\alpha_0 - \alpha_k)/\alpha_0` of
the *other* classes times a factor without cancellation, so it is good to the last digits where both
arguments are tiny, or huge, or nearly the same.

Arguments below N are moved up by the recurrence; above, the asymptotic series in 1/x is exact to
the dtype's precision. Elementary functions only: PyTorch's float64 trigamma is good to 1e-9.

References:
    Abramowitz and Stegun (1964), 6.1.41 and 6.3.18 (asymptotic series of ln Gamma and psi), 6.3.5
    (recurrence), 6.4.12 (asymptotic series of the trigamma function).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from calibclip._kernels.special import smallest

# Arguments of at least N need no recurrence.
_SHIFT = {torch.float32: 4, torch.float64: 12}
# With u = y^2 and y = 1/x:  psi(x) = ln x - y/2 - u c(u),  x psi_1(x + 1) = 1 - y/2 + u b(u),
# ln Gamma(x) = (x - 1/2) ln x - x + ln(2 pi)/2 + y r(u); the coefficients of c, b and r are
_DIGAMMA = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760)
_TRIGAMMA = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730)
_CURVATURE = tuple(b - c for b, c in zip(_TRIGAMMA, _DIGAMMA, strict=True))
_LGAMMA = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)
# Bounds on logarithms that keep exponentials finite; what lies beyond has no weight there.
_FLOOR, _CEILING = -80.0, 80.0


def _polynomial(coefficients: tuple[float, ...], u: Tensor) -> Tensor:
    result = coefficients[-1] * u + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        result = result * u + coefficient
    return result


def _slope(coefficients: tuple[float, ...], y: Tensor, y0: Tensor) -> Tensor | float:
    """Return ``(u c(u) - u0 c(u0)) / (y - y0)`` without the difference."""
    if not coefficients:
        return 0.0
    u, u0 = y.square(), y0.square()
    slope: Tensor | float = coefficients[-1]
    value: Tensor | float = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value * u + coefficient
        slope = slope * u0 + value
    return (y + y0) * slope


class Gaps:
    """What the differences between the classes of a row and their total are made of.

    Args:
        log_x: Logarithms of the concentrations, ``(..., C)``, float32 or float64.
        log_total: That of their sum, ``(..., 1)``.
        surprise: ``log_total - log_x >= 0``, as exactly as it is known.
    """

    def __init__(self, log_x: Tensor, log_total: Tensor, surprise: Tensor) -> None:
        self.n = n = _SHIFT[log_x.dtype]
        self.log_x, self.log_total, self.surprise = log_x, log_total, surprise
        self.rest = -torch.expm1(-surprise)  # the share of the other classes, 1 - p
        self.is_small = log_x < math.log(n)
        low = smallest(log_x)
        self.any_small = not low >= math.log(n)
        # Each term of a series is about x^-2 of the one before; curvature needs one more.
        sizes = (
            2 * j * abs(c) * math.exp((1 - 2 * j) * max(low, math.log(n)))
            for j, c in enumerate(_TRIGAMMA, start=1)
        )
        self.terms = sum(size > torch.finfo(log_x.dtype).eps / 4 for size in sizes)

    def choose(self, small: Callable[[], Tensor], large: Tensor) -> Tensor:
        """Select by the size of each concentration."""
        return torch.where(self.is_small, small(), large) if self.any_small else large

    # Concentrations of at least N. Each branch sees arguments that are harmless to it.

    @cached_property
    def large(self) -> tuple[Tensor, Tensor, Tensor]:
        """1/x, 1/x0 and their difference."""
        y = torch.exp(-self.log_x.clamp(min=math.log(self.n)))
        return y, torch.exp(-self.log_total.clamp(min=math.log(self.n))), y * self.rest

    @cached_property
    def large_slopes(self) -> tuple[Tensor | float, Tensor | float]:
        """The slopes of the two series beyond y/2."""
        y, y0, _ = self.large
        count = self.terms
        return _slope(_DIGAMMA[:count], y, y0), _slope(_TRIGAMMA[:count], y, y0)

    # Smaller ones, moved up by N.

    @cached_property
    def small(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, 1/x0; 1/(x + n), 1/(x0 + n), and the difference of the latter two."""
        x = torch.exp(self.log_x.clamp(_FLOOR, math.log(self.n)))
        v0 = torch.exp(-self.log_total.clamp(min=_FLOOR))
        y = 1 / (x + self.n)
        return x, v0, y, v0 / (1 + self.n * v0), y * self.rest / (1 + self.n * v0)

    @cached_property
    def small_parts(self) -> tuple[Tensor, Tensor]:
        """The series part of psi's difference, and what the recurrence adds to it."""
        x, v0, y, y0, change = self.small
        total = 1 / ((1 + v0) * (x + 1))
        for i in range(2, self.n + 1):
            total = total + 1 / ((1 + i * v0) * (x + i))
        return change * (0.5 - _slope(_DIGAMMA, y, y0)), self.rest * total

    def digamma(self) -> Tensor:
        r"""Return :math:`\psi(x_0 + 1) - \psi(x + 1) \ge 0`."""
        large = self.surprise - self.large[2] * (0.5 - self.large_slopes[0])
        return self.choose(self._digamma_small, large)

    def _digamma_small(self) -> Tensor:
        y = self.small[2]
        series, steps = self.small_parts
        # ln((x0 + n) / (x + n)); beyond the ceiling n is nothing next to x0
        bounded = self.log_total.clamp(max=_CEILING)
        logs = torch.log1p(self.rest * torch.exp(bounded) * y) + (self.log_total - bounded)
        return logs - series + steps

    def excess(self) -> Tensor:
        r"""Return :math:`g(x) - g(x_0) \ge 0`, with :math:`g(x) = \psi(x + 1) - \ln x`."""
        return self.choose(self._excess_small, self.large[2] * (0.5 - self.large_slopes[0]))

    def _excess_small(self) -> Tensor:
        x, v0, *_ = self.small
        series, steps = self.small_parts
        # ln(1 + n/x) - ln(1 + n/x0)
        return torch.log1p(self.n * self.rest / ((1 + self.n * v0) * x)) + series - steps

    def trigamma(self) -> Tensor:
        r"""Return :math:`t(x_0) - t(x) \ge 0`, with :math:`t(x) = x\,\psi_1(x + 1)`."""
        large = self.large[2] * (0.5 - self.large_slopes[1])
        return self.choose(lambda: self.trigamma_small, large)

    @cached_property
    def trigamma_small(self) -> Tensor:
        """The same for concentrations below N."""
        x, v0, y, y0, change = self.small
        # x psi_1(x + 1) = sum_i x/(x + i)^2 + (1 - n y) (1 - y/2 + u b(u))
        rest = 1 - y / 2 + y.square() * _polynomial(_TRIGAMMA, y.square())
        chord = 0.5 - _slope(_TRIGAMMA, y, y0)
        total = (v0 - x) / ((x + 1) * (1 + v0)).square()
        for i in range(2, self.n + 1):
            total = total + (i * i * v0 - x) / ((x + i) * (1 + i * v0)).square()
        return change * (self.n * rest + chord / (1 + self.n * v0)) + self.rest * total

    def curvature(self) -> Tensor:
        r"""Return :math:`h'(x) - h'(x_0)`, with :math:`h(x) = x\,g(x)`: excess less trigamma."""
        y, y0, change = self.large
        large = change * _slope(_CURVATURE[: self.terms + 1], y, y0)
        return self.choose(lambda: self._excess_small() - self.trigamma_small, large)


def entropy_term(log_x: Tensor) -> Tensor:
    r"""Return what :math:`\ln\Gamma(x) - (x-1)\psi(x) + x` has over its leading terms.

    Those are :math:`\tfrac12(\ln x + \ln 2\pi + 1)`; the rest falls like :math:`-1/(3x)`.
    """
    n = _SHIFT[log_x.dtype]
    y = torch.exp(-log_x.clamp(min=math.log(n)))
    large = _entropy_series(y)
    if smallest(log_x) >= math.log(n):
        return large
    bounded = log_x.clamp(max=math.log(n))
    x = torch.exp(bounded)
    top = x + n
    y, u = 1 / top, top.square().reciprocal()
    log_top = torch.log(top)
    small = y * _polynomial(_LGAMMA, u) + (x - 1) * (y / 2 + u * _polynomial(_DIGAMMA, u))
    small = small + 1.5 * (log_top - bounded) + 0.5 - n - torch.exp(-bounded)  # i = 0 included
    for i in range(1, n):
        small = small + (log_top - torch.log(x + i)) + (x - 1) / (x + i)
    return torch.where(log_x < math.log(n), small, large)


def _entropy_series(y: Tensor) -> Tensor:
    u = y.square()
    digamma = _polynomial(_DIGAMMA, u)
    return y * (_polynomial(_LGAMMA, u) + digamma - 0.5) - u * digamma


def trigamma_term(log_x: Tensor) -> Tensor:
    r"""Return :math:`x\,[x\,\psi_1(x) - 1]`, which tends to 1/2; to 1 as x vanishes."""
    n = _SHIFT[log_x.dtype]
    y = torch.exp(-log_x.clamp(min=math.log(n)))
    large = 0.5 + y * _polynomial(_TRIGAMMA, y.square())
    if smallest(log_x) >= math.log(n):
        return large
    x = torch.exp(log_x.clamp(max=math.log(n)))
    y = 1 / (x + n)
    series = x * y * (1 - y / 2 + y.square() * _polynomial(_TRIGAMMA, y.square()))
    for i in range(1, n + 1):
        series = series + x / (x + i).square()
    return torch.where(log_x < math.log(n), 1 - x + x * series, large)
