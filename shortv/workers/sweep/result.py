"""What a finished sweep folder says about one mode, and the plans made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reports.manifest import State, SweepManifest
from reports.store import Folder
from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.plan import VISUAL_MODES, Mode, Plan
from shortv.records import KlDirection
from shortv.sweep.planning import Choice, Control, Evidence, Request, plan_of
from shortv.sweep.ranking import Matrix, kl_matrix, rank_layers


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
    own_direction = KlDirection(manifest.kl_direction)
    direction = direction or own_direction
    samples = folder.read_table("samples")
    if mode in VISUAL_MODES:
        samples = samples.filter(pc.greater(samples["n_visual"], 0))
    rows = folder.read_table("lc_layers")
    rows = rows.filter(pc.equal(rows["mode"], mode.value)).sort_by("rank")
    if not len(samples) or not len(rows):
        raise Refused(
            f"the sweep in {folder.shown} has no result for {mode} (it measured {', '.join(manifest.modes)}); "
            f"choose one that it has, or sweep {mode} with samples that count for it"
        )
    kl_SL = _measurements(folder, mode, direction, samples, manifest.num_layers)
    ranking, means = rows["layer"].to_pylist(), rows["mean"].to_pylist()
    if direction is not own_direction:
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


def _measurements(folder: Folder, mode: Mode, direction: KlDirection, samples: pa.Table, num_layers: int) -> Matrix:
    table = folder.read_tables("lc_samples")
    counted = pc.is_in(table["sample_id"], samples["sample_id"].combine_chunks())
    table = table.filter(pc.and_(pc.equal(table["mode"], mode.value), counted))
    kl_SL = kl_matrix(
        table["sample_id"].to_pylist(), table["layer"].to_numpy(), table[direction.column].to_numpy(), num_layers
    )
    if len(kl_SL) != len(samples):
        raise Refused(
            f"{folder.shown} lists {len(samples)} samples for {mode} but measured {len(kl_SL)}; run the sweep again"
        )
    return kl_SL


def _architecture(manifest: SweepManifest, folder: Folder) -> Architecture:
    sizes = manifest.details.get("architecture")
    try:
        architecture = Architecture(**sizes) if isinstance(sizes, dict) else None
    except TypeError:
        architecture = None
    if architecture is None or architecture.config_digest != manifest.config_digest:
        raise Refused(
            f"the manifest of {folder.shown} does not hold the sizes of {manifest.model}, or others than it "
            "was measured with; run the sweep again in a new folder"
        )
    return architecture


def make_plan(result: SweepResult, request: Request, choice: Choice, name: str | None) -> Plan:
    """Return the plan of the chosen layers, with a telling name unless one is given."""
    return plan_of(
        result.evidence,
        choice,
        name=name or _telling_name(result, request, len(choice.layers)),
        model=result.manifest.model,
        revision=result.manifest.revision,
        source=_source(result, request),
    )


def _telling_name(result: SweepResult, request: Request, count: int) -> str:
    parts = [result.evidence.mode.value, str(count)]
    if request.control is Control.RANDOM:
        parts.append(f"random{request.control_seed}")
    elif request.control:
        parts.append(request.control.value)
    elif result.direction != result.manifest.kl_direction:
        parts.append(result.direction.value)
    return "-".join(parts)


def _source(result: SweepResult, request: Request) -> dict[str, Any]:
    source = result.manifest.source(len(result.kl_SL), result.direction)
    source["order"] = request.control.value if request.control else "lc"
    return source | ({"order_seed": request.control_seed} if request.control is Control.RANDOM else {})
