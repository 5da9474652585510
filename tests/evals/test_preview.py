"""What a page shows of a document: one small picture of its images in any form, and the question asked last."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shortv.errors import SampleError
from shortv.evals.preview import MAX_SIDE, preview, thumbnail
from shortv.request import Message


def image_of(colour: str, width: int = 640, height: int = 480) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def file_of(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def opened(data: bytes | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_images_of_every_form_are_one_small_picture() -> None:
    red, blue = image_of("red"), image_of("blue", 100, 1000)
    for image in (red, file_of(red), np.asarray(red)):
        assert opened(thumbnail([image])).size == (MAX_SIDE, 96)
    assert red.size == (640, 480), "the image itself is not changed"
    pair = opened(thumbnail([np.asarray(red), file_of(blue), red, red, file_of(blue)]))
    assert pair.size == (MAX_SIDE, MAX_SIDE)
    assert pair.getpixel((30, 20))[0] > 200 and pair.getpixel((66, 30))[2] > 200  # type: ignore[index]
    assert thumbnail([]) is None and opened(thumbnail([image_of("red", 3, 2)])).size == (3, 2)


def test_a_picture_full_of_detail_is_still_small() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    assert len(thumbnail([noise]) or b"") < 6_000


def test_the_question_is_the_text_of_the_last_user_message() -> None:
    parts: tuple[Any, ...] = ("Look.", file_of(image_of("red")), "Which colour?")
    shots = (Message(role="user", parts=("One?",)), Message(role="assistant", parts=("1",)))
    found = preview([*shots, Message(role="user", parts=parts)])
    assert found.question == "Look.\nWhich colour?" and opened(found.image).size == (MAX_SIDE, 96)
    found = preview([Message(role="user", parts=("a" * 9_000 + "?",))])
    assert found.image is None and found.question.endswith("a?") and len(found.question) == 2_000
    with pytest.raises(SampleError):
        preview([Message(role="user", parts=(b"not an image",))])
