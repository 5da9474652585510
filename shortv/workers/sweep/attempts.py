"""A count of attempts kept outside the worker processes, so that a death leaves a trace.

Ray Data retries the task of a dead process for ever and without a record. A worker therefore notes what it is about
to do, and the next process that gets the same unit finds an attempt that never ended: its process died.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOADING = "loading the model"
WHOLE = "the whole batch"
MAX_DEATHS = 3
"""Deaths after which a sample, or the loading of the model, is given up."""
MAX_WHOLE_DEATHS = MAX_DEATHS - 1
"""Deaths of a batch after which its samples are run one by one."""


@dataclass(slots=True)
class Attempted:
    """What is known of a unit: deaths of its processes by what they were doing, and what is being done now."""

    deaths: dict[str, int] = field(default_factory=dict)
    doing: str | None = None
    worker: str | None = None


class Attempts:
    """The counts of one sweep; `path` keeps them over a restart of the process that holds them."""

    def __init__(self, path: str) -> None:
        """Read what an earlier process wrote there, if any."""
        self._path = Path(path)
        self._units: dict[str, Attempted] = {}
        self._loading_deaths = 0
        if self._path.exists():
            stored = json.loads(self._path.read_text())
            self._units = {name: Attempted(**value) for name, value in stored["units"].items()}
            self._loading_deaths = stored["loading_deaths"]

    def begin(self, unit_id: str, worker: str) -> dict[str, int]:
        """Open an attempt at a unit; returns the deaths so far by what was being done, those of loading in a row.

        An attempt that is still open belongs to a process that died. `worker` names this one: its process id, an `@`,
        and something that no other process has.
        """
        attempted = self._units.setdefault(unit_id, Attempted())
        # A call that is repeated after the restart of this actor comes from the same living process.
        if attempted.doing is not None and attempted.worker != worker:
            if attempted.doing == LOADING:
                self._loading_deaths += 1
            else:
                attempted.deaths[attempted.doing] = attempted.deaths.get(attempted.doing, 0) + 1
        attempted.doing, attempted.worker = None, worker
        self._keep()
        return {**attempted.deaths, LOADING: self._loading_deaths}

    def enter(self, unit_id: str, doing: str) -> None:
        """Note what the open attempt does from now on."""
        self._units[unit_id].doing = doing
        self._keep()

    def loaded(self) -> None:
        """Note that a process has loaded the model: the deaths before it were not the model's fault."""
        self._loading_deaths = 0
        self._keep()

    def end(self, unit_id: str) -> None:
        """Close the attempt: its result is on the way."""
        self._units.pop(unit_id, None)
        self._keep()

    def running(self) -> dict[str, int]:
        """Process ids of the workers that are at work, by unit."""
        return {
            name: int(value.worker.partition("@")[0])
            for name, value in self._units.items()
            if value.worker and value.doing
        }

    def _keep(self) -> None:
        value: dict[str, Any] = {
            "units": {name: asdict(attempted) for name, attempted in self._units.items()},
            "loading_deaths": self._loading_deaths,
        }
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(value))
        temporary.replace(self._path)


class RemoteAttempts:
    """The actor that holds the counts, called and waited for."""

    def __init__(self, actor: Any) -> None:
        """Wrap the actor's handle."""
        self.actor = actor

    def begin(self, unit_id: str, worker: str) -> dict[str, int]:
        """See `Attempts.begin`."""
        deaths: dict[str, int] = ray.get(self.actor.begin.remote(unit_id, worker))
        return deaths

    def enter(self, unit_id: str, doing: str) -> None:
        """See `Attempts.enter`."""
        ray.get(self.actor.enter.remote(unit_id, doing))

    def loaded(self) -> None:
        """See `Attempts.loaded`."""
        ray.get(self.actor.loaded.remote())

    def end(self, unit_id: str) -> None:
        """See `Attempts.end`."""
        ray.get(self.actor.end.remote(unit_id))


def start_attempts(path: Path) -> RemoteAttempts:
    """Start the actor on the driver's node; it takes no CPU and restarts with its counts."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: Any = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return RemoteAttempts(ray.remote(**options)(Attempts).remote(str(path)))
