"""An endpoint that runs until it is stopped: replicas on Serve, HTTP in this process.

Serve's proxies would cost more than the answers of a small model: two more hops through Ray per request, which a
refusal pays too (see jobs/bench.py load). Behind proxies runs `app.endpoint`, for `serve run` and `serve deploy`.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from functools import partial

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from rich.console import Console

from reports.access import address_of, bound, check_host
from reports.http import log_requests, serve_app
from reports.locations import masked_uri
from shortv.errors import Refused
from shortv.learned.header import check_parts
from shortv.plan import Plan
from shortv.terminal import say
from shortv.workers.cluster import connected, free_nodes
from shortv.workers.models import ModelLoader, remote_model
from shortv.workers.run import Stopped, stop_on_signal
from shortv.workers.serving.app import application_status, deploy, key_digests, replicas_of, reports_of, undeploy
from shortv.workers.serving.client import ReplicaClient
from shortv.workers.serving.endpoint import make_endpoint
from shortv.workers.serving.replica import fit_plans, read_plans
from shortv.workers.serving.spec import EndpointSpec

APP = "shortv"


def run_endpoint(spec: EndpointSpec, *, host: str | None, port: int, console: Console) -> int:
    """Start the endpoint, print its address, and serve until SIGTERM or Ctrl-C.

    Raises:
        Refused: plans or keys that cannot be used, or an address that cannot be bound.
        ShortVError: the replicas do not come up.
    """
    host = check_host(host, with_key=spec.api_key_file is not None)
    # Replicas that start later load the same weights, whatever a branch on the hub names by then.
    spec = spec.model_copy(update={"revision": ModelLoader().pin(spec.model_spec()).revision})
    check_model(spec, console)
    digests, reports = key_digests(spec), reports_of(spec)
    log_requests()
    with bound(host, port) as listening, connected(), suppress(Stopped), stop_on_signal():
        others = _applications()
        if APP in others:
            raise Refused(f"this cluster serves {APP} already; end that job or application first")
        serve.start(proxy_location="Disabled")
        over = threading.Event()
        try:
            app, note = replicas_of(spec, remote_model(ModelLoader(), spec.model_spec()), free_nodes())
            if note:
                say(console, note)
            replicas = deploy(app, name=APP, timeout_s=spec.startup_timeout)
            endpoint = make_endpoint(spec, ReplicaClient(replicas), key_digests=digests, reports=reports)
            threading.Thread(target=_watch, args=(console, over), name="shortv-watch", daemon=True).start()
            serve_app(endpoint, listening, announce=partial(_announce, spec, address_of(listening), console))
        finally:
            over.set()
            undeploy(APP)
            # Serve stays where it has other applications. A Ray of this process ends with it, more quietly.
            if not others and os.environ.get("RAY_ADDRESS"):
                serve.shutdown()  # type: ignore[no-untyped-call]
    say(console, "stopped")
    return 0


def check_model(spec: EndpointSpec, console: Console) -> None:
    """Check on the driver what a replica would only find out after loading weights. Raises Refused."""
    model = spec.model_spec()

    def check(plan: Plan) -> None:
        if plan.parts is not None:
            check_parts(plan.parts, plan.config_digest)

    architecture, plans = ModelLoader().describe(model), read_plans(spec.plans)
    _, warnings = fit_plans(plans, architecture, model=model.name, revision=model.revision, run_of=check)
    for warning in warnings:
        say(console, warning)


def _applications() -> list[str]:
    """The applications that Serve runs on this cluster."""
    try:
        return list(serve.status().applications)
    except Exception:  # Serve raises its own kinds where it was never started
        return []


def _announce(spec: EndpointSpec, address: str, console: Console) -> None:
    names = [spec.served_name, *(f"{spec.served_name}@{plan.name}" for plan in read_plans(spec.plans))]
    say(console, f"serving {', '.join(names)}")
    if spec.reports:
        say(console, f"{masked_uri(spec.reports)} is at {address}/reports/")
    say(console, f"{address}/v1 is ready; Ctrl-C stops it")


def _watch(console: Console, over: threading.Event) -> None:
    """Say when the application changes its state."""
    last = "running"
    while not over.wait(1):
        try:
            found = application_status(APP)
            status = found.value.lower().replace("_", " ") if found else "gone"
        except (RayError, RayServeException):
            status = "out of reach"
        if status != last and not over.is_set():
            say(console, f"the application is {status}")
            last = status
