"""Learned parts on disk: a folder with parts.json and parts.safetensors, tied to the model they were trained on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from shortv.architecture import Architecture
from shortv.errors import Refused, ShortVError
from shortv.families.decoder import Decoder
from shortv.families.parts.base import Parts
from shortv.families.parts.table import PARTS
from shortv.plan import LearnedParts, PartsKind

SCHEMA = 1
HEADER_NAME = "parts.json"
WEIGHTS_NAME = "parts.safetensors"
_AGAIN = "train the parts again, or restore the folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What parts.json says: `parameters` is how many were learned, `training` is free (command, samples, seconds, ...).

    Both may be unknown for parts that were written elsewhere.
    """

    kind: PartsKind
    model: str
    revision: str | None
    config_digest: str
    settings: Mapping[str, Any]
    training: Mapping[str, Any]
    digest: str
    parameters: int | None = None

    @property
    def train_seconds(self) -> float | None:
        """How long the training took, None where the header does not say."""
        seconds = self.training.get("seconds")
        return float(seconds) if isinstance(seconds, int | float) and not isinstance(seconds, bool) else None


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
    weights, settings = save(tensors), asdict(parts.settings)
    header = Header(
        kind=parts.kind,
        model=model,
        revision=revision,
        config_digest=config_digest,
        settings=json.loads(json.dumps(settings)),
        training=dict(training),
        digest=_digest(weights, settings),
        parameters=sum(weight.numel() for weight in parts.parameters()),
    )
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        # The header names the weights' digest, so a stop between the two is found when they are read.
        _write(target / WEIGHTS_NAME, weights)
        _write(target / HEADER_NAME, (json.dumps({"schema": SCHEMA, **asdict(header)}, indent=2) + "\n").encode())
    except OSError as error:
        raise ShortVError(f"cannot write learned parts to {target}: {error.strerror}; choose another folder") from error
    return header


def read_header(folder: str | os.PathLike[str]) -> Header:
    """Read what parts.json says of the weights beside it. Raises Refused."""
    path = Path(folder) / HEADER_NAME
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        header = Header(**content | {"kind": PartsKind(content["kind"])})
        _check_types(header)
        return header
    except OSError as error:
        raise Refused(f"no learned parts at {folder}: {error.strerror}; give a folder with {HEADER_NAME}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(f"{path} is no header of learned parts ({error}); {_AGAIN}") from error


def _check_types(header: Header) -> None:
    texts = (header.model, header.config_digest, header.digest, header.revision or "")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("model, revision and digests are texts")
    if not isinstance(header.settings, dict) or not isinstance(header.training, dict):
        raise TypeError("settings and training are objects")
    if header.parameters is not None and type(header.parameters) is not int:
        raise TypeError("parameters is a number")


def check_parts(named: LearnedParts, config_digest: str) -> Header:
    """Check, without the weights, that the parts a plan names are there and for a model of this architecture.

    Raises:
        Refused: nothing there, parts of another model or another kind, weights cut short, or not those of the plan.
    """
    header = read_header(named.path)
    if header.kind is not named.kind:
        raise Refused(f"the parts in {named.path} are {header.kind} parts, the plan needs {named.kind}; {_AGAIN}")
    if header.config_digest != config_digest:
        raise Refused(
            f"the parts in {named.path} were trained on {header.model} (architecture {header.config_digest[:12]}), "
            f"and this model has architecture {config_digest[:12]}; train parts for this model"
        )
    if header.digest != named.digest:
        raise Refused(
            f"the parts in {named.path} ({header.digest[:12]}) are not those that the plan names "
            f"({named.digest[:12]}); make the plan again, or restore the folder"
        )
    _check_length(Path(named.path) / WEIGHTS_NAME)
    return header


def _check_length(weights: Path) -> None:
    if not weights.is_file():
        raise Refused(f"{weights.parent} holds {HEADER_NAME} and no {WEIGHTS_NAME}; {_AGAIN}")
    try:
        # Opening compares the file's length with what its first bytes say, and reads no tensor.
        with safe_open(weights, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise Refused(f"{weights} is cut short, or no file of weights ({error}); {_AGAIN}") from error


def load_parts(named: LearnedParts, decoder: Decoder, architecture: Architecture) -> Parts:
    """Load what a plan names for a model: in its dtype, where its layers are, in evaluation mode, without gradients.

    Raises:
        Refused: what `check_parts` refuses, or weights that were changed.
    """
    header = check_parts(named, architecture.config_digest)
    if header.kind not in PARTS:
        raise Refused(f"this version has no {header.kind} parts; it has {', '.join(PARTS) or 'none'}: update it")
    weights = _read(Path(named.path) / WEIGHTS_NAME)
    if _digest(weights, header.settings) != header.digest:
        raise Refused(f"the parts in {named.path} are not as they were saved: changed, or cut short; {_AGAIN}")
    kind = PARTS[header.kind]
    parts = kind.build(decoder, kind.parse_settings(dict(header.settings)))
    try:
        parts.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError) as error:
        raise Refused(f"the weights in {named.path} do not fit: {str(error).splitlines()[0]}; {_AGAIN}") from error
    parts.digest = header.digest
    return parts.to(next(decoder.layers[0].parameters()).dtype).eval().requires_grad_(False)


def _digest(weights: bytes, settings: Mapping[str, Any]) -> str:
    """Of the weights and of what else decides what the parts do."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(weights)
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}; {_AGAIN}") from error


def _write(target: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
