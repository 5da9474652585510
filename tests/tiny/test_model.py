"""The shipped model: how it loads, and that processor and weights agree."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import shortv.tiny
from shortv.tiny.accuracy import majority_accuracy, measure_accuracy, read_questions
from shortv.tiny.batches import encode
from shortv.tiny.conversations import Conversation
from shortv.tiny.dataset import calibration_samples
from shortv.tiny.scenes import render

FOLDER = Path(shortv.tiny.__file__).parent / "model"


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


def test_model_is_a_small_llava_with_grouped_query_attention(model):
    config = model.config.text_config
    assert type(model) is LlavaForConditionalGeneration
    assert config.num_hidden_layers >= 8
    assert config.num_key_value_heads < config.num_attention_heads
    assert (FOLDER / "model.safetensors").stat().st_size < 16_000_000
    assert {path.suffix for path in FOLDER.iterdir()} <= {".json", ".jinja", ".safetensors"}


@pytest.mark.parametrize("size", [(60, 60), (97, 41)])
def test_placeholders_match_the_features(model, processor, size):
    image = Image.new("RGB", size, "red")
    inputs = processor(text="USER: <image>\nDescribe the picture. ASSISTANT:", images=image, return_tensors="pt")
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert placeholders == sum(len(feature) for feature in features) == model.config.image_seq_length == 36
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()


def test_two_images_in_one_prompt(model, processor):
    images = [Image.new("RGB", (60, 60), colour) for colour in ("red", "blue")]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "How many objects are there?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=images, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 72
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()


IMAGE, WHAT, RED = {"type": "image"}, {"type": "text", "text": "What?"}, {"role": "assistant", "content": "red"}


@pytest.mark.parametrize(
    ("messages", "generate", "expected"),
    [
        ([{"role": "user", "content": "What?"}], True, "USER: What? ASSISTANT:"),
        ([{"role": "user", "content": [IMAGE, WHAT]}], True, "USER: <image>\nWhat? ASSISTANT:"),
        ([{"role": "user", "content": [WHAT, IMAGE]}], False, "USER: What?<image>\n "),
        ([{"role": "user", "content": [IMAGE, IMAGE, WHAT]}], True, "USER: <image>\n<image>\nWhat? ASSISTANT:"),
        (
            [{"role": "user", "content": [IMAGE, WHAT]}, RED, {"role": "user", "content": "And?"}],
            True,
            "USER: <image>\nWhat? ASSISTANT: red</s>USER: And? ASSISTANT:",
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


@pytest.mark.parametrize("text", ["Grüße, 漢字 🙂", "\t\n", "Zebra/1e-3 {}", "x" * 300])
def test_tokenizer_keeps_any_text(processor, text):
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids
    assert processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_tokenizer_knows_whole_words(processor):
    assert len(processor.tokenizer.tokenize("What color is the object at the top left?")) == 9


def test_training_layout_is_that_of_processor_and_chat_template(processor):
    sample = calibration_samples(size=1)[0]
    conversation = Conversation(scene=sample.scene, turns=(sample.turn, sample.turn), joined=True)
    [row] = encode(processor.tokenizer, [conversation])
    image, text = {"type": "image"}, {"type": "text", "text": sample.turn.prompt}
    answer = {"role": "assistant", "content": sample.turn.answer}
    messages = [{"role": "user", "content": [image, text]}, answer, {"role": "user", "content": [text]}, answer]
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
    assert single[-1] == processor.tokenizer.eos_token_id
    assert together[: len(single)] == single


def test_model_sees_and_is_at_chance_without_the_image(model, processor):
    questions = read_questions()
    seen = measure_accuracy(model, processor, questions)
    blank = measure_accuracy(model, processor, questions, blank=True)
    assert seen.overall >= 0.92, seen
    assert min(seen.by_kind.values()) >= 0.80, seen
    assert abs(blank.overall - majority_accuracy(questions).overall) <= 0.05, blank


def test_intervention_wraps_all_generation(model, processor):
    events = []

    class Recorder:
        def __enter__(self):
            events.append("enter")

        def __exit__(self, *exc):
            events.append("exit")

    measure_accuracy(model, processor, read_questions(limit=4), intervention=Recorder(), batch_size=2)
    assert events == ["enter", "exit"]


def test_calibration_prompts_fit_the_model(processor, model):
    table = pq.read_table(FOLDER.parent / "calibration.parquet")
    longest = max(len(processor.tokenizer(prompt)["input_ids"]) for prompt in table["prompt"].to_pylist())
    assert longest + 36 + 10 < model.config.text_config.max_position_embeddings
