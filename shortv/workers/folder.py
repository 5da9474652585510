"""Whether an output folder may be used: new, the same sweep to continue, the same sweep finished, or refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from reports.manifest import MANIFEST_NAME, Manifest, State
from reports.store import Folder
from shortv.errors import Refused, ShortVError
from shortv.workers.driver_lock import LOCK_NAME
from shortv.workers.request import shown

# Decide nothing: the digest of the samples stands for them, wherever they were read from.
NOT_DECIDING = ("calibration",)
# Set by Ray for the entrypoint of a submitted job.
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def check_output(path: str, option: str = "--output-path") -> None:
    """Raise Refused for a relative path inside a submitted Ray job, whose working directory vanishes with it."""
    if _SUBMITTED in os.environ and "://" not in path and not os.path.isabs(path):
        raise Refused(
            f"{option} {path!r} is relative, and the working directory of a submitted job vanishes with it; "
            "give an absolute path that outlives the job, or a URI such as s3://bucket/sweep"
        )


def open_folder(folder: Folder, wanted: Manifest) -> Manifest | None:
    """Return the manifest of an earlier run of the same sweep, or None for a new folder.

    Raises:
        Refused: the folder holds another sweep, with the arguments that differ, or something else; or it cannot
            be written.
    """
    try:
        names = [name for name in folder.list() if name != LOCK_NAME]
        found = Manifest.load(folder) if MANIFEST_NAME in names else None
    except Refused:
        raise
    except ShortVError as error:
        raise Refused(f"{error}; choose another --output-path") from error
    if found is not None:
        _check_same(folder, found, wanted)
    elif names:
        raise Refused(
            f"{folder.shown} holds {len(names)} files ({names[0]}) and no sweep; choose a new or empty --output-path"
        )
    if found is None or found.state is State.RUNNING:
        folder.check_writable()
    return found


def _check_same(folder: Folder, found: Manifest, wanted: Manifest) -> None:
    if found.arguments_digest == wanted.arguments_digest:
        return
    differing = _differing(found.arguments, wanted.arguments)
    raise Refused(
        f"{folder.shown} holds another sweep ({differing}); choose another --output-path, or repeat its arguments"
    )


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [name for name in {**wanted, **found} if name not in NOT_DECIDING and found.get(name) != wanted.get(name)]
    pairs = (f"{name} {shown(found.get(name))} there, {shown(wanted.get(name))} here" for name in names)
    return "; ".join(pairs) or "of another release"
