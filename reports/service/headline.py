"""The numbers of a finished run that stand in the list; a table that contradicts the manifest gives none."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from reports.campaign import CampaignManifest
from reports.manifest import Manifest
from reports.page.campaign_data import KINDS, CampaignData, Group
from reports.service.contents import PLANS, Contents
from reports.service.files import Files, shown
from reports.service.trees import Missing
from shortv.errors import Refused, ShortVError
from shortv.plan import Mode, Plan
from shortv.planfile import parse_plan

LOWEST: Final = 5
Rows = list[dict[str, Any]]
_OF_LC: Final = (KINDS[0], KINDS[5])


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """Numbers by name, JSON-like, and what kept others from standing here."""

    values: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[str] = ()


def sweep_headline(files: Files, manifest: Manifest, contents: Contents) -> Headline:
    """Return the noise floor, the layers of lowest LC and the default plan of a sweep."""
    values: dict[str, Any] = {"noise_floor": number(manifest.noise_floor), "kl_direction": manifest.kl_direction}
    problems: list[str] = []
    with_rows = {item.table: item for item in contents.tables if item.part is None}
    for table, count in (("samples", "used"), ("errors", "errors")):
        held = with_rows[table].rows if table in with_rows else None
        said = manifest.counts.get(count, 0)
        if held is not None and held != said:
            problems.append(f"the manifest counts {said} {count}, {shown(with_rows[table].names)} holds {held} rows")

    def lowest() -> None:
        values["lowest_lc"] = _lowest(manifest, _rows(files, contents, "lc_layers"))

    def plan() -> None:
        name = manifest.details.get("default_plan")
        for each in contents.plans:
            found = _plan(files, contents, each)
            if each == name:
                chosen = [layer for layer, mode in enumerate(found.modes) if mode is not Mode.FULL]
                values["default_plan"] = {"name": name, "flops_ratio": number(found.flops_ratio), "layers": chosen}

    problems += [problem for step in (lowest, plan) for problem in _problems(step)]
    problems += [f"{table}.parquet is missing although the run has ended" for table in _missing(contents, _SWEEP)]
    return Headline(values=values, problems=problems)


def campaign_headline(files: Files, manifest: CampaignManifest, contents: Contents) -> Headline:
    """Return, for each model and task, the full model's metric and that of the best plan made by LC."""
    values: dict[str, Any] = {}

    def best() -> None:
        tables = {name: _rows(files, contents, name) for name in ("cells", "metrics")}
        said = manifest.counts.get("cells", 0)
        # Plans of the same modes share a cell.
        held = len({row["cell"] for row in tables["cells"]})
        if said != held:
            raise Refused(f"the manifest counts {said} cells, {shown((*contents.run, 'cells.parquet'))} holds {held}")
        data = CampaignData(manifest=manifest, comparisons=(), speed=(), failures=(), exits=(), **tables)
        values["best"] = [_best(group) for group in data.groups()]

    problems = list(_problems(best))
    problems += [f"{table}.parquet is missing although the run has ended" for table in _missing(contents, _CAMPAIGN)]
    return Headline(values=values, problems=problems)


_SWEEP: Final = ("samples", "lc_layers", "errors")
_CAMPAIGN: Final = ("cells", "metrics", "comparisons", "speed")


def _missing(contents: Contents, tables: Sequence[str]) -> Iterator[str]:
    there = {item.table for item in contents.tables}
    return (table for table in tables if table not in there)


def _problems(step: Callable[[], None]) -> Iterator[str]:
    """Take one step; what it raises is a problem, and its number stays out."""
    try:
        step()
    except Missing:  # named by its absence from the contents
        pass
    except ShortVError as error:
        yield str(error)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Lists inside a manifest have no schema; what was written by hand may lack anything.
        yield f"the manifest holds what no job writes ({type(error).__name__}), so there are no numbers"


def _rows(files: Files, contents: Contents, table: str) -> Rows:
    """Read a table that is listed without a problem; of one with a problem the list says why."""
    for item in contents.tables:
        if item.table == table and item.part is None and item.problem is None:
            return files.rows(item.names, table)
    raise Missing


def _lowest(manifest: Manifest, rows: Rows) -> dict[str, Any]:
    found = {(row["mode"], row["layer"]) for row in rows}
    modes = dict.fromkeys(str(row["mode"]) for row in rows)
    wanted = {(mode, layer) for mode in modes for layer in range(manifest.num_layers)}
    if len(found) != len(rows) or found != wanted or not modes.keys() <= set(manifest.modes):
        raise Refused("lc_layers.parquet does not hold each layer once for each mode of the manifest")
    # The mode that the default plan is made for.
    mode = str(Mode.FREEZE_VISUAL) if Mode.FREEZE_VISUAL in modes else next(iter(modes), None)
    ranked = sorted((row for row in rows if row["mode"] == mode), key=lambda row: int(row["rank"]))
    return {"mode": mode, "layers": [{"layer": row["layer"], "lc": number(row["mean"])} for row in ranked[:LOWEST]]}


def _plan(files: Files, contents: Contents, name: str) -> Plan:
    names = (*contents.run, PLANS, f"{name}.json")
    try:
        return parse_plan(files.text(names).decode(errors="replace"))
    except Missing as error:
        raise Refused(f"{shown(names)} is no regular file") from error
    except Refused as error:
        raise Refused(f"{shown(names)}: {error}") from error


def _best(group: Group) -> dict[str, Any]:
    """The plan of the highest metric, as everywhere on the page: more is better."""
    full = next((point for point in group.points if point.kind == KINDS[4]), None)
    plans = [point for point in group.points if point.kind in _OF_LC and number(point.value) is not None]
    best = max(plans, key=lambda point: point.value or 0.0, default=None)
    shape: dict[str, Any] = {"model": group.model, "task": group.task, "metric": group.metric}
    shape |= {"full": number(full.value) if full else None}
    if best is not None:
        shape |= {"plan": best.plan, "value": number(best.value), "half_width": number(best.half_width)}
        shape |= {"flops_ratio": number(best.flops_ratio), "n": best.n, "errors": best.errors}
    return shape


def number(value: float | None) -> float | None:
    """Return a number that JSON has, None for any other."""
    return value if value is not None and math.isfinite(value) else None
