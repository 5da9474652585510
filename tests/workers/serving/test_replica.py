"""What a replica refuses before its engine has to do with it, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from shortv.request import Completion, Failure, Message, Reason, Request, SamplingParams
from shortv.spec import ModelSpec
from shortv.workers.serving.engine import EngineSettings
from shortv.workers.serving.image_room import ImageRoom
from shortv.workers.serving.replica import Replica, ReplicaSetup
from tests.tiny_model import TINY, calibration
from tests.workers.serving.endpoint_fakes import picture


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    spec = ModelSpec(name=str(TINY / "model"), dtype="float32")
    found = Replica(ReplicaSetup(spec=spec, device="cpu", engine=EngineSettings(image_bytes=100_000)))
    yield found
    found._engine.stop()


def question(*parts: str | bytes) -> Request:
    return Request(
        request_id="it", messages=(Message(role="user", parts=parts),), sampling=SamplingParams(max_tokens=4)
    )


@pytest.mark.parametrize("word", ["circle ", "é"])
def test_a_prompt_beyond_the_context_never_reaches_the_engine(
    replica: Replica, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica._engine, "submit", None)
    found = asyncio.run(replica.complete(question(calibration()[0].images[0], word * 5000)))
    assert isinstance(found, Failure) and found.reason is Reason.INVALID
    assert "exceed the model's context of 1024" in found.message


def test_a_prompt_of_many_characters_and_few_tokens_is_answered(replica: Replica) -> None:
    text = "circle " * 400
    assert len(text) > 1024
    found = asyncio.run(replica.complete(question(text)))
    assert isinstance(found, Completion) and 400 < found.prompt_tokens < 500


def test_images_have_to_wait_for_room(replica: Replica) -> None:
    image = picture(size=(100, 100))

    async def go() -> None:
        with replica._room.taken(question(image, image, image, "full").messages):
            assert replica._room.held == 90_000
            found = await replica.complete(question(image, "how many?"))
            assert isinstance(found, Failure) and found.reason is Reason.OVERLOADED and found.passing
            assert isinstance(await replica.complete(question(picture(size=(10, 10)), "small?")), Completion)
            assert isinstance(await replica.complete(question("none?")), Completion)
        assert isinstance(await replica.complete(question(image, "how many?")), Completion)
        found = await replica.complete(question(b"no image", "what?"))
        assert isinstance(found, Failure) and found.reason is Reason.INVALID

    asyncio.run(go())
    assert replica._room.held == 0


def test_one_question_may_be_larger_than_the_room() -> None:
    room, large = ImageRoom(1000), question(picture(size=(100, 100))).messages
    with room.taken(large) as first, room.taken(large) as second, room.taken(question("text").messages) as third:
        assert (first, second, third) == (True, False, True)
    assert room.held == 0
