"""Sweeps over several nodes with GPUs that exist in name only: all get work, and nodes may go and come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from shortv.sample import Sample
from shortv.spec import WorkerRange
from shortv.workers.sweep.driver import run_sweep
from shortv.workers.sweep.measure import Measured
from shortv.workers.sweep.spec import SweepSpec
from tests.workers.fakes import FakeEngine, make_spec, tables

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True, kw_only=True)
class TracedEngine(FakeEngine):
    """Leaves a file per unit, named by the node that measured it."""

    trace: Path
    nodes: int = 0
    """Wait in each unit until so many nodes have work."""

    def measure(self, loaded: Any, samples: Sequence[Sample], inputs: bytes, **how: Any) -> Measured:
        measured = FakeEngine.measure(self, loaded, samples, inputs, **how)
        node = ray.get_runtime_context().get_node_id()
        (self.trace / f"{node}.{time.monotonic_ns()}").touch()
        # The bound only keeps a failure from hanging.
        until = time.monotonic() + 120
        while len(nodes_in(self.trace)) < self.nodes and time.monotonic() < until:
            time.sleep(0.1)
        return measured


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without GPUs, and three nodes with one each."""
    ray.shutdown()
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(3):
        found.add_node(num_cpus=1, num_gpus=1)
    found.wait_for_nodes()
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


def nodes_in(trace: Path) -> set[str]:
    return {path.name.split(".")[0] for path in trace.iterdir()}


def sweep_while(request: SweepSpec, engine: TracedEngine, condition: Callable[[], bool], act: Any) -> None:
    """Sweep, and act in mid-run, once, as soon as the condition holds; nodes are made in the main thread alone."""
    with ThreadPoolExecutor(1) as pool:
        status = pool.submit(run_sweep, request, engine=engine)
        while not condition() and not status.done():
            time.sleep(0.05)
        assert not status.done()
        act()
        assert status.result(timeout=200) == 0


def test_a_sweep_uses_all_nodes_and_survives_one_that_goes_and_uses_one_that_comes(
    tmp_path: Path, cluster: Cluster
) -> None:
    plain, goes, comes = (
        TracedEngine(seconds=seconds, trace=tmp_path / name, nodes=nodes)
        for name, seconds, nodes in (("plain", 0.1, 3), ("goes", 0.5, 3), ("comes", 0.1, 3))
    )
    for engine in (plain, goes, comes):
        engine.trace.mkdir()
    undisturbed = make_spec(tmp_path / "undisturbed", samples=24, workers=3)
    assert run_sweep(undisturbed, engine=plain) == 0
    assert len(nodes_in(plain.trace)) == 3

    victim = cluster.list_all_nodes()[-1]
    request = make_spec(tmp_path / "shrinks", samples=24, workers=3)
    sweep_while(
        request,
        goes,
        lambda: len(nodes_in(goes.trace)) == 3,
        lambda: cluster.remove_node(victim, allow_graceful=False),
    )
    assert tables(request.output_path) == tables(undisturbed.output_path)

    request = make_spec(tmp_path / "grows", samples=24).model_copy(update={"workers": WorkerRange(2, 3)})
    sweep_while(
        request,
        comes,
        lambda: len(nodes_in(comes.trace)) == 2,
        lambda: cluster.add_node(num_cpus=1, num_gpus=1),
    )
    assert len(nodes_in(comes.trace)) == 3
