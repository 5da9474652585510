"""OpenAI's chat requests, as far as this service supports them, read into a `Request`.

Bodies are untrusted: each bound is checked before time or memory is spent, and an error names the field and never
shows its value.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StrictBool,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from reports.http import HttpError
from shortv.errors import Refused, SampleError
from shortv.request import Message, Request, SamplingParams
from shortv.untrusted import WEB_FORMATS, image_size, parse_json
from shortv.workers.serving.spec import EndpointSpec

MAX_PROMPT_CHARS = 1_000_000
"""Of all texts of a request together: far beyond any context, so that megabytes are not tokenized to be refused."""
_MAX_JSON_VALUES = 1_500_000
_MAX_MESSAGES, _MAX_PARTS, _MAX_FIELDS = 1024, 1024, 100
_DATA_URI = re.compile(r"data:image/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE | re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}:")
_STRANGE = re.compile(r"[^A-Za-z0-9_.-]")
# The values, besides null, that fields of OpenAI's API may have where this service does not support the others.
_ONLY: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("audio", "moderation", "prediction", "web_search_options"), ()),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (0,)),
    **dict.fromkeys(("function_call", "tool_choice"), ("none", "auto")),
    **dict.fromkeys(("functions", "tools"), ([],)),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "verbosity": ("medium",),
    # In messages, as clients send a completion back.
    **dict.fromkeys(("annotations", "tool_calls"), ([],)),
    **dict.fromkeys(("refusal", "tool_call_id"), ()),
}
# Fields that do not change a completion.
_IGNORED = {
    *("metadata", "name", "parallel_tool_calls", "safety_identifier", "service_tier", "store", "user"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}

Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
StopText = Annotated[str, Field(strict=True, min_length=1, max_length=1000)]


def _is_neutral(name: str, value: object) -> bool:
    return name in _IGNORED or (name in _ONLY and (value is None or value in _ONLY[name]))


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: object) -> object:
        # Pydantic would make one error per unknown field: seconds for a body of nothing else.
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", "this object has too many fields; leave out unknown ones")
        return value


class _Open(_Object):
    """An object whose fields may be any of OpenAI's, as long as they change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if not _is_neutral(name, item)}


def _decoded(url: object) -> bytes:
    """Return the encoded image of a data URI; nothing is ever fetched."""
    if not isinstance(url, str):
        raise PydanticCustomError("string_type", "this is not a text; send data:image/png;base64,...")
    found = _DATA_URI.match(url)
    if found is None:
        scheme = _SCHEME.match(url)
        kind = f"a {scheme.group().lower()} URL" if scheme else "a text"
        problem = "this is {kind}, not a base64 data URI of an image; URLs are never fetched"
        raise PydanticCustomError("url", problem + "; send data:image/png;base64,...", {"kind": kind})
    try:
        return binascii.a2b_base64(memoryview(url.encode("ascii"))[found.end() :], strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        problem = "this is not valid base64; encode the file with the standard alphabet"
        raise PydanticCustomError("base64", problem) from None


class _ImageUrl(_Object):
    url: Annotated[bytes, BeforeValidator(_decoded)]
    detail: Literal["auto", "low", "high", "original"] | None = None


class _Part(_Object):
    type: Literal["text", "image_url"]
    text: StrictStr | None = None
    image_url: _ImageUrl | None = None

    @model_validator(mode="after")
    def _one_content(self) -> _Part:
        if (self.text is not None, self.image_url is not None) != (self.type == "text", self.type == "image_url"):
            problem = "the part is of type {type}, so it needs the field {type} and no other content"
            raise PydanticCustomError("part", problem, {"type": self.type})
        return self


class _Message(_Open):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], FailFast(), Field(min_length=1, max_length=_MAX_PARTS), BeforeValidator(_as_parts)]


class _StreamOptions(_Object):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class _Vendor(_Object):
    """Settings that OpenAI's API does not have, under the key `shortv`."""

    top_k: Count | None = None
    min_tokens: Count | None = None
    # Logits are divided or multiplied by the penalty in float32, which must not overflow.
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None


class _Body(_Open):
    """The body of POST /v1/chat/completions.

    Unlike OpenAI's, an absent `temperature` is 0: benchmarks expect greedy completions that can be repeated.
    """

    model: StrictStr
    messages: Annotated[list[_Message], FailFast(), Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stop: Annotated[tuple[StopText, ...], Field(max_length=16), BeforeValidator(_listed)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Count, Field(le=20)] | None = None
    stream: StrictBool | None = None
    stream_options: _StreamOptions | None = None
    shortv: _Vendor | None = None


class ChatCall(NamedTuple):
    """A chat request: the model's name, the request without its plan, and the form of the reply."""

    model: str
    request: Request
    stream: bool
    include_usage: bool


def read_chat(body: bytes, spec: EndpointSpec, *, request_id: str) -> ChatCall:
    """Read the body of a chat request with its images, whose headers are checked.

    Raises:
        HttpError: status 400. The body is not JSON; a field is unknown, unsupported, of the wrong type or out of
            range; there are too many images, pixels or characters; or an image is not a readable data URI.
    """
    parsed = _parse(body)
    sampling = _sampling(parsed)
    messages = tuple(_messages(parsed, spec))
    request = Request(request_id=request_id, messages=messages, sampling=sampling, timeout_s=spec.timeout)
    options = parsed.stream_options
    return ChatCall(parsed.model, request, bool(parsed.stream), bool(options and options.include_usage))


def _parse(body: bytes) -> _Body:
    # Base64 has none of these characters, and a prompt of the allowed length not so many.
    if sum(body.count(mark) for mark in (b"{", b"[", b",")) > _MAX_JSON_VALUES:
        raise HttpError(400, "the body has too many JSON values; send fewer fields", code="invalid_json")
    try:
        found = parse_json(body, what="the body", limit_bytes=len(body))
    except Refused as error:
        raise HttpError(400, str(error), code="invalid_json") from None
    if not isinstance(found, dict):
        raise HttpError(400, 'the body is JSON, but not an object; send {"model": ..., "messages": [...]}')
    try:
        return _Body.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = _STRANGE.sub("?", ".".join(map(str, first["loc"]))[:80]) or "body"
        problem = _unknown(first["loc"]) if first["type"] == "extra_forbidden" else first["msg"]
        raise HttpError(400, f"{where}: {problem}", param=where) from None


def _unknown(location: tuple[int | str, ...]) -> str:
    """Return what is wrong with a field that no model has."""
    name = str(location[-1])
    if name in _ONLY:
        allowed = " or ".join(map(repr, _ONLY[name]))
        return f"this service does not support it; leave it out{allowed and f', or send {allowed}'}"
    if name in _Vendor.model_fields and len(location) == 1:
        return f'this field is unknown; send it as {{"shortv": {{"{name}": ...}}}}'
    return "this field is unknown; leave it out"


def _sampling(parsed: _Body) -> SamplingParams:
    vendor = parsed.shortv or _Vendor()
    limits = {parsed.max_tokens, parsed.max_completion_tokens} - {None}
    # No upper bound: a completion ends where the model's context does.
    max_tokens = next(iter(limits), None) or SamplingParams().max_tokens
    shortest = vendor.min_tokens or 0
    rules = (
        (parsed.stream_options and not parsed.stream, "stream_options", "needs stream true; send both or neither"),
        (len(limits) > 1, "max_tokens", "differs from max_completion_tokens; send one of them"),
        (shortest > max_tokens, "shortv.min_tokens", f"is {shortest}, and the completion ends after {max_tokens}"),
        (parsed.top_logprobs is not None and not parsed.logprobs, "top_logprobs", "needs logprobs true; send both"),
    )
    for is_broken, param, problem in rules:
        if is_broken:
            raise HttpError(400, f"{param} {problem}", param=param)
    given = parsed.model_dump(include={"temperature", "top_p", "seed", "stop"}, exclude_none=True)
    return SamplingParams(
        max_tokens=max_tokens,
        top_logprobs=(parsed.top_logprobs or 0) if parsed.logprobs else None,
        **given,
        **vendor.model_dump(exclude_none=True),
    )


def _messages(parsed: _Body, spec: EndpointSpec) -> Iterator[Message]:
    parts = [part for message in parsed.messages for part in message.content]
    images, characters = sum(part.image_url is not None for part in parts), sum(len(part.text or "") for part in parts)
    if images > spec.max_images:
        problem = f"messages have {images} images, and {spec.max_images} are allowed; send fewer"
        raise HttpError(400, problem, param="messages", code="too_many_images")
    if characters > MAX_PROMPT_CHARS:
        problem = f"messages have {characters} characters, and {MAX_PROMPT_CHARS} are allowed; shorten them"
        raise HttpError(400, problem, param="messages", code="context_length_exceeded")
    left = allowed = int(spec.max_image_megapixels * 1e6)
    for at, message in enumerate(parsed.messages):
        for number, part in enumerate(message.content):
            where = f"messages.{at}.content.{number}"
            if part.image_url is not None and message.role != "user":
                problem = f"{where} is an image of role {message.role}; only users send images"
                raise HttpError(400, problem, param=where)
            if part.image_url is not None:
                left -= _pixels(part.image_url.url, f"{where}.image_url.url", left=left, allowed=allowed)
        content = (part.text or "" if part.image_url is None else part.image_url.url for part in message.content)
        yield Message(role="system" if message.role == "developer" else message.role, parts=tuple(content))


def _pixels(image: bytes, param: str, *, left: int, allowed: int) -> int:
    """Return the number of pixels of an image. Raises HttpError for more than are left."""
    try:
        width, height = image_size(image, formats=WEB_FORMATS, max_pixels=allowed)
    except SampleError as error:
        code = "image_too_large" if error.error in ("too-large", "too-elongated") else "invalid_image"
        raise HttpError(400, f"{param}: {error.message}", param=param, code=code) from None
    if width * height > left:
        problem = f"with {width} x {height} pixels the images exceed the {allowed} allowed for all together"
        raise HttpError(400, f"{param}: {problem}; scale them down", param=param, code="image_too_large")
    return width * height
