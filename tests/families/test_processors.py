"""Samples through each family's own processor and model: what is visual, what padding changes, what layers are for."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from shortv.families import FAMILIES, Batch, LoadedModel, encode
from shortv.plan import Mode
from shortv.sample import Sample
from shortv.sweep import engine
from tests.models import LAYERS
from tests.processors import CHECKPOINTS, loaded_checkpoint


def picture(width: int, height: int) -> bytes:
    """A PNG of noise, as no two patches of a picture should be alike."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(width))
    file = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


TEXT = Sample(sample_id="text", prompt="What is a circle?")
WIDE = Sample(sample_id="wide", images=(picture(60, 28),), prompt="How many?")
TALL = Sample(sample_id="tall", images=(picture(24, 52),), prompt="Describe what you see in this picture. " * 2)
PAIR = Sample(sample_id="pair", images=(picture(40, 40), picture(50, 22)), prompt="Is <image> like <image> there?")
# A sample without an image comes first: processors look at the first entry to tell how the images are nested.
BATCHES = {
    "two-images": (PAIR,),
    "two-images-and-one": (TALL, PAIR),
    "text-first": (TEXT, WIDE, PAIR, TALL),
    "text-only": (TEXT, replace(TEXT, prompt="How many sides has a square?")),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """A checkpoint of each family with its own processor."""
    return loaded_checkpoint(request.param)


def encoded(loaded: LoadedModel, *samples: Sample) -> Batch:
    result = encode(loaded, samples)
    assert result.errors == () and result.samples == samples and result.batch is not None
    return result.batch


def conversation(sample: Sample) -> list[dict[str, Any]]:
    """A sample as a user of transformers would write it."""
    images = [{"type": "image", "image": Image.open(io.BytesIO(content))} for content in sample.images]
    first, *rest = ({"type": "text", "text": text} for text in sample.prompt.split("<image>"))
    if not rest:
        return [{"role": "user", "content": [*images, first]}]
    placed = [part for pair in zip(images, rest, strict=True) for part in pair]
    return [{"role": "user", "content": [first, *placed]}]


def logits(loaded: LoadedModel, batch: Batch) -> Tensor:
    with torch.inference_mode():
        logits_BTV = loaded.model(**batch.inputs, use_cache=False).logits
    return logits_BTV[torch.arange(len(logits_BTV)), batch.types.last_B]


def test_every_family_has_a_checkpoint() -> None:
    found = {loaded_checkpoint(name).architecture.model_type for name in CHECKPOINTS}
    assert found | {"llava"} == set(FAMILIES)  # the bundled model is a LLaVA-1.5


@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
def test_visual_positions_are_those_that_image_features_replace(
    loaded: LoadedModel, samples: tuple[Sample, ...]
) -> None:
    batch = encoded(loaded, *samples)
    embedded: list[Tensor] = []
    hook = loaded.decoder.text.register_forward_pre_hook(
        lambda _, __, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        assert logits(loaded, batch).isfinite().all()
    finally:
        hook.remove()
    assert [bool(number) for number in batch.types.n_visual] == [bool(sample.images) for sample in samples]
    words_BTD = loaded.model.get_input_embeddings()(batch.inputs["input_ids"])
    assert torch.equal((embedded[0] != words_BTD).any(-1), batch.types.visual_BT)


@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
def test_inputs_are_those_of_the_processors_own_chat_function(loaded: LoadedModel, samples: tuple[Sample, ...]) -> None:
    expected = loaded.processor.apply_chat_template(
        [conversation(sample) for sample in samples],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    inputs = encoded(loaded, *samples).inputs
    assert inputs.keys() - {"position_ids"} == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(inputs[name], value, atol=0, rtol=0)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
def test_a_padded_batch_gives_the_logits_of_single_samples(
    loaded: LoadedModel, samples: tuple[Sample, ...], padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.processor.tokenizer, "padding_side", padding)
    batch = encoded(loaded, *samples)
    assert len(samples) == 1 or not batch.types.real_BT.all()
    for number, sample in enumerate(samples):
        alone = encoded(loaded, sample)
        assert alone.types.n_visual == batch.types.n_visual[number : number + 1]
        assert alone.types.n_text == batch.types.n_text[number : number + 1]
        torch.testing.assert_close(logits(loaded, batch)[number], logits(loaded, alone)[0], atol=1e-4, rtol=1e-4)


def test_layers_are_worth_nothing_without_an_image_and_the_last_one_always(loaded: LoadedModel) -> None:
    batch = encoded(loaded, TEXT, WIDE, PAIR, TALL)
    measured = engine.measure(loaded, batch, layers=range(LAYERS), modes=[Mode.FREEZE_VISUAL])
    assert measured.finite_B.all()
    lc = [measured.values[engine.Ablation(layer, Mode.FREEZE_VISUAL)][0] for layer in range(LAYERS)]
    assert [values[0] for values in lc] == [0] * LAYERS
    assert lc[-1].tolist() == [0] * 4
    assert (torch.stack(lc[:-1])[:, 1:] > 1e-6).all()
    alone = [encoded(loaded, sample) for sample in (TEXT, WIDE, PAIR, TALL)]
    assert engine.noise_floor(loaded, alone, batch) < 1e-9
