"""A model loads whole or is refused in one line that says what was found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from shortv.errors import Refused, ShortVError
from shortv.families import decoder_of, load, load_architecture
from tests.models import random_model
from tests.tiny_model import TINY, bundled


def copy_of_tiny(folder: Path) -> Path:
    shutil.copytree(TINY / "model", folder / "model")
    return folder / "model"


def test_bundled_model_loads_with_its_decoder() -> None:
    loaded = bundled()
    assert len(loaded.decoder.layers) == loaded.architecture.num_layers >= 8
    assert loaded.architecture.num_kv_heads < loaded.architecture.num_heads
    assert loaded.architecture == load_architecture(str(TINY / "model"))
    assert not loaded.model.training and not any(weight.requires_grad for weight in loaded.model.parameters())


@pytest.mark.parametrize(
    ("name", "found"),
    [("/no/such/folder", "/no/such/folder does not exist"), ("nobody/no-such-model", "cannot be found or read")],
)
def test_a_model_that_is_not_there_is_refused_in_one_line(name: str, found: str) -> None:
    with pytest.raises(Refused, match=found) as caught:
        load_architecture(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bert", r"supported families: LLaVA-1\.5 \(llava\), LLaVA-NeXT"),
        ("mllama", "cross-attention"),
        ("qwen3_5", "gated-delta"),
        ("gemma4", "share K and V"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path: Path, model_type: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(Refused, match=rf"'{model_type}' .*{reason}"):
        load_architecture(str(tmp_path))


def test_an_unsupported_backbone_is_refused() -> None:
    model = random_model()
    model.config.get_text_config().model_type = "mamba"
    with pytest.raises(Refused, match=r"'mamba'.*supported backbones: llama, mistral"):
        decoder_of(model)


def test_a_model_without_chat_template_is_refused_unless_one_is_given(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(Refused, match="no chat template; give one with --chat-template"):
        load(str(folder))
    assert load(str(folder), chat_template="{{ messages }}").chat_template == "{{ messages }}"


def test_incomplete_and_corrupt_weights(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    save_file(
        {key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ShortVError, match="lack 1 tensors"):
        load(str(folder))
    whole = (TINY / "model" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ShortVError, match="cannot be loaded") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_attention_without_mask_rows_is_refused() -> None:
    with pytest.raises(Refused, match="use one of sdpa, eager"):
        load(str(TINY / "model"), attn_implementation="flash_attention_2")
