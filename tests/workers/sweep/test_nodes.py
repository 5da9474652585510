"""A sweep over several nodes with GPUs that exist in name only: all get work, and nodes may go and come."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from shortv.sample import Sample
from shortv.spec import WorkerRange
from shortv.workers.sweep.driver import run_sweep
from shortv.workers.sweep.measure import Measured
from tests.workers.fakes import LAYERS, MODES, FakeEngine, make_samples, make_spec, record, tables

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True, kw_only=True)
class WaitingEngine(FakeEngine):
    """Leaves a file named after the node that measures, and waits in each unit until the file `go` exists."""

    folder: Path

    def measure(self, loaded: Any, samples: Sequence[Sample], inputs: bytes, **how: Any) -> Measured:
        (self.folder / f"node-{ray.get_runtime_context().get_node_id()}").touch()
        # The bound only keeps a failure from hanging.
        until = time.monotonic() + 600
        while not (self.folder / "go").exists() and time.monotonic() < until:
            time.sleep(0.1)
        return FakeEngine.measure(self, loaded, samples, inputs, **how)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without GPUs, and two nodes with one each."""
    ray.shutdown()
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        found.add_node(num_cpus=1, num_gpus=1)
    found.wait_for_nodes()
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


def test_a_sweep_uses_all_nodes_and_one_that_comes_and_survives_one_that_goes(tmp_path: Path, cluster: Cluster) -> None:
    samples = 24
    request = make_spec(tmp_path, samples=samples).model_copy(update={"workers": WorkerRange(2, 3)})
    engine = WaitingEngine(folder=tmp_path)
    # Nodes are made in the main thread alone.
    with ThreadPoolExecutor(1) as pool:
        status = pool.submit(run_sweep, request, engine=engine)

        def until_nodes(count: int) -> None:
            while len(list(tmp_path.glob("node-*"))) < count:
                assert not status.done()
                time.sleep(0.05)

        until_nodes(2)
        victim = cluster.list_all_nodes()[-1]
        cluster.add_node(num_cpus=1, num_gpus=1)
        until_nodes(3)
        cluster.remove_node(victim, allow_graceful=False)
        (tmp_path / "go").touch()
        assert status.result(timeout=600) == 0
    found = tables(request.output_path)
    every = [(sample, mode, layer) for sample in make_samples(samples) for mode in MODES for layer in range(LAYERS)]
    assert found["lc_samples"] == [asdict(record(*one)) for one in every]
    assert len(found["samples"]) == samples and not found["errors"]
