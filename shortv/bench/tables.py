"""GPU memory and time that a sweep or a replica needs, as the tables of docs/cluster.md.

All figures are computed from the models' sizes by `shortv.costs`; none is measured.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from shortv.bench.models import MODELS, PublishedModel
from shortv.costs import (
    SweepMemory,
    activation_bytes,
    decoder_parameters,
    kv_cache_bytes,
    plan_flops,
    sweep_flops,
    sweep_memory,
)
from shortv.plan import Mode

TEXT_TOKENS: Final = 64
"""Of a calibration prompt, as the paper counts."""
SWEEP_BATCH: Final = 8
ENDPOINT_BATCH: Final = 16
ANSWER_TOKENS: Final = 256
TABLE_MODELS: Final = ("llava-1.5-7b", "llava-1.5-13b", "llava-next-13b", "qwen2.5-vl-7b")
MODES: Final = (Mode.FREEZE_VISUAL, Mode.FREEZE_TEXT)
ITEMSIZE: Final = 2
"""Bytes of a bfloat16."""
FLOPS_PER_SECOND: Final = 150e12
"""What one GPU is assumed to reach: about half of the 312e12 that an A100 has on paper in bfloat16."""
GIB: Final = 2**30
CARDS: Final = (24, 48, 80, 141)
"""GiB of the GPUs that the tables choose from."""
USABLE: Final = 0.9
"""Share of a card that may be filled; CUDA, a vision tower at work and fragmentation take the rest."""
SAMPLES: Final = (40, 1_000, 10_000)


def sweep_table() -> str:
    """GPU memory and time of a sweep per model and number of samples, as Markdown."""
    samples = [f"{number:,} samples" for number in SAMPLES]
    head = ["model", "visual tokens", "weights", "kept states", "stacked", "ablations", "in all", "GPU", "PFLOP/sample"]
    return _markdown([*head, *samples], (_sweep_row(name, MODELS[name]) for name in TABLE_MODELS))


def endpoint_table() -> str:
    """GPU memory and prefill time of one replica per model, as Markdown."""
    head = ["model", "weights", f"KV of {ENDPOINT_BATCH} requests", "activations", "in all", "GPU", "prefill"]
    return _markdown(head, (_endpoint_row(name, MODELS[name]) for name in TABLE_MODELS))


def _sweep_row(name: str, sized: PublishedModel) -> list[str]:
    arch = sized.architecture()
    other = sized.parameters() - decoder_parameters(arch)

    def memory_on(card: int) -> SweepMemory:
        return sweep_memory(
            arch,
            tokens=TEXT_TOKENS + sized.visual_tokens,
            batch=SWEEP_BATCH,
            itemsize=ITEMSIZE,
            ablations=len(MODES) * arch.num_layers,
            device_bytes=card * GIB,
            other_parameters=other,
        )

    # A larger card stacks more ablations, so the memory needed depends on the card.
    card, memory = next((card, memory) for card in CARDS if _fits((memory := memory_on(card)).total, card))
    flops = sweep_flops(arch, MODES, TEXT_TOKENS, sized.visual_tokens)
    return [
        name,
        f"{sized.visual_tokens:,}",
        *map(_gib, [memory.weights, memory.states, memory.stacked]),
        str(memory.stack),
        _gib(memory.total),
        f"{card} GiB",
        f"{flops / 1e15:.2f}",
        *(_duration(number * flops / FLOPS_PER_SECOND) for number in SAMPLES),
    ]


def _endpoint_row(name: str, sized: PublishedModel) -> list[str]:
    arch = sized.architecture()
    weights = sized.parameters() * ITEMSIZE
    cache = ENDPOINT_BATCH * kv_cache_bytes(arch, TEXT_TOKENS + sized.visual_tokens + ANSWER_TOKENS, ITEMSIZE)
    activations = activation_bytes(arch, ENDPOINT_BATCH * (TEXT_TOKENS + sized.visual_tokens), ITEMSIZE)
    total = weights + cache + activations
    card = next(size for size in CARDS if _fits(total, size))
    seconds = plan_flops(arch, [Mode.FULL] * arch.num_layers, TEXT_TOKENS, sized.visual_tokens) / FLOPS_PER_SECOND
    return [name, _gib(weights), _gib(cache), _gib(activations), _gib(total), f"{card} GiB", f"{seconds * 1e3:.0f} ms"]


def _fits(count: int, card: int) -> bool:
    return count <= USABLE * card * GIB


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
