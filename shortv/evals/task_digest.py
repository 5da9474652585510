"""What decides a task's questions and scores, as one digest."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Final

# Where the data lies; what it says is read from the documents.
_PLACES: Final = ("data_files", "data_dir", "cache_dir", "token")


def task_digest(config: Mapping[str, Any], documents: Iterable[Any], **more: Any) -> str:
    """Digest a task's dumped configuration, the files with its functions, and documents without media, in order.

    Nothing of it depends on where files lie, so that a copy of a task in another folder has the same digest.
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
        # The whole file: a function calls what stands beside it.
        return [name, hashlib.sha256(stream.read()).hexdigest()]
