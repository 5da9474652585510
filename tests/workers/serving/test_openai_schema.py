"""Requests that are refused, and what those that are not turn into."""

import json
import math
import time
from typing import Any

import pytest

from shortv.request import SamplingParams
from shortv.workers.serving.openai_schema import parse_request
from shortv.workers.serving.questions import read_question
from shortv.workers.serving.rejection import Rejected
from shortv.workers.serving.settings import EndpointSettings
from tests.workers.serving.endpoint_fakes import body, image_part, picture, uri


def read(data: Any, **settings: Any) -> Any:
    return read_question(json.dumps(data).encode(), EndpointSettings(**settings))


def message(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", **fields}]}


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 9999, b'{"a":' * 9999, b'{"a":"\\ud800"}', b"9" * 9999])
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(Rejected, match="not valid JSON") as caught:
        parse_request(raw)
    assert caught.value.status == 400


@pytest.mark.parametrize("raw", [b"[]", b"1", b"null", b'"text"'])
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(Rejected, match="not an object"):
        parse_request(raw)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (body(temperature=-1), "temperature"),
        (body(temperature=2.5), "temperature"),
        (body(temperature=math.nan), "temperature"),
        (body(temperature=math.inf), "temperature"),
        (body(temperature="1"), "temperature"),
        (body(temperature=True), "temperature"),
        (body(top_p=0), "top_p"),
        (body(top_p=math.nan), "top_p"),
        (body(max_tokens=0), "max_tokens"),
        (body(max_tokens=2**40), "max_tokens"),
        (body(max_tokens=1.5), "max_tokens"),
        (body(max_completion_tokens=0), "max_completion_tokens"),
        (body(max_tokens=3, max_completion_tokens=4), "max_tokens"),
        (body(seed=2**63), "seed"),
        (body(seed=0.5), "seed"),
        (body(stop=["x"] * 17), "stop"),
        (body(stop=["a", ""]), "stop.1"),
        (body(stop=[1]), "stop.0"),
        (body(top_logprobs=3), "top_logprobs"),
        (body(logprobs=True, top_logprobs=21), "top_logprobs"),
        (body(logprobs=1), "logprobs"),
        (body(stream="yes"), "stream"),
        (body(stream_options={"include_usage": True}), "stream_options"),
        (body(stream=True, stream_options={"x": True}), "stream_options.x"),
        (body(shortv={"top_k": -1}), "shortv.top_k"),
        (body(shortv={"min_tokens": 9}, max_tokens=8), "shortv.min_tokens"),
        (body(shortv={"repetition_penalty": 0}), "shortv.repetition_penalty"),
        (body(shortv={"what": 1}), "shortv.what"),
        (body(n=2), "n"),
        (body(tools=[{"type": "function"}]), "tools"),
        (body(functions=[{}]), "functions"),
        (body(response_format={"type": "json_object"}), "response_format"),
        (body(audio={}), "audio"),
        (body(modalities=["text", "audio"]), "modalities"),
        (body(frequency_penalty=0.1), "frequency_penalty"),
        (body(presence_penalty=1), "presence_penalty"),
        (body(logit_bias={"5": 1}), "logit_bias"),
        (body(top_k=5), "top_k"),
        (body(nonsense=5), "nonsense"),
        ({"messages": []}, "model"),
        ({"model": "m"}, "messages"),
        ({"model": "m", "messages": []}, "messages"),
        ({"model": "m", "messages": ["hi"]}, "messages.0"),
        ({"model": 5, "messages": [{"role": "user", "content": "x"}]}, "model"),
        ({"model": "m", "messages": [{"role": "user", "content": "x"}] * 1025}, "messages"),
        (message(), "messages.0.content"),
        (message(content=None), "messages.0.content"),
        (message(content=[]), "messages.0.content"),
        (message(content=7), "messages.0.content"),
        (message(content=["x"]), "messages.0.content.0"),
        (message(content=[{"type": "video_url"}]), "messages.0.content.0.type"),
        (message(content=[{"type": "text"}]), "messages.0.content.0"),
        (message(content=[{"type": "text", "text": 3}]), "messages.0.content.0.text"),
        (message(content=[{"type": "text", "text": "x", "image_url": {"url": "y"}}]), "messages.0.content.0"),
        (message(content=[{"type": "image_url", "image_url": "x"}]), "messages.0.content.0.image_url"),
        (message(content="x", role="tool"), "messages.0.role"),
        (message(content="x", role="system", extra=1), "messages.0.extra"),
        (message(content="x", tool_calls=[{}]), "messages.0.tool_calls"),
        (message(content=[image_part(uri(picture()))], role="system"), "messages.0.content.0"),
        (body(*[image_part(uri(picture()))] * 17), "messages"),
        (message(content="x" * 1_000_001), "messages"),
    ],
)
def test_a_wrong_field_is_named(data: Any, param: str) -> None:
    with pytest.raises(Rejected) as caught:
        read(data)
    error = json.loads(caught.value.body)["error"]
    assert caught.value.status == 400
    assert error["param"] == param
    assert param.split(".")[-1] in error["message"] and len(error["message"]) < 250


def test_a_flood_of_fields_is_one_error() -> None:
    flood = {f"k{number}": 1 for number in range(300_000)}
    for data in (body(shortv=flood), body(**flood), message(content="x", **flood)):
        raw, started = json.dumps(data).encode(), time.process_time()
        with pytest.raises(Rejected, match="too many fields"):
            parse_request(raw)
        assert time.process_time() - started < 0.6


def test_a_field_of_vllm_is_told_its_place() -> None:
    with pytest.raises(Rejected, match=r'"shortv": {"top_k": ...}'):
        read(body(top_k=5))


def test_what_callers_choose_is_not_shown() -> None:
    for data in (body(temperature="Hildegard"), message(content="x", role="Hildegard"), body(seed="Hildegard")):
        with pytest.raises(Rejected) as caught:
            read(data)
        assert b"Hildegard" not in caught.value.body
    with pytest.raises(Rejected, match=r"a\?b\?: this field is unknown"):
        read(body(**{"a\nb\u202e": 1}))


def test_harmless_fields_are_ignored() -> None:
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "n": 1, "tools": []}
    neutral = {"presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}, "temperature": None}
    # lmms-eval's own OpenAI backend passes on the penalties and n of a task.
    assert read(body(**ignored, **neutral, frequency_penalty=0)).sampling == SamplingParams()


def test_every_setting_reaches_the_replica() -> None:
    settings = {"max_completion_tokens": 9, "temperature": 1, "top_p": 0.5, "seed": -3, "stop": "end"}
    vendor = {"top_k": 4, "min_tokens": 2, "repetition_penalty": 1.5}
    asked = read(body(**settings, shortv=vendor, logprobs=True, top_logprobs=3, stream=True))
    assert asked.sampling == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=1.0,
        top_p=0.5,
        top_k=4,
        repetition_penalty=1.5,
        seed=-3,
        stop=("end",),
        top_logprobs=3,
    )
    assert asked.stream and not asked.include_usage
    assert read(body(), default_max_tokens=64).sampling.max_tokens == 64
    # As tasks of lmms-eval ask.
    assert read(body(max_tokens=49152)).sampling.max_tokens == 49152


def test_turns_keep_the_order_of_texts_and_images() -> None:
    one, two = picture(), picture("JPEG")
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [image_part(uri(one)), {"type": "text", "text": "and"}, image_part(uri(two))]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}], "refusal": None, "name": "bot"},
        {"role": "user", "content": ""},
    ]
    turns = read({"model": "m", "messages": talk}).messages
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert [turn.parts for turn in turns] == [("Be brief.",), (one, "and", two), ("Yes.",), ("",)]
