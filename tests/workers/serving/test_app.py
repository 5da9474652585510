"""What arguments make of the deployments: places, devices, replicas and times."""

from __future__ import annotations

from typing import Any

import pytest

from shortv.errors import Refused
from shortv.spec import ModelSpec, WorkerRange
from shortv.workers.placement import Node
from shortv.workers.serving.app import ReplicaResources, replica_app, resources_of
from shortv.workers.serving.engine import EngineSettings
from shortv.workers.serving.spec import EndpointSpec, read_arguments

NODES = [Node(cpus=16, gpus=4, total_gpus=4), Node(cpus=9, gpus=0, total_gpus=0)]


def deployment(replicas: WorkerRange, *, gpus: float = 0, cpus: float = 0, **more: Any) -> Any:
    resources = ReplicaResources(range=replicas, gpus=gpus, cpus=cpus)
    engine = EngineSettings(batch_size=8, max_queued=24)
    return replica_app(ModelSpec(name="org/model"), (), resources, engine=engine, **more)._bound_deployment


def test_a_range_of_replicas_follows_the_load() -> None:
    options = deployment(WorkerRange(1, 2))._deployment_config.autoscaling_config
    assert (options.min_replicas, options.max_replicas, options.initial_replicas) == (1, 2, 1)
    # Where a replica has more than it can run at once, another one helps.
    assert options.target_ongoing_requests == 8
    fixed = deployment(WorkerRange(2, 2))
    assert fixed._deployment_config.autoscaling_config is None and fixed.num_replicas == 2


def test_what_the_endpoint_takes_is_what_runs_and_what_may_wait() -> None:
    taken = EndpointSpec(replicas="1:2", batch_size=8, max_queued=24).max_in_flight
    assert taken == 2 * (8 + 24)
    found = deployment(WorkerRange(1, 2))
    assert found.max_queued_requests > taken and 2 * found.max_ongoing_requests > taken


def test_a_replica_ends_what_it_answers_before_it_goes() -> None:
    assert deployment(WorkerRange(1, 2), drain_s=120.0)._deployment_config.graceful_shutdown_timeout_s == 120


@pytest.mark.parametrize(
    ("device", "gpus", "found", "used"),
    [("auto", 1, "cuda", 1), ("auto", 2, "auto-map", 2), ("cuda", 0.5, "cuda", 0.5), ("cpu", 2, "cpu", 0)],
)
def test_a_model_goes_over_as_many_gpus_as_its_replica_has(device: str, gpus: float, found: str, used: float) -> None:
    resources = resources_of(WorkerRange(1, 2), device=device, gpus=gpus, cpus=None, nodes=NODES)
    assert (resources.device, resources.gpus) == (found, used)
    app = deployment(WorkerRange(1, 2), gpus=resources.gpus, cpus=resources.cpus)
    assert app.init_args[0].device == found
    assert app.ray_actor_options == {"num_cpus": 9 if found == "cpu" else 1, "num_gpus": used}


def test_cpus_are_shared_where_there_are_no_gpus() -> None:
    resources = resources_of(WorkerRange(1, 2), device="auto", gpus=2, cpus=None, nodes=NODES[1:])
    assert (resources.device, resources.gpus, resources.cpus) == ("cpu", 0, 4)


def test_replicas_on_cpus_fit_the_nodes_one_by_one() -> None:
    # Two nodes of 16 CPUs have 31 to spare together, and no node holds a replica of 31.
    nodes = [Node(cpus=16, gpus=0, total_gpus=0)] * 2
    assert resources_of(WorkerRange(1, 1), device="auto", gpus=1, cpus=None, nodes=nodes).cpus == 16
    assert resources_of(WorkerRange(4, 4), device="auto", gpus=1, cpus=None, nodes=nodes).cpus == 7


def test_one_replica_per_gpu_counts_the_free_ones() -> None:
    nodes = [Node(cpus=8, gpus=1, total_gpus=4), Node(cpus=8, gpus=0, total_gpus=4)]
    assert resources_of(None, device="auto", gpus=1, cpus=None, nodes=nodes).range == (1, 1)
    with pytest.raises(Refused, match="free"):
        resources_of(None, device="auto", gpus=2, cpus=None, nodes=nodes)
    # Nodes that are to join may have the GPUs for a number that was asked for.
    assert resources_of(WorkerRange(3, 3), device="cuda", gpus=2, cpus=None, nodes=nodes).range == (3, 3)


def test_arguments_are_read_from_text_and_refused_by_name() -> None:
    arguments = {"max-images": "3", "plans": "a, b", "replicas": "1:4", "trust_remote_code": "true", "revision": None}
    spec = read_arguments(arguments)
    assert (spec.max_images, spec.plans, spec.replicas, spec.trust_remote_code) == (3, ("a", "b"), (1, 4), True)
    refused = {"max_image": 3, "batch_size": 0, "timeout": "nan", "replicas": "4:1", "max_body_mb": "9" * 5000}
    for name, value in {**refused, "gpus_per_replica": 1.5, "model": "a\0b", "stall_timeout": -1}.items():
        with pytest.raises(Refused) as caught:
            read_arguments({name: value})
        assert name.replace("_", "-") in str(caught.value).replace("_", "-")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
