"""Chat requests that are refused, and what accepted ones become."""

import io
import json
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from reports.http import HttpError
from shortv.request import Request, SamplingParams
from shortv.workers.serving import chat_request
from shortv.workers.serving.chat_request import ChatCall, read_chat
from shortv.workers.serving.spec import EndpointSpec
from tests.workers.serving.endpoint_fakes import MODEL, body, image_part, picture, uri


def read_bytes(raw: bytes, **settings: Any) -> ChatCall:
    return read_chat(raw, EndpointSpec(model=MODEL, **settings), request_id="1")


def read(data: Any, **settings: Any) -> Request:
    return read_bytes(json.dumps(data).encode(), **settings).request


def refused(data: Any, **settings: Any) -> dict[str, Any]:
    """The error body of a request that is refused."""
    with pytest.raises(HttpError) as caught:
        read_bytes(data if isinstance(data, bytes) else json.dumps(data).encode(), **settings)
    assert caught.value.status == 400
    error: dict[str, Any] = json.loads(caught.value.body)["error"]
    return error


def message(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", **fields}]}


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b'{"a":' * 9999, b'{"a":"\\ud800"}', b'{"a":NaN}'])
def test_invalid_json_is_refused(raw: bytes) -> None:
    assert refused(raw)["code"] == "invalid_json"


def test_a_wrong_field_is_named() -> None:
    image = image_part(uri(picture()))
    cases: list[tuple[Any, str]] = [
        ([], ""),
        (body(temperature=2.5), "temperature"),
        (body(temperature=True), "temperature"),
        (body(max_tokens=2**40), "max_tokens"),
        (body(max_tokens=3, max_completion_tokens=4), "max_tokens"),
        (body(seed=0.5), "seed"),
        (body(stop=["x"] * 17), "stop"),
        (body(stop=["a", ""]), "stop.1"),
        (body(top_logprobs=3), "top_logprobs"),
        (body(stream_options={"include_usage": True}), "stream_options"),
        (body(stream=True, stream_options={"x": True}), "stream_options.x"),
        (body(shortv={"min_tokens": 9}, max_tokens=8), "shortv.min_tokens"),
        # In float32 it is 0, and the logits would be infinite.
        (body(shortv={"repetition_penalty": 5e-324}), "shortv.repetition_penalty"),
        (body(shortv={"user": 1}), "shortv.user"),
        (body(n=2), "n"),
        (body(tools=[{"type": "function"}]), "tools"),
        (body(nonsense=5), "nonsense"),
        ({"messages": []}, "model"),
        ({"model": "m", "messages": []}, "messages"),
        ({"model": "m", "messages": ["hi"]}, "messages.0"),
        ({"model": "m", "messages": [{"role": "user", "content": "x"}] * 1025}, "messages"),
        (message(content=[]), "messages.0.content"),
        (message(content=[{"type": "video_url"}]), "messages.0.content.0.type"),
        (message(content=[{"type": "text"}]), "messages.0.content.0"),
        (message(content=[{**image, "text": "x"}]), "messages.0.content.0"),
        (message(content=[{"type": "image_url", "image_url": "x"}]), "messages.0.content.0.image_url"),
        (message(content="x", role="tool"), "messages.0.role"),
        (message(content="x", tool_calls=[{}]), "messages.0.tool_calls"),
        (message(content=[image], role="system"), "messages.0.content.0"),
        (body(*[image] * 17), "messages"),
        (message(content="x" * 1_000_001), "messages"),
    ]
    for data, param in cases:
        error = refused(data)
        assert (error["param"] or "") == param
        assert param.split(".")[-1] in error["message"] and len(error["message"]) < 250


def test_a_flood_is_refused_before_it_costs_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    flood = {f"k{number}": 1 for number in range(101)}
    for data in (body(shortv=flood), body(**flood), message(content="x", **flood)):
        assert "too many fields" in refused(data)["message"]
    monkeypatch.setattr(chat_request, "parse_json", lambda *_, **__: pytest.fail("the body was parsed"))
    raw = json.dumps(body(metadata={"a": [0]})).encode().replace(b"[0]", b"[" + b"{}," * 1_000_000 + b"{}]")
    assert refused(raw)["code"] == "invalid_json"


def test_a_field_of_vllm_is_told_its_place_and_values_are_not_repeated() -> None:
    assert '"shortv": {"top_k": ...}' in refused(body(top_k=5))["message"]
    for data in (body(temperature="Hildegard"), message(content="x", role="Hildegard"), body(seed="Hildegard" * 10**5)):
        assert "Hildegard" not in json.dumps(refused(data))
    assert refused(body(**{"a\nb\u202e": 1}))["message"].startswith("a?b?: this field is unknown")
    assert len(json.dumps(refused(body(**{"x" * 10**6: 1})))) < 1000


def test_harmless_fields_are_ignored_and_every_setting_reaches_the_request() -> None:
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "n": 1, "tools": []}
    neutral = {"presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}, "temperature": None}
    # lmms-eval's own OpenAI backend passes on the penalties and n of a task, and such a limit.
    found = read(body(**ignored, **neutral, frequency_penalty=0, max_tokens=49152)).sampling
    assert found == SamplingParams(max_tokens=49152)
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 0.5, "seed": -3}
    vendor: dict[str, Any] = {"top_k": 4, "min_tokens": 2, "repetition_penalty": 1.5}
    more = {"max_completion_tokens": 9, "stop": "end", "logprobs": True, "top_logprobs": 3, "stream": True}
    call = read_bytes(json.dumps(body(**settings, **more, shortv=vendor)).encode(), timeout=7)
    wanted = SamplingParams(**settings, **vendor, max_tokens=9, stop=("end",), top_logprobs=3)
    assert call.request.sampling == wanted
    assert call.stream and not call.include_usage and call.request.timeout_s == 7


def test_messages_keep_the_order_of_texts_and_images() -> None:
    one, two = picture(), picture("JPEG")
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [image_part(uri(one)), {"type": "text", "text": "and"}, image_part(uri(two))]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}], "refusal": None, "name": "bot"},
        {"role": "user", "content": ""},
    ]
    messages = read({"model": "m", "messages": talk}).messages
    assert [one.role for one in messages] == ["system", "user", "assistant", "user"]
    assert [one.parts for one in messages] == [("Be brief.",), (one, "and", two), ("Yes.",), ("",)]


def image_of(url: str, **settings: Any) -> object:
    return read(body(image_part(url)), **settings).messages[0].parts[0]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "MPO"])
def test_known_formats_pass_unchanged(form: str) -> None:
    # Many clients write png for everything.
    parameters = f"DATA:image/png;name=a.b;base64,{uri(picture(form)).split(',')[1]}"
    assert image_of(parameters) == picture(form)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("HTTPS://example.com/cat.png", "https: URL"),
        ("/etc/passwd", "never fetched"),
        ("data:text/plain;base64,aGVsbG8=", "base64 data URI of an image"),
        ("data:image/png,abc", "base64 data URI of an image"),
        ("data:image/png;base64,", "has no bytes"),
        ("data:image/png;base64,aGVsbG8=aGVsbG8=", "not valid base64"),
        ("data:image/png;base64,äöü=", "not valid base64"),
        (uri(b"Dear diary, " * 100), "cannot be decoded"),
        (uri(picture("TIFF")), "cannot be decoded"),
    ],
)
def test_anything_but_a_readable_data_uri_is_refused(url: str, why: str) -> None:
    error = refused(body(image_part(url)))
    assert why in error["message"] and error["param"] == "messages.0.content.0.image_url.url"
    assert "passwd" not in error["message"] and "diary" not in error["message"]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a kilobyte whose header declares this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(header) - 4) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + picture()[33:]


@pytest.mark.parametrize("size", [(10_000, 10_000), (2**31 - 1, 2**31 - 1), (60_000, 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb(*size)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("the image was decoded"))
    assert refused(body(image_part(uri(data))))["code"] in ("image_too_large", "invalid_image")


def test_a_jpeg_with_a_repeated_scan_is_refused() -> None:
    data = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(data, "JPEG", progressive=True)
    whole = data.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    assert refused(body(image_part(uri(whole[:-2] + scan * 1500 + whole[-2:]))))["code"] == "invalid_image"
    assert image_of(uri(whole)) == whole


def test_the_images_of_a_request_share_a_number_of_pixels() -> None:
    two = [image_part(uri(picture()))] * 2
    limit = 32 * 24 / 1e6
    assert read(body(*two), max_image_megapixels=2 * limit)
    assert "32 x 24 pixels, 767" in refused(body(two[0]), max_image_megapixels=limit - 1e-6)["message"]
    error = refused(body(*two), max_image_megapixels=2 * limit - 1e-6)
    assert error["code"] == "image_too_large" and error["param"] == "messages.0.content.1.image_url.url"
