"""Workers fit the cluster, so that no command waits for CPUs that never come."""

from __future__ import annotations

from typing import Any

import pytest

from shortv.errors import Refused
from shortv.spec import WorkerRange
from shortv.workers.placement import Node, place


def node(cpus: float, gpus: float = 0, total_gpus: float | None = None) -> Node:
    return Node(cpus=cpus, gpus=gpus, total_gpus=gpus if total_gpus is None else total_gpus)


def placed(*nodes: Node, workers: tuple[int, int] | None = None, **how: Any) -> tuple[int, int, int, str]:
    wish = WorkerRange(*workers) if workers else None
    found = place(nodes, workers=wish, **{"gpus": 1, "device": "auto", **how})
    assert (found.note is not None) == (wish is not None and found.low < wish.low)
    return found.low, found.high, found.cpus, found.device


@pytest.mark.parametrize(
    ("nodes", "how", "expected"),
    [
        ([node(8)], {}, (1, 1, 8, "cpu")),
        ([node(1)], {"workers": (4, 4)}, (1, 1, 1, "cpu")),
        ([node(0)], {"workers": (4, 4)}, (1, 1, 0, "cpu")),
        ([node(8)], {"workers": (3, 3)}, (3, 3, 2, "cpu")),
        ([node(0), node(2), node(2)], {"workers": (4, 4)}, (4, 4, 1, "cpu")),
        ([node(2)], {"workers": (1, 8)}, (1, 8, 1, "cpu")),  # nodes may join
        ([node(8, 4), node(8, 2)], {}, (6, 6, 1, "cuda")),
        ([node(8, 4), node(8, 3)], {"gpus": 2}, (3, 3, 1, "auto-map")),
        ([node(8, 1)], {"gpus": 0.5}, (2, 2, 1, "cuda")),
        ([node(8, 4)], {"device": "cpu"}, (1, 1, 8, "cpu")),
        ([node(0, 2)], {}, (2, 2, 0, "cuda")),
        ([node(8, 1, 4), node(8, 0, 4)], {}, (1, 1, 1, "cuda")),  # GPUs in use are left alone
        # The sum of all CPUs is 32, yet no node holds a replica of 31.
        ([node(16), node(16)], {"workers": (1, 1), "spare_cpus": 1}, (1, 1, 16, "cpu")),
        ([node(16)], {"workers": (1, 1), "spare_cpus": 1}, (1, 1, 15, "cpu")),
        ([node(4), node(4)], {"workers": (3, 3), "spare_cpus": 1}, (3, 3, 2, "cpu")),
    ],
)
def test_workers_fit_the_nodes_one_by_one(nodes: list[Node], how: Any, expected: tuple[int, int, int, str]) -> None:
    assert placed(*nodes, **how) == expected


@pytest.mark.parametrize("nodes", [(node(8),), (node(8, 0, 4),), (node(8, 1), node(8, 1))])
def test_gpus_that_no_node_has_are_refused(nodes: tuple[Node, ...]) -> None:
    with pytest.raises(Refused, match="GPU"):
        placed(*nodes, gpus=2, device="cuda")
