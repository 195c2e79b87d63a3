"""What the benchmarks print around their figures."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import calibclip


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print Markdown."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def machine() -> str:
    """Name the processor, the threads and the versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return (
        f"{processor}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, calibclip {calibclip.__version__}"
    )
