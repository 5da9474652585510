"""The driver of a sweep: checks, starts the workers, keeps what they send, writes every result file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from reports.manifest import Manifest, State, arguments_digest, utc_now, versions
from reports.store import Folder
from reports.tables import print_layers
from shortv import terminal
from shortv.architecture import Architecture
from shortv.plan import Plan
from shortv.sample import Sample
from shortv.terminal import say
from shortv.workers.engine import SweepEngine
from shortv.workers.finish import finish
from shortv.workers.journal import Journal
from shortv.workers.models import model_folder
from shortv.workers.request import SweepRequest
from shortv.workers.run import (
    NOT_DECIDING,
    check_output,
    complete,
    exit_status,
    open_run,
    stop_on_signal,
    submission_id,
    write_report,
)
from shortv.workers.samples import calibration_digest, resolve_calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A sweep whose input is checked and whose folder is open."""

    request: SweepRequest
    engine: SweepEngine
    folder: Folder
    batches: tuple[tuple[Sample, ...], ...]
    architecture: Architecture
    manifest: Manifest

    @property
    def n_samples(self) -> int:
        """Samples of all batches."""
        return sum(len(batch) for batch in self.batches)


def run_sweep(request: SweepRequest, *, engine: SweepEngine | None = None, console: Console | None = None) -> int:
    """Run, continue or repeat a sweep, print its table, and return the exit status (0, or 3 with failed samples).

    Raises:
        Refused: the input cannot be right; nothing was started.
        ShortVError: the work failed or was stopped; the same command continues it.
    """
    console = console or terminal.console()
    with stop_on_signal():
        prepared = prepare(request, engine or SweepEngine())
        running = prepared.manifest.state is State.RUNNING
        manifest = complete(
            prepared.folder, prepared.manifest, lambda latest: _measure(replace(prepared, manifest=latest), console)
        )
        # The tables hold everything now. A run that finished earlier may have been killed before this.
        Journal(prepared.folder).remove()
        status = _report(replace(prepared, manifest=manifest), console)
        write_report(prepared.folder, console, anew=running)
        return status


def sweep_submission_id(request: SweepRequest) -> str:
    """Return the id for the next attempt of a sweep. Raises Refused when its folder holds something else."""
    request.check_numbers()
    return submission_id("lc", arguments_digest(request.arguments()), request.output_path, Manifest)


def prepare(request: SweepRequest, engine: SweepEngine) -> Prepared:
    """Check everything that can be checked before work starts. Raises Refused."""
    check_output(request.output_path)
    request.check_numbers()
    folder = Folder(request.output_path)
    samples = resolve_calibration(
        request.calibration, limit=request.limit, seed=request.seed, include_path=request.include_path
    )
    request = replace(request, model=engine.pin(request.model))
    architecture = engine.describe(request.model)
    found = model_folder(request.model.name)
    wanted = _manifest(request, samples, architecture, found[1] if found else None)
    size = request.batch_size
    return Prepared(
        request=request,
        engine=engine,
        folder=folder,
        batches=tuple(tuple(samples[start : start + size]) for start in range(0, len(samples), size)),
        architecture=architecture,
        manifest=open_run(folder, wanted),
    )


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
        modes=request.modes,
        kl_direction=request.kl_direction,
        calibration_ids=tuple(sample.sample_id for sample in samples),
        calibration_digest=samples_digest,
        seed=request.seed,
        started=utc_now(),
        details={"architecture": asdict(architecture)},
    )


def _measure(prepared: Prepared, console: Console) -> Manifest:
    """Measure what is missing and write the tables; returns the final manifest."""
    from shortv.workers.running import run_units

    journal = Journal(prepared.folder)
    manifest = prepared.manifest
    with tempfile.TemporaryDirectory(prefix="shortv-sweep-") as scratch:
        details = run_units(prepared, journal, Path(scratch), console)
    return finish(
        prepared.folder,
        journal,
        manifest.updated(details={**manifest.details, **details}),
        batches=prepared.batches,
        modes=prepared.request.modes,
        architecture=prepared.architecture,
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
    say(console, f"{counts['used']} of {counts['samples']} samples used, results in {folder.shown}")
    if counts["errors"]:
        say(console, f"{counts['errors']} samples could not be used: {folder.shown}/errors.parquet")
    return exit_status(counts["errors"], counts["samples"], prepared.request.fail_on_error)
