"""What settings become as deployments: places, devices, numbers of replicas, times and secrets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve.schema import ApplicationStatus

from shortv.errors import Refused, ShortVError
from shortv.spec import ModelSpec, WorkerRange
from shortv.workers.models import ModelLoader, RemoteModel, hub_environment
from shortv.workers.placement import Node, Placement
from shortv.workers.serving import app as module
from shortv.workers.serving.app import deploy, place_replicas, replica_app
from shortv.workers.serving.scheduler import EngineSettings
from shortv.workers.serving.spec import EndpointSpec, read_arguments

ONE_TO_TWO = WorkerRange(1, 2)


def nodes(*cpus_and_gpus: tuple[float, float]) -> list[Node]:
    return [Node(cpus=cpus, gpus=gpus, total_gpus=gpus) for cpus, gpus in cpus_and_gpus]


def deployment(replicas: WorkerRange = ONE_TO_TWO, *, gpus: float = 0, cpus: float = 0, **more: Any) -> Any:
    placement = Placement(low=replicas.low, high=replicas.high, gpus=gpus, cpus=1)
    model = RemoteModel(
        loader=ModelLoader(), spec=ModelSpec(name="org/model"), folder=None, environment=hub_environment()
    )
    return replica_app(
        model, (), placement, engine=EngineSettings(batch_size=8, max_queued=24), cpus=cpus, **more
    )._bound_deployment


def test_a_range_of_replicas_follows_the_load_within_the_endpoints_limits() -> None:
    found = deployment(drain_s=120.0)
    options = found._deployment_config.autoscaling_config
    assert (options.min_replicas, options.max_replicas, options.initial_replicas) == (1, 2, 1)
    # Another replica helps where one has more requests than it can run at once.
    assert options.target_ongoing_requests == 8
    assert found._deployment_config.graceful_shutdown_timeout_s == 120
    accepted = EndpointSpec(replicas="1:2", batch_size=8, max_queued=24).max_in_flight  # type: ignore[arg-type]
    assert accepted == 2 * (8 + 24)
    assert found.max_queued_requests > accepted and 2 * found.max_ongoing_requests > accepted
    fixed = deployment(WorkerRange(2, 2))
    assert fixed._deployment_config.autoscaling_config is None and fixed.num_replicas == 2


@pytest.mark.parametrize(
    ("device", "gpus", "found", "used"),
    [("auto", 1, "cuda", 1), ("auto", 2, "auto-map", 2), ("cuda", 0.5, "cuda", 0.5), ("cpu", 2, "cpu", 0)],
)
def test_a_model_is_spread_over_the_gpus_of_its_replica(device: str, gpus: float, found: str, used: float) -> None:
    placement = place_replicas(nodes((16, 4), (9, 0)), replicas=ONE_TO_TWO, device=device, gpus=gpus)
    assert (placement.device, placement.gpus) == (found, used)
    bound = deployment(gpus=placement.gpus, cpus=placement.cpus)
    assert bound.init_kwargs["device"] == found
    assert bound.ray_actor_options == {"num_cpus": 9 if found == "cpu" else 1, "num_gpus": used}


def test_replicas_on_cpus_fit_on_one_node_each() -> None:
    two = nodes((16, 0), (16, 0))
    for replicas, cpus in ((1, 16), (2, 15), (3, 8), (6, 5)):
        found = place_replicas(two, replicas=WorkerRange(replicas, replicas), device="auto", gpus=1)
        assert (found.low, found.cpus) == (replicas, cpus)
    # With fewer CPUs than replicas, the replicas share them.
    shared = place_replicas(nodes((2, 0)), replicas=WorkerRange(4, 4), device="cpu", gpus=1)
    assert (shared.low, shared.cpus) == (4, 0)
    assert deployment(cpus=0.5).ray_actor_options["num_cpus"] == 0.5


def test_without_a_number_there_is_a_replica_per_free_gpu() -> None:
    busy = [Node(cpus=8, gpus=1, total_gpus=4), Node(cpus=8, gpus=2, total_gpus=2)]
    assert place_replicas(busy, replicas=None, device="auto", gpus=1).low == 3
    assert place_replicas(nodes((8, 0)), replicas=None, device="auto", gpus=1).low == 1
    with pytest.raises(Refused, match="at most 2 free"):
        place_replicas(busy, replicas=None, device="auto", gpus=4)
    # Serve starts them when their nodes have joined.
    assert place_replicas(nodes((1, 0)), replicas=ONE_TO_TWO, device="cuda", gpus=8).gpus == 8


def test_the_token_of_the_hub_is_not_in_the_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    monkeypatch.setenv("HF_HOME", "/srv/models")
    bound = cloudpickle.dumps(deployment().init_args)
    assert b"hf_secret_token" not in bound and b"/srv/models" in bound


@pytest.mark.parametrize(
    ("status", "message", "problem"),
    [
        ("DEPLOYING", "1 replica waits\n for {'CPU': 31.0}", "did not start within 0.05 s: for {'CPU': 31.0}"),
        ("DEPLOYING", "", "did not start within 0.05 s: they wait for"),
        ("DEPLOY_FAILED", "Traceback\nOSError: no weights", "did not start: OSError: no weights"),
    ],
)
def test_replicas_that_cannot_start_end_the_wait(
    monkeypatch: pytest.MonkeyPatch, status: str, message: str, problem: str
) -> None:
    deployments = {"Replica": SimpleNamespace(message=message)}
    application = SimpleNamespace(status=ApplicationStatus(status), deployments=deployments, message="")
    monkeypatch.setattr(module.serve, "run_many", lambda *_, **__: None)
    monkeypatch.setattr(module.serve, "status", lambda: SimpleNamespace(applications={"it": application}))
    with pytest.raises(ShortVError) as caught:
        deploy(deployment(), name="it", timeout_s=0.05)
    assert problem in str(caught.value)


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


@pytest.mark.parametrize("applications", [{}, {"it": SimpleNamespace(status=ApplicationStatus.DELETING)}])
def test_the_end_does_not_wait_for_a_replica_that_never_ends(
    applications: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted = []
    monkeypatch.setattr(module.serve, "delete", lambda name, _blocking: deleted.append((name, _blocking)))
    monkeypatch.setattr(module.serve, "status", lambda: SimpleNamespace(applications=applications))
    monkeypatch.setattr(module, "_DELETION_S", 0.3)
    module.undeploy("it")
    assert deleted == [("it", False)]
