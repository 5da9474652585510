"""The driver of a sweep: checks the input, starts the workers, keeps what they send, writes every result file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

import pyarrow as pa
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
from shortv.workers.placement import place
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
from shortv.workers.sweep.measure import SweepEngine
from shortv.workers.sweep.pipeline import stream_results
from shortv.workers.sweep.result import PARTS, finish
from shortv.workers.sweep.spec import SweepSpec
from shortv.workers.sweep.units import Unit, plan_units
from shortv.workers.sweep.worker import RemoteAttempts, WorkerSetup


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A sweep whose input is checked and whose folder is open."""

    spec: SweepSpec
    engine: SweepEngine
    folder: Folder
    batches: tuple[tuple[Sample, ...], ...]
    architecture: Architecture
    manifest: SweepManifest

    def units(self, workers: int) -> list[Unit]:
        """Return the units that have no part yet, for so many workers."""
        finished = defaultdict[int, set[int]](set)
        for name in self.folder.list(PARTS):
            unit = Unit.parse(PurePath(name).stem)
            finished[unit.batch].update(unit.layers)
        return plan_units(
            n_batches=len(self.batches),
            num_layers=self.architecture.num_layers,
            modes=self.spec.modes,
            workers=workers,
            finished=finished,
            layers_per_unit=self.spec.layers_per_unit,
        )

    def commit(self, unit_id: str, result: pa.Table) -> None:
        """Write the result of a unit. Raises ShortVError when it cannot be written."""
        self.folder.write_parquet(f"{PARTS}/{unit_id}", result)


def run_sweep(spec: SweepSpec, *, engine: SweepEngine | None = None, console: Console | None = None) -> int:
    """Run, continue or repeat a sweep, print its table, and return the exit status (0, or 3 with failed samples).

    Raises:
        Refused: the input cannot be right; nothing was started.
        ShortVError: the work failed or was stopped; the same command continues it.
    """
    console = console or terminal.console()
    with stop_on_signal():
        prepared = prepare(spec, engine or SweepEngine())
        folder, running = prepared.folder, prepared.manifest.state is State.RUNNING

        def measure(begun: SweepManifest) -> SweepManifest:
            details = run_units(replace(prepared, manifest=begun), console) if prepared.units(workers=1) else {}
            return finish(folder, begun.updated(details={**begun.details, **details}))

        manifest = complete(folder, prepared.manifest, measure)
        # The tables hold everything now. A run that finished earlier may have been killed before this.
        folder.delete(PARTS)
        _print(folder, manifest, console)
        write_report(folder, console, anew=running)
        return exit_status(manifest.counts["errors"], manifest.counts["samples"], spec.fail_on_error)


def prepare(spec: SweepSpec, engine: SweepEngine) -> Prepared:
    """Check everything that can be checked before work starts. Raises Refused."""
    check_output(spec.output_path)
    samples = resolve_calibration(spec.calibration, limit=spec.limit, seed=spec.seed, include_path=spec.include_path)
    digest = calibration_digest(samples)
    model = engine.pin(spec.model_spec())
    spec = spec.model_copy(update={"revision": model.revision})
    architecture = engine.describe(model)
    wanted = new_manifest(
        SweepManifest,
        {**spec.arguments(), "calibration-digest": digest},
        model,
        architecture,
        modes=spec.modes,
        kl_direction=spec.kl_direction,
        calibration_ids=tuple(sample.sample_id for sample in samples),
        calibration_digest=digest,
        seed=spec.seed,
        details={"architecture": asdict(architecture)},
    )
    folder, size = Folder(spec.output_path), spec.batch_size
    return Prepared(
        spec=spec,
        engine=engine,
        folder=folder,
        batches=tuple(tuple(samples[start : start + size]) for start in range(0, len(samples), size)),
        architecture=architecture,
        manifest=open_run(folder, wanted),
    )


def run_units(prepared: Prepared, console: Console) -> dict[str, Any]:
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
        units = prepared.units(placement.high)
        spare = sum(int(node.cpus) for node in nodes) - placement.low * placement.cpus
        setup = WorkerSetup(
            engine=prepared.engine,
            model=remote_model(prepared.engine, spec.model_spec()),
            device=placement.device,
            threads=placement.threads,
            modes=spec.modes,
            stack=spec.stack,
            attempts=RemoteAttempts(),
        )
        try:
            with closing(stream_results(units, prepared.batches, setup, placement, spare_cpus=spare)) as results:
                _commit(prepared, units, results, console)
        except ray.exceptions.RayError as error:
            raise ShortVError(
                f"the work on Ray failed: {one_line(error)}; what is finished is kept, and the same command continues"
            ) from error
    return {"device": placement.device, "workers": placement.high}


def _commit(prepared: Prepared, units: Sequence[Unit], results: Iterable[pa.Table], console: Console) -> None:
    """Commit each result as it arrives, and check that each unit did."""
    total, layers = sum(map(len, prepared.batches)), prepared.architecture.num_layers
    waiting = {unit.unit_id: len(prepared.batches[unit.batch]) * len(unit.layers) / layers for unit in units}
    with SampleProgress(total=total, done=total - sum(waiting.values()), console=console) as progress:
        for table in results:
            (row,) = table.select(["unit_id", "fatal", "errors"]).to_pylist()
            if row["fatal"] is not None:
                raise ShortVError(row["fatal"])
            # A unit that ran twice, around the death of a node, counts once.
            samples = waiting.pop(row["unit_id"], None)
            if samples is not None:
                prepared.commit(row["unit_id"], table)
                progress.advance(samples, len(row["errors"]))
    if waiting:
        raise ShortVError(
            f"Ray ended without the results of {len(waiting)} of {len(units)} units; run the same command to continue"
        )


def _print(folder: Folder, manifest: SweepManifest, console: Console) -> None:
    """Print the table of layers and where everything is."""
    plan, file = None, f"plans/{manifest.details.get('default_plan')}.json"
    if folder.exists(file):
        plan = Plan.from_json(folder.read_bytes(file))
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
