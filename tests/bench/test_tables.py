"""The tables of docs/cluster.md, the formulas behind them, and the sizes of the published models."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shortv.bench.models import MODELS
from shortv.bench.rows import GIB
from shortv.bench.tables import decoder_parameters, endpoint_table, kv_cache_bytes, sweep_memory, sweep_table
from shortv.costs import STACK_SHARE, activation_bytes, layer_flops, sweep_flops
from shortv.plan import Mode
from shortv.sweep.ablations import CPU_BUDGET, automatic_stack

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text()
SMALL = MODELS["llava-1.5-7b"].architecture()


def test_the_document_shows_what_is_computed() -> None:
    assert sweep_table() in DOCUMENT and endpoint_table() in DOCUMENT, "paste what jobs/bench.py tables prints"


@pytest.mark.parametrize(
    ("model", "decoder", "whole"),
    [
        ("llava-1.5-7b", 6_738_939_904, 7_063_427_072),
        ("llava-1.5-13b", 13_016_519_680, 13_351_494_656),
        ("llava-next-13b", 13_016_519_680, 13_351_499_776),
        # The decoder is counted without the biases of its projections.
        ("qwen2.5-vl-7b", 7_615_616_512 - 28 * (28 + 2 * 4) * 128, 8_292_166_656),
    ],
)
def test_models_have_the_published_sizes(model: str, decoder: int, whole: int) -> None:
    known = MODELS[model]
    assert decoder_parameters(known.architecture()) == decoder and known.parameters() == whole
    pixels = sum(value.numel() for value in known.pixels(1, known.visual_tokens).values() if value.is_floating_point())
    per_token = 8 if known.kind == "qwen2_5_vl" else 1
    assert pixels / (3 * 14 * 14) == pytest.approx(per_token * known.visual_tokens)


def test_flops_of_a_sweep() -> None:
    full = layer_flops(SMALL, Mode.FULL, 64, 576)
    assert sweep_flops(SMALL, [Mode.FREEZE_VISUAL], 64, 576) == (32 + 496) * full
    assert sweep_flops(SMALL, [Mode.FREEZE_VISUAL, Mode.FREEZE_TEXT], 64, 576) == 32 * 32 * full
    text = layer_flops(SMALL, Mode.FULL, 64, 0)
    assert sweep_flops(SMALL, [Mode.DROP_VISUAL], 64, 576) == 32 * full + (496 + 32) * text
    ffn = 6 * 640 * 4096 * 11008
    assert sweep_flops(SMALL, [Mode.SKIP_ATTENTION], 64, 576) == (32 + 496) * full + 32 * ffn


def memory(card: int, **changes: Any) -> Any:
    asked = {"tokens": 640, "batch": 8, "itemsize": 2, "ablations": 64, "device_bytes": card * GIB}
    return sweep_memory(SMALL, **(asked | changes))


def test_memory_of_a_sweep_and_of_a_cache() -> None:
    found = memory(80)
    assert found.total == found.weights + found.states + found.stacked + found.logits
    assert found.states == 33 * 8 * 640 * 4096 * 2
    assert found.stacked == found.stack * (activation_bytes(SMALL, 8 * 640, 2) + 8 * 640 * 640)
    assert 1 < memory(24).stack < found.stack < 64
    assert memory(10_000).stack == 64 and memory(1, batch=64).stack == 1
    assert memory(80, other_parameters=10).weights == found.weights + 20
    assert kv_cache_bytes(SMALL, 1, 2) == 2 * 32 * 4096 * 2
    assert kv_cache_bytes(MODELS["qwen2.5-vl-7b"].architecture(), 10, 2) == 10 * 2 * 28 * 4 * 128 * 2


def test_the_stack_is_the_one_that_the_engine_chooses() -> None:
    model = SimpleNamespace(dtype=torch.bfloat16, config=SimpleNamespace(_attn_implementation="sdpa"))
    loaded: Any = SimpleNamespace(architecture=SMALL, model=model, device=torch.device("cpu"))
    for batch, length in [(1, 100), (1, 40), (2, 10)]:
        asked = memory(1, batch=batch, tokens=length, device_bytes=round(CPU_BUDGET / STACK_SHARE), ablations=10**6)
        assert automatic_stack(loaded, batch, length) == asked.stack
