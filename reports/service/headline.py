"""The numbers of a finished run that stand in the list; a table that contradicts the manifest gives none."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from reports.campaign import CampaignManifest
from reports.manifest import Manifest
from reports.page.campaign_data import KINDS, CampaignData, Group, Point
from reports.service.contents import PARTS, PLANS, Contents
from reports.service.files import Files, shown
from reports.service.gaps import campaign_gaps, campaign_tables_missing, sweep_gaps, training_gaps
from reports.service.trees import Missing
from reports.training import TrainingManifest
from shortv.errors import Refused, ShortVError
from shortv.plan import Mode

LOWEST: Final = 5
Rows = list[dict[str, Any]]
_LC, _FULL, _CONTROLS = KINDS[0], KINDS[4], frozenset(KINDS[1:4])
# Sums of the full model's own FLOPs come out at 1 to rounding.
_CHEAPER: Final = 1 - 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """Numbers by name, JSON-like, and what kept others from standing here."""

    values: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[str] = ()


def sweep_headline(files: Files, manifest: Manifest, contents: Contents) -> Headline:
    """Return the noise floor, the layers of lowest LC and the default plan of a sweep."""
    values: dict[str, Any] = {"noise_floor": number(manifest.noise_floor), "kl_direction": manifest.kl_direction}

    def lowest() -> None:
        values["lowest_lc"] = _lowest(manifest, _rows(files, contents, "lc_layers"))

    def plan() -> None:
        name = manifest.details.get("default_plan")
        if any(item.name == name and item.problem is None for item in contents.plans):
            found = files.plan((*contents.run, PLANS, f"{name}.json"))
            chosen = [layer for layer, mode in enumerate(found.modes) if mode is not Mode.FULL]
            values["default_plan"] = {"name": name, "flops_ratio": number(found.flops_ratio), "layers": chosen}

    return Headline(values=values, problems=list(_problems(lowest, plan, lambda: sweep_gaps(manifest, contents))))


def campaign_headline(files: Files, manifest: CampaignManifest, contents: Contents) -> Headline:
    """Return, for each model and task, the metric of the full model and of the best plans that are cheaper."""
    values: dict[str, Any] = {}

    def best() -> None:
        cells, metrics = (_rows(files, contents, name) for name in ("cells", "metrics"))
        said = manifest.counts.get("cells", 0)
        # Plans of the same modes share a cell.
        held = len({row["cell"] for row in cells})
        if said != held:
            raise Refused(f"the manifest counts {said} cells, {shown((*contents.run, 'cells.parquet'))} holds {held}")
        data = CampaignData(manifest=manifest, cells=cells, metrics=metrics, comparisons=(), speed=(), failures=())
        values["best"] = [_best(group) for group in data.groups()]

    def gaps() -> Iterator[str]:
        return campaign_gaps(contents, _rows(files, contents, "cells"))

    return Headline(values=values, problems=list(_problems(best, gaps, lambda: campaign_tables_missing(contents))))


def training_headline(files: Files, manifest: TrainingManifest, contents: Contents) -> Headline:
    """Return the last loss of a training, how long it took, and how many parameters were learned."""
    steps = manifest.counts.get("steps")
    values: dict[str, Any] = {"steps": steps if isinstance(steps, int) else None}

    def numbers() -> None:
        values.update({name: number(manifest.details.get(name)) for name in ("loss", "train_seconds")})

    def parameters() -> None:
        values["learned_parameters"] = _learned_parameters(files, contents)

    found = _problems(numbers, parameters, lambda: training_gaps(manifest, contents))
    return Headline(values=values, problems=list(found))


def _problems(*steps: Callable[[], Iterable[str] | None]) -> Iterator[str]:
    """Take the steps, each of which finds problems; what it raises is one, and its number stays out."""
    for step in steps:
        try:
            yield from step() or ()
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


def _learned_parameters(files: Files, contents: Contents) -> int | None:
    name = (*contents.run, PARTS, "parts.json")
    try:
        header = json.loads(files.text(name))
    except (ValueError, RecursionError) as error:
        raise ShortVError(f"{shown(name)} is not JSON") from error
    found = header.get("parameters") if isinstance(header, dict) else None
    return found if isinstance(found, int) else None


def _best(group: Group) -> dict[str, Any]:
    """The best LC plan stands for itself, the best of the other plans beside it; a control is never one."""
    full = next((point for point in group.points if point.kind == _FULL), None)
    shape: dict[str, Any] = {"model": group.model, "task": group.task, "metric": group.metric}
    shape |= {"full": number(full.value) if full else None}
    shape |= _highest(point for point in group.points if point.kind == _LC)
    other = _highest(point for point in group.points if point.kind not in {_LC, _FULL, *_CONTROLS})
    return shape | ({"other": other} if other else {})


def _highest(points: Iterable[Point]) -> dict[str, Any]:
    """The plan of the highest metric among those cheaper than the full model, at a tie that of the fewest FLOPs.

    More is better, as everywhere on the page.
    """
    found: dict[str, Any] = {}
    for point in points:
        value, ratio = number(point.value), number(point.flops_ratio)
        if value is None or ratio is None or ratio >= _CHEAPER:
            continue
        if not found or (value, -ratio) > (found["value"], -found["flops_ratio"]):
            found = {"plan": point.plan, "value": value, "half_width": number(point.half_width)}
            found |= {"flops_ratio": ratio, "n": point.n, "errors": point.errors}
    return found


def number(value: float | None) -> float | None:
    """Return a number that JSON has, None for any other."""
    return value if value is not None and math.isfinite(value) else None
