"""Finished units in the sweep folder: what a run that was killed leaves for the next one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping

from reports.store import Folder
from shortv.workers.outcome import UnitResult
from shortv.workers.units import Unit

PROGRESS = "progress"


class Journal:
    """One JSON file per finished unit below `progress/`; each is visible only when whole."""

    def __init__(self, folder: Folder) -> None:
        """Read which units are finished."""
        self._folder = folder
        names = (name.rpartition("/")[2] for name in folder.list(PROGRESS) if name.endswith(".json"))
        self._units: dict[int, set[Unit]] = defaultdict(set)
        for name in names:
            unit = Unit.parse(name.removesuffix(".json"))
            self._units[unit.batch].add(unit)

    def save(self, text: str, unit_id: str) -> None:
        """Keep the result of a unit, as `UnitResult.to_json` wrote it. Raises ShortVError when that is impossible."""
        self._folder.write_bytes(f"{PROGRESS}/{unit_id}.json", text.encode())
        unit = Unit.parse(unit_id)
        self._units[unit.batch].add(unit)

    def finished(self) -> Mapping[int, frozenset[int]]:
        """Layers that are measured, by batch."""
        return {
            batch: frozenset(layer for unit in units for layer in unit.layers) for batch, units in self._units.items()
        }

    def results(self, batch: int) -> list[UnitResult]:
        """Results of a batch by layer. Raises ShortVError when one cannot be read."""
        names = [f"{PROGRESS}/{unit.unit_id}.json" for unit in sorted(self._units.get(batch, ()))]
        return [UnitResult.from_json(json.loads(self._folder.read_bytes(name))) for name in names]

    def remove(self) -> None:
        """Forget everything: the sweep's tables hold it now."""
        self._folder.delete(PROGRESS)
        self._units.clear()
