"""What the driver keeps of a training: checkpoints, metrics, unusable samples, and the parts at the end."""

from __future__ import annotations

from typing import Any

from reports.store import Folder
from shortv.records import ErrorRecord
from shortv.workers.training.checkpoint import CHECKPOINT_NAME, read_checkpoint
from shortv.workers.training.messages import Saved, Trained, Unusable
from shortv.workers.training.rows import TABLE, StepRow, from_table, to_rows

ERRORS = "errors"


class Keeper:
    """Writes what workers send into the result folder, each file whole or not at all."""

    def __init__(self, folder: Folder, identity: str) -> None:
        """Read what an earlier run left. Raises ShortVError when its checkpoint is damaged."""
        self._folder = folder
        self.step, self.content = read_checkpoint(folder, identity)
        self.errors: dict[str, ErrorRecord] = {}
        self.rows: list[StepRow] = []
        if folder.exists(f"{ERRORS}.parquet"):
            rows = folder.read_table(ERRORS).to_pylist()
            self.errors = {row["sample_id"]: ErrorRecord(**row) for row in rows}
        if self.step and folder.exists(f"{TABLE}.parquet"):
            # The table is written before the checkpoint, and may be ahead of it.
            self.rows = [row for row in from_table(folder.read_table(TABLE)) if row.step <= self.step]

    def handle(self, message: Any) -> None:
        """Keep what a message holds. Raises ShortVError when it cannot be written."""
        if isinstance(message, Saved):
            self.rows += message.rows
            self._folder.write_table(TABLE, to_rows(self.rows))
            self._folder.write_bytes(CHECKPOINT_NAME, message.content)
            self.step, self.content = message.step, message.content
        elif isinstance(message, Unusable):
            self.errors.update({error.sample_id: error for error in message.errors})
            self._folder.write_table(ERRORS, [self.errors[name] for name in sorted(self.errors)])
        elif isinstance(message, Trained):
            for name, content in message.files.items():
                self._folder.write_bytes(name, content)

    def summary(self) -> dict[str, Any]:
        """The last loss and the seconds that the steps took, all attempts together."""
        if not self.rows:
            return {}
        return {"loss": self.rows[-1].loss, "train_seconds": sum(row.seconds for row in self.rows)}
