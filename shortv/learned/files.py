"""Learned parts as files, tied to the model they were trained on: written, loaded, and shared while they are in use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from shortv.architecture import Architecture
from shortv.atomic import replace_file
from shortv.errors import Refused, ShortVError
from shortv.families.decoder import Decoder
from shortv.layers.progress import LearnedRun
from shortv.learned.base import Parts
from shortv.learned.header import AGAIN, HEADER_NAME, WEIGHTS_NAME, Header, check_parts
from shortv.learned.registry import SYSTEMS, run_of
from shortv.plan import LearnedParts, Plan
from shortv.spec import validate
from shortv.untrusted import read_file

_OVERHEAD = 2**20
"""Most bytes of a weights file that are not weights."""


def save_parts(
    folder: str | os.PathLike[str],
    parts: Parts,
    *,
    model: str,
    revision: str | None,
    config_digest: str,
    training: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Header:
    """Write parts, each file whole or not at all, and return their header. Raises ShortVError."""
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in parts.state_dict().items()}
    weights, settings = save(tensors), parts.settings.model_dump(mode="json")
    header = Header(
        kind=parts.kind,
        model=model,
        revision=revision,
        config_digest=config_digest,
        settings=settings,
        training=dict(training),
        digest=_digest(weights, settings),
        parameters=sum(weight.numel() for weight in parts.parameters()),
    )
    target = Path(folder)
    try:
        # The header names the digest of the weights, so a stop between the two writes is found on reading.
        replace_file(target / WEIGHTS_NAME, weights)
        replace_file(target / HEADER_NAME, header.to_json().encode())
    except OSError as error:
        raise ShortVError(f"cannot write learned parts to {target}: {error.strerror}; choose another folder") from error
    return header


def load_parts(named: LearnedParts, decoder: Decoder, architecture: Architecture) -> Parts:
    """Load a plan's parts for a model: in its dtype, on the devices of its layers, without gradients.

    Modules that decide stay in float32. The settings are checked against the model, and the weights' size against the
    settings, before anything is allocated.

    Raises:
        Refused: what `check_parts` refuses, settings that do not fit the model, or weights that were changed.
    """
    header = check_parts(named, architecture.config_digest)
    system = SYSTEMS[header.kind]
    with torch.device("meta"):
        parts = system.parts_class().build(decoder, validate(system.settings, header.settings, where=f"{named.path}: "))
    needed = sum(4 * weight.numel() for weight in parts.state_dict().values())
    weights = read_file(Path(named.path) / WEIGHTS_NAME, what="learned parts", limit_bytes=needed + _OVERHEAD)
    if _digest(weights, header.settings) != header.digest:
        raise Refused(f"the parts in {named.path} are not as they were saved: changed, or cut short; {AGAIN}")
    try:
        parts.load_state_dict(load(weights), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise Refused(f"the weights in {named.path} do not fit: {str(error).splitlines()[0]}; {AGAIN}") from error
    parts.digest = header.digest
    parts.lower(next(decoder.layers[0].parameters()).dtype)
    parts.place(decoder)
    return parts.eval().requires_grad_(False)


class PartsCache:
    """The parts of one model: loaded once, shared while anything uses them, and the last `keep` of them beyond that."""

    def __init__(self, *, keep: int = 0, folders: Mapping[str, Callable[[], Path]] | None = None) -> None:
        """Take how many unused parts stay loaded, and by its path where each folder is on this machine."""
        self._keep = keep
        self._folders = folders or {}
        self._loaded: WeakValueDictionary[object, Parts] = WeakValueDictionary()
        self._recent: list[Parts] = []

    def load(self, named: LearnedParts, decoder: Decoder, architecture: Architecture) -> Parts:
        """Return a plan's parts; the folder's header is checked each time. Raises Refused as `load_parts` does."""
        here = self._folders.get(named.path)
        named = replace(named, path=str(here())) if here else named
        check_parts(named, architecture.config_digest)
        weights = [next(layer.parameters()) for layer in decoder.layers]
        key = (named.kind, named.digest, *((weight.device, weight.dtype) for weight in weights))
        parts = self._loaded.get(key)
        # The oldest are let go first: old and new parts together may be more than a device has.
        others = [one for one in self._recent if one is not parts]
        self._recent = others[len(others) - self._keep + 1 :] if self._keep else []
        del others
        if parts is None:
            parts = self._loaded[key] = load_parts(named, decoder, architecture)
        if self._keep:
            self._recent.append(parts)
        return parts

    def run(self, plan: Plan, decoder: Decoder, architecture: Architecture) -> LearnedRun | None:
        """Return what a plan needs beside its modes. Raises Refused where it cannot be loaded or run."""
        if plan.parts is None:
            return None
        return run_of(decoder, plan.modes, self.load(plan.parts, decoder, architecture), plan.parts.threshold)


def _digest(weights: bytes, settings: Mapping[str, Any]) -> str:
    """Digest the weights and what else decides what the parts do."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(weights)
    return digest.hexdigest()
