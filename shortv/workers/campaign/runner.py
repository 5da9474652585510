"""Runs the cells of a campaign: requests go to Serve replicas, lmms-eval scores the completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from rich.console import Console

from shortv.errors import ShortVError
from shortv.evals.benchmark import Benchmark
from shortv.evals.dispatch import Response
from shortv.evals.requests import Conversation
from shortv.families import quiet_transformers
from shortv.plan import Plan
from shortv.request import FULL_MODEL
from shortv.spec import ModelSpec
from shortv.terminal import say
from shortv.workers.campaign.cells import CellResult, RunCell, TaskFacts
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.cluster import connected, free_nodes
from shortv.workers.models import ModelLoader, remote_model
from shortv.workers.placement import Placement
from shortv.workers.progress import SampleProgress
from shortv.workers.run import run_async, stop_on_signal
from shortv.workers.serving.app import deploy, place_replicas, replica_app, undeploy
from shortv.workers.serving.client import ReplicaClient
from shortv.workers.serving.scheduler import EngineSettings

REQUEST_SECONDS = 600.0
"""How long one request may take, including the time until a lost replica is back."""


class ReplicaRunner:
    """Runs the cells of a campaign on replicas of each model that serve all its plans. Tests replace it."""

    def __init__(self, console: Console | None = None) -> None:
        """Print progress to the console."""
        quiet_transformers()
        self.loader = ModelLoader()
        self._console = console or Console()
        self._benchmarks: dict[str, Benchmark] = {}
        self._placement: Placement | None = None

    def task(self, name: str, spec: CampaignSpec) -> TaskFacts:
        """Load a task once. Raises Refused for an unknown task, ShortVError when its data cannot be loaded."""
        settings = spec.model_dump(include={"limit", "include_path", "gen_kwargs", "seed"})
        found = self._benchmarks[name] = self._benchmarks.get(name) or Benchmark(name, **settings)
        return TaskFacts(found.name, found.digest, found.num_docs, found.main_metric)

    @contextmanager
    def open(self, model: ModelSpec, plans: Sequence[Plan], spec: CampaignSpec) -> Iterator[RunCell]:
        """Start replicas that serve a model itself and under these plans, and stop them at the end.

        Raises ShortVError when they do not start.
        """
        # Ray's C++ layer takes the signals for itself when it starts, and ends the process with them.
        with connected(), stop_on_signal():
            placement = self._place(spec)
            # A replica has its next batch waiting while one runs.
            concurrency = spec.num_concurrent or 2 * spec.batch_size * placement.high
            engine = EngineSettings(batch_size=spec.batch_size, max_queued=max(concurrency, 2 * spec.batch_size))
            app = replica_app(remote_model(self.loader, model), plans, placement, engine=engine)
            name = f"shortv-campaign-{secrets.token_hex(4)}"
            try:
                serve.start(proxy_location="Disabled")
                handle = deploy(app, name=name)
                yield partial(self._run_cell, handle, concurrency, placement.high)
            finally:
                undeploy(name)

    def _place(self, spec: CampaignSpec) -> Placement:
        """Fit replicas to the resources that were free when the first model started.

        Ray may still count the resources of its replicas as used when the next model starts.
        """
        if self._placement is None:
            self._placement = place_replicas(
                free_nodes(), replicas=spec.replicas, gpus=spec.gpus_per_replica, device=spec.device
            )
            if self._placement.note:
                say(self._console, self._placement.note)
        return self._placement

    def _run_cell(
        self, handle: DeploymentHandle[Any], concurrency: int, replicas: int, plan: Plan | None, task: str
    ) -> CellResult:
        benchmark = self._benchmarks[task]
        started = time.monotonic()
        with SampleProgress(total=len(benchmark.instances), console=self._console, label=task, brief=True) as progress:

            def advance(_: Conversation, response: Response) -> None:
                progress.advance(1, int(response.failure is not None))

            responses = run_async(
                benchmark.run(
                    # A client belongs to an event loop, and each cell has its own.
                    ReplicaClient(handle, patient=True),
                    plan=plan.name if plan else FULL_MODEL,
                    concurrency=concurrency,
                    timeout_s=REQUEST_SECONDS,
                    on_response=advance,
                )
            )
        seconds = time.monotonic() - started
        wanted = plan.digest if plan else None
        found = {completion.plan_digest for response in responses for completion in response.completions} - {wanted}
        if found:
            raise ShortVError(f"completions came under plan digest {found.pop()}, not {wanted}; run the cell again")
        return CellResult(benchmark.score(responses), seconds, replicas)
