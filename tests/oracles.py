"""Independent oracles in arbitrary precision: the textbook formulas, term by term."""

from __future__ import annotations

from collections.abc import Sequence

import mpmath


def number(x):
    """Take a float as the exact binary number it is; an mpf keeps its digits."""
    return x if isinstance(x, mpmath.mpf) else mpmath.mpf(float(x))


def dirichlet_kl(log_alpha: Sequence[float], log_beta: Sequence[float], digits: int = 80):
    """KL(Dir(alpha) || Dir(beta)), its gradients in log alpha and log beta, and its shape part.

    KL = ln B(beta) - ln B(alpha) + sum_k (alpha_k - beta_k) (psi(alpha_k) - psi(alpha_0)).
    The inputs are taken as the exact binary numbers they are.
    """
    with mpmath.workdps(digits):
        alpha = [mpmath.exp(number(x)) for x in log_alpha]
        beta = [mpmath.exp(number(y)) for y in log_beta]
        alpha_0, beta_0 = mpmath.fsum(alpha), mpmath.fsum(beta)
        psi, lgamma = mpmath.digamma, mpmath.loggamma
        psi_alpha = [psi(a) for a in alpha]
        psi_beta = [psi(b) for b in beta]
        psi_alpha_0, psi_beta_0 = psi(alpha_0), psi(beta_0)
        kl = lgamma(alpha_0) - lgamma(beta_0)
        kl += mpmath.fsum(lgamma(b) - lgamma(a) for a, b in zip(alpha, beta, strict=True))
        kl += mpmath.fsum(
            (a - b) * (p - psi_alpha_0) for a, b, p in zip(alpha, beta, psi_alpha, strict=True)
        )
        trigamma_0 = mpmath.psi(1, alpha_0)
        grad_alpha = [
            a * ((a - b) * mpmath.psi(1, a) - (alpha_0 - beta_0) * trigamma_0)
            for a, b in zip(alpha, beta, strict=True)
        ]
        grad_beta = [
            b * (pb - psi_beta_0 - pa + psi_alpha_0)
            for b, pa, pb in zip(beta, psi_alpha, psi_beta, strict=True)
        ]
        shape = beta_0 * mpmath.fsum(
            b / beta_0 * (mpmath.log(b / beta_0) - mpmath.log(a / alpha_0))
            for a, b in zip(alpha, beta, strict=True)
        )
        return kl, grad_alpha, grad_beta, shape


def log_concentrations(
    logits: Sequence[float], logit_scale: float, temperature: float, digits: int = 120
):
    """ln alpha_k = (z_k / s + 1) / T without any rounding to speak of."""
    with mpmath.workdps(digits):
        scale, temp = number(logit_scale), number(temperature)
        return [(number(z) / scale + 1) / temp for z in logits]


def paper_weight(temperature: float, digits: int = 120):
    """lambda = 1e5 / (1 + exp(2 / T))."""
    with mpmath.workdps(digits):
        return 100_000 / (1 + mpmath.exp(2 / number(temperature)))


def measures(log_alpha: Sequence[float], digits: int = 60) -> dict:
    """The uncertainty measures of a Dirichlet, under the names of their functions."""
    with mpmath.workdps(digits):
        alpha = [mpmath.exp(number(x)) for x in log_alpha]
        alpha_0, count = mpmath.fsum(alpha), len(alpha)
        probs = [a / alpha_0 for a in alpha]
        entropy = -mpmath.fsum(p * mpmath.log(p) for p in probs)
        psi_0 = mpmath.digamma(alpha_0 + 1)
        aleatoric = mpmath.fsum(
            p * (psi_0 - mpmath.digamma(a + 1)) for p, a in zip(probs, alpha, strict=True)
        )
        return {
            "predictive_entropy": entropy,
            "aleatoric_uncertainty": aleatoric,
            "mutual_information": entropy - aleatoric,
            "epistemic_uncertainty": count / (alpha_0 + count),
            "vacuity": count / alpha_0,
        }
