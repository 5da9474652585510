"""The runner on replicas that fail: a failure belongs to its sample, and a later cell does not notice it."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayError
from rich.console import Console

from shortv.evals.scoring import Scored
from shortv.request import Request
from shortv.workers.campaign.runner import ReplicaRunner
from shortv.workers.placement import Node
from tests.evals.lmms_tasks import completion
from tests.workers.campaign.fakes import campaign_spec


class FailingReplicas:
    """A handle whose calls raise what `error` returns for the number of a request and that of its attempt."""

    def __init__(self, error: Callable[[int, int], Exception | None]) -> None:
        self.complete = SimpleNamespace(remote=lambda request: asyncio.ensure_future(self._complete(request)))
        self._error = error
        self._attempts: Counter[str] = Counter()

    def options(self, **_: Any) -> Any:
        return self

    async def _complete(self, request: Request) -> Any:
        self._attempts[request.request_id] += 1
        number = list(self._attempts).index(request.request_id)
        await asyncio.sleep(0.01)
        if error := self._error(number, self._attempts[request.request_id]):
            raise error
        return completion("2")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ReplicaRunner:
    found = ReplicaRunner(Console(quiet=True))
    found.task("shapes_vqa", campaign_spec(tmp_path_factory.mktemp("runner"), limit=4))
    return found


@pytest.fixture
def run_cell(runner: ReplicaRunner, monkeypatch: pytest.MonkeyPatch) -> Callable[[FailingReplicas], Scored]:
    """Run a cell of four samples on given replicas."""
    for pause in ("_FIRST_PAUSE_S", "_LOSS_PAUSE_S"):
        monkeypatch.setattr(f"shortv.workers.serving.client.{pause}", 0.01)
    return lambda replicas: runner._run_cell(replicas, 4, 1, None, "shapes_vqa").scored  # type: ignore[arg-type]


def test_requests_that_lose_replicas_complete_in_each_of_two_cells(
    run_cell: Callable[[FailingReplicas], Scored],
) -> None:
    """Such requests wait for each other in an event loop that ends with its cell."""
    replicas = FailingReplicas(lambda number, attempt: RayActorError() if attempt <= 3 else None)
    for _ in range(2):
        assert [sample.prediction for sample in run_cell(replicas).samples] == ["2"] * 4


@pytest.mark.parametrize("error", [KeyError("score"), RayError("lost object")])
def test_a_stray_exception_is_the_error_of_one_sample(
    run_cell: Callable[[FailingReplicas], Scored], error: Exception
) -> None:
    found = run_cell(FailingReplicas(lambda number, attempt: error if number == 1 else None))
    (failed,) = [sample for sample in found.samples if sample.error is not None]
    assert type(error).__name__ in str(failed.error) and failed.prediction is None and failed.scores == {}
    assert [sample.prediction for sample in found.samples].count("2") == 3
    assert found.problem is None and found.metrics[0].n == 3


def test_the_resources_of_an_earlier_model_are_used_for_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray may report the GPUs of stopped replicas as used for a moment."""
    free = iter((2.0, 0.0))
    monkeypatch.setattr(
        "shortv.workers.campaign.runner.free_nodes", lambda: [Node(cpus=8, gpus=next(free), total_gpus=4)]
    )
    runner = ReplicaRunner(Console(quiet=True))
    placements = [runner._place(campaign_spec(tmp_path)) for _ in range(2)]
    assert [(found.high, found.device) for found in placements] == [(2, "cuda")] * 2
