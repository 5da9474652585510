"""The result of a sweep: tables made of its finished units, and plans made of its tables.

A finished unit is one Parquet file below `progress/`. At the end the tables are made from these parts in the order of
the calibration, then the manifest is written, then the parts go: a killed run never looks complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reports.manifest import State, SweepManifest
from reports.schemas import schema_of
from reports.store import Folder
from shortv.architecture import Architecture
from shortv.costs import flops_ratio
from shortv.errors import Refused, ShortVError
from shortv.plan import VISUAL_MODES, Mode, Plan, modes_of_layers
from shortv.records import KlDirection, LayerRecord
from shortv.sweep.planning import Choice, Control, Evidence, Request, choose_layers, default_count
from shortv.sweep.ranking import Matrix, kl_matrix, layer_statistics, rank_layers, set_stability

PARTS = "progress"
ROWS_PER_PART = 200_000


def finish(folder: Folder, manifest: SweepManifest) -> SweepManifest:
    """Make all tables and the default plan of the finished units, and return the final manifest.

    Raises:
        ShortVError: a sample was lost, no sample could be used, or the disk is full.
    """
    parts = [folder.read_parquet(name) for name in folder.list(PARTS)]
    errors = _gathered(parts, "errors", {"sample_id": manifest.calibration_ids})
    used = _without(_gathered(parts, "samples", {"sample_id": manifest.calibration_ids}), errors)
    order = {
        "sample_id": manifest.calibration_ids,
        "mode": manifest.modes,
        "layer": range(manifest.num_layers),
    }
    records = _without(_gathered(parts, "lc_samples", order), errors)
    _check_complete(manifest, used, errors, records)
    folder.delete("lc_samples")
    for part, start in enumerate(range(0, max(1, len(records)), ROWS_PER_PART)):
        folder.write_table(f"lc_samples/part-{part:05d}", records.slice(start, ROWS_PER_PART))
    folder.write_table("samples", used)
    folder.write_table("errors", errors)
    if not len(used):
        first = errors.slice(0, 1).to_pylist()[0]
        raise ShortVError(
            f"none of the {len(errors)} samples could be used; the first, {first['sample_id']!r}, failed at "
            f"{first['stage']}: {first['message']} (all stand in {folder.shown}/errors.parquet)"
        )
    floors = [floor for part in parts for floor in part["noise_floor"].to_pylist() if floor is not None]
    manifest = manifest.updated(
        state=State.PARTIAL if len(errors) else State.COMPLETE,
        noise_floor=max(floors, default=None),
        counts={
            "samples": len(used) + len(errors),
            "used": len(used),
            "errors": len(errors),
            "without_image": pc.sum(pc.equal(used["n_visual"], 0)).as_py(),
        },
    )
    rows, stability = _statistics(manifest, used, records)
    folder.write_table("lc_layers", rows)
    default = None
    if rows:
        # The plan that jobs/plan.py makes without options, for freeze-visual or the first mode that was measured.
        modes = [row.mode for row in rows]
        mode = Mode.FREEZE_VISUAL if Mode.FREEZE_VISUAL in modes else modes[0]
        result = sweep_result(folder, manifest, mode)
        plan = make_plan(result, Request(), choose_layers(result.evidence, Request()), None)
        folder.write_bytes(f"plans/{plan.name}.json", plan.to_json().encode())
        default = plan.name
    return manifest.updated(stability=stability, details={**manifest.details, "default_plan": default})


def _gathered(parts: Sequence[pa.Table], table: str, order: Mapping[str, Sequence[object]]) -> pa.Table:
    """Return the rows of a table from all parts, once each, in the order that the values of its key columns have."""
    schema = schema_of(table)
    found = [pa.Table.from_struct_array(pc.list_flatten(part[table])).select(schema.names) for part in parts]
    rows = pa.concat_tables(found).cast(schema)
    places = pa.table({name: pc.index_in(rows[name], pa.array(list(values))) for name, values in order.items()})
    numbered = places.append_column("row", pa.array(range(len(rows)), pa.int64()))
    # A batch lists its samples in each of its units.
    once = numbered.group_by(list(order), use_threads=False).aggregate([("row", "min")])
    return rows.take(once.sort_by([(name, "ascending") for name in order])["row_min"])


def _without(rows: pa.Table, errors: pa.Table) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["sample_id"], errors["sample_id"].combine_chunks())))


def _check_complete(manifest: SweepManifest, used: pa.Table, errors: pa.Table, records: pa.Table) -> None:
    counts = {row["values"]: row["counts"] for row in pc.value_counts(records["sample_id"]).to_pylist()}
    wanted = len(manifest.modes) * manifest.num_layers
    whole = {name for name in used["sample_id"].to_pylist() if counts.get(name) == wanted}
    lost = sorted(set(manifest.calibration_ids) - whole - set(errors["sample_id"].to_pylist()))
    if lost:
        raise ShortVError(
            f"sample {lost[0]!r} was lost: neither an error nor measured in every mode and layer "
            f"({counts.get(lost[0], 0)} of {wanted} measurements); run the same command again, and report this as a bug"
        )


def _statistics(
    manifest: SweepManifest, used: pa.Table, records: pa.Table
) -> tuple[list[LayerRecord], dict[str, dict[str, float]]]:
    """Return the rows of lc_layers and the stability of the choice, for every mode that a sample counts for."""
    rows: list[LayerRecord] = []
    stability: dict[str, dict[str, float]] = {}
    how: dict[str, Any] = {"noise_floor": manifest.noise_floor or 0.0, "seed": manifest.seed}
    for mode in manifest.modes:
        kl_SL = _matrix(records, _counted(used, mode), mode, manifest.kl_direction, manifest.num_layers)
        if len(kl_SL):
            rows += layer_statistics(kl_SL, mode=mode, kl_direction=manifest.kl_direction, **how)
            same = set_stability(kl_SL, default_count(manifest.num_layers), **how)
            stability[str(mode)] = {f"{share:g}": value for share, value in same.items()}
    return rows, stability


def _counted(samples: pa.Table, mode: Mode) -> pa.Table:
    """The samples that count for a mode: those with visual tokens for a visual mode."""
    return samples.filter(pc.greater(samples["n_visual"], 0)) if mode in VISUAL_MODES else samples


def _matrix(records: pa.Table, samples: pa.Table, mode: Mode, direction: KlDirection, num_layers: int) -> Matrix:
    counted = pc.is_in(records["sample_id"], samples["sample_id"].combine_chunks())
    rows = records.filter(pc.and_(pc.equal(records["mode"], mode.value), counted))
    return kl_matrix(
        rows["sample_id"].to_pylist(), rows["layer"].to_numpy(), rows[direction.column].to_numpy(), num_layers
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """A finished sweep folder, read for one mode and one KL direction."""

    manifest: SweepManifest
    direction: KlDirection
    kl_SL: Matrix
    evidence: Evidence

    @property
    def noise_floor(self) -> float:
        """The run's noise floor in nats; without one only equal layers tie."""
        return self.manifest.noise_floor or 0.0


def read_sweep(folder: Folder, mode: Mode, direction: KlDirection | None) -> SweepResult:
    """Read what a sweep folder says about `mode`; raises ShortVError when it cannot carry a plan.

    `direction` is the sweep's own unless given. Only samples with visual tokens count for visual modes.
    """
    manifest = SweepManifest.load(folder)
    if manifest.state is State.RUNNING:
        raise Refused(f"the sweep in {folder.shown} is not finished; run its command again to complete it")
    return sweep_result(folder, manifest, mode, direction)


def sweep_result(
    folder: Folder, manifest: SweepManifest, mode: Mode, direction: KlDirection | None = None
) -> SweepResult:
    """As `read_sweep`, from the tables of a folder whose final manifest is given."""
    direction = direction or manifest.kl_direction
    samples = _counted(folder.read_table("samples"), mode)
    rows = folder.read_table("lc_layers")
    rows = rows.filter(pc.equal(rows["mode"], mode.value)).sort_by("rank")
    if not len(samples) or not len(rows):
        raise Refused(
            f"the sweep in {folder.shown} has no result for {mode} (it measured {', '.join(manifest.modes)}); "
            f"choose one that it has, or sweep {mode} with samples that count for it"
        )
    kl_SL = _matrix(folder.read_tables("lc_samples"), samples, mode, direction, manifest.num_layers)
    if len(kl_SL) != len(samples):
        raise Refused(
            f"{folder.shown} lists {len(samples)} samples for {mode} but measured {len(kl_SL)}; run the sweep again"
        )
    ranking, means = rows["layer"].to_pylist(), rows["mean"].to_pylist()
    if direction is not manifest.kl_direction:
        ranking = rank_layers(kl_SL, manifest.noise_floor or 0.0)
        means = kl_SL.mean(axis=0)[list(ranking)].tolist()
    evidence = Evidence(
        architecture=_architecture(manifest, folder),
        mode=mode,
        ranking=tuple(ranking),
        mean_lc=dict(zip(ranking, means, strict=True)),
        t=pc.mean(samples["n_text"]).as_py(),
        v=pc.mean(samples["n_visual"]).as_py(),
    )
    return SweepResult(manifest=manifest, direction=direction, kl_SL=kl_SL, evidence=evidence)


def _architecture(manifest: SweepManifest, folder: Folder) -> Architecture:
    try:
        architecture = Architecture(**manifest.details["architecture"])
    except (KeyError, TypeError):
        architecture = None
    if architecture is None or architecture.config_digest != manifest.config_digest:
        raise Refused(
            f"the manifest of {folder.shown} does not hold the sizes of {manifest.model}, or others than it "
            "was measured with; run the sweep again in a new folder"
        )
    return architecture


def make_plan(result: SweepResult, request: Request, choice: Choice, name: str | None) -> Plan:
    """Return the plan of the chosen layers, with a telling name unless one is given.

    Its FLOPs ratio is that at the mean token counts of the sweep's samples.
    """
    evidence, manifest = result.evidence, result.manifest
    source = manifest.source(len(result.kl_SL), result.direction)
    source["order"] = request.control.value if request.control else "lc"
    telling = [evidence.mode.value, str(len(choice.layers))]
    if request.control is Control.RANDOM:
        source["order_seed"] = request.control_seed
        telling.append(f"random{request.control_seed}")
    elif request.control:
        telling.append(request.control.value)
    elif result.direction != manifest.kl_direction:
        telling.append(result.direction.value)
    architecture = evidence.architecture
    modes = modes_of_layers(evidence.mode, choice.layers, architecture.num_layers)
    return Plan(
        name=name or "-".join(telling),
        model=manifest.model,
        revision=manifest.revision,
        config_digest=architecture.config_digest,
        num_layers=architecture.num_layers,
        modes=modes,
        ranking=choice.order,
        source=source,
        flops_ratio=flops_ratio(architecture, modes, evidence.t, evidence.v),
        flops_t=evidence.t,
        flops_v=evidence.v,
    )
