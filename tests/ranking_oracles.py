"""Metrics of a ranking by plain loops over fractions, and by every order of the ties."""

import itertools
from fractions import Fraction

from torch.utils._python_dispatch import TorchDispatchMode


class NoLook(TorchDispatchMode):
    """Refuses operations whose result or shape depends on values, for which a device must stop."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "_unique2", "bincount", "index"):
            raise AssertionError(f"{name} looks at values")
        return func(*args, **(kwargs or {}))


def auroc(score, positive):
    """Wins of the positive sample over all pairs."""
    pairs = [
        (s, t)
        for s, p in zip(score, positive, strict=True)
        if p
        for t, q in zip(score, positive, strict=True)
        if not q
    ]
    wins = sum(Fraction(2) if s > t else Fraction(s == t) for s, t in pairs)
    return wins / (2 * len(pairs))


def average_precision(score, positive):
    total, area, recall = sum(positive), Fraction(0), Fraction(0)
    for threshold in sorted(set(score), reverse=True):
        found = [p for s, p in zip(score, positive, strict=True) if s >= threshold]
        step = Fraction(sum(found), total) - recall
        area, recall = area + step * Fraction(sum(found), len(found)), recall + step
    return area


def fpr_at_tpr(score, positive, tpr):
    n_positive = sum(positive)
    rates = []
    for threshold in [*score, float("inf")]:
        found = [p for s, p in zip(score, positive, strict=True) if s >= threshold]
        if sum(found) >= tpr * n_positive:
            rates.append(Fraction(len(found) - sum(found), len(score) - n_positive))
    return min(rates)


def curve(uncertainty, correct):
    """Numbers accepted and wrong among them, at each distinct threshold."""
    points = []
    for threshold in sorted(set(uncertainty)):
        accepted = [c for u, c in zip(uncertainty, correct, strict=True) if u <= threshold]
        points.append((len(accepted), len(accepted) - sum(accepted)))
    return points


def orders(uncertainty, correct):
    """Correctness in the order of acceptance, for every order of equal uncertainties."""
    groups = [
        [c for u, c in zip(uncertainty, correct, strict=True) if u == value]
        for value in sorted(set(uncertainty))
    ]
    for choice in itertools.product(*(itertools.permutations(group) for group in groups)):
        yield [c for group in choice for c in group]


def expected_risks(uncertainty, correct):
    """R(k) for k = 1..N, averaged over all orders of equal uncertainties."""
    sums, count = [Fraction(0)] * len(correct), 0
    for order in orders(uncertainty, correct):
        count += 1
        for k in range(1, len(order) + 1):
            sums[k - 1] += Fraction(k - sum(order[:k]), k)
    return [total / count for total in sums]


def aurc(uncertainty, correct, convention):
    n = len(correct)
    if convention == "fd-shifts":
        points = [(Fraction(k, n), Fraction(e, k)) for k, e in curve(uncertainty, correct)]
        points = [(Fraction(0), points[0][1]), *points]
        return trapezoid(points)
    risks = expected_risks(uncertainty, correct)
    if convention == "mean":
        return sum(risks) / n
    if n == 1:
        return risks[0]
    points = [(Fraction(k, n), risk) for k, risk in enumerate(risks, 1)]
    return trapezoid(points) / (1 - Fraction(1, n))


def augrc(uncertainty, correct):
    n = len(correct)
    points = [(Fraction(k, n), Fraction(e, n)) for k, e in curve(uncertainty, correct)]
    return trapezoid([(Fraction(0), Fraction(0)), *points])


def trapezoid(points):
    return sum(((x - w) * (v + y) / 2 for (w, v), (x, y) in itertools.pairwise(points)), Fraction())


def coverage_at_risk(uncertainty, correct, risk):
    allowed = [k for k, e in curve(uncertainty, correct) if e <= risk * k]
    return Fraction(max(allowed, default=0), len(correct))


def optimal(correct, convention):
    return aurc(range(len(correct)), sorted(correct, reverse=True), convention)
