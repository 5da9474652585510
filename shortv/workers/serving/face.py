"""The deployment that callers talk to; its process loads neither torch nor a model."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from reports.http import guarded
from reports.service import make_service
from shortv.workers.serving.arguments import EndpointArguments
from shortv.workers.serving.client import ReplicaClient
from shortv.workers.serving.endpoint import make_endpoint
from shortv.workers.serving.gate import log_requests
from shortv.workers.serving.settings import EndpointSettings


class Endpoint:
    """The HTTP face of the replicas of one model."""

    def __init__(
        self, replicas: DeploymentHandle[Any], arguments: EndpointArguments, settings: EndpointSettings
    ) -> None:
        """Take the handle of the replicas."""
        log_requests()
        client, reports = ReplicaClient(replicas), reports_of(arguments)
        self._app = make_endpoint(arguments.served_name, client, settings, reports=reports)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def reports_of(arguments: EndpointArguments) -> Starlette | None:
    """The runs to serve beside the model, if any. Raises Refused for a folder that is not there."""
    if not arguments.reports:
        return None
    return guarded(make_service(arguments.reports), key_digests=None, sends_request_id=False)
