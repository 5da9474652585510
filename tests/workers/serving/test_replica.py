"""What a replica refuses or does before its engine sees a request, in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from shortv.evals.generation import generate
from shortv.families.downsampling import downsampled
from shortv.families.preprocessing import prompt_of
from shortv.plan import Plan
from shortv.request import Completion, Failure, Message, Reason, Request, SamplingParams, Work
from shortv.spec import ModelSpec
from shortv.tiny.accuracy import read_questions
from shortv.workers.models import ModelLoader, RemoteModel
from shortv.workers.serving.replica import Replica
from shortv.workers.serving.scheduler import EngineSettings
from tests.tiny_model import TINY, bundled, calibration
from tests.workers.serving.endpoint_fakes import picture


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    spec = ModelSpec(name=str(TINY / "model"), dtype="float32")
    model = RemoteModel(loader=ModelLoader(), spec=spec, folder=None)
    found = Replica(model, device="cpu", engine=EngineSettings(image_bytes=100_000))
    yield found
    found._engine.stop()


def request(*parts: str | bytes) -> Request:
    return Request(
        request_id="it", messages=(Message(role="user", parts=parts),), sampling=SamplingParams(max_tokens=4)
    )


async def complete(replica: Replica, request: Request) -> Any:
    replies = await replica.complete_all([Work(request=request, plans=("",))])
    return replies.results[0][""]


@pytest.mark.parametrize("word", ["circle ", "é"])
def test_a_prompt_beyond_the_context_never_reaches_the_engine(
    replica: Replica, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica._engine, "submit", None)
    found = asyncio.run(complete(replica, request(calibration()[0].images[0], word * 5000)))
    assert isinstance(found, Failure) and found.reason is Reason.INVALID
    assert "exceed the model's context of 1024" in found.message


def test_a_prompt_of_many_characters_and_few_tokens_is_answered(replica: Replica) -> None:
    text = "circle " * 400
    assert len(text) > 1024
    found = asyncio.run(complete(replica, request(text)))
    assert isinstance(found, Completion) and 400 < found.prompt_tokens < 500


def test_images_wait_for_memory(replica: Replica) -> None:
    image, large = picture(size=(100, 100)), picture(size=(200, 200))

    async def go() -> None:
        with replica._image_memory(request(image, image, image).messages):
            found = await complete(replica, request(image, "how many?"))
            assert isinstance(found, Failure) and found.reason is Reason.OVERLOADED and found.passing
            assert isinstance(await complete(replica, request(picture(size=(10, 10)), "small?")), Completion)
            assert isinstance(await complete(replica, request("none?")), Completion)
        # One request alone may need more than the memory.
        assert isinstance(await complete(replica, request(large, "how many?")), Completion)
        found = await complete(replica, request(b"no image", "what?"))
        assert isinstance(found, Failure) and found.reason is Reason.INVALID

    asyncio.run(go())


def test_a_plan_of_smaller_images_answers_as_the_model_does_with_smaller_images(replica: Replica) -> None:
    loaded, questions = bundled(), read_questions(limit=60)[-20:]
    sizes: dict[str, Any] = {"num_layers": 8, "config_digest": loaded.architecture.config_digest, "model": "tiny"}
    plan = Plan.full(name="small", downsample=0.1, **sizes)
    requests = [request(one.image, one.prompt) for one in questions]

    async def go(name: str) -> list[str]:
        await replica.reconfigure({"plans": [json.loads(plan.to_json())]})
        replies = await replica.complete_all([Work(request=one, plans=(name,)) for one in requests])
        found = [results[name] for results in replies.results]
        return [one.text for one in found if isinstance(one, Completion)]

    prompts = [prompt_of(loaded, one.messages) for one in requests]
    smaller = [downsampled(loaded, prompt, 0.1, loaded.architecture) for prompt in prompts]
    full, small = (
        [one.text for one in generate(loaded, some, {"max_new_tokens": 4, "do_sample": False})]
        for some in (prompts, smaller)
    )
    assert asyncio.run(go("")) == full != small == asyncio.run(go("small"))
