"""Training samples on their way from the data set to the workers: never more than a few of them in memory.

The driver reads the data set twice, in batches: once to check and digest it, and once, when a training starts, to write
its usable samples as shards (Arrow files) into the run folder. Shards give any sample by its number, so each worker
reads its share of each step from there, through Ray Data.
"""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from reports.calibration import calibration_batches, calibration_rows
from reports.locations import locate, one_line
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.workers.samples import resolve_calibration
from shortv.workers.training.loop import StepSamples

SHARDS = "shards"
_INDEX = f"{SHARDS}/index.json"
_SHARD_BYTES = 32 * 2**20
"""Size from which on a shard is closed; the driver holds one."""
_STEPS_PER_TASK = 8
_TASKS = 2
_READS = 16
"""Shards that a reader reads at once: object stores answer slowly, but many requests in parallel."""
_SAMPLE = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("images", pa.list_(pa.large_binary())),
        pa.field("prompt", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("dataset", pa.string()),
    ]
)
_STEP = pa.schema([pa.field("step", pa.int64(), nullable=False), pa.field("samples", pa.list_(pa.struct(_SAMPLE)))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """All samples in an order drawn anew for each epoch, cut into batches; a batch may reach over an epoch's end.

    The order depends on the seed alone. Raises Refused on construction when there are fewer samples than a batch has.
    """

    samples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise Refused(f"--batch-size is {self.batch_size}; give 1 or more")
        if self.samples < self.batch_size:
            raise Refused(
                f"{self.samples} training samples are fewer than a batch of {self.batch_size}; "
                "give more samples, or a smaller --batch-size"
            )

    def rows(self, step: int) -> tuple[int, ...]:
        """Numbers of the samples of a step, counted from 0."""
        start = step * self.batch_size
        places = (divmod(place, self.samples) for place in range(start, start + self.batch_size))
        return tuple(_epoch(self.samples, self.seed, epoch)[place] for epoch, place in places)

    def share(self, step: int, worker: int, workers: int) -> tuple[int, ...]:
        """What one of several workers takes of a step; the batch size must be a multiple of their number."""
        each = self.batch_size // workers
        return self.rows(step)[worker * each : (worker + 1) * each]


@lru_cache(maxsize=2)
def _epoch(samples: int, seed: int, epoch: int) -> Sequence[int]:
    order = array("L", range(samples))
    random.Random(f"{seed}-order-{epoch}").shuffle(order)
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A Parquet file of samples, of which the first `rows` are used; None for all."""

    path: str
    rows: int | None = None


def sources_of(
    data: Sequence[str], *, limit: float | None, seed: int, include_path: str | None, scratch: Path
) -> list[Source]:
    """Find the Parquet files of a data set; samples of lmms-eval tasks are written to files in `scratch`.

    Args:
        data: Parquet files (`PATH.parquet`, local or a URI) and tasks (`gqa:20`, or `gqa` with a limit).
        limit: samples per source, or below 1 a share of each.

    Raises:
        Refused: an unknown task, or a file that is not a calibration file.
    """
    found = []
    for number, entry in enumerate(data):
        if entry.endswith(".parquet") or "/" in entry:
            share = limit if limit is None or limit >= 1 else math.ceil(limit * calibration_rows(entry))
            found.append(Source(path=entry, rows=None if share is None else int(share)))
        else:
            path = scratch / f"task-{number}.parquet"
            samples = resolve_calibration([entry], limit=limit, seed=seed, include_path=include_path)
            _write_parquet(path, samples)
            found.append(Source(path=str(path)))
    return found


def _write_parquet(path: Path, samples: Iterable[Sample]) -> None:
    with pq.ParquetWriter(path, _SAMPLE, compression="none") as writer:
        for sample in samples:
            writer.write_batch(_batch_of(sample))


def _batch_of(sample: Sample) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{**asdict(sample), "images": list(sample.images)}], schema=_SAMPLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a pass over a data set found."""

    samples: int
    digest: str
    """SHA-256, in hex, of all samples in order."""
    unanswered: tuple[str, ...]
    """Ids of samples without an answer."""
    unusable: tuple[ErrorRecord, ...]
    """Samples that are left out, each with its reason."""


def scan(sources: Sequence[Source], *, needs_images: bool, shards: ShardWriter | None = None) -> Contents:
    """Read a data set once, in batches, and write its usable samples to shards if given.

    Raises:
        Refused: a file cannot be read, or two samples have one id.
    """
    hasher, first_source = hashlib.sha256(b"["), dict[str, str]()
    unanswered, unusable = [], []
    for path, sample in _samples(sources):
        name = sample.sample_id
        if name in first_source:
            where = " and ".join(locate(place).shown for place in dict.fromkeys((first_source[name], path)))
            raise Refused(f"the sample id {name!r} occurs twice in {where}; give each sample one id, each source once")
        hasher.update(f'{"," if first_source else ""}"{sample.digest}"'.encode())
        first_source[name] = path
        if not (sample.answer and sample.answer.strip()):
            unanswered.append(name)
        if needs_images and not sample.images:
            unusable.append(_without_image(name))
        elif shards is not None:
            shards.add(sample)
    hasher.update(b"]")
    return Contents(
        samples=len(first_source),
        digest=hasher.hexdigest(),
        unanswered=tuple(unanswered),
        unusable=tuple(unusable),
    )


def _samples(sources: Sequence[Source]) -> Iterator[tuple[str, Sample]]:
    for source in sources:
        left = math.inf if source.rows is None else source.rows
        for batch in calibration_batches(source.path):
            for sample in batch[: int(min(left, len(batch)))]:
                yield source.path, sample
            left -= len(batch)
            if left <= 0:
                break


def _without_image(sample_id: str) -> ErrorRecord:
    message = f"sample {sample_id!r} has no image, and this training is about images; leave it out"
    return ErrorRecord(sample_id=sample_id, stage="prompt", error="no-image", message=message)


class ShardWriter:
    """Writes samples as shards into a run folder: Arrow files with a record batch for each sample."""

    def __init__(self, folder: Folder) -> None:
        """Write below `folder`; shards of an earlier attempt are removed."""
        self._folder = folder
        folder.delete(SHARDS)
        self._rows: list[int] = []
        self._new()

    def add(self, sample: Sample) -> None:
        """Append a sample. Raises ShortVError when the folder cannot be written."""
        self._writer.write_batch(_batch_of(sample))
        self._count += 1
        if self._sink.tell() >= _SHARD_BYTES:
            self._close()

    def finish(self, digest: str) -> None:
        """Write the last shard and the index, which says that all are there."""
        if self._count:
            self._close()
        self._folder.write_json(_INDEX, {"data_digest": digest, "rows": self._rows})

    def _new(self) -> None:
        self._sink, self._count = pa.BufferOutputStream(), 0
        self._writer = pa.ipc.new_file(self._sink, _SAMPLE)

    def _close(self) -> None:
        self._writer.close()
        self._folder.write_bytes(_shard_name(len(self._rows)), [self._sink.getvalue()])
        self._rows.append(self._count)
        self._new()


def write_shards(folder: Folder, sources: Sequence[Source], contents: Contents, *, needs_images: bool) -> None:
    """Write the usable samples of a scanned data set as shards, unless an earlier attempt has done so.

    Raises:
        ShortVError: the data set is not the one that was scanned, or the folder cannot be written.
    """
    if folder.exists(_INDEX) and folder.read_json(_INDEX).get("data_digest") == contents.digest:
        return
    writer = ShardWriter(folder)
    if scan(sources, needs_images=needs_images, shards=writer).digest != contents.digest:
        raise ShortVError("the training samples changed while they were read; run the same command again")
    writer.finish(contents.digest)


def _shard_name(number: int) -> str:
    return f"{SHARDS}/part-{number:05d}.arrow"


def sample_of(row: Mapping[str, Any]) -> Sample:
    """A sample from its row in a shard."""
    return Sample(**{**row, "images": tuple(row["images"])})


class Shards:
    """The samples of a run folder, each by its number."""

    def __init__(self, uri: str) -> None:
        """Open the shards below a run folder. Raises ShortVError where this node cannot read it."""
        self._location = locate(uri)
        folder = Folder(uri)
        if not folder.exists(_INDEX):
            raise ShortVError(
                f"{folder.shown} holds no shards of training samples as seen from this node; give an --output-path on "
                "storage that every node of the cluster shares"
            )
        self._starts = [0]
        for rows in folder.read_json(_INDEX)["rows"]:
            self._starts.append(self._starts[-1] + rows)
        self._readers: dict[int, Any] = {}

    def read(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Samples by number, as rows of their schema. Raises ShortVError when a shard cannot be read."""
        wanted: dict[int, list[int]] = {}
        for row in set(rows):
            wanted.setdefault(bisect_right(self._starts, row) - 1, []).append(row)
        try:
            with ThreadPoolExecutor(_READS) as threads:
                pairs = threads.map(self._read_shard, wanted.keys(), wanted.values())
                found = {row: sample for shard in pairs for row, sample in shard}
        except (pa.ArrowException, OSError) as error:
            raise ShortVError(
                f"training samples in {self._location.shown} cannot be read: {one_line(error)}"
            ) from error
        return [found[row] for row in rows]

    def _read_shard(self, shard: int, rows: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
        if shard not in self._readers:
            path = f"{self._location.path}/{_shard_name(shard)}"
            self._readers[shard] = pa.ipc.open_file(self._location.filesystem.open_input_file(path))
        reader = self._readers[shard]
        return [(row, reader.get_batch(row - self._starts[shard]).to_pylist()[0]) for row in rows]


def _read_steps(table: pa.Table, *, uri: str, order: Order, worker: int, workers: int) -> pa.Table:
    """Read one worker's share of some steps; a task of Ray Data, beside the training process."""
    shards = _opened(uri)
    found = [
        {"step": step, "samples": shards.read(order.share(step, worker, workers))}
        for step in table.column("step").to_pylist()
    ]
    return pa.Table.from_pylist(found, schema=_STEP)


@lru_cache(maxsize=1)
def _opened(uri: str) -> Shards:
    return Shards(uri)


def steps_of_worker(
    uri: str, order: Order, *, start: int, steps: int, worker: int, workers: int
) -> Iterator[StepSamples]:
    """Stream one worker's share of each step from `start` on, through Ray Data; nothing is read long before its use."""
    import ray.data
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    # Numbers of steps as items: every other source needs a CPU to start, and a worker may hold the last one.
    items = [{"step": step} for step in range(start, steps)]
    read: Any = _read_steps
    data = ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / _STEPS_PER_TASK)).map_batches(
        read,
        fn_kwargs={"uri": uri, "order": order, "worker": worker, "workers": workers},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        # Tasks that ask for no CPU are bounded by nothing else: Ray would start a process for each of them at once.
        concurrency=_TASKS,
    )
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for row in pa.table(batch).to_pylist():
            yield StepSamples(step=row["step"], samples=tuple(map(sample_of, row["samples"])))
