"""How a plan is named in a recipe: a file, a published name, a choice from a sweep folder, a mode, or a control."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from reports.store import Folder
from shortv.architecture import Architecture
from shortv.errors import Refused, ShortVError
from shortv.plan import Mode, Plan, parse_mode
from shortv.sweep.planning import Control, Request, check_count, choose_layers, replacement_order
from shortv.workers.sweep_result import SweepResult, make_plan, read_sweep

FULL: Final = "full"
_SWEEP = re.compile(r"sweep:(?P<folder>.+)@(?P<amount>\d+|\d*\.\d+)(?:/(?P<mode>[a-z-]+))?")
_CONTROL = re.compile(
    r"(?P<order>random|first|last)(?::(?P<low>\d+)(?:\.\.(?P<high>\d+))?)?@(?P<count>\d+)(?:/(?P<mode>[a-z-]+))?"
)
_ALL = re.compile(r"all(?:/(?P<mode>[a-z-]+))?")
# What begins like this is no file name (./random:x is one).
_RESERVED = re.compile(r"(sweep:|random[:@]|first[:@]|last[:@])")
_FORMS = (
    "a plan file, files by *, a published plan's name, full, sweep:FOLDER@LAYERS, sweep:FOLDER@0.55 (FLOPs ratio), "
    "all, random:SEED@LAYERS, random:0..4@LAYERS, first@LAYERS or last@LAYERS, each but the first four with /MODE"
)
_MOST_SEEDS = 1000


class PlanSource(Protocol):
    """Where the plan of one spec comes from."""

    @property
    def spec(self) -> str:
        """What stands in the recipe."""

    @property
    def kind(self) -> str:
        """What the plan is in the campaign: plan, random, first or last."""

    def plan_for(self, model: str, revision: str | None, architecture: Architecture) -> Plan:
        """Make the plan for a model. Raises Refused when there can be none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A plan that is there already, for whichever model it fits."""

    spec: str
    plan: Plan
    kind: str = "plan"

    def plan_for(self, model: str, revision: str | None, architecture: Architecture) -> Plan:
        """Return the plan; whether it fits is for the caller to check."""
        return self.plan


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedLayers:
    """A mode in all layers, or in so many of the last where it can stand nowhere else: there is nothing to choose."""

    spec: str
    mode: Mode
    count: int | None = None
    kind: str = "plan"

    def plan_for(self, model: str, revision: str | None, architecture: Architecture) -> Plan:
        """Make the plan for this model; refuses more layers than it has."""
        num_layers = architecture.num_layers
        order = replacement_order(range(num_layers), self.mode, control=Control.LAST)
        count = num_layers if self.count is None else check_count(self.count, num_layers)
        return Plan.of_layers(
            self.mode,
            order[:count],
            num_layers=num_layers,
            name=f"{self.mode}-{count}",
            model=model,
            revision=revision,
            config_digest=architecture.config_digest,
            ranking=order,
            source={"order": "fixed"},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlLayers:
    """So many layers in an order that knows nothing of their LC."""

    spec: str
    order: Control
    seed: int
    count: int
    mode: Mode

    @property
    def kind(self) -> str:
        """The order's name."""
        return self.order.value

    def plan_for(self, model: str, revision: str | None, architecture: Architecture) -> Plan:
        """Make the control for this model; refuses more layers than it has."""
        num_layers = architecture.num_layers
        order = replacement_order(range(num_layers), self.mode, control=self.order, seed=self.seed)
        random = self.order is Control.RANDOM
        suffix = "" if self.mode is Mode.FREEZE_VISUAL else f"-{self.mode}"
        return Plan.of_layers(
            self.mode,
            order[: check_count(self.count, num_layers)],
            num_layers=num_layers,
            name=f"{self.order.value}{self.seed if random else ''}-{self.count}{suffix}",
            model=model,
            revision=revision,
            config_digest=architecture.config_digest,
            ranking=order,
            source={"order": self.order.value} | ({"order_seed": self.seed} if random else {}),
        )


def parse_specs(specs: Iterable[str]) -> list[PlanSource]:
    """Read the plans of a recipe, files and sweep folders included; `full` is left out, being always there.

    Raises:
        Refused: a spec has none of the known forms, or its file or folder holds no plan.
    """
    sweeps: dict[tuple[str, Mode], SweepResult] = {}
    return [source for spec in specs if spec != FULL for source in _sources(spec, sweeps)]


def _sources(spec: str, sweeps: dict[tuple[str, Mode], SweepResult]) -> list[PlanSource]:
    try:
        if sweep := _SWEEP.fullmatch(spec):
            return [Given(spec=spec, plan=_from_sweep(sweep["folder"], sweep["amount"], _mode(sweep["mode"]), sweeps))]
        if every := _ALL.fullmatch(spec):
            return [FixedLayers(spec=spec, mode=_mode(every["mode"]))]
        if control := _CONTROL.fullmatch(spec):
            return _controls(control)
        if _RESERVED.match(spec):
            raise Refused(f"it means nothing; give {_FORMS}")
        return [Given(spec=spec, plan=Plan.load(path)) for path in _paths(spec)]
    except ShortVError as error:
        # No work has started: a sweep folder that cannot be read is refused, whatever the reason.
        raise Refused(f"plan {spec!r}: {error}") from error


def _paths(spec: str) -> list[str]:
    """The files that a pattern stands for, in alphabetical order; other names stand for themselves."""
    if "*" not in spec:
        return [spec]
    found = sorted(glob.glob(spec))
    if not found:
        raise Refused("no file has such a name; give another pattern, or make the plans first")
    return found


def _from_sweep(folder: str, amount: str, mode: Mode, sweeps: dict[tuple[str, Mode], SweepResult]) -> Plan:
    if (folder, mode) not in sweeps:
        sweeps[folder, mode] = read_sweep(Folder(folder), mode, None)
    result = sweeps[folder, mode]
    request = Request(flops_ratio=float(amount)) if "." in amount else Request(layers=int(amount))
    return make_plan(result, request, choose_layers(result.evidence, request), None)


def _controls(found: re.Match[str]) -> list[PlanSource]:
    order, low, high = Control(found["order"]), found["low"], found["high"]
    if (order is Control.RANDOM) != (low is not None):
        raise Refused(f"only random controls have a seed, and they need one; give {_FORMS}")
    seeds = range(int(low or 0), int(high or low or 0) + 1)
    if not 0 < len(seeds) <= _MOST_SEEDS:
        raise Refused(f"the seeds {low}..{high} are {len(seeds)}; give 1 to {_MOST_SEEDS}, the lower one first")
    count, mode = int(found["count"]), _mode(found["mode"])
    if order is Control.LAST and mode is Mode.DROP_VISUAL:
        return [FixedLayers(spec=found.string, mode=mode, count=count)]
    return [ControlLayers(spec=found.string, order=order, seed=seed, count=count, mode=mode) for seed in seeds]


def _mode(name: str | None) -> Mode:
    mode = parse_mode(name) if name else Mode.FREEZE_VISUAL
    if mode is Mode.FULL:
        raise Refused("the mode full changes nothing; name another, or the plan full")
    return mode
