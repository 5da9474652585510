"""Modes and plans: what a decoder layer leaves out, and one mode per layer with the model and evidence behind it."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import field, replace
from enum import Flag, StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from shortv.atomic import replace_file
from shortv.errors import Refused, ShortVError
from shortv.terminal import printable
from shortv.untrusted import parse_json, read_file

SCHEMA = 1
PLAN_FILE = "shortv_plan.json"
# A plan's name is part of a file name and of a served model name (`<model>@<plan name>`).
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
# The longest plan has a few thousand layers, and a source that lists samples.
_MAX_BYTES = 1 << 20
_AGAIN = "make the plan again or restore the file"

_Text = Annotated[str, Strict()]
_Whole = Annotated[int, Strict()]
_Number = Annotated[float, Strict()]
_FORM = ConfigDict(extra="forbid", allow_inf_nan=False)


class Tokens(Flag):
    """Some of a sequence's tokens; generated tokens are text."""

    NONE = 0
    TEXT = 1
    VISUAL = 2
    ALL = 3


class Mode(StrEnum):
    """What a decoder layer leaves out; `WORK` says which tokens it still works on.

    `drop-visual` means `bypass-visual` in its layer and all later ones: after it, every mode applies to the text
    alone, so that `full` then works as `bypass-visual`, and `skip-attention` skips that of the text.
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


class PartsKind(StrEnum):
    """Which learned system parts belong to."""

    SAISA = "saisa"
    DYVTE = "dyvte"
    EAS = "eas"


@dataclass(frozen=True, slots=True, kw_only=True, config=_FORM)
class LearnedParts:
    """Parts that a plan needs beside its modes: a folder with parts.json and parts.safetensors, and its digest.

    `threshold` is the exit probability from which DyVTE drops a sample's visual tokens; no other kind has one.
    Raises Refused on construction when the fields contradict each other.
    """

    kind: PartsKind
    path: _Text
    digest: _Text
    threshold: _Number | None = None

    def __post_init__(self) -> None:
        if not self.path or "\0" in self.path:
            raise Refused(f"the path of the learned parts is {self.path!r:.80}; make the plan again")
        if not _HEX_DIGEST.fullmatch(self.digest):
            raise Refused(f"the digest of the learned parts, {self.digest!r:.80}, is not a SHA-256 digest; {_AGAIN}")
        if (self.threshold is not None) != (self.kind is PartsKind.DYVTE):
            needs = "need a threshold" if self.kind is PartsKind.DYVTE else "have no threshold"
            raise Refused(f"{self.kind} parts {needs}, found {self.threshold}; correct the plan")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise Refused(f"the exit threshold is {self.threshold:g}; give a probability, 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True, config=_FORM)
class Plan:
    """One mode per decoder layer, with the model and the evidence it was made from.

    `config_digest` decides which models it fits. `ranking` lists layers, the first to replace first (it may stop
    early: published lists do). `source` is free: sweep, samples, seed, KL direction. `flops_ratio` is the prefill
    cost against the full model at `flops_t` text and `flops_v` visual tokens. `parts` are learned ones, without which
    the plan does not run. `downsample` makes a control: the full model sees smaller images, so small that its prefill
    has this share of the FLOPs. Raises Refused on construction when the fields contradict each other.
    """

    schema: _Whole = SCHEMA
    name: _Text
    model: _Text
    revision: _Text | None = None
    config_digest: _Text
    num_layers: _Whole
    modes: tuple[Mode, ...]
    ranking: tuple[_Whole, ...] = ()
    source: Mapping[str, Any] | None = field(default=None, hash=False)
    flops_ratio: _Number | None = None
    flops_t: _Number | None = None
    flops_v: _Number | None = None
    parts: LearnedParts | None = None
    downsample: _Number | None = None

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise Refused(f"the plan has schema {self.schema}, this version reads {SCHEMA}; make the plan again")
        if not _NAME.fullmatch(self.name):
            raise Refused(
                f"plan name {self.name!r:.80} cannot be part of a file name; "
                "use at most 200 letters, digits, '.', '_' and '-', a letter or digit first"
            )
        if not self.model or "\0" in self.model + (self.revision or ""):
            raise Refused(f"the plan is made for model {self.model!r:.80}; say which model it was made for")
        if not _HEX_DIGEST.fullmatch(self.config_digest):
            raise Refused(f"config_digest {self.config_digest!r:.80} is not a SHA-256 digest; make the plan again")
        if not self.modes:
            raise Refused("a plan needs at least one layer, and this one has none")
        if self.num_layers != len(self.modes):
            raise Refused(
                f"the plan says {self.num_layers} layers but lists {len(self.modes)} modes; "
                "give exactly one mode per layer"
            )
        _check_layers(self.ranking, self.num_layers)
        if self.downsample is not None:
            self._check_downsample(self.downsample)
        if self.source is not None:
            # What a file cannot hold is found now; a loaded plan equals the saved one.
            object.__setattr__(self, "source", _json_value(self.source))

    def _check_downsample(self, share: float) -> None:
        if not 0 < share < 1:
            raise Refused(f"downsample is {share:g}; give a share of the FLOPs between 0 and 1")
        if set(self.modes) != {Mode.FULL} or self.parts is not None:
            raise Refused("a plan that downsamples images runs the full model; use only the mode full, without parts")

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of configuration digest, modes, learned parts and downsampling: the plan's identity."""
        return digest_of(self.config_digest, self.modes, self.parts, self.downsample)

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
        """Return warnings, one line each, about another checkpoint or revision than the plan was made for.

        Raises:
            Refused: the architecture is not the plan's.
        """
        made_for, model_shown = f"plan {self.name!r} was made for {_shown(self.model)}", _shown(model)
        if num_layers != self.num_layers:
            raise Refused(
                f"{made_for} with {self.num_layers} layers, but {model_shown} has {num_layers}; "
                f"make a plan from a sweep of {model_shown}"
            )
        if config_digest != self.config_digest:
            raise Refused(
                f"{made_for} (architecture {self.config_digest}), but {model_shown} has architecture "
                f"{config_digest}; make a plan from a sweep of {model_shown}"
            )
        warnings = []
        if model != self.model:
            warnings.append(f"{made_for}, not {model_shown}; the architectures agree, the weights may not")
        # A folder has no revision, and a plan made for that folder names none: nothing to warn of.
        if revision != self.revision or (revision is None and model != self.model):
            warnings.append(
                f"plan {self.name!r} was made for revision {_shown(self.revision or 'unknown')}, "
                f"the model's is {_shown(revision or 'unknown')}"
            )
        return warnings

    def to_json(self) -> str:
        """Return the plan as the text of a plan file."""
        content = _PLANS.dump_python(self) | {"digest": self.digest}
        if self.downsample is None:
            # Releases that do not know the key read the file.
            del content["downsample"]
        return json.dumps(content, indent=2) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "Plan":
        """Return the plan in the text of a plan file.

        Raises:
            Refused: the text is not JSON, has another schema, an unknown, missing, repeated or mistyped key or an
                unknown mode, its fields contradict each other, or its modes and parts have another digest.
        """
        content = parse_json(text, what="the plan", limit_bytes=_MAX_BYTES)
        if not isinstance(content, dict):
            raise Refused(f"the plan is a JSON {type(content).__name__}, not an object; {_AGAIN}")
        digest, content["schema"] = content.pop("digest", None), content.get("schema")
        try:
            plan = _PLANS.validate_python(content)
        except ValidationError as error:
            raise Refused(_fault(error)) from error
        if digest != plan.digest:
            raise Refused(
                f"the file says its digest is {digest!r:.80}, but its modes and parts have {plan.digest}: "
                f"they were edited; {_AGAIN}"
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan file whole or not at all, and return its path.

        Args:
            path: a file `*.json`, or a folder, which gets a `shortv_plan.json`.

        Raises:
            ShortVError: the file cannot be written.
        """
        target = Path(path)
        if target.suffix != ".json" or target.is_dir():
            target /= PLAN_FILE
        try:
            replace_file(target, self._with_parts_from(target.parent).to_json().encode())
        except OSError as error:
            raise ShortVError(f"cannot write plan file {target}: {error.strerror}; choose a writable path") from error
        return target

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Plan":
        """Return the plan of a file, of a folder that holds shortv_plan.json, or a published plan by name.

        A path on disk wins over a published name. Raises Refused when neither is a plan.
        """
        source = os.path.join(path, PLAN_FILE) if os.path.isdir(path) else os.fspath(path)
        if not os.path.exists(source) and source in published_plans():
            source = str(resources.files("shortv") / "plans" / f"{source}.json")
        try:
            plan = Plan.from_json(read_file(source, what="plan", limit_bytes=_MAX_BYTES))
            if plan.parts is None:
                return plan
            # A plan file names parts from where it stands, so that both can be moved together.
            parts = os.path.realpath(os.path.join(os.path.dirname(source), plan.parts.path))
            return replace(plan, parts=replace(plan.parts, path=parts))
        except Refused as error:
            hint = "" if os.path.exists(source) else f", or name one of {', '.join(published_plans())}"
            raise Refused(f"{_shown(os.fspath(path))}: {error}{hint}") from error

    def _with_parts_from(self, folder: Path) -> "Plan":
        """Return the plan as a file in this folder has it: the path to parts of the same result folder is relative."""
        if self.parts is None:
            return self
        path, folder = Path(self.parts.path).resolve(), folder.resolve()
        # A result folder is moved as a whole, and keeps its plans in plans/.
        whole = folder.parent if folder.name == "plans" else folder
        if path.is_relative_to(whole):
            path = Path(os.path.relpath(path, folder))
        return replace(self, parts=replace(self.parts, path=path.as_posix()))


_PLANS = TypeAdapter(Plan)


def published_plans() -> tuple[str, ...]:
    """Return the names of the plans that ship with the package, in alphabetical order."""
    folder = resources.files("shortv") / "plans"
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json")))


def digest_of(
    config_digest: str, modes: Iterable[str], parts: LearnedParts | None = None, downsample: float | None = None
) -> str:
    """Return a plan's digest from the things it covers."""
    content: dict[str, Any] = {"config_digest": config_digest, "modes": [str(mode) for mode in modes]}
    if parts is not None:
        content["parts"] = {"kind": parts.kind, "digest": parts.digest, "threshold": parts.threshold}
    if downsample is not None:
        content["downsample"] = downsample
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_layers(layers: Collection[int], num_layers: int) -> None:
    for layer, count in Counter(layers).items():
        if not 0 <= layer < num_layers:
            raise Refused(
                f"layer {layer} does not exist: the model has {num_layers} layers, counted from 0 "
                f"to {num_layers - 1}; correct the list"
            )
        if count > 1:
            raise Refused(f"layer {layer} is listed twice; list it once")


def _json_value(source: Mapping[str, Any]) -> Any:
    try:
        text = json.dumps(dict(source), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"the plan's source cannot be written as JSON ({error}); use text and numbers") from error
    return parse_json(text, what="the plan's source")


def _fault(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(step) for step in first["loc"])
    if first["type"] in ("missing", "unexpected_keyword_argument"):
        return f"the key {place!r:.80} is {'missing' if first['type'] == 'missing' else 'unknown'}; {_AGAIN}"
    return f"{place} is {printable(repr(first['input']), limit=80)}; {first['msg'].lower()}; {_AGAIN}"


def _shown(text: str) -> str:
    return printable(text, limit=200)
