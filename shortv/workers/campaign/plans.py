"""The plans of a campaign: what `sweep:runs/demo@5` or `random:0..4@5` means for each of its models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.plan import Mode, Plan
from shortv.workers.campaign.specs import FULL, PlanSource, parse_specs


class Kind(StrEnum):
    """What a plan is in a campaign: what the others are compared with, a plan to judge, or a control."""

    FULL = "full"
    PLAN = "plan"
    RANDOM = "random"
    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model of a campaign; `digest` is that of its folder where it is a local one."""

    name: str
    revision: str | None
    digest: str | None
    architecture: Architecture


class Training(NamedTuple):
    """What a plan's learned parts are and took; None where their header does not say."""

    parameters: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A plan under its name; `same_as` names the entry before it that has the same modes and runs for both."""

    plan: Plan
    kind: Kind
    same_as: str | None = None
    training: Training | None = None
    """None for a plan without learned parts."""

    @property
    def name(self) -> str:
        """The plan's name, distinct among those of its model."""
        return self.plan.name

    @property
    def size(self) -> Mapping[Mode, int]:
        """How many layers have which mode; plans of one size cost the same."""
        return Counter(mode for mode in self.plan.modes if mode is not Mode.FULL)


class Resolved(NamedTuple):
    """The plans of each model, the full model first, and what the user should know of them."""

    entries: Mapping[str, tuple[Entry, ...]]
    warnings: tuple[str, ...]


def resolve_plans(specs: Iterable[str], models: Sequence[ModelFacts]) -> Resolved:
    """Give every model the plans that fit it.

    Raises:
        Refused: a spec that means nothing, a plan that fits none of the models, or one name for two plans.
    """
    sources = parse_specs(specs)
    plans: dict[str, list[Entry]] = {model.name: [_full(model)] for model in models}
    warnings: list[str] = []
    for source in sources:
        refusals: list[tuple[str, Refused]] = []
        for model in models:
            try:
                entry, told = _fitting(source, model)
            except Refused as error:
                refusals.append((model.name, error))
            else:
                plans[model.name].append(entry)
                warnings += told
        if len(refusals) == len(models):
            raise Refused(f"plan {source.spec!r}: {refusals[0][1]}") from refusals[0][1]
        warnings += [f"plan {source.spec!r} is left out for {name}: {error}" for name, error in refusals]
    entries = {name: _distinct(found, name) for name, found in plans.items()}
    return Resolved(entries, tuple(dict.fromkeys(warnings)))


def _full(model: ModelFacts) -> Entry:
    sizes = model.architecture
    plan = Plan.full(
        num_layers=sizes.num_layers,
        name=FULL,
        model=model.name,
        revision=model.revision,
        config_digest=sizes.config_digest,
        flops_ratio=1.0,
    )
    return Entry(plan=plan, kind=Kind.FULL)


def _fitting(source: PlanSource, model: ModelFacts) -> tuple[Entry, list[str]]:
    plan = source.plan_for(model.name, model.revision, model.architecture)
    sizes = model.architecture
    warnings = plan.check_fits(
        config_digest=sizes.config_digest, num_layers=sizes.num_layers, model=model.name, revision=model.revision
    )
    training = None
    if plan.parts is not None:
        # Torch takes seconds to import, and most campaigns have no learned parts.
        from shortv.families.parts.files import check_parts

        header = check_parts(plan.parts, sizes.config_digest)
        training = Training(header.parameters, header.train_seconds)
    return Entry(plan=plan, kind=Kind(source.kind), training=training), warnings


def _distinct(entries: Sequence[Entry], model: str) -> tuple[Entry, ...]:
    """Keep one entry per name, and say which are the same plan under another name."""
    by_name: dict[str, Entry] = {}
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
