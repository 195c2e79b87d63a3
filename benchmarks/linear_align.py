"""Time, memory and agreement of ``linear_dirichlet_align``, as Markdown.

    python benchmarks/linear_align.py [--device cuda] [--quick]

Beside it stands the loss of the whole matrix of cosines, with the closed form and with
torch.distributions' divergence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from _report import machine, table, warn_if_busy
from _timing import calls, peak, ratio, spread
from torch import Tensor

import calibclip

Result = tuple[Tensor, Tensor]
BATCH, SIZE = 4096, 512
CLASSES = 21841
BOUND = 1e-5
SLICE = 64  # images whose loss is computed in float64


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


def step(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Result:
    """Return the loss and its gradient in the images."""
    value = loss(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs[0])[0]


def difference(found: Result, wanted: Result) -> float:
    """Return the larger of the relative differences of the loss and of its gradient (norms)."""
    pairs = zip(found, wanted, strict=True)
    errors = [float((got.double() - want).norm() / want.double().norm()) for got, want in pairs]
    return float(np.max(errors))  # NaN if one is


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
    losses: dict[str, Callable[..., Tensor]] = {
        "linear_dirichlet_align": calibclip.linear_dirichlet_align,
        "loss of all cosines": whole,
        "the same, torch.distributions": partial(whole, impl="torch_distributions"),
    }
    adv, ref, text, target = inputs
    part = adv[:SLICE].detach().requires_grad_(), ref[:SLICE], text, target[:SLICE]
    exact = (*(x.detach().double() for x in part[:3]), part[3])
    exact[0].requires_grad_()
    truth = step(partial(whole, impl="reference"), exact)
    ours, other, _ = (difference(step(loss, part), truth) for loss in losses.values())
    results: list[Result] = []
    peaks: list[int] = []
    for loss in losses.values():
        with peak(device) as found:
            results.append(step(loss, inputs))
        peaks.append(found.bytes)
    apart = difference(*results[:2])
    print(
        f"B = {batch}, C = {CLASSES}, D = {SIZE}, float32: loss and its gradient in the images. "
        f"For {SLICE} images the first two differ by {ours:.1e} and {other:.1e} from float64, for "
        f"all by {apart:.1e} from one another: the larger relative difference of the loss and of "
        f"its gradient (norm; bound {BOUND:g}).\n"
    )
    if not np.max([ours, other, apart]) <= BOUND:
        sys.exit("No speed is reported for a wrong result.")
    steps = {name: partial(step, loss, inputs) for name, loss in losses.items()}
    times = calls(steps, device, samples=3, warm_up=0)  # they have run above
    matrix = 4 * batch * CLASSES
    rows: list[list[str]] = []
    for name, extra in zip(losses, peaks, strict=True):
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
    warn_if_busy()
    main()
