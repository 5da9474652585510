"""The shipped model: that processor and weights agree, its chat template, and what it sees."""

import io

import pytest
import torch
from PIL import Image

from shortv.tiny.accuracy import majority_accuracy, measure_accuracy, read_questions
from shortv.tiny.batches import encode
from shortv.tiny.dataset import calibration_samples
from shortv.tiny.questions import Conversation
from shortv.tiny.scenes import render
from tests.tiny_model import TINY, bundled


@pytest.fixture(scope="module")
def model():
    return bundled().model


@pytest.fixture(scope="module")
def processor():
    return bundled().processor


def test_the_model_is_small_with_grouped_query_attention(model):
    config = model.config.text_config
    assert config.num_key_value_heads < config.num_attention_heads
    assert (TINY / "model" / "model.safetensors").stat().st_size < 16_000_000
    assert {path.suffix for path in (TINY / "model").iterdir()} <= {".json", ".jinja", ".safetensors"}


@pytest.mark.parametrize("sizes", [[(60, 60)], [(640, 40)], [(60, 60), (61, 300)]])
def test_the_processor_writes_as_many_placeholders_as_the_model_has_features(model, processor, sizes):
    images = [Image.new("RGB", size, "red") for size in sizes]
    text = "USER: " + "<image>\n" * len(sizes) + "Describe the picture. ASSISTANT:"
    inputs = processor(text=text, images=images, return_tensors="pt")
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert placeholders == sum(map(len, features)) == len(sizes) * model.config.image_seq_length == 36 * len(sizes)
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()


IMAGE, WHAT, RED = {"type": "image"}, {"type": "text", "text": "What?"}, {"role": "assistant", "content": "red"}


@pytest.mark.parametrize(
    ("messages", "generate", "expected"),
    [
        ([{"role": "user", "content": "What?"}], True, "USER: What? ASSISTANT:"),
        ([{"role": "user", "content": [WHAT, IMAGE]}], False, "USER: What?<image>\n "),
        (
            [{"role": "user", "content": [IMAGE, IMAGE, WHAT]}, RED, {"role": "user", "content": "And?"}],
            True,
            "USER: <image>\n<image>\nWhat? ASSISTANT: red</s>USER: And? ASSISTANT:",
        ),
        (
            [{"role": "system", "content": "Look."}, {"role": "user", "content": [WHAT]}, RED],
            False,
            "Look. USER: What? ASSISTANT: red</s>",
        ),
    ],
)
def test_chat_template(processor, messages, generate, expected):
    assert processor.apply_chat_template(messages, add_generation_prompt=generate) == expected


def test_chat_template_refuses_an_unknown_role(processor):
    with pytest.raises(Exception, match="unknown role tool"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_the_tokenizer_keeps_any_text_and_knows_whole_words(processor):
    for text in ("Grüße, 漢字 🙂", "\t\n", "Zebra/1e-3 {}"):
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(processor.tokenizer.tokenize("What color is the object at the top left?")) == 9


def test_training_layout_is_that_of_processor_and_chat_template(processor):
    [sample] = calibration_samples(size=1)
    row = encode(processor.tokenizer, Conversation(scene=sample.scene, turns=(sample.turn, sample.turn), joined=True))
    text, answer = {"type": "text", "text": sample.turn.prompt}, {"role": "assistant", "content": sample.turn.answer}
    messages = [{"role": "user", "content": [IMAGE, text]}, answer, {"role": "user", "content": [text]}, answer]
    inputs = processor(text=processor.apply_chat_template(messages), images=Image.fromarray(render(sample.scene)))
    assert list(inputs["input_ids"][0]) == row.ids


def test_generation_stops_at_the_end_token_and_ignores_left_padding(model, processor):
    questions = [question for question in read_questions(limit=12) if question.kind == "count"][:2]
    texts = [f"USER: <image>\n{question.prompt} ASSISTANT:" for question in questions]
    images = [Image.open(io.BytesIO(question.image)) for question in questions]
    longer = texts[1].replace("<image>\n", "<image>\n  ")
    batch = processor(text=[texts[0], longer], images=images, return_tensors="pt", padding=True)
    alone = processor(text=texts[0], images=images[0], return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0
    together = model.generate(**batch)[0, batch["input_ids"].shape[1] :].tolist()
    single = model.generate(**alone)[0, alone["input_ids"].shape[1] :].tolist()
    assert single[-1] == processor.tokenizer.eos_token_id and together[: len(single)] == single


def test_the_model_sees_and_is_at_chance_without_the_image(model, processor):
    questions = read_questions(limit=300)
    seen = measure_accuracy(model, processor, questions)
    blank = measure_accuracy(model, processor, questions, blank=True)
    assert min(seen.values()) >= 0.92, seen
    assert abs(blank["overall"] - majority_accuracy(questions)["overall"]) <= 0.05, blank
