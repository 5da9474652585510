"""The end of a sweep: tables, default plan and manifest, in an order in which a killed run never looks complete."""

from __future__ import annotations

from collections.abc import Sequence

from reports.manifest import Manifest, State
from reports.store import Folder
from shortv.architecture import Architecture
from shortv.errors import ShortVError
from shortv.plan import VISUAL_MODES, Mode, Plan
from shortv.records import KlDirection, LayerRecord
from shortv.sample import Sample
from shortv.sweep.planning import Evidence, Request, choose_layers, default_count, plan_of
from shortv.sweep.ranking import kl_matrix, set_stability
from shortv.workers.assemble import Tables, assemble, layer_records
from shortv.workers.journal import Journal


def finish(
    folder: Folder,
    journal: Journal,
    manifest: Manifest,
    *,
    batches: Sequence[Sequence[Sample]],
    modes: Sequence[Mode],
    architecture: Architecture,
) -> Manifest:
    """Write all tables and the default plan, and return the final manifest.

    Raises:
        ShortVError: a sample was lost, no sample could be used, or the disk is full.
    """
    direction = KlDirection(manifest.kl_direction)
    layers = architecture.num_layers
    tables = assemble(folder, journal, batches, modes=modes, num_layers=layers, kl_direction=direction)
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
    manifest: Manifest, tables: Tables, rows: Sequence[LayerRecord], architecture: Architecture
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


def _stability(manifest: Manifest, tables: Tables, num_layers: int) -> dict[str, dict[str, float]]:
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
