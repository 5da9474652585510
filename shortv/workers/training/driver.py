"""The driver of a training: checks the input, starts the workers, makes the result files from the last checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
from rich.console import Console

from reports.locations import locate
from reports.manifest import State, TrainingManifest
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.learned.system import System
from shortv.spec import ModelSpec, Spec, WorkerRange
from shortv.terminal import say
from shortv.tiny.dataset import to_table, training_samples
from shortv.tiny.questions import LEARNED_KINDS
from shortv.workers.models import ModelLoader, remote_model
from shortv.workers.placement import Placement, place
from shortv.workers.progress import SampleProgress
from shortv.workers.run import check_output, complete, exit_status, new_manifest, open_run, stop_on_signal
from shortv.workers.training.checkpoint import CHECKPOINTS, RESULT, Checkpoint, latest_checkpoint, remove_before
from shortv.workers.training.data import SHARDS, Contents, DataSet, Order, sources_of, table_source
from shortv.workers.training.result import publish_result
from shortv.workers.training.spec import TrainSpec, check_trainable


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A training whose input is checked and whose folder is open."""

    spec: TrainSpec
    recipe: Any
    """The system's recipe."""
    system: System
    loader: ModelLoader
    model: ModelSpec
    """The base model at the commit that was found."""
    folder: Folder
    generated: pa.Table | None
    """The samples, where they are generated."""
    data: DataSet
    contents: Contents
    order: Order
    manifest: TrainingManifest

    @property
    def output(self) -> str:
        """The run folder as any process can open it."""
        local = self.folder.local_path
        return self.spec.output_path if local is None else str(local)

    def latest(self) -> Checkpoint | None:
        """Find the last whole checkpoint."""
        return latest_checkpoint(self.output, self.manifest.arguments_digest)


def run_training(
    spec: TrainSpec,
    recipe: Spec,
    system: System,
    *,
    loader: ModelLoader | None = None,
    console: Console | None = None,
) -> int:
    """Run, continue or repeat a training, say where its parts are, and return the exit status (0, or 3).

    Raises:
        Refused: the input cannot be right; nothing was started.
        ShortVError: the work failed or was stopped; the same command continues it.
    """
    console = console or Console()
    with stop_on_signal():
        prepared = prepare(spec, recipe, system, loader or ModelLoader())
        folder = prepared.folder
        manifest = complete(
            folder, prepared.manifest, lambda begun: _finish(replace(prepared, manifest=begun), console)
        )
        if prepared.manifest.state is State.RUNNING:
            # Nothing needs them any more, and they may be many times larger than the result.
            folder.delete(CHECKPOINTS)
            folder.delete(SHARDS)
        return _report(spec, folder, manifest, console)


def prepare(spec: TrainSpec, recipe: Any, system: System, loader: ModelLoader) -> Prepared:
    """Check everything that can be checked before work starts, in bounded memory.

    Raises:
        Refused: the model cannot have such parts, the data set teaches this system nothing, or the folder is in use.
    """
    check_output(spec.output_path)
    model = loader.pin(spec.base_model())
    architecture = loader.describe(model)
    check_trainable(system, model, recipe, spec.threshold)
    generated, sources = None, sources_of(spec.data, limit=spec.limit, seed=recipe.seed, include_path=spec.include_path)
    if not spec.data:
        kinds = spec.kinds or system.questions or LEARNED_KINDS
        generated = to_table(training_samples(kinds, spec.samples, seed=recipe.seed))
        sources = [table_source("the generated samples", generated)]
    data = DataSet(sources=sources, needs_images=system.needs_images)
    contents = data.scan()
    _check_contents(contents, needs_answers=system.needs_answers(recipe))
    order = Order(samples=contents.samples - len(contents.unusable), batch_size=recipe.batch_size, seed=recipe.seed)
    folder = Folder(spec.output_path)
    wanted = new_manifest(
        TrainingManifest,
        {**spec.arguments(model, system, recipe), "data-digest": contents.digest},
        model,
        architecture,
        parts=str(system.kind),
        data_digest=contents.digest,
        counts={"steps": recipe.steps, "samples": contents.samples},
    )
    return Prepared(
        spec=spec,
        recipe=recipe,
        system=system,
        loader=loader,
        model=model,
        folder=folder,
        generated=generated,
        data=data,
        contents=contents,
        order=order,
        manifest=open_run(folder, wanted),
    )


def _check_contents(contents: Contents, *, needs_answers: bool) -> None:
    without = contents.unanswered
    if needs_answers and without:
        raise Refused(
            f"{len(without)} of {contents.samples} training samples have no answer, the first is {without[0]!r}; "
            "this training learns from answers: add a column answer, or leave those rows out"
        )
    if contents.samples and len(contents.unusable) == contents.samples:
        raise Refused(f"none of {contents.samples} training samples has an image, and this training is about images")


def _finish(prepared: Prepared, console: Console) -> TrainingManifest:
    """Train to the end and write the result; returns the final manifest."""
    folder, found = prepared.folder, prepared.latest()
    if found is None or found.step < prepared.recipe.steps:
        prepared = _train(prepared, found, console)
        found = prepared.latest()
    if found is None:
        raise ShortVError(f"the last checkpoint of {folder.shown} is gone; run the same command to train again")
    errors = _write_tables(prepared, found)
    publish_result(folder, locate(prepared.output).filesystem, f"{found.path}/{RESULT}")
    manifest, seconds = prepared.manifest, sum(row["seconds"] for row in found.rows)
    return manifest.updated(
        state=State.PARTIAL if errors else State.COMPLETE,
        counts={**manifest.counts, "errors": errors},
        details={**manifest.details, "loss": found.rows[-1]["loss"], "train_seconds": seconds},
    )


def _train(prepared: Prepared, found: Checkpoint | None, console: Console) -> Prepared:
    """Train from a checkpoint to the last one; returns the same with a manifest that says where it ran.

    Raises:
        Refused: the cluster cannot hold a worker, or the workers asked for cannot share a batch.
        ShortVError: the training failed, Ray failed, the disk is full, or the run was stopped.
    """
    from shortv.workers.cluster import connected, free_nodes
    from shortv.workers.training.fit import fit
    from shortv.workers.training.worker import WorkerJob

    spec, recipe, folder = prepared.spec, prepared.recipe, prepared.folder
    if prepared.generated is not None and not folder.exists("data.parquet"):
        folder.write_parquet("data", prepared.generated)
    # Ray's own SIGTERM handler, set when it connects, ends the process with a traceback.
    with connected(), stop_on_signal():
        placement = place(free_nodes(), workers=spec.workers, gpus=1, device=spec.device)
        if placement.note:
            say(console, placement.note)
        workers = workers_of(placement, spec.workers, recipe.batch_size)
        details = {**prepared.manifest.details, "device": placement.device, "workers": workers}
        prepared = replace(prepared, manifest=prepared.manifest.updated(details=details))
        prepared.manifest.save(folder)
        prepared.data.write_shards(folder, prepared.contents)
        job = WorkerJob(
            spec=spec,
            system=prepared.system,
            recipe=recipe,
            model=remote_model(prepared.loader, prepared.model),
            order=prepared.order,
            output=prepared.output,
            identity=prepared.manifest.arguments_digest,
            device=placement.device,
            threads=placement.threads,
        )
        size, done = recipe.batch_size, found.step if found else 0
        bar = SampleProgress(
            total=recipe.steps * size, done=done * size, console=console, label=str(prepared.system.kind)
        )
        with bar as progress:
            for event in fit(job, placement, workers=workers):
                row = event.rows[-1] if isinstance(event, Checkpoint) else event
                progress.note(f"loss {row['loss']:.4f}")
                # After a worker's death, steps since the checkpoint are taken again and count once.
                progress.advance(max(0, row["step"] - done) * size, 0)
                done = max(done, row["step"])
                if isinstance(event, Checkpoint):
                    _write_tables(prepared, event)
                    remove_before(folder, event)
    return prepared


def _write_tables(prepared: Prepared, checkpoint: Checkpoint) -> int:
    """Write the tables `training` and `errors` as of a checkpoint; returns the number of unusable samples."""
    errors = [*(asdict(error) for error in prepared.contents.unusable), *checkpoint.errors]
    prepared.folder.write_table("training", checkpoint.rows)
    if errors:
        prepared.folder.write_table("errors", sorted(errors, key=lambda row: row["sample_id"]))
    return len(errors)


def workers_of(placement: Placement, wish: WorkerRange | None, batch_size: int) -> int:
    """How many workers train: of what fits, the most that share a batch evenly.

    Raises:
        Refused: a number was asked for that does not.
    """
    if wish is not None and wish.low == wish.high and batch_size % wish.low:
        raise Refused(
            f"{wish.low} workers cannot share a batch of {batch_size} samples evenly; "
            "give a --batch-size that is a multiple of --workers"
        )
    most = min(placement.high, batch_size)
    return max(count for count in range(1, most + 1) if batch_size % count == 0)


def _report(spec: TrainSpec, folder: Folder, manifest: TrainingManifest, console: Console) -> int:
    counts, details = manifest.counts, manifest.details
    say(
        console,
        f"{manifest.parts} parts after {counts['steps']} steps, loss {details['loss']:.4f}, "
        f"{details['train_seconds']:.0f} s of training: {folder.shown}/parts",
    )
    for name in folder.list("plans"):
        say(console, f"plan {folder.shown}/{name}")
    errors = counts.get("errors", 0)
    if errors:
        say(console, f"{errors} samples could not be used: {folder.shown}/errors.parquet")
    return exit_status(errors, counts["samples"], spec.fail_on_error)
