"""What a folder of learned parts says of itself, read and checked without torch and without its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from shortv.errors import Refused
from shortv.plan import LearnedParts, PartsKind
from shortv.terminal import printable
from shortv.untrusted import parse_json, read_file

HEADER_NAME = "parts.json"
WEIGHTS_NAME = "parts.safetensors"
AGAIN = "train the parts again, or restore the folder"


class Header(BaseModel):
    """The content of parts.json. Unknown fields are None for parts that were written elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    kind: PartsKind = Field(strict=False)
    model: str
    revision: str | None
    config_digest: str
    settings: dict[str, Any]
    training: dict[str, Any]
    """Free: command, samples, seconds, machine."""
    digest: str
    parameters: int | None = None
    """How many weights were learned."""

    @property
    def train_seconds(self) -> float | None:
        """How long the training took; None where the header does not say."""
        seconds = self.training.get("seconds")
        return float(seconds) if isinstance(seconds, int | float) and not isinstance(seconds, bool) else None

    def to_json(self) -> str:
        """Return the text of parts.json."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n"


def read_header(folder: str | os.PathLike[str]) -> Header:
    """Read parts.json. Raises Refused."""
    path = Path(folder) / HEADER_NAME
    if not os.path.isfile(path):  # False, not an error, also for a path that no file can have
        raise Refused(f"no learned parts at {printable(folder, limit=200)}; give a folder with {HEADER_NAME}")
    what = f"the header of learned parts {path}"
    content = parse_json(read_file(path, what="the header of learned parts"), what=what)
    try:
        return Header.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(place) for place in first["loc"])
        raise Refused(f"{what} cannot be used: {printable(where, limit=80)}: {first['msg']}; {AGAIN}") from error


def check_parts(named: LearnedParts, config_digest: str) -> Header:
    """Check, without reading the weights, that a plan's parts exist and belong to a model of this architecture.

    Raises:
        Refused: there are no parts, they are of another model or kind, their weights are cut short, or their digest is
            not the plan's.
    """
    header = read_header(named.path)
    if header.kind is not named.kind:
        raise Refused(f"the parts in {named.path} are {header.kind} parts, the plan needs {named.kind}; {AGAIN}")
    if header.config_digest != config_digest:
        raise Refused(
            f"the parts in {named.path} were trained on {header.model} (architecture {header.config_digest}), "
            f"and this model has architecture {config_digest}; train parts for this model"
        )
    if header.digest != named.digest:
        raise Refused(
            f"the parts in {named.path} ({header.digest}) are not those that the plan names "
            f"({named.digest}); make the plan again, or restore the folder"
        )
    _check_length(Path(named.path) / WEIGHTS_NAME)
    return header


def _check_length(weights: Path) -> None:
    if not weights.is_file():
        raise Refused(f"{weights.parent} has {HEADER_NAME} but no {WEIGHTS_NAME}; {AGAIN}")
    try:
        # Opening compares the file's length with what its first bytes say, and reads no tensor.
        with safe_open(weights, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise Refused(f"{weights} is cut short, or not a file of weights ({error}); {AGAIN}") from error
