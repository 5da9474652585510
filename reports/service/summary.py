"""One run in the list: what it is, how far it got, its headline numbers, and what is wrong with it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from reports.campaign import CampaignManifest
from reports.manifest import MANIFEST_NAME, Manifest, State
from reports.page import PAGE_NAME
from reports.service.contents import AGAINST_NAME, Contents, Listing, TableFile, contents_of, listing_of
from reports.service.files import Files, shown, why
from reports.service.finding import MOST_FOLDERS, Found
from reports.service.headline import Headline, campaign_headline, sweep_headline, training_headline
from reports.service.memory import Memory
from reports.service.trees import Missing, Names
from reports.training import TrainingManifest
from shortv.errors import Refused, ShortVError

AnyManifest = Manifest | CampaignManifest | TrainingManifest
# All that one list shows, and as many versions again.
_MOST: Final = 2 * MOST_FOLDERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A folder in the list; without a manifest it is no run, or none that this release reads: `problems` say why.

    `headline` is empty for a run that is not finished: what its tables say then is some of it, or of an earlier one.
    """

    names: Names
    manifest: AnyManifest | None = None
    contents: Contents | None = None
    headline: Headline = field(default_factory=Headline)
    problems: Sequence[str] = ()

    @property
    def run_id(self) -> str:
        """The run's path below the root."""
        return shown(self.names)

    @property
    def state(self) -> str:
        """running, complete or partial; unreadable where the manifest does not say."""
        return str(self.manifest.state) if self.manifest is not None else "unreadable"


def read_run(files: Files, run: Names) -> AnyManifest:
    """Read the manifest of a run. Raises Missing, or ShortVError with the reason why it cannot be used."""
    name = shown((*run, MANIFEST_NAME))
    try:
        value = json.loads(files.text((*run, MANIFEST_NAME)))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name} is not JSON, perhaps it was cut off ({error})") from error
    if not isinstance(value, dict):
        raise Refused(f"{name} holds a JSON {type(value).__name__}, not an object")
    if value.get("kind") == "campaign":
        campaign = CampaignManifest.from_json(value, name)
        for item in (*campaign.models, *campaign.plans, *campaign.tasks):
            if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
                raise Refused(f"{name} has a model, plan or task without a name")
        return campaign
    if value.get("kind") == "sweep":
        return Manifest.from_json(value, name)
    if value.get("kind") == "training":
        return TrainingManifest.from_json(value, name)
    raise Refused(f"{name} is of kind {value.get('kind')!r}, not 'sweep', 'campaign' or 'training'")


class Summaries:
    """Looks at runs; one whose files are as they were is not looked at again."""

    def __init__(self, files: Files) -> None:
        """Look at runs of these files."""
        self._files = files
        self._known: Memory[Summary] = Memory(_MOST)

    def of(self, found: Found) -> Summary:
        """Look at one folder that a search found; whatever is wrong with it is in the summary, never raised."""
        if found.reason is not None:
            return Summary(names=found.names, problems=(found.reason,))
        try:
            listing = listing_of(self._files.tree, found.names, found.entries)
        except OSError as error:
            return Summary(names=found.names, problems=(f"it cannot be listed: {why(error)}",))
        before, key = self._files.interrupted, (found.names, listing.version)
        make = partial(_summarise, self._files, listing)
        return self._known.recall(key, make, modified=listing.modified, lasts=lambda: self._files.interrupted == before)


def _summarise(files: Files, listing: Listing) -> Summary:
    run = listing.run
    try:
        manifest = read_run(files, run)
    except Missing:
        return Summary(names=run, problems=("it vanished while it was read",))
    except ShortVError as error:
        return Summary(names=run, problems=(str(error),))
    contents = contents_of(files, listing)
    headline = _headline(files, manifest, contents)
    if headline.problems:
        # What failed when it was read has another footer now.
        contents = contents_of(files, listing)
    damaged = [*_damaged(contents.tables), *(plan.problem for plan in contents.plans if plan.problem)]
    problems = tuple(dict.fromkeys([*damaged, *headline.problems]))
    return Summary(names=run, manifest=manifest, contents=contents, headline=headline, problems=problems)


def _damaged(tables: Sequence[TableFile]) -> Iterator[str]:
    """Name the files that cannot be used; those of one table for one reason together."""
    groups: dict[tuple[str, str], list[TableFile]] = {}
    for item in tables:
        if item.reason is not None:
            groups.setdefault((item.table, item.reason), []).append(item)
    for (table, reason), items in groups.items():
        yield f"{len(items)} files of {table}: each {reason}" if len(items) > 1 else str(items[0].problem)


def _headline(files: Files, manifest: AnyManifest, contents: Contents) -> Headline:
    if manifest.state is State.RUNNING:
        return Headline()
    if isinstance(manifest, Manifest):
        return sweep_headline(files, manifest, contents)
    if isinstance(manifest, TrainingManifest):
        return training_headline(files, manifest, contents)
    return campaign_headline(files, manifest, contents)


def as_json(summary: Summary, link: str) -> dict[str, Any]:
    """Return a summary as a JSON object; `link` is the way to the run's page, with a slash at its end."""
    manifest, contents = summary.manifest, summary.contents
    shape: dict[str, Any] = {"id": summary.run_id, "state": summary.state, "problems": list(summary.problems)}
    if manifest is None or contents is None:
        return shape
    counts = {name: count for name, count in manifest.counts.items() if isinstance(count, int)}
    shape |= {"kind": manifest.kind, "finished_run": manifest.state is not State.RUNNING}
    shape |= {"models": models(manifest), **choices(manifest), "counts": counts}
    shape |= {"started": manifest.started, "finished": manifest.finished, "headline": summary.headline.values}
    for name, page in (("page", PAGE_NAME), ("page_against", AGAINST_NAME)):
        shape[name] = f"{link}{page if page != PAGE_NAME else ''}" if page in contents.pages else None
    shape["manifest"] = f"{link}{MANIFEST_NAME}"
    shape["tables"] = [table.as_json() for table in contents.tables]
    shape["plan_files"] = [f"plans/{plan.name}.json" for plan in contents.plans if plan.problem is None]
    return shape


def models(manifest: AnyManifest) -> list[str]:
    """Return the names of the models of a run."""
    if isinstance(manifest, CampaignManifest):
        return [str(item.get("name")) for item in manifest.models]
    return [manifest.model]


def choices(manifest: AnyManifest) -> dict[str, list[str]]:
    """Return what was tried: the modes of a sweep, the plans and tasks of a campaign, the parts that were learned."""
    if isinstance(manifest, Manifest):
        return {"modes": list(manifest.modes)}
    if isinstance(manifest, TrainingManifest):
        return {"parts": [manifest.parts]}
    plans = list(dict.fromkeys(str(item.get("name")) for item in manifest.plans))
    return {"plans": plans, "tasks": [str(item.get("name")) for item in manifest.tasks]}
