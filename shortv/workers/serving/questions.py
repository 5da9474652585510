"""Requests that are understood become questions for a replica, within the limits of the endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shortv.request import FULL_MODEL, Message, Request, SamplingParams
from shortv.workers.serving.images import ImageReader
from shortv.workers.serving.openai_schema import ChatMessage, ChatRequest, Part, Vendor, parse_request
from shortv.workers.serving.rejection import Rejected
from shortv.workers.serving.settings import EndpointSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a caller asks and in which form the answer is to come; the plan is not looked up yet."""

    model: str
    messages: tuple[Message, ...]
    sampling: SamplingParams
    stream: bool
    include_usage: bool

    def question(self, request_id: str, plan: str, seconds: float) -> Request:
        """The question for a replica."""
        return Request(
            request_id=request_id, plan=plan, messages=self.messages, sampling=self.sampling, timeout_s=seconds
        )


def read_question(body: bytes, settings: EndpointSettings) -> Asked:
    """Read a request body with its images. Raises Rejected."""
    request = parse_request(body)
    options = request.stream_options
    if options is not None and not request.stream:
        raise Rejected(400, "stream_options is for streams; send it with stream true", param="stream_options")
    return Asked(
        model=request.model,
        messages=_turns(request.messages, settings),
        sampling=_decoding(request, settings),
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
    )


def model_names(model_name: str, plans: Mapping[str, str]) -> dict[str, str]:
    """The plan of each model name that callers may use."""
    named = {f"{model_name}@{plan}": plan for plan in sorted(plans) if plan != FULL_MODEL}
    return {model_name: FULL_MODEL, **named}


def plan_of(model: str, names: Mapping[str, str]) -> str:
    """Return the plan that a model name means; raises Rejected with the known names for any other."""
    if model not in names:
        problem = f"there is no such model here; known: {', '.join(names)}"
        raise Rejected(404, problem, param="model", code="model_not_found")
    return names[model]


def _turns(messages: list[ChatMessage], settings: EndpointSettings) -> tuple[Message, ...]:
    images = sum(part.type == "image_url" for message in messages for part in message.content)
    if images > settings.max_images:
        problem = f"messages hold {images} images, and {settings.max_images} are allowed; send fewer"
        raise Rejected(400, problem, param="messages", code="too_many_images")
    characters = sum(len(part.text or "") for message in messages for part in message.content)
    if characters > settings.max_prompt_chars:
        problem = f"messages hold {characters} characters, and {settings.max_prompt_chars} are allowed; shorten them"
        raise Rejected(400, problem, param="messages", code="context_length_exceeded")
    reader = ImageReader(settings.max_image_pixels)
    return tuple(_turn(message, f"messages.{number}", reader) for number, message in enumerate(messages))


def _turn(message: ChatMessage, where: str, reader: ImageReader) -> Message:
    if not message.content:
        raise Rejected(400, f"{where}.content is empty; send a text or a part", param=f"{where}.content")
    parts = tuple(_part(part, message, f"{where}.content.{n}", reader) for n, part in enumerate(message.content))
    return Message(role="system" if message.role == "developer" else message.role, parts=parts)


def _part(part: Part, message: ChatMessage, where: str, reader: ImageReader) -> str | bytes:
    texts, images = part.text is not None, part.image_url is not None
    if (texts, images) != (part.type == "text", part.type == "image_url"):
        problem = f"{where} is of type {part.type}, so it needs the field {part.type} and no other content"
        raise Rejected(400, problem, param=where)
    if part.image_url is None:
        return part.text or ""
    if message.role != "user":
        raise Rejected(400, f"{where} is an image of role {message.role}; only users send images", param=where)
    return reader.read(part.image_url.url, param=f"{where}.image_url.url")


def _decoding(request: ChatRequest, settings: EndpointSettings) -> SamplingParams:
    vendor = request.shortv or Vendor()
    max_tokens = _max_tokens(request, settings)
    min_tokens = vendor.min_tokens or 0
    if min_tokens > max_tokens:
        problem = f"shortv.min_tokens is {min_tokens}, and the answer has at most {max_tokens} tokens; send less"
        raise Rejected(400, problem, param="shortv.min_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise Rejected(400, "top_logprobs is for logprobs; send it with logprobs true", param="top_logprobs")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=vendor.top_k or 0,
        repetition_penalty=1.0 if vendor.repetition_penalty is None else vendor.repetition_penalty,
        seed=request.seed,
        stop=tuple(request.stop or ()),
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _max_tokens(request: ChatRequest, settings: EndpointSettings) -> int:
    both = request.max_tokens, request.max_completion_tokens
    given = {count for count in both if count is not None}
    if len(given) > 1:
        problem = f"max_tokens is {both[0]} and max_completion_tokens {both[1]}; send one of them"
        raise Rejected(400, problem, param="max_tokens")
    if not given:
        return settings.default_max_tokens
    # However many: the replica ends an answer where the context does.
    return given.pop()
