"""Loading of supported models, of their processors, and of their architectures alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch

from shortv.architecture import Architecture
from shortv.errors import Refused, ShortVError, one_line
from shortv.families.decoder import Decoder, decoder_of
from shortv.families.preprocessing import Preprocessor
from shortv.families.table import family_of
from shortv.spec import Attention, Dtype

ATTENTION_IMPLEMENTATIONS: tuple[str, ...] = get_args(Attention)
"""Attention implementations whose masks have rows and columns that an ablation can select."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(Preprocessor):
    """A model in evaluation mode with everything needed to run samples through it."""

    name: str
    revision: str | None
    model: Any
    decoder: Decoder
    architecture: Architecture
    device: torch.device
    """The device of the inputs; layers may be on other devices if the model is spread over several."""

    @property
    def cuda_devices(self) -> set[torch.device]:
        """The GPUs that hold layers of the model and take its inputs."""
        if self.device.type != "cuda":
            return set()
        devices = {self.device, *(self.decoder.device(layer) for layer in self.decoder.layers)}
        return {device for device in devices if device.type == "cuda"}

    def synchronize(self) -> None:
        """Wait until the GPUs of the model have done their work."""
        for device in self.cuda_devices:
            torch.cuda.synchronize(device)

    def end_tokens(self, stop: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
        """Return the ids that end a completion (the model's own and stops that are special tokens), and other stops."""
        tokenizer = self.processor.tokenizer
        own = self.model.generation_config.eos_token_id
        ids = [own] if isinstance(own, int) else list(own or ())
        ids += [tokenizer.eos_token_id] if not ids and tokenizer.eos_token_id is not None else []
        # Decoded text leaves out all of these; all_special_tokens knows only those that have a name or are listed.
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        ids += [tokenizer.convert_tokens_to_ids(text) for text in stop if text in special]
        return list(dict.fromkeys(ids)), tuple(text for text in stop if text not in special)


def load_architecture(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Architecture:
    """Read a model's architecture from its config alone. Raises Refused for no such model or another family."""
    return Architecture.from_config_dict(_config(name, revision, trust_remote_code).to_dict())


def commit_of(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> str | None:
    """Return the commit on the hub that a revision names now; for a folder, the revision itself. Raises Refused."""
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
    processor = _processor(name, revision, trust_remote_code, chat_template)
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
    commit = getattr(config, "_commit_hash", None) or revision
    return wrap(model, name=name, revision=commit, processor=processor, chat_template=chat_template)


def wrap(
    model: Any, *, name: str, revision: str | None = None, processor: Any = None, chat_template: str | None = None
) -> LoadedModel:
    """Return a transformers model as a `LoadedModel`, in evaluation mode; without a processor it takes ready batches.

    Raises:
        Refused: its family or its text backbone is not supported.
    """
    decoder = decoder_of(model)
    return LoadedModel(
        **_preprocessing(model.config, processor, chat_template),
        name=name,
        revision=revision,
        model=model.eval().requires_grad_(False),
        decoder=decoder,
        architecture=Architecture.from_config_dict(model.config.to_dict()),
        device=model.get_input_embeddings().weight.device,
    )


def load_preprocessor(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Preprocessor:
    """Load what prepares a model's inputs, without its weights.

    Raises:
        Refused: no such model or processor, an unsupported family, or no chat template.
    """
    config = _config(name, revision, trust_remote_code)
    processor = _processor(name, revision, trust_remote_code, chat_template)
    return Preprocessor(**_preprocessing(config, processor, chat_template))


def _preprocessing(config: Any, processor: Any, chat_template: str | None) -> dict[str, Any]:
    family = family_of(config.model_type)
    return {
        "family": family,
        "processor": processor,
        "visual_ids": family.visual_ids(config),
        "context": int(config.get_text_config().max_position_embeddings),
        "chat_template": chat_template,
    }


def _processor(name: str, revision: str | None, trust_remote_code: bool, chat_template: str | None) -> Any:
    from transformers import AutoProcessor

    try:
        processor = cast(Any, AutoProcessor).from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise Refused(f"the processor of {name!r} cannot be loaded: {one_line(error)}") from error
    if not (chat_template or getattr(processor, "chat_template", None)):
        raise Refused(f"{name!r} has no chat template; give one with --chat-template FILE")
    return processor


def _config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Return the config of a supported model. Raises Refused."""
    from transformers import AutoConfig

    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise Refused(f"model folder {name} does not exist; give a folder with config.json and weights, or a hub id")
    try:
        config: Any = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(
            f"model {name!r} cannot be found or read: {one_line(error)} "
            "(give a hub id that can be reached, or a folder with config.json and weights)"
        ) from error
    family_of(config.model_type)
    Architecture.from_config_dict(config.to_dict())
    return config


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
        raise ShortVError(f"the weights of {name!r} do not fit the device: {one_line(error)}") from error
    except Exception as error:  # safetensors, hub and accelerate each raise their own kinds
        raise ShortVError(f"the weights of {name!r} cannot be loaded: {one_line(error)}") from error
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
