"""The plans of a campaign: what `sweep:runs/demo@5` or `random:0..4@5` means for each of its models."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, partial
from itertools import product
from typing import Any, Final, NamedTuple

from reports.store import Folder
from shortv.architecture import Architecture
from shortv.errors import Refused, ShortVError, one_line
from shortv.learned.header import check_parts
from shortv.plan import Mode, Plan, parse_mode
from shortv.sweep.planning import Control, Request, check_count, choose_layers, replacement_order
from shortv.terminal import printable
from shortv.workers.sweep.result import SweepResult, make_plan, read_sweep

FULL: Final = "full"
_COUNTS = r"(?P<few>\d{1,6})(?:\.\.(?P<many>\d{1,6}))?"
_RATIO = r"(?P<ratio>\d{0,6}\.\d{1,20})"
_MODE = r"(?:/(?P<mode>[a-z-]+))?"
_SWEEP = re.compile(rf"sweep:(?P<folder>.+)@(?:{_COUNTS}|{_RATIO}){_MODE}")
_CONTROL = re.compile(
    r"(?P<order>random|first|last)(?::(?P<low>\d{1,15})(?:\.\.(?P<high>\d{1,15}))?)?" + f"@{_COUNTS}{_MODE}"
)
_ALL = re.compile(f"all{_MODE}")
_EXIT = re.compile(f"exit@{_COUNTS}")
_DOWNSAMPLE = re.compile(f"downsample@{_RATIO}")
# A text that begins like this is not a file name (./random:x is one).
_RESERVED = re.compile(r"(sweep:|random[:@]|first[:@]|last[:@]|exit[:@]|downsample[:@]|all/)")
_FORMS = (
    "a plan file, files by *, a published plan's name, full, sweep:FOLDER@LAYERS, sweep:FOLDER@0.55 (FLOPs ratio), "
    "all, random:SEED@LAYERS, random:0..4@LAYERS, first@LAYERS or last@LAYERS, each but the first four with /MODE, "
    "exit@LAYERS, or downsample@0.55 (FLOPs ratio); LAYERS may be a range such as 4..8"
)
_MOST_PLANS = 1000
_FIXED: Final = {"order": "fixed"}


class PlanKind(StrEnum):
    """The role of a plan in a campaign: the baseline, a plan to evaluate, or a control."""

    FULL = "full"
    PLAN = "plan"
    RANDOM = "random"
    FIRST = "first"
    LAST = "last"
    DOWNSAMPLE = "downsample"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model of a campaign; `digest` is that of its folder, None for a model on the hub."""

    name: str
    revision: str | None
    digest: str | None
    architecture: Architecture


class Training(NamedTuple):
    """Size of a plan's learned parts and the seconds their training took; None where their header does not say."""

    parameters: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """A plan of a campaign; `same_as` names an earlier entry with the same digest, whose cells are also its own."""

    plan: Plan
    kind: PlanKind
    same_as: str | None = None
    training: Training | None = None
    """None for a plan without learned parts."""

    @property
    def name(self) -> str:
        """The plan's name, distinct among those of its model."""
        return self.plan.name

    def is_control_of(self, other: PlanEntry) -> bool:
        """Whether this is a random control of a plan: as many layers in each mode, so it costs the same."""
        if other.kind is not PlanKind.PLAN or other.plan.parts is not None or self.kind is not PlanKind.RANDOM:
            return False
        return Counter(self.plan.modes) == Counter(other.plan.modes)


class ResolvedPlans(NamedTuple):
    """The plans of each model, the full model first, and warnings for the user."""

    entries: Mapping[str, tuple[PlanEntry, ...]]
    warnings: tuple[str, ...]


class _Source(NamedTuple):
    """A text of a recipe and how to make a plan of a model from it; `make` raises Refused if the plan does not fit."""

    text: str
    kind: PlanKind
    make: Callable[[ModelFacts], Plan]


def resolve_plans(texts: Iterable[str], models: Sequence[ModelFacts]) -> ResolvedPlans:
    """Return the plans that fit each model, the full model first.

    Raises:
        Refused: a text has an unknown form, its file or folder holds no plan, a plan fits none of the models, or two
            different plans have the same name.
    """
    sources: list[_Source] = []
    # Several plans of one sweep read it once.
    sweep = cache(lambda folder, mode: read_sweep(Folder(folder), mode, None))
    for text in texts:
        try:
            sources += _sources(text, sweep)
        except (ShortVError, OSError, ValueError) as error:
            # The operating system rejects names that are too long or contain NUL.
            raise Refused(f"plan {_shown(text)}: {one_line(error)}") from error
    plans: dict[str, list[PlanEntry]] = {model.name: [_full(model)] for model in models}
    warnings: list[str] = []
    for source in sources:
        refusals: dict[str, Refused] = {}
        for model in models:
            try:
                entry, found = _fitting(source, model)
            except Refused as error:
                refusals[model.name] = error
            else:
                plans[model.name].append(entry)
                warnings += found
        if len(refusals) == len(models):
            first = next(iter(refusals.values()))
            raise Refused(f"plan {_shown(source.text)}: {first}") from first
        warnings += [f"plan {_shown(source.text)} is left out for {name}: {error}" for name, error in refusals.items()]
    entries = {name: _distinct(found, name, warnings) for name, found in plans.items()}
    return ResolvedPlans(entries, tuple(dict.fromkeys(warnings)))


def _sources(text: str, sweep: Callable[[str, Mode], SweepResult]) -> Iterator[_Source]:
    def given(plan: Plan) -> _Source:
        return _Source(text, PlanKind.PLAN, lambda model: plan)

    if text == FULL:
        return
    if found := _SWEEP.fullmatch(text):
        result, ratio = sweep(found["folder"], _mode(found["mode"])), found["ratio"]
        requests = [Request(flops_ratio=float(ratio))] if ratio else [Request(layers=few) for few in _counts(found)]
        for request in requests:
            yield given(make_plan(result, request, choose_layers(result.evidence, request), None))
    elif every := _ALL.fullmatch(text):
        yield _Source(text, PlanKind.PLAN, partial(_fixed, mode=_mode(every["mode"]), count=None))
    elif control := _CONTROL.fullmatch(text):
        yield from _controls(control)
    elif leaving := _EXIT.fullmatch(text):
        for count in _counts(leaving):
            yield _Source(text, PlanKind.PLAN, partial(_exit, count=count))
    elif smaller := _DOWNSAMPLE.fullmatch(text):
        yield _Source(text, PlanKind.PLAN, partial(_downsample, share=float(smaller["ratio"])))
    elif _RESERVED.match(text):
        raise Refused(f"this form is not known; give {_FORMS}")
    else:
        # A pattern stands for its files in alphabetical order; other names stand for themselves.
        paths = sorted(glob.glob(text)) if "*" in text else [text]
        if not paths:
            raise Refused("the pattern matches no files; give another one, or make the plans first")
        yield from (given(Plan.load(path)) for path in paths)


def _shown(text: str) -> str:
    return printable(repr(text), limit=200)


def _mode(name: str | None) -> Mode:
    mode = parse_mode(name) if name else Mode.FREEZE_VISUAL
    if mode is Mode.FULL:
        raise Refused("the mode full changes nothing; choose another mode, or give the plan full")
    return mode


def _controls(found: re.Match[str]) -> Iterator[_Source]:
    order, low, high = Control(found["order"]), found["low"], found["high"]
    if (order is Control.RANDOM) != (low is not None):
        raise Refused(f"random controls need a seed, and only they have one; give {_FORMS}")
    mode, counts, seeds = _mode(found["mode"]), _counts(found), _range(low or "0", high)
    if len(counts) * len(seeds) > _MOST_PLANS:
        raise Refused(f"these are {len(counts) * len(seeds)} plans; give at most {_MOST_PLANS}")
    for count, seed in product(counts, seeds):
        if order is Control.LAST and mode is Mode.DROP_VISUAL:
            # An exit at a fixed layer is evaluated, it is not a control.
            yield _Source(found.string, PlanKind.PLAN, partial(_fixed, mode=mode, count=count))
        else:
            make = partial(_control, mode=mode, count=count, order=order, seed=seed)
            yield _Source(found.string, PlanKind(order.value), make)


def _counts(found: re.Match[str]) -> range:
    return _range(found["few"], found["many"])


def _range(low: str, high: str | None) -> range:
    """Return the numbers from `low` to `high`, which both count; without `high`, `low` alone."""
    numbers = range(int(low), int(high or low) + 1)
    if not 0 < len(numbers) <= _MOST_PLANS:
        raise Refused(f"{low}..{high} are {len(numbers)} numbers; give 1 to {_MOST_PLANS}, the lower one first")
    return numbers


def _fixed(model: ModelFacts, *, mode: Mode, count: int | None) -> Plan:
    """Return the plan with a mode in all layers, or in the last `count` layers, whatever their LC."""
    count = model.architecture.num_layers if count is None else count
    return _of_order(model, mode, count, Control.LAST, 0, name=f"{mode}-{count}", source=_FIXED)


def _exit(model: ModelFacts, *, count: int) -> Plan:
    """Return the plan whose visual tokens leave after the first `count` layers."""
    num_layers = model.architecture.num_layers
    if count >= num_layers:
        raise Refused(f"nothing leaves after {count} of {num_layers} layers; give 0 to {num_layers - 1}")
    return _of_order(model, Mode.DROP_VISUAL, num_layers - count, Control.LAST, 0, name=f"exit-{count}", source=_FIXED)


def _downsample(model: ModelFacts, *, share: float) -> Plan:
    """Return the control that runs the full model on smaller images, at this share of its FLOPs."""
    num_layers = model.architecture.num_layers
    return Plan.full(num_layers=num_layers, name=f"downsample-{share:g}", downsample=share, **_made_for(model))


def _control(model: ModelFacts, *, mode: Mode, count: int, order: Control, seed: int) -> Plan:
    """Return a control: `count` layers in an order that does not depend on their LC."""
    random = order is Control.RANDOM
    suffix = "" if mode is Mode.FREEZE_VISUAL else f"-{mode}"
    name = f"{order.value}{seed if random else ''}-{count}{suffix}"
    source = {"order": order.value} | ({"order_seed": seed} if random else {})
    return _of_order(model, mode, count, order, seed, name=name, source=source)


def _of_order(model: ModelFacts, mode: Mode, count: int, control: Control, seed: int, **fields: Any) -> Plan:
    num_layers = model.architecture.num_layers
    order = replacement_order(range(num_layers), mode, control=control, seed=seed)
    layers = order[: check_count(count, num_layers)]
    return Plan.of_layers(mode, layers, num_layers=num_layers, ranking=order, **fields, **_made_for(model))


def _full(model: ModelFacts) -> PlanEntry:
    plan = Plan.full(num_layers=model.architecture.num_layers, name=FULL, flops_ratio=1.0, **_made_for(model))
    return PlanEntry(plan=plan, kind=PlanKind.FULL)


def _made_for(model: ModelFacts) -> dict[str, Any]:
    return {"model": model.name, "revision": model.revision, "config_digest": model.architecture.config_digest}


def _fitting(source: _Source, model: ModelFacts) -> tuple[PlanEntry, list[str]]:
    plan, training = source.make(model), None
    warnings = plan.check_fits(num_layers=model.architecture.num_layers, **_made_for(model))
    if plan.parts is not None:
        header = check_parts(plan.parts, model.architecture.config_digest)
        training = Training(header.parameters, header.train_seconds)
    kind = source.kind if plan.downsample is None else PlanKind.DOWNSAMPLE
    return PlanEntry(plan=plan, kind=kind, training=training), warnings


def _distinct(entries: Sequence[PlanEntry], model: str, warnings: list[str]) -> tuple[PlanEntry, ...]:
    """Return one entry per name, each with the earlier entry that has the same digest; warn of repeated ones."""
    by_name: dict[str, PlanEntry] = {}
    first: dict[str, str] = {}
    for entry in entries:
        digest = entry.plan.digest
        known = by_name.get(entry.name)
        if known and known.plan.digest != digest:
            raise Refused(
                f"two different plans of {model} are named {entry.name!r}; save one of them under another name "
                "(jobs/plan.py --name) and give its file"
            )
        if known:
            warnings.append(f"plan {entry.name!r} is named more than once; it runs once")
        else:
            by_name[entry.name] = replace(entry, same_as=first.get(digest))
            first.setdefault(digest, entry.name)
    return tuple(by_name.values())
