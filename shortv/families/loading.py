"""Load a supported model and its processor, or refuse it in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from shortv.architecture import Architecture
from shortv.errors import Refused, ShortVError
from shortv.families.decoder import Decoder, decoder_of, family_of

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations whose masks have rows and columns that an ablation can select."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode with everything needed to run samples through it."""

    name: str
    revision: str | None
    model: Any
    processor: Any
    decoder: Decoder
    architecture: Architecture
    device: torch.device
    """Where inputs go; layers may lie on other devices when the model is spread over several."""
    context: int
    """Most tokens a prompt may have."""
    chat_template: str | None
    """Overrides the processor's own template when given."""


def load_architecture(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Architecture:
    """Read a model's architecture from its config alone.

    Raises:
        Refused: no such model, or its family is not supported.
    """
    return _architecture(_config(name, revision, trust_remote_code))


def commit_of(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> str | None:
    """The commit on the hub that a revision names at present; a folder has none, and keeps the revision it is given.

    Raises:
        Refused: no such model.
    """
    commit: str | None = getattr(_config(name, revision, trust_remote_code), "_commit_hash", None)
    return commit or revision


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> LoadedModel:
    """Load a hub id or a folder.

    Args:
        device: a torch device, or "auto-map" to spread the layers over all visible GPUs.
        chat_template: Jinja text that replaces the processor's template.

    Raises:
        Refused: no such model, unsupported family, no chat template, or attention that hides its mask.
        ShortVError: the weights are there but cannot be loaded whole.
    """
    if attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        raise Refused(
            f"attention implementation {attn_implementation!r} gives layers no mask whose rows can be selected; "
            f"use one of {', '.join(ATTENTION_IMPLEMENTATIONS)}"
        )
    config = _config(name, revision, trust_remote_code)
    architecture = _architecture(config)
    processor = load_processor(
        name, revision=revision, trust_remote_code=trust_remote_code, chat_template=chat_template
    )
    model = _weights(
        name,
        config=config,
        revision=revision,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        **({"device_map": "auto"} if device == "auto-map" else {}),
    )
    if device != "auto-map":
        model.to(device)
    text = config.get_text_config()
    return LoadedModel(
        name=name,
        revision=getattr(config, "_commit_hash", None) or revision,
        model=model.eval().requires_grad_(False),
        processor=processor,
        decoder=decoder_of(model),
        architecture=architecture,
        device=model.get_input_embeddings().weight.device,
        context=int(text.max_position_embeddings),
        chat_template=chat_template,
    )


def load_processor(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Any:
    """Load the processor of a model and check that it can build a prompt.

    Raises:
        Refused: the processor cannot be loaded, or it has no chat template and none is given.
    """
    from transformers import AutoProcessor

    try:
        processor = cast(Any, AutoProcessor).from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise Refused(f"the processor of {name!r} cannot be loaded: {first_line(error)}") from error
    if not (chat_template or getattr(processor, "chat_template", None)):
        raise Refused(f"{name!r} has no chat template; give one with --chat-template FILE")
    return processor


def _config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise Refused(f"model folder {name} does not exist; give a folder with config.json and weights, or a hub id")
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(
            f"model {name!r} cannot be found or read: {first_line(error)} "
            "(give a hub id that can be reached, or a folder with config.json and weights)"
        ) from error


def _architecture(config: Any) -> Architecture:
    family_of(config.model_type)
    fields: Mapping[str, Any] = config.to_dict()
    return Architecture.from_config_dict(fields)


def _weights(name: str, *, dtype: Dtype, **options: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        model, report = cast(Any, AutoModelForImageTextToText).from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError as error:
        raise ShortVError(f"the weights of {name!r} do not fit the device: {first_line(error)}") from error
    except Exception as error:  # safetensors, hub and accelerate each raise their own kinds
        raise ShortVError(f"the weights of {name!r} cannot be loaded: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ShortVError(
            f"the weights of {name!r} lack {len(missing)} tensors ({missing[0]}, ...): the checkpoint is incomplete"
        )
    return model


def quiet_transformers() -> None:
    """Turn transformers' progress bars and warnings off for this process; errors still show."""
    from transformers import logging

    cast(Any, logging).disable_progress_bar()
    cast(Any, logging).set_verbosity_error()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-line reports."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
