"""The model `shortv_serve` of lmms-eval: replicas by URL, or by the name of a Serve application."""

from __future__ import annotations

from typing import Any

from shortv.errors import Refused, ShortVError
from shortv.evals.model_args import ServedSpec
from shortv.evals.remote import Connection
from shortv.evals.served import ServedModel


class ShortVServe(ServedModel):
    """Replicas, in lmms-eval's chat form."""

    async def connect(self, spec: ServedSpec) -> Connection:
        """Connect to the replicas. Raises Refused where no such application runs or it has no such plan."""
        if spec.app is None:
            return await super().connect(spec)
        from shortv.workers.serving.client import ReplicaClient

        client = ReplicaClient(_handle(spec.app), patient=True)
        try:
            plans = await client.plans()
        except TimeoutError:
            raise ShortVError(f"no replica of {spec.app} answers; see `serve status`, and try again") from None
        if spec.plan and spec.plan not in plans:
            raise Refused(
                f"{spec.app} serves no plan {spec.plan!r}; it has {', '.join(plans) or 'the full model alone'}"
            )
        return Connection(client=client, plan=spec.plan, plan_digest=plans.get(spec.plan))


class SimpleShortVServe(ShortVServe):
    """The same for `--force_simple`, the form in which lmms-eval asks for likelihoods (multiple choice)."""

    is_simple = True


def _handle(app: str) -> Any:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from shortv.workers.cluster import join
    from shortv.workers.serving.app import REPLICA

    join()
    try:
        return serve.get_deployment_handle(REPLICA, app_name=app)
    except (KeyError, RayServeException) as error:
        running = ", ".join(serve.status().applications) or "none"
        raise Refused(f"Serve runs no application {app!r}; running: {running}") from error
