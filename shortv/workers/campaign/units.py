"""The units of a campaign: a shard of a task's documents, with all plans of a model that still lack them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shortv.workers.shipping import ShippedFolder

SHARD: Final = 64
"""Documents of a unit, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """How a producer loads a task; `digest` is what the driver found, so that both have the same one."""

    name: str
    digest: str
    settings: Mapping[str, Any] = field(hash=False)
    """Arguments of `Benchmark` without the folders of tasks."""
    folders: tuple[ShippedFolder | str, ...] = ()
    """The folders of tasks; those of the driver's node are shipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCell:
    """A plan of a unit: the columns of its answers that are the same in every row, and the plan on the replicas."""

    cell: str
    model: str
    plan: str
    task: str
    served: str
    """The plan's name on the replicas; `request.FULL_MODEL` for the unmodified model."""
    plan_digest: str | None
    """None for the unmodified model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Documents to answer under some plans of one model."""

    app: str
    """The Serve application of the model's replicas."""
    task: TaskSource
    docs: tuple[int, ...]
    """Positions in the task, ascending."""
    digests: tuple[int, ...]
    """Digests of the documents, as the driver has them."""
    cells: tuple[UnitCell, ...]
    judged: Mapping[str, str] = field(default_factory=dict)
    """Earlier replies of an LLM judge about these documents, by the digests of its calls."""
    unscored: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    """Rows of the table `answers` whose scoring failed. A unit that has them asks nothing, it scores them again."""

    @property
    def pairs(self) -> int:
        """Number of answers."""
        return len(self.unscored) or len(self.docs) * len(self.cells)

    def singles(self) -> Iterator[Unit]:
        """Yield the unit's documents, each as a unit of its own."""
        for doc, digest in zip(self.docs, self.digests, strict=True):
            unscored = tuple(row for row in self.unscored if row["doc"] == doc)
            yield replace(self, docs=(doc,), digests=(digest,), unscored=unscored)


def shards(missing: Mapping[str, NDArray[np.bool_]]) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Yield documents and the cells that lack them, shard by shard, so that each missing pair comes once.

    Args:
        missing: for each cell, which documents it lacks; all arrays are as long.
    """
    keys = list(missing)
    missing_CD = np.stack(list(missing.values())) if keys else np.zeros((0, 0), bool)
    for start in range(0, missing_CD.shape[1], SHARD):
        by_cells: defaultdict[Sequence[bool], list[int]] = defaultdict(list)
        for at, lacking in enumerate(missing_CD[:, start : start + SHARD].T.tolist()):
            by_cells[tuple(lacking)].append(start + at)
        for lacking, docs in by_cells.items():
            if any(lacking):
                yield tuple(docs), tuple(key for key, lacks in zip(keys, lacking, strict=True) if lacks)
