"""The deployment that callers talk to; its process loads neither torch nor a model."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from shortv.workers.serving.client import ReplicaClient
from shortv.workers.serving.endpoint import make_endpoint
from shortv.workers.serving.settings import EndpointSettings


class Endpoint:
    """The HTTP face of the replicas of one model."""

    def __init__(self, replicas: DeploymentHandle[Any], model_name: str, settings: EndpointSettings) -> None:
        """Take the handle of the replicas."""
        self._app = make_endpoint(model_name, ReplicaClient(replicas), settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app
