"""What lmms-eval asks of a model, whichever way its tasks wrap it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

from shortv.errors import ShortVError

P = ParamSpec("P")
R = TypeVar("R")
Messages = list[Any]
"""Turns of a conversation as lmms-eval's protocol has them: `{"role", "content": [{"type", "text" or "url"}]}`."""
Documents = Mapping[str, Any]
"""Documents by task, split and number: `lmms.task_dict`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A conversation to continue. `messages` decodes images, so it is called when its batch is due."""

    name: str
    """Which document of which task, for messages about it."""
    length: int
    """About how long the prompt is: sorts requests, nothing else."""
    messages: Callable[[], Messages]
    gen_kwargs: Mapping[str, Any]
    continuation: str = ""
    """The text whose likelihood is asked, for requests that ask for one."""


class Round(NamedTuple):
    """What a multi-round task says next: the messages (None when it is over), the answers so far, its own notes."""

    messages: Messages | None
    answers: list[str]
    info: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A request of several rounds; `next_round` is given the round, the answers so far and the task's notes."""

    first: Request
    next_round: Callable[[int, list[str], Any], Round]


def generation(instance: Any, documents: Documents) -> Request:
    """Read a `generate_until` request, in the chat form or the simple one.

    Chat: `(ctx, doc_to_messages, gen_kwargs, doc_id, task, split)`.
    Simple: `(ctx, gen_kwargs, doc_to_visual, doc_id, task, split)`.
    """
    context, second, third, doc_id, task, split = instance.args
    if callable(second):
        return _request(context, lambda: second(documents[task][split][doc_id]), third, task, doc_id)
    return _request(context, lambda: _turn(third(documents[task][split][doc_id]), context), second, task, doc_id)


def likelihood(instance: Any, documents: Documents) -> Request:
    """Read a `loglikelihood` request: `(ctx, continuation or doc_to_target, doc_to_visual, doc_id, task, split)`.

    Without the last four the continuation is asked for on its own (mutual information).
    """
    context, continuation, *rest = instance.args
    if not rest:
        return _request(context, lambda: _turn((), context), {}, "", "", continuation)
    doc_to_visual, doc_id, task, split = rest

    def document() -> Any:
        return documents[task][split][doc_id]

    text = continuation if isinstance(continuation, str) else str(continuation(document()))
    return _request(context, lambda: _turn(doc_to_visual(document()), context), {}, task, doc_id, text)


def conversation(instance: Any, documents: Documents) -> Conversation:
    """Read a `generate_until_multi_round` request, in the chat form or the simple one.

    Chat: as `generation`, and `doc_to_messages` gives later rounds as `(messages, over, answers, info)`.
    Simple: `(ctx, gen_kwargs, doc_to_visual, doc_to_text, doc_id, task, split)`, and `doc_to_text` gives later
    rounds as `(visuals, text, over, answers, info)`.
    """
    chat = callable(instance.args[1])
    if chat:
        context, doc_to_messages, gen_kwargs, doc_id, task, split = instance.args
    else:
        context, gen_kwargs, doc_to_visual, doc_to_messages, doc_id, task, split = instance.args

    def document() -> Any:
        return documents[task][split][doc_id]

    def first() -> Messages:
        return list(doc_to_messages(document())) if chat else _turn(doc_to_visual(document()), context)

    def next_round(number: int, answers: list[str], info: Any) -> Round:
        found = doc_to_messages(document(), round_idx=number, previous_output=list(answers), previous_round_info=info)
        if not isinstance(found, tuple) or len(found) != (4 if chat else 5):
            return Round(None, answers, info)
        *content, over, told, info = found
        kept = list(told) if told is not None else answers
        if over:
            return Round(None, kept, info)
        return Round(content[0] if chat else _turn(*content), kept, info)

    request = _request(context, first, gen_kwargs, task, doc_id)
    return Conversation(first=request, next_round=_named(request.name, next_round))


def _request(
    context: Any,
    messages: Callable[[], Messages],
    gen_kwargs: Mapping[str, Any],
    task: str,
    doc_id: object,
    continuation: str = "",
) -> Request:
    name = f"document {doc_id} of task {task!r}" if task else "a request without a document"
    return Request(
        name=name,
        # Some tasks have no context beside their messages.
        length=len(context) if isinstance(context, str) else 0,
        messages=_named(name, messages),
        gen_kwargs=gen_kwargs,
        continuation=continuation,
    )


def _turn(visuals: Sequence[Any] | None, text: str) -> Messages:
    images = [{"type": _kind(visual), "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def _kind(visual: Any) -> str:
    # In lmms-eval's simple form a path is a video and a dictionary is sound.
    if isinstance(visual, str):
        return "video"
    return "audio" if isinstance(visual, dict) else "image"


def _named(name: str, function: Callable[P, R]) -> Callable[P, R]:
    """Let a failure of the task's own code, or of an image it opens, say which document it was."""

    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ShortVError:
            raise
        except Exception as error:  # tasks run third-party code
            raise ShortVError(f"{name} gives no prompt: {type(error).__name__}: {error}") from error

    return named
