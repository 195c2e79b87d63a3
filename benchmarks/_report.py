"""What the benchmarks print around their figures."""

from __future__ import annotations

import os
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


def warn_if_busy() -> None:
    """Print a warning if others use the machine: to be called before work of one's own."""
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > (os.cpu_count() or 1) / 2:
        print(
            f"**Load average {load:.1f}: the machine is busy. Threads that wait for one another "
            "make times meaningless then.**\n"
        )


def machine(device: str = "cpu") -> str:
    """Name the processor or the card, and the versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    processor = f"{processor}, {torch.get_num_threads()} threads"
    if device == "cuda":
        processor = f"{torch.cuda.get_device_name()}; {processor}"
    return (
        f"{processor}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"calibclip {calibclip.__version__}"
    )
