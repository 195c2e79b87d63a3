"""Time, memory and agreement of ``linear_dirichlet_align``, as Markdown.

    python benchmarks/linear_align.py [--device cuda] [--quick]

Beside it stands the loss of the whole matrix of cosines, with the closed form and with
torch.distributions' divergence.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from _report import machine, table
from _timing import calls, peak_bytes, peak_on_device, ratio, spread
from torch import Tensor

import calibclip

BATCH, SIZE = 4096, 512
CLASSES = 21841
BOUND = 1e-5


def features(
    batch: int, n_classes: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images with a gradient, references, texts and labels, all of unit length."""
    rng = torch.Generator(device).manual_seed(0)
    common = torch.randn(SIZE, generator=rng, device=device)

    def draw(rows: int) -> Tensor:
        noise = torch.randn(rows, SIZE, generator=rng, device=device)
        return torch.nn.functional.normalize(0.5 * common + noise, dim=-1)

    ref, text = draw(batch), draw(n_classes)
    adv = torch.nn.functional.normalize(ref + 0.3 * draw(batch), dim=-1)
    target = torch.randint(n_classes, (batch,), generator=rng, device=device)
    return adv.to(dtype).requires_grad_(), ref.to(dtype), text.to(dtype), target


def whole(adv: Tensor, ref: Tensor, text: Tensor, target: Tensor, impl: str = "auto") -> Tensor:
    """Return the loss of all logits at once."""
    logits, logits_ref = (100 * calibclip.cosine_similarity(x, text) for x in (adv, ref))
    return calibclip.dirichlet_align_loss(logits, logits_ref, target, impl=impl)  # pyright: ignore


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a quarter of the images")
    arguments = parser.parse_args(argv)
    device = arguments.device
    torch.set_num_threads(2)
    batch = BATCH // 4 if arguments.quick else BATCH
    print(f"# linear_dirichlet_align\n\n{machine(device)}\n")
    inputs = features(batch, CLASSES, device, torch.float32)
    losses = {
        "linear_dirichlet_align": calibclip.linear_dirichlet_align,
        "loss of all cosines": whole,
        "the same, torch.distributions": partial(whole, impl="torch_distributions"),
    }
    steps = {
        name: partial(lambda loss: torch.autograd.grad(loss(*inputs), inputs[0])[0], loss)
        for name, loss in losses.items()
    }
    ours, reference = (steps[name]() for name in list(steps)[:2])
    error = float((ours - reference).norm() / reference.norm())
    print(
        f"B = {batch}, C = {CLASSES}, D = {SIZE}, float32: loss and its gradient in the images. "
        f"The first two gradients differ by {error:.1e} of their norm (bound {BOUND:g}).\n"
    )
    if not error <= BOUND:
        sys.exit("No speed is reported for a wrong result.")
    times = calls(steps, device, samples=3, warm_up=1)
    peak = peak_on_device if device == "cuda" else peak_bytes
    matrix = 4 * batch * CLASSES
    rows: list[list[str]] = []
    for name, step in steps.items():
        extra = peak(step)
        slower = ratio(times[name], times["loss of all cosines"])
        rows.append(
            [
                name,
                spread(times[name], 1.0),
                f"{slower:.2f}",
                f"{extra / 1e6:.0f}",
                f"{extra / matrix:.2f}",
            ]
        )
    table(["", "s", "of all cosines", "peak, MB", "peak, BxC"], rows)
    print("Peak: most bytes allocated at once beyond the inputs, the gradient included.\n")


if __name__ == "__main__":
    main()
