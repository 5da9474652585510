"""What an endpoint is asked to be: the arguments of `serve run`, of a Serve config file and of jobs/serve.py."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from shortv.errors import Refused
from shortv.spec import WorkerRange
from shortv.workers.request import ModelSpec, parse_workers, read_chat_template

BUNDLED_NAME = "shortv-tiny"
"""The name under which the bundled model is served unless another is given."""
_POSITIVE = (
    "batch_size",
    "max_queued",
    "timeout",
    "max_body_mb",
    "max_images",
    "max_image_megapixels",
    "gpus_per_replica",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointArguments:
    """An endpoint for one model and its plans.

    `plans` are files, folders or published names, as a list or as text parted by commas. `replicas` is `N` or
    `MIN:MAX`. Times are in seconds. `max_queued` bounds the questions that wait in a replica.
    `max_images` and `max_image_megapixels` bound the images of a request, the latter all of them together.
    `reports` is the folder or object-store URI above runs to serve below /reports/.
    """

    model: str = ""
    revision: str | None = None
    served_model_name: str | None = None
    plans: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    chat_template: str | None = None
    replicas: str = "1"
    gpus_per_replica: float = 1
    cpus_per_replica: float | None = None
    batch_size: int = 16
    max_queued: int = 64
    timeout: float = 120.0
    max_body_mb: float = 20.0
    max_images: int = 16
    max_image_megapixels: float = 64.0
    api_key_file: str | None = None
    reports: str | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise Refused(f"{_option(name)} is {getattr(self, name):g}; give more than 0")
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            raise Refused(f"--gpus-per-replica is {self.gpus_per_replica:g}; give a whole number, or a share below 1")
        if self.cpus_per_replica is not None and self.cpus_per_replica < 0:
            raise Refused(f"--cpus-per-replica is {self.cpus_per_replica:g}; give 0 or more")
        _ = self.range

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> EndpointArguments:
        """Read arguments that may all be text, as `serve run module:app key=value` gives them.

        Raises:
            Refused: an unknown name, or a value that the argument cannot have.
        """
        hints = get_type_hints(cls)
        values = {}
        for name, value in given.items():
            key = name.replace("-", "_")
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(hints)}"
                raise Refused(f"the endpoint has no argument {name!r}; {hint}")
            values[key] = _read(name, value, hints[key])
        return cls(**values)

    @property
    def range(self) -> WorkerRange:
        """Least and most replicas."""
        return parse_workers(self.replicas, "--replicas")

    @property
    def model_path(self) -> str:
        """Where the model is: what was given, or the bundled one."""
        return self.model or str(Path(__file__).resolve().parents[2] / "tiny" / "model")

    @property
    def served_name(self) -> str:
        """The name that clients use; a folder is served under its last name."""
        if self.served_model_name:
            return self.served_model_name
        if not self.model:
            return BUNDLED_NAME
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    def spec(self) -> ModelSpec:
        """What a replica needs to load the model. Raises Refused for an unreadable chat template."""
        return ModelSpec(
            name=self.model_path,
            revision=self.revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            chat_template=read_chat_template(self.chat_template),
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read(name: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else list(value)
        return tuple(str(part).strip() for part in parts if str(part).strip())
    if kind is bool:
        switches = {"true": True, "false": False}
        if str(value).lower() not in switches:
            raise Refused(f"{name} is {value!r}; give true or false")
        return switches[str(value).lower()]
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise Refused(f"{name} is {value!r}; give a {'whole number' if kind is int else 'number'}") from None
