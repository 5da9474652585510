"""lmms-eval's instances as requests to a model, whichever form its tasks give them.

An `Instance` becomes a `Conversation`, whose rounds become messages for the model in this process and `Request`s for
replicas. Documents are read, and their images decoded, when the messages of a round are due.
"""

from __future__ import annotations

import hashlib
import io
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from PIL import Image

from shortv.errors import Refused, SampleError, ShortVError, one_line
from shortv.request import FULL_MODEL, Message, Request, SamplingParams
from shortv.untrusted import no_other_programs, open_image

Documents = Mapping[str, Any]
"""Documents by task, split and number: lmms-eval's `task_dict`."""

MAX_NEW_TOKENS: Final = 1024
"""For tasks that set no limit, as in lmms-eval's own chat models."""
_BEAMS_AND_PENALTIES: Final = ("num_beams", "repetition_penalty", "length_penalty", "min_new_tokens")
_SAMPLING: Final = ("temperature", "top_p", "top_k")
_KNOWN: Final = frozenset({*_BEAMS_AND_PENALTIES, *_SAMPLING, "do_sample", "max_new_tokens", "max_gen_toks", "until"})
# Says how LLaVA's original code cuts images; here the processor does.
_IGNORED: Final = frozenset({"image_aspect_ratio"})
# Far beyond any benchmark: a task that never ends its rounds would run forever.
_MAX_ROUNDS: Final = 100


class Conversation:
    """The rounds of one instance: the messages to send now, and what the task makes of each completion.

    Requests of type `generate_until` and `loglikelihood` have one round; `generate_until_multi_round` has as many as
    the task wants.
    """

    def __init__(self, instance: Any, documents: Documents) -> None:
        """Read an instance.

        Its arguments end with `doc_id, task, split` and begin, by type and form, with
        `ctx, doc_to_messages, gen_kwargs` (chat), `ctx, gen_kwargs, doc_to_visual` (simple),
        `ctx, gen_kwargs, doc_to_visual, doc_to_text` (simple, several rounds), or
        `ctx, continuation, doc_to_visual` (log-likelihood; or `ctx, continuation` alone, for mutual information).

        Raises:
            Refused: a request type that the models of this project do not answer.
        """
        kind = instance.request_type
        if kind not in ("generate_until", "generate_until_multi_round", "loglikelihood"):
            raise Refused(
                f"task {instance.task_name!r} sends requests of type {kind}; supported are generate_until, "
                "generate_until_multi_round and loglikelihood; choose another task"
            )
        arguments = list(instance.args)
        self._where: Any = arguments[-3:] if len(arguments) > 2 else None
        context, second, *rest = arguments[:-3] if self._where else arguments
        self._context = context
        self._chat = kind != "loglikelihood" and callable(second)
        self._render: Any = second if self._chat else (rest[0] if rest else None)
        self._later: Any = None
        if kind == "generate_until_multi_round":
            self._later = second if self._chat else rest[1]
        self._continuation = second if kind == "loglikelihood" else None
        self._next: Any = None
        self._info: Any = None
        self._rounds = 0
        self.index: int = instance.idx
        self.name = "a request without a document"
        """The document and its task, for messages."""
        if self._where:
            self.name = f"document {self._where[0]} of task {self._where[1]!r}"
        self.gen_kwargs: Mapping[str, Any] = {}
        if kind != "loglikelihood":
            self.gen_kwargs = _own_settings(rest[0] if self._chat else second, self._render)
        self.over = False
        self.texts: list[str] = []
        """The completions so far, as the task keeps them."""
        self._documents = documents

    @property
    def length(self) -> int:
        """About how long the prompt is, in characters: sorts requests, nothing else."""
        # Some tasks have no context beside their messages.
        return len(self._context) if isinstance(self._context, str) else 0

    @property
    def multi_round(self) -> bool:
        """Whether the task decides after each completion how the conversation goes on."""
        return self._later is not None

    def continuation(self) -> str | None:
        """Return the text whose log-likelihood the task wants, or None. Raises as `messages`."""
        if self._continuation is None or isinstance(self._continuation, str):
            return self._continuation
        with self._naming():
            return str(self._continuation(self._document()))

    def messages(self) -> tuple[Message, ...]:
        """Return the messages of this round, their images as Pillow images in RGB.

        Raises:
            Refused: a message holds a video, sound or anything else that is neither text nor an image.
            ShortVError: the task's own code fails, or an image cannot be used. All name the document.
        """
        with self._naming():
            return tuple(
                Message(role=message["role"], parts=tuple(self._part(part) for part in _parts(message["content"])))
                for message in self._rendered()
            )

    def _rendered(self) -> Sequence[Mapping[str, Any]]:
        if self._next is not None:
            return list(self._next)
        if self._chat:
            return list(self._render(self._document()))
        return _user_message(self._render(self._document()) if self._render else (), self._context)

    def _part(self, part: Mapping[str, Any]) -> str | Image.Image:
        if part["type"] == "text":
            return str(part["text"])
        if part["type"] != "image":
            raise Refused(f"{self.name} holds {part['type']}; models get text and images: choose an image task")
        source = part.get("url", part.get("image"))
        if not isinstance(source, Image.Image | str | Path):
            raise Refused(f"{self.name} has a {type(source).__name__} as image; supported are Pillow images and files")
        return open_image(source)

    def request(self, *, plan: str = FULL_MODEL, timeout_s: float = 600.0, seed: int = 0, repeat: int = 0) -> Request:
        """Return this round's request to replicas, its images encoded.

        Args:
            seed: with the document and `repeat`, decides what a sampled completion draws.
            repeat: which of the repeats this is, for tasks that repeat their requests.

        Raises:
            Refused: a generation setting that is not supported, or as `messages`.
            ShortVError: as `messages`.
        """
        sampling = sampling_params(self.gen_kwargs)
        if sampling.temperature > 0:
            key = repr((seed, self.name, self.index, repeat))
            digest = hashlib.sha256(key.encode()).digest()
            sampling = replace(sampling, seed=int.from_bytes(digest[:4]) >> 1)
        return Request(
            request_id=uuid.uuid4().hex,
            plan=plan,
            messages=with_files(self.messages()),
            sampling=sampling,
            continuation=self.continuation(),
            timeout_s=timeout_s,
        )

    def add(self, text: str) -> None:
        """Take the completion of this round; a multi-round task then says how the conversation goes on.

        Raises:
            ShortVError: the task's own code fails, or it has not ended the conversation after 100 rounds.
        """
        self.texts = [*self.texts, text]
        self._rounds += 1
        if self._later is None:
            self.over = True
            return
        with self._naming():
            answer = self._later(
                self._document(),
                round_idx=self._rounds,
                previous_output=list(self.texts),
                previous_round_info=self._info,
            )
        if not isinstance(answer, tuple) or len(answer) != (4 if self._chat else 5):
            self.over = True
            return
        *content, over, texts, self._info = answer
        self.texts = self.texts if texts is None else list(texts)
        self._next = None if over else content[0] if self._chat else _user_message(*content)
        self.over = self._next is None
        if not self.over and self._rounds == _MAX_ROUNDS:
            raise ShortVError(f"{self.name} has not ended after {_MAX_ROUNDS} rounds; correct the task")

    def _document(self) -> Any:
        doc_id, task, split = self._where
        return self._documents[task][split][doc_id]

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Make a failure of the task's own code, or of an image that it opens, name the document."""
        try:
            with no_other_programs():
                yield
        except SampleError as error:
            raise ShortVError(f"an image of {self.name} cannot be read: {error}") from error
        except ShortVError:
            raise
        except Exception as error:  # tasks run third-party code
            raise ShortVError(f"{self.name} gives no prompt: {type(error).__name__}: {one_line(error)}") from error


def _parts(content: Any) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _user_message(visuals: Sequence[Any] | None, text: str) -> list[dict[str, Any]]:
    images = [{"type": _kind(visual), "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def _kind(visual: Any) -> str:
    # In lmms-eval's simple form a path is a video and a dictionary is sound.
    if isinstance(visual, str):
        return "video"
    return "audio" if isinstance(visual, dict) else "image"


def _own_settings(gen_kwargs: Mapping[str, Any], function: Any) -> Mapping[str, Any]:
    """Return a task's generation settings without the stop that lmms-eval adds to tasks that name none.

    That stop is the task's few-shot delimiter, a blank line: it would end every completion after its first paragraph.
    A task that names a blank line itself means it. By its value that stop is the same, so the object decides: what
    lmms-eval adds is the delimiter of the task's configuration itself, and a name in a task file is another object.
    """
    until = gen_kwargs.get("until")
    config = getattr(getattr(function, "__self__", None), "config", None)
    added = isinstance(until, list) and len(until) == 1 and until[0] is getattr(config, "fewshot_delimiter", None)
    return {**gen_kwargs, "until": []} if added else gen_kwargs


def with_files(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages with their Pillow images as PNG files, which lose nothing that a model sees."""
    return tuple(replace(message, parts=tuple(map(_file, message.parts))) for message in messages)


def _file(part: object) -> object:
    if not isinstance(part, Image.Image):
        return part
    stream = io.BytesIO()
    # Level 1: the file travels once, mostly inside a machine; stronger compression takes longer than it saves.
    open_image(part).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def sampling_params(gen_kwargs: Mapping[str, Any]) -> SamplingParams:
    """Return a task's generation settings for a replica.

    A temperature decides between greedy (0) and sampled; without one `do_sample` does, at temperature 1.

    Raises:
        Refused: a setting that is not known, or beam search, which replicas do not run.
    """
    given, sampled = _settings(gen_kwargs)
    if int(given.get("num_beams", 1)) > 1:
        raise Refused(
            f"the task's generation setting num_beams={given['num_beams']} is not supported by replicas, which follow "
            "one beam; set num_beams=1 with --gen_kwargs, or run the model shortv in one process"
        )
    greedy = SamplingParams(
        max_tokens=_max_tokens(given),
        min_tokens=int(given.get("min_new_tokens", 0)),
        repetition_penalty=float(given.get("repetition_penalty", 1.0)),
        stop=_stop(given),
    )
    if not sampled:
        return greedy
    return replace(
        greedy,
        temperature=float(given.get("temperature", 1.0)),
        top_p=float(given.get("top_p", 1.0)),
        top_k=int(given.get("top_k", 0)),
    )


def generate_arguments(gen_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a task's generation settings as arguments of transformers' `generate`, and its stop texts.

    Raises:
        Refused: a setting that is not known.
    """
    given, sampled = _settings(gen_kwargs)
    arguments: dict[str, Any] = {name: given[name] for name in _BEAMS_AND_PENALTIES if name in given}
    # None overrides what the model's own generation settings say, and keeps transformers from warning about them.
    arguments |= {name: given[name] for name in _SAMPLING if name in given} if sampled else dict.fromkeys(_SAMPLING)
    return {**arguments, "do_sample": sampled, "max_new_tokens": _max_tokens(given)}, _stop(given)


def _settings(gen_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    given = {name: value for name, value in gen_kwargs.items() if value is not None and name not in _IGNORED}
    unknown = sorted(given.keys() - _KNOWN)
    if unknown:
        raise Refused(
            f"the task's generation setting {unknown[0]!r} is not supported; supported are {', '.join(sorted(_KNOWN))}"
        )
    until = given.get("until", ())
    if not isinstance(until, str) and not (isinstance(until, list | tuple) and all(isinstance(s, str) for s in until)):
        raise Refused(f"the task's generation setting until is {until!r:.80}; give a text or a list of texts")
    for name in sorted(given.keys() - {"until", "do_sample"}):
        if not _is_number(given[name]):
            raise Refused(f"the task's generation setting {name} is {given[name]!r:.80}; give a number")
    return given, float(given["temperature"]) > 0 if "temperature" in given else bool(given.get("do_sample"))


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _max_tokens(given: Mapping[str, Any]) -> int:
    return int(given.get("max_new_tokens", given.get("max_gen_toks", MAX_NEW_TOKENS)))


def _stop(given: Mapping[str, Any]) -> tuple[str, ...]:
    until = given.get("until", ())
    return tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
