"""Independent oracles of the attack objectives: definitions in mpmath, gradients by hand, one row.

An oracle takes a row of logits, numbers meant exactly as they are, and what else its objective
takes; it returns the value and the gradient in the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import mpmath
import torch
from loss_oracles import categorical_kl, squared_distance
from oracles import dirichlet_kl, log_concentrations, number

DIGITS = 50


# Classification


def cross_entropy(z, label):
    """ln(1 + sum_j e^(z_j - z_y)), in a form in which no slope is a difference of near numbers."""
    if len(z) == 1:
        return 0, [0]
    gaps = [x - z[label] for x in z]
    others = mpmath.fsum(mpmath.exp(g) for k, g in enumerate(gaps) if k != label)
    grad = [mpmath.exp(g) / (1 + others) for g in gaps]
    grad[label] = -others / (1 + others)
    return mpmath.log1p(others), grad


def margin(z, label):
    """max_(j != y) z_j - z_y; the first of the largest gets the slope."""
    best = max((k for k in range(len(z)) if k != label), key=lambda k: z[k])
    grad = [int(k == best) - int(k == label) for k in range(len(z))]
    return z[best] - z[label], grad


def quotient(lead, lead_grad, z, ranks):
    """lead / (z_(1) - mean of z_(3) to z_(ranks)), and its gradient."""
    order = sorted(range(len(z)), key=lambda k: -z[k])
    low = order[2:ranks]
    spread = z[order[0]] - mpmath.fsum(z[k] for k in low) / len(low) + number(1e-12)
    grad = [g / spread for g in lead_grad]
    grad[order[0]] -= lead / spread**2
    for k in low:
        grad[k] += lead / spread**2 / len(low)
    return lead / spread, grad


def dlr(z, label):
    """The margin per spread of the three best; the margin if there are two."""
    lead, grad = margin(z, label)
    return (lead, grad) if len(z) < 3 else quotient(lead, grad, z, 3)


def dlr_targeted(z, label, rival):
    """z_t - z_y per spread of the four best; without a divisor if there are fewer."""
    lead = z[rival] - z[label]
    grad = [int(k == rival) - int(k == label) for k in range(len(z))]
    return (lead, grad) if len(z) < 4 else quotient(lead, grad, z, 4)


# Drift


def kl(z, label, reference):
    """KL(softmax(reference) || softmax(z))."""
    value, _, grad = categorical_kl(reference, z)
    return value, grad


def embedding(z, label, reference):
    """Squared distance."""
    value, grad, _ = squared_distance(z, reference)
    return value, grad


def dirichlet(z, label, reference, logit_scale=100.0, temperature=0.07):
    """KL(Dir(alpha) || Dir(beta)) with ln alpha = (z / s + 1) / T."""
    rows = [log_concentrations(row, logit_scale, temperature) for row in (z, reference)]
    value, grad, _, _ = dirichlet_kl(*rows)
    return value, [g / (number(logit_scale) * number(temperature)) for g in grad]


# Several labels


def multilabel_cross_entropy(z, present):
    """sum_k ln(1 + e^(d_k)), d_k = -z_k for a present class and z_k for an absent one."""
    signs = [-1 if there else 1 for there in present]
    doubts = [sign * x for sign, x in zip(signs, z, strict=True)]
    value = mpmath.fsum(mpmath.log1p(mpmath.exp(d)) for d in doubts)
    grad = [s * mpmath.exp(d) / (1 + mpmath.exp(d)) for s, d in zip(signs, doubts, strict=True)]
    return value, grad


def multilabel_margin(z, present):
    """Strongest absent less weakest present, each only if there is one."""
    value, grad = number(0), [0] * len(z)
    absent = [k for k in range(len(z)) if not present[k]]
    there = [k for k in range(len(z)) if present[k]]
    if absent:
        strongest = max(absent, key=lambda k: z[k])
        value, grad[strongest] = value + z[strongest], 1
    if there:
        weakest = min(there, key=lambda k: z[k])
        value, grad[weakest] = value - z[weakest], -1
    return value, grad


def is_misranked(z, present):
    """Whether some absent class is above some present one."""
    return any(
        z[a] > z[b] for a in range(len(z)) for b in range(len(z)) if not present[a] and present[b]
    )


# Uncertainty


def aleatoric(z, logit_scale=100.0, temperature=0.07):
    """AU = sum_k p_k (psi(alpha_0 + 1) - psi(alpha_k + 1)), p = alpha / alpha_0."""
    alpha = [mpmath.exp(x) for x in log_concentrations(z, logit_scale, temperature)]
    total = mpmath.fsum(alpha)
    probs = [a / total for a in alpha]
    gaps = [mpmath.digamma(total + 1) - mpmath.digamma(a + 1) for a in alpha]
    value = mpmath.fsum(p * g for p, g in zip(probs, gaps, strict=True))
    slope = mpmath.psi(1, total + 1)
    grad = [
        p * (g - value) + a * slope - p * a * mpmath.psi(1, a + 1)
        for p, g, a in zip(probs, gaps, alpha, strict=True)
    ]
    return value, [g / (number(logit_scale) * number(temperature)) for g in grad]


def predicted(z):
    """The first class with the largest logit."""
    return max(range(len(z)), key=lambda k: z[k])


def overconfidence(z, label, **options):
    """The margin while right, ln K - AU once wrong."""
    if predicted(z) == label:
        return margin(z, label)
    value, grad = aleatoric(z, **options)
    return mpmath.log(len(z)) - value, [-g for g in grad]


def underconfidence(z, label, reference=None, **options):
    """AU while right, minus the margin while wrong."""
    if predicted(z) == label:
        return aleatoric(z, **options)
    value, grad = margin(z, label)
    return -value, [-g for g in grad]


ORACLES = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "dlr-targeted": dlr_targeted,
    "kl": kl,
    "dirichlet-kl": dirichlet,
    "embedding-l2": embedding,
    "bce": multilabel_cross_entropy,
    "multilabel-margin": multilabel_margin,
    "overconfidence": overconfidence,
    "underconfidence": underconfidence,
}


def exact(x):
    """A row as the exact numbers it holds; a class as it is."""
    return list(map(number, x)) if isinstance(x, list) else x


def evaluate(name, logits, *others, **options):
    """Run an oracle over the rows of tensors; float64 values ``(B,)`` and gradients ``(B, K)``."""
    values, grads = [], []
    columns = [logits.detach().double().tolist(), *(other.tolist() for other in others)]
    with mpmath.workdps(DIGITS):
        for row, *rest in zip(*columns, strict=True):
            value, grad = ORACLES[name](exact(row), *map(exact, rest), **options)
            values.append(float(value))
            grads.append([float(g) for g in grad])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(grads, dtype=torch.float64)


# Cases


class Case(NamedTuple):
    """A batch for every objective: the true class is at rank 1, 2, 3 and last, twice each."""

    logits: torch.Tensor
    target: torch.Tensor
    rival: torch.Tensor
    reference: torch.Tensor
    labels: torch.Tensor  # 0 or 1 per class; none in row 0, all in row 1

    def arguments(self, objective):
        """What ``objective`` takes after the logits."""
        target = self.labels if objective.target == "multilabel" else self.target
        third = {"none": [], "rival": [self.rival]}.get(objective.reference, [self.reference])
        return (target, *third)


def make_case(n_classes, scale, dtype=torch.float64, seed=0):
    """Logits of a standard deviation of ``scale``, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    ranks = 2 * sorted({rank for rank in (0, 1, 2, n_classes - 1) if rank < n_classes})
    shape = (len(ranks), n_classes)
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    reference = logits + 0.1 * scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    order = logits.double().argsort(dim=1, descending=True, stable=True)
    own = torch.tensor(ranks)
    other = (own + torch.tensor([1, 2] * (len(ranks) // 2)).clamp(max=n_classes - 1)) % n_classes
    labels = torch.randint(2, shape, generator=generator)
    labels[0], labels[1 % len(ranks)] = 0, 1
    return Case(
        logits,
        order.gather(1, own[:, None])[:, 0],
        order.gather(1, other[:, None])[:, 0],
        reference.to(dtype),
        labels,
    )
