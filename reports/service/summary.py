"""One run in the list: what it is, how far it got, its headline numbers, and what is wrong with it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.campaign import CampaignManifest
from reports.manifest import MANIFEST_NAME, Manifest, State
from reports.service.contents import Contents, contents_of
from reports.service.files import Files, shown, why
from reports.service.finding import Found
from reports.service.headline import Headline, campaign_headline, sweep_headline
from reports.service.trees import Missing, Names
from shortv.errors import Refused, ShortVError

AnyManifest = Manifest | CampaignManifest


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
    raise Refused(f"{name} is of kind {value.get('kind')!r}, neither 'sweep' nor 'campaign'")


def summarise(files: Files, found: Found) -> Summary:
    """Look at one folder that a search found; whatever is wrong with it is in the summary, never raised."""
    if found.reason is not None:
        return Summary(names=found.names, problems=(found.reason,))
    try:
        manifest = read_run(files, found.names)
        contents = contents_of(files, found.names, found.entries)
    except Missing:
        return Summary(names=found.names, problems=("it vanished while it was read",))
    except ShortVError as error:
        return Summary(names=found.names, problems=(str(error),))
    except OSError as error:
        return Summary(names=found.names, problems=(f"it cannot be listed: {why(error)}",))
    headline = _headline(files, manifest, contents)
    damaged = [table.problem for table in contents.tables if table.problem]
    problems = tuple(dict.fromkeys([*damaged, *headline.problems]))
    return Summary(names=found.names, manifest=manifest, contents=contents, headline=headline, problems=problems)


def _headline(files: Files, manifest: AnyManifest, contents: Contents) -> Headline:
    if manifest.state is State.RUNNING:
        return Headline()
    if isinstance(manifest, Manifest):
        return sweep_headline(files, manifest, contents)
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
    shape["page"] = link if contents.has_page else None
    shape["manifest"] = f"{link}{MANIFEST_NAME}"
    shape["tables"] = [table.as_json() for table in contents.tables]
    shape["plan_files"] = [f"plans/{name}.json" for name in contents.plans]
    return shape


def models(manifest: AnyManifest) -> list[str]:
    """Return the names of the models of a run."""
    if isinstance(manifest, Manifest):
        return [manifest.model]
    return [str(item.get("name")) for item in manifest.models]


def choices(manifest: AnyManifest) -> dict[str, list[str]]:
    """Return what was tried: the modes of a sweep, the plans and tasks of a campaign."""
    if isinstance(manifest, Manifest):
        return {"modes": list(manifest.modes)}
    plans = list(dict.fromkeys(str(item.get("name")) for item in manifest.plans))
    return {"plans": plans, "tasks": [str(item.get("name")) for item in manifest.tasks]}
