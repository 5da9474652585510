"""The life of a run, the same for a sweep, a campaign and a training.

A run has a folder with a manifest. `open_run` decides whether a command continues what is there, `one_driver` keeps
other drivers out, `stop_on_signal` turns SIGTERM and Ctrl-C into one error, `complete` ties them together: it starts an
attempt, lets the run do its work, and writes the final manifest last, so that a killed run never looks complete.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any, Final, TypeVar

from rich.console import Console

from reports.manifest import (
    MANIFEST_NAME,
    ModelRunManifest,
    RunManifest,
    State,
    arguments_digest,
    utc_now,
    versions,
)
from reports.store import Folder
from shortv.architecture import Architecture
from shortv.errors import Refused, ShortVError
from shortv.spec import ModelSpec
from shortv.terminal import printable, say
from shortv.workers.shipping import folder_digest

PARTIAL_STATUS: Final = 3
"""Exit status of a run that finished although some samples failed."""
LOCK_NAME: Final = ".driver.lock"
"""A file of every local output folder in which work was done. It stays there; only the lock on it has a meaning."""
_NOT_DECIDING: Final = ("calibration", "data")
"""Arguments that do not decide a result: the digest of the samples stands for the places they were read from."""
# Set by Ray for the entrypoint of a submitted job.
_SUBMITTED: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"

M = TypeVar("M", bound=ModelRunManifest)
R = TypeVar("R", bound=RunManifest)
T = TypeVar("T")
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Stopped(ShortVError, SystemExit):
    """The user, or the cluster, ended the run; the same command continues it.

    It is a SystemExit as well: click replaces KeyboardInterrupt.
    """

    def __init__(self, number: int) -> None:
        super().__init__("stopped before the end; what is finished is kept, and the same command continues")
        self.exit_status = self.code = 128 + number


@contextmanager
def stop_on_signal() -> Iterator[None]:
    """Raise Stopped in the block when SIGTERM or SIGINT arrives; the earlier handlers return afterwards.

    Ray's compiled code may turn the exception of a handler into another one: whatever leaves the block after a signal
    leaves it as Stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        if received:
            raise Stopped(received[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine as `asyncio.run` does, but cancel it when SIGTERM or SIGINT arrives, and raise Stopped then.

    An error that a handler raises in the middle of a loop's step would leave half of its tasks with errors that nobody
    reads; a cancellation ends them in order.
    """
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(coroutine)
    received: list[int] = []

    async def watched() -> T:
        task = asyncio.current_task()

        def stop(number: int) -> None:
            received.append(number)
            if task is not None:
                task.cancel()

        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
        return await coroutine

    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    try:
        return asyncio.run(watched())
    except asyncio.CancelledError:
        raise Stopped(received[0]) if received else ShortVError("the work was cancelled") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_output(path: str, option: str = "--output-path") -> None:
    """Raise Refused for a relative path inside a submitted Ray job, whose working directory vanishes with it."""
    if _SUBMITTED in os.environ and "://" not in path and not os.path.isabs(path):
        raise Refused(
            f"{option} {path!r} is relative, and the working directory of a submitted job vanishes with it; "
            "give an absolute path that outlives the job, or a URI such as s3://bucket/sweep"
        )


def new_manifest(
    kind: type[M], arguments: Mapping[str, Any], model: ModelSpec, architecture: Architecture, **fields: Any
) -> M:
    """Return the manifest of a run on one model that has not begun.

    Args:
        arguments: what decides the result, by the name of its option; the digests of the model are added.
        fields: those that only this kind of manifest has.
    """
    digests = {"model-digest": folder_digest(model.name), "config-digest": architecture.config_digest}
    arguments = {**arguments, **digests}
    return kind(
        state=State.RUNNING,
        arguments=arguments,
        arguments_digest=arguments_digest(arguments, ignore=_NOT_DECIDING),
        versions=versions(),
        model=model.name,
        revision=model.revision,
        config_digest=architecture.config_digest,
        num_layers=architecture.num_layers,
        started=utc_now(),
        **fields,
    )


def find_manifest(folder: Folder, kind: type[RunManifest]) -> Any:
    """Return the manifest of a folder, or None for a new or empty one.

    Raises:
        Refused: the folder holds something else, or cannot be read.
    """
    try:
        names = [name for name in folder.list() if name != LOCK_NAME]
        if MANIFEST_NAME in names:
            return kind.load(folder)
    except Refused:
        raise
    except ShortVError as error:
        raise Refused(f"{error}; choose another --output-path") from error
    if names:
        raise Refused(
            f"{folder.shown} holds {len(names)} files ({names[0]}) and no {kind.KIND}; "
            "choose a new or empty --output-path"
        )
    return None


def open_run(folder: Folder, wanted: M) -> M:
    """Return the manifest to continue with: that of an earlier run with the same arguments, or the wanted one.

    Raises:
        Refused: the folder holds a run with other arguments (the differences are named) or something else, or it
            cannot be written.
    """
    found: M | None = find_manifest(folder, type(wanted))
    if found is not None and found.arguments_digest != wanted.arguments_digest:
        raise Refused(
            f"{folder.shown} holds another {wanted.kind} ({_differing(found.arguments, wanted.arguments)}); "
            "choose another --output-path, or repeat its arguments"
        )
    if found is None or found.state is State.RUNNING:
        folder.check_writable()
    return found or wanted


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        return printable(repr(value) if isinstance(value, str) else value, limit=80)

    names = [name for name in {**wanted, **found} if name not in _NOT_DECIDING and found.get(name) != wanted.get(name)]
    pairs = (f"{name} {shown(found.get(name))} there, {shown(wanted.get(name))} here" for name in names)
    return "; ".join(pairs) or "of another release"


def complete(folder: Folder, manifest: M, work: Callable[[M], M]) -> M:
    """Do what is left of a run and return its final manifest; a finished run is returned as it is.

    Args:
        work: takes the manifest of this attempt and returns the final one without times, after it has written every
            other file.

    Raises:
        Refused: another driver is at work in the folder.
    """
    if manifest.state is not State.RUNNING:
        return manifest
    with one_driver(folder):
        # Another driver may have finished the run before the lock was free.
        manifest = open_run(folder, manifest)
        return attempt(folder, manifest, work) if manifest.state is State.RUNNING else manifest


def attempt(folder: Folder, manifest: R, work: Callable[[R], R]) -> R:
    """Count a new attempt in the manifest, do the work, and write the final manifest last. The folder is locked.

    Args:
        work: as for `complete`.
    """
    started = time.monotonic()
    manifest = manifest.updated(attempts=manifest.attempts + 1)
    manifest.save(folder)
    final = work(manifest)
    seconds = (manifest.wall_seconds or 0.0) + time.monotonic() - started
    final = final.updated(finished=utc_now(), wall_seconds=seconds)
    final.save(folder)
    return final


def exit_status(failed: int, total: int, tolerated: float) -> int:
    """Return 0 when at most the tolerated share of samples failed, else 3."""
    return 0 if failed / max(total, 1) <= tolerated else PARTIAL_STATUS


@contextmanager
def one_driver(folder: Folder) -> Iterator[None]:
    """Lock the folder in the block. The lock ends with this process, however the process ends.

    Local folders and file systems with locks are locked. Object stores have no locks: there two drivers go unnoticed.

    Raises:
        Refused: another driver is at work in the folder.
    """
    try:
        file = _open_lock(folder)
    except OSError:
        # Where nothing can be written nothing will run, and finished results can still be shown.
        file = None
    if file is None:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = printable(file.read(200).strip()) or "another process"
            raise Refused(
                f"{folder.shown} is in use by {holder}; wait until it has ended, or choose another --output-path"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise ShortVError(f"{folder.shown} could not be locked: {error.strerror}") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _open_lock(folder: Folder) -> IO[str] | None:
    if folder.local_path is None:
        return None
    folder.local_path.mkdir(parents=True, exist_ok=True)
    return (folder.local_path / LOCK_NAME).open("a+")


def write_report(folder: Folder, console: Console, *, anew: bool) -> None:
    """Write the page beside the tables, also where an earlier end of the run did not get to it.

    A page that cannot be written is a warning: the tables are whole without it, and jobs/report.py writes it later.
    """
    # The charts of the page take a second to import, and most commands draw none.
    from reports.page import PAGE_NAME, write_page

    if anew or not folder.exists(PAGE_NAME):
        try:
            write_page(folder)
        except ShortVError as error:
            say(console, f"Warning: no page was written: {error}")
            return
    say(console, f"the page is {folder.shown}/{PAGE_NAME}")


def submission_id(prefix: str, digest: str, output_path: str, kind: type[RunManifest]) -> str:
    """Return the Ray submission id for the next attempt of a run: `PREFIX-HASH-ATTEMPT`.

    Ray refuses an id that was used before. The hash covers the arguments that decide the result (`digest`) and the
    output folder, because every folder counts its attempts on its own.

    Raises:
        Refused: the folder holds something else than such a run.
    """
    folder = Folder(output_path)
    attempts = kind.load(folder).attempts if folder.exists(MANIFEST_NAME) else 0
    found = arguments_digest({"arguments": digest, "output-path": str(folder.local_path or folder.shown)})
    return f"{prefix}-{found[:12]}-{attempts + 1}"
