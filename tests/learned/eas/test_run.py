"""EAS: the fold is exact and follows the weights; only the prompt gives information."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shortv.errors import Refused
from shortv.evals.generation import likelihoods
from shortv.families import decoder_of
from shortv.families.preprocessing import batch_of as batch_of_prompts
from shortv.families.preprocessing import message_of, prompt_of
from shortv.families.supervised import continuation_ids
from shortv.layers.apply import executing
from shortv.layers.reference import reference
from shortv.learned.eas.parts import Adapters
from shortv.learned.eas.recipe import EasSettings
from shortv.learned.eas.run import fold
from shortv.plan import Mode
from tests.law import SPECS, assert_law, text_logits
from tests.learned.cases import adapters, skipping
from tests.models import LAYERS, batch_of, random_model
from tests.parts import Trained, running, shuffled
from tests.tiny_model import bundled, calibration

SKIPPED = (1, 2)
MODES = skipping(SKIPPED)


def test_the_fold_equals_the_unfolded_ffn_input_and_the_released_one_does_not() -> None:
    model = random_model("llava-qwen2")
    decoder, learned = decoder_of(model), adapters(model)
    layer, pia = decoder.layers[1], learned.parts.skipped["1"]
    normed_BTD = torch.randn(3, 5, 32)
    summary = pia.summary(normed_BTD.mean(1))
    folded, bottleneck = fold(decoder, layer, pia), pia.bottleneck(normed_BTD, *summary)
    g = layer.post_attention_layernorm.weight.copy_(torch.rand(32) + 0.5)
    folded = fold(decoder, layer, pia)
    for linear, fold_MC in ((layer.mlp.gate_proj, folded.gate_MC), (layer.mlp.up_proj, folded.up_MC)):
        expected = linear(g * pia(normed_BTD, *summary))
        first, second = summary[0][:, None].chunk(2, dim=-1)
        mixed = torch.cat([first * bottleneck, second * bottleneck, summary[0][:, None].expand(-1, 5, -1)], dim=-1)
        assert_law(linear(g * normed_BTD) + mixed @ fold_MC.T, expected)
    # The released code, in dense form: its bias passes the weight that has the adapter in it already.
    up = summary[0][0, 0] * pia.first.dense_DR + summary[0][0, 1] * pia.second.dense_DR
    bias = up @ (summary[1][0] + pia.down.bias) / 2
    bias = bias + summary[0][0, 0] * pia.first.bias + summary[0][0, 1] * pia.second.bias
    weight = layer.mlp.gate_proj.weight * g
    whole = weight @ (torch.eye(32) + up @ pia.down.weight / 2)
    expected = layer.mlp.gate_proj(g * pia(normed_BTD, *summary))[0]
    assert_law(normed_BTD[0] @ whole.T + weight @ bias, expected)
    assert not torch.allclose(normed_BTD[0] @ whole.T + whole @ bias, expected, atol=1e-2)


def test_a_fold_is_made_once_and_again_when_weights_change() -> None:
    model = random_model()
    learned, batch = adapters(model), batch_of("llava", SPECS)

    def run(executor: Any) -> Any:
        with running(executor, model, MODES, learned):
            return text_logits(model, batch)

    found = run(executing)
    made = {layer: kept[1].gate_MC for layer, kept in learned.parts.derived.items()}
    run(executing)
    assert all(learned.parts.derived[layer][1].gate_MC is value for layer, value in made.items())
    assert set(made) == set(SKIPPED)
    layer = decoder_of(model).layers[SKIPPED[0]]
    for change in ("adapters", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"):
        if change == "adapters":
            shuffled(learned.parts, seed=1)
        else:
            layer.get_parameter(f"{change}.weight").mul_(1.5)
        before, found = found, run(executing)
        assert_law(found, run(reference))
        assert not torch.allclose(before, found, atol=1e-2)


def test_likelihoods_of_answers_are_those_of_decoding_them_with_a_cache() -> None:
    model = bundled()
    settings = EasSettings(kept=(0, 1, 2, 4, 5, 7), skipped=(3, 6), kept_rank=4, pia_rank=8)
    learned = Trained(parts=shuffled(Adapters.build(model.decoder, settings), size=0.05))
    sample = calibration()[0]
    prompt = prompt_of(model, [message_of(sample)])
    answers = ["red", "red circle blue square"]
    named = [replace(prompt, continuation=f" {answer}") for answer in answers]
    with running(executing, model.model, settings.modes(8), learned), torch.inference_mode():
        found = likelihoods(model, named)
        for answer, likelihood in zip(named, found, strict=True):
            inputs = batch_of_prompts(model, [prompt]).on(model).inputs
            output, total = model.model(**inputs, use_cache=True), 0.0
            for token in continuation_ids(model, prompt.text, answer.continuation):
                total += float(output.logits[0, -1].log_softmax(-1)[token])
                output = model.model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values)
            assert likelihood.log_probability == pytest.approx(total, abs=1e-3)


def test_modes_that_disagree_with_the_adapters_are_refused() -> None:
    model = random_model()
    learned = adapters(model)
    cases = {
        "layer 0 is freeze-visual": (Mode.FREEZE_VISUAL,) * LAYERS,
        "layer 0 is skip-attention": (Mode.SKIP_ATTENTION,) * LAYERS,
        "layer 1 is full": (Mode.FULL,) * LAYERS,
    }
    for message, modes in cases.items():
        with pytest.raises(Refused, match=message), running(executing, model, modes, learned):
            pass
    gemma = random_model("gemma3")
    with pytest.raises(Refused, match="Gemma 3"), running(executing, gemma, MODES, learned):
        pass
