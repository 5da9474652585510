"""Campaigns with real lmms-eval tasks and producers in this process, on replicas that answer from a function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shortv.evals.benchmark import Benchmark
from shortv.plan import Plan
from shortv.request import Completion, Failure, Replies, Work
from shortv.spec import ModelSpec
from shortv.workers.campaign.producer import Producer, UnitResult
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.units import TaskSource, Unit
from tests.evals.lmms_tasks import answer_to, completion, text_of
from tests.workers.campaign.fakes import FakePool, FakeWorkers


@dataclasses.dataclass(kw_only=True)
class LocalWorkers(FakeWorkers):
    """Runs units by a real producer; `answer` gives the text or the failure for a question under a plan."""

    answer: Callable[[str, str], str | Failure] = lambda question, plan: answer_to(question)
    works: list[Work] = dataclasses.field(default_factory=list)

    def task(self, name: str, spec: CampaignSpec) -> Any:
        return Benchmark(name, **spec.model_dump(include={"limit", "include_path", "gen_kwargs", "seed"}))

    @contextmanager
    def open(self, spec: CampaignSpec, tasks: Sequence[Any]) -> Iterator[FakePool]:
        settings = spec.model_dump(include={"limit", "gen_kwargs", "seed"})
        sources = [
            TaskSource(name=task.name, digest=task.digest, settings=settings, folders=spec.include_path)
            for task in tasks
        ]
        yield LocalPool(self, sources)


class LocalPool(FakePool):
    """One producer, and a replica that knows the plans of its model."""

    def __init__(self, workers: LocalWorkers, sources: Sequence[TaskSource]) -> None:
        super().__init__(workers, [])
        self.sources = {source.name: source for source in sources}
        self._local, self._digests = workers, dict[str, str | None]()
        self._producer = Producer(lambda app: self)

    async def start(self, model: ModelSpec, plans: Sequence[Plan]) -> str:
        self._digests = {"": None} | {plan.name: plan.digest for plan in plans}
        return await super().start(model, plans)

    async def run(self, unit: Unit) -> UnitResult:
        self._local.before(unit)
        self._local.asked += [(cell.model, cell.plan, cell.task, doc) for cell in unit.cells for doc in unit.docs]
        return await self._producer.run(unit, window=48, pack=16)

    async def complete_all(self, works: Sequence[Work]) -> Replies:
        self._local.works += works
        return Replies(results=tuple({plan: self._answer(work, plan) for plan in work.plans} for work in works))

    def _answer(self, work: Work, plan: str) -> Completion | Failure:
        found = self._local.answer(text_of(work.request), plan)
        return found if isinstance(found, Failure) else completion(found, plan_digest=self._digests[plan])
