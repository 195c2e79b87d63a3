r"""What is left of the gamma functions once Stirling's leading terms are taken out.

Write :math:`\varphi(x) = \ln\Gamma(x) - x\ln x + x`. In a Dirichlet divergence the terms
:math:`x \ln x - x` of all classes combine into a categorical KL (see ``closed_form``); this module
evaluates what :math:`\varphi` adds to the value and to both gradients. Every function takes the gap
``d = ln b - ln a`` *itself*, because the difference of two float32 logarithms of size 20 would have
lost it, and is built so that nothing cancels as ``b`` approaches ``a``.

For arguments below :math:`N` the recurrence :math:`\Gamma(x + 1) = x\,\Gamma(x)` first moves them
up by :math:`N`; above, the asymptotic series in ``1/x`` is exact to the dtype's precision.

Results carry a factor :math:`w = e^{\mathtt{log\_weight}}`, folded in before an exponential can
overflow. Nothing here is differentiated by autograd: unselected branches of ``torch.where`` may
hold infinities.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.polynomial.chebyshev import cheb2poly, poly2cheb
from torch import Tensor

# Arguments of at least N need no recurrence.
_SHIFT = {torch.float32: 6, torch.float64: 12}
# e^t - 1 - t needs a series up to the first bound on |t|; up to the second a series is the cheaper
# way, and two concentrations with such a gap count as close.
_SERIES_NEEDED = 0.5
CLOSE = 3.0
# B_2, B_4, ...: the Bernoulli numbers of the Stirling series, enough of them for x >= N.
_BERNOULLI = {
    torch.float32: (1 / 6, -1 / 30, 1 / 42),
    torch.float64: (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510),
}
# From this ln a on no Bernoulli number matters: 1/(6 a) is 8 eps.
_LARGE = {dtype: -math.log(6 * 8 * torch.finfo(dtype).eps) for dtype in _BERNOULLI}


def may_look(t: Tensor) -> bool:
    """Return whether values can be read: not from a stalled accelerator, nor while tracing."""
    return (
        t.device.type == "cpu"
        and t.numel() > 0
        and not torch.compiler.is_compiling()
        and not is_wrapped(t)
    )


def is_wrapped(*tensors: Tensor) -> bool:
    """Return whether a transform of ``torch.func`` is at work on one of the tensors."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return any(map(functorch.is_functorch_wrapped_tensor, tensors))


def is_differentiated(*tensors: Tensor) -> bool:
    """Return whether ``torch.func`` takes a derivative in one of the tensors."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return any(map(functorch.is_gradtrackingtensor, tensors))


def largest(t: Tensor) -> float:
    """Return ``max |t|``, or infinity where it cannot be looked at."""
    if not may_look(t):
        return math.inf
    low, high = torch.aminmax(t.detach())
    bound = max(-float(low), float(high))
    return math.inf if math.isnan(bound) else bound


def smallest(t: Tensor) -> float:
    """Return ``min t``, or -infinity next to a NaN and where it cannot be looked at."""
    if not may_look(t):
        return -math.inf
    low = float(t.detach().min())
    return -math.inf if math.isnan(low) else low


def bernoulli_numbers(smallest: float, dtype: torch.dtype) -> tuple[float, ...]:
    """Return those that matter from ``ln a = smallest`` on: each term is x^-2 of the one before."""
    numbers = _BERNOULLI[dtype]
    resolution = math.log(8 * torch.finfo(dtype).eps)
    sizes = (-math.log(6) - smallest * (2 * n + 1) for n in range(len(numbers)))
    return numbers[: sum(size > resolution for size in sizes)]


def is_large(smallest: float, dtype: torch.dtype) -> bool:
    """Return whether no Bernoulli number matters from ``ln a = smallest`` on."""
    return smallest >= _LARGE[dtype]


class Pairs:
    """Pairs of concentrations (a, b): their gaps ``d = ln b - ln a``, and ``ln a - shift = x``.

    ``bound`` is one on the gaps, ``smallest`` one on the logarithms; they spare a block the
    formulas it does not need.
    """

    def __init__(self, d: Tensor, x: Tensor, shift: float, bound: float, smallest: float) -> None:
        self.d, self.x, self.shift = d, x, shift
        self.bound, self.smallest = bound, smallest
        self.close = bound < CLOSE

    @property
    def bernoulli(self) -> tuple[float, ...]:
        """The Bernoulli numbers that matter."""
        return bernoulli_numbers(self.smallest, self.d.dtype)

    @property
    def large(self) -> bool:
        """Whether all arguments are so large that no Bernoulli number matters."""
        return is_large(self.smallest, self.d.dtype)

    @property
    def need_shift(self) -> bool:
        """Whether some argument may be below N."""
        return self.smallest < math.log(_SHIFT[self.d.dtype])

    def log(self) -> tuple[Tensor, Tensor]:
        """Return ``ln a`` and ``ln b``."""
        log_a = self.x + self.shift
        return log_a, log_a + self.d

    def reciprocals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return v = 1/a, u = 1/b, and v - u to full relative precision."""
        log_a, log_b = self.log()
        v, u = torch.exp(-log_a), torch.exp(-log_b)
        gap = torch.expm1(self.d) * u
        if not self.close:
            gap = torch.where(self.d.abs() < _SERIES_NEEDED, gap, v - u)
        return v, u, gap


def second_order(t: Tensor, bound: float) -> Tensor:
    r"""Return :math:`e^t - 1 - t \ge 0` for ``|t| <= bound``, to full relative precision."""
    return orders(t, bound)[1]


def orders(t: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    r"""Return :math:`e^t - 1` and :math:`e^t - 1 - t` likewise."""
    if bound < CLOSE:
        return _close_orders(t, bound)
    growth, (_, series) = torch.expm1(t), _close_orders(t, _SERIES_NEEDED)
    return growth, torch.where(t.abs() < _SERIES_NEEDED, series, growth - t)


def _close_orders(t: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    r"""Return both from one even series, in half the operations of two.

    With :math:`r = t/2 - [\tfrac t2 \coth \tfrac t2 - 1]` they are :math:`g = t / (1 - r)` and
    :math:`g\,r`; the bracket is a series in :math:`t^2`.
    """
    tidy = next(step for step in (0.25, 0.5, 1.0, 1.5, 2.0, CLOSE) if bound <= step)
    one, *lower, second, first = _coefficients(tidy, t.dtype, t.device)
    square = t.square()
    r = torch.addcmul(second, first, square)
    for coefficient in reversed(lower):
        torch.addcmul(coefficient, r, square, out=r)
    r.mul_(square).add_(t, alpha=0.5)
    growth = torch.sub(one, r, out=square)
    torch.div(t, growth, out=growth)
    return growth, r.mul_(growth)


_cached_coefficients: dict[tuple[float, torch.dtype, torch.device], tuple[Tensor, ...]] = {}


def _coefficients(bound: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return 1 and the polynomial as 0-d tensors, which cost as much to make as a small block."""
    key = (bound, dtype, device)
    if key in _cached_coefficients:
        return _cached_coefficients[key]
    values = (1.0, *economized(bound, dtype))
    tensors = torch.tensor(values, dtype=dtype, device=device).unbind()
    if type(tensors[0]) is Tensor:  # not one that a compiler is tracing with
        _cached_coefficients[key] = tensors
    return tensors


def economized(bound: float, dtype: torch.dtype) -> tuple[float, ...]:
    r"""Return a polynomial in :math:`s = t^2` for :math:`(1 - \tfrac t2 \coth \tfrac t2) / s`.

    It is as short as the dtype allows for ``|t| <= bound``: the Taylor polynomial in
    :math:`t/\mathtt{bound}`, written in Chebyshev polynomials, loses those whose coefficients are
    too small to matter.
    """
    cosh, sinh = ([0.25**n / math.factorial(2 * n + k) for n in range(40)] for k in (0, 1))
    coth: list[float] = []  # their quotient, sinh's series being that of sinh(t/2) / (t/2)
    for n, value in enumerate(cosh):
        coth.append(value - sum(sinh[n - i] * coth[i] for i in range(n)))
    taylor = np.zeros(2 * len(coth) - 3)
    taylor[::2] = [-value * bound ** (2 * n) for n, value in enumerate(coth[1:])]
    chebyshev = poly2cheb(taylor)
    rest = bound / math.expm1(bound)  # 1 - r at the upper end, where errors weigh most
    matters = np.abs(chebyshev) > torch.finfo(dtype).eps / 4 * rest * (1 - rest) / bound**2
    powers = cheb2poly(chebyshev[: int(np.flatnonzero(matters)[-1]) + 1])[::2]
    return tuple(float(power) / bound ** (2 * n) for n, power in enumerate(powers))


def _weighted_second_order(t: Tensor, log_weight: Tensor, bound: float) -> Tensor:
    """Return ``w (e^t - 1 - t)``; a large ``t`` may overflow only if the product does."""
    weight = torch.exp(log_weight)
    if bound < CLOSE:
        return second_order(t, bound).mul_(weight)
    series = weight * _close_orders(t, _SERIES_NEEDED)[1]
    direct = torch.exp(t + log_weight) - weight * (1 + t)
    return torch.where(t.abs() < _SERIES_NEEDED, series, direct)


def _weighted_growth(pairs: Pairs, log_weight: Tensor) -> Tensor:
    """Return ``w (e^d - 1)``; a large ``d`` may overflow only if the product does."""
    weight, d = torch.exp(log_weight), pairs.d
    if pairs.close:
        return torch.expm1(d).mul_(weight)
    direct = torch.exp(d + log_weight) - weight
    return torch.where(d.abs() < _SERIES_NEEDED, weight * torch.expm1(d), direct)


class _Shifted:
    """Pairs moved up by the recurrence: (a + i, b + i) for i = 0..N."""

    def __init__(self, pairs: Pairs) -> None:
        self.steps = _SHIFT[pairs.d.dtype]
        self.d, self.close = pairs.d, pairs.close
        self.log_a, self.log_b = pairs.log()
        self.u, self.v = torch.exp(-self.log_b), torch.exp(-self.log_a)
        self.ratio = torch.expm1(pairs.d)
        self.needed = torch.minimum(self.log_a, self.log_b) < math.log(self.steps)
        self.top = self.gap(self.steps)
        log_top = self.log_a + torch.log1p(self.steps * self.v)
        self.lifted = Pairs(self.top, log_top, 0.0, pairs.bound, math.log(self.steps))

    def choose(self, close: Tensor, apart: Tensor) -> Tensor:
        """Select by the gap of each pair."""
        return torch.where(self.d.abs() < CLOSE, close, apart)

    def gap(self, i: int) -> Tensor:
        """Return ``ln((b + i) / (a + i))``."""
        close = torch.log1p(self.ratio / (1 + i * self.v))
        if self.close:
            return close
        return self.choose(close, self.d + torch.log1p(i * self.u) - torch.log1p(i * self.v))


def evidence_divergence(pairs: Pairs, log_weight: Tensor) -> Tensor:
    r"""Return :math:`w\,[\varphi(b) - \varphi(a) - (b - a)\,\varphi'(a)]`, non-negative.

    For large arguments this is
    :math:`\tfrac12 (e^d - 1 - d) + R(b, a)` with R the Bregman divergence of the Stirling series.
    """
    large = _divergence(pairs, log_weight)
    if not pairs.need_shift:
        return large
    shifted = _Shifted(pairs)
    n, top = shifted.steps, shifted.top
    small = _divergence(shifted.lifted, log_weight)
    for i in range(n):
        small = small + _weighted_second_order(shifted.gap(i), log_weight, pairs.bound)
    # What the shift does to the leading terms: (a+N) h(d_N) - a h(d), h(t) = t e^t - e^t + 1. For
    # close pairs both are second-order small; for distant ones they nearly cancel, but then the
    # first-order terms b (d_N - d) + N d_N, to which they reduce, do not.
    b, weight = torch.exp(shifted.log_b), torch.exp(log_weight)
    leading = (b + n) * second_order(-top, pairs.bound) - b * second_order(-pairs.d, pairs.bound)
    leading = leading * weight
    if not pairs.close:
        logs = torch.log1p(n * shifted.u) - torch.log1p(n * shifted.v)
        apart = torch.exp(shifted.log_b + log_weight) * logs + weight * n * top
        leading = shifted.choose(leading, apart)
    return torch.where(shifted.needed, small + leading, large)


def _divergence(pairs: Pairs, log_weight: Tensor) -> Tensor:
    r"""Return :math:`\tfrac{w}{2} (e^d - 1 - d) + wR` for arguments of at least N.

    The Bregman divergence of :math:`x^{-m}` is
    :math:`(e^d - 1)^2 \sum_{j<m} (m-j)\,v^{m-1-j}u^{j+1}`, and :math:`(e^d - 1)\,u = v - u`. The
    double sum is built up by :math:`G_{m+1} = vG_m + u^m,\; S_{m+1} = vS_m + G_{m+1}`.
    """
    half = _weighted_second_order(pairs.d, log_weight - math.log(2), pairs.bound)
    numbers = pairs.bernoulli
    if not numbers:
        return half
    v, u, gap = pairs.reciprocals()
    series: Tensor | float = numbers[0] / 2
    power, geometric, total = u, v + u, 2 * v + u  # m = 2
    for n, number in enumerate(numbers[1:], start=2):
        power = power * u
        geometric = v * geometric + power
        total = v * total + geometric
        series = series + total * (number / (2 * n * (2 * n - 1)))
        power = power * u
        geometric = v * geometric + power
        total = v * total + geometric
    return half + _weighted_growth(pairs, log_weight) * gap * series


def evidence_slope_first(pairs: Pairs, log_weight: Tensor) -> Tensor:
    r"""Return :math:`w\,(b - a)\,a\,\varphi''(a)`: minus the derivative of the divergence in ln a.

    :math:`a^2\varphi''(a) = a^2\psi_1(a) - a = \tfrac12 + \tfrac1{6a} - \tfrac1{30a^3} + \dots`
    """
    if pairs.large:
        return _weighted_growth(pairs, log_weight - math.log(2))
    change = _weighted_growth(pairs, log_weight)
    numbers = pairs.bernoulli
    log_a, _ = pairs.log()
    curvature = _curvature(torch.exp(-log_a), numbers)
    if pairs.need_shift:
        n = _SHIFT[change.dtype]
        a = torch.exp(log_a)
        v = 1 / (a + n)
        # psi_1(A) = 1/A + (A^2 phi''(A)) / A^2 at A = a + N
        small = a.square() * (v + v.square() * _curvature(v, _BERNOULLI[change.dtype])) - a
        for i in range(n):
            small = small + (a / (a + i)).square()
        curvature = torch.where(log_a < math.log(n), small, curvature)
    return change * curvature


def _curvature(v: Tensor, numbers: tuple[float, ...]) -> Tensor:
    """Return ``x^2 psi_1(x) - x`` for ``v = 1/x``."""
    result, power = 0.5 + numbers[0] * v, v
    for number in numbers[1:]:
        power = power * v.square()
        result = result + number * power
    return result


def evidence_slope_second(pairs: Pairs, log_weight: Tensor) -> Tensor:
    r"""Return :math:`w\,b\,[\varphi'(b) - \varphi'(a)]`: the divergence's derivative in ln b."""
    if pairs.large:
        return _weighted_growth(pairs, log_weight - math.log(2))
    change = _weighted_growth(pairs, log_weight)
    large = change * _slope(pairs)
    if not pairs.need_shift:
        return large
    shifted = _Shifted(pairs)
    n, u, v = shifted.steps, shifted.u, shifted.v
    # a b / ((a+i)(b+i)) = 1 / ((1 + i v)(1 + i u))
    factor = _slope(shifted.lifted) / ((1 + n * v) * (1 + n * u))
    for i in range(n):
        factor = factor + 1 / ((1 + i * v) * (1 + i * u))
    moved = torch.exp(shifted.log_b + log_weight) * (shifted.top - pairs.d)
    return torch.where(shifted.needed, change * factor + moved, large)


def _slope(pairs: Pairs) -> Tensor:
    r"""Return (phi'(b) - phi'(a)) / (1/a - 1/b), with phi'(x) = psi(x) - ln x."""
    v, u, _ = pairs.reciprocals()
    numbers = pairs.bernoulli
    both, u_squared, v_squared = u + v, u.square(), v.square()
    result = 0.5 + both * (numbers[0] / 2)
    power, total = u_squared, u_squared + v_squared
    for n, number in enumerate(numbers[1:], start=2):
        result = result + both * total * (number / (2 * n))
        power = power * u_squared
        total = v_squared * total + power
    return result
