"""The tasks that lmms-eval knows, by name: loading, document ids, and the digest of what decides a task's results."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

from shortv.errors import Refused, ShortVError, one_line
from shortv.untrusted import no_other_programs

IncludePath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None

_ID_COLUMNS: Final = ("sample_id", "question_id", "questionId", "id")
# Where the data is; its content is read from the documents.
_PLACES: Final = ("data_files", "data_dir", "cache_dir", "token")


class TaskIndex:
    """Tasks from the given folders first, then those that come with lmms-eval.

    The tasks of lmms-eval are indexed only if a name is not in the folders, since that takes seconds.
    """

    __slots__ = ("_folders", "_managers")

    def __init__(self, include_path: IncludePath) -> None:
        """Name the folders. Raises Refused when one of them is not a folder."""
        given = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path or ())
        self._folders = [os.fspath(folder) for folder in given]
        self._managers: dict[bool, Any] = {}
        for folder in self._folders:
            if "\0" in folder or not os.path.isdir(folder):
                raise Refused(f"task folder {folder!r} does not exist; give a folder with lmms-eval YAML files")

    def load(self, name: str, form: Literal["simple", "chat"] = "simple") -> Any:
        """Return the task object of a name, with its documents, in lmms-eval's simple form or its chat form.

        Raises:
            Refused: no such task, or the name is that of a group of tasks.
            ShortVError: its data or its code cannot be loaded, for example without a network.
        """
        from lmms_eval.tasks import get_task_dict

        manager = self._manager_of(name)
        try:
            tasks: Mapping[Any, Any] = get_task_dict(name, manager, form)
        except Exception as error:
            # Tasks run third-party code and fetch data: whatever goes wrong there is this task's failure.
            raise ShortVError(
                f"task {name!r} could not be loaded: {_cause(error)}; check that its data set is in the local "
                "cache or can be reached"
            ) from error
        return tasks[name]

    def _manager_of(self, name: str) -> Any:
        known: dict[str, Any] = {}
        for defaults in (False, True):
            index = self._manager(defaults).task_index
            if name in index:
                _check_single(name, index[name])
                return self._manager(defaults)
            known |= index
        near = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "name a task of lmms-eval, or give its folder"
        raise Refused(f"lmms-eval has no task {name!r}; {hint}")

    def _manager(self, defaults: bool) -> Any:
        if defaults not in self._managers:
            from lmms_eval.tasks import TaskManager

            self._managers[defaults] = TaskManager(include_path=self._folders, include_defaults=defaults)
        return self._managers[defaults]


def _check_single(name: str, entry: Mapping[str, Any]) -> None:
    if entry["type"] in ("task", "python_task"):
        return
    members = entry.get("task")
    hint = f": {', '.join(members[:8])}" if isinstance(members, list) else ""
    raise Refused(f"{name!r} is the name of a {entry['type']} of tasks; name single tasks instead{hint}")


def _cause(error: BaseException) -> str:
    attempt = getattr(error, "last_attempt", None)
    inner = (attempt.exception() if attempt is not None else None) or error
    return f"{type(inner).__name__}: {one_line(inner)}"


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


def task_digest(config: Mapping[str, Any], documents: Iterable[Any], **more: Any) -> str:
    """Digest a task's dumped configuration, the files with its functions, and documents without media, in order.

    Nothing of it depends on where files are, so that a copy of a task in another folder has the same digest.
    """
    found = hashlib.sha256(_text({"config": config, **more}).encode())
    for document in documents:
        found.update(hashlib.sha256(_text(document).encode()).digest())
    return found.hexdigest()


def _text(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True)


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
