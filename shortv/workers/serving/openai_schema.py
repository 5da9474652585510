"""OpenAI's chat requests, as far as this service understands them, turned into questions."""

from __future__ import annotations

from typing import Annotated, Literal

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
from pydantic_core import PydanticCustomError, from_json

from shortv.workers.serving.extra_fields import bad_field, check_extras, shown
from shortv.workers.serving.rejection import Rejected

_MOST_MESSAGES, _MOST_PARTS, _MOST_FIELDS = 1024, 1024, 100


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
        # Pydantic would make an error of each unknown field: seconds for a body of nothing else.
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", "this object has too many fields; leave out unknown ones")
        return value


class _Closed(_Open):
    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Closed):
    """Where an image is; `detail` is accepted and changes nothing."""

    url: StrictStr
    detail: Literal["auto", "low", "high", "original"] | None = None


class Part(_Closed):
    """A text or an image."""

    type: Literal["text", "image_url"]
    text: StrictStr | None = None
    image_url: ImageUrl | None = None


class ChatMessage(_Open):
    """Who says what."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], FailFast(), Field(max_length=_MOST_PARTS), BeforeValidator(_as_parts)]


class StreamOptions(_Closed):
    """What a stream carries besides the answer."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class Vendor(_Closed):
    """Settings that OpenAI's API does not have, under the key `shortv`."""

    top_k: Count | None = None
    min_tokens: Count | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None


class ChatRequest(_Open):
    """The body of POST /v1/chat/completions.

    Unlike OpenAI's, an absent `temperature` is 0: benchmark users expect greedy answers that can be repeated.
    """

    model: StrictStr
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stop: Annotated[list[StopText], Field(max_length=16), BeforeValidator(_listed)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Count, Field(le=20)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    shortv: Vendor | None = None


def parse_request(body: bytes) -> ChatRequest:
    """Read a request body.

    Raises:
        Rejected: it is no JSON, or a field is unknown, unsupported, of the wrong type or out of range. The message
            names the field and never shows what it holds.
    """
    try:
        found = from_json(body)
    except ValueError as error:
        problem = f"the body is not valid JSON: {error}"  # the parser says where and what, without the text
        raise Rejected(400, problem, code="invalid_json") from None
    if not isinstance(found, dict):
        raise Rejected(400, 'the body is JSON, but not an object; send {"model": ..., "messages": [...]}')
    try:
        request = ChatRequest.model_validate(found)
    except ValidationError as error:
        raise _rejected(error) from None
    check_extras(request.model_extra or {}, vendor=Vendor.model_fields)
    for number, message in enumerate(request.messages):
        check_extras(message.model_extra or {}, prefix=f"messages.{number}.")
    return request


def _rejected(error: ValidationError) -> Rejected:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = shown(".".join(str(step) for step in first["loc"])) or "body"
    if first["type"] == "extra_forbidden":
        return bad_field(where, "this field is unknown; leave it out")
    return bad_field(where, first["msg"])
