"""The tasks that lmms-eval knows, by name: loading, calibration samples, and the digest of what decides a result."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import resources
from typing import Any, Final

from PIL import Image

from shortv.errors import Refused, SampleError, ShortVError, one_line
from shortv.sample import Sample
from shortv.untrusted import no_other_programs, open_image

IncludePath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None

_ID_COLUMNS: Final = ("sample_id", "question_id", "questionId", "id")
# Where the data is; its content is read from the documents.
_PLACES: Final = ("data_files", "data_dir", "cache_dir", "token")
_SPEC: Final = re.compile(r"(?P<task>[^:\s]+):(?P<limit>[1-9]\d{0,8})")


def find_task(name: str, include_path: IncludePath) -> Callable[[str], Any]:
    """Find a task in the given folders, among the bundled ones, or among those of lmms-eval, in this order.

    Returns a function that loads the task and its documents in lmms-eval's form "simple" or "chat". It raises
    ShortVError when the data or the code of the task cannot be loaded, for example without a network.

    Raises:
        Refused: no such folder, no such task, or the name is that of a group of tasks.
    """
    given = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path or ())
    folders = tuple(os.fspath(folder) for folder in (*given, str(resources.files("shortv") / "tiny" / "task")))
    for folder in folders:
        if "\0" in folder or not os.path.isdir(folder):
            raise Refused(f"task folder {folder!r} does not exist; give a folder with lmms-eval YAML files")
    known: dict[str, Any] = {}
    # The tasks of lmms-eval are indexed only for a name that is not in the folders, since that takes seconds.
    for defaults in (False, True):
        manager = _task_manager(folders, defaults)
        known |= manager.task_index
        if name in known:
            _check_single(name, known[name])
            return partial(_load, name, manager)
    near = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "name a task of lmms-eval, or give its folder"
    raise Refused(f"lmms-eval has no task {name!r}; {hint}")


@cache
def _task_manager(folders: tuple[str, ...], defaults: bool) -> Any:
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=defaults)


def _check_single(name: str, entry: Mapping[str, Any]) -> None:
    if entry["type"] not in ("task", "python_task"):
        members = entry.get("task")
        hint = f": {', '.join(members[:8])}" if isinstance(members, list) else ""
        raise Refused(f"{name!r} is the name of a {entry['type']} of tasks; name single tasks instead{hint}")


def _load(name: str, manager: Any, form: str) -> Any:
    from lmms_eval.tasks import get_task_dict

    try:
        return get_task_dict(name, manager, form)[name]
    except Exception as error:  # tasks run third-party code and fetch data
        # lmms-eval retries, and wraps the error of its last attempt.
        attempt = getattr(error, "last_attempt", None)
        inner = (attempt.exception() if attempt is not None else None) or error
        raise ShortVError(
            f"task {name!r} could not be loaded: {type(inner).__name__}: {one_line(inner)}; check that its data set is "
            "in the local cache or can be reached"
        ) from error


@contextlib.contextmanager
def loading_tasks() -> Iterator[None]:
    """Keep lmms-eval's log lines and the bars of datasets from the terminal, and Pillow from starting programs."""
    import datasets
    from loguru import logger

    bars = datasets.utils.are_progress_bars_disabled()
    logger.disable("lmms_eval")
    datasets.disable_progress_bars()
    try:
        with no_other_programs():
            yield
    finally:
        logger.enable("lmms_eval")
        if not bars:
            datasets.enable_progress_bars()


def document_names(docs: Any) -> list[str]:
    """Name documents by their own id where it is different in each, else by position."""
    for column in _ID_COLUMNS:
        if column in getattr(docs, "column_names", ()):
            values = list(docs[column])
            if all(isinstance(value, str | int) for value in values) and len(set(values)) == len(values):
                return [str(value) for value in values]
    return [str(position) for position in range(len(docs))]


def task_samples(spec: str, seed: int, include_path: IncludePath = None) -> list[Sample]:
    """Draw documents from the evaluation split of an lmms-eval task, such as `gqa:20`, in the order of the split.

    Question, images and answer come from the same document (the released ShortV code drew them apart). The draw
    depends on seed and task name only, and a smaller number draws a part of what a larger one draws. A document
    whose image cannot be decoded becomes a sample with an empty image, for which it alone gets an error row.

    Raises:
        Refused: a malformed spec, an unknown task, more samples than documents, or a task without images or text.
        ShortVError: the data of the task cannot be loaded.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise Refused(f"{spec!r:.80} is not a task and a number of samples; write TASK:NUMBER, such as gqa:20")
    name, limit = match["task"], int(match["limit"])
    with loading_tasks():
        task = find_task(name, include_path)("simple")
        docs = task.eval_docs
        if limit > len(docs):
            raise Refused(f"task {name!r} has {len(docs)} documents, fewer than {limit}; draw fewer samples")
        order = list(range(len(docs)))
        random.Random(f"{name}:{seed}").shuffle(order)
        names = document_names(docs)
        return [_sample(task, name, f"{name}/{names[at]}", docs, at) for at in sorted(order[:limit])]


def _sample(task: Any, name: str, sample_id: str, docs: Any, position: int) -> Sample:
    try:
        doc = docs[position]
        images = tuple(_png(name, visual) for visual in task.doc_to_visual(doc) or ())
    except (OSError, SyntaxError, ValueError, SampleError):
        # Pillow raises the first three for a damaged file. The sample is kept, so that its state is an error row.
        return Sample(sample_id=sample_id, images=(b"",), prompt="", dataset=name)
    try:
        prompt = task.doc_to_text(doc)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShortVError(f"task {name!r} gives no prompt: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(prompt, str):
        raise Refused(f"task {name!r} gives a {type(prompt).__name__} as prompt; choose a task with prompts of text")
    answer = None if task.config.doc_to_target is None else task.doc_to_target(doc)
    if isinstance(answer, list | tuple) and answer:
        answer = answer[0]
    return Sample(
        sample_id=sample_id,
        images=images,
        prompt=prompt,
        answer=str(answer) if isinstance(answer, str | int | float) else None,
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


def task_digest(config: Mapping[str, Any], **more: Any) -> str:
    """Digest a task's dumped configuration and the files with its functions.

    Nothing of it depends on where files are, so that a copy of a task in another folder has the same digest.
    """
    return hashlib.sha256(_text({"config": config, **more})).hexdigest()


def document_digest(document: Any) -> int:
    """Digest a document without its media, in 64 bits."""
    return int.from_bytes(hashlib.sha256(_text(document)).digest()[:8], signed=True)


def _text(value: Any) -> bytes:
    return json.dumps(_plain(value), sort_keys=True).encode()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if name not in _PLACES}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if callable(value):
        return _code(value)
    # Dates, numbers of other libraries, images; an address would differ in every process.
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(value).__name__} {value}")


def _code(function: Any) -> Any:
    if isinstance(function, partial):
        return [_code(function.func), _plain(function.args), _plain(function.keywords)]
    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        file = None
    if file is None or not os.path.isfile(file):
        return name
    with open(file, "rb") as stream:
        # The whole file: a function calls others in it.
        return [name, hashlib.sha256(stream.read()).hexdigest()]
