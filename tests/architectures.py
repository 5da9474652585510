"""A small architecture for tests that only count with it."""

from typing import Any

from shortv.architecture import Architecture


def architecture(**sizes: Any) -> Architecture:
    """Five Llama layers under LLaVA, with other sizes where they are given."""
    small = {"num_layers": 5, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 4}
    names = {"model_type": "llava", "text_model_type": "llama"}
    return Architecture(**{**names, **small, "head_dim": 16, "vocab_size": 100, **sizes})
