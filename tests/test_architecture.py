"""Reading a decoder's sizes, and what its digest depends on."""

import dataclasses
from typing import Any

import pytest

from shortv.architecture import DIGEST_FIELDS, Architecture
from shortv.errors import Refused
from tests.architectures import architecture

TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
CONFIG: dict[str, Any] = {"model_type": "llava", "text_config": TEXT, "vision_config": {"hidden_size": 1024}}


def test_sizes_of_nested_and_flat_configurations_and_their_defaults() -> None:
    arch = Architecture.from_config_dict(CONFIG)
    assert (arch.model_type, arch.text_model_type) == ("llava", "qwen2")
    assert (arch.num_layers, arch.hidden_size, arch.intermediate_size) == (28, 3584, 18944)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.vocab_size) == (28, 4, 128, 152064)
    flat = Architecture.from_config_dict(TEXT | {"num_key_value_heads": None, "head_dim": None})
    assert flat == dataclasses.replace(arch, model_type="qwen2", num_kv_heads=28)
    assert Architecture.from_config_dict(TEXT | {"head_dim": 256}).head_dim == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "no value for num_hidden_layers"),
        ({"hidden_size": "wide"}, "'wide' for hidden_size"),
        ({"intermediate_size": 0}, "0 for intermediate_size"),
        ({"vocab_size": True}, "True for vocab_size"),
        ({"model_type": ""}, "'' for model_type"),
        ({"num_key_value_heads": 5}, "28 attention heads cannot share 5"),
        ({"num_attention_heads": 36, "hidden_size": 3580}, "36 heads do not divide"),
        ({"num_experts": 64}, "mixture of experts"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        Architecture.from_config_dict({"model_type": "llava", "text_config": TEXT | change})


def test_digest_covers_every_size_but_the_vocabulary() -> None:
    arch = Architecture.from_config_dict(CONFIG)
    for field in dataclasses.fields(arch):
        value = getattr(arch, field.name)
        changes: dict[str, Any] = {field.name: value + 1 if isinstance(value, int) else value + "x"}
        same = dataclasses.replace(arch, **changes).config_digest == arch.config_digest
        assert same == (field.name == "vocab_size"), field.name
    assert {field.name for field in dataclasses.fields(arch)} == {*DIGEST_FIELDS, "vocab_size"}


def test_digest_is_what_saved_plans_hold() -> None:
    """A change of this value orphans every plan file there is."""
    sizes = {"num_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_heads": 32, "num_kv_heads": 32}
    arch = architecture(**sizes, head_dim=128, vocab_size=32000)
    assert arch.config_digest == "9ca2f95596291b4a62889a8af1161b748d27cc30110b3668784166973a07a0fa"
