"""The driver of a sweep: checks, starts the workers, keeps what they send, writes every result file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from reports.manifest import Manifest, State, arguments_digest, utc_now, versions
from reports.store import Folder
from reports.tables import print_layers
from shortv.architecture import Architecture
from shortv.plan import Plan
from shortv.sample import Sample
from shortv.workers.calibration import calibration_digest, resolve_calibration
from shortv.workers.driver_lock import one_driver
from shortv.workers.engine import Engine, ModelEngine
from shortv.workers.finish import finish
from shortv.workers.folder import NOT_DECIDING, check_output, open_folder
from shortv.workers.journal import Journal
from shortv.workers.page import write_report
from shortv.workers.request import SweepRequest
from shortv.workers.shipping import folder_digest
from shortv.workers.stopping import stop_on_signal

PARTIAL_STATUS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A sweep whose input is checked and whose folder is open."""

    request: SweepRequest
    engine: Engine
    folder: Folder
    batches: tuple[tuple[Sample, ...], ...]
    architecture: Architecture
    model_folder: Path | None
    model_digest: str | None
    manifest: Manifest

    @property
    def n_samples(self) -> int:
        """Samples of all batches."""
        return sum(len(batch) for batch in self.batches)


def run_sweep(request: SweepRequest, *, engine: Engine | None = None, console: Console | None = None) -> int:
    """Run, continue or repeat a sweep, print its table, and return the exit status (0, or 3 with failed samples).

    Raises:
        Refused: the input cannot be right; nothing was started.
        ShortVError: the work failed or was stopped; the same command continues it.
    """
    console = console or Console()
    with stop_on_signal():
        prepared = prepare(request, engine or ModelEngine())
        running = prepared.manifest.state is State.RUNNING
        if running:
            with one_driver(prepared.folder):
                prepared = _measured(prepared, console)
        else:
            # The run that finished may have been killed before this.
            Journal(prepared.folder).remove()
        status = _report(prepared, console)
        write_report(prepared.folder, console, anew=running)
        return status


def prepare(request: SweepRequest, engine: Engine) -> Prepared:
    """Check everything that can be checked before work starts. Raises Refused."""
    check_output(request.output_path)
    request.check_numbers()
    folder = Folder(request.output_path)
    samples = resolve_calibration(
        request.calibration, limit=request.limit, seed=request.seed, include_path=request.include_path
    )
    request = replace(request, model=engine.pin(request.model))
    architecture = engine.describe(request.model)
    path = Path(request.model.name)
    model_folder = path.resolve() if path.is_dir() else None
    digest = folder_digest(model_folder) if model_folder else None
    wanted = _manifest(request, samples, architecture, digest)
    found = open_folder(folder, wanted)
    size = request.batch_size
    return Prepared(
        request=request,
        engine=engine,
        folder=folder,
        batches=tuple(tuple(samples[start : start + size]) for start in range(0, len(samples), size)),
        architecture=architecture,
        model_folder=model_folder,
        model_digest=digest,
        manifest=found or wanted,
    )


def exit_status(manifest: Manifest, fail_on_error: float) -> int:
    """0 when at most the tolerated share of samples failed, else 3."""
    share = manifest.counts.get("errors", 0) / max(manifest.counts.get("samples", 0), 1)
    return 0 if share <= fail_on_error else PARTIAL_STATUS


def _manifest(
    request: SweepRequest, samples: Sequence[Sample], architecture: Architecture, model_digest: str | None
) -> Manifest:
    samples_digest = calibration_digest(samples)
    arguments = {
        **request.arguments(),
        "model-digest": model_digest,
        "config-digest": architecture.config_digest,
        "calibration-digest": samples_digest,
    }
    return Manifest(
        state=State.RUNNING,
        arguments=arguments,
        arguments_digest=arguments_digest(arguments, ignore=NOT_DECIDING),
        versions=versions(),
        model=request.model.name,
        revision=request.model.revision,
        config_digest=architecture.config_digest,
        num_layers=architecture.num_layers,
        modes=tuple(str(mode) for mode in request.modes),
        kl_direction=str(request.kl_direction),
        calibration_ids=tuple(sample.sample_id for sample in samples),
        calibration_digest=samples_digest,
        seed=request.seed,
        started=utc_now(),
        details={"architecture": asdict(architecture)},
    )


def _measured(prepared: Prepared, console: Console) -> Prepared:
    """Start an attempt on the folder, which is this driver's alone, and end it with the final manifest."""
    # Another driver may have been at work until the lock was had.
    latest = open_folder(prepared.folder, prepared.manifest) or prepared.manifest
    if latest.state is State.RUNNING:
        latest = replace(latest, attempts=latest.attempts + 1)
        latest.save(prepared.folder)
        latest = _measure(replace(prepared, manifest=latest), console)
    return replace(prepared, manifest=latest)


def _measure(prepared: Prepared, console: Console) -> Manifest:
    """Measure what is missing and write the tables; returns the final manifest."""
    from shortv.workers.running import run_units

    started = time.monotonic()
    journal = Journal(prepared.folder)
    manifest = prepared.manifest
    with tempfile.TemporaryDirectory(prefix="shortv-sweep-") as scratch:
        details = run_units(prepared, journal, Path(scratch), console)
    return finish(
        prepared.folder,
        journal,
        replace(manifest, details={**manifest.details, **details}),
        batches=prepared.batches,
        modes=prepared.request.modes,
        architecture=prepared.architecture,
        wall_seconds=time.monotonic() - started,
    )


def _report(prepared: Prepared, console: Console) -> int:
    """Print the table and where everything is; returns the exit status."""
    manifest, folder = prepared.manifest, prepared.folder
    name = manifest.details.get("default_plan")
    plan = None
    if name and folder.exists(f"plans/{name}.json"):
        plan = asdict(Plan.from_json(folder.read_bytes(f"plans/{name}.json").decode()))
    print_layers(
        folder.read_table("lc_layers").to_pylist(),
        noise_floor=manifest.noise_floor,
        stability=manifest.stability,
        plan=plan,
        console=console,
    )
    counts = manifest.counts
    console.print(f"{counts['used']} of {counts['samples']} samples used, results in {folder.shown}", highlight=False)
    if counts["errors"]:
        console.print(f"{counts['errors']} samples could not be used: {folder.shown}/errors.parquet", highlight=False)
    return exit_status(manifest, prepared.request.fail_on_error)
