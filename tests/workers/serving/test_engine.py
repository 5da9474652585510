"""The engine answers as transformers' generate does, whatever runs beside a question and whatever goes wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from shortv.evals.generation import Answer as Generated
from shortv.evals.generation import Decoding as GenerateSettings
from shortv.evals.generation import generate
from shortv.evals.likelihood import likelihoods
from shortv.evals.prompts import NamedPrompt
from shortv.families import LoadedModel
from shortv.layers.apply import executing
from shortv.plan import Mode, modes_of_layers
from shortv.request import Completion, Failure, Likelihood, Message, Reason
from shortv.workers.serving.batch import RunningBatch
from shortv.workers.serving.engine import Engine, EngineSettings
from tests.tiny_model import bundled, calibration
from tests.workers.serving.asking import Told, row_of, submit

FULL = (Mode.FULL,) * 8
PLANS = {
    "full": FULL,
    "freeze": modes_of_layers(Mode.FREEZE_VISUAL, (3, 4, 5, 6, 7), 8),
    "drop": modes_of_layers(Mode.DROP_VISUAL, (5, 6, 7), 8),
    "skip": modes_of_layers(Mode.SKIP_ATTENTION, (6,), 8),
    "queries": modes_of_layers(Mode.NO_VISUAL_QUERIES, (1, 2, 6), 8),
}


@contextmanager
def running(settings: EngineSettings | None = None, loaded: LoadedModel | None = None) -> Iterator[Engine]:
    engine = Engine(loaded or bundled(), settings or EngineSettings())
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def generated(told: Told, loaded: LoadedModel | None = None, **arguments: Any) -> Generated:
    """What transformers answers to this question alone, under its plan."""
    loaded = loaded or bundled()
    decoding = told.row.request.sampling
    settings = GenerateSettings(
        arguments={"do_sample": False, "max_new_tokens": decoding.max_tokens, **arguments}, stops=decoding.stop
    )
    with executing(loaded.model, told.row.modes):
        return generate(loaded, [NamedPrompt(name="it", prompt=told.row.prompt)], settings)[0]


def questions(**decoding: Any) -> list[Told]:
    """Prompts of several lengths, with one image, two or none, of one turn or three, under every plan."""
    samples = calibration()
    two = replace(samples[0], images=samples[0].images + samples[1].images, prompt="Is <image> like <image> there?")
    none = replace(samples[0], images=(), prompt="how many circles are there?")
    talk = (
        Message(role="user", parts=(samples[2].images[0], samples[2].prompt)),
        Message(role="assistant", parts=("red",)),
        Message(role="user", parts=(samples[3].prompt,)),
    )
    asked: list[Any] = [*samples[:4], two, none, talk]
    return [row_of(bundled(), one, modes, **decoding) for modes in PLANS.values() for one in asked]


def test_answers_equal_generate_for_every_plan_at_once() -> None:
    asked = questions(max_tokens=12)
    with running(EngineSettings(batch_size=10)) as engine:
        submit(engine, *asked)
        answers = [told.answer() for told in asked]
    for told, answer in zip(asked, answers, strict=True):
        wanted = generated(told)
        assert (answer.text, answer.completion_tokens) == (wanted.text, wanted.output_tokens)
        assert answer.prompt_tokens == wanted.input_tokens
        assert answer.visual_tokens == 36 * len(told.row.prompt.images)
        assert answer.finish_reason == ("length" if answer.completion_tokens == 12 else "stop")
    assert engine.vision.misses == 4  # five plans, four images


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        ({"stop": ("e",)}, {}),
        ({"max_tokens": 1}, {}),
        ({"repetition_penalty": 1.3, "min_tokens": 5}, {"repetition_penalty": 1.3, "min_new_tokens": 5}),
    ],
)
def test_settings_mean_what_they_mean_to_generate(asked: dict[str, Any], arguments: dict[str, Any]) -> None:
    rows = [row_of(bundled(), sample, **{"max_tokens": 8, **asked}) for sample in calibration()[:6]]
    with running() as engine:
        answers = [told.answer() for told in submit(engine, *rows)]
    for told, answer in zip(rows, answers, strict=True):
        wanted = generated(told, **arguments)
        assert answer.text == wanted.text
        assert arguments or answer.completion_tokens == wanted.output_tokens


def test_a_sampled_answer_depends_on_its_seed_alone() -> None:
    sample = calibration()[0]

    def ask(seed: int) -> Told:
        return row_of(bundled(), sample, temperature=30.0, top_p=0.95, top_k=40, seed=seed, max_tokens=10)

    with running() as engine:
        alone = [submit(engine, ask(seed))[0].answer().text for seed in range(4)]
        together = submit(engine, *questions(), *map(ask, range(4)))
        assert [told.answer().text for told in together[-4:]] == alone
    assert len(set(alone)) > 1


def test_pieces_add_up_to_the_answer_and_never_show_a_stop() -> None:
    with running() as engine:
        for told in submit(engine, *(row_of(bundled(), one, streams=True) for one in calibration()[:8])):
            answer = told.answer()
            assert "".join(piece.text for piece in told.pieces) == answer.text != ""
        word = answer.text
        cut = submit(engine, row_of(bundled(), calibration()[7], streams=True, stop=(word[1:],)))[0]
        assert cut.answer().text == word[:1] == "".join(piece.text for piece in cut.pieces)


def test_log_probabilities_are_the_models_own() -> None:
    told = row_of(bundled(), calibration()[0], top_logprobs=3, temperature=2.0, seed=1, max_tokens=3)
    with running() as engine:
        answer = submit(engine, told)[0].answer()
    for token in answer.logprobs:
        assert len(token.top) == 3
        assert token.top[0][1] >= token.top[1][1] >= token.top[2][1] and token.logprob <= token.top[0][1] <= 0
    assert "".join(token.token for token in answer.logprobs) == answer.text


def test_likelihoods_equal_those_in_process() -> None:
    samples = calibration()[:5]
    rows = [row_of(bundled(), one, PLANS["freeze"], continuation=one.answer) for one in samples]
    with running() as engine:
        found = [told.last() for told in submit(engine, *rows)]
    with executing(bundled().model, PLANS["freeze"]):
        named = [
            NamedPrompt(name="it", prompt=told.row.prompt, continuation=str(told.row.request.continuation))
            for told in rows
        ]
        wanted = [likelihoods(bundled(), [one])[0] for one in named]
    for one, other in zip(found, wanted, strict=True):
        assert isinstance(one, Likelihood)
        assert one.is_greedy == other.is_greedy
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def never_ending(seconds: float = 120.0, streams: bool = True) -> Told:
    """A question whose answer takes hundreds of steps."""
    return row_of(bundled(), calibration()[0], streams=streams, seconds=seconds, min_tokens=600, max_tokens=700)


def test_a_short_question_does_not_wait_for_a_long_answer() -> None:
    with running(EngineSettings(batch_size=4)) as engine:
        long = submit(engine, never_ending())[0]
        long.events.get(timeout=30)
        short = submit(engine, row_of(bundled(), calibration()[1], PLANS["freeze"]))[0]
        assert short.answer().text
        assert not long.row.done
        long.row.cancelled = True


def test_a_caller_who_goes_away_frees_the_place() -> None:
    with running(EngineSettings(batch_size=1)) as engine:
        gone = submit(engine, never_ending())[0]
        gone.events.get(timeout=30)
        waits = submit(engine, row_of(bundled(), calibration()[1]))[0]
        time.sleep(0.2)
        assert waits.events.empty()
        gone.row.cancelled = True
        assert waits.answer().text
    assert not gone.row.done


def test_a_question_has_its_time_waiting_or_running() -> None:
    with running(EngineSettings(batch_size=1)) as engine:
        runs, waits = submit(engine, never_ending(seconds=1.0), row_of(bundled(), calibration()[1], seconds=0.5))
        for told in (waits, runs):
            failure = told.last()
            assert isinstance(failure, Failure) and failure.reason is Reason.DEADLINE
        assert submit(engine, row_of(bundled(), calibration()[1]))[0].answer().text


def failing(
    monkeypatch: pytest.MonkeyPatch, culprit: Told, error: Callable[[], Exception], *, at: str = "step"
) -> None:
    """Let every batch with the culprit in it fail, in its prefill or in its second step."""
    own_init, own_step = RunningBatch.__init__, RunningBatch.step

    def init(self: RunningBatch, loaded: Any, vision: Any, rows: Any) -> None:
        if at == "prefill" and culprit.row in rows:
            raise error()
        own_init(self, loaded, vision, rows)

    def step(self: RunningBatch) -> None:
        if at == "step" and culprit.row in self.rows:
            raise error()
        own_step(self)

    monkeypatch.setattr(RunningBatch, "__init__", init)
    monkeypatch.setattr(RunningBatch, "step", step)


@pytest.mark.parametrize("at", ["prefill", "step"])
@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_request_fails_alone(monkeypatch: pytest.MonkeyPatch, at: str, kind: type[Exception]) -> None:
    asked = [row_of(bundled(), one, max_tokens=6, min_tokens=3, streams=True) for one in calibration()[:9]]
    failing(monkeypatch, asked[4], lambda: kind("a secret of the conversation"), at=at)
    with running() as engine:
        submit(engine, *asked)
        failure = asked.pop(4).last()
        assert isinstance(failure, Failure) and failure.reason is Reason.INTERNAL
        assert kind.__name__ in failure.message and "secret" not in failure.message
        answers = [told.answer().text for told in asked]
    for told, text in zip(asked, answers, strict=True):
        assert text == generated(told, min_new_tokens=3).text == "".join(piece.text for piece in told.pieces)


def test_a_prompt_that_cannot_be_encoded_is_the_callers_error() -> None:
    sample = calibration()[0]
    long = row_of(bundled(), replace(sample, prompt="circle " * 3000))
    good = row_of(bundled(), sample)
    with running() as engine:
        submit(engine, long, good)
        failure = long.last()
        assert isinstance(failure, Failure) and failure.reason is Reason.INVALID
        assert "exceed the model's context" in failure.message
        assert good.answer().text


def test_a_lost_device_fails_everything_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class AcceleratorError(RuntimeError):
        pass

    asked = [row_of(bundled(), one) for one in calibration()[:3]]
    failing(monkeypatch, asked[1], AcceleratorError)
    with running() as engine:
        assert engine.trouble is None
        for told in submit(engine, *asked):
            failure = told.last()
            assert isinstance(failure, Failure) and failure.reason is Reason.LOST and failure.passing
        time.sleep(0.1)
        assert engine.trouble == "the device was lost: AcceleratorError"


def test_stopping_sends_rows_elsewhere() -> None:
    with running(EngineSettings(batch_size=1)) as engine:
        rows = submit(engine, never_ending(streams=False), row_of(bundled(), calibration()[0]))
        time.sleep(0.3)
    for told in rows:
        failure = told.last()
        assert isinstance(failure, Failure) and failure.reason is Reason.LOST
    assert isinstance(failure, Failure) and not isinstance(failure, Completion)
