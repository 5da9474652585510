"""What a training is checked for before work starts: its numbers, its samples, its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reports.manifest import State, TrainingManifest, arguments_digest, utc_now, versions
from reports.store import Folder
from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.learned.order import Order
from shortv.learned.system import System
from shortv.records import ErrorRecord
from shortv.sample import Sample
from shortv.tiny.training_data import LEARNED_KINDS, training_table
from shortv.workers.models import ModelLoader
from shortv.workers.run import NOT_DECIDING, check_output, open_run
from shortv.workers.samples import calibration_digest, resolve_calibration
from shortv.workers.shipping import folder_digest
from shortv.workers.training.outline import check_trainable
from shortv.workers.training.request import TrainRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A training whose input is checked and whose folder is open."""

    request: TrainRequest
    system: System
    engine: ModelLoader
    folder: Folder
    samples: tuple[Sample, ...]
    """Those to train on."""
    unusable: tuple[ErrorRecord, ...]
    """What is wrong with the others."""
    generated: Any
    """The table of generated samples, or None."""
    order: Order
    model_folder: Path | None
    model_digest: str | None
    record: TrainingManifest


def prepare(request: TrainRequest, system: System, engine: ModelLoader) -> Prepared:
    """Check everything that can be checked before work starts. Raises Refused."""
    check_output(request.output_path)
    request.check_numbers()
    request = replace(request, model=engine.pin(request.model))
    architecture = engine.describe(request.model)
    check_trainable(system, request)
    samples, generated = _samples(request, system)
    if system.needs_answers(request.recipe):
        _check_answers(samples)
    unusable = _without_images(samples) if system.needs_images else {}
    usable = tuple(sample for sample in samples if sample.sample_id not in unusable)
    recipe = request.recipe
    order = Order(samples=len(usable), batch_size=recipe.batch_size, seed=recipe.seed)
    path = Path(request.model.name)
    model_folder = path.resolve() if path.is_dir() else None
    digest = folder_digest(model_folder) if model_folder else None
    folder = Folder(request.output_path)
    wanted = _record(request, samples, architecture, digest)
    return Prepared(
        request=request,
        system=system,
        engine=engine,
        folder=folder,
        samples=usable,
        unusable=tuple(unusable.values()),
        generated=generated,
        order=order,
        model_folder=model_folder,
        model_digest=digest,
        record=open_run(folder, wanted),
    )


def _samples(request: TrainRequest, system: System) -> tuple[Sequence[Sample], Any]:
    if request.data:
        found = resolve_calibration(
            request.data, limit=request.limit, seed=request.recipe.seed, include_path=request.include_path
        )
        return found, None
    table = training_table(
        request.questions or system.questions or LEARNED_KINDS,
        samples=request.generated_samples,
        seed=request.recipe.seed,
    )
    rows = table.drop_columns(["kind"]).to_pylist()
    return [Sample(**{**row, "images": tuple(row["images"])}) for row in rows], table


def _check_answers(samples: Sequence[Sample]) -> None:
    without = [sample.sample_id for sample in samples if not (sample.answer and sample.answer.strip())]
    if without:
        raise Refused(
            f"{len(without)} of {len(samples)} training samples have no answer, the first is {without[0]!r}; "
            "this training learns from answers: add a column answer, or leave those rows out"
        )


def _without_images(samples: Sequence[Sample]) -> dict[str, ErrorRecord]:
    found = {
        sample.sample_id: ErrorRecord(
            sample_id=sample.sample_id,
            stage="prompt",
            error="no-image",
            message=f"sample {sample.sample_id!r} has no image, and this training is about images; leave it out",
        )
        for sample in samples
        if not sample.images
    }
    if len(found) == len(samples):
        raise Refused(f"none of {len(samples)} training samples has an image, and this training is about images")
    return found


def _record(
    request: TrainRequest, samples: Sequence[Sample], architecture: Architecture, model_digest: str | None
) -> TrainingManifest:
    data_digest = calibration_digest(samples)
    arguments = {
        **request.arguments(),
        "model-digest": model_digest,
        "config-digest": architecture.config_digest,
        "data-digest": data_digest,
    }
    return TrainingManifest(
        parts=str(request.kind),
        state=State.RUNNING,
        arguments=arguments,
        arguments_digest=arguments_digest(arguments, ignore=NOT_DECIDING),
        versions=versions(),
        model=request.model.name,
        revision=request.model.revision,
        config_digest=architecture.config_digest,
        num_layers=architecture.num_layers,
        data_digest=data_digest,
        counts={"steps": request.recipe.steps, "samples": len(samples)},
        started=utc_now(),
    )
