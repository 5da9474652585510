"""Whether an output folder may be used: new, the same run to continue, the same run finished, or refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from reports.manifest import MANIFEST_NAME, Manifest, State
from reports.store import Folder
from reports.training import TrainingManifest
from shortv.errors import Refused, ShortVError
from shortv.workers.driver_lock import LOCK_NAME
from shortv.workers.request import shown

# Decide nothing: the digest of the samples stands for them, wherever they were read from.
NOT_DECIDING = ("calibration", "data")
# Set by Ray for the entrypoint of a submitted job.
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"

AnyManifest = TypeVar("AnyManifest", Manifest, TrainingManifest)


def check_output(path: str, option: str = "--output-path") -> None:
    """Raise Refused for a relative path inside a submitted Ray job, whose working directory vanishes with it."""
    if _SUBMITTED in os.environ and "://" not in path and not os.path.isabs(path):
        raise Refused(
            f"{option} {path!r} is relative, and the working directory of a submitted job vanishes with it; "
            "give an absolute path that outlives the job, or a URI such as s3://bucket/sweep"
        )


def open_folder(folder: Folder, wanted: AnyManifest) -> AnyManifest | None:
    """Return the manifest of an earlier run of the same sweep or training, or None for a new folder.

    Raises:
        Refused: the folder holds another one, with the arguments that differ, or something else; or it cannot be
            written.
    """
    try:
        names = [name for name in folder.list() if name != LOCK_NAME]
        found = type(wanted).load(folder) if MANIFEST_NAME in names else None
    except Refused:
        raise
    except ShortVError as error:
        raise Refused(f"{error}; choose another --output-path") from error
    if found is not None:
        if found.arguments_digest != wanted.arguments_digest:
            raise Refused(
                f"{folder.shown} holds another {wanted.kind} ({_differing(found.arguments, wanted.arguments)}); "
                "choose another --output-path, or repeat its arguments"
            )
    elif names:
        raise Refused(
            f"{folder.shown} holds {len(names)} files ({names[0]}) and no {wanted.kind}; "
            "choose a new or empty --output-path"
        )
    if found is None or found.state is State.RUNNING:
        folder.check_writable()
    return found


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [name for name in {**wanted, **found} if name not in NOT_DECIDING and found.get(name) != wanted.get(name)]
    pairs = (f"{name} {shown(found.get(name))} there, {shown(wanted.get(name))} here" for name in names)
    return "; ".join(pairs) or "of another release"
