"""The plans of a campaign: what `sweep:runs/demo@5` or `random:0..4@5` means for each of its models."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
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
_SWEEP = re.compile(r"sweep:(?P<folder>.+)@(?P<amount>\d{1,6}|\d{0,6}\.\d{1,20})(?:/(?P<mode>[a-z-]+))?")
_CONTROL = re.compile(
    r"(?P<order>random|first|last)(?::(?P<low>\d{1,15})(?:\.\.(?P<high>\d{1,15}))?)?"
    r"@(?P<count>\d{1,6})(?:/(?P<mode>[a-z-]+))?"
)
_ALL = re.compile(r"all(?:/(?P<mode>[a-z-]+))?")
# A text that begins like this is not a file name (./random:x is one).
_RESERVED = re.compile(r"(sweep:|random[:@]|first[:@]|last[:@])")
_FORMS = (
    "a plan file, files by *, a published plan's name, full, sweep:FOLDER@LAYERS, sweep:FOLDER@0.55 (FLOPs ratio), "
    "all, random:SEED@LAYERS, random:0..4@LAYERS, first@LAYERS or last@LAYERS, each but the first four with /MODE"
)
_MAX_SEEDS = 1000


class PlanKind(StrEnum):
    """The role of a plan in a campaign: the baseline, a plan to evaluate, or a control."""

    FULL = "full"
    PLAN = "plan"
    RANDOM = "random"
    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model of a campaign; `digest` is that of its folder, None for a model on the hub."""

    name: str
    revision: str | None
    digest: str | None
    architecture: Architecture


class Training(NamedTuple):
    """Size of a plan's learned parts and the seconds their training took; None where their header does not say."""

    parameters: int | None
    seconds: float | None


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

    @property
    def size(self) -> Mapping[Mode, int]:
        """Return the number of layers in each mode; plans of the same size cost the same."""
        return Counter(mode for mode in self.plan.modes if mode is not Mode.FULL)


class ResolvedPlans(NamedTuple):
    """The plans of each model, the full model first, and warnings for the user."""

    entries: Mapping[str, tuple[PlanEntry, ...]]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlanSource:
    """A text of a recipe and how to make a plan of a model from it. `make` raises Refused if the plan does not fit."""

    text: str
    kind: PlanKind
    make: Callable[[ModelFacts], Plan]


def resolve_plans(texts: Iterable[str], models: Sequence[ModelFacts]) -> ResolvedPlans:
    """Return the plans that fit each model, the full model first.

    Raises:
        Refused: a text has an unknown form, its file or folder holds no plan, a plan fits none of the models, or two
            different plans have the same name.
    """
    sweeps: dict[tuple[str, Mode], SweepResult] = {}
    sources = [source for text in texts if text != FULL for source in _sources(text, sweeps)]
    plans: dict[str, list[PlanEntry]] = {model.name: [_full(model)] for model in models}
    warnings: list[str] = []
    for source in sources:
        refusals: list[tuple[str, Refused]] = []
        for model in models:
            try:
                entry, found = _fitting(source, model)
            except Refused as error:
                refusals.append((model.name, error))
            else:
                plans[model.name].append(entry)
                warnings += found
        if len(refusals) == len(models):
            raise Refused(f"plan {_shown(source.text)}: {refusals[0][1]}") from refusals[0][1]
        warnings += [f"plan {_shown(source.text)} is left out for {name}: {error}" for name, error in refusals]
    entries = {name: _distinct(found, name) for name, found in plans.items()}
    return ResolvedPlans(entries, tuple(dict.fromkeys(warnings)))


def _sources(text: str, sweeps: dict[tuple[str, Mode], SweepResult]) -> list[_PlanSource]:
    try:
        if sweep := _SWEEP.fullmatch(text):
            return [_given(text, _from_sweep(sweep["folder"], sweep["amount"], _mode(sweep["mode"]), sweeps))]
        if every := _ALL.fullmatch(text):
            return [_fixed(text, _mode(every["mode"]), None)]
        if control := _CONTROL.fullmatch(text):
            return list(_controls(control))
        if _RESERVED.match(text):
            raise Refused(f"this form is not known; give {_FORMS}")
        return [_given(text, Plan.load(path)) for path in _paths(text)]
    except (ShortVError, OSError, ValueError) as error:
        # The operating system rejects names that are too long or contain NUL.
        raise Refused(f"plan {_shown(text)}: {one_line(error)}") from error


def _shown(text: str) -> str:
    return printable(repr(text), limit=200)


def _paths(text: str) -> list[str]:
    """Return the files that a pattern matches, in alphabetical order; other names stand for themselves."""
    if "*" not in text:
        return [text]
    found = sorted(glob.glob(text))
    if not found:
        raise Refused("the pattern matches no files; give another one, or make the plans first")
    return found


def _given(text: str, plan: Plan) -> _PlanSource:
    """Return a source for an existing plan."""
    return _PlanSource(text=text, kind=PlanKind.PLAN, make=lambda model: plan)


def _from_sweep(folder: str, amount: str, mode: Mode, sweeps: dict[tuple[str, Mode], SweepResult]) -> Plan:
    if (folder, mode) not in sweeps:
        sweeps[folder, mode] = read_sweep(Folder(folder), mode, None)
    result = sweeps[folder, mode]
    request = Request(flops_ratio=float(amount)) if "." in amount else Request(layers=int(amount))
    return make_plan(result, request, choose_layers(result.evidence, request), None)


def _controls(found: re.Match[str]) -> Iterator[_PlanSource]:
    order, low, high = Control(found["order"]), found["low"], found["high"]
    if (order is Control.RANDOM) != (low is not None):
        raise Refused(f"random controls need a seed, and only they have one; give {_FORMS}")
    seeds = range(int(low or 0), int(high or low or 0) + 1)
    if not 0 < len(seeds) <= _MAX_SEEDS:
        raise Refused(f"{low}..{high} are {len(seeds)} seeds; give 1 to {_MAX_SEEDS}, the lower one first")
    count, mode = int(found["count"]), _mode(found["mode"])
    if order is Control.LAST and mode is Mode.DROP_VISUAL:
        # An exit at a fixed layer is evaluated, it is not a control.
        yield _fixed(found.string, mode, count)
        return
    for seed in seeds:
        yield _control(found.string, order, seed, count, mode)


def _fixed(text: str, mode: Mode, count: int | None) -> _PlanSource:
    """Return a source for a mode in all layers, or in the last `count` layers, whatever their LC."""

    def make(model: ModelFacts) -> Plan:
        layers = model.architecture.num_layers if count is None else count
        name = f"{mode}-{layers}"
        return _of_order(model, mode, layers, name, {"order": "fixed"}, control=Control.LAST)

    return _PlanSource(text=text, kind=PlanKind.PLAN, make=make)


def _control(text: str, order: Control, seed: int, count: int, mode: Mode) -> _PlanSource:
    """Return a source for a control: `count` layers in an order that does not depend on their LC."""
    random = order is Control.RANDOM
    suffix = "" if mode is Mode.FREEZE_VISUAL else f"-{mode}"
    name = f"{order.value}{seed if random else ''}-{count}{suffix}"
    source = {"order": order.value} | ({"order_seed": seed} if random else {})

    def make(model: ModelFacts) -> Plan:
        return _of_order(model, mode, count, name, source, control=order, seed=seed)

    return _PlanSource(text=text, kind=PlanKind(order.value), make=make)


def _of_order(model: ModelFacts, mode: Mode, count: int, name: str, source: Mapping[str, Any], **how: Any) -> Plan:
    num_layers = model.architecture.num_layers
    order = replacement_order(range(num_layers), mode, **how)
    return Plan.of_layers(
        mode,
        order[: check_count(count, num_layers)],
        num_layers=num_layers,
        name=name,
        model=model.name,
        revision=model.revision,
        config_digest=model.architecture.config_digest,
        ranking=order,
        source=source,
    )


def _mode(name: str | None) -> Mode:
    mode = parse_mode(name) if name else Mode.FREEZE_VISUAL
    if mode is Mode.FULL:
        raise Refused("the mode full changes nothing; choose another mode, or give the plan full")
    return mode


def _full(model: ModelFacts) -> PlanEntry:
    sizes = model.architecture
    plan = Plan.full(
        num_layers=sizes.num_layers,
        name=FULL,
        model=model.name,
        revision=model.revision,
        config_digest=sizes.config_digest,
        flops_ratio=1.0,
    )
    return PlanEntry(plan=plan, kind=PlanKind.FULL)


def _fitting(source: _PlanSource, model: ModelFacts) -> tuple[PlanEntry, list[str]]:
    plan, sizes = source.make(model), model.architecture
    warnings = plan.check_fits(
        config_digest=sizes.config_digest, num_layers=sizes.num_layers, model=model.name, revision=model.revision
    )
    training = None
    if plan.parts is not None:
        header = check_parts(plan.parts, sizes.config_digest)
        training = Training(header.parameters, header.train_seconds)
    return PlanEntry(plan=plan, kind=source.kind, training=training), warnings


def _distinct(entries: Sequence[PlanEntry], model: str) -> tuple[PlanEntry, ...]:
    """Return one entry per name, each with the earlier entry that has the same digest."""
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
        if known is None:
            by_name[entry.name] = replace(entry, same_as=first.get(digest))
            first.setdefault(digest, entry.name)
    return tuple(by_name.values())
