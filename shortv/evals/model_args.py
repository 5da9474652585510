"""What `--model_args` of lmms-eval's command says to the models `shortv` and `shortv_serve`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import torch
from pydantic import Field, field_validator, model_validator

from shortv.errors import Refused
from shortv.request import FULL_MODEL
from shortv.spec import Count, LoadingSpec, Seconds, Spec, validate
from shortv.untrusted import read_file

S = TypeVar("S", bound=Spec)
# A shorter part of a digest could fit two plans.
_SHORTEST_DIGEST = 12


class LocalSpec(LoadingSpec):
    """Settings of the model `shortv`: the model, its plan, and how both are loaded."""

    pretrained: str = Field(
        default_factory=lambda: str(resources.files("shortv") / "tiny" / "model"),
        description="Hub id or folder of the model; the bundled model by default.",
    )
    plan: str | None = Field(
        None, description="Plan file, folder with shortv_plan.json, or name of a published plan; None: the full model."
    )
    plan_digest: str | None = Field(None, description="Digest that the plan must have, or its first 12 characters.")
    device: str = Field(
        "auto", validate_default=True, description="auto, auto-map (spread over all GPUs), cpu, cuda or cuda:N."
    )
    batch_size: Count = Field(1, description="Most requests that run together.")

    @field_validator("device")
    @classmethod
    def _resolve(cls, value: str) -> str:
        if value == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if value != "auto-map":
            try:
                torch.device(value)
            except RuntimeError:
                raise ValueError("it is not a device; use auto, auto-map, cpu, cuda or cuda:N") from None
        return value


class ServedSpec(Spec):
    """Settings of the model `shortv_serve`: where the replicas are, and as which model they get requests."""

    url: str | None = Field(None, description="OpenAI-style endpoint, such as http://127.0.0.1:8000/v1.")
    app: str | None = Field(None, description="Name of a running Serve application, instead of a URL.")
    model: str | None = Field(None, description="Name of the model on the endpoint: NAME or NAME@PLAN.")
    plan: str = Field(FULL_MODEL, description="Name of the plan; empty for the full model.")
    plan_digest: str | None = Field(None, description="Digest that the plan must have, or its first 12 characters.")
    num_concurrent: Count = Field(32, description="Most requests in flight.")
    timeout: Seconds = Field(600.0, description="Time limit of a request, in seconds.")
    api_key_file: str | None = Field(None, description="File with the endpoint's key on its first line.")

    @model_validator(mode="before")
    @classmethod
    def _split_model(cls, values: dict[str, Any]) -> dict[str, Any]:
        base, _, named = str(values.get("model") or "").partition("@")
        plan = values.get("plan")
        if plan and named and plan != named:
            raise ValueError(f"model={values['model']} and plan={plan} name different plans; name one")
        return {**values, "model": base or None, "plan": named or plan or FULL_MODEL}

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        if (self.url is None) == (self.app is None):
            raise ValueError("give url=http://HOST:PORT/v1 or app=NAME, one of them")
        return self

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.password:
            # The message must not repeat the value.
            raise Refused("the url contains a password, which result files would show; use api_key_file=FILE")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it is not the address of an endpoint; give one such as http://127.0.0.1:8000/v1")
        return value.rstrip("/")

    @property
    def served_name(self) -> str | None:
        """The name of model and plan on an endpoint."""
        return f"{self.model}@{self.plan}" if self.model and self.plan else self.model

    def api_key(self) -> str | None:
        """Return the first word of the key file. Raises Refused when the file cannot be read or is empty."""
        if self.api_key_file is None:
            return None
        content = read_file(self.api_key_file, what="api_key_file", limit_bytes=1 << 16)
        words = content.decode("ascii", "replace").split()
        if not words:
            raise Refused(f"api_key_file={self.api_key_file} is empty; put the key on its first line")
        return words[0]


def read_model_args(spec: type[S], values: Mapping[str, Any]) -> S:
    """Return validated settings, given as texts or with their types; None counts as absent.

    Raises:
        Refused: an unknown setting or a value that it cannot have, or more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Refused("this model runs in one process; start lmms-eval without accelerate or torchrun")
    given = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in values.items()
        if value is not None
    }
    return validate(spec, given, where="model_args: ")


def parse_model_args(text: str | Mapping[str, Any]) -> dict[str, Any]:
    """Split `a=1,b=2`, every value as text: a revision of digits is not a number.

    Raises:
        Refused: a part without `=`, or a setting that is named twice.
    """
    if not isinstance(text, str):
        return dict(text)
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or name in found:
            problem = "is named twice" if equals else "has no value"
            raise Refused(
                f"in model_args {part!r:.80} {problem}; write name=value, each name once, with commas between"
            )
        found[name] = value
    return found


def check_plan_digest(found: str | None, wanted: str | None, *, plan: str) -> None:
    """Refuse a plan whose digest is not the wanted one or does not begin with it."""
    if wanted is not None and (len(wanted) < _SHORTEST_DIGEST or not (found or "").startswith(wanted)):
        raise Refused(
            f"plan {plan!r} has digest {found}, not {wanted}; use the plan that was meant, or give its digest "
            f"(at least the first {_SHORTEST_DIGEST} characters)"
        )


def key_on_digest(model_args: object, digest: str) -> None:
    """Make the response cache that lmms-eval creates for these model_args key on a plan's digest too.

    With `--use_cache` lmms-eval keys responses on the text of `model_args`. There `plan=FILE` names a file, whose
    content may be another plan tomorrow. lmms-eval makes its cache after the model, from a text of its own that a
    model cannot reach, so `ResponseCache.create` is wrapped until its next call: a call for these `model_args` gets
    `plan_digest=...` appended, any other passes unchanged. A wrapper that is never called (no cache was requested)
    can only add a digest later, so keys become more specific and never less.
    """
    from lmms_eval.caching.response_cache import ResponseCache

    own = ResponseCache.__dict__["create"]

    def create(cls: Any, /, cache_root: str, *, model_args: Any = "", **rest: Any) -> Any:
        ResponseCache.create = own
        keyed = f"{model_args},plan_digest={digest}" if model_args == planned_args else model_args
        return cls.create(cache_root, model_args=keyed, **rest)

    planned_args = model_args
    ResponseCache.create = classmethod(create)
