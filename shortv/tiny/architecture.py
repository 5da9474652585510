"""The bundled model's parts: LLaVA configuration, tokenizer and processor, all of transformers' own classes."""

import random
from dataclasses import dataclass
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from shortv.tiny.questions import draw_conversation
from shortv.tiny.scenes import IMAGE_SIZE, PLACES

PATCH_SIZE = 10
VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
MAX_POSITIONS = 1024
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"

# One line without indentation, as a template keeps every blank it holds.
CHAT_TEMPLATE = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>\n' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ render(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + render(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + render(message['content']) + '</s>' }}{% endgeneration %}"
    "{%- else -%}{{ raise_exception('unknown role ' + message['role']) }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of the model; width and feed-forward width are shared by vision tower and decoder."""

    layers: int = 8
    vision_layers: int = 2
    width: int = 128
    feed_forward: int = 256
    heads: int = 4
    kv_heads: int = 2


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the generator's text: whole words for it, single bytes for anything else.

    A place such as "top left" is one token: what can be asked of the picture is then a matter of seeing it, not of
    putting words together.
    """
    rng = random.Random(f"{seed}-tokenizer")
    corpus = [
        f"USER: \n{turn.prompt} ASSISTANT: {turn.answer}" for _ in range(1000) for turn in draw_conversation(rng).turns
    ]
    tokenizer = Tokenizer(models.BPE())
    words = rf" (?:{'|'.join(PLACES)})| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+"
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return cast(Any, PreTrainedTokenizerFast)(  # type: ignore[no-any-return]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=MAX_POSITIONS,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Join the tokenizer with an image processor for the scenes' size and the chat template."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return cast(Any, LlavaProcessor)(  # type: ignore[no-any-return]
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    architecture: Architecture, tokenizer: PreTrainedTokenizerFast, seed: int
) -> LlavaForConditionalGeneration:
    """Build the model with fresh weights drawn from the seed."""
    shared: dict[str, Any] = {"hidden_size": architecture.width, "intermediate_size": architecture.feed_forward}
    special: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **shared,
            num_hidden_layers=architecture.vision_layers,
            num_attention_heads=architecture.heads,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=architecture.width,
        ),
        text_config=LlamaConfig(
            **shared,
            **special,
            vocab_size=len(tokenizer),
            num_hidden_layers=architecture.layers,
            num_attention_heads=architecture.heads,
            num_key_value_heads=architecture.kv_heads,
            # A matrix then keeps the size of what it multiplies; the customary 0.02 is for models thirty times as wide.
            initializer_range=architecture.width**-0.5,
            max_position_embeddings=MAX_POSITIONS,
        ),
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids(IMAGE)),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = cast(Any, GenerationConfig)(**special, max_new_tokens=64, do_sample=False)
    return model
