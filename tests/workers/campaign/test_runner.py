"""The runner with replicas that are lost: what one cell went through is nothing to the next."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.serve.handle import DeploymentHandle
from rich.console import Console

from shortv.evals.benchmark import Benchmark
from shortv.request import Completion, Request
from shortv.workers.campaign.runner import ReplicaRunner


class LosingReplicas:
    """A handle whose questions lose their replica three times each, and are answered then."""

    def __init__(self) -> None:
        self.complete = SimpleNamespace(remote=self._remote)
        self._asked: Counter[str] = Counter()

    def options(self, **_: Any) -> Any:
        return self

    def _remote(self, question: Request) -> Any:
        return asyncio.ensure_future(self._answer(question))

    async def _answer(self, question: Request) -> Completion:
        self._asked[question.request_id] += 1
        await asyncio.sleep(0.01)
        if self._asked[question.request_id] <= 3:
            raise ray.exceptions.RayActorError()
        return Completion(
            text="2",
            finish_reason="stop",
            prompt_tokens=40,
            visual_tokens=36,
            completion_tokens=1,
            plan_digest=None,
            queue_ms=0.0,
            prefill_ms=1.0,
            decode_ms=1.0,
        )


def test_questions_that_lose_replicas_in_two_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such questions wait for each other, in an event loop that ends with its cell."""
    for pause in ("_FIRST_PAUSE_S", "_LOSS_PAUSE_S"):
        monkeypatch.setattr(f"shortv.workers.serving.client.{pause}", 0.01)
    runner = ReplicaRunner(Console(quiet=True))
    runner._benchmarks["shapes_vqa"] = Benchmark("shapes_vqa", limit=4)
    handle: DeploymentHandle[Any] = LosingReplicas()  # type: ignore[assignment]
    for _ in range(2):
        found = runner._run_cell(handle, 4, 1, None, "shapes_vqa")
        assert [sample.prediction for sample in found.samples] == ["2"] * 4
