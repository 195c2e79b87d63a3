"""Accuracy, speed and memory of the Dirichlet KL, and what it weighs, as Markdown tables.

    python benchmarks/dirichlet_kl.py [--device cuda] [--quick]

Compares the implementations with what published code does: ``kl_divergence`` of two
``torch.distributions.Dirichlet``, with their default validation. Speed is not reported unless the
accuracy is what the package promises.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _report import machine, table
from _timing import (
    calls,
    copy_bandwidth,
    device_times,
    peak_bytes,
    peak_on_device,
    ratio,
    spread,
)
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

import calibclip

TABLES = Path(__file__).resolve().parents[1] / "tests" / "golden" / "dirichlet_kl.npz"
CLASSES = (2, 10, 200, 1000)
BOUND = 5e-6
SIZES = {
    "cpu": [(batch, classes) for classes in (10, 100, 1000, 21841) for batch in (64, 256, 1024)],
    "cuda": [(256, 1000), (1024, 1000), (4096, 1000), (4096, 8192), (4096, 21841)],
}
THREADS = 2
# Matrices that forward and backward of a fused form read and write: 2 and 2, 1 of them written.
SWEEPS = 5

KL = Callable[[Tensor, Tensor], Tensor]


def published(log_alpha: Tensor, log_beta: Tensor, validate: bool | None = None) -> Tensor:
    alpha, beta = log_alpha.exp(), log_beta.exp()
    return kl_divergence(
        Dirichlet(alpha, validate_args=validate), Dirichlet(beta, validate_args=validate)
    )


def providers(device: str) -> dict[str, KL]:
    """Return ours, the published one last; the first of ours is what is chosen by itself."""
    names = ("triton", "compile", "eager") if device == "cuda" else ("eager", "compile")
    ours: dict[str, KL] = {name: partial(calibclip.dirichlet_kl, impl=name) for name in names}
    return ours | {"torch.distributions": published}


# Accuracy


def relative_error(got: Tensor, want: np.ndarray) -> float:
    """Return the error of a row; 0 where float32 cannot hold the truth."""
    size = np.linalg.norm(want)
    if size > torch.finfo(torch.float32).max:
        return 0.0
    error = float(np.linalg.norm(got.double().numpy() - want) / size)
    return error if error == error else np.inf


def errors(kl: KL, name: int, tables: dict[str, np.ndarray], device: str) -> list[list[float]]:
    """Return the errors of every row's KL and of the worse of its two gradients."""
    log_alpha, log_beta = (
        torch.from_numpy(tables[f"{argument}_{name}"]).to(device).requires_grad_()
        for argument in ("log_alpha", "log_beta")
    )
    value = kl(log_alpha, log_beta)
    grads = torch.autograd.grad(value.sum(), (log_alpha, log_beta))
    value, *grads = (found.detach().cpu() for found in (value, *grads))
    return [
        [
            relative_error(value[row : row + 1], tables[f"kl_{name}"][row : row + 1]),
            max(
                relative_error(grad[row], tables[f"{argument}_{name}"][row])
                for grad, argument in zip(grads, ("grad_alpha", "grad_beta"), strict=True)
            ),
        ]
        for row in range(len(value))
    ]


def accuracy(device: str) -> bool:
    """Print the worst relative errors by case; return whether all of ours keep their bound."""
    with np.load(TABLES) as archive:
        tables = dict(archive)
    worst: dict[tuple[str, str, str], list[float]] = {}
    everyone = providers(device)
    for name in CLASSES:
        found = np.hstack([errors(kl, name, tables, device) for kl in everyone.values()])
        for row, kind in enumerate(tables[f"kind_{name}"]):
            temperature, sd = tables[f"temperature_{name}"][row], tables[f"sd_{name}"][row]
            clip = kind == "clip"
            case = ("CLIP-like", f"{temperature:g}", f"{sd:g}") if clip else (str(kind), "", "")
            worst[case] = np.maximum(worst.get(case, 0), found[row]).tolist()

    print("## Accuracy in float32\n")
    print(
        "Worst relative error of the KL and of its gradients (norm) against mpmath at the same "
        f"float32 inputs, over C = {', '.join(map(str, CLASSES))}. sd: of the differences between "
        f"cosines. Bound: {BOUND:g}.\n"
    )
    header = ["case", "T", "sd"]
    header += [f"{provider}, {what}" for provider in everyone for what in ("KL", "gradient")]
    table(
        header, [[*case, *(f"{error:.1e}" for error in errors)] for case, errors in worst.items()]
    )
    missed = [" ".join(case).strip() for case, errors in worst.items() if max(errors[:-2]) > BOUND]
    for case in missed:
        print(f"**One of ours misses its bound: {case}.**\n")
    return not missed


# Speed and memory


def clip_like(
    batch: int, n_classes: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return log alpha of attacked images, which requires a gradient, and of clean ones."""
    rng = torch.Generator(device).manual_seed(0)
    reference = torch.randn(batch, n_classes, generator=rng, device=device).mul_(0.05).add_(0.2)
    adversarial = torch.randn(batch, n_classes, generator=rng, device=device)
    adversarial.mul_(0.03).add_(reference)
    log_alpha, log_beta = (
        calibclip.log_concentration(cosine.clamp_(-1, 1)).to(dtype)
        for cosine in (adversarial, reference)
    )
    return log_alpha.requires_grad_(), log_beta


def step(kl: KL, log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    """Run forward and backward once."""
    return torch.autograd.grad(kl(log_alpha, log_beta).mean(), log_alpha)[0]


def saved_matrices(kl: KL, inputs: tuple[Tensor, Tensor]) -> int:
    """Count the BxC storages kept for backward, the inputs' own aside."""
    kept: dict[int, Tensor] = {}  # holds the tensors: a storage's address must not be used again

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= inputs[0].numel() and tensor.shape[-1] == inputs[0].shape[-1]:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(kl, *inputs)
    return len(kept.keys() - {values.untyped_storage().data_ptr() for values in inputs})


def speed(device: str, samples: int, quick: bool) -> None:
    """Print time, saved matrices and peak memory of forward and backward."""
    print("## Speed and memory, forward and backward, float32\n")
    print(
        "CLIP-like cosines at T = 0.07, differences of sd 0.03. Interleaved samples after warm-up, "
        "median and 20th to 80th percentile. Times are comparable within one run only: read the "
        "speed-up, the median of the ratios to torch.distributions between neighbouring samples. "
        "Saved: BxC storages kept for backward beyond the inputs (saved_tensors_hooks). Peak: most "
        "bytes allocated at once beyond the inputs, gradient included, in BxC matrices.\n"
    )
    header = ["BxC", "", "call, ms", "speed-up", "saved BxC", "peak, BxC"]
    rows: list[list[str]] = []
    for batch, n_classes in SIZES[device][: 4 if quick else None]:
        inputs = clip_like(batch, n_classes, device)
        everyone = providers(device)
        steps = {name: partial(step, kl, *inputs) for name, kl in everyone.items()}
        large = batch * n_classes > 1 << 22
        times = calls(steps, device, samples=max(5, samples // 8) if large else samples)
        for name, kl in everyone.items():
            peak = peak_on_device(steps[name]) if device == "cuda" else peak_bytes(steps[name])
            rows.append(
                [
                    f"{batch}x{n_classes}",
                    name,
                    spread(times[name]),
                    f"{ratio(times['torch.distributions'], times[name]):.2f}",
                    f"{saved_matrices(kl, inputs)}",
                    f"{peak / (4 * batch * n_classes):.2f}",
                ]
            )
    table(header, rows)


def bandwidth() -> None:
    """Print what share of the device's own copy bandwidth the fused forms reach."""
    copy = copy_bandwidth()
    print("## Time on the device alone\n")
    print(
        f"The host ahead of the device, cold L2 cache, validation off. Bandwidth: {SWEEPS} BxC "
        f"matrices read or written in forward and backward, of a copy's {copy / 1e12:.2f} TB/s.\n"
    )
    rows: list[list[str]] = []
    ours = {name: kl for name, kl in providers("cuda").items() if name in ("triton", "eager")}
    everyone = ours | {"torch.distributions": partial(published, validate=False)}
    for dtype in (torch.float32, torch.bfloat16):
        for batch, n_classes in SIZES["cuda"]:
            inputs = clip_like(batch, n_classes, "cuda", dtype)
            steps = {
                name: partial(step, kl, *inputs)
                for name, kl in everyone.items()
                if dtype == torch.float32 or name == "triton"
            }
            times = device_times(steps, samples=20)
            for name in steps:
                moved = SWEEPS * inputs[0].nbytes / np.median(times[name])
                slow = times.get("torch.distributions")
                rows.append(
                    [
                        f"{batch}x{n_classes}",
                        str(dtype).removeprefix("torch."),
                        name,
                        spread(times[name]),
                        "" if slow is None else f"{ratio(slow, times[name]):.1f}",
                        f"{moved / copy:.0%}" if name == "triton" else "",
                    ]
                )
    table(["BxC", "dtype", "", "device, ms", "speed-up", "of copy bandwidth"], rows)


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="only the smaller sizes")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    print(f"# Dirichlet KL\n\n{machine(arguments.device)}\n")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1:
        print(
            f"**Load average {os.getloadavg()[0]:.1f}: the machine is busy. Threads that wait for "
            "one another make times meaningless then.**\n"
        )
    if not accuracy(arguments.device):
        sys.exit("No speed is reported for a wrong result.")
    speed(arguments.device, 16, arguments.quick)
    if arguments.device == "cuda":
        bandwidth()
    else:
        weighs()


if __name__ == "__main__":
    main()
