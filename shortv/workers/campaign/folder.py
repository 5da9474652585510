"""The folder of a campaign: answers and a commit record per cell, tables of all of them, and one driver at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from reports.manifest import MANIFEST_NAME, CampaignManifest
from reports.schemas import SCHEMAS
from reports.store import Folder
from shortv.errors import ShortVError
from shortv.evals.scoring import Sample
from shortv.workers.campaign.cells import Cell, CellRecord
from shortv.workers.run import check_output, find_manifest, one_driver

TABLES: Final = ("cells", "metrics", "comparisons", "speed")


class Found(NamedTuple):
    """The records of earlier runs by cell key, and a line for each that cannot be used."""

    records: dict[str, CellRecord]
    damaged: list[str]


@dataclass(frozen=True, slots=True)
class CampaignFolder:
    """Reads and writes what a campaign keeps; a cell is finished once its record is there."""

    folder: Folder

    def manifest(self) -> CampaignManifest | None:
        """The manifest of the last run, None in a new folder."""
        return CampaignManifest.load(self.folder) if self.folder.exists(MANIFEST_NAME) else None

    def find(self, cells: Iterable[Cell]) -> Found:
        """Read the records of these cells; what a killed run left is no record, and a damaged one counts as none."""
        names = set(self.folder.list("cells"))
        found = Found({}, [])
        for key in dict.fromkeys(cell.key for cell in cells):
            if _record(key) in names:
                try:
                    found.records[key] = self._read(key)
                except ShortVError as error:
                    found.damaged.append(f"{error}; the cell runs again")
        return found

    def _read(self, key: str) -> CellRecord:
        shown = f"{self.folder.shown}/{_record(key)}"
        record = CellRecord.from_json(self.folder.read_json(_record(key)), shown)
        if record.key != key:
            raise ShortVError(f"{shown} is the record of another cell, {record.key[:12]}")
        if record.answers_digest is not None and record.answers_digest != self._digest(key):
            # A retry that was killed between its two writes leaves new answers under the old record.
            raise ShortVError(f"{self.folder.shown}/{_answers(key)} is not what {_record(key)} was written for")
        return record

    def write_answers(self, cell: Cell, samples: Sequence[Sample], record: CellRecord) -> CellRecord:
        """Write the answers of a cell and return its record with their digest."""
        self.folder.write_table(_answers(cell.key), [_answer(cell, sample) for sample in samples])
        return record.model_copy(update={"answers_digest": self._digest(cell.key)})

    def write_record(self, record: CellRecord) -> None:
        """Commit a cell."""
        if record.answers_digest is None:
            # Answers that an earlier run left belong to no record.
            self.folder.delete(f"{_answers(record.key)}.parquet")
        self.folder.write_json(_record(record.key), record.to_json())

    def read_answers(self, key: str) -> Any:
        """The Arrow table of a cell's answers."""
        return self.folder.read_table(_answers(key))

    def write_tables(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Replace every table of the campaign, one after the other, each whole."""
        for name in TABLES:
            self.folder.write_table(name, tables[name])

    def has_tables(self) -> bool:
        """Whether all tables are there."""
        return all(self.folder.exists(f"{name}.parquet") for name in TABLES)

    def _digest(self, key: str) -> str:
        return hashlib.sha256(self.folder.read_bytes(f"{_answers(key)}.parquet")).hexdigest()


@contextmanager
def open_campaign(path: str) -> Iterator[CampaignFolder]:
    """Open a campaign's folder, new or to be continued, for this driver alone.

    Raises:
        Refused: something else is in the folder, or another driver is at work there (seen in local folders).
    """
    check_output(path)
    folder = Folder(path)
    find_manifest(folder, CampaignManifest)
    with one_driver(folder):
        yield CampaignFolder(folder)


def _answer(cell: Cell, sample: Sample) -> dict[str, Any]:
    own = {name: getattr(sample, name) for name in SCHEMAS["answers"].names if hasattr(sample, name)}
    # An answer that was not given has no score, whatever the runner says.
    scores = sample.scores if sample.error is None else {}
    # NaN is no score either.
    pairs = [{"metric": metric, "value": value if value == value else None} for metric, value in scores.items()]
    names = {"cell": cell.key, "model": cell.model.name, "plan": cell.entry.name, "task": cell.task.name}
    return {**own, **names, "scores": pairs}


def _record(key: str) -> str:
    return f"cells/{key}.json"


def _answers(key: str) -> str:
    return f"answers/{key}"
