"""What the pages of all runs take from a run folder: tables, facts, warnings, and the command that repeats the run."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from reports.locations import MASK
from reports.manifest import CampaignManifest, State, SweepManifest
from reports.page.document import Fact, Grid, Section
from reports.schemas import schema_of
from reports.store import Folder
from shortv.errors import Refused

AnyManifest = SweepManifest | CampaignManifest
_JOBS: Final = {"sweep": "jobs/lc_sweep.py", "campaign": "jobs/campaign.py"}
OUTPUT: Final = "OUTPUT_FOLDER"
# Lists that are given as one text with commas; any other list repeats its option.
_JOINED: Final = ("modes", "plans", "tasks")
# Options that do not change what is computed.
_LEFT_OUT: Final = ("retry-failed", "output-path")
_MOST_ROWS: Final = 200_000


def result_table(folder: Folder, name: str, manifest: AnyManifest) -> pa.Table:
    """Read a table of a run; of one that is still running it may be empty. Raises ShortVError."""
    if not folder.exists(f"{name}.parquet"):
        if manifest.state is State.RUNNING:
            return schema_of(name).empty_table()
        problem = f"{folder.shown} has no {name}.parquet although its run has ended"
        raise Refused(f"{problem}; run the {manifest.kind} again")
    return folder.read_table(name)


def result_rows(folder: Folder, name: str, manifest: AnyManifest) -> list[dict[str, Any]]:
    """Read a table of a run as rows. Raises ShortVError, also for one too large for that."""
    table = result_table(folder, name, manifest)
    if len(table) > _MOST_ROWS:
        raise Refused(f"{folder.shown}/{name}.parquet has {len(table)} rows, at most {_MOST_ROWS} are read")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def state_warnings(manifest: AnyManifest, unit: str) -> list[str]:
    """Return what a reader must know first: that a run has not ended, or that part of it failed."""
    if manifest.state is State.RUNNING:
        return ["This run is not finished: it is being written, or was stopped. This page may show only part of it."]
    if manifest.state is State.PARTIAL:
        return [f"This run is partial: some {unit} failed. The numbers are over the others; the errors are below."]
    return []


def ran(manifest: AnyManifest, facts: Sequence[Fact], *grids: Grid) -> Section:
    """Return the section about what ran, with these facts before those of every run, and how to repeat it."""
    seconds, arguments = manifest.wall_seconds, {key.replace("_", "-"): it for key, it in manifest.arguments.items()}
    words = [word for name, value in arguments.items() for word in _option(name, value)]
    line = shlex.join(["python", _JOBS[manifest.kind], *words, "--output-path", OUTPUT])
    notes = [f"Give another folder for {OUTPUT}."]
    if arguments.get("chat-template"):
        notes.append("CHAT_TEMPLATE is a file with the chat template that the manifest holds.")
    if MASK in line:
        notes.append(f"{MASK} stands for a secret.")
    every = [
        ("state", str(manifest.state)),
        ("started", manifest.started),
        ("finished", manifest.finished or "not yet"),
        ("time, all runs", None if seconds is None else f"{seconds:.1f} s"),
        ("seed", manifest.seed),
        *((f"{name} version", version) for name, version in manifest.versions.items()),
    ]
    return Section(title="What ran", facts=[*facts, *every], command=line, note=" ".join(notes), grids=grids)


def _option(name: str, value: Any) -> list[str]:
    """Return the words of an option; none for what is not set, or is not the user's."""
    option = f"--{name}"
    if value is None or value is False or value == {} or name in _LEFT_OUT or name.endswith("-digest"):
        return []
    if value is True:
        return [option]
    if name == "chat-template":
        return [option, "CHAT_TEMPLATE"]
    if isinstance(value, Mapping):
        return [option, ",".join(f"{key}={item}" for key, item in value.items())]
    if isinstance(value, list | tuple):
        items = [",".join(map(str, value))] if name in _JOINED and value else map(str, value)
        return [word for item in items for word in (option, item)]
    return [option, str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)]
