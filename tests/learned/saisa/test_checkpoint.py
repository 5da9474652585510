"""Small random checkpoints in the published layout, read into parts or refused by the name of what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shortv.errors import Refused
from shortv.families import decoder_of
from shortv.learned.saisa.parts import read_published
from tests.models import LAYERS, random_model


def published(model: Any) -> dict[str, Tensor]:
    """A checkpoint of random weights with the names and shapes of the released class."""
    draw = torch.Generator().manual_seed(3)
    text = model.model.language_model.state_dict()
    shapes = {f"model.{name}": value.shape for name, value in text.items()} | {"lm_head.weight": (90, 32)}
    shapes["model.embed_tokens.weight"] = (90, 32)  # without the tokens that LLaVA adds
    tower, hidden = 16, 32
    for place in ["model", *(f"model.layers.{layer}" for layer in range(LAYERS))]:
        for number, width in (("0", tower), ("2", hidden)):
            shapes[f"{place}.mm_projector.{number}.weight"] = (hidden, width)
            shapes[f"{place}.mm_projector.{number}.bias"] = (hidden,)
    return {name: torch.randn(tuple(shape), generator=draw) for name, shape in shapes.items()}


def test_a_published_checkpoint_becomes_parts(tmp_path: Path) -> None:
    model = random_model()
    content = published(model)
    names = sorted(content)
    save_file({name: content[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: content[name] for name in names[1::2]}, tmp_path / "model-00002-of-00002.safetensors")
    parts = read_published(tmp_path, decoder_of(model))
    features = torch.randn(5, 16)
    for layer in range(LAYERS):
        own = f"model.layers.{layer}.mm_projector"
        inner = torch.nn.functional.gelu(features @ content[f"{own}.0.weight"].T + content[f"{own}.0.bias"])
        expected = inner @ content[f"{own}.2.weight"].T + content[f"{own}.2.bias"]
        assert torch.allclose(parts.project(layer, features), expected, atol=1e-5)
        found = parts.language_model.get_parameter(f"layers.{layer}.mlp.up_proj.weight")
        assert torch.equal(found, content[f"model.layers.{layer}.mlp.up_proj.weight"])
    for name, published_name in {"embed_tokens": "model.embed_tokens", "head": "lm_head"}.items():
        weight = parts.language_model.get_parameter(f"{name}.weight")
        own_weight = model.get_input_embeddings().weight if name == "embed_tokens" else model.lm_head.weight
        assert torch.equal(weight[:90], content[f"{published_name}.weight"])
        assert torch.equal(weight[90:], own_weight[90:])
    projectors = read_published(tmp_path, decoder_of(model), language_model="none")
    assert not list(projectors.language_model.parameters())


def test_missing_layers_and_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    model = random_model()
    file = tmp_path / "model.safetensors"

    def refused(content: dict[str, Tensor], why: str) -> None:
        save_file(content, file)
        with pytest.raises(Refused, match=why):
            read_published(file, decoder_of(model))

    whole = published(model)
    short = {name: value for name, value in whole.items() if not name.startswith("model.layers.3.mm_projector.2")}
    refused(short, r"has no model\.layers\.3\.mm_projector\.2\.weight")
    wide = {**whole, "model.layers.1.mm_projector.0.weight": torch.zeros(32, 1024)}
    refused(
        wide, r"model\.layers\.1\.mm_projector\.0\.weight of the checkpoint .* has shape \(32, 1024\), .*\(32, 16\)"
    )
    refused({**whole, "model.embed_tokens.weight": torch.zeros(97, 32)}, "embed_tokens.* has shape")
    refused({**whole, "model.norm.weight": torch.zeros(30)}, r"model\.norm\.weight .* has shape \(30,\)")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    decoder = decoder_of(random_model())
    with pytest.raises(Refused, match="has no safetensors files"):
        read_published(tmp_path, decoder)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(Refused, match="cannot be read as safetensors"):
        read_published(tmp_path, decoder)
    with pytest.raises(Refused, match="this model is Qwen2-VL"):
        read_published(tmp_path, decoder_of(random_model("qwen2-vl")))
