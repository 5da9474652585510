"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What a tokenizer shows for bytes that are not yet a whole character.
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Transcript:
    """Turns tokens into text, ends it at a stop, and says which part of it can no longer change."""

    def __init__(self, tokenizer: Any, *, stops: Sequence[str], ends: Sequence[int], limit: int) -> None:
        """An answer ends at one of the texts `stops`, one of the tokens `ends`, or after `limit` tokens."""
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ends = frozenset(ends)
        self._limit = limit
        self._ids: list[int] = []
        # A token may end inside a character, and how it is written may depend on the few before it.
        self._settled = ""
        self._settled_ids = 0
        self.text = ""
        """The text so far, cut at a stop."""
        self.tokens = 0
        """Tokens made, the one that ended the answer included."""
        self.finish: str | None = None
        """Why the answer is over: "stop" or "length"; None while it is not."""

    def add(self, token: int) -> bool:
        """Take the next token; tells whether it is part of the answer (a token that ends one is not)."""
        self.tokens += 1
        if token in self._ends:
            self.finish = "stop"
            return False
        self._ids.append(token)
        self.text = self._settled + self._decoded(self._settled_ids)
        if not self.text.endswith(_BROKEN) and len(self._ids) - self._settled_ids > 8:
            self._settle()
        cut = min((at for at in (self.text.find(stop) for stop in self._stops) if at >= 0), default=None)
        if cut is not None:
            self.text = self.text[:cut]
            self.finish = "stop"
        elif self.tokens >= self._limit:
            self.finish = "length"
        return True

    def sure(self) -> str:
        """The part of the text that no later token can change or cut away."""
        if self.finish is not None:
            return self.text
        # What is not yet a character may become the next one of a stop.
        whole = self.text.rstrip(_BROKEN)
        safe = len(whole)
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(whole)), 0, -1):
                if whole.endswith(stop[:length]):
                    safe = min(safe, len(whole) - length)
                    break
        return whole[:safe]

    def _settle(self) -> None:
        """Keep the text of all but the last tokens, where decoding them apart gives the same."""
        middle = len(self._ids) - 4
        head = self._tokenizer.decode(self._ids[self._settled_ids : middle], skip_special_tokens=True)
        whole = self._decoded(self._settled_ids)
        tail = self._decoded(middle)
        if not head.endswith(_BROKEN) and head + tail == whole:
            self._settled += head
            self._settled_ids = middle

    def _decoded(self, start: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:], skip_special_tokens=True))
