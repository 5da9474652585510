"""What a replica makes of requests before and after its engine, in this process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shortv.evals.generation import generate, likelihoods
from shortv.families.downsampling import downsampled
from shortv.families.preprocessing import message_of, prompt_of
from shortv.layers.apply import executing
from shortv.plan import Mode, Plan
from shortv.request import Completion, Failure, Likelihood, Message, Reason, Request, SamplingParams, Work
from shortv.sample import Sample
from shortv.spec import ModelSpec
from shortv.tiny.accuracy import read_questions
from shortv.untrusted import open_image
from shortv.workers.models import ModelLoader, RemoteModel
from shortv.workers.serving import forward
from shortv.workers.serving.replica import Replica
from shortv.workers.serving.scheduler import EngineSettings
from shortv.workers.serving.sequence import Sequence
from tests.tiny_model import TINY, bundled, calibration
from tests.workers.serving.endpoint_fakes import picture, until
from tests.workers.serving.sequences import sequence_of
from tests.workers.serving.test_engine import generated, wait_for


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    spec = ModelSpec(name=str(TINY / "model"), dtype="float32")
    model = RemoteModel(loader=ModelLoader(), spec=spec, folder=None)
    found = Replica(model, device="cpu", engine=EngineSettings(image_bytes=100_000))
    yield found
    found._engine.stop()


def request(*parts: Any) -> Request:
    return Request(
        request_id="it", messages=(Message(role="user", parts=parts),), sampling=SamplingParams(max_tokens=4)
    )


async def complete(replica: Replica, request: Request, plan: str = "") -> Any:
    replies = await replica.complete_all([Work(request=request, plans=(plan,))])
    return replies.results[0][plan]


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
        found = [await complete(replica, one, name) for one in requests]
        return [one.text for one in found if isinstance(one, Completion)]

    prompts = [prompt_of(loaded, one.messages) for one in requests]
    smaller = [downsampled(loaded, prompt, 0.1, loaded.architecture) for prompt in prompts]
    full, small = (
        [one.text for one in generate(loaded, some, {"max_new_tokens": 4, "do_sample": False})]
        for some in (prompts, smaller)
    )
    assert asyncio.run(go("")) == full != small == asyncio.run(go("small"))


FREEZE, DROP = "freeze", "drop"


def plan(name: str, mode: Mode, *layers: int) -> Any:
    found = bundled().architecture
    sizes: Any = {"num_layers": found.num_layers, "config_digest": found.config_digest}
    return json.loads(Plan.of_layers(mode, layers, name=name, model="tiny", **sizes).to_json())


@pytest.fixture(scope="module")
def planned() -> Iterator[Replica]:
    """A replica with two plans, and the full model under a name of its own."""
    spec = ModelSpec(name=str(TINY / "model"), dtype="float32")
    found = Replica(RemoteModel(loader=ModelLoader(), spec=spec, folder=None), device="cpu")
    plans = [
        plan(FREEZE, Mode.FREEZE_VISUAL, 3, 4, 5, 6, 7),
        plan(DROP, Mode.DROP_VISUAL, 6, 7),
        plan("same", Mode.FULL),
    ]
    asyncio.run(found.reconfigure({"plans": plans}))
    yield found
    found._engine.stop()


def with_arrays(sample: Sample) -> Request:
    images = iter(sample.images)
    parts = [
        np.asarray(open_image(next(images))) if isinstance(part, bytes) else part for part in message_of(sample).parts
    ]
    return request(*parts)


def test_a_request_is_preprocessed_and_seen_once_for_all_of_its_plans(planned: Replica) -> None:
    """Whether its images come as files or as arrays, its completions are those of one plan at a time."""
    samples, plans = calibration()[:3], ("", FREEZE, DROP)
    wanted = {
        (at, name): generated(sequence_of(bundled(), sample, planned._plans[name].modes, max_tokens=4)).text
        for at, sample in enumerate(samples)
        for name in plans
    }
    before = planned._engine.vision.misses
    files = [Work(request=request(*message_of(sample).parts), plans=plans) for sample in samples]
    arrays = [replace(work, request=with_arrays(sample)) for work, sample in zip(files, samples, strict=True)]
    for works in (files, arrays):
        replies = asyncio.run(planned.complete_all(works))
        assert planned._engine.vision.misses == before + len(samples)
        for at, results in enumerate(replies.results):
            assert list(results) == list(plans)
            found = [one for one in results.values() if isinstance(one, Completion)]
            assert [one.text for one in found] == [wanted[at, name] for name in plans]
            assert len({(one.preprocess_ms, one.vision_ms) for one in found}) == 1
            for one in found:
                assert min(one.preprocess_ms, one.vision_ms, one.prefill_ms, one.busy_ms) > 0 and one.prefill_batch <= 3
        assert replies.clock is not None and replies.clock.replica == planned._id and replies.clock.busy_s > 0


def test_the_continuations_of_a_document_share_its_image(planned: Replica) -> None:
    sample = calibration()[4]
    before = planned._engine.vision.misses
    works = [
        Work(request=replace(with_arrays(sample), continuation=f" {text}"), plans=("", FREEZE)) for text in ("red", "3")
    ]
    results = asyncio.run(planned.complete_all(works)).results
    for work, found in zip(works, results, strict=True):
        for name, one in found.items():
            with executing(bundled().model, planned._plans[name].modes):
                prompt = prompt_of(bundled(), work.request.messages, continuation=work.request.continuation or "")
                [wanted] = likelihoods(bundled(), [prompt])
            assert isinstance(one, Likelihood) and one.is_greedy == wanted.is_greedy and one.prefill_ms > 0
            assert one.log_probability == pytest.approx(wanted.log_probability, abs=1e-4)
    assert planned._engine.vision.misses == before + 1


def test_what_fails_in_a_call_fails_alone(planned: Replica) -> None:
    good, damaged = request(picture(), "how many?"), request(b"no image", "what?")
    odd = request(np.zeros((4, 4), np.uint8), "what?")
    works = [
        Work(request=good, plans=("", "none", FREEZE)),
        *(Work(request=one, plans=("",)) for one in (damaged, odd)),
        Work(request=good, plans=()),
    ]
    first, second, third, none = asyncio.run(planned.complete_all(works)).results
    assert none == {}
    assert isinstance(first[""], Completion) and isinstance(first[FREEZE], Completion)
    assert isinstance(first["none"], Failure) and first["none"].reason is Reason.UNKNOWN_PLAN
    for failed in (second[""], third[""]):
        assert isinstance(failed, Failure) and failed.reason is Reason.INVALID


def test_who_goes_away_frees_the_places(planned: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[Sequence] = []
    monkeypatch.setattr(planned._engine, "submit", submitted.append)

    async def go() -> None:
        call = asyncio.create_task(planned.complete_all([Work(request=request("how many?"), plans=("", FREEZE))] * 2))
        await until(lambda: len(submitted) == 4)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    asyncio.run(go())
    assert all(sequence.cancelled for sequence in submitted)


def test_the_full_model_under_two_names_is_equally_fast(planned: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    # The thread's own time, which other processes on the machine do not lengthen.
    monkeypatch.setattr(forward, "time", SimpleNamespace(perf_counter=time.thread_time))
    works = [
        Work(request=request(*message_of(sample).parts), plans=("same", DROP, FREEZE)) for sample in calibration()[:6]
    ]
    found = asyncio.run(planned.measure([*works, Work(request=request(b"no image"), plans=())], seconds=3.0))
    assert not isinstance(found, Failure)
    speeds = {speed.plan: speed for speed in found}
    assert set(speeds) == {"", "same", DROP, FREEZE}
    same = speeds["same"]
    assert abs(same.prefill_ratio - 1) < 0.02 + 3 * same.prefill_ratio_stderr
    assert speeds[""].prefill_ratio == 1 and speeds[""].prefill_ratio_stderr == 0
    # Six layers have K and V of all tokens, and two of text alone.
    of_all = speeds[""].kv_bytes
    assert speeds[FREEZE].kv_bytes == of_all > speeds[DROP].kv_bytes > of_all * 6 / 8
    for speed in found:
        assert speed.batch == 6 and speed.rounds >= 5 and speed.peak_bytes is None
        assert (
            speed.ttft_ms > speed.prefill_ms > 0 < speed.decode_ms_per_token and speed.vision_ms == same.vision_ms > 0
        )


def test_an_engine_that_waits_is_idle_and_not_busy(planned: Replica) -> None:
    asyncio.run(planned.complete_all([Work(request=request("how many?"), plans=("",))]))
    planned._engine.call(lambda: None).result()
    wait_for(lambda: planned._engine._clock._waits_since is not None)
    first, second = planned._engine.clock(""), planned._engine.clock("")
    assert second.idle_s > first.idle_s and second.busy_s == pytest.approx(first.busy_s, abs=1e-6)
