"""Times of several providers, in turn, and peaks of memory, on a CPU or a CUDA device."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

Providers = Mapping[str, Callable[[], object]]


def calls(
    providers: Providers, device: str, samples: int, warm_up: int = 3
) -> dict[str, np.ndarray]:
    """Return seconds a call, the device idle before and after each; whatever slows the machine
    slows all providers alike."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for sample in range(samples + warm_up):
        for name, call in providers.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if sample >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def device_times(providers: Providers, samples: int, warm_up: int = 3) -> dict[str, np.ndarray]:
    """Return seconds that the CUDA device works on a call.

    The host is ahead, its queue filled behind a pause, and the L2 cache holds something else.
    """
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in providers}
    for sample in range(samples + warm_up):
        for name, call in providers.items():
            flush.zero_()
            torch.cuda._sleep(10_000_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if sample >= warm_up:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: np.array(values) for name, values in times.items()}


def copy_bandwidth() -> float:
    """Return the bytes a second, read and written, of the CUDA device's own copy."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_(0, 9)
    target = torch.empty_like(source)
    times = device_times({"copy": lambda: target.copy_(source)}, samples=20)["copy"]
    return float(2 * source.nbytes / np.median(times))


def peak_on_device(call: Callable[[], object]) -> int:
    """Return the most bytes allocated on the CUDA device beyond what was there."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most that was allocated at once beyond the inputs, from the profiler's record."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    totals = np.cumsum([event["args"]["Bytes"] for event in changes])
    return int(totals.max())


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(times: np.ndarray, unit: float = 1e-3) -> str:
    """Write the median and the range from the 20th to the 80th percentile."""
    low, median, high = np.percentile(times, [20, 50, 80]) / unit
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


def ratio(slow: np.ndarray, fast: np.ndarray) -> float:
    """Return the median of the ratios between neighbouring samples."""
    return float(np.median(slow / fast))
