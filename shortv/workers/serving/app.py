"""The Serve application: replicas of one model, and the endpoint before them.

`serve run shortv.workers.serving.app:endpoint model=... plans=...` starts it; a Serve config file names the same
import path. The list of plans can change while it runs: it is the `user_config` of the deployment Replica.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, LoggingConfig

from reports.access import key_digests_of
from reports.http import RETRY_AFTER_S, log_requests
from reports.service import make_service
from shortv.errors import ShortVError, one_line
from shortv.plan import Plan
from shortv.spec import WorkerRange
from shortv.terminal import printable
from shortv.workers.cluster import living_nodes
from shortv.workers.models import Environment, ModelLoader, RemoteModel, hub_environment
from shortv.workers.placement import Node, Placement, place
from shortv.workers.serving.client import REPLICA, ReplicaClient
from shortv.workers.serving.endpoint import make_endpoint
from shortv.workers.serving.replica import Replica, read_plans
from shortv.workers.serving.scheduler import EngineSettings
from shortv.workers.serving.spec import EndpointSpec, read_arguments
from shortv.workers.shipping import offer

STARTUP_S = 1800.0
"""Within how many seconds replicas must have started, unless a limit is given."""
# Requests that one process of the endpoint refuses at a time.
_REFUSING = 32
# Serve takes 10 ms of CPU to say how applications are, which replicas that start on the same node would use.
_POLL_S = 0.25
_DELETION_S = 15.0
# Serve's access log has a line per request with its path; the endpoint writes its own.
_LOGGING = LoggingConfig(enable_access_log=False, log_level="WARNING")


def place_replicas(nodes: Sequence[Node], *, replicas: WorkerRange | None, gpus: float, device: str) -> Placement:
    """Fit replicas to the nodes, by default one per `gpus` GPUs, or one on CPUs; each gets its CPUs from one node.

    A given number of replicas on device "cuda" is not reduced: nodes with GPUs may join later. Replicas on CPUs leave
    one CPU to proxies and drivers; if there are fewer CPUs than replicas, they share them.

    Raises:
        Refused: GPUs are required and no node has enough of them.
    """
    if replicas is not None and device == "cuda":
        return Placement(low=replicas.low, high=replicas.high, cpus=1, gpus=gpus)
    found = place(nodes, workers=replicas, gpus=gpus, device=device, spare_cpus=1)
    if replicas is not None and not found.gpus and found.low < replicas.low:
        return Placement(low=replicas.low, high=replicas.high, cpus=0, gpus=0)
    return found


def replica_app(
    model: RemoteModel,
    plans: Sequence[Plan],
    placement: Placement,
    *,
    engine: EngineSettings,
    cpus: float | None = None,
    drain_s: float = 10.0,
) -> Any:
    """Return the bound deployment of replicas; it is an application of its own for callers with a handle.

    Serve stores what a deployment is bound to, so the token of the hub is left out: replicas find it in the
    environment of their node, or in the file at HF_TOKEN_PATH. Each replica has `cpus` CPUs if they are given. One that
    is no longer needed has `drain_s` seconds to finish its requests.
    """
    cpus = placement.cpus if cpus is None else cpus
    public = Environment({name: value for name, value in model.environment.items() if name != "HF_TOKEN"})
    offered = {plan.parts.path: offer(plan.parts.path) for plan in plans if plan.parts is not None}
    low, high = placement.low, placement.high
    most = engine.batch_size + engine.max_queued
    autoscaling = {
        "min_replicas": low,
        "max_replicas": high,
        "initial_replicas": low,
        # Above one batch each, another replica shortens the wait.
        "target_ongoing_requests": engine.batch_size,
        "upscale_delay_s": 5,
        "downscale_delay_s": 60,
    }
    deployment: Any = serve.deployment(
        Replica,
        name=REPLICA,
        # Requests wait in the engine, which sees them all: Serve's own queue polls, with pauses of growing length.
        max_ongoing_requests=2 * most,
        # While no replica runs, all requests that an endpoint accepts wait here, beside lookups of the plans.
        max_queued_requests=2 * high * most,
        user_config={"plans": [json.loads(plan.to_json()) for plan in plans]},
        ray_actor_options={"num_cpus": cpus, "num_gpus": placement.gpus},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_LOGGING,
        **({"num_replicas": low} if low == high else {"autoscaling_config": autoscaling}),
    )
    return deployment.bind(
        replace(model, environment=public),
        device=placement.device,
        threads=0 if placement.gpus else max(1, math.floor(cpus)),
        parts={path: folder for path, folder in offered.items() if folder is not None},
        engine=engine,
    )


class Endpoint:
    """The deployment that clients talk to; its process loads no model."""

    def __init__(self, replicas: DeploymentHandle[Any], spec: EndpointSpec, key_digests: Sequence[str]) -> None:
        """Take the handle of the replicas."""
        log_requests()
        # Serve's proxy adds the request id.
        self._app = make_endpoint(
            spec, ReplicaClient(replicas), key_digests=key_digests, reports=reports_of(spec), sends_request_id=False
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def endpoint(args: Mapping[str, Any]) -> Any:
    """Return the replicas and, behind Serve's proxies, the endpoint, as `serve run` and config files name them.

    Raises:
        Refused: an argument is unknown or out of its range, or plans or keys cannot be read.
    """
    if not ray.is_initialized():
        # `serve run` connects only after this, and uses a connection that exists.
        ray.init(namespace="serve")
    spec = read_arguments(args)
    deployment: Any = serve.deployment(
        serve.ingress()(Endpoint),
        name="Endpoint",
        # The endpoint refuses surplus requests in OpenAI's form. When even that is too much, the proxies refuse.
        max_ongoing_requests=spec.max_in_flight + _REFUSING,
        max_queued_requests=_REFUSING,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=spec.timeout,
        logging_config=_LOGGING,
    )
    # All that the nodes have: an update of an application takes the place of its running replicas.
    totals = [node["Resources"] for node in living_nodes()]
    nodes = [Node(cpus=one.get("CPU", 0), gpus=one.get("GPU", 0), total_gpus=one.get("GPU", 0)) for one in totals]
    # A folder must be on every node: nobody could ship it to replicas that start after this process has ended.
    model = RemoteModel(loader=ModelLoader(), spec=spec.model_spec(), folder=None, environment=hub_environment())
    return deployment.bind(replicas_of(spec, model, nodes)[0], spec, key_digests(spec))


def reports_of(spec: EndpointSpec) -> Any:
    """Return the service of the runs to serve beside the model, if any. Raises Refused for a missing folder."""
    return make_service(spec.reports) if spec.reports else None


def key_digests(spec: EndpointSpec) -> tuple[str, ...]:
    """Return the digests of the accepted keys, none without a key file. Raises Refused for an unusable file."""
    return key_digests_of(spec.api_key_file) if spec.api_key_file else ()


def replicas_of(spec: EndpointSpec, model: RemoteModel, nodes: Sequence[Node]) -> tuple[Any, str | None]:
    """Return the replicas of an endpoint, and what to tell the user about their number.

    Raises:
        Refused: plans cannot be read, or no node has enough GPUs.
    """
    placement = place_replicas(nodes, replicas=spec.replicas, gpus=spec.gpus_per_replica, device=spec.device)
    engine = EngineSettings(batch_size=spec.batch_size, max_queued=spec.max_queued, stall_s=spec.stall_timeout)
    cpus, plans = spec.cpus_per_replica, read_plans(spec.plans)
    return replica_app(model, plans, placement, engine=engine, cpus=cpus, drain_s=spec.timeout), placement.note


def deploy(app: Any, *, name: str, timeout_s: float = STARTUP_S) -> DeploymentHandle[Any]:
    """Run an application without routes and wait until all of its replicas have started.

    Raises:
        ShortVError: they cannot start, or have not started in time; with what Serve reports.
    """
    try:
        target = serve.RunTarget(target=app, name=name, route_prefix=None)
        # Serve's own waiting has no time limit: a replica that fits on no node waits for ever.
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        until = time.monotonic() + timeout_s
        while (status := application_status(name)) != ApplicationStatus.RUNNING:
            if status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise ShortVError(f"the replicas did not start: {_reason(name) or status}")
            if time.monotonic() > until:
                found = _reason(name) or "they wait for free CPUs or GPUs on one node, or still load the model"
                raise ShortVError(f"the replicas did not start within {timeout_s:g} s: {found}")
            time.sleep(_POLL_S)
        return serve.get_app_handle(name)
    except (RuntimeError, ray.exceptions.RayError, RayServeException) as error:
        raise ShortVError(f"the replicas did not start: {_reason(name) or one_line(error)}") from error


def application_status(name: str) -> ApplicationStatus | None:
    """Return what Serve says of an application, None where there is none."""
    application = serve.status().applications.get(name)
    return application.status if application else None


def applications(prefix: str) -> list[str]:
    """Return the names of the applications whose names begin so."""
    return [name for name in serve.status().applications if name.startswith(prefix)]


def running_replicas(name: str) -> int:
    """Return how many replicas of an application run."""
    application = serve.status().applications.get(name)
    deployment = application.deployments.get(REPLICA) if application else None
    return sum(count for state, count in deployment.replica_states.items() if state == "RUNNING") if deployment else 0


def undeploy(name: str, *, wait: bool = True) -> None:
    """End an application. Replicas that have not ended within some seconds end with Serve, or with their cluster."""
    with suppress(ray.exceptions.RayError, RayServeException):
        serve.delete(name, _blocking=False)
        until = time.monotonic() + (_DELETION_S if wait else 0.0)
        while application_status(name) is not None and time.monotonic() < until:
            time.sleep(_POLL_S)


def _reason(name: str) -> str | None:
    """Return what Serve reports about an application's replicas, as one line."""
    application = serve.status().applications.get(name)
    if application is None:
        return None
    messages = [deployment.message for deployment in application.deployments.values()] + [application.message]
    lines = [line.strip() for message in messages if message for line in message.splitlines() if line.strip()]
    return printable(lines[-1], limit=300) if lines else None
