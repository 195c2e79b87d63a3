"""The processes that train together in finetune.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes that train together, and the place of this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def place(self) -> dict[str, int]:
        return {"rank": self.rank, "world_size": self.size}

    def mean(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size

    def gather(self, value: Any) -> list[Any]:
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def one_process_first(self) -> Iterator[None]:
        """Let one process of each machine download, and the others find it done."""
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if self.size > 1 and not first:
            dist.barrier()
        try:
            yield
        finally:  # also after an error, which would leave the others waiting
            if self.size > 1 and first:
                dist.barrier()


@contextmanager
def join_world(kind: str) -> Iterator[World]:
    """Join the processes of torchrun; without it, be the only one."""
    device = torch.device(kind)
    if not dist.is_torchelastic_launched():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise SystemExit("WORLD_SIZE is set, but not by torchrun: start with torchrun")
        yield World(0, 1, device)
        return
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
