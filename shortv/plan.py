"""A plan gives every decoder layer one mode; plan files keep it with what it was made for."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Flag, StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from shortv.errors import Refused

SCHEMA = 1
# A plan's name is part of a file name and of a served model name (`<model>@<plan name>`).
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


class Tokens(Flag):
    """Some of a sequence's tokens; generated tokens are text."""

    NONE = 0
    TEXT = 1
    VISUAL = 2
    ALL = 3


class Mode(StrEnum):
    """What a decoder layer leaves out; `WORK` says which tokens it still works on.

    A layer after a `drop-visual` layer has no visual tokens, whatever its own mode: `drop-visual` means
    `bypass-visual` in this layer and all later ones.
    """

    FULL = "full"
    FREEZE_VISUAL = "freeze-visual"
    FREEZE_TEXT = "freeze-text"
    NO_VISUAL_QUERIES = "no-visual-queries"
    NO_VISUAL_FFN = "no-visual-ffn"
    SKIP_ATTENTION = "skip-attention"
    DROP_VISUAL = "drop-visual"
    BYPASS_VISUAL = "bypass-visual"


class Work(NamedTuple):
    """Which tokens attend in a layer, which ones give keys and values, and which ones pass the FFN.

    A token that does none of these passes the layer unchanged.
    """

    queries: Tokens
    keys: Tokens
    ffn: Tokens

    def among(self, present: Tokens) -> "Work":
        """Return the same work where only some tokens are there."""
        return Work(*(tokens & present for tokens in self))

    @property
    def hides_keys(self) -> bool:
        """Whether tokens attend to fewer keys than in the full layer."""
        return bool(self.queries) and self.keys is not Tokens.ALL


WORK: Mapping[Mode, Work] = {
    Mode.FULL: Work(queries=Tokens.ALL, keys=Tokens.ALL, ffn=Tokens.ALL),
    Mode.FREEZE_VISUAL: Work(queries=Tokens.TEXT, keys=Tokens.ALL, ffn=Tokens.TEXT),
    Mode.FREEZE_TEXT: Work(queries=Tokens.VISUAL, keys=Tokens.ALL, ffn=Tokens.VISUAL),
    Mode.NO_VISUAL_QUERIES: Work(queries=Tokens.TEXT, keys=Tokens.ALL, ffn=Tokens.ALL),
    Mode.NO_VISUAL_FFN: Work(queries=Tokens.ALL, keys=Tokens.ALL, ffn=Tokens.TEXT),
    Mode.SKIP_ATTENTION: Work(queries=Tokens.NONE, keys=Tokens.NONE, ffn=Tokens.ALL),
    Mode.DROP_VISUAL: Work(queries=Tokens.TEXT, keys=Tokens.TEXT, ffn=Tokens.TEXT),
    Mode.BYPASS_VISUAL: Work(queries=Tokens.TEXT, keys=Tokens.TEXT, ffn=Tokens.TEXT),
}
"""What each mode means. FLOPs, both executors, ablations and caches are derived from it."""

VISUAL_MODES: frozenset[Mode] = frozenset(
    mode for mode, work in WORK.items() if work != WORK[Mode.FULL] and all(Tokens.TEXT in tokens for tokens in work)
)
"""Modes that change nothing for a prompt without visual tokens."""


def works_of(modes: Iterable[Mode]) -> tuple[Work, ...]:
    """Return what each layer works on: its mode's row, without visual tokens from a `drop-visual` layer on."""
    works, present = [], Tokens.ALL
    for mode in modes:
        present = Tokens.TEXT if mode is Mode.DROP_VISUAL else present
        works.append(WORK[mode].among(present))
    return tuple(works)


class PartsKind(StrEnum):
    """Which learned system parts belong to."""

    SAISA = "saisa"
    DYVTE = "dyvte"
    EAS = "eas"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedParts:
    """Parts that a plan needs beside its modes: a folder with parts.json and parts.safetensors, and its digest.

    `threshold` is the exit probability from which DyVTE drops a sample's visual tokens; no other kind has one.
    Raises Refused on construction when the fields contradict each other.
    """

    kind: PartsKind
    path: str
    digest: str
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise Refused("the plan names no folder for its learned parts; make the plan again")
        if not _HEX_DIGEST.fullmatch(self.digest):
            raise Refused(f"the digest of the learned parts, {self.digest!r}, is no SHA-256 in hex; train them again")
        if (self.threshold is not None) != (self.kind is PartsKind.DYVTE):
            needs = "need a threshold" if self.kind is PartsKind.DYVTE else "have no threshold"
            raise Refused(f"{self.kind} parts {needs}, found {self.threshold}; correct the plan")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise Refused(f"the exit threshold is {self.threshold:g}; give a probability, 0 to 1")
        if self.threshold is not None:
            # 1 and 1.0 are the same plan, whose digest is made of the text.
            object.__setattr__(self, "threshold", float(self.threshold))


def parse_mode(text: str) -> Mode:
    """Return the mode of that name; raises Refused for a name that no mode has."""
    try:
        return Mode(text)
    except ValueError:
        raise Refused(f"unknown mode {text!r}; the modes are {', '.join(Mode)}") from None


def modes_of_ablation(mode: Mode, layer: int, num_layers: int) -> tuple[Mode, ...]:
    """Return the modes of the model ablated at `layer`: the mode there alone, the rest full.

    `drop-visual` reaches from `layer` to the last layer, and the modes say so.
    """
    _check_layers((layer,), num_layers)
    layers = range(layer, num_layers) if mode is Mode.DROP_VISUAL else (layer,)
    return modes_of_layers(mode, layers, num_layers)


def modes_of_exit(layer: int, num_layers: int) -> tuple[Mode, ...]:
    """Return the modes of a model whose visual tokens leave after `layer` (DyVTE): drop-visual in all later ones.

    After the last layer nothing is left to leave; `num_layers` itself means never.
    """
    return modes_of_layers(Mode.DROP_VISUAL, range(layer + 1, num_layers), num_layers)


def modes_of_layers(mode: Mode, layers: Collection[int], num_layers: int) -> tuple[Mode, ...]:
    """Return `num_layers` modes, `mode` in `layers` and full elsewhere; raises Refused for bad layers."""
    _check_layers(layers, num_layers)
    return tuple(mode if layer in layers else Mode.FULL for layer in range(num_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One mode per decoder layer, with the model and the evidence it was made from.

    `config_digest` decides which models it fits. `ranking` lists layers, the first to replace first
    (it may stop early: published lists do). `source` is free: sweep, samples, seed, KL direction.
    `flops_ratio` is the prefill cost against the full model at `flops_t` text and `flops_v` visual tokens.
    `parts` are learned ones, without which the plan does not run.
    Raises Refused on construction when the fields contradict each other.
    """

    schema: int = SCHEMA
    name: str
    model: str
    revision: str | None = None
    config_digest: str
    num_layers: int
    modes: tuple[Mode, ...]
    ranking: tuple[int, ...] = ()
    source: Mapping[str, Any] | None = field(default=None, hash=False)
    flops_ratio: float | None = None
    flops_t: float | None = None
    flops_v: float | None = None
    parts: LearnedParts | None = None

    def __post_init__(self) -> None:
        _check_header(self)
        if self.num_layers != len(self.modes):
            raise Refused(
                f"the plan says {self.num_layers} layers but lists {len(self.modes)} modes; "
                "give exactly one mode per layer"
            )
        if not self.modes:
            raise Refused("a plan needs at least one layer, and this one has none")
        _check_layers(self.ranking, self.num_layers)
        if self.source is not None:
            # What a file cannot hold is found now; a loaded plan equals the saved one.
            object.__setattr__(self, "source", _json_value(self.source))

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the configuration digest, the modes and the learned parts: the plan's identity."""
        return digest_of(self.config_digest, self.modes, self.parts)

    @classmethod
    def full(cls, *, num_layers: int, name: str = "full", **rest: Any) -> "Plan":
        """Return the plan of the unmodified model; `rest` are further fields of Plan."""
        return cls(name=name, num_layers=num_layers, modes=(Mode.FULL,) * num_layers, **rest)

    @classmethod
    def of_layers(cls, mode: Mode, layers: Iterable[int], *, num_layers: int, **rest: Any) -> "Plan":
        """Return the plan with `mode` in `layers` and full elsewhere; refuses duplicate layers."""
        return cls(num_layers=num_layers, modes=modes_of_layers(mode, tuple(layers), num_layers), **rest)

    def layers(self, mode: Mode) -> tuple[int, ...]:
        """Return the layers that have `mode`, in ascending order."""
        return tuple(layer for layer, found in enumerate(self.modes) if found is mode)

    def check_fits(self, *, config_digest: str, num_layers: int, model: str, revision: str | None) -> list[str]:
        """Raise Refused unless the plan fits this architecture; return warnings, one line each."""
        made_for = f"plan {self.name!r} was made for {self.model}"
        if num_layers != self.num_layers:
            raise Refused(
                f"{made_for} with {self.num_layers} layers, but {model} has {num_layers}; "
                f"make a plan from a sweep of {model}"
            )
        if config_digest != self.config_digest:
            raise Refused(
                f"{made_for} (architecture {self.config_digest[:12]}), but {model} has architecture "
                f"{config_digest[:12]}; make a plan from a sweep of {model}"
            )
        warnings = []
        if model != self.model:
            warnings.append(f"{made_for}, not {model}; the architectures agree, the weights may not")
        # A folder has no revision, and a plan made for that folder names none: nothing to warn of.
        if revision != self.revision or (revision is None and model != self.model):
            warnings.append(
                f"plan {self.name!r} was made for revision {self.revision or 'unknown'}, "
                f"the model's is {revision or 'unknown'}"
            )
        return warnings

    def to_json(self) -> str:
        """Return the plan as the text of a plan file."""
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        content["parts"] = asdict(self.parts) if self.parts else None
        return json.dumps(content | {"digest": self.digest}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Return the plan a plan file's text holds; raises Refused for anything it cannot mean."""
        # The reader builds Plans, so its module imports this one; the same holds for load and save.
        from shortv.planfile import parse_plan

        return parse_plan(text)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan file (`*.json`, or shortv_plan.json in a folder) whole or not at all, and return its path."""
        from shortv.planfile import write_plan

        return write_plan(self, Path(path))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Plan":
        """Return the plan of a file, of a folder that holds shortv_plan.json, or a published plan by name."""
        from shortv.planfile import read_plan

        return read_plan(path)


def digest_of(config_digest: str, modes: Iterable[str], parts: LearnedParts | None = None) -> str:
    """Return a plan's digest from the things it covers."""
    content: dict[str, Any] = {"config_digest": config_digest, "modes": [str(mode) for mode in modes]}
    if parts is not None:
        content["parts"] = {"kind": parts.kind, "digest": parts.digest, "threshold": parts.threshold}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_header(plan: Plan) -> None:
    if plan.schema != SCHEMA:
        raise Refused(f"the plan has schema {plan.schema!r}, this version reads {SCHEMA}; make the plan again")
    if not _NAME.fullmatch(plan.name):
        raise Refused(
            f"plan name {plan.name!r} cannot be part of a file name; "
            "use letters, digits, '.', '_' and '-', a letter or digit first"
        )
    if not plan.model:
        raise Refused("the plan names no model; say which model it was made for")
    if not _HEX_DIGEST.fullmatch(plan.config_digest):
        raise Refused(f"config_digest {plan.config_digest!r} is no SHA-256 in hex; make the plan again")


def _check_layers(layers: Collection[int], num_layers: int) -> None:
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise Refused(
            f"layer {outside[0]} does not exist: the model has {num_layers} layers, counted from 0 "
            f"to {num_layers - 1}; correct the list"
        )
    seen: set[int] = set()
    for layer in layers:
        if layer in seen:
            raise Refused(f"layer {layer} is listed twice; list each layer once")
        seen.add(layer)


def _json_value(source: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(dict(source), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise Refused(f"the plan's source cannot be written as JSON ({error}); use text and numbers") from error
