"""Samples become prompts through the model's own template; one that cannot be used is an error of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import ImageFile

from shortv.families import encode
from shortv.sample import Sample
from tests.tiny_model import bundled, calibration


def text_of(sample: Sample) -> str:
    batch = encode(bundled(), [sample]).batch
    assert batch is not None
    text: str = bundled().processor.tokenizer.decode(batch.inputs["input_ids"][0])
    return text.replace("<image>" * 36, "<IMAGE>")


def test_images_come_first_without_markers_and_where_markers_stand_with_them() -> None:
    sample = calibration()[0]
    first = text_of(sample)
    assert first.index("<IMAGE>") < first.index(sample.prompt)
    assert first.rstrip().endswith("ASSISTANT:")
    pair = replace(sample, images=sample.images * 2, prompt="one <image> and two <image> here")
    placed = text_of(pair)
    assert placed.index("one") < placed.index("<IMAGE>") < placed.index("and") < placed.rindex("<IMAGE>")
    assert placed.rindex("<IMAGE>") < placed.index("here")


def test_types_of_a_padded_batch() -> None:
    samples = [calibration()[0], Sample(sample_id="text", prompt="Count the red objects please. " * 4)]
    encoded = encode(bundled(), samples)
    assert encoded.batch is not None and not encoded.errors
    types = encoded.batch.types
    assert types.n_visual == [36, 0]
    assert not (types.visual_BT & types.text_BT).any()
    assert torch.equal(types.real_BT, encoded.batch.inputs["attention_mask"].bool())
    for row, positions in zip(types.real_BT, encoded.batch.inputs["position_ids"], strict=True):
        assert positions[row].tolist() == list(range(int(row.sum())))


BAD = {
    "not-unicode": (lambda sample: replace(sample, prompt="how \ud800 many"), "prompt", "not-unicode"),
    "not-an-image": (lambda sample: replace(sample, images=(b"no picture",)), "decode", "UnidentifiedImageError"),
    "cut-short": (lambda sample: replace(sample, images=(sample.images[0][:60],)), "decode", None),
    "marker-count": (lambda sample: replace(sample, prompt="<image> and <image>"), "prompt", "image-count"),
    "too-long": (lambda sample: replace(sample, prompt="shape " * 2000), "tokenise", "context"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_one_error_and_the_others_stay(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval leaves it
    make, stage, name = BAD[kind]
    good = calibration()[:2]
    bad = replace(make(calibration()[2]), sample_id="bad")
    encoded = encode(bundled(), [good[0], bad, good[1]])
    assert [sample.sample_id for sample in encoded.samples] == [sample.sample_id for sample in good]
    [(sample, error)] = encoded.errors
    assert (sample.sample_id, error.stage) == ("bad", stage)
    assert name is None or error.error == name
    assert error.message and "\n" not in error.message and "0x" not in error.message
    alone = encode(bundled(), good).batch
    assert alone is not None and encoded.batch is not None
    assert torch.equal(alone.inputs["input_ids"], encoded.batch.inputs["input_ids"])


def test_only_bad_samples_leave_no_batch() -> None:
    encoded = encode(bundled(), [replace(calibration()[0], images=(b"?",))])
    assert encoded.batch is None and encoded.samples == () and len(encoded.errors) == 1


def test_a_given_chat_template_replaces_the_processors() -> None:
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{% endfor %} !"
    )
    loaded = replace(bundled(), chat_template=template)
    batch = encode(loaded, calibration()[:1]).batch
    assert batch is not None
    assert "ASSISTANT" not in bundled().processor.tokenizer.decode(batch.inputs["input_ids"][0])
    broken = encode(replace(loaded, chat_template="{{ raise_exception('no') }}"), calibration()[:1])
    assert broken.errors[0][1].error == "chat-template"
