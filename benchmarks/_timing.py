"""Times of several providers, in turn, and peaks of memory, on a CPU or a CUDA device."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

Providers = Mapping[str, Callable[[], object]]


def calls(
    providers: Providers,
    device: str,
    samples: int,
    warm_up: int = 3,
    around: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> dict[str, np.ndarray]:
    """Return seconds a call, the device idle before and after each; whatever slows the machine
    slows all providers alike. What ``around`` does for a provider of that name is not timed."""
    if device == "cpu":
        # glibc's malloc gives memory back to the system after every call until it has once freed a
        # large block, as any program with a model has. Without this a call has up to a thousand
        # page faults, which outweigh what it computes and differ between processes.
        torch.empty(7 << 20).zero_()
    times: dict[str, list[float]] = {name: [] for name in providers}
    for sample in range(samples + warm_up):
        for name, call in providers.items():
            with around(name):
                _wait(device)
                start = time.perf_counter()
                call()
                _wait(device)
                seconds = time.perf_counter() - start
            if sample >= warm_up:
                times[name].append(seconds)
    return {name: np.array(values) for name, values in times.items()}


def device_times(providers: Providers, samples: int, warm_up: int = 3) -> dict[str, np.ndarray]:
    """Return seconds that the CUDA device works on a call: the sum over what it runs, from the
    profiler's record, so that waiting for the host does not count. The L2 cache holds something
    else at the start."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in providers}
    for sample in range(samples + warm_up):
        for name, call in providers.items():
            flush.zero_()
            torch.cuda.synchronize()
            with traced(ProfilerActivity.CUDA) as events:
                call()
                torch.cuda.synchronize()
            if sample >= warm_up:
                times[name].append(1e-6 * sum(e["dur"] for e in events if _on_device(e)))
    return {name: np.array(values) for name, values in times.items()}


def _on_device(event: dict[str, Any]) -> bool:
    return event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")


def copy_bandwidth() -> float:
    """Return the bytes a second, read and written, of the CUDA device's own copy."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_(0, 9)
    target = torch.empty_like(source)
    times = device_times({"copy": lambda: target.copy_(source)}, samples=20)["copy"]
    return float(2 * source.nbytes / np.median(times))


@contextmanager
def traced(*activities: ProfilerActivity, memory: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Yield a list that holds the profiler's events of the context after its end."""
    events: list[dict[str, Any]] = []
    with profile(activities=activities, profile_memory=memory) as profiler:
        yield events
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events += json.loads(path.read_text())["traceEvents"]


@dataclass
class Peak:
    bytes: int = 0


@contextmanager
def peak(device: str) -> Iterator[Peak]:
    """Yield what holds, after the context, the most bytes allocated in it at once, beyond what was
    there at its start."""
    found = Peak()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.bytes = torch.cuda.max_memory_allocated() - before
        return
    with traced(ProfilerActivity.CPU, memory=True) as events:
        yield found
    changes = [event for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    found.bytes = int(np.cumsum([event["args"]["Bytes"] for event in changes]).max(initial=0))


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Return the peak of a call after a first one."""
    call()
    with peak(device) as found:
        call()
    return found.bytes


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: np.ndarray, unit: float = 1e-3) -> str:
    """Write the median and the range from the 20th to the 80th percentile."""
    low, median, high = np.percentile(values, [20, 50, 80]) / unit
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


def ratio(slow: np.ndarray, fast: np.ndarray) -> float:
    """Return the median of the ratios between neighbouring samples."""
    return float(np.median(slow / fast))
