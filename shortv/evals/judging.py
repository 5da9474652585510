"""Calls of a task's scoring to an LLM judge: answered from a cache, retried, and never a score when they fail.

lmms-eval's tasks call a judge through `lmms_eval.llm_judge`, with a client of `openai`, or with `requests.post`. All of
them retry in their own way, and most score a document 0 when the judge did not answer. So the calls are intercepted
where they all pass: in the HTTP libraries.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import io
import json
import queue
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial, wraps
from typing import Any, Final, NamedTuple, NoReturn
from urllib.parse import urlsplit

from shortv.errors import ShortVError, one_line

_TOO_MANY: Final = 429
_TEMPORARY: Final = frozenset({408, 409, 425, _TOO_MANY})
_SERVER_ERROR: Final = 500
# Where the text of a judge is in the APIs that have `messages`: OpenAI's and Anthropic's.
_ANSWERS: Final = ("choices", "content", "output")
# What makes a call beneath the HTTP libraries, or fails before one: their errors are failed judge calls too.
_GUARDED: Final = {
    "openai": ("OpenAI.__init__", "AsyncOpenAI.__init__", "AzureOpenAI.__init__", "AsyncAzureOpenAI.__init__"),
    "lmms_eval.llm_judge.base": ("AsyncServerInterface.evaluate",),
    "lmms_eval.llm_judge.providers": (
        "OpenAIProvider.evaluate",
        "AzureOpenAIProvider.evaluate",
        "AsyncOpenAIProvider.evaluate_async",
        "AsyncAzureOpenAIProvider.evaluate_async",
        "LocalProvider.evaluate",
        "BedrockProvider.evaluate",
    ),
}


class JudgeFailed(ShortVError):
    """A call to the judge failed for good while a document was scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgePolicy:
    """How often and how long a judge is asked; times in seconds.

    A call is tried `tries` times in `total_s` at most, with pauses that double from `first_pause_s` up to
    `longest_pause_s`, which also bounds what a judge's `Retry-After` asks for. After `failures_in_a_row` calls that
    failed so, a `Judge` does not try again.
    """

    tries: int = 4
    timeout_s: float = 60.0
    total_s: float = 180.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    failures_in_a_row: int = 3


class JudgeReply(NamedTuple):
    """The body of a judge's reply, and the document that was scored (None for a task's aggregation)."""

    doc: int | None
    body: str


class _Abandoned(BaseException):
    """Leaves a task's code after a failed call: tasks catch every `Exception` and retry, some for minutes."""


class _Call(NamedTuple):
    """One call: the address without what may be secret in it, and the digest of what is asked."""

    shown: str
    digest: str


class _Hook(NamedTuple):
    """A method of a class, and what replaces it."""

    owner: type
    name: str
    original: Any
    replacement: Any


def _hook(owner: type, name: str, make: Callable[[Any], Any]) -> _Hook:
    original = getattr(owner, name)
    return _Hook(owner, name, original, make(original))


class _Reply(NamedTuple):
    status: int
    retry_after: str | None
    text: str


# A pause and the longest time of the try after it; back comes the reply or the error; in the end the judge's body.
_Outcome = _Reply | Exception | None
_Tries = Generator[tuple[float, float], _Outcome, str]
_UNTRIED: _Outcome = None


class Judge:
    """The judge calls of a unit of documents, which are scored by one thread, one after the other.

    The n-th call of a document with the same path and body has the same digest in every plan and every run, so an
    answer that several plans give is judged once. No header is part of it: no key is kept.
    """

    def __init__(
        self,
        known: Mapping[str, str] | None = None,
        *,
        policy: JudgePolicy | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`known` holds the bodies of earlier replies by digest."""
        self.new: dict[str, JudgeReply] = {}
        """The replies that are not in `known`, by digest."""
        self._known, self._policy, self._sleep = known or {}, policy or JudgePolicy(), sleep
        self._failed_in_a_row = 0
        self._failure: str | None = None
        self._doc: int | None = None
        self._loaded: tuple[str, ...] | None = None
        self._made: tuple[_Hook, ...] = ()
        self._repeats: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def scoring(self, doc: int | None = None) -> Iterator[None]:
        """Answer the judge calls of what runs inside: the scoring of one document, or a task's aggregation.

        Only POST requests whose JSON body has `messages` are intercepted, in `requests`, `httpx` and `httpx2`, of any
        thread. Everything is undone at the end, but that the thread has an event loop.

        Raises:
            JudgeFailed: a call failed, also where the task hides that; no secret is in its message.
        """
        _ensure_event_loop()
        self._failure, self._doc = None, doc
        self._repeats.clear()
        hooks = self._hooks()
        try:
            for hook in hooks:
                setattr(hook.owner, hook.name, hook.replacement)
            yield
        except (Exception, _Abandoned):
            if self._failure is None:
                raise
        finally:
            for hook in hooks:
                setattr(hook.owner, hook.name, hook.original)
        if self._failure is not None:
            raise JudgeFailed(f"judge: {self._failure}")

    def _hooks(self) -> Sequence[_Hook]:
        """Return what to replace; libraries that a task has imported by now are among it."""
        loaded = tuple(name for name in _GUARDED if name in sys.modules)
        if loaded != self._loaded:
            self._loaded, self._made = loaded, tuple(self._make_hooks(loaded))
        return self._made

    def _make_hooks(self, loaded: Sequence[str]) -> Iterator[_Hook]:
        import requests

        yield _hook(requests.Session, "send", partial(self._send_requests, requests))
        yield _hook(requests.Session, "prepare_request", self._guard)
        for name in ("httpx", "httpx2"):
            with suppress(ImportError):
                module = importlib.import_module(name)
                yield _hook(module.Client, "send", partial(self._send_httpx, module))
                yield _hook(module.AsyncClient, "send", partial(self._send_async, module))
        for name in loaded:
            for owner, method in (guarded.split(".") for guarded in _GUARDED[name]):
                yield _hook(getattr(sys.modules[name], owner), method, self._guard)

    def _send_requests(self, requests: Any, original: Any) -> Any:
        def send(session: Any, request: Any, **more: Any) -> Any:
            call = self._call(request.method, request.url, request.body)
            if call is None:
                return original(session, request, **more)

            def ask(timeout: float) -> _Reply:
                found = original(session, request, **{**more, "timeout": timeout, "stream": False})
                return _Reply(found.status_code, found.headers.get("retry-after"), found.text)

            response = requests.Response()
            response.raw = io.BytesIO(self._answer(call, ask).encode())
            response.status_code, response.reason, response.encoding = 200, "OK", "utf-8"
            response.headers["content-type"] = "application/json"
            response.url, response.request = request.url, request
            return response

        return send

    def _send_httpx(self, httpx: Any, original: Any) -> Any:
        def send(client: Any, request: Any, **more: Any) -> Any:
            call = self._call(request.method, str(request.url), _content(request))
            if call is None:
                return original(client, request, **more)

            def ask(timeout: float) -> _Reply:
                return _httpx_reply(original(client, _within(request, timeout), **{**more, "stream": False}))

            return _httpx_response(httpx, request, self._answer(call, ask))

        return send

    def _send_async(self, httpx: Any, original: Any) -> Any:
        async def send(client: Any, request: Any, **more: Any) -> Any:
            call = self._call(request.method, str(request.url), _content(request))
            if call is None:
                return await original(client, request, **more)
            tries, outcome = self._tries(call), _UNTRIED
            try:
                while True:
                    pause, timeout = tries.send(outcome)
                    await asyncio.to_thread(self._sleep, pause)
                    try:
                        asked = original(client, _within(request, timeout), **{**more, "stream": False})
                        outcome = _httpx_reply(await asyncio.wait_for(asked, timeout))
                    except Exception as error:  # whatever the library raises: nothing was answered
                        outcome = error
            except StopIteration as found:
                return _httpx_response(httpx, request, found.value)

        return send

    def _guard(self, original: Any) -> Any:
        """Return the method; an error of it is a failed call."""

        def failed(owner: Any, error: Exception) -> NoReturn:
            # What a library says may repeat an address with its query or its user.
            message = re.sub(r"\S*[?@]\S*", "***", one_line(error))
            self._fail(f"{type(owner).__name__} cannot ask: {type(error).__name__}: {message}")

        @wraps(original)
        def guarded(owner: Any, *given: Any, **more: Any) -> Any:
            try:
                return original(owner, *given, **more)
            except Exception as error:
                failed(owner, error)

        @wraps(original)
        async def guarded_async(owner: Any, *given: Any, **more: Any) -> Any:
            try:
                return await original(owner, *given, **more)
            except Exception as error:
                failed(owner, error)

        return guarded_async if inspect.iscoroutinefunction(original) else guarded

    def _call(self, method: str | None, url: str | None, body: bytes | str | None) -> _Call | None:
        """Return a call to a judge, None for any other request."""
        if method != "POST" or url is None or not isinstance(body, bytes | str):
            return None
        try:
            asked = json.loads(body)
        except ValueError:
            return None
        if not isinstance(asked, dict) or "messages" not in asked:
            return None
        parts = urlsplit(url)
        text = json.dumps([parts.path, asked], sort_keys=True, separators=(",", ":"))
        with self._lock:
            self._repeats[text] += 1
            repeat = self._repeats[text]
        # A task that asks the same again wants another sample.
        digest = hashlib.sha256(f"{repeat} {text}".encode()).hexdigest()
        return _Call(f"{parts.hostname}{parts.path}", digest)

    def _answer(self, call: _Call, ask: Callable[[float], _Reply]) -> str:
        """Return the judge's body; `ask` makes one try in the given time."""
        tries, outcome = self._tries(call), _UNTRIED
        try:
            while True:
                pause, timeout = tries.send(outcome)
                self._sleep(pause)
                outcome = _bounded(ask, timeout)
        except StopIteration as found:
            return str(found.value)

    def _tries(self, call: _Call) -> _Tries:
        policy = self._policy
        if self._failure is not None:
            raise _Abandoned
        if (known := self._known.get(call.digest)) is not None:
            return known
        if (new := self.new.get(call.digest)) is not None:
            return new.body
        if self._failed_in_a_row >= policy.failures_in_a_row:
            self._fail(f"{call.shown} is not called again after {self._failed_in_a_row} failed calls in a row")
        end, pause, why = time.monotonic() + policy.total_s, 0.0, ""
        for tried in range(1, policy.tries + 1):
            outcome = yield pause, max(0.0, min(policy.timeout_s, end - time.monotonic() - pause))
            why, temporary, wanted = _judged(outcome)
            if not why and isinstance(outcome, _Reply):
                self._failed_in_a_row = 0
                self.new[call.digest] = JudgeReply(self._doc, outcome.text)
                return outcome.text
            pause = min(max(policy.first_pause_s * 2 ** (tried - 1), wanted), policy.longest_pause_s)
            if not temporary or time.monotonic() + pause >= end:
                break
        self._failed_in_a_row += temporary
        self._fail(f"{call.shown} {why}" + (f", tried {tried} times" if tried > 1 else ""))

    def _fail(self, why: str) -> NoReturn:
        with self._lock:
            self._failure = self._failure or why
        raise _Abandoned


def _ensure_event_loop() -> None:
    """Give this thread an event loop if it has none: lmms-eval's asynchronous judges take it, as in a main thread."""
    try:
        asyncio.get_event_loop()
    except RuntimeError:
        asyncio.set_event_loop(asyncio.new_event_loop())


def _judged(outcome: _Outcome) -> tuple[str, bool, float]:
    """Return what is wrong with the outcome of a try ("" for nothing), whether it may pass, and the pause asked for.

    Messages of a library or a server may hold a key; they are not repeated.
    """
    if isinstance(outcome, TimeoutError) or "Timeout" in type(outcome).__name__:
        return "did not answer in time", True, 0.0
    if not isinstance(outcome, _Reply):
        return f"cannot be reached ({type(outcome).__name__})", True, 0.0
    if not 200 <= outcome.status < 300:
        temporary = outcome.status in _TEMPORARY or outcome.status >= _SERVER_ERROR
        return f"answered with status {outcome.status}", temporary, _seconds(outcome.retry_after)
    try:
        found = json.loads(outcome.text)
    except ValueError:
        return "answered with something else than JSON", True, 0.0
    if not isinstance(found, dict) or found.get("error") or not any(found.get(name) for name in _ANSWERS):
        return "answered without a completion", True, 0.0
    return "", False, 0.0


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a `Retry-After` header, which holds seconds or a date."""
    with suppress(TypeError, ValueError, OverflowError):
        return float(retry_after)  # type: ignore[arg-type]
    with suppress(TypeError, ValueError, OverflowError):
        return parsedate_to_datetime(retry_after).timestamp() - time.time()  # type: ignore[arg-type]
    return 0.0


def _bounded(ask: Callable[[float], _Reply], timeout: float) -> _Reply | Exception:
    """Return what `ask` gives or raises, or leave it behind after `timeout`: its libraries bound single reads only."""
    given: queue.SimpleQueue[_Reply | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            given.put(ask(timeout))
        except Exception as error:  # whatever the library raises: nothing was answered
            given.put(error)

    threading.Thread(target=run, daemon=True, name="judge").start()
    try:
        return given.get(timeout=timeout)
    except queue.Empty:
        return TimeoutError()


def _content(request: Any) -> bytes | None:
    """Return the body of a request of httpx, None for one that is sent as a stream."""
    with suppress(RuntimeError):
        return bytes(request.content)
    return None


def _within(request: Any, timeout: float) -> Any:
    request.extensions = {**request.extensions, "timeout": dict.fromkeys(("connect", "read", "write", "pool"), timeout)}
    return request


def _httpx_reply(found: Any) -> _Reply:
    return _Reply(found.status_code, found.headers.get("retry-after"), found.text)


def _httpx_response(httpx: Any, request: Any, body: str) -> Any:
    return httpx.Response(200, headers={"content-type": "application/json"}, content=body.encode(), request=request)
