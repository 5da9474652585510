"""Images are judged by their headers; what is no image in a data URI is refused."""

import struct
import time
import zlib

import pytest

from shortv.workers.serving.images import ImageReader
from shortv.workers.serving.rejection import Rejected
from tests.workers.serving.endpoint_fakes import FakeReplicas, body, image_part, picture, post, problem, uri


def read(url: str, max_pixels: int = 36_000_000) -> bytes:
    return ImageReader(max_pixels).read(url, param="url")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 10**6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "MPO"])
def test_known_formats_pass_unchanged(form: str) -> None:
    assert read(uri(picture(form))) == picture(form)
    # Many clients write png for everything.
    assert read(f"DATA:image/{form.lower()};name=a.b;base64," + uri(picture(form)).split(",")[1]) == picture(form)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:1/cat.png", "is a http: URL, which is never fetched"),
        ("https://example.com/cat.png", "is a https: URL, which is never fetched"),
        ("HTTPS://example.com/cat.png", "is a https: URL, which is never fetched"),
        ("file:///etc/passwd", "is a file: URL, which is never fetched"),
        ("/etc/passwd", "is not a data URI"),
        ("", "is not a data URI"),
        ("data:text/plain;base64,aGVsbG8=", "not of a base64 image"),
        ("data:image/png,abc", "not of a base64 image"),
        ("data:image/png;base64,", "not a readable image"),
        ("data:image/png;base64,aGVsbG8", "not valid base64"),
        ("data:image/png;base64,aGVs bG8=", "not valid base64"),
        ("data:image/png;base64,aGVsbG8=aGVsbG8=", "not valid base64"),
        ("data:image/png;base64,äöü=", "not valid base64"),
        (uri(b"Dear diary, " * 100), "not a readable image"),
        (uri(picture("TIFF")), "not a readable image"),
        (uri(picture("ICO")), "not a readable image"),
        (uri(picture("JPEG")[:50]), "not a readable image"),
        (uri(picture("PNG")[:20]), "not a readable image"),
    ],
)
def test_anything_else_is_refused(url: str, why: str) -> None:
    with pytest.raises(Rejected, match=why) as caught:
        read(url)
    assert caught.value.status == 400
    assert b"passwd" not in caught.value.body and b"diary" not in caught.value.body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (60_000, 1), (1, 60_000)])
def test_a_bomb_is_refused_unopened(size: tuple[int, int]) -> None:
    started = time.process_time()
    response = post(body(image_part(uri(bomb(*size)))))
    error = problem(response, 400)
    assert error["code"] in ("image_too_large", "invalid_image")
    assert error["param"] == "messages.0.content.0.image_url.url"
    assert time.process_time() - started < 1


def test_the_limit_is_a_number_of_pixels() -> None:
    assert read(uri(picture()), 32 * 24)
    with pytest.raises(Rejected, match="has 32 x 24 pixels, and 767 are allowed"):
        read(uri(picture()), 32 * 24 - 1)


def test_the_images_of_a_request_share_the_limit() -> None:
    two = [image_part(uri(picture()))] * 2
    assert post(body(*two), max_image_pixels=2 * 32 * 24).status_code == 200
    error = problem(post(body(*two), max_image_pixels=2 * 32 * 24 - 1), 400)
    assert error["code"] == "image_too_large" and error["param"] == "messages.0.content.1.image_url.url"
    assert "1535 are allowed for all images of a request together" in error["message"]


def test_a_strip_that_processors_would_blow_up_is_refused() -> None:
    assert read(uri(picture(size=(200, 1)))) and read(uri(picture(size=(2, 400))))
    with pytest.raises(Rejected, match="has 201 x 1 pixels, and one side may be 200 times the other at most"):
        read(uri(picture(size=(201, 1))))


def test_a_truncated_jpeg_is_the_callers_error() -> None:
    whole = picture("JPEG", (256, 256))
    error = problem(post(body(image_part(uri(whole[:-600], "jpeg"))), FakeReplicas(decodes=True)), 400)
    assert error["code"] == "invalid" and "damaged" in error["message"]
