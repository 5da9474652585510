"""OpenAI's chat requests, as far as this service supports them, read into a `Request`.

Bodies are untrusted: each bound is checked before time or memory is spent, and an error names the field and never
shows its value.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

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
DEFAULT_MAX_TOKENS = 1024
_MAX_JSON_VALUES = 1_500_000
_MAX_MESSAGES, _MAX_PARTS, _MAX_FIELDS = 1024, 1024, 100
_DATA_URI = re.compile(r"data:image/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE | re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}:")
_STRANGE = re.compile(r"[^A-Za-z0-9_.-]")
# The values, besides null, that fields of OpenAI's API may have where this service does not support the others.
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
    # In messages, as clients send a completion back.
    "annotations": ([],),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
# Fields that do not change a completion.
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


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
StopText = Annotated[str, Field(strict=True, min_length=1, max_length=1000)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: object) -> object:
        # Pydantic would make one error per unknown field: seconds for a body of nothing else.
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", "this object has too many fields; leave out unknown ones")
        return value


class _Closed(_Open):
    model_config = ConfigDict(extra="forbid")


class _ImageUrl(_Closed):
    url: StrictStr
    detail: Literal["auto", "low", "high", "original"] | None = None


class _Part(_Closed):
    type: Literal["text", "image_url"]
    text: StrictStr | None = None
    image_url: _ImageUrl | None = None


class _Message(_Open):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], FailFast(), Field(max_length=_MAX_PARTS), BeforeValidator(_as_parts)]


class _StreamOptions(_Closed):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class _Vendor(_Closed):
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
    stop: Annotated[list[StopText], Field(max_length=16), BeforeValidator(_listed)] | None = None
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
    options = parsed.stream_options
    if options is not None and not parsed.stream:
        raise HttpError(400, "stream_options needs stream true; send both or neither", param="stream_options")
    request = Request(
        request_id=request_id,
        messages=_messages(parsed.messages, spec),
        sampling=_sampling(parsed),
        timeout_s=spec.timeout,
    )
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
        parsed = _Body.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = _shown(".".join(str(step) for step in first["loc"])) or "body"
        unknown = first["type"] == "extra_forbidden"
        raise _bad_field(where, "this field is unknown; leave it out" if unknown else first["msg"]) from None
    _check_extras(parsed.model_extra or {})
    for number, message in enumerate(parsed.messages):
        _check_extras(message.model_extra or {}, prefix=f"messages.{number}.")
    return parsed


def _check_extras(extras: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse fields that are unknown, or that demand what this service does not support."""
    for name, value in extras.items():
        if name in _IGNORED or (name in _ONLY and (value is None or value in _ONLY[name])):
            continue
        where = _shown(prefix + name)
        if name in _ONLY:
            allowed = " or ".join(map(repr, _ONLY[name]))
            raise _bad_field(
                where, f"this service does not support it; leave it out{allowed and f', or send {allowed}'}"
            )
        vendor = name in _Vendor.model_fields and not prefix
        hint = f'send it as {{"shortv": {{"{name}": ...}}}}' if vendor else "leave it out"
        raise _bad_field(where, f"this field is unknown; {hint}")


def _bad_field(where: str, problem: str) -> HttpError:
    return HttpError(400, f"{where}: {problem}", param=where)


def _shown(name: str) -> str:
    return _STRANGE.sub("?", name[:80])


def _messages(messages: Sequence[_Message], spec: EndpointSpec) -> tuple[Message, ...]:
    images = sum(part.type == "image_url" for message in messages for part in message.content)
    if images > spec.max_images:
        problem = f"messages have {images} images, and {spec.max_images} are allowed; send fewer"
        raise HttpError(400, problem, param="messages", code="too_many_images")
    characters = sum(len(part.text or "") for message in messages for part in message.content)
    if characters > MAX_PROMPT_CHARS:
        problem = f"messages have {characters} characters, and {MAX_PROMPT_CHARS} are allowed; shorten them"
        raise HttpError(400, problem, param="messages", code="context_length_exceeded")
    reader = _ImageReader(int(spec.max_image_megapixels * 1e6))
    return tuple(_message(message, f"messages.{number}", reader) for number, message in enumerate(messages))


def _message(message: _Message, where: str, reader: _ImageReader) -> Message:
    if not message.content:
        raise HttpError(400, f"{where}.content is empty; send a text or a part", param=f"{where}.content")
    parts = tuple(_part(part, message, f"{where}.content.{n}", reader) for n, part in enumerate(message.content))
    return Message(role="system" if message.role == "developer" else message.role, parts=parts)


def _part(part: _Part, message: _Message, where: str, reader: _ImageReader) -> str | bytes:
    has_text, has_image = part.text is not None, part.image_url is not None
    if (has_text, has_image) != (part.type == "text", part.type == "image_url"):
        problem = f"{where} is of type {part.type}, so it needs the field {part.type} and no other content"
        raise HttpError(400, problem, param=where)
    if part.image_url is None:
        return part.text or ""
    if message.role != "user":
        raise HttpError(400, f"{where} is an image of role {message.role}; only users send images", param=where)
    return reader.read(part.image_url.url, f"{where}.image_url.url")


class _ImageReader:
    """Reads the images of one request, which share a number of pixels."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._pixels = 0

    def read(self, url: str, param: str) -> bytes:
        """Return the encoded image of a data URI; nothing is ever fetched. Raises HttpError."""
        data = _data(url, param)
        try:
            width, height = image_size(data, formats=WEB_FORMATS, max_pixels=self._max_pixels)
        except SampleError as error:
            code = "image_too_large" if error.error in ("too-large", "too-elongated") else "invalid_image"
            raise HttpError(400, f"{param}: {error.message}", param=param, code=code) from None
        self._pixels += width * height
        if self._pixels > self._max_pixels:
            problem = (
                f"with {width} x {height} pixels the images exceed the {self._max_pixels} allowed for all together"
            )
            raise HttpError(400, f"{param}: {problem}; scale them down", param=param, code="image_too_large")
        return data


def _data(url: str, param: str) -> bytes:
    found = _DATA_URI.match(url)
    if found is None:
        scheme = _SCHEME.match(url)
        name = scheme.group().lower() if scheme else ""
        problem = f"is a {name} URL, which is never fetched" if name else "is not a data URI of an image"
        if name == "data:":
            problem = "is a data URI, but not of a base64 image"
        raise HttpError(400, f"{param} {problem}; send data:image/png;base64,...", param=param)
    try:
        return binascii.a2b_base64(memoryview(url.encode("ascii"))[found.end() :], strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        problem = f"{param} is not valid base64; encode the file with the standard alphabet"
        raise HttpError(400, problem, param=param) from None


def _sampling(parsed: _Body) -> SamplingParams:
    vendor = parsed.shortv or _Vendor()
    limits = {parsed.max_tokens, parsed.max_completion_tokens} - {None}
    if len(limits) > 1:
        problem = f"max_tokens is {parsed.max_tokens} and max_completion_tokens {parsed.max_completion_tokens}"
        raise HttpError(400, f"{problem}; send one of them", param="max_tokens")
    # No upper bound: a completion ends where the model's context does.
    max_tokens = next(iter(limits), None) or DEFAULT_MAX_TOKENS
    min_tokens = vendor.min_tokens or 0
    if min_tokens > max_tokens:
        problem = f"shortv.min_tokens is {min_tokens}, and the completion has at most {max_tokens} tokens; send less"
        raise HttpError(400, problem, param="shortv.min_tokens")
    if parsed.top_logprobs is not None and not parsed.logprobs:
        raise HttpError(400, "top_logprobs needs logprobs true; send both or neither", param="top_logprobs")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=parsed.temperature or 0.0,
        top_p=1.0 if parsed.top_p is None else parsed.top_p,
        top_k=vendor.top_k or 0,
        repetition_penalty=1.0 if vendor.repetition_penalty is None else vendor.repetition_penalty,
        seed=parsed.seed,
        stop=tuple(parsed.stop or ()),
        top_logprobs=(parsed.top_logprobs or 0) if parsed.logprobs else None,
    )
