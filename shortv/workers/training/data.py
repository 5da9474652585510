"""Training samples on their way from the data set to the workers: never more than a few of them in memory.

The driver reads the data set twice, in batches: once to check and digest it, and once, when a training starts, to write
its usable samples as shards (Arrow files) into the run folder. Shards give any sample by its number, so each worker
reads its share of each step from there.
"""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple

import pyarrow as pa

from reports.calibration import calibration_batches, calibration_rows
from reports.locations import locate, one_line
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.workers.samples import SAMPLES_TYPE, resolve_calibration, rows_of, samples_of

SHARDS = "shards"
_INDEX = f"{SHARDS}/index.json"
_SHARD_BYTES = 32 * 2**20
"""Size from which on a shard is closed; the driver holds one."""
_SAMPLE = pa.schema(list(SAMPLES_TYPE.value_type))
_AHEAD = 2
"""Steps whose samples are read before they are needed."""
_READS = 16
"""Shards that a reader reads at once: object stores answer slowly, but many requests in parallel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """All samples in an order drawn anew for each epoch, cut into batches; a batch may reach over an epoch's end.

    The order depends on the seed alone. Raises Refused on construction when there are fewer samples than a batch has.
    """

    samples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < self.batch_size:
            raise Refused(
                f"{self.samples} training samples are fewer than a batch of {self.batch_size}; "
                "give more samples, or a smaller --batch-size"
            )

    def rows(self, step: int, worker: int = 0, workers: int = 1) -> tuple[int, ...]:
        """Return the numbers of the samples that a worker takes in a step, counted from 0.

        The batch size must be a multiple of the number of workers.
        """
        each = self.batch_size // workers
        start = step * self.batch_size + worker * each
        places = (divmod(place, self.samples) for place in range(start, start + each))
        return tuple(_epoch(self.samples, self.seed, epoch)[place] for epoch, place in places)


@lru_cache(maxsize=2)
def _epoch(samples: int, seed: int, epoch: int) -> Sequence[int]:
    order = array("L", range(samples))
    random.Random(f"{seed}-order-{epoch}").shuffle(order)
    return order


class Source(NamedTuple):
    """A part of a data set, which can be read again and again."""

    name: str
    read: Callable[[], Iterable[Sample]]


def sources_of(data: Sequence[str], *, limit: float | None, seed: int, include_path: str | None) -> list[Source]:
    """Find the sources of a data set; samples of lmms-eval tasks are loaded at once.

    Args:
        data: Parquet files (`PATH.parquet`, local or a URI) and tasks (`gqa:20`, or `gqa` with a limit).
        limit: samples per source, or below 1 a share of each.

    Raises:
        Refused: an unknown task, or a file that is not a calibration file.
    """
    found = []
    for entry in data:
        if entry.endswith(".parquet") or "/" in entry:
            share = limit if limit is None or limit >= 1 else math.ceil(limit * calibration_rows(entry))
            rows = None if share is None else int(share)
            found.append(Source(locate(entry).shown, partial(_first_of_file, entry, rows)))
        else:
            samples = resolve_calibration([entry], limit=limit, seed=seed, include_path=include_path)
            found.append(Source(entry, partial(iter, samples)))
    return found


def table_source(name: str, table: pa.Table) -> Source:
    """Take samples from a table in the calibration format."""
    return Source(name, lambda: samples_of(table.select(_SAMPLE.names).to_pylist()))


def _first_of_file(uri: str, rows: int | None) -> Iterator[Sample]:
    return islice(chain.from_iterable(calibration_batches(uri)), rows)


@dataclass(slots=True, kw_only=True)
class Contents:
    """What a pass over a data set has found."""

    samples: int = 0
    digest: str = ""
    """SHA-256, in hex, of all samples in order."""
    unanswered: list[str] = field(default_factory=list)
    """Ids of samples without an answer."""
    unusable: list[ErrorRecord] = field(default_factory=list)
    """Samples that are left out, each with its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """The samples of all sources, in their order."""

    sources: Sequence[Source]
    needs_images: bool
    """Whether samples without an image are left out."""

    def scan(self) -> Contents:
        """Read all samples once. Raises Refused for a file that cannot be read, or an id that occurs twice."""
        contents = Contents()
        deque(self._usable(contents), maxlen=0)
        return contents

    def write_shards(self, folder: Folder, scanned: Contents) -> None:
        """Write the usable samples as shards into a run folder, unless an earlier attempt has done so.

        Raises:
            ShortVError: the samples are not those that were scanned, or the folder cannot be written.
        """
        if folder.exists(_INDEX) and folder.read_json(_INDEX).get("data_digest") == scanned.digest:
            return
        folder.delete(SHARDS)
        found = Contents()
        usable = self._usable(found)
        rows = [_write_shard(folder, number, chain([first], usable)) for number, first in enumerate(usable)]
        if found.digest != scanned.digest:
            raise ShortVError("the training samples changed while they were read; run the same command again")
        folder.write_json(_INDEX, {"data_digest": found.digest, "rows": rows})

    def _usable(self, contents: Contents) -> Iterator[Sample]:
        """Yield the samples that can be used, and note in `contents` what is found on the way."""
        hasher, first_source = hashlib.sha256(b"["), dict[str, str]()
        for source in self.sources:
            for sample in source.read():
                name = sample.sample_id
                if name in first_source:
                    where = " and ".join(dict.fromkeys((first_source[name], source.name)))
                    raise Refused(
                        f"the sample id {name!r} occurs twice in {where}; give each sample one id, each source once"
                    )
                hasher.update(f'{"," if first_source else ""}"{sample.digest}"'.encode())
                first_source[name] = source.name
                if not (sample.answer and sample.answer.strip()):
                    contents.unanswered.append(name)
                if self.needs_images and not sample.images:
                    message = f"sample {name!r} has no image, and this training is about images; leave it out"
                    error = ErrorRecord(sample_id=name, stage="prompt", error="no-image", message=message)
                    contents.unusable.append(error)
                else:
                    yield sample
        hasher.update(b"]")
        contents.samples, contents.digest = len(first_source), hasher.hexdigest()


def _write_shard(folder: Folder, number: int, samples: Iterable[Sample]) -> int:
    """Write samples until the shard is full, a record batch for each; returns how many."""
    sink, count = pa.BufferOutputStream(), 0
    with pa.ipc.new_file(sink, _SAMPLE) as writer:
        for sample in samples:
            writer.write_batch(pa.RecordBatch.from_pylist(rows_of([sample]), schema=_SAMPLE))
            count += 1
            if sink.tell() >= _SHARD_BYTES:
                break
    folder.write_bytes(_shard_name(number), [sink.getvalue()])
    return count


def _shard_name(number: int) -> str:
    return f"{SHARDS}/part-{number:05d}.arrow"


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
        self._starts = [0, *accumulate(folder.read_json(_INDEX)["rows"])]
        self._readers: dict[int, Any] = {}

    def read(self, rows: Sequence[int]) -> list[Sample]:
        """Return samples by number. Raises ShortVError when a shard cannot be read."""
        wanted: dict[int, list[int]] = {}
        for row in set(rows):
            wanted.setdefault(bisect_right(self._starts, row) - 1, []).append(row)
        try:
            with ThreadPoolExecutor(_READS) as threads:
                found = dict(chain.from_iterable(threads.map(self._read_shard, wanted.keys(), wanted.values())))
        except (pa.ArrowException, OSError) as error:
            raise ShortVError(
                f"training samples in {self._location.shown} cannot be read: {one_line(error)}"
            ) from error
        return [found[row] for row in rows]

    def _read_shard(self, shard: int, rows: Sequence[int]) -> list[tuple[int, Sample]]:
        if shard not in self._readers:
            path = f"{self._location.path}/{_shard_name(shard)}"
            self._readers[shard] = pa.ipc.open_file(self._location.filesystem.open_input_file(path))
        batches = (self._readers[shard].get_batch(row - self._starts[shard]) for row in rows)
        return [(row, samples_of(batch.to_pylist())[0]) for row, batch in zip(rows, batches, strict=True)]


def batches_of_worker(
    uri: str, order: Order, *, start: int, steps: int, worker: int, workers: int
) -> Iterator[list[Sample]]:
    """Yield one worker's share of each step from `start` on; a few steps are read ahead, beside the training."""
    shards = Shards(uri)
    with ThreadPoolExecutor(1) as thread:
        ahead: deque[Future[list[Sample]]] = deque()
        for step in range(start, steps):
            ahead.append(thread.submit(shards.read, order.rows(step, worker, workers)))
            if len(ahead) > _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
