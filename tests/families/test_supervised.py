"""Labels stand on the answer and the end of its turn alone, and score as the evaluation's likelihoods do."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from shortv.errors import SampleError
from shortv.evals.generation import likelihoods
from shortv.families.preprocessing import message_of, prompt_of
from shortv.families.supervised import IGNORED, answer_frame, continuation_ids, supervised
from tests.processors import CHECKPOINTS, loaded_checkpoint
from tests.tiny_model import bundled, calibration


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_answer_and_the_end_of_the_turn(side: Literal["left", "right"]) -> None:
    samples = calibration()[:6]
    found = supervised(bundled(), samples, padding_side=side)
    ids_BT, mask_BT = found.batch.inputs["input_ids"], found.batch.inputs["attention_mask"]
    tokenizer = bundled().processor.tokenizer
    for sample, ids_T, mask_T, labels_T in zip(samples, ids_BT, mask_BT, found.labels_BT, strict=True):
        learned_T = labels_T != IGNORED
        assert torch.equal(labels_T[learned_T], ids_T[learned_T])
        assert tokenizer.decode(labels_T[learned_T]) == f" {sample.answer}</s>"
        # Nothing of the prompt or of the padding, and nothing after the end of the turn.
        assert learned_T[mask_T.bool()].tolist() == sorted(learned_T[mask_T.bool()].tolist())
        assert not (learned_T & ~mask_T.bool()).any()


def test_losses_are_the_likelihoods_of_the_same_continuations() -> None:
    loaded, samples = bundled(), calibration()[:5]
    found = supervised(loaded, samples)
    with torch.inference_mode():
        logits_BTV = loaded.model(**found.batch.inputs, use_cache=False).logits
    logs_BTV = logits_BTV[:, :-1].float().log_softmax(-1)
    labels_BT = found.labels_BT[:, 1:]
    chosen_BT = logs_BTV.gather(2, labels_BT.clamp(min=0)[..., None])[..., 0] * (labels_BT != IGNORED)
    before, after = answer_frame(loaded)
    prompts = [
        prompt_of(loaded, [message_of(sample)], continuation=f"{before}{sample.answer}{after}") for sample in samples
    ]
    for sum_, wanted in zip(chosen_BT.sum(1).tolist(), likelihoods(loaded, prompts), strict=True):
        assert sum_ == pytest.approx(wanted.log_probability, abs=1e-4)


def test_a_merged_token_counts_as_part_of_the_continuation() -> None:
    text = "USER: where is it? At the top"
    ids = continuation_ids(bundled(), text, " left")
    assert bundled().processor.tokenizer.decode(ids) == " top left"
    assert continuation_ids(bundled(), text, "") == []


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"answer": None}, "no-answer"), ({"answer": " "}, "no-answer"), ({"images": (b"no image",)}, "Unidentified")],
)
def test_a_bad_sample_is_named(change: dict[str, object], kind: str) -> None:
    bad = replace(calibration()[1], **change)  # type: ignore[arg-type]
    with pytest.raises(SampleError, match=bad.sample_id) as error:
        supervised(bundled(), [calibration()[0], bad])
    assert error.value.error.startswith(kind)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_familys_template_frames_an_answer(name: str) -> None:
    loaded = loaded_checkpoint(name)
    samples = [replace(calibration()[0], answer="red circles"), replace(calibration()[1], answer="one")]
    found = supervised(loaded, samples)
    for sample, ids_T, labels_T in zip(samples, found.batch.inputs["input_ids"], found.labels_BT, strict=True):
        learned_T = labels_T != IGNORED
        text = loaded.processor.tokenizer.decode(ids_T[learned_T])
        assert sample.answer is not None and text.strip().startswith(sample.answer)
        assert learned_T[1:].sum() == learned_T.sum() and text.strip() != sample.answer


@pytest.mark.parametrize(
    ("before", "after"),
    [(" The answer: ", " </s>"), ("\nanswer answer\n", ". That was the answer.<|end|>\n"), (" ", "")],
)
def test_words_of_the_template_are_not_taken_for_the_answer(before: str, after: str) -> None:
    template = (
        "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}"
        "{{ 'USER: ' + p['text'] if m['role'] == 'user' else 'ASSISTANT:' + before + p['text'] + after }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    template = f"{{% set before = {before!r} %}}{{% set after = {after!r} %}}{template}"
    loaded = replace(bundled(), chat_template=template)
    ends = after.rstrip() or "</s>"  # a template without an end gets the tokenizer's
    assert answer_frame(loaded) == (before, ends)
    for answer in ("red", "the answer is red", "a"):
        sample = replace(calibration()[0], images=(), prompt="which answer?", answer=answer)
        labels_T = supervised(loaded, [sample]).labels_BT[0]
        text = loaded.processor.tokenizer.decode(labels_T[labels_T != IGNORED])
        assert text.strip() == f"{before}{answer}{ends}".strip()
