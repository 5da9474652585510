"""Preprocessing beside the model: requests become encoded prompts on threads of their own, before the engine sees them.

Images are decoded and processed, and texts tokenised, once for all plans of a request.
"""

from __future__ import annotations

import asyncio
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace

from shortv.evals.generation import encode_continuation
from shortv.families import LoadedModel
from shortv.families.downsampling import downsampled
from shortv.families.preprocessing import EncodedPrompt, encode_one, prompt_of
from shortv.request import Request

# Processors of these layouts take longer than one thread can make up for.
_SLOW_LAYOUTS = ("grid", "tiles")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request's prompt as the model gets it, with its continuation if it has one."""

    encoded: EncodedPrompt
    images: tuple[bytes, ...] = ()
    """The keys of its images."""
    continuation: tuple[int, ...] = ()
    """The tokens to score."""
    ends: tuple[int, ...] = ()
    """The tokens that end a completion."""
    stop: tuple[str, ...] = ()
    """The texts that end a completion."""
    preprocess_ms: float = 0.0


class Preparer:
    """Prepares requests on a few threads; each uses its own copy of the processor.

    Tokenizers are for one thread at a time, and the model's own is the engine's. Requests with long texts have a
    thread of their own: megabytes of text take seconds to tokenise.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        """Copy the model's processor for each thread."""
        threads = 2 if loaded.family.pixels in _SLOW_LAYOUTS else 1
        self._context = loaded.context
        self._usual, self._long = _Pool(loaded, threads), _Pool(loaded, 1)

    async def prepare(self, request: Request, downsample: float | None = None) -> Prepared:
        """Prepare a request, with smaller images where a plan says so.

        Raises SampleError where it cannot be completed.
        """
        texts = [part for message in request.messages for part in message.parts if isinstance(part, str)]
        length = sum(map(len, texts)) + len(request.continuation or "")
        # Shorter texts have fewer tokens than characters, as a rule.
        pool = self._usual if length <= self._context else self._long
        return await asyncio.get_running_loop().run_in_executor(pool.threads, pool.prepare, request, downsample)


class _Pool:
    def __init__(self, loaded: LoadedModel, threads: int) -> None:
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="shortv-preprocessing")
        self._copies: queue.SimpleQueue[LoadedModel] = queue.SimpleQueue()
        for _ in range(threads):
            self._copies.put(replace(loaded, processor=deepcopy(loaded.processor)))

    def prepare(self, request: Request, downsample: float | None) -> Prepared:
        own = self._copies.get()
        try:
            return prepare(own, request, downsample)
        finally:
            self._copies.put(own)


def prepare(loaded: LoadedModel, request: Request, downsample: float | None = None) -> Prepared:
    """Prepare a request in this thread, as `Preparer.prepare`."""
    started = time.perf_counter()
    prompt = prompt_of(loaded, request.messages, continuation=request.continuation or "")
    if downsample is not None:
        prompt = downsampled(loaded, prompt, downsample, loaded.architecture)
    continuation: tuple[int, ...] = ()
    if request.continuation is None:
        encoded = encode_one(loaded, prompt)
    else:
        encoded, continuation = encode_continuation(loaded, prompt)
    # Digests are computed when they are first read: here, so that the engine's thread need not.
    images = tuple(image.key for image in encoded.images)
    ends, stop = loaded.end_tokens(request.sampling.stop)
    preprocess_ms = 1e3 * (time.perf_counter() - started)
    return Prepared(
        encoded=encoded,
        images=images,
        continuation=continuation,
        ends=tuple(ends),
        stop=stop,
        preprocess_ms=preprocess_ms,
    )
