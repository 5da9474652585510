"""The Ray side of a campaign: replicas of each model on Serve, producers on every node, and units on their way."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from reports.store import Folder
from shortv.errors import ShortVError, one_line
from shortv.evals.benchmark import Benchmark
from shortv.families import quiet_transformers
from shortv.plan import Plan
from shortv.request import PlanSpeed
from shortv.spec import ModelSpec
from shortv.terminal import say
from shortv.workers.campaign.producer import Producer, ProducerLost, UnitResult
from shortv.workers.campaign.spec import CampaignSpec
from shortv.workers.campaign.units import SHARD, TaskSource, Unit
from shortv.workers.cluster import connected, free_nodes, living_nodes
from shortv.workers.models import ModelLoader, remote_model
from shortv.workers.placement import Placement
from shortv.workers.run import stop_on_signal
from shortv.workers.serving.app import (
    applications,
    deploy,
    place_replicas,
    replica_app,
    running_replicas,
    undeploy,
)
from shortv.workers.serving.client import ReplicaClient
from shortv.workers.serving.scheduler import EngineSettings
from shortv.workers.shipping import offer

WINDOW: Final = 48
"""Documents on their way per replica: its running batches, and enough behind them that it never waits."""
_PACK: Final = (4, 16)
"""Documents of a call: few while few replicas share the last ones, many where calls are many."""
_MEASURE_S: Final = (4.0, 0.5)
"""Seconds for measuring the speed of plans: in all, and for each plan."""
_REFRESH_S: Final = 2.0
_STUCK_S: Final = 3600.0
"""How long a task's own code may work on the documents of one call; a judge's replies take most of it."""
# Losses of Ray that another producer can make good.
_LOSSES: Final = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError)


class CampaignWorkers:
    """What a campaign runs on. Tests replace it."""

    def __init__(self, console: Console | None = None) -> None:
        """Print notes to the console."""
        quiet_transformers()
        self.loader = ModelLoader()
        self._console = console or Console()

    def task(self, name: str, spec: CampaignSpec) -> Benchmark:
        """Load a task. Raises Refused for an unknown task, ShortVError when its data cannot be loaded."""
        return Benchmark(name, **spec.model_dump(include={"limit", "include_path", "gen_kwargs", "seed"}))

    @contextmanager
    def open(self, spec: CampaignSpec, tasks: Sequence[Benchmark]) -> Iterator[Pool]:
        """Start producers that load these tasks; end them, and all replicas, when the block ends."""
        # Ray's C++ layer takes the signals for itself when it starts, and ends the process with them.
        with connected(), stop_on_signal():
            serve.start(proxy_location="Disabled")
            # Replicas outlive a driver that is killed; two drivers never share a folder.
            for name in applications(_app_prefix(spec)):
                undeploy(name)
            placement = place_replicas(
                free_nodes(), replicas=spec.replicas, gpus=spec.gpus_per_replica, device=spec.device
            )
            if placement.note:
                say(self._console, placement.note)
            sources = {task.name: source_of(task, spec) for task in tasks}
            pool = Pool(spec, self.loader, placement, sources, note=partial(say, self._console))
            try:
                yield pool
            finally:
                pool.close()


class Pool:
    """Producers, the applications of replicas, and the units on their way between them.

    All but `close` is for one event loop.
    """

    def __init__(
        self,
        spec: CampaignSpec,
        loader: ModelLoader,
        placement: Placement,
        sources: Mapping[str, TaskSource],
        *,
        note: Callable[[str], None],
        producer: type[Producer] = Producer,
    ) -> None:
        """Start producers that load the tasks of these sources, given by name.

        Args:
            note: prints a line.
            producer: the class of the actors.
        """
        self.sources = sources
        self._spec, self._loader, self._placement = spec, loader, placement
        self._apps: dict[str, int] = {}
        self._producers = _Producers(producer, tuple(sources.values()), note)
        self._busy: Counter[Any] = Counter()
        self._in_flight = 0
        self._changed = asyncio.Condition()
        self._lock = threading.Lock()

    async def start(self, model: ModelSpec, plans: Sequence[Plan]) -> str:
        """Start replicas of a model that serve it under these plans; returns the name of their application.

        Raises ShortVError when they do not start.
        """
        name = f"{_app_prefix(self._spec)}{secrets.token_hex(4)}"
        self._apps[name] = self._placement.low
        await asyncio.to_thread(deploy, self.application(model, plans), name=name)
        return name

    def application(self, model: ModelSpec, plans: Sequence[Plan]) -> Any:
        """Return the bound deployment of replicas."""
        # Routing is not exact: now and then a replica has the documents of two.
        queued = 2 * self._window_of_replica * (len(plans) + 1)
        engine = EngineSettings(batch_size=self._spec.batch_size, max_queued=queued)
        return replica_app(remote_model(self._loader, model), plans, self._placement, engine=engine)

    async def stop(self, app: str) -> None:
        """End the replicas of an application, without waiting for their end."""
        self._apps.pop(app, None)
        await asyncio.to_thread(undeploy, app, wait=False)

    @property
    def _window_of_replica(self) -> int:
        wanted = self._spec.num_concurrent
        return WINDOW if wanted is None else math.ceil(wanted / self._placement.high)

    @property
    def replicas(self) -> int:
        """Replicas that run, of all applications."""
        return max(1, sum(self._apps.values()))

    async def enter(self) -> None:
        """Wait until the units on their way leave some of the replicas' windows empty, and count one more."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._in_flight < self._capacity)
            self._in_flight += 1

    async def leave(self) -> None:
        """Count a unit less."""
        async with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    @property
    def _capacity(self) -> int:
        """Units that fill all windows, and one more for each producer, so that none waits for the next."""
        return math.ceil(self.replicas * self._window_of_replica / SHARD) + max(1, len(self._producers.ready))

    async def run(self, unit: Unit) -> UnitResult:
        """Answer a unit on the producer with the fewest. Raises ProducerLost, or ShortVError as `Producer.run`."""
        window = math.ceil(self.replicas * self._window_of_replica / max(1, len(self._producers.ready)))
        low, high = _PACK
        pack = max(low, min(high, self.replicas // 8))
        result: UnitResult = await self._called(lambda one: one.run.remote(unit, window=window, pack=pack))
        return result

    async def measure(self, unit: Unit) -> list[PlanSpeed]:
        """Measure the speed of a unit's plans on its first documents. Raises as `run`."""
        seconds = _MEASURE_S[0] + _MEASURE_S[1] * len(unit.cells)
        found: list[PlanSpeed] = await self._called(lambda one: one.measure.remote(unit, seconds=seconds))
        return found

    async def pictures(self, task: TaskSource, docs: Sequence[int]) -> list[dict[str, Any]]:
        """Return rows of the table `thumbnails`. Raises as `run`."""
        found: list[dict[str, Any]] = await self._called(lambda one: one.pictures.remote(task, docs))
        return found

    async def _called(self, call: Callable[[Any], Any]) -> Any:
        # A copy: other threads find producers.
        while not (ready := list(self._producers.ready)):
            await asyncio.to_thread(self._producers.wait)
        producer = min(ready, key=lambda one: self._busy[one])
        self._busy[producer] += 1
        try:
            return await call(producer)
        except _LOSSES as error:
            self._producers.ready.pop(producer, None)
            await self._refresh()
            raise ProducerLost(type(error).__name__) from error
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None  # type: ignore[no-untyped-call]
        finally:
            self._busy[producer] -= 1

    async def watch(self) -> None:
        """Use replicas and nodes that come, and forget those that go, until this is cancelled."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            await self._refresh()

    async def _refresh(self) -> None:
        await asyncio.to_thread(self._look)
        async with self._changed:
            self._changed.notify_all()

    def _look(self) -> None:
        with self._lock, suppress(ray.exceptions.RayError, ShortVError):
            for app in list(self._apps):
                found = running_replicas(app)
                if app in self._apps:
                    self._apps[app] = found
            self._producers.look()

    def close(self) -> None:
        """End producers and replicas."""
        self._producers.end()
        for app in list(self._apps):
            # An embedded Ray ends with its replicas.
            undeploy(app, wait=bool(os.environ.get("RAY_ADDRESS")))


class _Producers:
    """One or two producers on each node that can load the tasks; `ready` has those that have loaded them, by node."""

    def __init__(self, actor: type[Producer], sources: Sequence[TaskSource], note: Callable[[str], None]) -> None:
        self.ready: dict[Any, str] = {}
        self._actor, self._sources, self._note = actor, sources, note
        self._starting: dict[Any, tuple[str, list[Any]]] = {}
        self._refused: dict[str, str] = {}
        self._asked_stuck = time.monotonic()
        self._lock = threading.Lock()
        self._add()

    def look(self) -> None:
        """Note who has loaded the tasks, who cannot, and who is stuck; start producers on nodes without one."""
        # Every unit that waits for a producer looks, in a thread of its own.
        with self._lock:
            self._look_at_starting()
            self._end_stuck()
            self._add()

    def _look_at_starting(self) -> None:
        for producer, (node, loading) in list(self._starting.items()):
            done, left = ray.wait(loading, num_returns=len(loading), timeout=0) if loading else ([], [])
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                self._refused[node] = one_line(error.cause)
                self._note(f"Warning: node {node[:8]} has no producer: {self._refused[node]}")
                ray.kill(producer)
                del self._starting[producer]
            except ray.exceptions.RayError:
                del self._starting[producer]
            else:
                if not left:
                    self.ready[producer] = self._starting.pop(producer)[0]

    def wait(self) -> None:
        """Wait a little for the first producer. Raises ShortVError when no node can have one."""
        with self._lock:
            loading = [one for _, some in self._starting.values() for one in some]
        if loading:
            ray.wait(loading, num_returns=len(loading), timeout=0.2)
        self.look()
        if not self.ready and not self._starting:
            raise ShortVError(f"no node can load the tasks: {next(iter(self._refused.values()), 'there is no node')}")

    def _end_stuck(self) -> None:
        """End producers in whose task's code nothing has ended for long; their units run again elsewhere."""
        if time.monotonic() - self._asked_stuck < _STUCK_S / 60:
            return
        self._asked_stuck = time.monotonic()
        asked = {one.stuck_s.remote(): one for one in self.ready}
        # One that does not answer is dead, which its calls find out.
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=5.0) if asked else ([], [])
        for found in done:
            with suppress(ray.exceptions.RayError):
                if ray.get(found) > _STUCK_S:
                    ray.kill(asked[found])

    def _add(self) -> None:
        have = Counter([*self.ready.values(), *(node for node, _ in self._starting.values())])
        for node in living_nodes():
            name = node["NodeID"]
            # Where a node's replicas can be many, one producer would keep them waiting.
            wanted = 0 if name in self._refused else 2 if node["Resources"].get("CPU", 0) >= 16 else 1
            for _ in range(wanted - have[name]):
                there = NodeAffinitySchedulingStrategy(name, soft=True)
                # Many calls at once: each is a unit that mostly waits.
                options: Any = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": there}
                producer: Any = ray.remote(**options)(self._actor).remote(ReplicaClient.of_application)
                self._starting[producer] = name, [producer.prepare.remote(source) for source in self._sources]

    def end(self) -> None:
        """End all producers."""
        for producer in (*self.ready, *self._starting):
            ray.kill(producer)


def _app_prefix(spec: CampaignSpec) -> str:
    """Return how the names of a campaign's applications begin, which depends on its folder alone."""
    folder = Folder(spec.output_path)
    place = str(folder.local_path or folder.shown)
    return f"shortv-campaign-{hashlib.sha256(place.encode()).hexdigest()[:8]}-"


def source_of(task: Benchmark, spec: CampaignSpec) -> TaskSource:
    """Return how producers load a task; its folders are shipped."""
    settings = spec.model_dump(include={"limit", "gen_kwargs", "seed"})
    folders = tuple(offer(folder) or folder for folder in spec.include_path)
    return TaskSource(name=task.name, digest=task.digest, settings=settings, folders=folders)
