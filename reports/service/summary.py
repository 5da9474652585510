"""One folder in the list: what it is, how far it got, its headline numbers, and what is wrong with it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from reports.manifest import MANIFEST_NAME, CampaignManifest, State, SweepManifest, TrainingManifest
from reports.page import PAGE_NAME
from reports.service.files import MAX_TEXT_BYTES, Cache, Files, shown, why
from reports.service.headline import AnyManifest, Headline, headline_of
from reports.service.runs import (
    AGAINST_NAME,
    MAX_FOLDERS,
    Contents,
    Found,
    Listing,
    TableFile,
    contents_of,
    listing_of,
)
from reports.service.tree import Missing, Names
from shortv.errors import Refused, ShortVError
from shortv.untrusted import parse_json

_UNFINISHED: Final = (
    "This run is not finished: it is being written, or was stopped. What can be downloaded may be only part of it."
)
_PARTIAL: Final = "This run is partial: some {unit} failed. The numbers are over the others."
_UNITS: Final[Mapping[str, str]] = {"sweep": "samples", "campaign": "samples or cells", "training": "samples"}
_MANIFESTS: Final[Mapping[str, type[AnyManifest]]] = {
    kind.KIND: kind for kind in (SweepManifest, CampaignManifest, TrainingManifest)
}
# The folders of one list, and as many other versions of them.
_MAX_SUMMARIES: Final = 2 * MAX_FOLDERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A folder in the list. Without a manifest it is not a run, or not one that this release reads.

    `shape` is the summary as a JSON object. Its headline is empty if the run is not finished: its tables are then
    incomplete, or those of an earlier run.
    """

    names: Names
    shape: Mapping[str, Any]
    manifest: AnyManifest | None = None
    contents: Contents | None = None

    @property
    def problems(self) -> Sequence[str]:
        """What is wrong with the folder, a line each."""
        problems: Sequence[str] = self.shape["problems"]
        return problems


def read_run(files: Files, run: Names) -> AnyManifest:
    """Read the manifest of a run. Raises Missing, or ShortVError with the reason why it cannot be used."""
    name = shown((*run, MANIFEST_NAME))
    value = parse_json(files.text((*run, MANIFEST_NAME)), what=name, limit_bytes=MAX_TEXT_BYTES)
    if not isinstance(value, dict):
        raise Refused(f"{name} is a JSON {type(value).__name__}, not an object")
    manifest = _MANIFESTS.get(str(value.get("kind")))
    if manifest is None:
        raise Refused(f"{name} is of kind {str(value.get('kind'))[:40]!r}, not one of {', '.join(_MANIFESTS)}")
    return manifest.from_json(value, name)


class Summaries:
    """Summarises folders; a run whose files have not changed is not read again."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._known: Cache[Summary] = Cache(_MAX_SUMMARIES)

    def of(self, found: Found) -> Summary:
        """Summarise one folder that a search found; whatever is wrong with it becomes a problem, never an error."""
        if found.reason is not None:
            return _unreadable(found.names, found.reason)
        try:
            listing = listing_of(self._files.tree, found.names, found.entries)
        except OSError as error:
            return _unreadable(found.names, f"it cannot be listed: {why(error)}")
        before, key = self._files.interrupted, (found.names, listing.version)
        make = partial(_summarise, self._files, listing)
        return self._known.get(key, make, modified=listing.modified, lasts=lambda: self._files.interrupted == before)


def _unreadable(names: Names, problem: str) -> Summary:
    return Summary(names=names, shape={"id": shown(names), "state": "unreadable", "problems": [problem]})


def _summarise(files: Files, listing: Listing) -> Summary:
    try:
        return _summary(files, listing, read_run(files, listing.run))
    except Missing:
        return _unreadable(listing.run, "it was removed while it was read")
    except ShortVError as error:
        return _unreadable(listing.run, str(error))
    except Exception as error:  # one folder that nobody foresaw must not take the whole list away
        return _unreadable(listing.run, f"it cannot be read ({type(error).__name__}); look at its {MANIFEST_NAME}")


def _summary(files: Files, listing: Listing, manifest: AnyManifest) -> Summary:
    contents, headline = contents_of(files, listing), Headline({}, ())
    if manifest.state is not State.RUNNING:
        headline = headline_of(files, manifest, contents)
        if headline.problems:
            # A file that failed when its rows were read has another footer now.
            contents = contents_of(files, listing)
    damaged = [*_damaged(contents.tables), *(plan.problem for plan in contents.plans if plan.problem)]
    problems = list(dict.fromkeys([*contents.skipped, *damaged, *headline.problems]))
    shape = _shape(manifest, contents, headline.values, problems)
    json.dumps(shape, allow_nan=False)  # raises ValueError here, and not when the whole list is sent
    return Summary(names=listing.run, shape=shape, manifest=manifest, contents=contents)


def _damaged(tables: Sequence[TableFile]) -> Iterator[str]:
    """Name the files that cannot be used; those of one table with the same reason together."""
    groups: dict[tuple[str, str], list[TableFile]] = {}
    for item in tables:
        if item.reason is not None:
            groups.setdefault((item.table, item.reason), []).append(item)
    for (table, reason), items in groups.items():
        yield f"{len(items)} files of {table}: each {reason}" if len(items) > 1 else str(items[0].problem)


def _shape(
    manifest: AnyManifest, contents: Contents, headline: Mapping[str, Any], problems: Sequence[str]
) -> dict[str, Any]:
    link = link_of(contents.run)
    shape: dict[str, Any] = {"id": shown(contents.run), "state": str(manifest.state), "problems": problems}
    shape |= {"kind": manifest.kind, "finished_run": manifest.state is not State.RUNNING}
    shape |= {"models": _models(manifest), **_choices(manifest), "counts": manifest.counts}
    shape |= {"started": manifest.started, "finished": manifest.finished, "headline": headline}
    for name, page in (("page", PAGE_NAME), ("page_against", AGAINST_NAME)):
        shape[name] = f"{link}{page if page != PAGE_NAME else ''}" if page in contents.pages else None
    shape["manifest"] = f"{link}{MANIFEST_NAME}"
    shape["tables"] = [table.as_json() for table in contents.tables]
    shape["plan_files"] = [f"plans/{plan.name}.json" for plan in contents.plans if plan.problem is None]
    return shape


def _models(manifest: AnyManifest) -> list[str]:
    if isinstance(manifest, CampaignManifest):
        return [str(item["name"]) for item in manifest.models]
    return [manifest.model]


def _choices(manifest: AnyManifest) -> dict[str, list[str]]:
    """Return the modes of a sweep, the plans and tasks of a campaign, or the parts that a training learned."""
    if isinstance(manifest, CampaignManifest):
        plans = list(dict.fromkeys(str(item["name"]) for item in manifest.plans))
        return {"plans": plans, "tasks": [str(item["name"]) for item in manifest.tasks]}
    return {"modes": list(manifest.modes)} if isinstance(manifest, SweepManifest) else {"parts": [manifest.parts]}


def link_of(names: Sequence[str]) -> str:
    """Return the path from the list to a run's page."""
    return f"runs/{'/'.join(quote(name, safe='', errors='replace') for name in names)}/"


def label_of(manifest: AnyManifest) -> str | None:
    """Return what a reader must know first about a run that is not complete."""
    if manifest.state is State.RUNNING:
        return _UNFINISHED
    return _PARTIAL.format(unit=_UNITS[manifest.kind]) if manifest.state is State.PARTIAL else None
