"""What a page needs from a campaign folder, checked against itself; 95 % intervals of its metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isfinite, sqrt
from typing import Any, Final, NamedTuple

from reports.manifest import CampaignManifest, State
from reports.page.answers import Exits, Failures, read_answers
from reports.store import Folder
from shortv.errors import Refused
from shortv.plan import Mode, PartsKind

_NORMAL_95: Final = 1.96
# Standard errors closer than this are equal.
_NEAR: Final = 1e-6
WILSON: Final = "Wilson"
CLIPPED: Final = "standard error, within 0 to 1"
NORMAL: Final = "standard error"
_METHODS: Final = {
    WILSON: "Wilson's for scores of 0 and 1",
    CLIPPED: "by the standard error, cut to the range 0 to 1",
    NORMAL: "by the standard error",
}


class Interval(NamedTuple):
    """A 95 % interval and the method that computed it."""

    low: float
    high: float
    method: str


def interval_of(row: Mapping[str, Any]) -> Interval | None:
    """Return the interval of a row of the table of metrics; None if it has no standard error.

    Of n values in 0..1 with mean p, zeros and ones have the largest standard error, sqrt(p (1 - p) / (n - 1)). So the
    row itself shows whether its scores are in that range (the interval is then cut to it), and whether all of them are
    0 or 1 (the interval is then Wilson's, 1927). Clustered scores keep their own standard error.
    """
    clustered, plain, by_limit = (_known(row[name]) for name in ("stderr_clustered", "stderr", "stderr_clt"))
    value, own = _known(row["value"]), by_limit if by_limit is not None else plain
    error = next((found for found in (clustered, plain, by_limit) if found is not None), None)
    if value is None or error is None:
        return None
    most = sqrt(value * (1 - value) / (row["n"] - 1)) if 0 <= value <= 1 and row["n"] > 1 else None
    low, high = value - _NORMAL_95 * error, value + _NORMAL_95 * error
    if own is None or most is None or own > most + _NEAR:
        return Interval(low, high, NORMAL)
    if clustered is None and own > most - _NEAR:
        return _wilson(value, row["n"])
    return Interval(max(low, 0.0), min(high, 1.0), CLIPPED)


def interval_note(methods: Iterable[str]) -> str:
    """Return the note of a chart whose bars are intervals computed by these methods."""
    used = set(methods)
    found = [text for method, text in _METHODS.items() if method in used]
    return f"Bars: 95 % intervals, {' or '.join(found)}." if found else "No interval is known."


def interval_of_difference(value: float, own: Interval, against: float, other: Interval) -> tuple[float, float]:
    """Return the ends of the interval of `value - against`, as of two independent runs (Newcombe 1998, method 10)."""
    difference = value - against
    low, high = hypot(value - own.low, other.high - against), hypot(own.high - value, against - other.low)
    return difference - low, difference + high


def _wilson(share: float, n: int) -> Interval:
    weight = _NORMAL_95**2 / n
    centre = (share + weight / 2) / (1 + weight)
    half = sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0), WILSON)


def _known(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else float(value)


Row = Mapping[str, Any]
MAX_ROWS: Final = 200_000
# What a plan is to the reader, in the order of colours, shapes and legends.
KINDS: Final = [
    *("LC plan", "random control", "first-layers control", "last-layers control", "full model", "other plan"),
    *("one mode in all layers", "exit at a fixed layer", "SAISA", "DyVTE", "EAS"),
]
SYSTEMS: Final[Mapping[str, str]] = {PartsKind.SAISA: KINDS[8], PartsKind.DYVTE: KINDS[9], PartsKind.EAS: KINDS[10]}
# Columns about what was learned for a plan: their names in the table and on the page.
TRAINING: Final = {"learned_parameters": "learned parameters", "train_seconds": "training seconds"}
_LABELS: Final = {"full": KINDS[4], "random": KINDS[1], "first": KINDS[2], "last": KINDS[3]}


class Training:
    """Columns about what was learned for each plan; there are none if no plan has learned parts."""

    def __init__(self, cells: Sequence[Row]) -> None:
        found = {(row["model"], row["plan"]): [row[name] for name in TRAINING] for row in cells}
        self._known = any(value is not None for values in found.values() for value in values)
        self._found = found

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(TRAINING.values()) if self._known else ()

    def values(self, row: Row) -> list[Any]:
        """Return the columns' values for a row that names a model and a plan."""
        return self._found.get((row["model"], row["plan"]), [None] * len(TRAINING)) if self._known else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One plan on one model and task: its main metric with a 95 % interval, and its speed."""

    plan: str
    kind: str
    n: int
    errors: int
    flops_ratio: float | None
    value: float | None
    interval: Interval | None = None
    prefill_ms: float | None = None
    prefill_ratio: float | None = None
    latency_ms: float | None = None
    samples_per_second: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's length."""
        return None if self.interval is None else (self.interval.high - self.interval.low) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All plans of one model on one task, and the metric that they are judged by."""

    model: str
    task: str
    metric: str | None
    points: Sequence[Point]
    comparisons: Sequence[Row]
    training: Training


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignData:
    """A campaign folder: rows of its tables, why samples failed, exit layers, and which answers are missing."""

    manifest: CampaignManifest
    cells: Sequence[Row]
    metrics: Sequence[Row]
    comparisons: Sequence[Row]
    speed: Sequence[Row]
    failures: Sequence[Failures]
    exits: Sequence[Exits] = ()
    problems: Sequence[str] = ()

    def groups(self) -> list[Group]:
        """Return a group for each model and task, in the order of the cells."""
        names = dict.fromkeys((str(row["model"]), str(row["task"])) for row in self.cells)
        return [self._group(model, task) for model, task in names]

    def _group(self, model: str, task: str) -> Group:
        def own(rows: Sequence[Row]) -> list[Row]:
            return [row for row in rows if (row["model"], row["task"]) == (model, task)]

        metrics, speed = own(self.metrics), {row["plan"]: row for row in own(self.speed)}
        named = next((item.get("main_metric") for item in self.manifest.tasks if item.get("name") == task), None)
        metric = named or next((str(row["metric"]) for row in metrics), None)
        # A metric may exist under several filters; the first one is the first of the task's configuration.
        scores = {row["plan"]: row for row in reversed(metrics) if row["metric"] == metric}
        kinds = {item["name"]: kind_of_plan(item) for item in self.manifest.plans if item["model"] == model}
        base = (speed.get("full") or {}).get("prefill_ms_median")
        points = [
            _point(cell, kinds.get(cell["plan"], KINDS[5]), scores.get(cell["plan"]), speed.get(cell["plan"], {}), base)
            for cell in own(self.cells)
        ]
        return Group(
            model=model,
            task=task,
            metric=metric,
            points=points,
            comparisons=own(self.comparisons),
            training=Training(own(self.cells)),
        )


def kind_of_plan(plan: Row) -> str:
    """Return what a plan of the manifest is to the reader: its learned system, its order of layers, or its modes."""
    parts, order = plan.get("parts"), (plan.get("source") or {}).get("order")
    if isinstance(parts, Mapping):
        return SYSTEMS.get(str(parts.get("kind")), KINDS[5])
    if plan["kind"] == "plan" and order == "lc":
        return KINDS[0]
    named = _LABELS.get(str(order if plan["kind"] == "plan" else plan["kind"]))
    return named or _kind_of_modes(plan.get("modes", ()))


def _kind_of_modes(modes: Sequence[str]) -> str:
    if Mode.DROP_VISUAL in modes and set(modes) <= {Mode.FULL, Mode.DROP_VISUAL}:
        return KINDS[7]
    return KINDS[6] if len(set(modes)) == 1 and Mode.FULL not in modes else KINDS[5]


def parts_of_plan(plan: Row) -> str | None:
    """Return the learned parts of a plan of the manifest, such as `DyVTE at 0.5`; None for a plan without."""
    parts = plan.get("parts")
    if not isinstance(parts, Mapping):
        return None
    kind, threshold = str(parts.get("kind")), parts.get("threshold")
    name = SYSTEMS.get(kind, kind)
    return name if threshold is None else f"{name} at {threshold}"


def _point(cell: Row, kind: str, score: Row | None, speed: Row, base_ms: float | None) -> Point:
    own_ms = speed.get("prefill_ms_median")
    return Point(
        plan=cell["plan"],
        kind=kind,
        n=cell["n"],
        errors=cell["errors"],
        flops_ratio=cell["flops_ratio"],
        value=score["value"] if score else None,
        interval=interval_of(score) if score else None,
        prefill_ms=own_ms,
        prefill_ratio=own_ms / base_ms if own_ms is not None and base_ms else None,
        latency_ms=speed.get("latency_ms_median"),
        samples_per_second=speed.get("samples_per_second"),
    )


def read_campaign_data(folder: Folder) -> CampaignData:
    """Read a campaign folder. Raises ShortVError if it is not one, is damaged, or contradicts itself."""
    manifest = CampaignManifest.load(folder)
    finished = manifest.state is not State.RUNNING
    tables = {name: _rows(folder, name, finished) for name in ("cells", "metrics", "comparisons", "speed")}
    if not all(isinstance(plan.get(name), str) for plan in manifest.plans for name in ("kind", "digest")):
        problem = f"the manifest of {folder.shown} lists plans without kind or digest; it was changed by hand"
        raise Refused(f"{problem}: run the campaign again")
    if finished:
        _check(manifest, tables, folder)
    failures, exits, problems = read_answers(folder, manifest, tables["cells"])
    return CampaignData(manifest=manifest, failures=failures, exits=exits, problems=problems, **tables)


def _rows(folder: Folder, name: str, needed: bool) -> list[dict[str, Any]]:
    if folder.exists(f"{name}.parquet"):
        table = folder.read_table(name)
        if len(table) > MAX_ROWS:
            raise Refused(f"{folder.shown}/{name}.parquet has {len(table)} rows, at most {MAX_ROWS} are read")
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows
    if needed:
        raise Refused(f"{folder.shown} has no {name}.parquet although its run has ended; run the campaign again")
    return []


def _check(manifest: CampaignManifest, tables: Mapping[str, Sequence[Row]], folder: Folder) -> None:
    keys = {row["cell"] for row in tables["cells"]}
    declared = manifest.counts.get("cells", 0)
    strange = {row["cell"] for name in ("metrics", "speed") for row in tables[name]} - keys
    if len(keys) != declared or strange:
        raise Refused(
            f"the manifest of {folder.shown} counts {declared} cells, cells.parquet has {len(keys)}, other tables have "
            f"{len(strange)} more; the folder is damaged or being written: run the campaign again"
        )
