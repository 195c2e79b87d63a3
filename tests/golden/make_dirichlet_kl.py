"""Make ``dirichlet_kl.npz``: Dirichlet KLs and their gradients, by mpmath.

Run by hand, from anywhere; it takes about a minute and always writes the same bytes:

    python tests/golden/make_dirichlet_kl.py

The tests and ``benchmarks/dirichlet_kl.py`` read the file. For every number of classes C it holds

    log_alpha_C, log_beta_C         (rows, C) float32; the inputs, exact as they stand
    grad_alpha_C, grad_beta_C       (rows, C) float64; d KL / d log_alpha, d KL / d log_beta
    kl_C, shape_C, evidence_C       (rows,)   float64; kl = shape + evidence
    kind_C                          (rows,)   what the row tests, see ``rows`` below
    temperature_C, sd_C             (rows,)   T and the cosine differences' sd; NaN outside "clip"
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import oracles

PATH = Path(__file__).with_name("dirichlet_kl.npz")
TEMPERATURES = (0.03, 0.07, 0.5, 1.0)
SDS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5)
CLASSES = {2: 2, 10: 2, 200: 1, 1000: 1}  # C: rows of each "clip" case
NAN = float("nan")

Row = tuple[str, float, float, np.ndarray, np.ndarray]


def clip_like(rng: np.random.Generator, n_classes: int, sd: float) -> np.ndarray:
    """Cosines of a clean and of an attacked image: (reference, adversarial)."""
    reference = rng.normal(0.2, 0.06, n_classes)
    adversarial = reference + rng.normal(0.0, sd, n_classes)
    return np.clip([reference, adversarial], -1, 1)


def rows(n_classes: int, rng: np.random.Generator) -> Iterator[Row]:
    """Yield (kind, T, sd, log_alpha, log_beta)."""
    for temperature in TEMPERATURES:
        for sd in SDS:
            for _ in range(CLASSES[n_classes]):
                reference, adversarial = (clip_like(rng, n_classes, sd) + 1) / temperature
                yield "clip", temperature, sd, adversarial, reference
    if n_classes == 1000:
        return
    for sd in (1e-5, 1e-3, 0.1, 2.0):
        below_one = rng.uniform(-4, 0, n_classes)
        yield "below 1", NAN, NAN, below_one, below_one + rng.normal(0, sd, n_classes)
        straddling = rng.uniform(
            -2, 5.5, n_classes
        )  # 6, where float32 starts the recurrence, is e^1.8
        straddling[:2] = 1.7, 1.9
        yield "straddling 6", NAN, NAN, straddling, straddling + rng.normal(0, sd, n_classes)
        yield "just below 12", NAN, NAN, *np.log(12) + rng.normal(0, [[sd], [sd]], (2, n_classes))
    for shift in (2.0**-10, 0.25, -0.5, 3.0, -6.0):
        # Multiples of 2^-10, so that the shift is the same for all classes in float32 too.
        for centre, width in ((17, 1), (28, 4), (2, 2)):
            base = np.round(rng.normal(centre, width, n_classes) * 1024) / 1024
            yield "common shift", NAN, NAN, base, base + shift
    for temperature in (0.03, 0.07):
        yield "unrelated", NAN, NAN, *(rng.uniform(-1, 1, (2, n_classes)) + 1) / temperature
    confident = np.zeros(n_classes)
    confident[0] = 28
    doubtful = np.full(n_classes, 14.0)
    yield "one class", NAN, NAN, confident, confident + rng.normal(0, 1e-3, n_classes)
    yield "one class", NAN, NAN, confident, doubtful
    yield "one class", NAN, NAN, doubtful, confident
    yield "one class", NAN, NAN, confident, np.roll(confident, 1)
    one_gap = rng.normal(17, 1, n_classes)
    yield "one gap", NAN, NAN, one_gap, one_gap + (np.arange(n_classes) == 1)
    yield "one gap", NAN, NAN, one_gap, one_gap - 4 * (one_gap == one_gap.max())
    yield "one gap", NAN, NAN, one_gap, one_gap + 4 * (one_gap == one_gap.min())
    yield "extremes", NAN, NAN, *rng.uniform(-60, 80, (2, n_classes))
    yield "extremes", NAN, NAN, *rng.uniform(-10, 10, (2, n_classes))


def table(n_classes: int) -> dict[str, np.ndarray]:
    """Compute everything about one number of classes."""
    columns: dict[str, list] = {}
    for kind, temperature, sd, *inputs in rows(n_classes, np.random.default_rng(n_classes)):
        log_alpha, log_beta = (values.astype(np.float32) for values in inputs)
        kl, grad_alpha, grad_beta, shape = oracles.dirichlet_kl(log_alpha, log_beta, digits=120)
        row = {
            "kind": kind,
            "temperature": temperature,
            "sd": sd,
            "log_alpha": log_alpha,
            "log_beta": log_beta,
            "kl": float(kl),
            "shape": float(shape),
            "evidence": float(kl - shape),
            "grad_alpha": [float(g) for g in grad_alpha],
            "grad_beta": [float(g) for g in grad_beta],
        }
        for name, value in row.items():
            columns.setdefault(f"{name}_{n_classes}", []).append(value)
    return {name: np.array(values) for name, values in columns.items()}


def main() -> None:
    arrays = {name: array for size in CLASSES for name, array in table(size).items()}
    np.savez_compressed(PATH, allow_pickle=False, **arrays)
    print(f"{PATH}: {PATH.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
