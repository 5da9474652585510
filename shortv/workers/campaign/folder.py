"""The folder of a campaign: a part with the answers and a commit record for each cell, and the tables of all cells."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from reports.schemas import SCHEMAS
from reports.store import Folder
from shortv.errors import ShortVError, one_line
from shortv.evals.scoring import ScoredSample
from shortv.workers.campaign.cells import Cell, CellRecord

TABLES: Final = ("cells", "metrics", "comparisons", "speed")


@dataclass(frozen=True, slots=True)
class CampaignFolder:
    """Reads and writes the cells of a campaign.

    A cell has one part, `answers/KEY.parquet`, and a record, `cells/KEY.json`, which is written after the part and
    commits it by its digest. The tables are made from the parts and records of all cells.
    """

    folder: Folder

    def read_records(self, keys: Iterable[str]) -> tuple[dict[str, CellRecord], list[str]]:
        """Return the records of cells by key, and why others that are there cannot be used, a line each."""
        names = set(self.folder.list("cells"))
        records: dict[str, CellRecord] = {}
        damaged: list[str] = []
        for key in keys:
            if f"cells/{key}.json" in names:
                try:
                    records[key] = self._read(key)
                except ShortVError as error:
                    damaged.append(str(error))
        return records, damaged

    def _read(self, key: str) -> CellRecord:
        shown, value = f"{self.folder.shown}/cells/{key}.json", self.folder.read_json(f"cells/{key}.json")
        try:
            record = CellRecord.model_validate(value)
        except ValidationError as error:
            raise ShortVError(f"{shown} is damaged or from another release: {one_line(error)}") from error
        if record.key != key:
            raise ShortVError(f"{shown} is the record of another cell, {record.key[:12]}")
        if record.answers_digest is not None and record.answers_digest != self._digest(key):
            # A retry that was killed between its two writes leaves new answers beside the old record.
            raise ShortVError(f"{self.folder.shown}/answers/{key} does not have the digest in cells/{key}.json")
        return record

    def commit(self, cell: Cell, record: CellRecord, samples: Sequence[ScoredSample]) -> CellRecord:
        """Write the answers of a cell, if it has any, then its record with their digest; returns that record."""
        if samples:
            rows = [_answer(cell, sample) | {"doc": doc} for doc, sample in enumerate(samples)]
            self.folder.write_table(f"answers/{cell.key}", rows)
            record = record.model_copy(update={"answers_digest": self._digest(cell.key)})
        else:
            # A killed run may have left answers without a record.
            self.folder.delete(f"answers/{cell.key}.parquet")
        self.folder.write_json(f"cells/{cell.key}.json", record.model_dump(mode="json"))
        return record

    def read_answers(self, key: str) -> Any:
        """Return a cell's answers as an Arrow table."""
        return self.folder.read_table(f"answers/{key}")

    def write_tables(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Replace all tables of the campaign, one after the other."""
        for name in TABLES:
            self.folder.write_table(name, tables[name])

    def has_tables(self) -> bool:
        """Whether all tables are there."""
        return all(self.folder.exists(f"{name}.parquet") for name in TABLES)

    def _digest(self, key: str) -> str:
        return hashlib.sha256(self.folder.read_bytes(f"answers/{key}.parquet", limit_bytes=None)).hexdigest()


def _answer(cell: Cell, sample: ScoredSample) -> dict[str, Any]:
    own = {name: getattr(sample, name, None) for name in SCHEMAS["answers"].names}
    # A sample that failed has no scores; NaN is stored as null.
    scores = sample.scores if sample.error is None else {}
    pairs = [{"metric": metric, "value": value if value == value else None} for metric, value in scores.items()]
    return {**own, **cell.names, "scores": pairs}
