"""A conversation of several rounds while it is held."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from shortv.errors import ShortVError
from shortv.evals.requests import Conversation, Request

# Far beyond any benchmark: a task that never says that it is over would run forever.
_MOST_ROUNDS = 100


class Dialogue:
    """Asks round after round until the task says that it is over."""

    __slots__ = ("_info", "_next_round", "_number", "answers", "asked")

    def __init__(self, conversation: Conversation) -> None:
        """Start with the first round."""
        self._next_round = conversation.next_round
        self._number = 0
        self._info: Any = None
        self.asked: Request | None = conversation.first
        """What is asked now; None when the conversation is over."""
        self.answers: list[str] = []
        """The answers so far, as the task keeps them."""

    def take(self, answer: str) -> None:
        """Note the answer to what was asked, and ask the task for the next round.

        Raises:
            ShortVError: the task's own code fails, or goes on for longer than any benchmark does.
        """
        if self.asked is None:
            raise AssertionError("the conversation is over: nothing was asked")
        self._number += 1
        told = self._next_round(self._number, [*self.answers, answer], self._info)
        self.answers, self._info = told.answers, told.info
        if told.messages is None:
            self.asked = None
        elif self._number == _MOST_ROUNDS:
            raise ShortVError(f"{self.asked.name} is not over after {_MOST_ROUNDS} rounds")
        else:
            self.asked = replace(self.asked, messages=partial(list, told.messages))
