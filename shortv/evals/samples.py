"""Documents of lmms-eval tasks as calibration samples."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from PIL import Image

from shortv.errors import Refused, SampleError, ShortVError, one_line
from shortv.evals.tasks import IncludePath, TaskIndex, document_names, loading_tasks
from shortv.sample import Sample
from shortv.untrusted import open_image

_SPEC: Final = re.compile(r"(?P<task>[^:\s]+):(?P<limit>\d{1,9})")


class TaskSpec(NamedTuple):
    """A task of lmms-eval and a number of its documents."""

    task: str
    limit: int


def parse_spec(text: str) -> TaskSpec:
    """Read `gqa:20`. Raises Refused when the number is missing, zero or not a number."""
    match = _SPEC.fullmatch(text.strip())
    if match is None or int(match["limit"]) == 0:
        raise Refused(f"{text!r:.80} is not a task and a number of samples; write TASK:NUMBER, such as gqa:20")
    return TaskSpec(match["task"], int(match["limit"]))


def task_samples(spec: str, seed: int, include_path: IncludePath = None) -> list[Sample]:
    """Draw the samples of one task, such as `gqa:20`; see `samples_of_tasks`."""
    return samples_of_tasks([spec], seed=seed, include_path=include_path)


def samples_of_tasks(specs: Sequence[str], *, seed: int, include_path: IncludePath = None) -> list[Sample]:
    """Draw documents from the evaluation splits of lmms-eval tasks, in the order of the split.

    Question, images and answer come from the same document (the released ShortV code drew them apart). The draw
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
    with loading_tasks():
        index = TaskIndex(include_path)
        return [sample for spec in parsed for sample in _draw(index, spec, seed)]


def _draw(index: TaskIndex, spec: TaskSpec, seed: int) -> list[Sample]:
    task = index.load(spec.task)
    docs = task.eval_docs
    if spec.limit > len(docs):
        raise Refused(f"task {spec.task!r} has {len(docs)} documents, fewer than {spec.limit}; draw fewer samples")
    order = list(range(len(docs)))
    random.Random(f"{spec.task}:{seed}").shuffle(order)
    names = document_names(docs)
    return [
        _sample(task, spec.task, f"{spec.task}/{names[position]}", docs, position)
        for position in sorted(order[: spec.limit])
    ]


def _sample(task: Any, name: str, sample_id: str, docs: Any, position: int) -> Sample:
    try:
        doc = docs[position]
        images = tuple(_png(name, visual) for visual in task.doc_to_visual(doc) or ())
    except (OSError, SyntaxError, ValueError, SampleError):
        # Pillow raises the first three for a damaged file. The sample is kept, so that its state is an error row.
        return Sample(sample_id=sample_id, images=(b"",), prompt="", dataset=name)
    return Sample(
        sample_id=sample_id,
        images=images,
        prompt=_prompt(task, name, doc),
        answer=_answer(task, doc),
        dataset=name,
    )


def _png(name: str, visual: Any) -> bytes:
    if not isinstance(visual, Image.Image):
        raise Refused(f"task {name!r} gives a {type(visual).__name__} as image; choose an image task")
    # PNG has no CMYK or floating-point modes.
    image = visual if visual.mode in ("RGB", "RGBA", "L") else open_image(visual)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def _prompt(task: Any, name: str, doc: Any) -> str:
    try:
        text = task.doc_to_text(doc)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShortVError(f"task {name!r} gives no prompt: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(text, str):
        raise Refused(f"task {name!r} gives a {type(text).__name__} as prompt; choose a task with prompts of text")
    return text


def _answer(task: Any, doc: Any) -> str | None:
    if task.config.doc_to_target is None:
        return None
    answer = task.doc_to_target(doc)
    if isinstance(answer, list | tuple) and answer:
        answer = answer[0]
    return str(answer) if isinstance(answer, str | int | float) else None
