"""lmms-eval's instances as requests to a model, whichever form its tasks give them."""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from PIL import Image
from pydantic import BeforeValidator, Field

from shortv.errors import Refused, SampleError, ShortVError, one_line
from shortv.request import FULL_MODEL, Completion, Likelihood, Message, Request, SamplingParams
from shortv.spec import Spec, validate
from shortv.untrusted import no_other_programs, open_image

Documents = Mapping[str, Any]
"""Documents by task, split and number: lmms-eval's `task_dict`."""

_SAMPLING: Final = ("temperature", "top_p", "top_k")
_BEAMS_AND_PENALTIES: Final = ("num_beams", "repetition_penalty", "length_penalty", "min_new_tokens")
# Far beyond any benchmark: a task that never ends its rounds would run forever.
_MAX_ROUNDS: Final = 100
Whole = Annotated[int, Field(le=2**53)]


class GenerationSettings(Spec):
    """A task's generation settings, by lmms-eval's names. None of a field means that the task does not set it."""

    max_new_tokens: Whole | None = None
    max_gen_toks: Whole | None = None
    min_new_tokens: Whole | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    num_beams: Whole | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    until: Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)] = ()
    # Says how LLaVA's original code cuts images; here the processor does.
    image_aspect_ratio: Any = None

    @classmethod
    def read(cls, gen_kwargs: Mapping[str, Any]) -> GenerationSettings:
        """Return validated settings. Raises Refused for one that is not known or not of its type."""
        given = {name: value for name, value in gen_kwargs.items() if value is not None}
        return validate(cls, given, where="the task's generation settings: ")

    @property
    def sampled(self) -> bool:
        """Whether completions are drawn: a temperature decides, and without one `do_sample` does."""
        return self.do_sample if self.temperature is None else self.temperature > 0

    @property
    def max_tokens(self) -> int:
        """The most tokens of a completion, without a limit as many as in lmms-eval's own chat models."""
        return next(limit for limit in (self.max_new_tokens, self.max_gen_toks, 1024) if limit is not None)

    @property
    def stop(self) -> tuple[str, ...]:
        """The texts that end a completion."""
        return tuple(filter(None, self.until))

    def sampling_params(self) -> SamplingParams:
        """Return the settings for a replica. Raises Refused for beam search, which replicas do not run."""
        if (self.num_beams or 1) > 1:
            raise Refused(
                f"the task's generation setting num_beams={self.num_beams} is not supported by replicas, which follow "
                "one beam; set num_beams=1 with --gen_kwargs, or run the model shortv in one process"
            )
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_new_tokens or 0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            stop=self.stop,
            **({"temperature": 1.0} | self._given(_SAMPLING) if self.sampled else {}),
        )

    def generate_arguments(self) -> dict[str, Any]:
        """Return the settings as arguments of transformers' `generate`; the stop texts are apart, in `stop`."""
        # None overrides what the model's own settings say, and keeps transformers from warning about them.
        sampling = self._given(_SAMPLING) if self.sampled else dict.fromkeys(_SAMPLING)
        own = {"do_sample": self.sampled, "max_new_tokens": self.max_tokens}
        return self._given(_BEAMS_AND_PENALTIES) | sampling | own

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
        return self.model_dump(include={*names}, exclude_none=True)


class Conversation:
    """The rounds of one instance: the messages to send now, what the task makes of each completion, and the result.

    Requests of type `generate_until` and `loglikelihood` have one round; `generate_until_multi_round` has as many as
    the task wants. The document is read, and its images are decoded, when the messages of a round are due.
    """

    def __init__(self, instance: Any, documents: Documents) -> None:
        """Read an instance.

        Its arguments end with `doc_id, task, split` and begin, by type and form, with
        `ctx, doc_to_messages, gen_kwargs` (chat), `ctx, gen_kwargs, doc_to_visual` (simple),
        `ctx, gen_kwargs, doc_to_visual, doc_to_text` (simple, several rounds), or
        `ctx, continuation, doc_to_visual` (log-likelihood; or `ctx, continuation` alone, for mutual information).

        Raises:
            Refused: a request type that the models of this project do not answer, or a generation setting.
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
        self.scored = kind == "loglikelihood"
        """Whether the task wants the log-likelihood of a continuation instead of a completion."""
        self.multi_round = kind == "generate_until_multi_round"
        """Whether the task decides after each completion how the conversation goes on."""
        self._chat = not self.scored and callable(second)
        render = second if self._chat else (rest[0] if rest else None)
        self._later: Any = (second if self._chat else rest[1]) if self.multi_round else None
        self._continuation = second if self.scored else None
        self._documents = documents
        self._info: Any = None
        self._rounds = 0
        self._following: Any = None
        self._render: Any = render
        self._context = context
        self.index: int = instance.idx
        self.name = "a request without a document"
        """The document and its task, for messages."""
        if self._where:
            self.name = f"document {self._where[0]} of task {self._where[1]!r}"
        # Some tasks have no context beside their messages.
        self.length = len(context) if isinstance(context, str) else 0
        """About how long the prompt is, in characters: sorts requests, nothing else."""
        gen_kwargs = {} if self.scored else _without_added_stop(rest[0] if self._chat else second, render)
        self.settings = GenerationSettings.read(gen_kwargs)
        self.over = False
        self.texts: list[str] = []
        """The completions so far, as the task keeps them."""
        self.completions: list[Completion] = []
        self.likelihood: Likelihood | None = None

    def _next(self) -> Any:
        """Return the messages of this round in the task's form."""
        if self._rounds:
            return self._following
        if self._chat:
            return self._render(self._document())
        return _user_message(self._render(self._document()) if self._render else (), self._context)

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
                Message(role=message["role"], parts=tuple(map(self._part, _parts(message["content"]))))
                for message in self._next()
            )

    def _part(self, part: Mapping[str, Any]) -> str | Image.Image:
        if part["type"] == "text":
            return str(part["text"])
        if part["type"] != "image":
            raise Refused(f"{self.name} holds {part['type']}; models get text and images: choose an image task")
        source = part.get("url", part.get("image"))
        if not isinstance(source, Image.Image | str | Path):
            raise Refused(f"{self.name} has a {type(source).__name__} as image; supported are Pillow images and files")
        return open_image(source)

    def branch(self) -> Conversation:
        """Return a conversation that stands where this one stands, and goes on by itself."""
        own = copy(self)
        own.texts, own.completions = list(self.texts), list(self.completions)
        own._info = deepcopy(self._info)
        return own

    def request(
        self,
        *,
        plan: str = FULL_MODEL,
        timeout_s: float = 600.0,
        seed: int = 0,
        repeat: int = 0,
        form: Callable[[object], object] | None = None,
        messages: dict[Any, tuple[Message, ...]] | None = None,
    ) -> Request:
        """Return this round's request to replicas.

        Args:
            seed: with the document and `repeat`, decides what a sampled completion draws.
            repeat: which of the repeats this is, for tasks that repeat their requests.
            form: of an image, by default an encoded file (`as_png`).
            messages: messages of requests before this one, to be used again where a document has several requests
                with the same messages; those of this request are added.

        Raises:
            Refused: a generation setting that is not supported, or as `messages`.
            ShortVError: as `messages`.
        """
        sampling = self.settings.sampling_params()
        if sampling.temperature > 0:
            drawn = repr((seed, self.name, self.index, repeat))
            digest = hashlib.sha256(drawn.encode()).digest()
            sampling = replace(sampling, seed=int.from_bytes(digest[:4]) >> 1)
        same = (self.name, self._rounds, self._render, self._context) if self.scored else object()
        known = {} if messages is None else messages
        if same not in known:
            encode = form or as_png
            known[same] = tuple(replace(one, parts=tuple(map(encode, one.parts))) for one in self.messages())
        return Request(
            request_id=uuid.uuid4().hex,
            plan=plan,
            messages=known[same],
            sampling=sampling,
            continuation=self.continuation(),
            timeout_s=timeout_s,
        )

    def add(self, result: Completion | Likelihood) -> None:
        """Take the result of this round; a multi-round task then says how the conversation goes on.

        Raises:
            ShortVError: the task's own code fails, or it has not ended the conversation after 100 rounds.
        """
        if isinstance(result, Likelihood):
            self.likelihood, self.over = result, True
            return
        self.completions.append(result)
        self.texts = [*self.texts, result.text]
        self.over = not self.multi_round
        if self.over:
            return
        self._rounds += 1
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
        following = None if over else content[0] if self._chat else _user_message(*content)
        self._following = following
        self.over = following is None
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
    # In lmms-eval's simple form a path is a video and a dictionary is sound.
    kinds: dict[type, str] = {str: "video", dict: "audio"}
    images = [{"type": kinds.get(type(visual), "image"), "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def _without_added_stop(gen_kwargs: Mapping[str, Any], function: Any) -> Mapping[str, Any]:
    """Return a task's generation settings without the stop that lmms-eval adds to tasks that name none.

    That stop is the task's few-shot delimiter, a blank line: it would end every completion after its first paragraph.
    A task that names a blank line itself means it. By its value that stop is the same, so the object decides: what
    lmms-eval adds is the delimiter of the task's configuration itself, and a name in a task file is another object.
    """
    until = gen_kwargs.get("until")
    config = getattr(getattr(function, "__self__", None), "config", None)
    added = isinstance(until, list) and len(until) == 1 and until[0] is getattr(config, "fewshot_delimiter", None)
    return {**gen_kwargs, "until": []} if added else gen_kwargs


def as_png(part: object) -> object:
    """Return an image as a PNG file, which loses nothing that a model sees; other parts stay as they are."""
    if not isinstance(part, Image.Image):
        return part
    stream = io.BytesIO()
    # Level 1: the file travels once, mostly inside a machine; stronger compression takes longer than it saves.
    part.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def as_array(part: object) -> object:
    """Return an image as its pixels, uint8 (H, W, 3); encoding takes longer than sending them."""
    return np.asarray(part) if isinstance(part, Image.Image) else part
