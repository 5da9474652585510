"""What `--model_args` says to the `shortv` model of lmms-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any, Literal, get_args

import torch

from shortv.errors import Refused
from shortv.plan import Plan
from shortv.spec import Dtype

# A shorter piece of a digest could fit two plans.
_SHORTEST_DIGEST = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The model, the plan it runs under, and how it is loaded and batched."""

    pretrained: str
    plan: Plan | None = None
    dtype: Dtype = "auto"
    device: str = "cpu"
    attn_implementation: Literal["sdpa", "eager"] | str = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False
    batch_size: int = 1


def settings_of(**given: Any) -> Settings:
    """Check settings that are texts or already have their types; None counts as absent.

    `plan_digest` is a check, not a setting: it must be the digest of `plan`, or its first 12 or more characters.

    Raises:
        Refused: an unknown setting, a value it cannot have, a plan that cannot be read or has another digest.
    """
    unknown = sorted(given.keys() - KNOWN)
    if unknown:
        raise Refused(f"the model shortv has no setting {unknown[0]!r}; it knows {', '.join(sorted(KNOWN))}")
    present = {name: value for name, value in given.items() if value is not None}
    plan = Plan.load(str(present["plan"])) if "plan" in present else None
    _check_digest(plan, present.get("plan_digest"))
    return Settings(
        pretrained=str(present.get("pretrained", _bundled())),
        plan=plan,
        dtype=_dtype(str(present.get("dtype", "auto"))),
        device=_device(str(present.get("device", "auto"))),
        attn_implementation=str(present.get("attn_implementation", "sdpa")),
        revision=str(present["revision"]) if "revision" in present else None,
        trust_remote_code=_switch("trust_remote_code", present.get("trust_remote_code", False)),
        batch_size=_batch_size(present.get("batch_size", 1)),
    )


KNOWN = frozenset({field.name for field in fields(Settings)} | {"plan_digest"})


def parse_model_args(text: str | Mapping[str, Any]) -> dict[str, Any]:
    """Split `a=1,b=2`, every value as text: a revision of digits is no number.

    Raises:
        Refused: a part without `=`, or a setting named twice.
    """
    if not isinstance(text, str):
        return dict(text)
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or name in found:
            why = "is named twice" if equals else "has no value"
            raise Refused(f"in model_args {part!r} {why}; write name=value, parted by commas, each name once")
        found[name] = value
    return found


def _check_digest(plan: Plan | None, digest: object) -> None:
    if digest is None:
        return
    if plan is None:
        raise Refused(f"plan_digest={digest} without a plan; give plan=FILE too, or leave both out")
    if len(str(digest)) < _SHORTEST_DIGEST or not plan.digest.startswith(str(digest)):
        raise Refused(
            f"plan {plan.name!r} has digest {plan.digest}, not {digest}; give the plan that was meant, "
            f"or its digest (at least the first {_SHORTEST_DIGEST} characters)"
        )


def _bundled() -> str:
    return str(resources.files("shortv") / "tiny" / "model")


def _dtype(value: str) -> Dtype:
    for known in get_args(Dtype):
        if value == known:
            found: Dtype = known
            return found
    raise Refused(f"dtype={value} is not supported; use one of {', '.join(get_args(Dtype))}")


def _device(value: str) -> str:
    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if value != "auto-map":
        try:
            torch.device(value)
        except RuntimeError as error:
            raise Refused(f"device={value} is no device; use auto, auto-map, cpu, cuda or cuda:N") from error
    return value


def _switch(name: str, value: object) -> bool:
    switches = {"true": True, "false": False}
    if str(value).lower() not in switches:
        raise Refused(f"{name}={value} is neither True nor False; choose one")
    return switches[str(value).lower()]


def _batch_size(value: object) -> int:
    if not str(value).isdecimal() or int(str(value)) == 0:
        raise Refused(f"batch_size={value} is no number of requests; give a whole number from 1 on")
    return int(str(value))
