"""Fields beyond those that this service works with: harmless, unsupported or unknown."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from shortv.workers.serving.rejection import Rejected

# What a field of OpenAI's API may be, null apart, where this service cannot do what it asks for.
_ONLY: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
    # In messages, as clients send an answer back.
    "annotations": ([],),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
# Fields that change nothing in an answer.
_IGNORED = {
    "metadata",
    "name",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
_STRANGE = re.compile(r"[^A-Za-z0-9_.-]")


def check_extras(extras: Mapping[str, Any], *, prefix: str = "", vendor: Container[str] = ()) -> None:
    """Check the fields of a request or, with its place as `prefix`, of a message.

    Raises:
        Rejected: one asks for what this service cannot do, or is unknown; fields of `vendor` are told their place.
    """
    for name, value in extras.items():
        if name in _IGNORED or (name in _ONLY and (value is None or value in _ONLY[name])):
            continue
        where = shown(prefix + name)
        if name in _ONLY:
            raise bad_field(where, f"this service does not support it{_instead(_ONLY[name])}")
        hint = f'send it as {{"shortv": {{"{name}": ...}}}}' if name in vendor else "leave it out"
        raise bad_field(where, f"this field is unknown; {hint}")


def bad_field(where: str, problem: str) -> Rejected:
    """What is wrong with a field, for the caller."""
    return Rejected(400, f"{where}: {problem}", param=where)


def shown(name: str) -> str:
    """A name that a caller chose, short and without surprises."""
    return _STRANGE.sub("?", name)[:80]


def _instead(allowed: Sequence[object]) -> str:
    return f"; leave it out, or send {' or '.join(map(repr, allowed))}" if allowed else "; leave it out"
