"""The tasks that lmms-eval knows, by name."""

import contextlib
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from shortv.errors import Refused, ShortVError


class TaskIndex:
    """Tasks from the given folders first, then those that come with lmms-eval.

    The tasks of lmms-eval are indexed only when a name is not in the folders, since that takes seconds.
    """

    __slots__ = ("_folders", "_managers")

    def __init__(self, include_path: "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None") -> None:
        """Name the folders. Raises Refused when one of them is not a folder."""
        given = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path or ())
        self._folders = [os.fspath(folder) for folder in given]
        self._managers: dict[bool, Any] = {}
        for folder in self._folders:
            if not os.path.isdir(folder):
                raise Refused(f"task folder {folder} does not exist; give a folder with lmms-eval YAML files")

    def load(self, name: str, form: Literal["simple", "chat"] = "simple") -> Any:
        """Return the task object of a name, with its documents, asking in lmms-eval's simple form or its chat form.

        Raises:
            Refused: no such task, or the name stands for a group of tasks.
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
        raise Refused(f"lmms-eval knows no task {name!r}; {hint}")

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
    raise Refused(f"{name!r} stands for a {entry['type']} of tasks; name single tasks instead{hint}")


def _cause(error: BaseException) -> str:
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    text = " ".join(str(inner or error).split())
    kind = type(inner or error).__name__
    return f"{kind}: {text[:300]}" if text else kind


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep lmms-eval's log lines and the progress bars of datasets out of the user's terminal."""
    import datasets
    from loguru import logger

    bars = datasets.utils.are_progress_bars_disabled()
    logger.disable("lmms_eval")
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.enable("lmms_eval")
        if not bars:
            datasets.enable_progress_bars()
