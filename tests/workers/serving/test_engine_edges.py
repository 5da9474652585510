"""What the engine does at the edges: long answers, ends and retries, numbers that are none, stops that are odd."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from shortv.layers.sequence import keep_rows
from shortv.request import Failure, Reason
from shortv.workers.serving.batch import RunningBatch
from shortv.workers.serving.engine import Engine, EngineSettings
from shortv.workers.serving.row import Row
from shortv.workers.serving.transcript import Transcript
from tests.processors import CHECKPOINTS, build_tokenizer
from tests.tiny_model import bundled, calibration
from tests.workers.serving.asking import Told, row_of, submit
from tests.workers.serving.test_engine import generated, never_ending, running


def refused(told: Told) -> Failure:
    """The failure that ended it."""
    found = told.last(timeout=10)
    assert isinstance(found, Failure), found
    return found


def test_a_row_that_comes_after_the_end_is_sent_elsewhere() -> None:
    with running() as engine:
        pass
    assert refused(submit(engine, row_of(bundled(), calibration()[0]))[0]).reason is Reason.LOST


@pytest.mark.parametrize(("long", "short"), [((1, 1), 1), ((7,), 2)])
def test_places_that_stay_free_are_given_to_those_who_wait(long: tuple[int, ...], short: int) -> None:
    """Many small batches run, or one that leaves a single place; none of their answers ends soon."""
    settings = EngineSettings(batch_size=8, max_batches=2 if len(long) == 2 else 4, patience_s=0.2)
    with running(settings) as engine:
        slow: list[Told] = []
        for count in long:
            slow += submit(engine, *(never_ending() for _ in range(count)))
            slow[-1].events.get(timeout=30)
        for told in submit(engine, *(row_of(bundled(), calibration()[1], max_tokens=4) for _ in range(short))):
            assert told.answer().text
        assert not any(told.row.done for told in slow)
        for told in slow:
            told.row.cancelled = True


def test_a_replica_takes_what_runs_and_what_may_wait() -> None:
    """All come before any has a place."""
    engine = Engine(bundled(), EngineSettings(batch_size=3, max_queued=1))
    *taken, surplus = submit(engine, *(row_of(bundled(), calibration()[0], max_tokens=2) for _ in range(5)))
    engine.start()
    try:
        assert [told.answer().completion_tokens for told in taken] == [2] * 4
        assert refused(surplus).reason is Reason.OVERLOADED
    finally:
        engine.stop()


def test_rows_that_nobody_waits_for_take_no_place() -> None:
    engine = Engine(bundled(), EngineSettings(batch_size=1, max_queued=1))
    engine._waiting = [row_of(bundled(), calibration()[0]).row for _ in range(2)]
    assert engine.load == (0, 2)
    engine._waiting[0].cancelled = True
    assert engine.load == (0, 1)


def test_an_answer_ends_where_the_context_does() -> None:
    long = row_of(bundled(), replace(calibration()[0], prompt="circle " * 900), min_tokens=49152, max_tokens=49152)
    with running() as engine:
        answer = submit(engine, long)[0].answer()
    assert answer.finish_reason == "length" and answer.prompt_tokens + answer.completion_tokens == bundled().context


def test_an_idle_engine_holds_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[weakref.ref[RunningBatch]] = []
    own = RunningBatch.__init__

    def init(self: RunningBatch, *arguments: Any) -> None:
        batches.append(weakref.ref(self))
        own(self, *arguments)

    monkeypatch.setattr(RunningBatch, "__init__", init)
    with running() as engine:
        assert submit(engine, row_of(bundled(), calibration()[0]))[0].answer().text
        time.sleep(0.2)
        gc.collect()
        assert [batch() for batch in batches] == [None]


def broken(monkeypatch: pytest.MonkeyPatch, *, after: int, row: int, value: float) -> None:
    """Let a row's logits hold a value that is no number, in one forward."""
    own, calls = bundled().model.forward, 0

    def forward(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        output = own(*arguments, **named)
        calls += 1
        if calls == after + 1:
            output.logits[row, :, 5] = value
        return output

    monkeypatch.setattr(bundled().model, "forward", forward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("after", [0, 2])
def test_logits_that_are_no_numbers_are_no_answer(monkeypatch: pytest.MonkeyPatch, value: float, after: int) -> None:
    asked = [row_of(bundled(), one, min_tokens=6, max_tokens=6) for one in calibration()[:3]]
    wanted = [generated(told, min_new_tokens=6).text for told in asked]
    broken(monkeypatch, after=after, row=1, value=value)
    with running() as engine:
        submit(engine, *asked)
        failure = refused(asked[1])
        assert failure.reason is Reason.INTERNAL and "not finite" in failure.message
        assert [asked[at].answer().text for at in (0, 2)] == [wanted[0], wanted[2]]


def test_a_likelihood_that_is_no_number_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, after=0, row=0, value=float("nan"))
    with running() as engine:
        told = submit(engine, row_of(bundled(), calibration()[0], continuation="red"))[0]
        assert refused(told).reason is Reason.INTERNAL


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    asked = [row_of(bundled(), calibration()[0], temperature=value, max_tokens=6) for value in (0.0, 1e-30, 5e-324)]
    with running() as engine:
        assert len({told.answer().text for told in submit(engine, *asked)}) == 1


def test_a_streamed_sample_goes_on_as_it_began_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    own, failures = RunningBatch.step, 0

    def step(self: RunningBatch) -> None:
        nonlocal failures
        if len(self.rows) > 1 and all(row.told for row in self.rows):
            failures += 1
            raise RuntimeError("once")
        own(self)

    monkeypatch.setattr(RunningBatch, "step", step)
    asked = [row_of(bundled(), one, temperature=30.0, max_tokens=20, streams=True) for one in calibration()[:2]]
    with running() as engine:
        for told in submit(engine, *asked):
            assert told.answer().text == "".join(piece.text for piece in told.pieces) != ""
    assert failures == 1


def test_pieces_carry_every_log_probability() -> None:
    """Also those of tokens that a stop cuts away or that are no text."""
    tokenizer = bundled().processor.tokenizer
    with running() as engine:
        text = submit(engine, row_of(bundled(), calibration()[7]))[0].answer().text
        told = submit(engine, row_of(bundled(), calibration()[7], streams=True, stop=(text[1:],), top_logprobs=0))[0]
        answer = told.answer()
    assert [one for piece in told.pieces for one in piece.logprobs] == list(answer.logprobs) != []
    transcript = Transcript(tokenizer, stops=(), ends=(), limit=2)
    events: list[Any] = []
    row = replace(told.row, tell=events.append, told=0, told_logprobs=0, done=False, cancelled=False, logprobs=[])
    row.transcript, row.n_text = transcript, 1
    add_silent(row, tokenizer, answer.logprobs[0])
    assert sum(len(piece.logprobs) for piece in events[:-1]) == len(events[-1].logprobs) == 2


def add_silent(row: Row, tokenizer: Any, logprob: Any) -> None:
    """Two tokens, of which the last is not shown."""
    from shortv.workers.serving.sampling import Chosen

    row.add(Chosen(tokenizer("a", add_special_tokens=False)["input_ids"][0], logprob))
    row.add(Chosen(tokenizer.pad_token_id, logprob))


def test_a_stop_whose_characters_are_several_tokens_is_never_shown() -> None:
    tokenizer = build_tokenizer(CHECKPOINTS["Qwen2VLProcessor"])
    transcript = Transcript(tokenizer, stops=("b漢",), ends=(), limit=100)
    shown = ""
    for token in tokenizer("see b漢 x")["input_ids"]:
        if transcript.finish is None:
            transcript.add(token)
            shown = max(shown, transcript.sure(), key=len)
    assert (shown, transcript.text, transcript.finish) == ("see ", "see ", "stop")


def test_every_token_that_texts_leave_out_can_be_a_stop() -> None:
    tokenizer = build_tokenizer(CHECKPOINTS["Qwen2VLProcessor"])
    assert "<|im_start|>" not in tokenizer.all_special_tokens
    processor = type("Processor", (), {"tokenizer": tokenizer})
    ends, texts = replace(bundled(), processor=processor).end_tokens(("<|im_start|>", "\n", "<|im_end|>"))
    assert texts == ("\n",)
    assert ends[-2:] == tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])


def test_rows_leave_layers_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DynamicCache()
    for layer, device in enumerate(("cpu", "meta")):
        cache.update(torch.ones(3, 1, 2, 4, device=device), torch.ones(3, 1, 2, 4, device=device), layer)
    kind = type(cache.layers[0])
    own, found = kind.batch_select_indices, []

    def select(self: Any, indices: torch.Tensor) -> None:
        found.append((indices.device.type, self.keys.device.type))
        own(self, indices)

    monkeypatch.setattr(kind, "batch_select_indices", select)
    keep_rows(cache, torch.tensor([0, 2]))
    assert found == [("cpu", "cpu"), ("meta", "meta")]
    assert [len(layer.keys) for layer in cache.layers] == [2, 2]
