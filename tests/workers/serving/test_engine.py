"""The engine completes requests as transformers' generate does, whatever shares their batch and whatever fails."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shortv.evals.generation import generate, likelihoods
from shortv.families import LoadedModel
from shortv.layers.apply import executing
from shortv.plan import Mode, modes_of_layers
from shortv.request import Completion, Likelihood, Message, Reason, TokenLogprob
from shortv.workers.serving import batch as batch_module
from shortv.workers.serving import engine as engine_module
from shortv.workers.serving.batch import RunningBatch
from shortv.workers.serving.engine import Engine
from shortv.workers.serving.sampling import Chosen
from shortv.workers.serving.scheduler import EngineSettings
from shortv.workers.serving.sequence import Detokenizer
from tests.families.test_processors import BATCHES
from tests.models import LAYERS
from tests.processors import CHECKPOINTS, build_tokenizer, loaded_checkpoint
from tests.tiny_model import bundled, calibration
from tests.workers.serving.sequences import GUARD_S, Submitted, running, sequence_of, submit

FULL = (Mode.FULL,) * 8
PLANS = {
    "full": FULL,
    "freeze": modes_of_layers(Mode.FREEZE_VISUAL, (3, 4, 5, 6, 7), 8),
    "drop": modes_of_layers(Mode.DROP_VISUAL, (5, 6, 7), 8),
    "bypass": modes_of_layers(Mode.BYPASS_VISUAL, (2, 5), 8),
    "skip": modes_of_layers(Mode.SKIP_ATTENTION, (6,), 8),
    "queries": modes_of_layers(Mode.NO_VISUAL_QUERIES, (1, 2, 6), 8),
}


def generated(one: Submitted, loaded: LoadedModel | None = None, **arguments: Any) -> Completion:
    """What transformers generates for this request alone, under its plan."""
    loaded = loaded or bundled()
    sampling = one.sequence.request.sampling
    arguments = {"do_sample": False, "max_new_tokens": sampling.max_tokens, **arguments}
    with executing(loaded.model, one.sequence.modes, one.sequence.run):
        return generate(loaded, [one.prompt], arguments, sampling.stop)[0]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is true; a hang fails."""
    until = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def requests(**sampling: Any) -> list[Submitted]:
    """Under every plan prompts of several lengths: with one image, two or none, of one message or three."""
    samples = calibration()
    two = replace(samples[0], images=samples[0].images + samples[1].images, prompt="Is <image> like <image> there?")
    none = replace(samples[0], images=(), prompt="how many circles are there?")
    talk = (
        Message(role="user", parts=(samples[2].images[0], samples[2].prompt)),
        Message(role="assistant", parts=("red",)),
        Message(role="user", parts=(samples[3].prompt,)),
    )
    content: list[Any] = [samples[0], two, samples[1], none, samples[2], talk]
    chosen = [(content[(at + offset) % 6], modes) for at, modes in enumerate(PLANS.values()) for offset in (0, 1, 3)]
    return [sequence_of(bundled(), one, modes, **sampling) for one, modes in chosen]


def test_completions_equal_generate_for_every_plan_at_once() -> None:
    submitted = requests(max_tokens=12)
    with running(EngineSettings(batch_size=10)) as engine:
        submit(engine, *submitted)
        completions = [one.completion() for one in submitted]
    for one, completion in zip(submitted, completions, strict=True):
        wanted = generated(one)
        assert (completion.text, completion.completion_tokens) == (wanted.text, wanted.completion_tokens)
        assert completion.prompt_tokens == wanted.prompt_tokens
        assert completion.visual_tokens == 36 * len(one.prompt.images)
        assert completion.finish_reason == ("length" if completion.completion_tokens == 12 else "stop")
    assert engine.vision.misses == 3  # six plans, three images


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """A random checkpoint of each family."""
    return loaded_checkpoint(request.param)


def test_interleaved_batches_of_different_plans_equal_generate(loaded: LoadedModel) -> None:
    plans = [
        (Mode.FULL,) * LAYERS,
        modes_of_layers(Mode.FREEZE_VISUAL, range(1, LAYERS), LAYERS),
        modes_of_layers(Mode.DROP_VISUAL, range(2, LAYERS), LAYERS),
    ]
    submitted = [
        sequence_of(loaded, sample, modes, max_tokens=3 + 2 * at)
        for modes in plans
        for at, sample in enumerate(BATCHES["text-first"])
    ]
    with running(EngineSettings(batch_size=8, max_batches=6), loaded) as engine:
        completions = [one.completion() for one in submit(engine, *submitted)]
    for one, completion in zip(submitted, completions, strict=True):
        wanted = generated(one, loaded)
        assert (completion.text, completion.completion_tokens) == (wanted.text, wanted.completion_tokens)
        assert completion.prompt_tokens == wanted.prompt_tokens


@pytest.mark.parametrize(
    ("sampling", "arguments"),
    [
        ({"stop": ("e",)}, {}),
        ({"max_tokens": 1}, {}),
        ({"temperature": 5e-324, "seed": 1}, {}),
        ({"repetition_penalty": 1.3, "min_tokens": 5}, {"repetition_penalty": 1.3, "min_new_tokens": 5}),
    ],
)
def test_sampling_parameters_mean_what_they_mean_to_generate(
    sampling: dict[str, Any], arguments: dict[str, Any]
) -> None:
    submitted = [sequence_of(bundled(), one, **{"max_tokens": 8, **sampling}) for one in calibration()[:4]]
    with running() as engine:
        completions = [one.completion() for one in submit(engine, *submitted)]
    for one, completion in zip(submitted, completions, strict=True):
        wanted = generated(one, **arguments)
        assert completion.text == wanted.text
        assert arguments or completion.completion_tokens == wanted.completion_tokens


def test_a_sampled_completion_depends_on_its_seed_alone() -> None:
    def seeded(seed: int) -> Submitted:
        settings = {"temperature": 30.0, "top_p": 0.95, "top_k": 40, "seed": seed, "max_tokens": 10, "top_logprobs": 3}
        return sequence_of(bundled(), calibration()[0], **settings)

    with running() as engine:
        alone = [submit(engine, seeded(seed))[0].completion() for seed in range(3)]
        together = [one.completion() for one in submit(engine, *requests(max_tokens=4), *map(seeded, range(3)))]
    assert [one.text for one in together[-3:]] == [one.text for one in alone]
    assert len({one.text for one in alone}) > 1
    # Log-probabilities are the model's own, before the temperature.
    for token in alone[0].logprobs:
        assert token.top[0][1] >= token.top[1][1] >= token.top[2][1] and token.logprob <= token.top[0][1] <= 0
    assert "".join(token.token for token in alone[0].logprobs) == alone[0].text


def test_chunks_add_up_to_the_completion_and_never_show_a_stop() -> None:
    with running() as engine:
        for one in submit(engine, *(sequence_of(bundled(), sample, streams=True) for sample in calibration()[:4])):
            text = one.completion().text
            assert one.streamed == text != ""
        settings: dict[str, Any] = {"streams": True, "stop": (text[1:],), "top_logprobs": 0}
        cut = submit(engine, sequence_of(bundled(), calibration()[3], **settings))[0]
        completion = cut.completion()
    assert completion.text == text[:1] == cut.streamed
    # Tokens that a stop cuts away have log-probabilities too.
    assert [found for chunk in cut.chunks for found in chunk.logprobs] == list(completion.logprobs) != []


def test_likelihoods_equal_those_in_process() -> None:
    samples = calibration()[:5]
    submitted = [sequence_of(bundled(), one, PLANS["freeze"], continuation=one.answer) for one in samples]
    with running() as engine:
        found = [one.last() for one in submit(engine, *submitted)]
    with executing(bundled().model, PLANS["freeze"]):
        for one, sample, value in zip(submitted, samples, found, strict=True):
            prompt = replace(one.prompt, continuation=str(sample.answer))
            [wanted] = likelihoods(bundled(), [prompt])
            assert isinstance(value, Likelihood) and value.is_greedy == wanted.is_greedy
            assert value.log_probability == pytest.approx(wanted.log_probability, abs=1e-4)


def endless(monkeypatch: pytest.MonkeyPatch, count: int = 1, **settings: Any) -> list[Submitted]:
    """Sequences that run until they are cancelled: their batches generate nothing after the first token."""
    held = [sequence_of(bundled(), calibration()[0], streams=True, min_tokens=9, **settings) for _ in range(count)]
    sequences = {one.sequence for one in held}
    own = RunningBatch.step

    def step(self: RunningBatch) -> None:
        if not any(one in sequences and not one.over for one in self.sequences):
            own(self)

    monkeypatch.setattr(RunningBatch, "step", step)
    return held


def test_a_short_request_does_not_wait_and_a_cancelled_one_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    long, other = endless(monkeypatch, 2)
    with running(EngineSettings(batch_size=2)) as engine:
        submit(engine, long)[0].next_chunk()
        assert submit(engine, sequence_of(bundled(), calibration()[1], PLANS["freeze"]))[0].completion().text
        submit(engine, other)[0].next_chunk()
        waits = submit(engine, sequence_of(bundled(), calibration()[1]))[0]
        wait_for(lambda: engine.scheduler.load == (2, 1))
        long.sequence.cancelled = True
        assert waits.completion().text
    assert not long.sequence.finished


def test_a_time_limit_holds_for_waiting_and_for_running(monkeypatch: pytest.MonkeyPatch) -> None:
    (runs,) = endless(monkeypatch, timeout_s=0.2)
    waits = sequence_of(bundled(), calibration()[1], timeout_s=0.1)
    with running(EngineSettings(batch_size=1)) as engine:
        for one in submit(engine, runs, waits):
            assert one.failure().reason is Reason.DEADLINE
        assert submit(engine, sequence_of(bundled(), calibration()[1]))[0].completion().text


@pytest.mark.parametrize(("held", "count"), [((1, 1), 1), ((7,), 2)])
def test_places_that_stay_free_are_used(monkeypatch: pytest.MonkeyPatch, held: tuple[int, ...], count: int) -> None:
    """Many small batches run, or one that leaves a single place; none of them ends."""
    settings = EngineSettings(batch_size=8, max_batches=2 if len(held) == 2 else 4, patience_s=0.05)
    long = endless(monkeypatch, sum(held))
    with running(settings) as engine:
        for size, first in zip(held, (0, held[0]), strict=False):
            for one in submit(engine, *long[first : first + size]):
                one.next_chunk()
        short = [sequence_of(bundled(), calibration()[1], max_tokens=4) for _ in range(count)]
        assert all(one.completion().text for one in submit(engine, *short))
        assert not any(one.sequence.finished for one in long)


def test_batches_stay_full_while_documents_wait_under_many_plans() -> None:
    engine = Engine(bundled(), EngineSettings(batch_size=8, max_queued=1000, patience_s=GUARD_S))
    documents = [calibration()[at % 8] for at in range(16)]
    submitted = [sequence_of(bundled(), one, modes, max_tokens=6) for one in documents for modes in PLANS.values()]
    submit(engine, *submitted)
    engine.start()
    try:
        found = [one.completion() for one in submitted]
    finally:
        engine.stop()
    assert {one.prefill_batch for one in found} == {8} and len({one.completion_tokens for one in found}) > 1


def test_more_requests_than_run_and_wait_are_refused() -> None:
    engine = Engine(bundled(), EngineSettings(batch_size=3, max_queued=1))
    submitted = [sequence_of(bundled(), calibration()[0], max_tokens=2) for _ in range(5)]
    *accepted, surplus = submit(engine, *submitted)
    assert surplus.failure().reason is Reason.OVERLOADED
    engine.start()
    try:
        assert [one.completion().completion_tokens for one in accepted] == [2] * 4
    finally:
        engine.stop()


def test_a_completion_ends_where_the_context_does() -> None:
    sample = replace(calibration()[0], prompt="circle " * 900)
    with running() as engine:
        long = submit(engine, sequence_of(bundled(), sample, min_tokens=49152, max_tokens=49152))[0].completion()
    assert long.finish_reason == "length" and long.prompt_tokens + long.completion_tokens == bundled().context


def test_an_idle_engine_keeps_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[weakref.ref[RunningBatch]] = []
    own = RunningBatch.__init__

    def init(self: RunningBatch, *arguments: Any) -> None:
        batches.append(weakref.ref(self))
        own(self, *arguments)

    monkeypatch.setattr(RunningBatch, "__init__", init)
    with running() as engine:
        assert submit(engine, sequence_of(bundled(), calibration()[0]))[0].completion().text
        wait_for(lambda: gc.collect() >= 0 and [batch() for batch in batches] == [None])


def failing(
    monkeypatch: pytest.MonkeyPatch, culprit: Submitted, error: Callable[[], Exception], *, at: str = "step"
) -> None:
    """Let every batch with the culprit in it fail, in its prefill or in its first step."""
    own_init, own_step = RunningBatch.__init__, RunningBatch.step

    def init(self: RunningBatch, loaded: Any, vision: Any, sequences: Any) -> None:
        if at == "prefill" and culprit.sequence in sequences:
            raise error()
        own_init(self, loaded, vision, sequences)

    def step(self: RunningBatch) -> None:
        if at == "step" and culprit.sequence in self.sequences:
            raise error()
        own_step(self)

    monkeypatch.setattr(RunningBatch, "__init__", init)
    monkeypatch.setattr(RunningBatch, "step", step)


@pytest.mark.parametrize(("at", "kind"), [("prefill", torch.OutOfMemoryError), ("step", RuntimeError)])
def test_a_request_fails_alone(monkeypatch: pytest.MonkeyPatch, at: str, kind: type[Exception]) -> None:
    settings: dict[str, Any] = {"max_tokens": 6, "min_tokens": 3, "streams": True}
    submitted = [sequence_of(bundled(), one, **settings) for one in calibration()[:9]]
    failing(monkeypatch, submitted[4], lambda: kind("a secret of the conversation"), at=at)
    with running() as engine:
        submit(engine, *submitted)
        failure = submitted.pop(4).failure()
        assert failure.reason is Reason.INTERNAL
        assert kind.__name__ in failure.message and "secret" not in failure.message
        texts = [one.completion().text for one in submitted]
    for one, text in zip(submitted, texts, strict=True):
        assert text == generated(one, min_new_tokens=3).text == one.streamed


def fail_once_streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the first step fail in which all sequences have streamed text; the list has an entry from then on."""
    own, failures = RunningBatch.step, list[int]()

    def step(self: RunningBatch) -> None:
        if len(self.sequences) > 1 and not failures and all(one._streamed_chars for one in self.sequences):
            failures.append(1)
            raise RuntimeError("once")
        own(self)

    monkeypatch.setattr(RunningBatch, "step", step)
    return failures


def sampled_streams() -> list[Submitted]:
    settings: dict[str, Any] = {"temperature": 30.0, "max_tokens": 20, "min_tokens": 20, "streams": True}
    return [sequence_of(bundled(), one, **settings) for one in calibration()[:2]]


def test_a_stream_goes_on_as_it_began_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = fail_once_streamed(monkeypatch)
    with running() as engine:
        for one in submit(engine, *sampled_streams()):
            assert one.completion().text == one.streamed != ""
    assert failures


def test_a_stream_that_comes_out_differently_after_a_failure_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    failures, own = fail_once_streamed(monkeypatch), batch_module.choose_all

    def choose(*arguments: Any) -> Any:
        found = own(*arguments)
        return [one and Chosen(one.token ^ 1, one.logprob) for one in found] if failures else found

    monkeypatch.setattr(batch_module, "choose_all", choose)
    with running() as engine:
        for one in submit(engine, *sampled_streams()):
            assert one.failure().reason is Reason.INTERNAL and one.streamed


def not_finite(monkeypatch: pytest.MonkeyPatch, *, forward: int, row: int, value: float) -> None:
    """Let the logits of a row contain this value, in one forward of the model."""
    own, calls = bundled().model.forward, 0

    def patched(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        output = own(*arguments, **named)
        calls += 1
        if calls == forward:
            output.logits[row, :, 5] = value
        return output

    monkeypatch.setattr(bundled().model, "forward", patched)


@pytest.mark.parametrize(("forward", "value"), [(1, float("nan")), (3, float("inf"))])
def test_logits_that_are_not_finite_fail_one_request(
    monkeypatch: pytest.MonkeyPatch, forward: int, value: float
) -> None:
    submitted = [sequence_of(bundled(), one, min_tokens=6, max_tokens=6) for one in calibration()[:3]]
    wanted = [generated(one, min_new_tokens=6).text for one in submitted]
    not_finite(monkeypatch, forward=forward, row=1, value=value)
    with running() as engine:
        first, second, third = submit(engine, *submitted)
        assert second.failure().reason is Reason.INTERNAL
        assert [first.completion().text, third.completion().text] == [wanted[0], wanted[2]]
        monkeypatch.undo()
        not_finite(monkeypatch, forward=1, row=0, value=float("nan"))
        likelihood = submit(engine, sequence_of(bundled(), calibration()[0], continuation="red"))[0]
        assert likelihood.failure().reason is Reason.INTERNAL


def test_a_lost_device_fails_everything_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class AcceleratorError(RuntimeError):
        pass

    submitted = [sequence_of(bundled(), one) for one in calibration()[:3]]
    failing(monkeypatch, submitted[1], AcceleratorError)
    with running() as engine:
        assert engine.trouble is None
        for one in submit(engine, *submitted):
            failure = one.failure()
            assert failure.reason is Reason.LOST and failure.passing
        engine.stop()
        assert engine.trouble == "the device was lost: AcceleratorError"


def test_stopping_sends_sequences_to_other_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    (long,) = endless(monkeypatch)
    with running(EngineSettings(batch_size=1)) as engine:
        waits = submit(engine, long, sequence_of(bundled(), calibration()[0]))[1]
        long.next_chunk()
    assert long.failure().reason is waits.failure().reason is Reason.LOST
    late = submit(engine, sequence_of(bundled(), calibration()[0]))[0]
    assert late.failure().reason is Reason.LOST


@pytest.mark.parametrize(("layer_s", "stuck"), [(100, False), (400, True)])
def test_an_engine_is_stuck_when_a_layer_is_not_when_a_step_is_long(
    monkeypatch: pytest.MonkeyPatch, layer_s: int, stuck: bool
) -> None:
    now = [0.0]
    monkeypatch.setattr(engine_module, "monotonic", lambda: now[0])
    troubles: list[str | None] = []

    def advance(*_: object) -> None:
        now[0] += layer_s
        troubles.append(engine.trouble)

    engine = Engine(bundled(), EngineSettings(stall_s=300))
    hooks = [layer.register_forward_hook(advance) for layer in bundled().decoder.layers]
    engine.start()
    try:
        assert submit(engine, sequence_of(bundled(), calibration()[0], max_tokens=2))[0].completion()
    finally:
        engine.stop()
        for hook in hooks:
            hook.remove()
    assert len(troubles) >= 8
    assert all((trouble is not None) == stuck for trouble in troubles)


def test_a_stop_whose_characters_are_several_tokens_is_never_shown() -> None:
    tokenizer = build_tokenizer(CHECKPOINTS["Qwen2VLProcessor"])
    output = Detokenizer(tokenizer, stop=("b漢",), ends=(), limit=100)
    shown = ""
    for token in tokenizer("see b漢 x")["input_ids"]:
        if output.finish_reason is None:
            output.add(token)
            shown = max(shown, output.final_text(), key=len)
    assert (shown, output.text, output.finish_reason) == ("see ", "see ", "stop")


def test_tokens_without_text_are_streamed_with_their_log_probabilities() -> None:
    tokenizer = bundled().processor.tokenizer
    one = sequence_of(bundled(), calibration()[0], streams=True, max_tokens=2)
    one.sequence.begin(bundled(), (), started=0.0)
    logprob = TokenLogprob("a", -1.0, ())
    one.sequence.add(Chosen(tokenizer("a", add_special_tokens=False)["input_ids"][0], logprob))
    one.sequence.add(Chosen(tokenizer.pad_token_id, logprob))
    assert len(one.completion().logprobs) == 2 == sum(len(chunk.logprobs) for chunk in one.chunks)


def test_every_token_that_decodes_to_no_text_can_be_a_stop() -> None:
    tokenizer = build_tokenizer(CHECKPOINTS["Qwen2VLProcessor"])
    assert "<|im_start|>" not in tokenizer.all_special_tokens
    processor = type("Processor", (), {"tokenizer": tokenizer})
    ends, texts = replace(bundled(), processor=processor).end_tokens(("<|im_start|>", "\n", "<|im_end|>"))
    assert texts == ("\n",)
    assert ends[-2:] == tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
