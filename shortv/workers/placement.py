"""How many workers or replicas a cluster holds, and what each of them gets: one rule, per node, over what is free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shortv.errors import Refused
from shortv.spec import WorkerRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Processors and accelerators of a node: free now, and in all."""

    cpus: float
    gpus: float
    total_gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The workers that fit and what Ray reserves for each of them."""

    low: int
    high: int
    cpus: int
    """Also the threads that a worker computes with; 0 uses what is left beside other work."""
    gpus: float
    note: str | None = None
    """What to tell the user when it is not what was asked for."""

    @property
    def device(self) -> str:
        """The torch device inside a worker, or "auto-map" for a model spread over several GPUs."""
        if not self.gpus:
            return "cpu"
        return "auto-map" if self.gpus > 1 else "cuda"

    @property
    def threads(self) -> int:
        """Threads that a worker on CPUs computes with; 0 leaves the number to torch."""
        return 0 if self.gpus else self.cpus


def place(
    nodes: Sequence[Node], *, workers: WorkerRange | None, gpus: float, device: str, spare_cpus: int = 0
) -> Placement:
    """Fit workers to what is free on each node, so that every worker of the lower bound can start.

    The upper bound of a range stays: Ray starts those workers when nodes join.

    Args:
        workers: how many; by default one per free GPU (or per `gpus` of them), or one on CPUs.
        gpus: GPUs of each worker, all on one node.
        device: "auto" uses GPUs where a node has any.
        spare_cpus: CPUs of the node with the most that workers on CPUs leave to others.

    Raises:
        Refused: GPUs are asked for and no node has enough of them free.
    """
    on_gpu = device == "cuda" or (device == "auto" and any(node.total_gpus > 0 for node in nodes))
    cpus = sorted((math.floor(node.cpus) for node in nodes), reverse=True)
    if on_gpu:
        slots = sum(math.floor(node.gpus / gpus + 1e-9) for node in nodes)
        kind, wish = f"places of {gpus:g} GPU", workers or WorkerRange(slots, slots)
    else:
        cpus[:1] = [max(0, most - spare_cpus) for most in cpus[:1]]
        slots = sum(cpus)
        kind, wish = "CPUs", workers or WorkerRange(1, 1)
    if on_gpu and not slots:
        most = max((node.total_gpus for node in nodes), default=0)
        free = max((node.gpus for node in nodes), default=0)
        raise Refused(
            f"a worker needs {gpus:g} GPU on one node; the largest has {most:g}, at most {free:g} free: "
            "ask for fewer GPUs per worker, wait for other work to end, or use --device cpu"
        )
    low = min(wish.low, max(slots, 1))
    high = wish.high if wish.high > wish.low else low
    note = None
    if low < wish.low:
        note = f"{low} of {wish.low} workers fit: the cluster has {slots} {kind} free; going on with {low}"
    if on_gpu:
        # One each, where each node with a free GPU has a CPU for each of its GPUs.
        each = int(all(node.cpus >= node.gpus for node in nodes if node.gpus > 0))
    else:
        # The most that each of the workers can have; 0 when not even one each is free.
        wanted = max(low, min(high, slots))
        fitting = (each for each in range(max(cpus, default=0), 0, -1) if sum(c // each for c in cpus) >= wanted)
        each = next(fitting, 0)
    return Placement(low=low, high=high, cpus=each, gpus=gpus if on_gpu else 0, note=note)
