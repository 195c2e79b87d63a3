"""Accuracy, speed and memory of the Dirichlet KL, and what it weighs, as Markdown tables.

    python benchmarks/dirichlet_kl.py [--device cuda] [--quick]

Compares the implementations with what published code does: ``kl_divergence`` of two
``torch.distributions.Dirichlet``, with their default validation. Speed is not reported unless the
accuracy is what the package promises.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import machine, table, warn_if_busy
from _timing import calls, copy_bandwidth, device_times, peak_bytes, ratio, spread
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

import calibclip
from calibclip._kernels import compiled
from calibclip._kernels.common import WHOSE

TABLES = Path(__file__).resolve().parents[1] / "tests" / "golden" / "dirichlet_kl.npz"
CLASSES = (2, 10, 200, 1000)
BOUND = 5e-6
REFUSED = "No speed is reported for a wrong result."
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


def takes(log_alpha: Tensor, log_beta: Tensor) -> bool:
    """Tell whether ``impl="compile"`` computes a call itself, or leaves all of it to eager."""
    zero = torch.zeros((), dtype=torch.float64, device=log_alpha.device)
    with torch.no_grad():
        _, _, stats = compiled.forward(log_alpha, log_beta, 1.0, 0.0, zero)
    return float(stats[0, WHOSE]) == compiled._MARK


def taken(log_alpha: Tensor, log_beta: Tensor) -> list[int]:
    """Return the rows that the compiled function takes, each in a call full of it.

    Of one size, as other code, for another size, may take another row at the limit.
    """
    size = len(log_alpha)
    return [row for row in range(size) if takes(*only([row] * size, log_alpha, log_beta))]


def only(rows: list[int], *matrices: Tensor) -> tuple[Tensor, ...]:
    return tuple(matrix.detach()[rows].requires_grad_() for matrix in matrices)


def errors(name: str, kl: KL, n_classes: int, tables: dict[str, np.ndarray], device: str) -> Any:
    """Return the errors of every row's KL and of the worse of its two gradients.

    NaN: the compiled form left that row to eager.
    """
    log_alpha, log_beta = (
        torch.from_numpy(tables[f"{argument}_{n_classes}"]).to(device).requires_grad_()
        for argument in ("log_alpha", "log_beta")
    )
    found = np.full((len(log_alpha), 2), np.nan)
    rows = list(range(len(log_alpha)))
    if name == "compile":
        rows = taken(log_alpha, log_beta)
        filled = rows + rows[:1] * (len(log_alpha) - len(rows))
        log_alpha, log_beta = only(filled, log_alpha, log_beta)
        if not rows or not takes(log_alpha, log_beta):
            sys.exit(f"compile: none of the rows of {n_classes} classes was computed by it.")
    value = kl(log_alpha, log_beta)
    grads = torch.autograd.grad(value.sum(), (log_alpha, log_beta))
    value, *grads = (result.detach().cpu() for result in (value, *grads))
    for at, row in enumerate(rows):
        found[row] = (
            relative_error(value[at : at + 1], tables[f"kl_{n_classes}"][row : row + 1]),
            max(
                relative_error(grad[at], tables[f"{argument}_{n_classes}"][row])
                for grad, argument in zip(grads, ("grad_alpha", "grad_beta"), strict=True)
            ),
        )
    return found


def accuracy(device: str) -> bool:
    """Print the worst relative errors by case; return whether all of ours keep their bound."""
    with np.load(TABLES) as archive:
        tables = dict(archive)
    worst: dict[tuple[str, str, str], Any] = {}
    everyone = providers(device)
    for n_classes in CLASSES:
        found = np.hstack(
            [errors(name, kl, n_classes, tables, device) for name, kl in everyone.items()]
        )
        for row, kind in enumerate(tables[f"kind_{n_classes}"]):
            temperature, sd = (tables[f"{of}_{n_classes}"][row] for of in ("temperature", "sd"))
            clip = kind == "clip"
            case = ("CLIP-like", f"{temperature:g}", f"{sd:g}") if clip else (str(kind), "", "")
            worst[case] = np.fmax(worst.get(case, np.nan), found[row])

    print("## Accuracy in float32\n")
    print(
        "Worst relative error of the KL and of its gradients (norm) against mpmath at the same "
        f"float32 inputs, over C = {', '.join(map(str, CLASSES))}. sd: of the differences between "
        f"cosines. Bound: {BOUND:g}. compile: over the rows that the compiled function takes; "
        "eager: it takes none.\n"
    )
    header = ["case", "T", "sd"]
    header += [f"{provider}, {what}" for provider in everyone for what in ("KL", "gradient")]
    rows = [
        [*case, *("eager" if np.isnan(error) else f"{error:.1e}" for error in found)]
        for case, found in worst.items()
    ]
    table(header, rows)
    missed = [" ".join(case).strip() for case, found in worst.items() if (found[:-2] > BOUND).any()]
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


def verify(everyone: dict[str, KL], inputs: tuple[Tensor, Tensor]) -> None:
    """Stop if the values or gradients of ours, at this size and dtype, are not those of float64.

    Some rows, from all over the batch, are compared.
    """
    batch, n_classes = inputs[0].shape
    rows = torch.linspace(0, batch - 1, 16).long().to(inputs[0].device)
    log_alpha, log_beta = (values.detach()[rows].double() for values in inputs)
    value = calibclip.dirichlet_kl(log_alpha.requires_grad_(), log_beta, impl="reference")
    wanted = value, torch.autograd.grad(value.sum() / batch, log_alpha)[0]
    for name, kl in everyone.items():
        if name == "torch.distributions":
            continue
        value = kl(*inputs)
        found = value, torch.autograd.grad(value.mean(), inputs[0])[0]
        for what, got, want in zip(("KL", "gradient"), found, wanted, strict=True):
            # By row, and more for what half precision rounds at the end.
            bound = BOUND + torch.finfo(got.dtype).eps / 2
            pairs = zip(got.detach()[rows].cpu(), want.detach().cpu().numpy(), strict=True)
            worst = max(relative_error(row.view(-1), truth.reshape(-1)) for row, truth in pairs)
            if not worst <= bound:
                sys.exit(f"{name}, {batch}x{n_classes}: {what} off by {worst:.1e}. {REFUSED}")


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
        "bytes allocated at once beyond the inputs, gradient included, in BxC matrices. Before its "
        "times, every size's value and gradient are compared with float64 (the bound above).\n"
    )
    header = ["BxC", "", "call, ms", "speed-up", "saved BxC", "peak, BxC"]
    rows: list[list[str]] = []
    for batch, n_classes in SIZES[device][: 4 if quick else None]:
        inputs = clip_like(batch, n_classes, device)
        everyone = providers(device)
        steps = {name: partial(step, kl, *inputs) for name, kl in everyone.items()}
        verify(everyone, inputs)
        large = batch * n_classes > 1 << 22
        times = calls(steps, device, samples=max(5, samples // 8) if large else samples)
        for name, kl in everyone.items():
            peak = peak_bytes(steps[name], device)
            fell_back = name == "compile" and not takes(*inputs)
            rows.append(
                [
                    f"{batch}x{n_classes}",
                    f"{name} (fell back to eager)" if fell_back else name,
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
        "The sum over what the device runs in forward and backward, from the profiler: waiting for "
        f"the host does not count. Cold L2 cache, validation off. Bandwidth: {SWEEPS} BxC "
        f"matrices read or written, of a copy's {copy / 1e12:.2f} TB/s.\n"
    )
    rows: list[list[str]] = []
    everyone = providers("cuda") | {"torch.distributions": partial(published, validate=False)}
    for dtype in (torch.float32, torch.bfloat16):
        for batch, n_classes in SIZES["cuda"]:
            inputs = clip_like(batch, n_classes, "cuda", dtype)
            measured = everyone if dtype == torch.float32 else {"triton": everyone["triton"]}
            verify(measured, inputs)
            steps = {name: partial(step, kl, *inputs) for name, kl in measured.items()}
            times = device_times(steps, samples=10)
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
    if not accuracy(arguments.device):
        sys.exit(REFUSED)
    speed(arguments.device, 16, arguments.quick)
    if arguments.device == "cuda":
        bandwidth()
    else:
        weighs()


if __name__ == "__main__":
    warn_if_busy()
    main()
