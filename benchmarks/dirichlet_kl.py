"""Accuracy, speed and memory of the Dirichlet KL, and what it weighs, as Markdown tables.

    python benchmarks/dirichlet_kl.py [--quick]

Compares calibclip's closed form with what published code does: ``kl_divergence`` of two
``torch.distributions.Dirichlet``, with their default validation. Speed is not reported unless the
accuracy is what the package promises.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _report import machine, table
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence
from torch.profiler import ProfilerActivity, profile

import calibclip

TABLES = Path(__file__).resolve().parents[1] / "tests" / "golden" / "dirichlet_kl.npz"
CLASSES = (2, 10, 200, 1000)
BOUND = 5e-6
SIZES = ((64, 200), (256, 1000), (1024, 1000))
THREADS = 2

KL = Callable[[Tensor, Tensor], Tensor]


def published(log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    return kl_divergence(Dirichlet(log_alpha.exp()), Dirichlet(log_beta.exp()))


PROVIDERS: dict[str, KL] = {
    "closed form": calibclip.dirichlet_kl,
    "torch.distributions": published,
}


# Accuracy


def relative_error(got: Tensor, want: np.ndarray) -> float:
    """Return the error of a row; 0 where float32 cannot hold the truth."""
    size = np.linalg.norm(want)
    if size > torch.finfo(torch.float32).max:
        return 0.0
    error = float(np.linalg.norm(got.double().numpy() - want) / size)
    return error if error == error else np.inf


def row_errors(kl: KL, name: int, row: int, tables: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return the errors of one row's KL and of the worse of its two gradients."""
    log_alpha, log_beta = (
        torch.from_numpy(tables[f"{argument}_{name}"][row]).unsqueeze(0).requires_grad_()
        for argument in ("log_alpha", "log_beta")
    )
    value = kl(log_alpha, log_beta)
    grads = torch.autograd.grad(value.sum(), (log_alpha, log_beta))
    worst = max(
        relative_error(grad[0], tables[f"{argument}_{name}"][row])
        for grad, argument in zip(grads, ("grad_alpha", "grad_beta"), strict=True)
    )
    return relative_error(value.detach(), tables[f"kl_{name}"][row : row + 1]), worst


def accuracy() -> bool:
    """Print the worst relative errors by case; return whether the closed form keeps its bound."""
    with np.load(TABLES) as archive:
        tables = dict(archive)
    worst: dict[tuple[str, str, str], list[float]] = {}
    for name in CLASSES:
        for row, kind in enumerate(tables[f"kind_{name}"]):
            temperature, sd = tables[f"temperature_{name}"][row], tables[f"sd_{name}"][row]
            clip = kind == "clip"
            case = ("CLIP-like", f"{temperature:g}", f"{sd:g}") if clip else (str(kind), "", "")
            found = [
                error for kl in PROVIDERS.values() for error in row_errors(kl, name, row, tables)
            ]
            worst[case] = [
                max(pair) for pair in zip(worst.get(case, [0.0] * 4), found, strict=True)
            ]

    print("## Accuracy in float32\n")
    print(
        "Worst relative error of the KL and of its gradients (norm) against mpmath at the same "
        f"float32 inputs, over C = {', '.join(map(str, CLASSES))}. sd: of the differences between "
        f"cosines. Bound: {BOUND:g}.\n"
    )
    header = ["case", "T", "sd"]
    header += [f"{provider}, {what}" for provider in PROVIDERS for what in ("KL", "gradient")]
    table(
        header, [[*case, *(f"{error:.1e}" for error in errors)] for case, errors in worst.items()]
    )
    missed = [" ".join(case).strip() for case, errors in worst.items() if max(errors[:2]) > BOUND]
    for case in missed:
        print(f"**The closed form misses its bound: {case}.**\n")
    return not missed


# Speed and memory


def clip_like(batch: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """Return log alpha of attacked images, which requires a gradient, and of clean ones."""
    rng = torch.Generator().manual_seed(0)
    reference = 0.2 + 0.05 * torch.randn(batch, n_classes, generator=rng)
    adversarial = reference + 0.03 * torch.randn(batch, n_classes, generator=rng)
    log_alpha, log_beta = (
        calibclip.log_concentration(cosine.clamp(-1, 1)) for cosine in (adversarial, reference)
    )
    return log_alpha.requires_grad_(), log_beta


def step(kl: KL, log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    """Run forward and backward once."""
    return torch.autograd.grad(kl(log_alpha, log_beta).mean(), log_alpha)[0]


def seconds(batch: int, n_classes: int, samples: int) -> dict[str, np.ndarray]:
    """Time the providers in turn, so that whatever slows the machine slows them alike."""
    inputs = clip_like(batch, n_classes)
    times: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for sample in range(samples + 5):  # 5 to warm up
        for name, kl in PROVIDERS.items():
            start = time.perf_counter()
            step(kl, *inputs)
            if sample >= 5:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def saved_matrices(kl: KL, batch: int, n_classes: int) -> int:
    """Count the BxC storages kept for backward, the inputs' own aside."""
    inputs = clip_like(batch, n_classes)
    kept: dict[int, Tensor] = {}  # holds the tensors: a storage's address must not be used again

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= batch * n_classes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(kl, *inputs)
    return len(kept.keys() - {values.untyped_storage().data_ptr() for values in inputs})


def peak_bytes(kl: KL, batch: int, n_classes: int) -> int:
    """Return the most that was allocated at once beyond the inputs, from the profiler's record."""
    inputs = clip_like(batch, n_classes)
    step(kl, *inputs)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(kl, *inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    totals = np.cumsum([event["args"]["Bytes"] for event in changes])
    return int(totals.max())


def speed(sizes: tuple[tuple[int, int], ...], samples: int) -> None:
    """Print time, saved matrices and peak memory of forward and backward."""
    print("## Speed and memory, forward and backward, float32\n")
    print(
        f"CLIP-like cosines at T = 0.07, differences of sd 0.03. {samples} interleaved samples "
        "after warm-up. Times are comparable within one run only: read the ratio, the median of "
        "the ratios between neighbouring samples. Saved: BxC storages kept for backward beyond "
        "the inputs (saved_tensors_hooks). Peak: most bytes allocated at once beyond the inputs, "
        "gradient included, summed from every allocation and release that the profiler records.\n"
    )
    header = ["BxC", "", "median ms", "p20-p80 ms", "speed-up", "saved BxC", "peak MiB", "in BxC"]
    rows: list[list[str]] = []
    for batch, n_classes in sizes:
        times = seconds(batch, n_classes, samples)
        for name, kl in PROVIDERS.items():
            low, median, high = 1e3 * np.percentile(times[name], [20, 50, 80])
            ratio = np.median(times["torch.distributions"] / times[name])
            peak = peak_bytes(kl, batch, n_classes)
            rows.append(
                [
                    f"{batch}x{n_classes}",
                    name,
                    f"{median:.2f}",
                    f"{low:.2f}-{high:.2f}",
                    f"{ratio:.1f}",
                    f"{saved_matrices(kl, batch, n_classes)}",
                    f"{peak / 2**20:.2f}",
                    f"{peak / (4 * batch * n_classes):.1f}",
                ]
            )
    table(header, rows)


# What the loss weighs


def weighs() -> None:
    """Print what the alignment loss trains, and what rounded logits do to it."""
    generator = torch.Generator().manual_seed(0)
    batch, n_classes = 256, 200
    ref = 0.18 + 0.02 * torch.randn(batch, n_classes, generator=generator)
    rows, best = torch.arange(batch), torch.randint(n_classes, (batch,), generator=generator)
    ref[rows, best] += 0.08
    noise = torch.randn(batch, n_classes, generator=generator)
    adv, close = ref + 0.01 * noise, ref + 1e-4 * noise

    def terms(first: Tensor, second: Tensor, temperature: float = 0.07) -> calibclip.AlignTerms:
        return calibclip.dirichlet_align_terms(100 * first, 100 * second, temperature=temperature)

    def rounded(dtype: torch.dtype) -> float:
        kl = calibclip.dirichlet_align_terms((100 * close).to(dtype), (100 * ref).to(dtype)).kl
        return float(kl / terms(close, ref).kl)

    lines = [("effective weight of the paper's lambda", f"{terms(adv, ref).effective_weight:.0f}")]
    for temperature in (0.07, 0.2, 0.5, 1.0):
        found = terms(adv, ref, temperature)
        share = float(found.evidence / found.kl)
        lines.append(
            (f"share of the evidence part in the KL at T = {temperature:g}", f"{share:.1e}")
        )
    lines += [
        ("loss when all cosines fall by 0.1", f"{terms(ref - 0.1, ref).total:.1e}"),
        ("KL from logits in float16, differences of 1e-4", f"{rounded(torch.float16):.2f} x"),
        ("KL from logits in bfloat16, differences of 1e-4", f"{rounded(torch.bfloat16):.2f} x"),
    ]
    print("## What the loss weighs\n")
    print(
        f"Synthetic cosines like OpenAI CLIP's, {batch}x{n_classes}: sd 0.02 around 0.18, one "
        "class 0.08 higher, differences of sd 0.01 unless stated.\n"
    )
    table(["quantity", "value"], [list(line) for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the two smaller sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    print(f"# Dirichlet KL\n\n{machine()}\n")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1:
        print(
            f"**Load average {os.getloadavg()[0]:.1f}: the machine is busy. Threads that wait for "
            "one another make times meaningless then.**\n"
        )
    if not accuracy():
        sys.exit("No speed is reported for a wrong result.")
    if arguments.quick:
        speed(SIZES[:2], samples=30)
    else:
        speed(SIZES, samples=50)
    weighs()


if __name__ == "__main__":
    main()
