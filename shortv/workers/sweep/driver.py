"""The driver of a sweep: checks the input, starts the workers, keeps what they send, writes every result file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from reports.manifest import State, SweepManifest
from reports.store import Folder
from reports.tables import print_layers
from shortv import terminal
from shortv.architecture import Architecture
from shortv.errors import ShortVError, one_line
from shortv.plan import Plan
from shortv.sample import Sample
from shortv.terminal import say
from shortv.workers.cluster import connected, free_nodes
from shortv.workers.models import remote_model
from shortv.workers.placement import Placement, place
from shortv.workers.progress import SampleProgress
from shortv.workers.run import (
    check_output,
    complete,
    exit_status,
    new_manifest,
    open_run,
    stop_on_signal,
    write_report,
)
from shortv.workers.samples import calibration_digest, resolve_calibration
from shortv.workers.sweep.attempts import start_attempts
from shortv.workers.sweep.measure import SweepEngine, UnitResult
from shortv.workers.sweep.pipeline import stream_results
from shortv.workers.sweep.spec import SweepSpec
from shortv.workers.sweep.tables import Parts, finish
from shortv.workers.sweep.units import Unit, plan_units
from shortv.workers.sweep.worker import WorkerSetup


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A sweep whose input is checked and whose folder is open."""

    spec: SweepSpec
    engine: SweepEngine
    folder: Folder
    batches: tuple[tuple[Sample, ...], ...]
    architecture: Architecture
    manifest: SweepManifest


def run_sweep(spec: SweepSpec, *, engine: SweepEngine | None = None, console: Console | None = None) -> int:
    """Run, continue or repeat a sweep, print its table, and return the exit status (0, or 3 with failed samples).

    Raises:
        Refused: the input cannot be right; nothing was started.
        ShortVError: the work failed or was stopped; the same command continues it.
    """
    console = console or terminal.console()
    with stop_on_signal():
        prepared = prepare(spec, engine or SweepEngine())
        running = prepared.manifest.state is State.RUNNING
        manifest = complete(
            prepared.folder, prepared.manifest, lambda latest: _measure(replace(prepared, manifest=latest), console)
        )
        # The tables hold everything now. A run that finished earlier may have been killed before this.
        Parts(prepared.folder).remove()
        status = _report(replace(prepared, manifest=manifest), console)
        write_report(prepared.folder, console, anew=running)
        return status


def prepare(spec: SweepSpec, engine: SweepEngine) -> Prepared:
    """Check everything that can be checked before work starts. Raises Refused."""
    check_output(spec.output_path)
    folder = Folder(spec.output_path)
    samples = resolve_calibration(spec.calibration, limit=spec.limit, seed=spec.seed, include_path=spec.include_path)
    spec = spec.model_copy(update={"revision": engine.pin(spec.model_spec()).revision})
    architecture = engine.describe(spec.model_spec())
    wanted = _manifest(spec, samples, architecture)
    size = spec.batch_size
    return Prepared(
        spec=spec,
        engine=engine,
        folder=folder,
        batches=tuple(tuple(samples[start : start + size]) for start in range(0, len(samples), size)),
        architecture=architecture,
        manifest=open_run(folder, wanted),
    )


def _manifest(spec: SweepSpec, samples: Sequence[Sample], architecture: Architecture) -> SweepManifest:
    digest = calibration_digest(samples)
    return new_manifest(
        SweepManifest,
        {**spec.arguments(), "calibration-digest": digest},
        spec.model_spec(),
        architecture,
        modes=spec.modes,
        kl_direction=spec.kl_direction,
        calibration_ids=tuple(sample.sample_id for sample in samples),
        calibration_digest=digest,
        seed=spec.seed,
        details={"architecture": asdict(architecture)},
    )


def _measure(prepared: Prepared, console: Console) -> SweepManifest:
    """Measure what is missing and write the tables; returns the final manifest."""
    parts = Parts(prepared.folder)
    details: dict[str, Any] = {}
    if _units(prepared, parts, workers=1):
        with tempfile.TemporaryDirectory(prefix="shortv-sweep-") as scratch:
            details = run_units(prepared, parts, Path(scratch), console)
    manifest = prepared.manifest
    return finish(
        prepared.folder,
        parts,
        manifest.updated(details={**manifest.details, **details}),
        batches=prepared.batches,
        architecture=prepared.architecture,
    )


def _units(prepared: Prepared, parts: Parts, *, workers: int) -> list[Unit]:
    return plan_units(
        n_batches=len(prepared.batches),
        num_layers=prepared.architecture.num_layers,
        modes=prepared.spec.modes,
        workers=workers,
        finished=parts.finished(),
        layers_per_unit=prepared.spec.layers_per_unit,
    )


def run_units(prepared: Prepared, parts: Parts, scratch: Path, console: Console) -> dict[str, Any]:
    """Measure on Ray every unit that has no part; returns what the manifest should say about the run.

    Raises:
        Refused: the cluster cannot hold a worker.
        ShortVError: the model cannot be loaded, Ray failed, the disk is full, or the run was stopped.
    """
    spec = prepared.spec
    # Ray's own SIGTERM handler, set when it connects, ends the process with a traceback.
    with connected(), stop_on_signal():
        nodes = free_nodes()
        placement = place(nodes, workers=spec.workers, gpus=spec.gpus_per_worker, device=spec.device)
        if placement.note:
            say(console, placement.note)
        units = _units(prepared, parts, workers=placement.high)
        spare = sum(int(node.cpus) for node in nodes) - placement.low * placement.cpus
        setup = _setup(prepared, placement, scratch)
        try:
            with closing(stream_results(units, prepared.batches, setup, placement, spare_cpus=spare)) as results:
                _keep(prepared, parts, units, results, console)
        except ray.exceptions.RayError as error:
            raise ShortVError(
                f"the work on Ray failed: {one_line(error)}; what is finished is kept, and the same command continues"
            ) from error
    return {"device": placement.device, "workers": placement.high}


def _setup(prepared: Prepared, placement: Placement, scratch: Path) -> WorkerSetup:
    return WorkerSetup(
        engine=prepared.engine,
        model=remote_model(prepared.engine, prepared.spec.model_spec()),
        device=placement.device,
        threads=placement.threads,
        modes=prepared.spec.modes,
        stack=prepared.spec.stack,
        attempts=start_attempts(scratch / "attempts.json"),
    )


def _keep(prepared: Prepared, parts: Parts, units: Sequence[Unit], results: Any, console: Console) -> None:
    """Commit each result as it arrives, and check that each unit did."""
    layers = prepared.architecture.num_layers

    def samples_in(unit: Unit) -> float:
        return len(prepared.batches[unit.batch]) * len(unit.layers) / layers

    waiting = {unit.unit_id: unit for unit in units}
    total = sum(len(batch) for batch in prepared.batches)
    with SampleProgress(total=total, done=total - sum(map(samples_in, units)), console=console) as progress:
        for table in results:
            result = UnitResult.from_table(table)
            if result.fatal is not None:
                raise ShortVError(result.fatal)
            unit = waiting.pop(result.unit_id, None)
            # A unit that ran twice, around the death of a node, counts once.
            if unit is not None:
                parts.save(unit, table)
                progress.advance(samples_in(unit), len(result.measured.errors))
    if waiting:
        raise ShortVError(
            f"Ray ended without the results of {len(waiting)} of {len(units)} units; run the same command to continue"
        )


def _report(prepared: Prepared, console: Console) -> int:
    """Print the table and where everything is; returns the exit status."""
    manifest, folder = prepared.manifest, prepared.folder
    name = manifest.details.get("default_plan")
    plan = None
    if name and folder.exists(f"plans/{name}.json"):
        plan = Plan.from_json(folder.read_bytes(f"plans/{name}.json"))
    print_layers(
        folder.read_table("lc_layers").to_pylist(),
        console,
        noise_floor=manifest.noise_floor,
        stability=manifest.stability,
        plan=plan,
    )
    counts = manifest.counts
    say(console, f"{counts['used']} of {counts['samples']} samples used, results in {folder.shown}")
    if counts["errors"]:
        say(console, f"{counts['errors']} samples could not be used: {folder.shown}/errors.parquet")
    return exit_status(counts["errors"], counts["samples"], prepared.spec.fail_on_error)
