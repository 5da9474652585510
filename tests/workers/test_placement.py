"""Workers fit the cluster, so that no command waits for CPUs that never come."""

from __future__ import annotations

import pytest

from shortv.errors import Refused
from shortv.spec import WorkerRange
from shortv.workers.placement import Node, Placement, place


def node(cpus: float, gpus: float = 0, total_gpus: float | None = None) -> Node:
    return Node(cpus=cpus, gpus=gpus, total_gpus=gpus if total_gpus is None else total_gpus)


def pool(*nodes: Node, workers: tuple[int, int] | None = None, gpus: float = 1, device: str = "auto") -> Placement:
    wish = WorkerRange(*workers) if workers else None
    return place(nodes, workers=wish, gpus=gpus, device=device)


def test_workers_never_wait_for_cpus_that_are_not_there() -> None:
    one = pool(node(1), workers=(4, 4))
    assert (one.low, one.high, one.cpus) == (1, 1, 1) and one.note and "1 of 4" in one.note
    none = pool(node(0), workers=(4, 4))
    assert (none.low, none.cpus, none.device) == (1, 0, "cpu")


def test_cpus_are_shared_between_workers() -> None:
    assert pool(node(8)).cpus == 8
    assert pool(node(8), workers=(3, 3)).cpus == 2
    assert pool(node(0), node(2), node(2), workers=(4, 4)) == Placement(low=4, high=4, cpus=1, gpus=0)


def test_a_range_keeps_its_upper_bound_for_nodes_that_join() -> None:
    found = pool(node(2), workers=(1, 8))
    assert (found.low, found.high, found.note) == (1, 8, None)


def test_gpus_decide_when_there_are_any() -> None:
    assert pool(node(8, 4), node(8, 2)) == Placement(low=6, high=6, cpus=1, gpus=1)
    assert pool(node(8, 4), node(8, 3), gpus=2).high == 3
    assert pool(node(8, 4), gpus=2).device == "auto-map"
    assert pool(node(8, 1), gpus=0.5).high == 2
    assert pool(node(8, 4), device="cpu").device == "cpu"
    assert pool(node(0, 2)).cpus == 0


def test_replicas_on_cpus_fit_the_nodes_one_by_one() -> None:
    # The sum of all CPUs is 32, yet no node holds a replica of 31.
    replica = place([node(16), node(16)], workers=WorkerRange(1, 1), gpus=1, device="cpu", spare_cpus=1)
    assert replica.cpus == 16
    assert place([node(16)], workers=WorkerRange(1, 1), gpus=1, device="cpu", spare_cpus=1).cpus == 15
    assert place([node(4), node(4)], workers=WorkerRange(3, 3), gpus=1, device="cpu", spare_cpus=1).cpus == 2


def test_one_per_free_gpu_leaves_gpus_in_use_alone() -> None:
    assert pool(node(8, 1, total_gpus=4), node(8, 0, total_gpus=4)).high == 1


@pytest.mark.parametrize("nodes", [(node(8),), (node(8, 0, total_gpus=4),), (node(8, 1), node(8, 1))])
def test_gpus_that_no_node_has_are_refused(nodes: tuple[Node, ...]) -> None:
    with pytest.raises(Refused, match="GPU"):
        pool(*nodes, gpus=2, device="cuda")
