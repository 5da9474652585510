"""Checkpoints: trained weights and optimizer in one safetensors file, whole or not at all, nothing pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from reports.store import Folder
from shortv.errors import ShortVError

CHECKPOINT_NAME = "checkpoint/state.safetensors"
_HEADER_BYTES = 8
# One entry: several are written in any order, and the same state would not be the same bytes.
_RUN = "run"


class Checkpoint(NamedTuple):
    """The state after `step` finished steps."""

    step: int
    state: dict[str, Tensor]


def to_bytes(step: int, state: Mapping[str, Tensor], identity: str) -> bytes:
    """Write a checkpoint of the run with that identity: the digest of its arguments."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    content: bytes = save(tensors, metadata={_RUN: json.dumps({"step": step, "identity": identity})})
    return content


def step_of(content: bytes, identity: str, shown: str) -> int:
    """Steps that a checkpoint's header says are finished.

    Raises:
        ShortVError: it is no checkpoint, or one of another run.
    """
    try:
        length = int.from_bytes(content[:_HEADER_BYTES], "little")
        metadata = json.loads(content[_HEADER_BYTES : _HEADER_BYTES + length])["__metadata__"]
        run = json.loads(metadata[_RUN])
        step, found = int(run["step"]), run["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(shown) from error
    if found != identity:
        raise ShortVError(f"{shown} belongs to another run; delete it to start anew, or restore the folder")
    return step


def from_bytes(content: bytes, identity: str, shown: str) -> Checkpoint:
    """Read a checkpoint whole. Raises ShortVError as `step_of`, and where it is cut short."""
    step = step_of(content, identity, shown)
    try:
        return Checkpoint(step, load(content))
    except SafetensorError as error:
        raise _damaged(shown) from error


def read_checkpoint(folder: Folder, identity: str) -> tuple[int, bytes | None]:
    """Finished steps and the checkpoint of a folder, checked to be whole; 0 and None where there is none."""
    if not folder.exists(CHECKPOINT_NAME):
        return 0, None
    content = folder.read_bytes(CHECKPOINT_NAME)
    return from_bytes(content, identity, f"{folder.shown}/{CHECKPOINT_NAME}").step, content


def _damaged(shown: str) -> ShortVError:
    return ShortVError(f"{shown} is cut short or damaged; restore it, or delete it to train from the first step")
