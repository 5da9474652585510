"""From finished units to the tables of a sweep folder: each sample is used, or in the errors with its reason.

A finished unit is one Parquet file below `progress/`. At the end the tables are made from these parts in the order of
the calibration, then the manifest is written, then the parts go: a killed run never looks complete.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from reports.manifest import State, SweepManifest
from reports.store import Folder
from shortv.architecture import Architecture
from shortv.errors import ShortVError
from shortv.plan import VISUAL_MODES, Mode, Plan
from shortv.records import ErrorRecord, KlDirection, LayerRecord, LcRecord, UsedSample
from shortv.sample import Sample
from shortv.sweep.planning import Evidence, Request, choose_layers, default_count, plan_of
from shortv.sweep.ranking import kl_matrix, layer_statistics, set_stability
from shortv.workers.sweep.measure import UnitResult
from shortv.workers.sweep.units import Unit

PARTS = "progress"
ROWS_PER_PART = 200_000


class Parts:
    """Finished units, one Parquet file each; a file is visible only when whole, and is never changed."""

    def __init__(self, folder: Folder) -> None:
        """Find out which units are finished."""
        self._folder = folder
        self._units: dict[int, set[Unit]] = defaultdict(set)
        for name in folder.list(PARTS):
            stem = re.fullmatch(rf"{PARTS}/(.+)\.parquet", name)
            if stem:
                unit = Unit.parse(stem[1])
                self._units[unit.batch].add(unit)

    def save(self, unit: Unit, result: pa.Table) -> None:
        """Commit the result of a unit. Raises ShortVError when it cannot be written."""
        self._folder.write_parquet(f"{PARTS}/{unit.unit_id}", result)
        self._units[unit.batch].add(unit)

    def finished(self) -> Mapping[int, frozenset[int]]:
        """Return the layers that are measured, by batch."""
        return {
            batch: frozenset(layer for unit in units for layer in unit.layers) for batch, units in self._units.items()
        }

    def results(self, batch: int) -> list[UnitResult]:
        """Return the results of a batch in the order of layers. Raises ShortVError when one cannot be read."""
        units = sorted(self._units.get(batch, ()))
        return [UnitResult.from_table(self._folder.read_parquet(f"{PARTS}/{unit.unit_id}")) for unit in units]

    def remove(self) -> None:
        """Delete all parts: the sweep's tables hold them now."""
        self._folder.delete(PARTS)
        self._units.clear()


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
    parts: Parts,
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
    for batch in _sorted_batches(parts, batches, modes, num_layers):
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
    parts: Parts, batches: Sequence[Sequence[Sample]], modes: Sequence[Mode], num_layers: int
) -> Iterator[Sorted]:
    for index, samples in enumerate(batches):
        results = [result.measured for result in parts.results(index)]
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


def finish(
    folder: Folder,
    parts: Parts,
    manifest: SweepManifest,
    *,
    batches: Sequence[Sequence[Sample]],
    architecture: Architecture,
) -> SweepManifest:
    """Write all tables and the default plan, and return the final manifest.

    Raises:
        ShortVError: a sample was lost, no sample could be used, or the disk is full.
    """
    direction = KlDirection(manifest.kl_direction)
    layers = architecture.num_layers
    tables = assemble(folder, parts, batches, modes=manifest.modes, num_layers=layers, kl_direction=direction)
    if not tables.used:
        first = tables.errors[0]
        raise ShortVError(
            f"none of the {len(tables.errors)} samples could be used; the first, {first.sample_id!r}, failed at "
            f"{first.stage}: {first.message} (all stand in {folder.shown}/errors.parquet)"
        )
    rows = layer_records(tables, num_layers=layers, kl_direction=direction, seed=manifest.seed)
    folder.write_table("lc_layers", rows)
    plan = default_plan(manifest, tables, rows, architecture)
    if plan is not None:
        folder.write_bytes(f"plans/{plan.name}.json", plan.to_json().encode())
    return manifest.updated(
        state=State.PARTIAL if tables.errors else State.COMPLETE,
        noise_floor=tables.noise_floor,
        counts={
            "samples": len(tables.used) + len(tables.errors),
            "used": len(tables.used),
            "errors": len(tables.errors),
            "without_image": sum(not row.n_visual for row in tables.used),
        },
        stability=_stability(manifest, tables, layers),
        details={**manifest.details, "default_plan": plan.name if plan else None},
    )


def default_plan(
    manifest: SweepManifest, tables: Tables, rows: Sequence[LayerRecord], architecture: Architecture
) -> Plan | None:
    """The plan that jobs/plan.py makes without options, for freeze-visual or the first mode that was measured."""
    measured = list(dict.fromkeys(row.mode for row in rows))
    if not measured:
        return None
    mode = Mode.FREEZE_VISUAL if Mode.FREEZE_VISUAL in measured else measured[0]
    counted = [row for row in tables.used if row.n_visual or mode not in VISUAL_MODES]
    ranked = sorted((row for row in rows if row.mode is mode), key=lambda row: row.rank)
    evidence = Evidence(
        architecture=architecture,
        mode=mode,
        ranking=tuple(row.layer for row in ranked),
        mean_lc={row.layer: row.mean for row in ranked},
        t=sum(row.n_text for row in counted) / len(counted),
        v=sum(row.n_visual for row in counted) / len(counted),
    )
    choice = choose_layers(evidence, Request())
    return plan_of(
        evidence,
        choice,
        name=f"{mode.value}-{len(choice.layers)}",
        model=manifest.model,
        revision=manifest.revision,
        source=manifest.source(len(counted), KlDirection(manifest.kl_direction)) | {"order": "lc"},
    )


def _stability(manifest: SweepManifest, tables: Tables, num_layers: int) -> dict[str, dict[str, float]]:
    return {
        str(mode): {
            f"{share:g}": same
            for share, same in set_stability(
                kl_matrix(values.sample_ids, values.layers, values.kl, num_layers),
                default_count(num_layers),
                noise_floor=tables.noise_floor or 0.0,
                seed=manifest.seed,
            ).items()
        }
        for mode, values in tables.values.items()
        if values.sample_ids
    }
