"""How each setting of a recipe is read: every reader returns the value or raises ValueError with what to give."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from shortv.workers.request import WorkerRange

_WORDS = {"true": True, "false": False}


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    return value.strip()


def _texts(value: object) -> tuple[str, ...]:
    """A list of texts, or one text with commas in it."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) and part.strip() for part in parts):
        raise ValueError("a list of texts")
    found = [part.strip() for text in parts for part in text.split(",") if part.strip()]
    return tuple(dict.fromkeys(found))


def _number(value: object) -> float:
    # Text, because a variable that is filled in (`${LIMIT:-100}`) is one.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number")
    try:
        found = float(value)
    except ValueError:
        raise ValueError("a number") from None
    if not math.isfinite(found):
        raise ValueError("a finite number")
    return found


def _whole(value: object, *, least: int) -> int:
    wanted = f"a whole number from {least} on"
    try:
        found = _number(value)
    except ValueError:
        raise ValueError(wanted) from None
    if found != int(found) or found < least:
        raise ValueError(wanted)
    return int(found)


def _limit(value: object) -> float:
    found = _number(value)
    if not (0 < found < 1 or found == int(found) >= 1):
        raise ValueError("a number of samples, or a share between 0 and 1")
    return found


def _share(value: object) -> float:
    found = _number(value)
    if not 0 <= found <= 1:
        raise ValueError("a share of samples between 0 and 1")
    return found


def _gpus(value: object) -> float:
    found = _number(value)
    if found <= 0 or (found > 1 and found % 1):
        raise ValueError("a whole number, or a share below 1")
    return found


def _truth(value: object) -> bool:
    found = _WORDS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError("true or false")
    return found


def _one_of(value: object, *, names: tuple[str, ...]) -> str:
    if value not in names:
        raise ValueError(f"one of {', '.join(names)}")
    return str(value)


def _replicas(value: object) -> WorkerRange:
    low, _, high = str(value).partition(":")
    try:
        found = WorkerRange(_whole(low, least=1), _whole(high or low, least=1))
    except ValueError:
        raise ValueError("a number (4) or a range (2:8)") from None
    if found.low > found.high:
        raise ValueError("a range from low to high")
    return found


def _gen_kwargs(value: object) -> Mapping[str, Any]:
    """A table, or lmms-eval's `name=value,name=value`."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(name.strip() and equals for name, equals, _ in pairs):
            raise ValueError("name=value,name=value")
        value = {name.strip(): _value(text.strip()) for name, _, text in pairs}
    if not isinstance(value, Mapping):
        raise ValueError("a table of names and values")
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("texts, finite numbers, truth values and lists of them") from None
    return dict(value)


def _value(text: str) -> object:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


READERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "models": _texts,
        "revision": _text,
        "plans": _texts,
        "tasks": _texts,
        "include_path": _texts,
        "limit": _limit,
        "seed": partial(_whole, least=0),
        "gen_kwargs": _gen_kwargs,
        "replicas": _replicas,
        "gpus_per_replica": _gpus,
        "batch_size": partial(_whole, least=1),
        "num_concurrent": partial(_whole, least=1),
        "dtype": partial(_one_of, names=("auto", "float32", "bfloat16", "float16")),
        "device": partial(_one_of, names=("auto", "cpu", "cuda")),
        "attn_implementation": partial(_one_of, names=("sdpa", "eager")),
        "trust_remote_code": _truth,
        "output_path": _text,
        "fail_on_error": _share,
        "retry_failed": _truth,
    }
)
