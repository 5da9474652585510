"""The numbers of a finished run in the list, and what it should contain by its own count but does not."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from reports.manifest import CampaignManifest, SweepManifest, TrainingManifest
from reports.page.campaign_data import KINDS, CampaignData, Group, Point
from reports.service.files import Files, shown
from reports.service.runs import PARTS, PLANS, Contents
from reports.service.tree import Missing
from shortv.errors import Refused, ShortVError
from shortv.plan import Mode
from shortv.untrusted import parse_json

AnyManifest = SweepManifest | CampaignManifest | TrainingManifest
LOWEST: Final = 5
_LC, _FULL, _CONTROLS = KINDS[0], KINDS[4], frozenset(KINDS[1:4])
# The FLOPs of a plan that computes everything sum up to 1 within rounding.
_CHEAPER: Final = 1 - 1e-9
_SWEEP_TABLES: Final = ("samples", "lc_layers", "errors", "lc_samples")
_CAMPAIGN_TABLES: Final = ("cells", "metrics", "comparisons", "speed")
_IN_PARTS: Final = ("lc_samples",)
_MAX_NAMES: Final = 3


class Headline(NamedTuple):
    """Numbers by name, as in JSON, and the problems that kept others out."""

    values: Mapping[str, Any]
    problems: Sequence[str]


def headline_of(files: Files, manifest: AnyManifest, contents: Contents) -> Headline:
    """Return the headline of a finished run: each step below finds values, or problems that leave them out."""
    finder = _FINDERS[manifest.kind](files, manifest, contents)
    problems: list[str] = []
    for step in finder.steps():
        try:
            problems += step() or ()
        except Missing:  # the contents lack it, which is a problem of its own
            pass
        except ShortVError as error:
            problems.append(str(error))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Lists inside a manifest have no schema; one that was edited may contain anything.
            kind = type(error).__name__
            problems.append(f"the manifest contains what no job writes ({kind}), so there are no numbers")
    return Headline(finder.values, problems)


class _Finder:
    """Finds the headline of one run; a step returns the problems that it found."""

    def __init__(self, files: Files, manifest: Any, contents: Contents) -> None:
        self.values: dict[str, Any] = {}
        self.files = files
        self.manifest = manifest
        self.contents = contents

    def steps(self) -> Sequence[Callable[[], Iterable[str] | None]]:
        raise NotImplementedError

    def count(self, name: str) -> int:
        """Return a count of the manifest, 0 if it has none."""
        found: int = self.manifest.counts.get(name, 0)
        return found

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Read a table that has no problem. Raises Missing or ShortVError."""
        for item in self.contents.tables:
            if item.table == table and item.part is None and item.problem is None:
                return self.files.rows(item.names, table)
        raise Missing

    def missing(self, tables: Sequence[str]) -> Iterator[str]:
        """Name those of the tables that do not exist."""
        found = {item.table for item in self.contents.tables}
        absent = [table for table in tables if table not in found]
        if absent:
            names = (f"{table}/*.parquet" if table in _IN_PARTS else f"{table}.parquet" for table in absent)
            yield f"{', '.join(names)} {'is' if len(absent) == 1 else 'are'} missing although the run has ended"

    def other_count(self, table: str, wanted: int, declared: str) -> Iterator[str]:
        """Compare the rows of a table with the manifest."""
        found = self.contents.rows(table)
        if found is not None and found != wanted:
            name = table if table in _IN_PARTS else f"{table}.parquet"
            yield f"the manifest {declared}, {shown((*self.contents.run, name))} has {found} rows"


class _Sweep(_Finder):
    """The noise floor, the layers of lowest LC and the default plan of a sweep."""

    def steps(self) -> Sequence[Callable[[], Iterable[str] | None]]:
        return self.floor, self.lowest, self.plan, lambda: self.missing(_SWEEP_TABLES), self.gaps

    def floor(self) -> None:
        self.values.update(noise_floor=self.manifest.noise_floor, kl_direction=str(self.manifest.kl_direction))

    def lowest(self) -> None:
        rows, layers = self.rows("lc_layers"), self.manifest.num_layers
        modes = dict.fromkeys(str(row["mode"]) for row in rows)
        pairs = {(row["mode"], row["layer"]) for row in rows if 0 <= row["layer"] < layers}
        if not len(pairs) == len(rows) == len(modes) * layers or not modes.keys() <= set(self.manifest.modes):
            raise Refused("lc_layers.parquet does not have each layer once for each mode of the manifest")
        # The default plan is made for this mode.
        mode = str(Mode.FREEZE_VISUAL) if Mode.FREEZE_VISUAL in modes else next(iter(modes), None)
        ranked = sorted((row for row in rows if row["mode"] == mode), key=lambda row: int(row["rank"]))
        lowest = [{"layer": row["layer"], "lc": number(row["mean"])} for row in ranked[:LOWEST]]
        self.values["lowest_lc"] = {"mode": mode, "layers": lowest}

    def plan(self) -> None:
        name = self.manifest.details.get("default_plan")
        if any(item.name == name and item.problem is None for item in self.contents.plans):
            found = self.files.plan((*self.contents.run, PLANS, f"{name}.json"))
            chosen = [layer for layer, mode in enumerate(found.modes) if mode is not Mode.FULL]
            self.values["default_plan"] = {"name": name, "flops_ratio": number(found.flops_ratio), "layers": chosen}

    def gaps(self) -> Iterator[str]:
        used, modes, layers = self.count("used"), len(self.manifest.modes), self.manifest.num_layers
        yield from self.other_count("samples", used, f"counts {used} used")
        yield from self.other_count("errors", self.count("errors"), f"counts {self.count('errors')} errors")
        declared = f"counts {used} samples x {modes} modes x {layers} layers"
        yield from self.other_count("lc_samples", used * modes * layers, declared)


class _Campaign(_Finder):
    """For each model and task the metric of the full model and of the best plans that are cheaper."""

    def steps(self) -> Sequence[Callable[[], Iterable[str] | None]]:
        return self.best, self.gaps, lambda: self.missing(_CAMPAIGN_TABLES)

    def best(self) -> None:
        cells, metrics = self.rows("cells"), self.rows("metrics")
        # Plans of the same modes share a cell.
        found, declared = len({row["cell"] for row in cells}), self.count("cells")
        if declared != found:
            name = shown((*self.contents.run, "cells.parquet"))
            raise Refused(f"the manifest counts {declared} cells, {name} has {found}")
        data = CampaignData(manifest=self.manifest, cells=cells, metrics=metrics, comparisons=(), speed=(), failures=())
        self.values["best"] = [_best(group) for group in data.groups()]

    def gaps(self) -> Iterator[str]:
        """Compare the answers with the cells; a cell that failed may have none."""
        answers = {item.part: item for item in self.contents.parts("answers")}
        absent: list[str] = []
        short: list[str] = []
        for cell in self.rows("cells"):
            file = answers.get(f"{cell['cell']}.parquet")
            if cell["same_as"] is not None or cell["state"] == "failed":
                continue
            name = f"{cell['model']} {cell['plan']} {cell['task']}"
            if file is None:
                absent.append(name)
            elif file.rows is not None and file.rows != cell["n"]:
                short.append(f"{name} has {file.rows} of {cell['n']}")
        if absent:
            yield f"the answers of {_counted(absent)} are missing although the run has ended: {_first(absent)}"
        if short:
            yield f"the answers of {_counted(short)} are not as many as its samples: {_first(short)}"


class _Training(_Finder):
    """The last loss of a training, how long it took, and how many parameters were learned."""

    def steps(self) -> Sequence[Callable[[], Iterable[str] | None]]:
        return self.numbers, self.parameters, self.gaps

    def numbers(self) -> None:
        self.values["steps"] = self.count("steps")
        self.values.update({name: number(self.manifest.details.get(name)) for name in ("loss", "train_seconds")})

    def parameters(self) -> None:
        name = (*self.contents.run, PARTS, "parts.json")
        header = parse_json(self.files.text(name), what=shown(name))
        found = header.get("parameters") if isinstance(header, dict) else None
        self.values["learned_parameters"] = found if isinstance(found, int) else None

    def gaps(self) -> Iterator[str]:
        steps, errors = self.count("steps"), self.count("errors")
        yield from self.missing(("training", "errors") if errors else ("training",))
        yield from self.other_count("training", steps, f"counts {steps} steps")
        yield from self.other_count("errors", errors, f"counts {errors} errors")


_FINDERS: Final[Mapping[str, type[_Finder]]] = {"sweep": _Sweep, "campaign": _Campaign, "training": _Training}


def _counted(cells: Sequence[str]) -> str:
    return f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}"


def _first(cells: Sequence[str]) -> str:
    more = f" and {len(cells) - _MAX_NAMES} more" if len(cells) > _MAX_NAMES else ""
    return ", ".join(cells[:_MAX_NAMES]) + more


def _best(group: Group) -> dict[str, Any]:
    """Return the best plan of LC and the best of the other plans; a control is never one of them."""
    full = next((point for point in group.points if point.kind == _FULL), None)
    shape: dict[str, Any] = {"model": group.model, "task": group.task, "metric": group.metric}
    shape |= {"full": number(full.value) if full else None}
    shape |= _highest(point for point in group.points if point.kind == _LC)
    other = _highest(point for point in group.points if point.kind not in {_LC, _FULL, *_CONTROLS})
    return shape | ({"other": other} if other else {})


def _highest(points: Iterable[Point]) -> dict[str, Any]:
    """Return the plan of the highest metric among those cheaper than the full model; at a tie the cheapest."""
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
