"""Hand values, agreement, peers' faults, speed and memory of the metrics, as Markdown tables.

    python benchmarks/metrics.py [--quick]

Needs scikit-learn and torchmetrics. Speed is not reported unless the values are right.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _report import machine, table
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

import calibclip
from calibclip import metrics

THREADS = 2
BATCH, CLASSES = 4096, 1000


# Hand values


def hand_values() -> list[tuple[str, str, float, float]]:
    """Return (case, measure, expected, found)."""
    rows: list[tuple[str, str, float, float]] = []

    def add(case: str, found: dict[str, tuple[float, float]]) -> None:
        rows.extend((case, name, want, got) for name, (want, got) in found.items())

    def binary(confidence: list[float], truth: list[int], n_bins: int, **options: Any):
        return metrics.binary_reliability_table(
            torch.tensor(confidence), torch.tensor(truth), n_bins, **options
        )

    a = binary([0.25, 0.25, 0.55, 0.75, 0.75], [0, 0, 1, 1, 1], 2)
    add("A", {"ECE": (0.29, a.ece), "MCE": (0.316667, a.mce), "RMSCE": (0.291833, a.error(2))})
    b = binary([0.95, 1.0], [1, 0], 10)
    add("B", {"ECE": (0.475, b.ece), "MCE": (0.475, b.mce), "RMSCE": (0.475, b.error(2))})
    c, left = binary([0.5, 0.9], [0, 1], 2), binary([0.5, 0.9], [0, 1], 2, closed="left")
    add("C", {"ECE": (0.3, c.ece), "MCE": (0.5, c.mce), "RMSCE": (0.360555, c.error(2)),
              "ECE, closed on the left": (0.2, left.ece)})  # fmt: skip
    d = binary([0.6, 0.6, 0.6, 0.9], [1, 1, 0, 1], 2, binning="mass")
    add("D", {"ECE, equal mass": (0.075, d.ece)})
    e = binary([0.9] * 4, [1, 0, 0, 1], 1)
    add("E", {"L2": (0.4, e.error(2)), "L2 debiased": (0.276888, e.error(2, debias=True)),
              "its square": (0.0766667, e.error(2, debias=True, squared=True))})  # fmt: skip
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    given: dict[str, Any] = {"probs": probs, "target": torch.tensor([0, 1, 2, 1])}
    add("F", {
        "NLL": (0.691155, metrics.negative_log_likelihood(**given)),
        "Brier, sum": (0.41, metrics.brier_score(**given)),
        "Brier, half": (0.205, metrics.brier_score(**given, scale="half")),
        "Brier, mean": (0.136667, metrics.brier_score(**given, scale="mean")),
        "SCE": (0.1, metrics.classwise_calibration_error(**given, n_bins=2)),
        "ECE": (0.15, metrics.expected_calibration_error(**given, n_bins=2)),
        "MCE": (0.5, metrics.maximum_calibration_error(**given, n_bins=2)),
    })  # fmt: skip
    for case, pairs, truth, want in (
        ("G", [0.2, 0.2, 0.8, 0.8], [0, 1, 1, 1], (0.19, 0.065, 0.0625, 0.1875, 0.0, 0.0)),
        ("H", [0.1, 0.3, 0.6, 0.9], [0, 1, 0, 1], (0.2175, 0.07625, 0.0, 0.25, 0.01625, 0.125)),
    ):
        metric = metrics.BrierDecomposition(2)
        metric.take_pairs(torch.tensor(pairs, dtype=torch.float64), torch.tensor(truth).bool())
        terms = metric.compute()._asdict().items()
        add(case, {name: (w, got) for w, (name, got) in zip(want, terms, strict=True)})
    doubt = torch.tensor([0.1, 0.2, 0.3, 0.4])
    right = torch.tensor([1, 0, 1, 0])
    add("I", {
        "failure AUROC": (0.75, metrics.failure_auroc(doubt, right)),
        "AURC mean": (0.333333, metrics.aurc(doubt, right)),
        "AURC trapezoid": (0.361111, metrics.aurc(doubt, right, convention="trapezoid")),
        "AURC fd-shifts": (0.270833, metrics.aurc(doubt, right, convention="fd-shifts")),
        "AUGRC": (0.1875, metrics.augrc(doubt, right)),
        "E-AURC": (0.125, metrics.excess_aurc(doubt, right)),
    })  # fmt: skip
    tied = torch.zeros(4)
    add("J", {"failure AUROC": (0.5, metrics.failure_auroc(tied, right)),
              "AURC": (0.5, metrics.aurc(tied, right)),
              "AUGRC": (0.25, metrics.augrc(tied, right))})  # fmt: skip
    k: dict[str, Any] = {
        "probs": torch.tensor([[0.8, 0.2]] * 4),
        "target": torch.tensor([0, 0, 1, 1]),
    }
    add("K", {"smooth ECE": (0.3, metrics.smooth_calibration_error(**k)),
              "ECE": (0.3, metrics.expected_calibration_error(**k))})  # fmt: skip
    for off, want in ((0.1, 0.0988559), (0.3, 0.2218476)):
        add("L", {f"smooth ECE, a = {off}": (want, smooth_two_sided(off))})
    add("L", {"at a width of 0.1": (0.0987581, smooth_two_sided(0.1, bandwidth=0.1))})
    m: dict[str, Any] = {
        "probs": torch.tensor([[0.9, 0.1], [0.8, 0.2]]),
        "target": torch.tensor([1, 0]),
    }
    top: dict[str, Any] = {**m, "calibration": "top-label", "bandwidth": 0.4}
    add("M", {
        "MMCE": (0.377370, metrics.mmce(**m)),
        "SKCE unbiased": (-0.140184, metrics.kernel_calibration_error(**top, estimator="unbiased")),
        "SKCE biased": (0.142408, metrics.kernel_calibration_error(**top, estimator="biased")),
    })  # fmt: skip
    n = binary([0.75] * 4, [1, 1, 1, 0], 1)
    exact = binary([0.75] * 4, [1, 1, 1, 0], 1, interval="clopper-pearson")
    add("N", {"Wilson, lower": (0.300642, float(n.ci_lower[0])),
              "Wilson, upper": (0.954413, float(n.ci_upper[0])),
              "Clopper-Pearson, lower": (0.194120, float(exact.ci_lower[0])),
              "Clopper-Pearson, upper": (0.993691, float(exact.ci_upper[0]))})  # fmt: skip
    for case, log_alpha, values in (
        ("O", torch.tensor([2.0, 1.0, 1.0]).log(),
         (1.0397208, 5 / 6, 0.2063874, 3 / 7, 0.75, 0.5, -0.9584261)),
        ("P", torch.zeros(10), (2.3025851, 1.9289683, 0.3736168, 0.5, 1.0, 0.9, -12.8018275)),
        ("Q", torch.tensor([28.0] + [0.0] * 9),
         (1.804658e-10, 1.778349e-10, 2.630970e-12, 6.914400e-12, 6.914400e-12, None, -243.0000)),
    ):  # fmt: skip
        names = ("TU", "AU", "MI", "EU", "vacuity", "EPKL", "DE")
        functions = (
            calibclip.predictive_entropy,
            calibclip.aleatoric_uncertainty,
            calibclip.mutual_information,
            calibclip.epistemic_uncertainty,
            calibclip.vacuity,
            calibclip.expected_pairwise_kl,
            calibclip.differential_entropy,
        )
        add(case, {
            name: (want, float(function(log_alpha)))
            for name, function, want in zip(names, functions, values, strict=True)
            if want is not None
        })  # fmt: skip
    one = torch.tensor([[28.0] + [0.0] * 9])
    left, _ = metrics.failure_scores(logits=one, target=torch.tensor([0]))
    add("Q", {"1 - largest share": (6.222960e-12, math.exp(float(left)))})
    many = torch.full((10,), 28.0)
    add("R", {
        "MI": (3.111480e-13, float(calibclip.mutual_information(many))),
        "AU": (2.3025851, float(calibclip.aleatoric_uncertainty(many))),
        "DE": (-135.10411, float(calibclip.differential_entropy(many))),
    })  # fmt: skip
    for alpha, want in (((5.0, 3.0, 2.0), 0.413333), ((6.0, 6.0, 1.0), 10 / 13)):
        found = float(calibclip.dissonance(torch.tensor(alpha).log()))
        add("S", {f"dissonance of {alpha}": (want, found)})
    return rows


def smooth_two_sided(off: float, **options: Any) -> float:
    """Return the smooth ECE of half at 1/4, right more often by ``off``, half at 3/4."""
    count = 1000
    low = torch.full((count, 4), 0.25)
    high = torch.tensor([[0.75, 0.25 / 3, 0.25 / 3, 0.25 / 3]]).expand(count, 4)
    right = (round(count * (0.25 + off)), round(count * (0.75 - off)))
    target = torch.cat([(torch.arange(count) >= n).long() for n in right])
    return metrics.smooth_calibration_error(torch.cat([low, high]), target=target, **options)


def check_hand_values() -> bool:
    rows = hand_values()
    wrong = [row for row in rows if abs(row[3] - row[2]) > 2e-6 * max(abs(row[2]), 1e-12)
             and abs(row[3] - row[2]) > 1e-6 * (abs(row[2]) >= 1e-3)]  # fmt: skip
    cells = [[case, name, f"{want:.7g}", f"{got:.7g}"] for case, name, want, got in rows]
    table(["case", "measure", "by hand", "calibclip"], cells)
    print(f"{len(rows)} hand values, {len(wrong)} wrong\n")
    return not wrong


# Agreement


def check_agreement() -> bool:
    """Compare with scikit-learn, torchmetrics, mpmath on random data."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(3 * rng.normal(size=(5000, 20))).float()
    target = torch.from_numpy(rng.integers(20, size=5000))
    probs, right = logits.softmax(1), logits.argmax(1) == target
    doubt = torch.from_numpy(rng.normal(size=5000))
    peers: dict[str, tuple[str, float, float]] = {
        "NLL": (
            "scikit-learn",
            metrics.negative_log_likelihood(logits=logits, target=target),
            log_loss(target, logits.double().softmax(1), labels=range(20)),
        ),
        "Brier, sum": (
            "scikit-learn",
            metrics.brier_score(logits=logits, target=target),
            sum(brier_score_loss(target == k, logits.double().softmax(1)[:, k]) for k in range(20)),
        ),
        "failure AUROC": (
            "scikit-learn",
            metrics.failure_auroc(doubt, right),
            float(roc_auc_score(~right, doubt)),
        ),
        "AUPR, errors": (
            "scikit-learn",
            metrics.failure_aupr_error(doubt, right),
            float(average_precision_score(~right, doubt)),
        ),
    }
    norms: tuple[tuple[Any, float], ...] = (("l1", 1), ("l2", 2), ("max", math.inf))
    for norm, mine in norms:
        theirs = MulticlassCalibrationError(num_classes=20, n_bins=15, norm=norm)(probs, target)
        ours = metrics.expected_calibration_error(probs, target=target, norm=mine)
        peers[f"ECE, norm {mine}"] = ("torchmetrics", ours, float(theirs))
    with mpmath.workdps(40):
        total = mpmath.fsum(
            mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(float(z))) for z in row)) - float(row[y])
            for row, y in zip(logits[:200], target[:200], strict=True)
        )
        truth = float(total / 200)
    ours = metrics.negative_log_likelihood(logits=logits[:200], target=target[:200])
    peers["NLL, 200 rows"] = ("mpmath", ours, truth)
    table(
        ["measure", "peer", "difference"],
        [[name, peer, f"{abs(a - b):.1e}"] for name, (peer, a, b) in peers.items()],
    )
    return all(abs(a - b) < 1e-6 for _, a, b in peers.values())


def show_faults() -> None:
    """Show known faults of torchmetrics beside calibclip on the same input."""
    one = torch.tensor([[0.95, 0.05], [1.0, 0.0]])
    cosines = torch.tensor([[0.31, 0.22], [0.28, 0.24]])
    target = torch.tensor([0, 1])
    rows = []
    theirs = MulticlassCalibrationError(num_classes=2, n_bins=10, norm="l1")
    ours = metrics.expected_calibration_error(one, target=target, n_bins=10)
    rows.append(["ECE with a confidence of 1 (a bin of its own)",
                 f"{float(theirs(one, target)):.4f}", f"{ours:.4f}"])  # fmt: skip
    theirs.reset()
    try:
        metrics.expected_calibration_error(cosines, target=target)
        found = "accepted"
    except ValueError as error:
        found = f"refused: {str(error).split(';')[-1].strip()}"
    rows.append(["cosines passed as probabilities",
                 f"accepted: {float(theirs(cosines, target)):.4f}", found])  # fmt: skip
    table(["input", "torchmetrics", "calibclip"], rows)


# Speed and memory


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return a few batches that stand for many: what is in them costs nothing of the time."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(BATCH, CLASSES, generator=generator).mul_(2).softmax(1),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def streamed(name: str) -> Any:
    if name == "torchmetrics":
        return MulticlassCalibrationError(num_classes=CLASSES, n_bins=15, norm="l1")
    return metrics.MetricGroup(
        {
            "ece": metrics.ExpectedCalibrationError(),
            "classwise": metrics.ClasswiseCalibrationError(),
            "brier": metrics.BrierScore(),
            "nll": metrics.NegativeLogLikelihood(),
        }
    )


def stream(name: str, rows: int, pool: list[tuple[Tensor, Tensor]], scores: str = "probs") -> float:
    """Return the seconds of one pass over so many rows."""
    metric, done, index = streamed(name), 0, 0
    began = time.perf_counter()
    while done < rows:
        probs, target = pool[index % len(pool)]
        count = min(BATCH, rows - done)
        if name == "torchmetrics":
            metric.update(probs[:count], target[:count])
        else:
            metric.update(**{scores: probs[:count]}, target=target[:count])
        done, index = done + count, index + 1
    metric.compute()
    return time.perf_counter() - began


def peak_memory(name: str, rows: int) -> float:
    """Return the MiB that one pass adds to a fresh process that holds the batches."""
    code = (
        "import resource, sys, torch; sys.path.insert(0, sys.argv[1]); import metrics as b; "
        f"torch.set_num_threads({THREADS}); pool = b.batches(1); "
        f"b.stream({name!r}, 2 * b.BATCH, pool); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"b.stream({name!r}, {rows}, pool); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    here = str(Path(__file__).resolve().parent)
    run = subprocess.run(
        [sys.executable, "-c", code, here], capture_output=True, text=True, check=True
    )
    return float(run.stdout) / 1024


def spread(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def speed(rows: int, rounds: int) -> None:
    pool = batches(4)
    for name in ("calibclip", "torchmetrics"):
        stream(name, 4 * BATCH, pool)
    seconds: dict[str, list[float]] = {"calibclip": [], "torchmetrics": []}
    for _ in range(rounds):
        for name, found in seconds.items():
            found.append(stream(name, rows, pool))
    ratios = [a / b for a, b in zip(seconds["calibclip"], seconds["torchmetrics"], strict=True)]
    table(
        ["four metrics of calibclip beside ECE of torchmetrics alone", ""],
        [
            ["rows by classes, in batches", f"{rows:,} by {CLASSES:,}, {BATCH:,}"],
            ["calibclip, seconds", spread(seconds["calibclip"])],
            ["torchmetrics, seconds", spread(seconds["torchmetrics"])],
            ["ratio of time", spread(ratios)],
            ["calibclip, MiB more than after two batches", f"{peak_memory('calibclip', rows):.1f}"],
            ["torchmetrics, MiB", f"{peak_memory('torchmetrics', rows):.1f}"],
        ],
    )


def whole_sets(n: int, rounds: int) -> None:
    """Time what has to sort or to transform all samples at once."""
    rng = np.random.default_rng(0)
    confidence = torch.from_numpy(rng.beta(4, 1, size=n)).float()
    right = torch.from_numpy(rng.uniform(size=n)) < confidence
    probs = torch.stack([confidence, 1 - confidence], 1)
    target = (~right).long()
    doubt = -torch.logit(confidence)
    measures: dict[str, Callable[[], float]] = {
        "smooth ECE": lambda: metrics.smooth_calibration_error(probs, target=target),
        "ECE, equal mass": lambda: metrics.expected_calibration_error(
            probs, target=target, binning="mass"
        ),
        "ECE-sweep": lambda: metrics.sweep_calibration_error(probs, target=target),
        "failure AUROC": lambda: metrics.failure_auroc(doubt, right),
        "failure FPR95": lambda: metrics.failure_fpr95(doubt, right),
        "AURC": lambda: metrics.aurc(doubt, right),
        "AUGRC": lambda: metrics.augrc(doubt, right),
        "AUROC, scikit-learn": lambda: float(roc_auc_score(~right, doubt)),
    }
    rows = []
    for name, measure in measures.items():
        measure()
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            measure()
            found.append(time.perf_counter() - began)
        rows.append([name, spread(found)])
    table([f"{n:,} samples", "seconds"], rows)


# Two processes


def worker(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    group = streamed("calibclip")
    group = metrics.MetricGroup(
        {**group, "classwise": metrics.ClasswiseCalibrationError(n_classes=CLASSES)}
    )
    if rank == 0:
        for probs, target in batches(3):
            for part in (slice(0, 1000), slice(1000, 1001), slice(1001, BATCH)):
                group.update(probs[part], target=target[part])
    values = group.compute()
    if rank == 1:
        torch.save((values, group["ece"].compute(sync=False)), f"{path}/values")
    dist.barrier()
    dist.destroy_process_group()


def two_processes() -> bool:
    group = streamed("calibclip")
    for probs, target in batches(3):
        group.update(probs, target=target)
    expected = group.compute()
    with tempfile.TemporaryDirectory() as path:
        mp.spawn(  # pyright: ignore[reportPrivateImportUsage]
            worker, args=(path,), nprocs=2
        )
        values, alone = torch.load(f"{path}/values", weights_only=False)
    differences = {name: abs(values[name] - expected[name]) for name in expected}
    table(
        ["two gloo ranks, one empty, uneven batches, minus one process", ""],
        [[name, f"{difference:.1e}"] for name, difference in differences.items()]
        + [["the empty rank alone", str(alone)]],
    )
    return max(differences.values()) < 1e-12


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    print(f"{machine()}\n")
    right = check_hand_values()
    right &= check_agreement()
    show_faults()
    right &= two_processes()
    if not right:
        raise SystemExit("values are wrong: no speed is reported")
    share = 10 if options.quick else 1
    whole_sets(1_000_000 // share, 5)
    speed(1_000_000 // share, 3)


if __name__ == "__main__":
    main()
