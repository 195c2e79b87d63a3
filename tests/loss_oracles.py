"""Independent oracles of the losses: the published formulas by plain loops in mpmath, per sample.

No torch and no automatic differentiation. An oracle takes ``inputs``, NumPy arrays by argument
name whose numbers are meant exactly as they are, and the labels; it returns the ``Term``s of the
loss. A term says what each sample contributes and, by input, the gradient of that; an input whose
gradient is stopped has no entry. The gradients are worked out by hand; ``difference_gradients``
checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mpmath
import numpy as np
from oracles import dirichlet_kl, number, paper_weight

DIGITS = 50

Arrays = Mapping[str, np.ndarray]
Rows = dict[str, list]


class Term(NamedTuple):
    """``weight`` times ``values`` is a summand of the loss; shapes (B,) and those of the inputs."""

    weight: float | np.ndarray
    values: np.ndarray
    grads: dict[str, np.ndarray]


def per_sample(inputs: Arrays, target, row: Callable[[Rows, int | None], tuple]):
    """Values (B,) and gradients of ``row``, which sees one sample at a time, flattened."""
    batch = len(next(iter(inputs.values())))
    values, grads = np.zeros(batch), {}
    with mpmath.workdps(DIGITS):
        for i in range(batch):
            sample = {name: [number(x) for x in a[i].ravel()] for name, a in inputs.items()}
            value, by_input = row(sample, None if target is None else int(target[i]))
            values[i] = float(value)
            for name, grad in by_input.items():
                rows = grads.setdefault(name, np.zeros((batch, inputs[name][0].size)))
                rows[i] = [float(g) for g in grad]
    return values, {name: rows.reshape(inputs[name].shape) for name, rows in grads.items()}


def reduced(rows: np.ndarray, reduction: str) -> np.ndarray:
    """Mean, sum or the rows themselves."""
    return rows if reduction == "none" else getattr(np, reduction)(rows)


def combine(
    terms: Mapping[str, Term], reduction: str, upstream=1.0, summed: Sequence[str] = ()
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The loss and its gradients for an upstream gradient, (B,) for "none" and a number else.

    The terms named in ``summed`` are added up over the batch whatever the reduction is.
    """
    batch = len(next(iter(terms.values())).values)
    total, grads = 0.0, {}
    for name, term in terms.items():
        how = "sum" if name in summed else reduction
        total = total + reduced(term.weight * term.values, how)
        factor = term.weight * np.asarray(upstream) / (batch if how == "mean" else 1)
        factor = np.broadcast_to(factor, (batch,))
        for key, grad in term.grads.items():
            share = factor.reshape(-1, *[1] * (grad.ndim - 1)) * grad
            grads[key] = grads.get(key, 0) + share
    return np.asarray(total), grads


def without(term: Term, *stopped: str) -> Term:
    """The term with some gradients stopped."""
    return term._replace(grads={k: g for k, g in term.grads.items() if k not in stopped})


def difference_gradient(value: Callable[..., object], rows: Sequence[Sequence], which: int):
    """Gradient of ``value(*rows)`` in ``rows[which]``, by central differences at a step of 1e-15.

    At 50 digits that is good to 1e-28 or so, for numbers of ordinary size.
    """
    with mpmath.workdps(DIGITS):
        step, grad = mpmath.mpf(10) ** -15, []
        rows = [[number(x) for x in row] for row in rows]
        for k in range(len(rows[which])):
            ends = []
            for sign in (1, -1):
                moved = [list(row) for row in rows]
                moved[which][k] += sign * step
                ends.append(value(*moved))
            grad.append((ends[0] - ends[1]) / (2 * step))
    return grad


# Building blocks: each returns a value and the gradients in its arguments, for one sample.


def log_softmax(z):
    """ln softmax and softmax."""
    total = mpmath.log(mpmath.fsum(mpmath.exp(x) for x in z))
    logs = [x - total for x in z]
    return logs, [mpmath.exp(x) for x in logs]


def cross_entropy(z, label, smoothing=0.0, temperature=1.0):
    """-sum_k t_k ln p_k with t = (1 - smoothing) onehot + smoothing / C, of z / temperature."""
    temperature, smoothing = number(temperature), number(smoothing)
    logs, probs = log_softmax([x / temperature for x in z])
    wanted = [(1 - smoothing) * (k == label) + smoothing / len(z) for k in range(len(z))]
    value = -mpmath.fsum(t * lp for t, lp in zip(wanted, logs, strict=True))
    return value, [(p - t) / temperature for p, t in zip(probs, wanted, strict=True)]


def categorical_kl(first, second, temperature=1.0):
    """KL(q || p) = sum q (ln q - ln p), q = softmax(first / T), p = softmax(second / T)."""
    temperature = number(temperature)
    log_q, q = log_softmax([x / temperature for x in first])
    log_p, p = log_softmax([x / temperature for x in second])
    gaps = [a - b for a, b in zip(log_q, log_p, strict=True)]
    value = mpmath.fsum(w * gap for w, gap in zip(q, gaps, strict=True))
    by_first = [w * (gap - value) / temperature for w, gap in zip(q, gaps, strict=True)]
    by_second = [(b - a) / temperature for a, b in zip(q, p, strict=True)]
    return value, by_first, by_second


def norm(a):
    """Euclidean length."""
    return mpmath.sqrt(mpmath.fsum(x * x for x in a))


def cosine(a, b):
    """cos(a, b); the gradient is what of b / |b| stands upright on a, over |a|."""
    length_a, length_b = norm(a), norm(b)
    unit_a, unit_b = [x / length_a for x in a], [y / length_b for y in b]
    value = mpmath.fsum(x * y for x, y in zip(unit_a, unit_b, strict=True))
    by_a = [(y - value * x) / length_a for x, y in zip(unit_a, unit_b, strict=True)]
    by_b = [(x - value * y) / length_b for x, y in zip(unit_a, unit_b, strict=True)]
    return value, by_a, by_b


def squared_distance(a, b, normalize=False):
    """sum (a - b)^2, or of the two after division by their lengths: 2 - 2 cos."""
    if normalize:
        value, by_a, by_b = cosine(a, b)
        return 2 - 2 * value, [-2 * g for g in by_a], [-2 * g for g in by_b]
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    return mpmath.fsum(g * g for g in gaps), [2 * g for g in gaps], [-2 * g for g in gaps]


def map_distance(a, b, distance):
    """|a - b|_2; or the mean of |a - b|; or 1 - cos. At a kink the gradient is 0."""
    if distance == "cosine":
        value, by_a, by_b = cosine(a, b)
        return 1 - value, [-g for g in by_a], [-g for g in by_b]
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    if distance == "l1":
        value = mpmath.fsum(abs(g) for g in gaps) / len(gaps)
        by_a = [mpmath.sign(g) / len(gaps) for g in gaps]
    else:
        value = norm(gaps)
        by_a = [g / value if value else value for g in gaps]
    return value, by_a, [-g for g in by_a]


def edl_fit(log_alpha, label, kind):
    """Sensoy et al. (2018), equations 3 to 5, and the gradient in ln alpha."""
    alpha = [mpmath.exp(x) for x in log_alpha]
    total = mpmath.fsum(alpha)
    onehot = [int(k == label) for k in range(len(alpha))]
    probs = [a / total for a in alpha]
    if kind == "log":
        value = mpmath.log(total) - mpmath.log(alpha[label])
        return value, [p - y for p, y in zip(probs, onehot, strict=True)]
    if kind == "digamma":
        value = mpmath.digamma(total) - mpmath.digamma(alpha[label])
        slope, own = mpmath.psi(1, total), mpmath.psi(1, alpha[label])
        return value, [a * (slope - y * own) for a, y in zip(alpha, onehot, strict=True)]
    variance = mpmath.fsum(p * (1 - p) for p in probs)
    value = mpmath.fsum((y - p) ** 2 for y, p in zip(onehot, probs, strict=True))
    value += variance / (total + 1)
    by_p = [-2 * (y - p) + (1 - 2 * p) / (total + 1) for y, p in zip(onehot, probs, strict=True)]
    mean = mpmath.fsum(p * g for p, g in zip(probs, by_p, strict=True))
    by_total = -variance / (total + 1) ** 2
    grad = [p * (g - mean) + a * by_total for p, g, a in zip(probs, by_p, alpha, strict=True)]
    return value, grad


def edl_kl(log_alpha, label):
    """KL(Dir(y + (1 - y) alpha) || Dir(1)); the label's concentration is 1 whatever alpha is."""
    zero = mpmath.mpf(0)
    kept = [zero if k == label else x for k, x in enumerate(log_alpha)]
    value, grad, _, _ = dirichlet_kl(kept, [zero] * len(kept), digits=DIGITS)
    return value, [zero if k == label else g for k, g in enumerate(grad)]


def prior_kl(log_alpha, label, concentration, direction):
    """KL, its shape part and the gradient in ln alpha; no label: a flat target."""
    log_beta = [mpmath.mpf(0)] * len(log_alpha)
    if label is not None:
        log_beta[label] = mpmath.log(1 + number(concentration))
    if direction == "reverse":
        value, grad, _, shape = dirichlet_kl(log_alpha, log_beta, digits=DIGITS)
    else:
        value, _, grad, shape = dirichlet_kl(log_beta, log_alpha, digits=DIGITS)
    return value, shape, grad


# The losses


def _ce_term(inputs, target, name, weight=1.0, **options):
    def row(sample, label):
        value, grad = cross_entropy(sample[name], label, **options)
        return value, {name: grad}

    return Term(weight, *per_sample(inputs, target, row))


def _kl_term(inputs, first, second, weight=1.0, temperature=1.0):
    def row(sample, _):
        value, by_first, by_second = categorical_kl(sample[first], sample[second], temperature)
        return value, {first: by_first, second: by_second}

    return Term(weight, *per_sample(inputs, None, row))


def _pair_term(inputs, first, second, weight, distance):
    def row(sample, _):
        value, by_first, by_second = distance(sample[first], sample[second])
        return value, {first: by_first, second: by_second}

    return Term(weight, *per_sample(inputs, None, row))


def tecoa(inputs, target, *, label_smoothing=0.0):
    """CE(z_adv, y)."""
    entropy = _ce_term(inputs, target, "logits_adv", smoothing=label_smoothing)
    return {"cross_entropy": entropy}


def pmg_aft(
    inputs,
    target,
    *,
    temperature=1.0,
    ref_weight=1.0,
    clean_weight=1.0,
    kl_reduction=None,
    detach_ref=True,
    detach_clean=False,
):
    """CE(o_adv, y) + KL(p_adv_ref || p_adv) + KL(p_clean || p_adv), o = z / temperature.

    ``kl_reduction`` is ``combine``'s business.
    """
    by_ref = _kl_term(inputs, "logits_adv_ref", "logits_adv", ref_weight, temperature)
    by_clean = _kl_term(inputs, "logits_clean", "logits_adv", clean_weight, temperature)
    return {
        "cross_entropy": _ce_term(inputs, target, "logits_adv", temperature=temperature),
        "kl_ref": without(by_ref, *["logits_adv_ref"] * detach_ref),
        "kl_clean": without(by_clean, *["logits_clean"] * detach_clean),
    }


def fare(inputs, target=None, *, clean_weight=0.0, metric="l2", normalize=False, detach_ref=True):
    """(1 - w) d(E_adv, E_ref) + w d(E_clean, E_ref)."""

    def distance(a, b):
        if metric == "cosine":
            return map_distance(a, b, "cosine")
        return squared_distance(a, b, normalize)

    stopped = ["features_ref"] * detach_ref
    pair = _pair_term(inputs, "features_adv", "features_ref", 1 - clean_weight, distance)
    terms = {"adv": without(pair, *stopped)}
    if clean_weight:
        pair = _pair_term(inputs, "features_clean", "features_ref", clean_weight, distance)
        terms["clean"] = without(pair, *stopped)
    return terms


def tga(inputs, target, *, adv_weight=0.08, clean_weight=0.05, distance="l2", detach_ref=True):
    """CE(z_adv, y) + w_adv D(A_adv, A_ref) + w_clean D(A_clean, A_ref)."""

    def between(a, b):
        return map_distance(a, b, distance)

    terms = {"cross_entropy": _ce_term(inputs, target, "logits_adv")}
    for name, weight in (("attention_adv", adv_weight), ("attention_clean", clean_weight)):
        pair = _pair_term(inputs, name, "attention_ref", weight, between)
        terms[name] = without(pair, *["attention_ref"] * detach_ref)
    return terms


def comp_tga(inputs, target, *, adv_weight=0.10, clean_weight=0.07, **options):
    """As TGA with the weights of the later paper."""
    return tga(inputs, target, adv_weight=adv_weight, clean_weight=clean_weight, **options)


def trades(inputs, target, *, weight=6.0, detach_clean=False):
    """CE(z_clean, y) + weight KL(p_clean || p_adv)."""
    divergence = _kl_term(inputs, "logits_clean", "logits_adv", weight)
    return {
        "cross_entropy": _ce_term(inputs, target, "logits_clean"),
        "kl": without(divergence, *["logits_clean"] * detach_clean),
    }


def fap_kl(sample):
    """KL(p_clean || p_adv) (cos(f_clean, f_adv) + 1) of one sample, by the product rule."""
    kl, kl_clean, kl_adv = categorical_kl(sample["logits_clean"], sample["logits_adv"])
    cos, cos_clean, cos_adv = cosine(sample["features_clean"], sample["features_adv"])
    grads = {
        "logits_clean": [(cos + 1) * g for g in kl_clean],
        "logits_adv": [(cos + 1) * g for g in kl_adv],
        "features_clean": [kl * g for g in cos_clean],
        "features_adv": [kl * g for g in cos_adv],
    }
    return kl * (cos + 1), grads


def fap(inputs, target, *, weight=1.0):
    """CE(z_clean, y) + weight KL(p_clean || p_adv) (cos + 1)."""
    return {
        "cross_entropy": _ce_term(inputs, target, "logits_clean"),
        "kl": Term(weight, *per_sample(inputs, None, lambda sample, _: fap_kl(sample))),
    }


def simclip(inputs, target=None):
    """-1/2 cos(E_adv, sg(E_other)) - 1/2 cos(E_other, sg(E_adv)); a reference is always stopped."""
    (other,) = set(inputs) - {"features_adv"}

    def half(name):
        def row(sample, _):
            value, by_adv, by_other = cosine(sample["features_adv"], sample[other])
            grad = by_adv if name == "features_adv" else by_other
            return -value / 2, {name: [-g / 2 for g in grad]}

        return Term(1.0, *per_sample(inputs, None, row))

    second = half(other)
    if other == "features_ref":
        second = without(second, other)
    return {"adv": half("features_adv"), "other": second}


def edl(inputs, target, *, kind="mse", epoch=None, annealing_epochs=10):
    """Bayes risk + lambda KL(Dir(abar) || Dir(1)), lambda = min(1, epoch / annealing_epochs)."""
    name = "log_alpha_adv"
    weight = 1.0 if epoch is None else min(1.0, epoch / annealing_epochs)

    def fit(sample, label):
        value, grad = edl_fit(sample[name], label, kind)
        return value, {name: grad}

    def regularizer(sample, label):
        value, grad = edl_kl(sample[name], label)
        return value, {name: grad}

    return {
        "fit": Term(1.0, *per_sample(inputs, target, fit)),
        "kl": Term(weight, *per_sample(inputs, target, regularizer)),
    }


def prior_network(inputs, target=None, *, target_concentration=1000.0, direction="reverse"):
    """KL between the model's Dirichlet and the target's, model first for "reverse".

    The shape part is a term of weight 0: it is no summand of its own.
    """
    name = "log_alpha_adv"

    def part(index):
        def row(sample, label):
            found = prior_kl(sample[name], label, target_concentration, direction)
            return found[index], {name: found[2]} if index == 0 else {}

        return row

    return {
        "kl": Term(1.0, *per_sample(inputs, target, part(0))),
        "shape": Term(0.0, *per_sample(inputs, target, part(1))),
    }


def strength_weight(logits, logit_scale, temperature):
    """lambda alpha_0 of one sample, alpha_0 = sum exp((z / s + 1) / T), lambda the paper's."""
    scale, temp = number(logit_scale), number(temperature)
    strength = mpmath.fsum(mpmath.exp((x / scale + 1) / temp) for x in logits)
    return paper_weight(temperature) * strength


def distillation(
    inputs,
    target=None,
    *,
    logit_scale=100.0,
    temperature=0.07,
    weight=None,
    direction="forward",
    detach_ref=True,
):
    """CE(z_adv, y) + w KL(p_ref || p_adv) ("forward"), p = softmax(z / (s T)); w per sample."""
    if weight is None:
        weight, _ = per_sample(
            {"logits_ref": inputs["logits_ref"]},
            None,
            lambda row, _: (strength_weight(row["logits_ref"], logit_scale, temperature), {}),
        )
    with mpmath.workdps(DIGITS):
        combined = number(logit_scale) * number(temperature)
    pair = ("logits_ref", "logits_adv")
    kl = _kl_term(inputs, *(pair if direction == "forward" else pair[::-1]), weight, combined)
    terms = {"kl": without(kl, *["logits_ref"] * detach_ref)}
    if target is not None:
        terms["cross_entropy"] = _ce_term(inputs, target, "logits_adv")
    return terms
