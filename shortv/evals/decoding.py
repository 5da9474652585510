"""A task's generation settings, read once for the model in this process and for replicas."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from shortv.errors import Refused
from shortv.request import SamplingParams

MAX_NEW_TOKENS: Final = 1024
"""For tasks that set no limit, as in lmms-eval's own chat models."""
BEAMS_AND_PENALTIES: Final[Sequence[str]] = ("num_beams", "repetition_penalty", "length_penalty", "min_new_tokens")
SAMPLING: Final[Sequence[str]] = ("temperature", "top_p", "top_k")

# What lmms-eval adds to tasks that name no stop: there it would end every answer after its first paragraph.
_ADDED_STOP: Final = "\n\n"
_KNOWN: Final = frozenset({*BEAMS_AND_PENALTIES, *SAMPLING, "do_sample", "max_new_tokens", "max_gen_toks", "until"})
# Says how LLaVA's original code cuts images; here the processor does.
_IGNORED: Final = frozenset({"image_aspect_ratio"})


class GenerationSettings(NamedTuple):
    """The settings a task gives by name, and what they say together."""

    given: Mapping[str, Any]
    sampled: bool
    max_tokens: int
    stops: tuple[str, ...]


def read_settings(gen_kwargs: Mapping[str, Any]) -> GenerationSettings:
    """Read a task's `gen_kwargs`.

    A temperature decides between greedy (0) and sampled; without one `do_sample` does. `until` ends an answer, except
    for the blank line that lmms-eval adds to tasks that name no stop.

    Raises:
        Refused: a setting that is not known.
    """
    given = {name: value for name, value in gen_kwargs.items() if value is not None and name not in _IGNORED}
    unknown = sorted(given.keys() - _KNOWN)
    if unknown:
        raise Refused(
            f"the task's generation setting {unknown[0]!r} is not supported; the model shortv knows "
            f"{', '.join(sorted(_KNOWN))}"
        )
    until = given.get("until", ())
    stops = (until,) if isinstance(until, str) else tuple(until)
    return GenerationSettings(
        given=given,
        sampled=given["temperature"] > 0 if "temperature" in given else bool(given.get("do_sample")),
        max_tokens=int(given.get("max_new_tokens", given.get("max_gen_toks", MAX_NEW_TOKENS))),
        stops=tuple(stop for stop in stops if stop and stop != _ADDED_STOP),
    )


def chat_decoding(gen_kwargs: Mapping[str, Any]) -> SamplingParams:
    """Read a task's `gen_kwargs` for a replica; a sampled answer without a temperature is drawn at 1.

    Raises:
        Refused: a setting that is not known, or beam search, which replicas do not do.
    """
    given, sampled, max_tokens, stops = read_settings(gen_kwargs)
    if int(given.get("num_beams", 1)) > 1:
        raise Refused(
            f"the task's generation setting num_beams={given['num_beams']} is not supported by replicas, which follow "
            "one beam; set num_beams=1 with --gen_kwargs, or run the model shortv in one process"
        )
    decoding = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=int(given.get("min_new_tokens", 0)),
        repetition_penalty=float(given.get("repetition_penalty", 1.0)),
        stop=stops,
    )
    if not sampled:
        return decoding
    return replace(
        decoding,
        temperature=float(given.get("temperature", 1.0)),
        top_p=float(given.get("top_p", 1.0)),
        top_k=int(given.get("top_k", 0)),
    )


def seeded(decoding: SamplingParams, *key: object) -> SamplingParams:
    """Let a sampled answer be the same whenever it is asked for under this key."""
    if decoding.temperature <= 0:
        return decoding
    digest = hashlib.sha256(repr(key).encode()).digest()
    return replace(decoding, seed=int.from_bytes(digest[:4]) >> 1)
