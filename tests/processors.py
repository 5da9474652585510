"""Checkpoint folders of every family: the random models of `tests/models.py` with the family's own processor classes.

Tokenizers are a small byte-level BPE with the family's special tokens; chat templates have the shape that the family's
checkpoints ship; image processors are the family's classes, with sizes that suit the small vision towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from shortv.families import LoadedModel, load
from tests.models import KINDS

CONTEXT = 1024
_WORDS = ["How many red circles are there in this picture?", "Describe what you see in one short sentence.\n"]
_SQUARE = {"height": 16, "width": 16}
_PINPOINTS = [[28, 56], [56, 28]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a family's checkpoints hold beside weights."""

    kind: str
    """Its model, a key of `KINDS`."""
    images: tuple[str, Mapping[str, Any]]
    """Class and settings of the image processor."""
    videos: tuple[str, Mapping[str, Any]] | None = None
    """Those of the video processor, where the family has one."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the processor."""
    template: str
    ids: Mapping[str, str]
    """Config field to the token whose id it holds."""
    pad: str = "<pad>"
    bos: str | None = None
    eos: str = "</s>"
    adds_bos: bool = False
    """Whether the tokenizer puts the first token in front by itself."""
    tokens: tuple[str, ...] = ()
    """Further special tokens."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the tokenizer has under a name of their own."""


@cache
def loaded_checkpoint(name: str) -> LoadedModel:
    """A checkpoint, loaded in float32 from its folder as a user's would be; loaded once, so tests leave it as it is."""
    with TemporaryDirectory() as folder:
        return load(str(save_checkpoint(name, Path(folder))), dtype="float32")


def save_checkpoint(name: str, folder: Path) -> Path:
    """Write model and processor of a key of `CHECKPOINTS` the way a checkpoint on the hub has them."""
    checkpoint = CHECKPOINTS[name]
    tokenizer = build_tokenizer(checkpoint)
    parts = {"image_processor": checkpoint.images, "video_processor": checkpoint.videos}
    processor = getattr(hf, name)(
        tokenizer=tokenizer,
        chat_template=checkpoint.template,
        **{part: getattr(hf, given[0])(**deepcopy(given[1])) for part, given in parts.items() if given},
        **checkpoint.options,
    )
    processor.save_pretrained(folder)
    # The random model of the family's kind, with the ids and the vocabulary of the tokenizer.
    model = KINDS[checkpoint.kind].build()
    text = model.config.get_text_config()
    text.vocab_size, text.max_position_embeddings = len(tokenizer), CONTEXT
    for id_field, token in checkpoint.ids.items():
        setattr(model.config, id_field, tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(0)
    type(model)._from_config(model.config).save_pretrained(folder)
    return folder


def build_tokenizer(checkpoint: Checkpoint) -> Any:
    """Train a byte-level BPE on a few words; every special token is one id."""
    # Padding comes first, as its id is 0 in the configs of the random models.
    special = [checkpoint.pad, checkpoint.eos, *([checkpoint.bos] if checkpoint.bos else []), *checkpoint.ids.values()]
    special = list(dict.fromkeys([*special, *checkpoint.named.values(), *checkpoint.tokens]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(special) + 40,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_WORDS, trainer)
    if checkpoint.adds_bos and checkpoint.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{checkpoint.bos} $A", special_tokens=[(checkpoint.bos, tokenizer.token_to_id(checkpoint.bos))]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=checkpoint.pad,
        eos_token=checkpoint.eos,
        bos_token=checkpoint.bos,
        extra_special_tokens=dict(checkpoint.named),
        model_max_length=CONTEXT,
    )


_IMAGES_FIRST = (
    "{% for message in messages %}{{ 'USER: ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' or 'image' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_INTERNVL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_IDEFICS = (
    "BOS{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

_CHAT: dict[str, Any] = {"pad": "<|endoftext|>", "eos": "<|im_end|>", "tokens": ("<|im_start|>",)}
_QWEN_IMAGES = {"patch_size": 4, "size": {"shortest_edge": 8 * 8, "longest_edge": 64 * 64}}
_QWEN_IDS = {
    **{"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    **{"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"},
}


def _qwen(kind: str, videos: str) -> Checkpoint:
    return Checkpoint(
        kind=kind,
        images=("Qwen2VLImageProcessor", _QWEN_IMAGES),
        videos=(videos, {"patch_size": 4}),
        template=_QWEN_TEMPLATE,
        ids=_QWEN_IDS,
        **_CHAT,
    )


_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_SPLIT = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}


def _idefics(kind: str, name: str, bos: str, **rest: Any) -> Checkpoint:
    return Checkpoint(
        kind=kind,
        images=(f"{name}ImageProcessor", _SPLIT),
        options={"image_seq_len": 4},
        template=_IDEFICS.replace("BOS", bos),
        ids={"image_token_id": "<image>"},
        bos=bos,
        tokens=("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILES),
        **rest,
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    "LlavaNextProcessor": Checkpoint(
        kind="llava-next",
        images=(
            "LlavaNextImageProcessor",
            {
                **{"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
                "image_grid_pinpoints": _PINPOINTS,
            },
        ),
        options={"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        template=_IMAGES_FIRST,
        ids={"image_token_id": "<image>"},
        bos="<s>",
        adds_bos=True,
    ),
    "LlavaOnevisionProcessor": Checkpoint(
        kind="llava-onevision",
        images=(
            "LlavaOnevisionImageProcessor",
            {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": _PINPOINTS},
        ),
        videos=("LlavaOnevisionVideoProcessor", {"size": {"height": 28, "width": 28}}),
        options={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        template=_ONEVISION,
        ids={"image_token_id": "<image>", "video_token_id": "<video>"},
        **_CHAT,
    ),
    "Qwen2VLProcessor": _qwen("qwen2-vl", "Qwen2VLVideoProcessor"),
    "Qwen2_5_VLProcessor": _qwen("qwen2.5-vl", "Qwen2VLVideoProcessor"),
    "Qwen3VLProcessor": _qwen("qwen3-vl", "Qwen3VLVideoProcessor"),
    "InternVLProcessor": Checkpoint(
        kind="internvl",
        images=("GotOcr2ImageProcessor", {"size": _SQUARE, "crop_to_patches": True, "max_patches": 6}),
        videos=("InternVLVideoProcessor", {"size": _SQUARE}),
        options={"image_seq_length": 4},
        template=_INTERNVL,
        ids={"image_token_id": "<IMG_CONTEXT>"},
        named={
            **{"start_image_token": "<img>", "end_image_token": "</img>"},
            **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        },
        **_CHAT,
    ),
    "Idefics3Processor": _idefics("idefics3", "Idefics3", "<|begin_of_text|>", adds_bos=True),
    "SmolVLMProcessor": _idefics("smolvlm", "SmolVLM", "<|im_start|>", videos=("SmolVLMVideoProcessor", _SPLIT)),
    "Gemma3Processor": Checkpoint(
        kind="gemma3",
        images=("Gemma3ImageProcessor", {"size": _SQUARE}),
        options={"image_seq_length": 4},
        template=_GEMMA,
        ids={
            "image_token_id": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        bos="<bos>",
        adds_bos=True,
        tokens=("<start_of_turn>", "<end_of_turn>"),
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    ),
}
"""Checkpoints by the name of their processor class; that of LLaVA-1.5 is the bundled model's."""
