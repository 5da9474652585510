"""The model `shortv_serve` of lmms-eval: replicas by URL, or by the name of a Serve application."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from shortv.errors import Refused, ShortVError
from shortv.evals.dispatch import Response, send_all
from shortv.evals.lmms_model import LmmsModel, check_plan_digest, read_model_args
from shortv.evals.remote import Connection, ServedSpec, connect_url
from shortv.evals.requests import Conversation

# That of lmms-eval for torch; sampled completions are repeatable with it.
_SEED = 1234


class ShortVServe(LmmsModel):
    """Answers lmms-eval's requests by sending them to replicas, many at once; in lmms-eval's chat form.

    model_args are the fields of `ServedSpec`; the replicas decide batch size and device. A plan that changes during
    the run ends it with an error. Raises Refused for settings that cannot be right.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.spec = read_model_args(ServedSpec, settings)
        self.plan_digest = asyncio.run(self._look_up())

    async def connect(self) -> Connection:
        """Connect to the replicas. Raises Refused where there is no such endpoint, application, model or plan."""
        return await (connect_url(self.spec) if self.spec.app is None else _connect_app(self.spec.app, self.spec.plan))

    async def _look_up(self) -> str | None:
        """Return the digest of the plan on the replicas."""
        connection = await self.connect()
        await connection.client.aclose()
        check_plan_digest(connection.plan_digest, self.spec.plan_digest, plan=connection.plan)
        return connection.plan_digest

    def respond(self, requests: Sequence[Any]) -> list[Response]:
        """Send all requests, with a progress bar; the first failure ends the run."""
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("requests", total=len(requests))

            def check(conversation: Conversation, response: Response) -> None:
                self._check(conversation.name, response)
                progress.advance(bar)

            return asyncio.run(self._send(requests, check))

    async def _send(self, requests: Sequence[Any], check: Any) -> list[Response]:
        connection = await self.connect()
        try:
            return await send_all(
                connection.client,
                requests,
                self.task_dict,
                plan=connection.plan,
                seed=_SEED,
                concurrency=self.spec.num_concurrent,
                timeout_s=self.spec.timeout,
                on_response=check,
            )
        finally:
            await connection.client.aclose()

    def _check(self, name: str, response: Response) -> None:
        if response.failure is not None:
            message = response.failure.message
            # Failures of the task's own code name the document already.
            named = message if name in message else f"{name} has no answer ({response.failure.reason}): {message}"
            raise ShortVError(named)
        for completion in response.completions:
            if completion.plan_digest != self.plan_digest:
                raise ShortVError(
                    f"{name} was answered under plan digest {completion.plan_digest}, and the run began under "
                    f"{self.plan_digest}; the replicas' plans changed in between: run it again"
                )


class SimpleShortVServe(ShortVServe):
    """The same for `--force_simple`, the form in which lmms-eval asks for likelihoods (multiple choice)."""

    is_simple = True


async def _connect_app(app: str, plan: str) -> Connection:
    from shortv.workers.serving.client import ReplicaClient

    client = ReplicaClient(_handle(app), patient=True)
    try:
        plans = await client.plans()
    except TimeoutError:
        raise ShortVError(f"no replica of {app} answers; see `serve status`, and try again") from None
    if plan and plan not in plans:
        raise Refused(f"{app} serves no plan {plan!r}; it has {', '.join(plans) or 'the full model alone'}")
    return Connection(client=client, plan=plan, plan_digest=plans.get(plan))


def _handle(app: str) -> Any:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from shortv.workers.cluster import join
    from shortv.workers.serving.client import REPLICA

    join()
    try:
        return serve.get_deployment_handle(REPLICA, app_name=app)
    except (KeyError, RayServeException) as error:
        running = ", ".join(serve.status().applications) or "none"
        raise Refused(f"Serve runs no application {app!r}; running: {running}") from error
