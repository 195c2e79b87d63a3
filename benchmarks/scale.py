"""What a training step costs at 64 GPUs, worked out on paper, as the tables of docs/scale.md.

    python benchmarks/scale.py

Nothing here is a measurement of time. The bytes that logits and losses move and keep are counted
from what PyTorch does with a small batch; all else is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from _report import table
from _timing import peak_bytes
from dirichlet_kl import SWEEPS
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calibclip import (
    DirichletAlignLoss,
    TeCoALoss,
    ZeroShotClassifier,
    linear_dirichlet_align,
    metrics,
    pgd,
)
from calibclip import _kernels as kernels
from calibclip._kernels import function, special
from calibclip._kernels.common import N_STATS
from calibclip.losses.linear_align import _CHUNK_ELSEWHERE

# The job
CLASSES, BATCH, GPUS, NODE = 21_841, 32_768, 64, 8
LOCAL, MICRO, STEPS = BATCH // GPUS, 128, 2
# ViT-L/14 at 224 pixels, and its text encoder
PATCH, TOKENS, WIDTH, LAYERS, DIM = 14, 257, 1024, 24, 768
TEXT_TOKENS, TEXT_WIDTH, TEXT_LAYERS = 77, 768, 12
# H100 SXM: memory, bfloat16 and float32 as assumed to be reached, links per GPU and direction
HBM, BF16, FP32 = 3.35e12, 600e12, 50e12
NVLINK, NETWORK = 450e9, 50e9
VALIDATION = 50_000


# Arithmetic


def matmuls(tokens: int, width: int, layers: int) -> tuple[int, int]:
    """Return the FLOPs of the linear layers, and of attention, in a forward pass."""
    return layers * 24 * tokens * width**2, layers * 4 * tokens**2 * width


LINEAR, ATTENTION = matmuls(TOKENS, WIDTH, LAYERS)
EMBED = 2 * (TOKENS - 1) * 3 * PATCH**2 * WIDTH + 2 * WIDTH * DIM
FORWARD = LINEAR + ATTENTION + EMBED
BACKWARD_TO_IMAGES = FORWARD + ATTENTION  # attention has two factors, both on the way back
TEXT_FORWARD = sum(matmuls(TEXT_TOKENS, TEXT_WIDTH, TEXT_LAYERS))
# Per layer 12 d^2 weights, 9 d biases, 4 d of norms; outside: patches, class token, positions, two
# norms, the projection.
PARAMETERS = LAYERS * (12 * WIDTH**2 + 13 * WIDTH) + WIDTH * (3 * PATCH**2 + 1 + TOKENS + 4 + DIM)
LOGITS = LOCAL * CLASSES * 4
PRODUCT = 2 * LOCAL * CLASSES * DIM


def within_and_across(size: float) -> float:
    """Time for an all-gather or a reduce-scatter: across nodes each GPU its part, then within."""
    nodes = GPUS // NODE
    across = (nodes - 1) / nodes * size / NODE / NETWORK
    return across + (NODE - 1) / NODE * size / NVLINK


# Counting


class Traffic(TorchDispatchMode):
    """Add up the bytes of large tensors that operations read and write."""

    IDLE = ("empty", "new_empty", "empty_like", "detach", "_unsafe_view", "lift_fresh", "alias")
    WRITE_ONLY = ("copy_", "fill_", "zero_")

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least, self.bytes = at_least, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in self.IDLE:
            return result
        read = args[1:] if name in self.WRITE_ONLY else args
        for tensor in (*tree_leaves(read), *tree_leaves(result)):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.at_least:
                stored = tensor.untyped_storage().nbytes()
                self.bytes += min(tensor.numel() * tensor.element_size(), stored)
        return result


def without_triton() -> Any:
    """Let the kernel look at no values, by which it finds on a CPU what it can leave out."""
    return patch.multiple(special, largest=lambda _: math.inf, smallest=lambda _: -math.inf)


@contextmanager
def without_kernel() -> Iterator[None]:
    """Put in the kernel's place one that touches nothing: Triton's traffic is known."""

    def forward(first: Tensor, *_: Any) -> tuple[Tensor, ...]:
        rows = len(first)
        return first.new_empty(rows), first.new_empty(rows), first.new_empty(rows, N_STATS)

    def backward(*arguments: Any) -> list[Tensor | None]:
        _, _, first, second, *_, needs = arguments
        pairs = zip((first, second), needs, strict=True)
        return [torch.empty_like(x) if needed else None for x, needed in pairs]

    idle = SimpleNamespace(forward=forward, backward=backward)
    with (
        patch.object(function, "load", lambda _: idle),
        patch.object(kernels, "load", lambda _: idle),
    ):
        yield


Pass = Callable[[ZeroShotClassifier, Tensor, Tensor], object]
ROWS, COLUMNS = 64, 1000  # of the small batch


def small() -> tuple[ZeroShotClassifier, Tensor, Tensor]:
    """Return a classifier whose encoder is next to nothing, images and labels."""
    batch, classes = ROWS, COLUMNS
    generator = torch.Generator().manual_seed(0)
    # Cosines of CLIP's range, around 0.25: a feature is the first axis and a little of the others.
    others = F.normalize(torch.randn(classes, 3, generator=generator), dim=1)
    text_features = F.normalize(torch.cat((torch.full((classes, 1), 0.25), others), 1), dim=1)
    linear = nn.Linear(12, 4)
    linear.weight.data.copy_(0.01 * torch.randn(4, 12, generator=generator))
    linear.bias.data.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    encoder = nn.Sequential(nn.Flatten(), linear)
    classifier = ZeroShotClassifier(
        encoder,
        encoder.forward,
        text_features,
        logit_scale=100.0,
        class_names=[str(number) for number in range(classes)],
        image_size=2,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    images = torch.rand(batch, 3, 2, 2, generator=generator)
    return classifier, images, torch.randint(classes, (batch,), generator=generator)


def sweeps(of: Pass) -> float:
    """Return what a small call reads and writes, in float32 matrices of batch by classes."""
    with Traffic(ROWS * COLUMNS // 2) as traffic:
        of(*small())
    return traffic.bytes / (4 * ROWS * COLUMNS)


def kept(of: Pass) -> int:
    """Count the matrices of batch by classes that wait for backward: logits, and what is saved."""
    found: dict[int, Tensor] = {}  # holds the tensors: a storage's address must not be used again

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= ROWS * COLUMNS:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    classifier, images, target = small()
    classifier.register_forward_hook(lambda *call: keep(call[-1]))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        of(classifier, images, target)
    return len(found)


def peak(of: Pass, rows: int = ROWS) -> int:
    """Count the float32 matrices of rows by classes that a small call holds at most."""
    return round(peak_bytes(lambda: of(*small())) / (4 * rows * COLUMNS))  # features are small


def attack_step(classifier: ZeroShotClassifier, images: Tensor, target: Tensor) -> None:
    pgd(classifier, images, target, steps=1)


def reference_pass(classifier: ZeroShotClassifier, images: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        return classifier(images.flip(0))


def aligned(classifier: ZeroShotClassifier, images: Tensor, target: Tensor) -> None:
    reference = reference_pass(classifier, images, target)
    DirichletAlignLoss()(classifier(images), reference, target).backward()


def linear(
    classifier: ZeroShotClassifier, images: Tensor, target: Tensor, chunk_rows: int | None = None
) -> None:
    with torch.no_grad():
        reference = classifier.embed(images.flip(0))
    features, text = classifier.embed(images), classifier.text_features
    linear_dirichlet_align(features, reference, text, target, chunk_rows=chunk_rows).backward()


def by_distributions(classifier: ZeroShotClassifier, images: Tensor, target: Tensor) -> None:
    """The same loss as published code has it."""
    logits, reference = classifier(images), reference_pass(classifier, images, target)
    adv, ref = (
        Dirichlet(((values / 100 + 1) / 0.07).exp(), validate_args=False)
        for values in (logits, reference)
    )
    (F.cross_entropy(logits, target) + 1e-8 * kl_divergence(adv, ref).mean()).backward()


def cross_entropy(classifier: ZeroShotClassifier, images: Tensor, target: Tensor) -> None:
    TeCoALoss()(classifier(images), target).backward()


# Printing


def rounded(value: float) -> str:
    """Write two significant digits, without an exponent."""
    return f"{float(f'{value:.1e}'):g}"


def scaled(value: float, unit: str, powers: dict[str, float]) -> str:
    for prefix, power in powers.items():
        if float(f"{value:.1e}") >= power:
            return f"{rounded(value / power)} {prefix}{unit}"
    return f"0 {unit}"


def size(value: float) -> str:
    return scaled(value, "B", {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1})


def work(value: float) -> str:
    return scaled(value, "FLOP", {"P": 1e15, "T": 1e12, "G": 1e9})


def seconds(value: float) -> str:
    return scaled(value, "s", {"": 1, "m": 1e-3, "µ": 1e-6, "n": 1e-9})


def main() -> None:
    _print_setting()
    encoder_time = _print_encoder()
    _print_memory()
    loss_time, product_time = _print_logits_and_loss()
    exchange_time = _print_exchange()
    _print_text()
    _print_metrics()
    parts = {
        "image encoder": encoder_time,
        "cosines, float32": product_time,
        "logits and loss": loss_time,
        "gradients, DDP, not overlapped": exchange_time,
    }
    whole = sum(parts.values())
    rows = [
        [name, seconds(part), f"{float(f'{100 * part / whole:.1e}'):g} %"]
        for name, part in parts.items()
    ]
    table(["part of a step", "time", "share"], [*rows, ["sum", seconds(whole), "100 %"]])


def _print_setting() -> None:
    rows = [
        ["R", "GPUs, in nodes of 8", f"{GPUS}"],
        ["C", "classes", f"{CLASSES:,}"],
        ["B, b = B / R", "batch, of all and of a GPU", f"{BATCH:,}, {LOCAL}"],
        ["k", "attack steps", f"{STEPS}"],
        [
            "L, N, d",
            "layers, tokens and width of the image encoder",
            f"{LAYERS}, {TOKENS}, {WIDTH}",
        ],
        ["D", "dimension of the features", f"{DIM}"],
        ["A = 4 L N² d", "attention's products, FLOPs of an image", work(ATTENTION)],
        ["F = 24 L N d² + A + …", "forward pass, FLOPs of an image", work(FORWARD)],
        ["P = 12 L d² + …", "weights of the image encoder", f"{rounded(PARAMETERS / 1e6)} M"],
        ["F_text", "forward pass, FLOPs of a prompt", work(TEXT_FORWARD)],
        ["4 B C", "logits of the whole batch, which no GPU holds", size(4 * BATCH * CLASSES)],
    ]
    table(["symbol", "is", "value"], rows)


def _print_encoder() -> float:
    passes = {
        f"attack, forward, k = {STEPS}": ("k F", STEPS * FORWARD),
        "attack, back to the images": ("k (F + A)", STEPS * BACKWARD_TO_IMAGES),
        "training, forward": ("F", FORWARD),
        "training, back to the weights": ("2 F", 2 * FORWARD),
        "frozen reference, forward": ("F", FORWARD),
    }
    total = sum(flops for _, flops in passes.values())
    rows = [
        [name, formula, work(flops), work(LOCAL * flops), seconds(LOCAL * flops / BF16)]
        for name, (formula, flops) in (
            *passes.items(),
            ("**all**", ("(2 k + 4) F + k A", total)),
            (
                "more, if the attack computes gradients of weights",
                ("k (F - A)", STEPS * (2 * FORWARD - BACKWARD_TO_IMAGES)),
            ),
        )
    ]
    table(["pass", "FLOPs", "an image", "a GPU", "at 600 TFLOP/s"], rows)
    return LOCAL * total / BF16


def _print_memory() -> None:
    a_byte = LAYERS * TOKENS * WIDTH
    training, attack = 32 * a_byte, 20 * a_byte
    rows = [
        ["activations, training", "32 L N d", size(training * LOCAL), size(training * MICRO)],
        [
            "activations, attack, frozen weights",
            "20 L N d",
            size(attack * LOCAL),
            size(attack * MICRO),
        ],
        ["the same with a checkpoint per block", "(2 L + 32) N d"]
        + [size((2 * LAYERS + 32) * TOKENS * WIDTH * images) for images in (LOCAL, MICRO)],
        ["DDP: weights, gradients, AdamW, float32", "16 P", *[size(16 * PARAMETERS)] * 2],
        [
            "DDP: buckets, unless `gradient_as_bucket_view=True`",
            "4 P",
            *[size(4 * PARAMETERS)] * 2,
        ],
        [
            "FSDP2: weights, gradients, AdamW, float32",
            "16 P / R",
            *[size(16 * PARAMETERS / GPUS)] * 2,
        ],
        ["FSDP2: gradients of micro-batches, exchanged once", "4 P", "-", size(4 * PARAMETERS)],
        [
            "weights in bfloat16: of autocast, of FSDP2 if gathered once",
            "2 P",
            *[size(2 * PARAMETERS)] * 2,
        ],
        ["frozen reference, a copy in float32", "4 P", *[size(4 * PARAMETERS)] * 2],
        ["text features, float32", "4 C D", *[size(4 * CLASSES * DIM)] * 2],
        ["a matrix of logits, float32", "4 b C"]
        + [size(4 * CLASSES * images) for images in (LOCAL, MICRO)],
    ]
    table(["memory of a GPU", "bytes", f"b = {LOCAL}", f"b = {MICRO}"], rows)


def _print_logits_and_loss() -> tuple[float, float]:
    found = {
        "an attack step: logits, cross-entropy, and back": sweeps(attack_step),
        "reference: logits": sweeps(reference_pass),
        "training with TeCoA: logits, loss, and back": sweeps(cross_entropy),
        "reference and training, torch.distributions": sweeps(by_distributions),
    }
    with without_kernel():
        swept = SWEEPS + sweeps(aligned)
        found["reference and training, DirichletAlignLoss"] = swept
        found["reference and training, linear_dirichlet_align"] = SWEEPS + sweeps(linear)
    with without_triton():
        found["reference and training, DirichletAlignLoss, no Triton"] = sweeps(aligned)
    rows = [
        [name, rounded(count), size(count * LOGITS), seconds(count * LOGITS / HBM)]
        for name, count in found.items()
    ]
    table(["b C matrices read and written", "number", "bytes", "at 3.35 TB/s"], rows)

    with without_kernel():
        matrices = {"DirichletAlignLoss": (kept(aligned), peak(aligned))}
        chunk = peak(partial(linear, chunk_rows=ROWS // 2), ROWS // 2)
    matrices["torch.distributions"] = kept(by_distributions), peak(by_distributions)
    rows = [
        [f"{name}, with its logits", f"{waiting}", size(waiting * LOGITS), size(most * LOGITS)]
        for name, (waiting, most) in matrices.items()
    ]
    features = 2 * 4 * LOCAL * DIM  # of unit length, and their gradient
    chunks = size(features + chunk * 4 * _CHUNK_ELSEWHERE)
    rows.append(["linear_dirichlet_align", "0", size(features), chunks])
    table(["memory of a step's loss", "b C matrices kept", "bytes", "at the peak"], rows)

    products = {
        "attack, forward and back": ("2 k", 2 * STEPS),
        "training, forward and back to the features": ("2", 2),
        "reference": ("1", 1),
    }
    rows = [
        [name, formula, work(count * PRODUCT), seconds(count * PRODUCT / FP32)]
        for name, (formula, count) in products.items()
    ]
    table(["cosines, of 2 b C D FLOPs each", "products", "a GPU", "at 50 TFLOP/s"], rows)
    swept += STEPS * found["an attack step: logits, cross-entropy, and back"]
    return swept * LOGITS / HBM, (2 * STEPS + 3) * PRODUCT / FP32


def _print_exchange() -> float:
    micro = LOCAL // MICRO
    gathers = (2 * STEPS + 2) * micro
    gradients, weights = 4 * PARAMETERS, 2 * PARAMETERS
    share = (GPUS - 1) / GPUS
    once = within_and_across(weights)
    scatter = within_and_across(gradients)
    rows = [
        [
            "DDP, gradients once a step",
            "2 · 4 P",
            size(2 * share * gradients),
            seconds(2 * scatter),
        ],
        [
            f"FSDP2, {gathers} gathers, gradients once",
            f"{gathers} · 2 P + 4 P",
            size(share * (gathers * weights + gradients)),
            seconds(gathers * once + scatter),
        ],
        [
            "FSDP2, gathered once a step",
            "2 P + 4 P",
            size(share * (weights + gradients)),
            seconds(once + scatter),
        ],
        ["losses and attacks", "0", "0 B", "0 s"],
    ]
    table(["exchange", "bytes, times (R - 1) / R", "a GPU", "time"], rows)
    return 2 * scatter


def _print_text() -> None:
    once = CLASSES * TEXT_FORWARD
    again, back = (STEPS + 2) * once, 2 * (STEPS + 1) * once
    rows = [
        ["prompts, encoded once", "C F_text", work(once), seconds(once / BF16)],
        [
            "encoded again in each pass of each step",
            "(k + 2) C F_text",
            work(again),
            seconds(again / BF16),
        ],
        [
            "more, if the way back reaches its weights",
            "2 (k + 1) C F_text",
            work(back),
            seconds(back / BF16),
        ],
    ]
    table(["text encoder", "FLOPs", "a GPU", "at 600 TFLOP/s"], rows)


def _print_metrics() -> None:
    streams = {
        "accuracy, ECE, Brier in one `MetricGroup`": (
            metrics.Accuracy(),
            metrics.ExpectedCalibrationError(),
            metrics.BrierScore(),
        ),
        "`ClasswiseCalibrationError`": (metrics.ClasswiseCalibrationError(n_classes=CLASSES),),
        "`FailureAUROC`": (metrics.FailureAUROC(),),
    }
    rows = []
    for name, group in streams.items():
        states = [metric.state_dict() for metric in group]
        columns = [column for state in states for column in state["columns"].values()]
        sums = sum(total.numel() for state in states for total in state["sums"].values())
        reduced = 8 * (sums + GPUS * len(columns))
        gathered = VALIDATION * sum(column.element_size() for column in columns)
        rows.append([name, size(reduced), size(gathered) if gathered else "-"])
    table(["`compute()`", "all-reduce", f"gather, {VALIDATION:,} images"], rows)


if __name__ == "__main__":
    main()
