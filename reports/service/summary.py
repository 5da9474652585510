"""One folder in the list: what it is, how far it got, its main numbers, and what is wrong with it."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from reports.manifest import MANIFEST_NAME, CampaignManifest, State, SweepManifest, TrainingManifest
from reports.page import PAGE_NAME
from reports.page.campaign_data import KINDS, CampaignData, Group, with_interval
from reports.page.document import Row
from reports.service.files import MAX_TEXT_BYTES, Cache, Files, shown, why
from reports.service.runs import (
    AGAINST_NAME,
    MAX_FOLDERS,
    PARTS,
    PLANS,
    Contents,
    Found,
    Listing,
    contents_of,
    listing_of,
)
from reports.service.tree import Missing, Names
from shortv.errors import Refused, ShortVError
from shortv.plan import Mode
from shortv.untrusted import parse_json

AnyManifest = SweepManifest | CampaignManifest | TrainingManifest
LOWEST: Final = 5
_MANIFESTS: Final[Mapping[str, type[AnyManifest]]] = {
    kind.KIND: kind for kind in (SweepManifest, CampaignManifest, TrainingManifest)
}
_UNFINISHED: Final = (
    "This run is not finished: it is being written, or was stopped. What can be downloaded may be only part of it."
)
_UNITS: Final = {"sweep": "samples", "campaign": "samples or cells", "training": "samples"}
_LC, _FULL, _CONTROLS = KINDS[0], KINDS[4], frozenset(KINDS[1:4])
# The FLOPs of a plan that computes everything sum up to 1 within rounding.
_CHEAPER: Final = 1 - 1e-9
_IN_PARTS: Final = ("lc_samples", "answers")
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


class Summaries:
    """Summarises folders; a run whose files have not changed is not read again."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._known: Cache[Summary] = Cache(_MAX_SUMMARIES)

    def of(self, found: Found) -> Summary:
        """Return the summary of a folder."""
        if found.reason is not None:
            return _unreadable(found.names, found.reason)
        try:
            listing = listing_of(self._files.tree, found.names, found.entries)
        except OSError as error:
            return _unreadable(found.names, f"it cannot be listed: {why(error)}")
        key, interrupted = (found.names, listing.version), self._files.interrupted
        summary = self._known.get(key)
        if summary is None:
            summary = _read(self._files, listing)
            if self._files.interrupted == interrupted:
                self._known.put(key, summary, modified=listing.modified)
        return summary


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


def link_of(names: Names) -> str:
    """Return the path from the list to a run's page."""
    return f"runs/{'/'.join(quote(name, safe='', errors='replace') for name in names)}/"


def label_of(manifest: AnyManifest) -> str | None:
    """Return what a reader must know first about a run that is not complete."""
    if manifest.state is State.PARTIAL:
        return f"This run is partial: some {_UNITS[manifest.kind]} failed. The numbers are over the others."
    return _UNFINISHED if manifest.state is State.RUNNING else None


def _unreadable(names: Names, problem: str) -> Summary:
    return Summary(names=names, shape={"id": shown(names), "state": "unreadable", "problems": [problem]})


def _read(files: Files, listing: Listing) -> Summary:
    try:
        manifest = read_run(files, listing.run)
        contents, headline = contents_of(files, listing), {}
        lacking: list[str] = []
        if manifest.state is not State.RUNNING:
            finished = _Finished(files, manifest, contents)
            headline, lacking = finished.values, finished.problems
            if lacking:
                # A file that failed when its rows were read has another footer now.
                contents = contents_of(files, listing)
        problems = list(dict.fromkeys([*contents.problems(), *lacking]))
        shape = _shape(manifest, contents, headline, problems)
        json.dumps(shape, allow_nan=False)  # raises ValueError here, and not when the whole list is sent
        return Summary(names=listing.run, shape=shape, manifest=manifest, contents=contents)
    except Missing:
        return _unreadable(listing.run, "it was removed while it was read")
    except ShortVError as error:
        return _unreadable(listing.run, str(error))
    except Exception as error:  # one folder that nobody foresaw must not take the whole list away
        return _unreadable(listing.run, f"it cannot be read ({type(error).__name__}); look at its {MANIFEST_NAME}")


def _shape(
    manifest: AnyManifest, contents: Contents, headline: Mapping[str, Any], problems: Sequence[str]
) -> dict[str, Any]:
    link = link_of(contents.run)
    about: dict[str, Any]
    if isinstance(manifest, CampaignManifest):
        plans = list(dict.fromkeys(str(item["name"]) for item in manifest.plans))
        about = {"models": [item["name"] for item in manifest.models], "plans": plans}
        about["tasks"] = [item["name"] for item in manifest.tasks]
    elif isinstance(manifest, SweepManifest):
        about = {"models": [manifest.model], "modes": list(manifest.modes)}
    else:
        about = {"models": [manifest.model], "parts": [manifest.parts]}
    return {
        "id": shown(contents.run),
        "state": str(manifest.state),
        "problems": problems,
        "kind": manifest.kind,
        "finished_run": manifest.state is not State.RUNNING,
        **about,
        "counts": manifest.counts,
        "started": manifest.started,
        "finished": manifest.finished,
        "headline": headline,
        "page": link if PAGE_NAME in contents.pages else None,
        "page_against": f"{link}{AGAINST_NAME}" if AGAINST_NAME in contents.pages else None,
        "manifest": f"{link}{MANIFEST_NAME}",
        "tables": [table.as_json() for table in contents.tables],
        "plan_files": [f"{PLANS}/{plan.name}.json" for plan in contents.plans if plan.problem is None],
    }


class _Finished:
    """The numbers of a finished run by name, as in JSON, and what it should contain by its own count but does not."""

    def __init__(self, files: Files, manifest: AnyManifest, contents: Contents) -> None:
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []
        self._files = files
        self._contents = contents
        self._counts = manifest.counts
        if isinstance(manifest, SweepManifest):
            self._sweep(manifest)
        elif isinstance(manifest, CampaignManifest):
            self._campaign(manifest)
        else:
            self._training(manifest)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Note what keeps the block from finding its number."""
        try:
            yield
        except Missing:  # a problem that `_expect` names
            pass
        except ShortVError as error:
            self.problems.append(str(error))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Lists inside a manifest have no schema; one that was edited may contain anything.
            kind = type(error).__name__
            self.problems.append(f"the manifest contains what no job writes ({kind}), so there are no numbers")

    def _sweep(self, manifest: SweepManifest) -> None:
        """Find the noise floor, the layers of lowest LC and the default plan."""
        self.values.update(noise_floor=manifest.noise_floor, kl_direction=str(manifest.kl_direction))
        modes, layers = manifest.modes, manifest.num_layers
        with self._noting():
            rows = self._rows("lc_layers")
            found = dict.fromkeys(str(row["mode"]) for row in rows)
            pairs = {(row["mode"], row["layer"]) for row in rows if 0 <= row["layer"] < layers}
            if not len(pairs) == len(rows) == len(found) * layers or not found.keys() <= set(modes):
                raise Refused("lc_layers.parquet does not have each layer once for each mode of the manifest")
            # The default plan is made for this mode.
            mode = str(Mode.FREEZE_VISUAL) if Mode.FREEZE_VISUAL in found else next(iter(found), None)
            ranked = sorted((row for row in rows if row["mode"] == mode), key=lambda row: int(row["rank"]))
            lowest = [{"layer": row["layer"], "lc": _number(row["mean"])} for row in ranked[:LOWEST]]
            self.values["lowest_lc"] = {"mode": mode, "layers": lowest}
        with self._noting():
            name = manifest.details.get("default_plan")
            if any(plan.name == name and plan.problem is None for plan in self._contents.plans):
                plan = self._files.plan((*self._contents.run, PLANS, f"{name}.json"))
                changed = [layer for layer, mode in enumerate(plan.modes) if mode is not Mode.FULL]
                shape = {"name": name, "flops_ratio": _number(plan.flops_ratio), "layers": changed}
                self.values["default_plan"] = shape
        used = self._count("used")
        self._expect(samples=used, lc_layers=None, errors=self._count("errors"), lc_samples=used * len(modes) * layers)

    def _campaign(self, manifest: CampaignManifest) -> None:
        """Find for each model and task the metric of the full model and of the best plans that are cheaper."""
        with self._noting():
            cells, metrics = self._rows("cells"), self._rows("metrics")
            # Plans of the same modes share a cell.
            found, declared = len({row["cell"] for row in cells}), self._count("cells")
            if declared != found:
                raise Refused(f"the manifest counts {declared} cells, {self._shown('cells.parquet')} has {found}")
            data = CampaignData(manifest=manifest, cells=cells, metrics=[with_interval(row) for row in metrics])
            self.values["best"] = [_best(group) for group in data.groups()]
        with self._noting():
            self._expect_answers(self._rows("cells"))
        self._expect(cells=None, metrics=None, comparisons=None, speed=None)

    def _training(self, manifest: TrainingManifest) -> None:
        """Find the last loss of a training, how long it took, and how many parameters were learned."""
        steps, errors = self._count("steps"), self._count("errors")
        self.values["steps"] = steps
        with self._noting():
            self.values.update({name: _number(manifest.details.get(name)) for name in ("loss", "train_seconds")})
        with self._noting():
            name = (*self._contents.run, PARTS, "parts.json")
            header = parse_json(self._files.text(name), what=shown(name))
            found = header.get("parameters") if isinstance(header, dict) else None
            self.values["learned_parameters"] = found if isinstance(found, int) else None
        # A training without errors has no file of them.
        listed = errors or any(file.table == "errors" for file in self._contents.tables)
        self._expect(training=steps, **{"errors": errors} if listed else {})

    def _count(self, name: str) -> int:
        return self._counts.get(name, 0)

    def _shown(self, name: str) -> str:
        return shown((*self._contents.run, name))

    def _rows(self, table: str) -> list[dict[str, Any]]:
        """Read a table that has no problem. Raises Missing or ShortVError."""
        for item in self._contents.tables:
            if item.table == table and item.part is None and item.reason is None:
                return self._files.rows(item.names, table)
        raise Missing

    def _expect(self, **rows: int | None) -> None:
        """Name the tables that do not exist, and those that have other numbers of rows."""
        found = {item.table for item in self._contents.tables}
        files = {table: f"{table}/*.parquet" if table in _IN_PARTS else f"{table}.parquet" for table in rows}
        absent = [files[table] for table in rows if table not in found]
        if absent:
            verb = "is" if len(absent) == 1 else "are"
            self.problems.append(f"{', '.join(absent)} {verb} missing although the run has ended")
        for table, wanted in rows.items():
            count = self._contents.rows(table)
            if None not in (count, wanted) and count != wanted:
                there = f"{self._shown(files[table])} has {count} rows"
                self.problems.append(f"{there}, and {wanted} by the counts of the manifest")

    def _expect_answers(self, cells: Iterable[Mapping[str, Any]]) -> None:
        """Compare the number of answers with that of the cells; a cell that failed may have none."""
        wanted = {cell["cell"]: cell["n"] for cell in cells if cell["same_as"] is None and cell["state"] != "failed"}
        rows, samples = self._contents.rows("answers"), sum(wanted.values())
        if samples:
            self._expect(answers=None)
        # A document that was answered again has a row in two parts.
        if rows is not None and rows < samples:
            there = f"{self._shown('answers/*.parquet')} has {rows} rows"
            self.problems.append(f"{there}, and the cells have {samples} samples: run the campaign again")


def _best(group: Group) -> dict[str, Any]:
    """Return the best plan of LC and the best of the other plans; a control is never one of them."""
    full = next((point for point in group.points if point["kind"] == _FULL), None)
    shape: dict[str, Any] = {"model": group.model, "task": group.task, "metric": group.metric}
    shape |= {"full": _number(full["value"]) if full else None}
    shape |= _highest(point for point in group.points if point["kind"] == _LC)
    other = _highest(point for point in group.points if point["kind"] not in {_LC, _FULL, *_CONTROLS})
    return shape | ({"other": other} if other else {})


def _highest(points: Iterable[Row]) -> dict[str, Any]:
    """Return the plan of the highest metric among those cheaper than the full model; at a tie the cheapest."""
    found: dict[str, Any] = {}
    for point in points:
        value, ratio = _number(point["value"]), _number(point["flops_ratio"])
        if value is None or ratio is None or ratio >= _CHEAPER:
            continue
        if not found or (value, -ratio) > (found["value"], -found["flops_ratio"]):
            half_width = None if point["low"] is None else _number((point["high"] - point["low"]) / 2)
            found = {"plan": point["plan"], "value": value, "half_width": half_width}
            found |= {"flops_ratio": ratio, "n": point["n"], "errors": point["errors"]}
    return found


def _number(value: float | None) -> float | None:
    """Return a number that JSON has, None for any other."""
    return value if value is not None and math.isfinite(value) else None
