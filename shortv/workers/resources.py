"""How many workers a cluster can hold, and what each of them gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shortv.errors import Refused
from shortv.spec import WorkerRange


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeNode:
    """Processors and accelerators of a node: free now, and in all."""

    cpus: float
    gpus: float
    total_cpus: float
    total_gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The workers of a sweep and what Ray reserves for each."""

    low: int
    high: int
    cpus: int
    """Also the threads that a worker computes with; 0 takes what is left beside other work."""
    gpus: float
    note: str | None = None
    """What to tell the user when it is not what was asked for."""

    @property
    def device(self) -> str:
        """The torch device inside a worker, or "auto-map" for a model spread over several GPUs."""
        if not self.gpus:
            return "cpu"
        return "auto-map" if self.gpus > 1 else "cuda"


def plan_pool(nodes: Sequence[FreeNode], *, workers: WorkerRange | None, gpus_per_worker: float, device: str) -> Pool:
    """Fit the wished-for workers to what is free, so that every worker of the lower bound can start.

    A range's upper bound stays: Ray starts those workers when nodes join.

    Raises:
        Refused: GPUs are asked for and no node has enough of them.
    """
    on_gpu = device == "cuda" or (device == "auto" and any(node.total_gpus > 0 for node in nodes))
    slots = sum(_gpu_slots(nodes, gpus_per_worker)) if on_gpu else sum(math.floor(node.cpus) for node in nodes)
    if on_gpu and not slots:
        most, free = max(node.total_gpus for node in nodes), max(node.gpus for node in nodes)
        raise Refused(
            f"a worker needs {gpus_per_worker:g} GPU on one node; the largest has {most:g}, at most {free:g} free: "
            "give --gpus-per-worker less, wait for other work to end, or use --device cpu"
        )
    wish = workers or (WorkerRange(slots, slots) if on_gpu else WorkerRange(1, 1))
    low = min(wish.low, max(slots, 1))
    high = wish.high if wish.high > wish.low else low
    note = None
    if low < wish.low:
        kind = f"{gpus_per_worker:g}-GPU places" if on_gpu else "CPUs"
        note = f"{low} of {wish.low} workers fit: the cluster has {slots} {kind} free; going on with {low}"
    cpus = min(1, slots and _spare_cpu(nodes)) if on_gpu else _cpus_each(nodes, max(low, min(high, slots)))
    return Pool(low=low, high=high, cpus=cpus, gpus=gpus_per_worker if on_gpu else 0, note=note)


def _gpu_slots(nodes: Sequence[FreeNode], each: float) -> list[int]:
    return [math.floor(node.gpus / each + 1e-9) for node in nodes]


def _spare_cpu(nodes: Sequence[FreeNode]) -> int:
    """1 when each node with a free GPU has a CPU free for each of its GPUs."""
    return int(all(node.cpus >= node.gpus for node in nodes if node.gpus > 0))


def _cpus_each(nodes: Sequence[FreeNode], workers: int) -> int:
    """The most CPUs that each of so many workers can have; 0 when not even one each is free."""
    most = max((math.floor(node.cpus) for node in nodes), default=0)
    for each in range(most, 0, -1):
        if sum(math.floor(node.cpus) // each for node in nodes) >= workers:
            return each
    return 0
