"""The Serve application: replicas of one model, and the endpoint before them.

`serve run shortv.workers.serving.app:endpoint model=... plans=...` starts it; a Serve config file names the same
import path. The list of plans can change while it runs: it is the `user_config` of the deployment Replica.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from reports.access import key_digests_of
from reports.http import log_requests
from reports.service import make_service
from shortv.errors import ShortVError
from shortv.plan import Plan
from shortv.spec import ModelSpec, WorkerRange
from shortv.workers.cluster import first_line, free_nodes, living_nodes
from shortv.workers.models import Environment
from shortv.workers.placement import Node, place
from shortv.workers.serving.client import ReplicaClient
from shortv.workers.serving.endpoint import limits_of, make_endpoint
from shortv.workers.serving.engine import EngineSettings
from shortv.workers.serving.plans import read_plans
from shortv.workers.serving.replica import Replica, ReplicaSetup
from shortv.workers.serving.spec import EndpointSpec, read_arguments
from shortv.workers.shipping import ShippedFolder, folder_digest, ship

REPLICA = "Replica"
# Settings of the hub, without its token: Serve stores what a deployment is bound to. Replicas find a token in the
# environment of their node, or in the file at HF_TOKEN_PATH.
_ENVIRONMENT = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH")
# Requests that one process of the endpoint turns away at a time.
_REFUSING = 32
# Serve's access log has a line per request with its path; the endpoint writes its own.
_LOGGING = LoggingConfig(enable_access_log=False, log_level="WARNING")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaResources:
    """What each replica gets, and how many there are."""

    range: WorkerRange
    gpus: float
    cpus: float

    @property
    def device(self) -> str:
        """The torch device inside a replica, or "auto-map" for a model spread over several GPUs."""
        if not self.gpus:
            return "cpu"
        return "auto-map" if self.gpus > 1 else "cuda"


def resources_of(
    replicas: WorkerRange | None, *, device: str, gpus: float, cpus: float | None, nodes: Sequence[Node]
) -> ReplicaResources:
    """Fit replicas to what is free on each node: GPUs where the cluster has any, else CPUs but one.

    The one is for proxies and drivers. Replicas without a whole CPU each share what there is.

    Args:
        replicas: how many; by default one per free GPU (or per `gpus` of them), or one on CPUs.
        cpus: CPUs of each replica, if the caller decides that.

    Raises:
        Refused: no number of replicas is given and no node has enough GPUs free.
    """
    on_gpu = device == "cuda" or (device == "auto" and any(node.total_gpus for node in nodes))
    if on_gpu and replicas is not None:
        # Nodes with GPUs may still join: a given number of replicas waits for them.
        return ReplicaResources(range=replicas, gpus=gpus, cpus=1 if cpus is None else cpus)
    found = place(nodes, workers=replicas, gpus=gpus, device="cuda" if on_gpu else "cpu", spare_cpus=1)
    return ReplicaResources(
        range=replicas or WorkerRange(found.low, found.high),
        gpus=found.gpus,
        cpus=found.cpus if cpus is None else cpus,
    )


def replica_app(
    spec: ModelSpec,
    plans: Sequence[Plan],
    resources: ReplicaResources,
    *,
    engine: EngineSettings,
    folder: ShippedFolder | None = None,
    drain_s: float = 10.0,
) -> Any:
    """The deployment of replicas, bound; it is an application of its own for callers with a handle.

    A replica that is no longer needed has `drain_s` to end what it answers.
    """
    folders = dict.fromkeys(plan.parts.path for plan in plans if plan.parts is not None)
    setup = ReplicaSetup(
        spec=spec,
        device=resources.device,
        threads=max(1, math.floor(resources.cpus)) if not resources.gpus else 0,
        folder=folder,
        parts={path: found for path in folders if (found := shipped(path)) is not None and found.source},
        engine=engine,
        environment=Environment({name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}),
    )
    low, high = resources.range
    most = engine.batch_size + engine.max_queued
    size = {"num_replicas": low} if low == high else {"autoscaling_config": _autoscaling(low, high, engine.batch_size)}
    deployment: Any = serve.deployment(
        Replica,
        name=REPLICA,
        # Requests wait in the engine, which sees them all: Serve's own queue polls, with pauses of growing length.
        max_ongoing_requests=2 * most,
        # While no replica is there, all that an endpoint takes waits here, and looks at the plans beside it.
        max_queued_requests=2 * high * most,
        user_config={"plans": [json.loads(plan.to_json()) for plan in plans]},
        ray_actor_options={"num_cpus": resources.cpus, "num_gpus": resources.gpus},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_LOGGING,
        **size,
    )
    return deployment.bind(setup)


def _autoscaling(low: int, high: int, batch_size: int) -> dict[str, Any]:
    return {
        "min_replicas": low,
        "max_replicas": high,
        "initial_replicas": low,
        # Above one batch each, another replica shortens the wait.
        "target_ongoing_requests": batch_size,
        "upscale_delay_s": 5,
        "downscale_delay_s": 60,
    }


class Endpoint:
    """The deployment that clients talk to; its process loads neither torch nor a model."""

    def __init__(self, replicas: DeploymentHandle[Any], spec: EndpointSpec, key_digests: Sequence[str]) -> None:
        """Take the handle of the replicas."""
        log_requests()
        self._app = make_endpoint(
            spec,
            ReplicaClient(replicas),
            key_digests=key_digests,
            reports=reports_of(spec),
            sends_request_id=False,  # Serve's proxy adds the header
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def reports_of(spec: EndpointSpec) -> Any:
    """Return the service of the runs to serve beside the model, if any. Raises Refused for a missing folder."""
    return make_service(spec.reports) if spec.reports else None


def key_digests(spec: EndpointSpec) -> tuple[str, ...]:
    """Return the digests of the accepted keys, none without a key file. Raises Refused for an unusable file."""
    return key_digests_of(spec.api_key_file) if spec.api_key_file else ()


def endpoint(args: Mapping[str, Any]) -> Any:
    """Build the application from arguments as `serve run` and config files give them. Raises Refused."""
    if not ray.is_initialized():
        # `serve run` connects only after this, and uses a connection that exists.
        ray.init(namespace="serve")
    return build(read_arguments(args))


def build(spec: EndpointSpec) -> Any:
    """Return the replicas and, behind Serve's proxies, the endpoint. Raises Refused for unreadable plans or keys."""
    deployment: Any = serve.deployment(
        serve.ingress()(Endpoint),
        name="Endpoint",
        # The endpoint refuses surplus requests in OpenAI's form. When even that is too much, the proxies refuse.
        max_ongoing_requests=spec.max_in_flight + _REFUSING,
        max_queued_requests=_REFUSING,
        backpressure_config={"status_code": 429, "retry_after_s": limits_of(spec).retry_after_s},
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=spec.timeout,
        logging_config=_LOGGING,
    )
    return deployment.bind(replicas_of(spec), spec, key_digests(spec))


def replicas_of(spec: EndpointSpec, *, folder: ShippedFolder | None = None) -> Any:
    """Return the replicas alone, for an endpoint in another process. Raises Refused for unreadable plans."""
    resources = resources_of(
        spec.replicas,
        device=spec.device,
        gpus=spec.gpus_per_replica,
        cpus=spec.cpus_per_replica,
        nodes=free_nodes(),
    )
    return replica_app(
        spec.model_spec(),
        read_plans(spec.plans),
        resources,
        engine=EngineSettings(batch_size=spec.batch_size, max_queued=spec.max_queued, stall_s=spec.stall_timeout),
        folder=folder,
        drain_s=spec.timeout,
    )


def deploy(app: Any, *, name: str, route_prefix: str | None) -> DeploymentHandle[Any]:
    """Run an application and wait until it is up. Raises ShortVError with what Serve says when it does not come up."""
    try:
        return serve.run(app, name=name, route_prefix=route_prefix)
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise ShortVError(f"the replicas did not come up: {_reason(name) or first_line(error)}") from error


def _reason(name: str) -> str | None:
    """What Serve says about an application's replicas, as one line."""
    application = serve.status().applications.get(name)
    if application is None:
        return None
    messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1][:300] if lines else None


def shipped(model: str) -> ShippedFolder | None:
    """A folder of the driver's node, a model or learned parts, for replicas on any node; None for a hub id."""
    path = Path(model)
    if not path.is_dir():
        return None
    path = path.resolve()
    digest = folder_digest(path)
    if len(living_nodes()) == 1:
        return ShippedFolder(path=str(path), digest=digest, source=None)
    return ship(path, digest)
