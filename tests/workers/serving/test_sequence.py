"""The text of a completion while its tokens come."""

from __future__ import annotations

from dataclasses import replace

from shortv.request import TokenLogprob
from shortv.workers.serving.sampling import Chosen
from shortv.workers.serving.sequence import Detokenizer
from tests.processors import CHECKPOINTS, build_tokenizer
from tests.tiny_model import bundled, calibration
from tests.workers.serving.sequences import sequence_of


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
