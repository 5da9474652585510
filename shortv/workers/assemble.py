"""From the journal to the tables of the sweep folder, each sample in exactly one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from reports.store import Folder
from shortv.errors import ShortVError
from shortv.plan import VISUAL_MODES, Mode
from shortv.records import ErrorRecord, KlDirection, LayerRecord, LcRecord, UsedSample
from shortv.sample import Sample
from shortv.sweep.ranking import kl_matrix, layer_statistics
from shortv.workers.journal import Journal

ROWS_PER_PART = 200_000


@dataclass(slots=True)
class Values:
    """Divergences of one mode that count, in the direction that ranks."""

    sample_ids: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Tables:
    """What the assembled tables hold, less the rows per layer of each sample."""

    used: list[UsedSample]
    errors: list[ErrorRecord]
    noise_floor: float | None
    values: dict[Mode, Values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """One batch: rows of the used samples in calibration order, and the errors of the others."""

    records: list[LcRecord]
    used: list[UsedSample]
    errors: list[ErrorRecord]
    noise_floor: float | None


def assemble(
    folder: Folder,
    journal: Journal,
    batches: Sequence[Sequence[Sample]],
    *,
    modes: Sequence[Mode],
    num_layers: int,
    kl_direction: KlDirection,
) -> Tables:
    """Write samples, lc_samples and errors; memory holds one part of lc_samples at a time.

    Raises:
        ShortVError: a sample is neither measured in every mode and layer nor an error, or the disk is full.
    """
    tables = Tables(used=[], errors=[], noise_floor=None, values={mode: Values() for mode in modes})
    folder.delete("lc_samples")
    part, waiting = 0, list[LcRecord]()
    for batch in _sorted_batches(journal, batches, modes, num_layers):
        tables.used += batch.used
        tables.errors += batch.errors
        if batch.noise_floor is not None:
            tables.noise_floor = max(tables.noise_floor or 0.0, batch.noise_floor)
        _count(tables, batch, kl_direction)
        waiting += batch.records
        if len(waiting) >= ROWS_PER_PART:
            folder.write_table(f"lc_samples/part-{part:05d}", waiting)
            part, waiting = part + 1, []
    if waiting or not part:
        folder.write_table(f"lc_samples/part-{part:05d}", waiting)
    folder.write_table("samples", tables.used)
    folder.write_table("errors", tables.errors)
    return tables


def layer_records(tables: Tables, *, num_layers: int, kl_direction: KlDirection, seed: int) -> list[LayerRecord]:
    """Statistics of every mode that at least one sample counts for."""
    rows: list[LayerRecord] = []
    for mode, values in tables.values.items():
        if values.sample_ids:
            rows += layer_statistics(
                kl_matrix(values.sample_ids, values.layers, values.kl, num_layers),
                mode=mode,
                kl_direction=kl_direction,
                noise_floor=tables.noise_floor or 0.0,
                seed=seed,
            )
    return rows


def _sorted_batches(
    journal: Journal, batches: Sequence[Sequence[Sample]], modes: Sequence[Mode], num_layers: int
) -> Iterator[Sorted]:
    for index, samples in enumerate(batches):
        results = [result.measured for result in journal.results(index)]
        floors = [one.noise_floor for one in results if one.noise_floor is not None]
        errors: dict[str, ErrorRecord] = {}
        for error in (error for one in results for error in one.errors):
            errors.setdefault(error.sample_id, error)
        used = {row.sample_id: row for one in results for row in one.used}
        records: dict[str, dict[tuple[Mode, int], LcRecord]] = {sample.sample_id: {} for sample in samples}
        for record in (record for one in results for record in one.records):
            records[record.sample_id][record.mode, record.layer] = record
        good = [sample.sample_id for sample in samples if sample.sample_id not in errors]
        wanted = [(mode, layer) for mode in modes for layer in range(num_layers)]
        for sample_id in good:
            _check_complete(sample_id, sample_id in used, set(records[sample_id]), set(wanted))
        yield Sorted(
            records=[records[sample_id][key] for sample_id in good for key in wanted],
            used=[used[sample_id] for sample_id in good],
            errors=[errors[sample.sample_id] for sample in samples if sample.sample_id in errors],
            noise_floor=max(floors, default=None),
        )


def _check_complete(sample_id: str, used: bool, found: set[tuple[Mode, int]], wanted: set[tuple[Mode, int]]) -> None:
    missing = sorted(wanted - found)
    if missing or not used:
        where = f"mode {missing[0][0]}, layer {missing[0][1]}" if missing else "its token counts"
        raise ShortVError(
            f"sample {sample_id!r} was lost: neither an error nor measured at {where} "
            f"({len(missing)} of {len(wanted)} missing); run the same command again, and report this as a bug"
        )


def _count(tables: Tables, batch: Sorted, kl_direction: KlDirection) -> None:
    blind = {row.sample_id for row in batch.used if not row.n_visual}
    for record in batch.records:
        if record.mode in VISUAL_MODES and record.sample_id in blind:
            continue
        values = tables.values[record.mode]
        values.sample_ids.append(record.sample_id)
        values.layers.append(record.layer)
        values.kl.append(float(getattr(record, kl_direction.column)))
