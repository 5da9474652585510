"""What ran: facts of a manifest, and the command that repeats the run."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Final

from reports.locations import MASK
from reports.manifest import CampaignManifest, State, SweepManifest
from reports.page.document import Command, Fact

_JOBS: Final = {"sweep": "jobs/lc_sweep.py", "campaign": "jobs/campaign.py"}
OUTPUT: Final = "OUTPUT_FOLDER"
# Lists that are given as one text with commas; any other list repeats its option.
_JOINED: Final = ("modes", "plans", "tasks")
# Options that do not change what is computed.
_LEFT_OUT: Final = ("retry-failed",)


def run_facts(manifest: SweepManifest | CampaignManifest) -> list[Fact]:
    """Return the facts that every kind of run has."""
    seconds = manifest.wall_seconds
    return [
        ("state", str(manifest.state)),
        ("started", manifest.started),
        ("finished", manifest.finished or "not yet"),
        ("time, all runs", None if seconds is None else f"{seconds:.1f} s"),
        ("seed", manifest.seed),
        *((f"{name} version", version) for name, version in manifest.versions.items()),
    ]


def state_warnings(manifest: SweepManifest | CampaignManifest, unit: str) -> list[str]:
    """Return what a reader must know first: that a run has not ended, or that part of it failed."""
    if manifest.state is State.RUNNING:
        return ["This run is not finished: it is being written, or was stopped. This page may show only part of it."]
    if manifest.state is State.PARTIAL:
        return [f"This run is partial: some {unit} failed. The numbers are over the others; the errors are below."]
    return []


def command_of(manifest: SweepManifest | CampaignManifest) -> Command:
    """Return the command line that repeats a run in a new folder."""
    arguments = {name.replace("_", "-"): value for name, value in manifest.arguments.items()}
    words = [word for name, value in arguments.items() for word in _option(name, value)]
    line = shlex.join(["python", _JOBS[manifest.kind], *words, "--output-path", OUTPUT])
    notes = [f"Give another folder for {OUTPUT}."]
    if arguments.get("chat-template"):
        notes.append("CHAT_TEMPLATE is a file with the chat template that the manifest holds.")
    if MASK in line:
        notes.append(f"{MASK} stands for a secret.")
    return Command(line, " ".join(notes))


def _option(name: str, value: Any) -> Iterator[str]:
    if value is None or value is False or name in (*_LEFT_OUT, "output-path") or name.endswith("-digest"):
        return
    option = f"--{name}"
    if value is True:
        yield option
    elif name == "chat-template":
        yield from (option, "CHAT_TEMPLATE")
    elif isinstance(value, Mapping):
        if value:
            yield from (option, ",".join(f"{key}={item}" for key, item in value.items()))
    elif isinstance(value, list | tuple):
        items = [",".join(map(str, value))] if name in _JOINED and value else list(map(str, value))
        for item in items:
            yield from (option, item)
    else:
        whole = isinstance(value, float) and value.is_integer()
        yield from (option, str(int(value)) if whole else str(value))
