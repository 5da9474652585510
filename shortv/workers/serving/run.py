"""An endpoint that runs until it is stopped: replicas on Serve, HTTP in this process.

Serve's proxies would cost more than the answers of a small model: two more hops through Ray per request, which a
refusal pays too (see jobs/bench.py campaign). Behind proxies runs `app.endpoint`, for `serve run` and `serve deploy`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import uvicorn
from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus
from rich.console import Console

from reports.access import address_of, bound, check_host
from reports.locations import masked_uri
from shortv.errors import Refused
from shortv.families import load_architecture, load_processor
from shortv.workers.cluster import connected
from shortv.workers.engine import ModelEngine
from shortv.workers.serving.app import deploy, endpoint_settings, replicas_of, shipped
from shortv.workers.serving.arguments import EndpointArguments
from shortv.workers.serving.client import ReplicaClient
from shortv.workers.serving.endpoint import make_endpoint
from shortv.workers.serving.face import reports_of
from shortv.workers.serving.gate import log_requests
from shortv.workers.serving.plans import PlanBook, read_plans
from shortv.workers.stopping import Stopped, stop_on_signal

APP = "shortv"
_DELETION_S = 15.0
_GONE = "gone"


def run_endpoint(arguments: EndpointArguments, *, host: str | None, port: int, console: Console) -> int:
    """Start the endpoint, say where it is, and serve until SIGTERM or Ctrl-C.

    Raises:
        Refused: arguments, plans or keys that cannot be right, or an address that cannot be bound.
        ShortVError: the replicas do not come up.
    """
    host = check_host(host, with_key=arguments.api_key_file is not None)
    # Replicas that start later load the same weights, whatever a branch on the hub names by then.
    arguments = replace(arguments, revision=ModelEngine().pin(arguments.spec()).revision)
    check_model(arguments, console)
    settings, reports = endpoint_settings(arguments), reports_of(arguments)
    # The endpoint has a limit of its own, and an answer for images beyond it.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    log_requests()
    with bound(host, port) as listening, connected(), suppress(Stopped), stop_on_signal():
        others = _applications()
        if APP in others:
            raise Refused(f"this cluster serves {APP} already; end that job or application first")
        serve.start(proxy_location="Disabled")
        try:
            replicas = deploy(replicas_of(arguments, folder=shipped(arguments.model_path)), name=APP, route_prefix=None)
            face = make_endpoint(arguments.served_name, ReplicaClient(replicas), settings, reports=reports)
            with _watched(console):
                asyncio.run(_listen(face, listening, partial(_say, arguments, address_of(listening), console)))
        finally:
            _end(alone=not others)
    console.print("stopped", highlight=False)
    return 0


def _end(*, alone: bool) -> None:
    """End the application. Those of others on the cluster go on, and so does Serve where it has any."""
    serve.delete(APP, _blocking=False)
    # Nobody waits for an answer any more, so replicas end at once; one that does not ends with its cluster.
    until = time.monotonic() + _DELETION_S
    while _status() != _GONE and time.monotonic() < until:
        time.sleep(0.1)
    # A Ray of this process ends with it, more quietly.
    if alone and os.environ.get("RAY_ADDRESS"):
        serve.shutdown()  # type: ignore[no-untyped-call]


async def _listen(face: FastAPI, listening: socket.socket, say: Callable[[], None]) -> None:
    """Answer until a signal comes, then let running requests end."""
    server = uvicorn.Server(
        uvicorn.Config(face, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=10)
    )
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    serving = asyncio.create_task(server.serve([listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.02)
    say()
    await serving


def _is_news(record: logging.LogRecord) -> bool:
    """False for the traceback of a request that the stop has cut off: uvicorn says how many those are."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


def _applications() -> list[str]:
    """The applications that Serve runs on this cluster."""
    try:
        return list(serve.status().applications)
    except Exception:  # Serve raises its own kinds where it was never started
        return []


def check_model(arguments: EndpointArguments, console: Console) -> None:
    """Check on the driver what a replica would only find out after loading weights. Raises Refused."""
    spec = arguments.spec()
    architecture = load_architecture(spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    load_processor(
        spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code, chat_template=spec.chat_template
    )
    book = PlanBook(architecture, read_plans(arguments.plans), model=spec.name, revision=spec.revision)
    for warning in book.warnings:
        console.print(warning, style="yellow", highlight=False, soft_wrap=True)


def _say(arguments: EndpointArguments, address: str, console: Console) -> None:
    names = [arguments.served_name, *(f"{arguments.served_name}@{plan.name}" for plan in read_plans(arguments.plans))]
    console.print(f"serving {', '.join(names)}", highlight=False, soft_wrap=True)
    if arguments.reports:
        console.print(f"{masked_uri(arguments.reports)} is at {address}/reports/", highlight=False, soft_wrap=True)
    console.print(f"{address}/v1 is ready; Ctrl-C stops it", highlight=False, soft_wrap=True)


@contextmanager
def _watched(console: Console) -> Iterator[None]:
    """Say when the application changes its state while the block runs."""
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(console, over), name="shortv-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(console: Console, over: threading.Event) -> None:
    last = ApplicationStatus.RUNNING.value
    while not over.wait(1):
        status = _status()
        if status != last:
            console.print(f"the application is {status.lower().replace('_', ' ')}", highlight=False)
            last = status


def _status() -> str:
    try:
        application = serve.status().applications.get(APP)
    except (RayError, RayServeException):
        return "out of reach"
    return str(application.status.value) if application else _GONE
