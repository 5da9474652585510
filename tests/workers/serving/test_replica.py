"""What a replica refuses before its engine sees it, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from shortv.request import Completion, Failure, Message, Reason, Request, SamplingParams
from shortv.spec import ModelSpec
from shortv.workers.models import ModelLoader, RemoteModel
from shortv.workers.serving.replica import Replica
from shortv.workers.serving.scheduler import EngineSettings
from tests.tiny_model import TINY, calibration
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


@pytest.mark.parametrize("word", ["circle ", "é"])
def test_a_prompt_beyond_the_context_never_reaches_the_engine(
    replica: Replica, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica._engine, "submit", None)
    found = asyncio.run(replica.complete(request(calibration()[0].images[0], word * 5000)))
    assert isinstance(found, Failure) and found.reason is Reason.INVALID
    assert "exceed the model's context of 1024" in found.message


def test_a_prompt_of_many_characters_and_few_tokens_is_answered(replica: Replica) -> None:
    text = "circle " * 400
    assert len(text) > 1024
    found = asyncio.run(replica.complete(request(text)))
    assert isinstance(found, Completion) and 400 < found.prompt_tokens < 500


def test_images_wait_for_memory(replica: Replica) -> None:
    image, large = picture(size=(100, 100)), picture(size=(200, 200))

    async def go() -> None:
        with replica._image_memory(request(image, image, image).messages):
            found = await replica.complete(request(image, "how many?"))
            assert isinstance(found, Failure) and found.reason is Reason.OVERLOADED and found.passing
            assert isinstance(await replica.complete(request(picture(size=(10, 10)), "small?")), Completion)
            assert isinstance(await replica.complete(request("none?")), Completion)
        # One request alone may need more than the memory.
        assert isinstance(await replica.complete(request(large, "how many?")), Completion)
        found = await replica.complete(request(b"no image", "what?"))
        assert isinstance(found, Failure) and found.reason is Reason.INVALID

    asyncio.run(go())
