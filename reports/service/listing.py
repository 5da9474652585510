"""The list of runs, for people."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from reports.campaign import CampaignManifest
from reports.manifest import State
from reports.service.contents import AGAINST_NAME
from reports.service.markup import LIST, STYLE
from reports.service.summary import AnyManifest, Summary, choices, models
from reports.training import TrainingManifest

_POLICY: Final = (
    "default-src 'none'; style-src {style}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; img-src data:"
)
_UNFINISHED: Final = (
    "This run is not finished: it is being written, or was stopped. What can be downloaded may be some of it only."
)
_PARTIAL: Final = "This run is partial: some {unit} failed. The numbers are over the others."
_SAMPLES: Final[Mapping[str, tuple[str, str]]] = {
    "sweep": ("samples used", "used"),
    "campaign": ("samples asked", "samples"),
    "training": ("samples", "samples"),
}
LABELS: Final[Mapping[str, str]] = {"sweep": "samples", "campaign": "samples or cells", "training": "samples"}


def list_policy() -> str:
    """Return the Content-Security-Policy of the list: nothing but its own style."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return _POLICY.format(style=f"'sha256-{digest}'")


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
        # Without one the address says how to make it; a training has none.
        "page": manifest is not None and not isinstance(manifest, TrainingManifest),
        "against": AGAINST_NAME if contents and AGAINST_NAME in contents.pages else None,
    }


def _facts(manifest: AnyManifest) -> Iterator[tuple[str, str]]:
    so_far = " so far" if manifest.state is State.RUNNING else ""
    found = models(manifest)
    yield "models" if isinstance(manifest, CampaignManifest) else "model", _joined(found)
    for name, items in choices(manifest).items():
        yield name, _joined(items)
    counts, (unit, count) = manifest.counts, _SAMPLES[manifest.kind]
    yield unit, f"{counts.get(count, 0)}{so_far}"
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
    if "loss" in values:
        yield "last loss", f"{_short(values['loss'])} after {values['steps']} steps"
        yield "seconds of training", _short(values["train_seconds"])
    if values.get("learned_parameters") is not None:
        yield "learned parameters", f"{values['learned_parameters']:,}"
    for best in values.get("best", ()):
        yield f"{best['model']} on {best['task']}: {best['metric']}", _best(best)


def _best(best: Mapping[str, Any]) -> str:
    full = f"full {_short(best['full'])}"
    own = f"{_plan(best)}; {full}" if "plan" in best else full
    return f"{own}; best other plan {_plan(best['other'])}" if "other" in best else own


def _plan(found: Mapping[str, Any]) -> str:
    half = f" ± {_short(found['half_width'])}" if found["half_width"] is not None else ""
    return f"{found['plan']} {_short(found['value'])}{half} at FLOPs ratio {_short(found['flops_ratio'])}"


def _joined(items: Sequence[str]) -> str:
    more = f" and {len(items) - 12} more" if len(items) > 12 else ""
    return ", ".join(map(str, items[:12])) + more


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
