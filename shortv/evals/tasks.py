"""Documents of lmms-eval tasks as calibration samples."""

import io
import os
import random
from collections.abc import Sequence
from typing import Any, Final

from shortv.errors import Refused, ShortVError
from shortv.evals.index import TaskIndex, quiet_libraries
from shortv.evals.specs import TaskSpec, parse_spec
from shortv.sample import Sample

IncludePath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None

_ID_COLUMNS: Final = ("sample_id", "question_id", "questionId", "id")


def task_samples(spec: str, seed: int, include_path: IncludePath = None) -> list[Sample]:
    """Draw the samples of one task, such as `gqa:20`; see `samples_of_tasks`."""
    return samples_of_tasks([spec], seed=seed, include_path=include_path)


def samples_of_tasks(specs: Sequence[str], *, seed: int, include_path: IncludePath = None) -> list[Sample]:
    """Draw documents from the evaluation splits of lmms-eval tasks, in the order of the split.

    Question, images and answer come from one document each (the released ShortV code drew them apart). The draw
    depends on seed and task name only, and a smaller number draws a part of what a larger one draws. A document
    whose image cannot be decoded becomes a sample with an empty image, for which it alone gets an error row.

    Raises:
        Refused: a malformed spec, an unknown task, more samples than documents, or a task without images or text.
        ShortVError: the data of a task cannot be loaded.
    """
    parsed = [parse_spec(text) for text in specs]
    repeated = {spec.task for spec in parsed if sum(other.task == spec.task for other in parsed) > 1}
    if repeated:
        raise Refused(f"task {min(repeated)!r} is named twice; name it once with the number of samples wanted")
    with quiet_libraries():
        index = TaskIndex(include_path)
        return [sample for spec in parsed for sample in _draw(index, spec, seed)]


def _draw(index: TaskIndex, spec: TaskSpec, seed: int) -> list[Sample]:
    task = index.load(spec.task)
    docs = task.eval_docs
    if spec.limit > len(docs):
        raise Refused(f"task {spec.task!r} has {len(docs)} documents, {spec.limit} were asked for; ask for fewer")
    order = list(range(len(docs)))
    random.Random(f"{spec.task}:{seed}").shuffle(order)
    names = document_names(docs)
    return [
        _sample(task, spec.task, f"{spec.task}/{names[position]}", docs, position)
        for position in sorted(order[: spec.limit])
    ]


def document_names(docs: Any) -> list[str]:
    """Name documents by their own id where each has another one, else by position."""
    for column in _ID_COLUMNS:
        if column in getattr(docs, "column_names", ()):
            values = list(docs[column])
            if all(isinstance(value, str | int) for value in values) and len(set(values)) == len(values):
                return [str(value) for value in values]
    return [str(position) for position in range(len(docs))]


def _sample(task: Any, name: str, sample_id: str, docs: Any, position: int) -> Sample:
    try:
        doc = docs[position]
        images = tuple(_png(name, visual) for visual in task.doc_to_visual(doc) or ())
    except (OSError, SyntaxError, ValueError):
        # PIL raises all three for a damaged file. The sample is kept, so that its state is an error row.
        return Sample(sample_id=sample_id, images=(b"",), prompt="", dataset=name)
    return Sample(
        sample_id=sample_id,
        images=images,
        prompt=_prompt(task, name, doc),
        answer=_answer(task, doc),
        dataset=name,
    )


def _png(name: str, visual: Any) -> bytes:
    from PIL import Image

    if not isinstance(visual, Image.Image):
        raise Refused(f"task {name!r} shows a {type(visual).__name__}, not images; choose an image task")
    # PNG has no CMYK or floating-point modes.
    image = visual if visual.mode in ("RGB", "RGBA", "L") else visual.convert("RGB")
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def _prompt(task: Any, name: str, doc: Any) -> str:
    try:
        text = task.doc_to_text(doc)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShortVError(f"task {name!r} gives no prompt: {type(error).__name__}: {error}") from error
    if not isinstance(text, str):
        raise Refused(f"task {name!r} gives a {type(text).__name__} as prompt; choose a task that asks in text")
    return text


def _answer(task: Any, doc: Any) -> str | None:
    if task.config.doc_to_target is None:
        return None
    answer = task.doc_to_target(doc)
    if isinstance(answer, list | tuple) and answer:
        answer = answer[0]
    return str(answer) if isinstance(answer, str | int | float) else None
