"""What a page needs from a campaign folder, checked against itself: points of charts and intervals."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot, isfinite, sqrt
from typing import Any, Final, NamedTuple

from reports.manifest import CampaignManifest, State
from reports.page.answered import Answered, read_answered
from reports.page.changed import Changed, read_changed
from reports.page.document import Row
from reports.page.ran import result_rows
from reports.store import Folder
from shortv.errors import Refused
from shortv.plan import Mode, PartsKind

# What a plan is to the reader, in the order of colours, shapes and legends.
KINDS: Final = [
    *("LC plan", "random control", "first-layers control", "last-layers control", "full model", "other plan"),
    *("one mode in all layers", "exit at a fixed layer", "SAISA", "DyVTE", "EAS", "smaller images"),
]
SYSTEMS: Final[Mapping[str, str]] = {PartsKind.SAISA: KINDS[8], PartsKind.DYVTE: KINDS[9], PartsKind.EAS: KINDS[10]}
_KINDS_OF: Final = {
    "downsample": KINDS[11],
    "full": KINDS[4],
    "random": KINDS[1],
    "first": KINDS[2],
    "last": KINDS[3],
    "lc": KINDS[0],
}
# Speed as it was measured apart, all plans beside each other, and as the answers say.
MEASURED: Final = ("prefill_ratio", "batch", "batch_prefill_ms", "step_ms", "ttft_ms", "idle_share", "replicas")
ANSWERED: Final = ("samples_per_second", "preprocess_ms_median", "vision_ms_median", "latency_ms_median")
# How many bytes are one unit on the page.
SIZES: Final[Mapping[str, float]] = {"kv_bytes": 1e3, "peak_bytes": 1e9}
# Columns about what was learned for a plan.
LEARNED: Final = ("learned_parameters", "train_seconds")


class Group(NamedTuple):
    """All plans of one model on one task, and the metric that they are judged by.

    A point is a row for each plan: `plan`, `kind`, `n`, `errors`, `flops_ratio`, the metric's `value` from `low` to
    `high` (95 %, by the method `interval_by`), and its speed: the columns `MEASURED` and `ANSWERED` of that table, the
    `prefill_ratio` from `ratio_low` to `ratio_high` (95 %), and `SIZES` in kB and GB. What is not known is None.
    """

    model: str
    task: str
    metric: str | None
    points: Sequence[Row]
    comparisons: Sequence[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignData:
    """A campaign folder: rows of its tables, what all its answers say, and some that plans changed."""

    manifest: CampaignManifest
    cells: Sequence[Row]
    metrics: Sequence[Row]
    comparisons: Sequence[Row] = ()
    speed: Sequence[Row] = ()
    answered: Answered = field(default_factory=Answered)
    changed: Changed = field(default_factory=Changed)

    def groups(self) -> list[Group]:
        """Return a group for each model and task, in the order of the cells."""
        names = dict.fromkeys((str(row["model"]), str(row["task"])) for row in self.cells)
        return [self._group(model, task) for model, task in names]

    def _group(self, model: str, task: str) -> Group:
        cells, metrics, comparisons, speeds = (
            [row for row in rows if (row["model"], row["task"]) == (model, task)]
            for rows in (self.cells, self.metrics, self.comparisons, self.speed)
        )
        named = next((item.get("main_metric") for item in self.manifest.tasks if item.get("name") == task), None)
        metric = named or next((str(row["metric"]) for row in metrics), None)
        # A metric may exist under several filters; the first one is the first of the task's configuration.
        scores = {row["plan"]: row for row in reversed(metrics) if row["metric"] == metric}
        kinds = {item["name"]: kind_of_plan(item) for item in self.manifest.plans if item["model"] == model}
        speed = {row["plan"]: row for row in speeds}
        points = [
            {"plan": cell["plan"], "kind": kinds.get(cell["plan"], KINDS[5])}
            | {name: cell[name] for name in ("n", "errors", "flops_ratio")}
            | {name: scores.get(cell["plan"], {}).get(name) for name in ("value", "low", "high", "interval_by")}
            | _speed_of(speed.get(cell["plan"], {}))
            for cell in cells
        ]
        return Group(model, task, metric, points, comparisons)


def _speed_of(row: Row) -> dict[str, Any]:
    """Return what a row of the table of speed says of a plan; None for what is not known."""
    ratio, error = row.get("prefill_ratio"), row.get("prefill_ratio_stderr")
    width = None if ratio is None or error is None else _NORMAL_95 * error
    return {
        **{name: row.get(name) for name in (*MEASURED, *ANSWERED)},
        **{name: row[name] / size if row.get(name) is not None else None for name, size in SIZES.items()},
        "ratio_low": None if width is None else max(ratio - width, 0.0),
        "ratio_high": None if width is None else ratio + width,
    }


def kind_of_plan(plan: Row) -> str:
    """Return what a plan of the manifest is to the reader: its learned system, its order of layers, or its modes."""
    parts, modes = plan.get("parts"), set(plan.get("modes", ()))
    if isinstance(parts, Mapping):
        return SYSTEMS.get(str(parts.get("kind")), KINDS[5])
    named = _KINDS_OF.get(str((plan.get("source") or {}).get("order") if plan["kind"] == "plan" else plan["kind"]))
    if named:
        return named
    if Mode.DROP_VISUAL in modes and modes <= {Mode.FULL, Mode.DROP_VISUAL}:
        return KINDS[7]
    return KINDS[6] if len(modes) == 1 and Mode.FULL not in modes else KINDS[5]


def parts_of_plan(plan: Row) -> str | None:
    """Return the learned parts of a plan of the manifest, such as `DyVTE at 0.5`; None for a plan without."""
    parts = plan.get("parts")
    if not isinstance(parts, Mapping):
        return None
    kind, threshold = str(parts.get("kind")), parts.get("threshold")
    name = SYSTEMS.get(kind, kind)
    return name if threshold is None else f"{name} at {threshold}"


def read_campaign_data(folder: Folder) -> CampaignData:
    """Read a campaign folder. Raises ShortVError if it is not one, is damaged, or contradicts itself."""
    manifest = CampaignManifest.load(folder)
    tables = {name: result_rows(folder, name, manifest) for name in ("cells", "metrics", "comparisons", "speed")}
    if not all(isinstance(plan.get(name), str) for plan in manifest.plans for name in ("kind", "digest")):
        problem = f"the manifest of {folder.shown} lists plans without kind or digest; it was changed by hand"
        raise Refused(f"{problem}: run the campaign again")
    keys, declared = {row["cell"] for row in tables["cells"]}, manifest.counts.get("cells", 0)
    strange = {row["cell"] for name in ("metrics", "speed") for row in tables[name]} - keys
    if manifest.state is not State.RUNNING and (len(keys) != declared or strange):
        raise Refused(
            f"the manifest of {folder.shown} counts {declared} cells, cells.parquet has {len(keys)}, other tables have "
            f"{len(strange)} more; the folder is damaged or being written: run the campaign again"
        )
    tables["metrics"] = [with_interval(row) for row in tables["metrics"]]
    learned = {(row["model"], row["plan"]): {name: row[name] for name in LEARNED} for row in tables["cells"]}
    tables["comparisons"] = [row | learned.get((row["model"], row["plan"]), {}) for row in tables["comparisons"]]
    answered = read_answered(folder, manifest, tables["cells"])
    return CampaignData(manifest=manifest, **tables, answered=answered, changed=read_changed(folder))


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


def interval_of(row: Row) -> Interval | None:
    """Return the interval of a row of the table of metrics; None if it has no standard error.

    Of n values in 0..1 with mean p, zeros and ones have the largest standard error, sqrt(p (1 - p) / (n - 1)). So the
    row itself shows whether its scores are in that range (the interval is then cut to it), and whether all of them are
    0 or 1 (the interval is then Wilson's, 1927). Clustered scores keep their own standard error.
    """
    clustered, plain, by_limit, value = (
        None if row[name] is None or not isfinite(row[name]) else float(row[name])
        for name in ("stderr_clustered", "stderr", "stderr_clt", "value")
    )
    own = by_limit if by_limit is not None else plain
    error = next((found for found in (clustered, plain, by_limit) if found is not None), None)
    if value is None or error is None:
        return None
    most = sqrt(value * (1 - value) / (row["n"] - 1)) if 0 <= value <= 1 and row["n"] > 1 else None
    low, high = value - _NORMAL_95 * error, value + _NORMAL_95 * error
    if own is None or most is None or own > most + _NEAR:
        return Interval(low, high, NORMAL)
    if clustered is None and own > most - _NEAR:
        weight = _NORMAL_95**2 / row["n"]
        low, high = (
            (value + weight / 2 + sign * sqrt(weight * value * (1 - value) + weight**2 / 4)) / (1 + weight)
            for sign in (-1, 1)
        )
        return Interval(max(low, 0.0), min(high, 1.0), WILSON)
    return Interval(max(low, 0.0), min(high, 1.0), CLIPPED)


def with_interval(row: Row) -> dict[str, Any]:
    """Return a row of the table of metrics with its interval: `low`, `high` and `interval_by`, None if it has none."""
    return {**row, **dict(zip(("low", "high", "interval_by"), interval_of(row) or (None,) * 3, strict=True))}


def interval_note(methods: Iterable[str | None]) -> str:
    """Return the note of a chart whose bars are intervals computed by these methods."""
    used = set(methods)
    found = [text for method, text in _METHODS.items() if method in used]
    return f"Bars: 95 % intervals, {' or '.join(found)}." if found else "No interval is known."


def difference_of(here: Row, there: Row) -> Row:
    """Return the `difference` of two metrics with its interval from `low` to `high`, None if one of them has none.

    The runs count as independent (Newcombe 1998, method 10).
    """
    difference = here["value"] - there["value"]
    if here["low"] is None or there["low"] is None:
        return {"difference": difference, "low": None, "high": None}
    below = hypot(here["value"] - here["low"], there["high"] - there["value"])
    above = hypot(here["high"] - here["value"], there["value"] - there["low"])
    return {"difference": difference, "low": difference - below, "high": difference + above}
