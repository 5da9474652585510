"""The text that names a task and how many of its documents to draw."""

import re
from typing import NamedTuple

from shortv.errors import Refused

_SPEC = re.compile(r"(?P<task>[^:\s]+):(?P<limit>\d+)")


class TaskSpec(NamedTuple):
    """A task of lmms-eval and a number of its documents."""

    task: str
    limit: int


def parse_spec(text: str) -> TaskSpec:
    """Read `gqa:20`. Raises Refused when the number is missing, zero or not a number."""
    match = _SPEC.fullmatch(text.strip())
    if match is None or int(match["limit"]) == 0:
        raise Refused(f"{text!r} does not name a task and a number of samples; write it as TASK:NUMBER, such as gqa:20")
    return TaskSpec(match["task"], int(match["limit"]))
