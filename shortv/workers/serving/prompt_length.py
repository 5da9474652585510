"""Prompts beyond the context are refused before they take the engine's time: it takes seconds to tokenise megabytes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

from shortv.errors import SampleError
from shortv.families import LoadedModel
from shortv.families.preprocessing import adds_special_tokens


class PromptLength:
    """Counts the tokens of long prompts in a thread of its own; short ones the engine counts as it encodes them."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        # A tokenizer is for one thread at a time, and the processor's own is the engine's.
        self._tokenizer = deepcopy(loaded.processor.tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shortv-prompt-length")

    async def check(self, text: str) -> None:
        """Check a prompt; images count as their placeholders, so that some that pass are still too long.

        Raises:
            SampleError: it exceeds the model's context.
        """
        if len(text) > self._loaded.context:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._check, text)

    def _check(self, text: str) -> None:
        special = adds_special_tokens(self._loaded, text)
        count = len(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        if count > self._loaded.context:
            message = f"{count} text tokens exceed the model's context of {self._loaded.context}"
            raise SampleError(stage="tokenise", error="context", message=message)
