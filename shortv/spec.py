"""Specs: validated settings of a run, a model or an endpoint, declared once.

A spec is a pydantic model. Its fields give the flags of a job (`jobs.common.options_of`), the keys of a TOML recipe,
the arguments of `serve run`, their help, their limits and what a manifest records. Values may be text wherever they
come from a command line, an environment variable or `key=value` pairs.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from shortv.errors import Refused
from shortv.terminal import printable
from shortv.untrusted import is_unicode, parse_toml, read_file

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class WorkerRange(NamedTuple):
    """A number of workers or replicas between `low` and `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, value: object) -> WorkerRange:
        """Read `4`, `"4"`, `"2:8"` or a pair. Raises ValueError for anything else."""
        parts = value if isinstance(value, tuple | list) else str(value).split(":")
        try:
            low, high = (int(str(part)) for part in (parts if len(parts) == 2 else (parts[0], parts[0])))
        except (ValueError, IndexError):
            raise ValueError("give a number (4) or a range (2:8)") from None
        if len(parts) > 2 or not 1 <= low <= high <= 1_000_000:
            raise ValueError("give a number of at least 1 (4), or a range from low to high (2:8)")
        return cls(low, high)


def _limit(value: float) -> float:
    if not (0 < value < 1 or (value >= 1 and float(value).is_integer())):
        raise ValueError("give a whole number of samples, or a share between 0 and 1")
    return value


def _gpus(value: float) -> float:
    if value > 1 and value % 1:
        raise ValueError("give a whole number, or a share below 1")
    return value


def _texts(value: object) -> object:
    """Split texts at commas and drop repetitions: `a,b` and `["a", "b"]` mean the same."""
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError("give a text, or a list of texts")
    parts = [part.strip() for item in value for part in item.split(",")]
    return tuple(dict.fromkeys(part for part in parts if part))


Limit = Annotated[float, AfterValidator(_limit)]
"""A number of samples, or below 1 a share of them."""
Share = Annotated[float, Field(ge=0, le=1)]
Gpus = Annotated[float, Field(gt=0, le=1024), AfterValidator(_gpus)]
"""GPUs of a worker: a whole number, or a share of one GPU."""
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**53 - 1)]
"""Seeds are written to JSON, whose readers may hold numbers as floats of 53 bits."""
Seconds = Annotated[float, Field(gt=0, le=10**9)]
Workers = Annotated[WorkerRange, BeforeValidator(WorkerRange.parse)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager"]


class Spec(BaseModel):
    """Base of all specs: immutable, finite numbers, no unknown settings, no NUL or invalid Unicode in any text.

    A field's description is its help text. `json_schema_extra` may hold `flag` (another name of the option), `also` (a
    second name), `short` (a short one), and `metavar`; a field with `flag: None` has no option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _check_any(cls, value: Any, info: Any) -> Any:
        for text in _texts_in(value):
            if "\0" in text or not is_unicode(text):
                raise ValueError("the text holds a NUL character or is not valid Unicode")
        if isinstance(value, bool) and bool not in plain_types(cls.model_fields[info.field_name].annotation):
            raise ValueError("give a value, not true or false")
        return value


class LoadingSpec(Spec):
    """How a model is loaded: the settings that every job shares."""

    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    dtype: Dtype = Field(default="auto", description="Type of the weights.")
    attn_implementation: Attention = Field(default="sdpa", description="Attention implementation of transformers.")
    trust_remote_code: bool = Field(default=False, description="Run code that comes with the model.")

    def of_model(self, name: str, chat_template: str | None = None) -> ModelSpec:
        """Return how to load the model of that name."""
        shared = {setting: getattr(self, setting) for setting in LoadingSpec.model_fields}
        return ModelSpec(name=name, chat_template=chat_template, **shared)


class ModelSpec(LoadingSpec):
    """What a worker needs to load a model.

    `name` is a hub id, or a folder on the driver's node. `chat_template` is Jinja text that replaces the processor's.
    """

    name: str
    chat_template: str | None = None


S = TypeVar("S", bound=Spec)


def load_spec(
    spec: type[S],
    *,
    flags: Mapping[str, Any],
    config: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> S:
    """Validate settings; flags win over the TOML file at `config`, and that over `defaults`.

    A flag that is None or an empty tuple was not given. Text in the file may hold `${VAR}` and `${VAR:-default}`.

    Raises:
        Refused: the file cannot be read, a variable is not set, a setting is unknown, missing or out of its range.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    written: dict[str, Any] = {}
    if config:
        content = parse_toml(read_file(config, what="recipe"), what=f"recipe {config}")
        written = _expanded(content, os.environ if environment is None else environment, config)
        try:
            spec.model_validate(written)
        except ValidationError as error:
            # Checked apart, so that messages say where a value stands. A flag may give what is missing here.
            for found in error.errors():
                if found["type"] != "missing":
                    raise Refused(f"recipe {config}: {_message(spec, found, flags=False)}") from error
    return validate(spec, {**(defaults or {}), **written, **given})


def validate(spec: type[S], values: Mapping[str, Any], *, where: str = "") -> S:
    """Return the spec with these values. Raises Refused, one line that names the setting and its value."""
    try:
        return spec.model_validate(dict(values))
    except ValidationError as error:
        raise Refused(where + _message(spec, error.errors()[0], flags=not where)) from error


def read_chat_template(path: str | None) -> str | None:
    """Return the text of a Jinja file, or None without a path. Raises Refused when it cannot be read."""
    if path is None:
        return None
    try:
        return read_file(path, what="chat template", limit_bytes=1 << 20).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"chat template {path} is not UTF-8 text; give a Jinja file") from error


def flag_of(name: str, field: FieldInfo | None = None) -> str:
    """Return the option of a setting: `batch_size` is `--batch-size`."""
    extra = field.json_schema_extra if field is not None else None
    given = extra.get("flag") if isinstance(extra, dict) else None
    return str(given) if given else "--" + name.replace("_", "-")


def _message(spec: type[Spec], error: ErrorDetails, *, flags: bool) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    field = spec.model_fields.get(name)
    shown = flag_of(name, field) if flags and field is not None else printable(name, limit=80)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, spec.model_fields, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the settings are {', '.join(spec.model_fields)}"
        return f"unknown setting {shown!r}; {hint}"
    if error["type"] == "missing":
        return f"{shown} is missing; give it"
    reason = error["msg"].removeprefix("Value error, ")
    value = printable(repr(error["input"]), limit=80)
    return f"{shown} is {value}; {reason[:1].lower()}{reason[1:]}" if name else f"{reason[:1].lower()}{reason[1:]}"


def _expanded(value: Any, environment: Mapping[str, str], config: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _expanded(item, environment, config) for name, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, environment, config) for item in value]
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        name, default = match.groups()
        # As in a shell, an empty variable takes the default too.
        found = environment.get(name) or default
        if found is None:
            raise Refused(
                f"recipe {config} names the environment variable {name}, which is not set; set it, "
                f"or write ${{{name}:-default}}"
            )
        return found

    return _VARIABLE.sub(replaced, value)


def _texts_in(value: Any) -> Iterable[str]:
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts_in(name)
            yield from _texts_in(item)


def plain_types(annotation: Any) -> set[Any]:
    """Return every plain type that an annotation such as `int | None` or `Annotated[...]` names."""
    parts = get_args(annotation)
    return {annotation}.union(*(plain_types(part) for part in parts)) if parts else {annotation}
