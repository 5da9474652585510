"""The list of runs, for people."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from reports.manifest import Manifest, State
from reports.service.markup import LIST, STYLE
from reports.service.replies import POLICY
from reports.service.summary import AnyManifest, Summary, choices, models

_UNFINISHED: Final = (
    "This run is not finished: it is being written, or was stopped. What can be downloaded may be some of it only."
)
_PARTIAL: Final = "This run is partial: some {unit} failed. The numbers are over the others."
LABELS: Final[Mapping[str, str]] = {"sweep": "samples", "campaign": "samples or cells"}


def list_policy() -> str:
    """Return the Content-Security-Policy of the list: nothing but its own style."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return POLICY.format(style=f"'sha256-{digest}'") + "; img-src data:"


def list_page(runs: Sequence[Summary], complete: bool) -> bytes:
    """Return the page; its links are relative to the root of the service."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    shown = [_shape(run) for run in runs]
    text = environment.from_string(LIST).render(runs=shown, complete=complete, style=Markup(STYLE))
    return text.encode("utf-8", errors="replace")


def link_of(names: Sequence[str]) -> str:
    """Return the way from the list to a run's page."""
    return f"runs/{'/'.join(quote(name, safe='', errors='replace') for name in names)}/"


def label_of(manifest: AnyManifest) -> str | None:
    """Return what a reader must know first about a run that is not complete."""
    if manifest.state is State.RUNNING:
        return _UNFINISHED
    return _PARTIAL.format(unit=LABELS[manifest.kind]) if manifest.state is State.PARTIAL else None


def _shape(run: Summary) -> dict[str, Any]:
    manifest, contents = run.manifest, run.contents
    label = label_of(manifest) if manifest else None
    return {
        "id": run.run_id,
        "link": link_of(run.names),
        "kind": manifest.kind if manifest else "",
        "state": run.state,
        "warnings": [*([label] if label else []), *run.problems],
        "facts": [*_facts(manifest), *_numbers(run.headline.values)] if manifest else [],
        "files": contents.tables if contents else [],
        "plans": contents.plans if contents else [],
        # Without one the address says how to make it.
        "page": manifest is not None,
    }


def _facts(manifest: AnyManifest) -> Iterator[tuple[str, str]]:
    sweep = isinstance(manifest, Manifest)
    so_far = " so far" if manifest.state is State.RUNNING else ""
    yield "model" if sweep else "models", _joined(models(manifest))
    for name, items in choices(manifest).items():
        yield name, _joined(items)
    counts = manifest.counts
    used = counts.get("used" if sweep else "samples", 0)
    yield "samples used" if sweep else "samples asked", f"{used}{so_far}"
    yield "errors", f"{counts.get('errors', 0)}{so_far}"
    yield "started", manifest.started
    yield "finished", manifest.finished or "not yet"


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "noise_floor" in values:
        yield "noise floor", f"{_short(values['noise_floor'])} nats"
    if "lowest_lc" in values and values["lowest_lc"]["layers"]:
        found = values["lowest_lc"]
        layers = ", ".join(f"{item['layer']} ({_short(item['lc'])})" for item in found["layers"])
        yield f"layers of lowest LC, {found['mode']}", layers
    if "default_plan" in values:
        plan = values["default_plan"]
        yield "default plan", f"{plan['name']}: FLOPs ratio {_short(plan['flops_ratio'])}"
    for best in values.get("best", ()):
        yield f"{best['model']} on {best['task']}: {best['metric']}", _best(best)


def _best(best: Mapping[str, Any]) -> str:
    full = f"full {_short(best['full'])}"
    if "plan" not in best:
        return full
    half = f" ± {_short(best['half_width'])}" if best["half_width"] is not None else ""
    return f"{best['plan']} {_short(best['value'])}{half} at FLOPs ratio {_short(best['flops_ratio'])}; {full}"


def _joined(items: Sequence[str]) -> str:
    more = f" and {len(items) - 12} more" if len(items) > 12 else ""
    return ", ".join(map(str, items[:12])) + more


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
