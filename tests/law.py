"""The law, for the tests of every mode and every learned system: the fast executor equals the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from shortv.families import Batch
from shortv.layers.apply import executing
from shortv.layers.reference import reference
from shortv.plan import Mode
from tests.models import IMAGE_TOKEN, VISION_START, Spec

SPECS: list[Spec] = [[3, "I", 2], ["I", 5, "I", 1], [6], [1, "I", 9]]
"""Prompts of one batch: image first and last but one, several images, none."""


def assert_law(found: Tensor, expected: Tensor) -> None:
    """Fail unless two results differ by rounding alone."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_fast_is_reference(model: Any, modes: Sequence[Mode], run: Callable[[], Tensor]) -> None:
    """Fail unless `run` gives the same under both executors."""
    with reference(model, modes):
        expected = run()
    with executing(model, modes):
        assert_law(run(), expected)


@torch.inference_mode()
def text_logits(model: Any, batch: Batch, **options: Any) -> Tensor:
    """Logits (N, V) of the text rows: what stands in visual rows is read by nobody."""
    logits: Tensor = model(**batch.inputs, **options).logits
    return logits[batch.types.text_BT]


@torch.inference_mode()
def generated(model: Any, batch: Batch, **options: Any) -> list[list[int]]:
    """Four tokens for each prompt, none of them a placeholder."""
    torch.manual_seed(0)
    fixed: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    fixed["suppress_tokens"] = [IMAGE_TOKEN, IMAGE_TOKEN + 1, VISION_START]
    tokens: list[list[int]] = model.generate(**batch.inputs, **{**fixed, **options}).tolist()
    return tokens


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch for a model of that dtype."""
    inputs = {name: value.to(dtype if value.is_floating_point() else None) for name, value in batch.inputs.items()}
    return Batch(inputs=inputs, types=batch.types)


def apart(spec: Spec) -> Spec:
    """Text between images, as every template of these families has it, and at the end."""
    separated: Spec = []
    for part in spec:
        separated += [1, part] if separated and separated[-1] == part == "I" else [part]
    return [*separated, 2]


some_specs = st.lists(
    st.lists(st.one_of(st.integers(1, 6), st.just("I")), min_size=1, max_size=4).map(apart), min_size=1, max_size=4
)
"""Prompts of one batch, drawn by hypothesis."""
