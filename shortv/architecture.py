"""The sizes of a decoder that decide its costs and which plans fit it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from shortv.errors import Refused

# The identity of an architecture. The vocabulary is left out on purpose: checkpoints of one model
# pad it differently, and no plan depends on it. Changing this list orphans every plan ever saved.
DIGEST_FIELDS = (
    *("model_type", "text_model_type", "num_layers", "hidden_size"),
    *("intermediate_size", "num_heads", "num_kv_heads", "head_dim"),
)
_WHOLE = "pass the whole configuration of a decoder model, its defaults included"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A multimodal LLM's decoder, in numbers; every layer has these sizes.

    `model_type` names the whole model ("llava"), `text_model_type` its decoder ("llama").
    Queries are `num_heads * head_dim` wide, keys and values `num_kv_heads * head_dim`.
    """

    model_type: str
    text_model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def config_digest(self) -> str:
        """SHA-256, in hex, of the fields in DIGEST_FIELDS: decides whether a plan fits."""
        fields = {name: getattr(self, name) for name in DIGEST_FIELDS}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @classmethod
    def from_config_dict(cls, config: Mapping[str, object]) -> "Architecture":
        """Read the sizes from a Hugging Face configuration that has its defaults filled in.

        The decoder's part may be nested (`text_config`) or flat. Without `num_key_value_heads` every
        head has its own keys; without `head_dim` the heads share the width evenly. Raises Refused
        when a size is missing or impossible, and for mixtures of experts, which have no single FFN size.
        """
        nested = [config[key] for key in ("text_config", "llm_config", "language_config") if key in config]
        text = next((found for found in nested if isinstance(found, Mapping)), config)
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            experts = text.get(key)
            if isinstance(experts, int) and experts > 1:
                raise Refused(
                    f"the decoder is a mixture of experts ({key} = {experts}), whose FLOPs per token are "
                    "not defined here; choose a model with one FFN per layer"
                )
        hidden_size = _size(text, "hidden_size")
        num_heads = _size(text, "num_attention_heads")
        num_kv_heads = _size(text, "num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise Refused(
                f"{num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly; "
                "check the model's config.json"
            )
        if text.get("head_dim") is None and hidden_size % num_heads:
            raise Refused(
                f"the configuration has no head_dim, and {num_heads} heads do not divide hidden_size "
                f"{hidden_size}; check the model's config.json"
            )
        text_model_type = text.get("model_type")
        model_type = config.get("model_type") or text_model_type
        for name in (model_type, text_model_type):
            if not isinstance(name, str) or not name:
                raise Refused(f"the configuration has {name!r} for model_type, where a name is needed; {_WHOLE}")
        return cls(
            model_type=str(model_type),
            text_model_type=str(text_model_type),
            num_layers=_size(text, "num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=_size(text, "intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_size(text, "head_dim", default=hidden_size // num_heads),
            vocab_size=_size(text, "vocab_size"),
        )


def _size(text: Mapping[str, object], key: str, default: int | None = None) -> int:
    found = text.get(key)
    if found is None and default is not None:
        return default
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        was = "no value" if found is None else repr(found)
        raise Refused(f"the configuration has {was} for {key}, where a positive whole number is needed; {_WHOLE}")
    return found
