"""GPU memory and time that a sweep or a replica needs: the formulas, and the tables of docs/cluster.md.

All figures are computed from the models' sizes; none is measured.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from shortv.architecture import Architecture
from shortv.bench.models import MODELS, PublishedModel
from shortv.bench.rows import GIB, markdown
from shortv.costs import STACK_SHARE, activation_bytes, plan_flops, sweep_flops
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
CARDS: Final = (24, 48, 80, 141)
"""GiB of the GPUs that the tables choose from."""
USABLE: Final = 0.9
"""Share of a card that may be filled; CUDA, a vision tower at work and fragmentation take the rest."""
SAMPLES: Final = (40, 1_000, 10_000)


def decoder_parameters(arch: Architecture) -> int:
    """Return the weights of the decoder with its embeddings and its LM head, untied; biases are left out."""
    query_width = arch.num_heads * arch.head_dim
    key_width = arch.num_kv_heads * arch.head_dim
    layer = 2 * arch.hidden_size * (query_width + key_width) + 3 * arch.hidden_size * arch.intermediate_size
    norms = (2 * arch.num_layers + 1) * arch.hidden_size
    return arch.num_layers * layer + norms + 2 * arch.vocab_size * arch.hidden_size


def kv_cache_bytes(arch: Architecture, tokens: int, itemsize: int) -> int:
    """Return the bytes of the keys and values of one sequence; frozen tokens have theirs as well."""
    return 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * tokens * itemsize


class SweepMemory(NamedTuple):
    """Bytes that a sweep needs on one device, by what they are for, and how many ablations are stacked."""

    weights: int
    states: int
    """The residual stream of the clean pass before and after every layer."""
    stacked: int
    """What the stacked ablations work in: their keys and values, activations and masks."""
    logits: int
    stack: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.states + self.stacked + self.logits


def sweep_memory(
    arch: Architecture,
    *,
    tokens: int,
    batch: int,
    itemsize: int,
    ablations: int,
    device_bytes: int,
    other_parameters: int = 0,
) -> SweepMemory:
    """Return what a sweep fills on a GPU of `device_bytes`, which stacks as many of the ablations as it may.

    `tokens` are those of the longest sample of a batch, `itemsize` the bytes per weight, and `other_parameters` the
    weights beside the decoder (vision tower, projector). What CUDA itself and a vision tower at work take is left out.
    """
    each = activation_bytes(arch, batch * tokens, itemsize)
    stack = max(1, min(ablations, int(STACK_SHARE * device_bytes) // each))
    masks = stack * batch * tokens * tokens
    # Log-probabilities in float64: the full model's, one ablation's, and two tables in between.
    in_float64 = 4 * batch * arch.vocab_size * 8
    return SweepMemory(
        weights=(decoder_parameters(arch) + other_parameters) * itemsize,
        states=(arch.num_layers + 1) * batch * tokens * arch.hidden_size * itemsize,
        stacked=stack * each + masks,
        logits=stack * batch * arch.vocab_size * itemsize + in_float64,
        stack=stack,
    )


def sweep_table() -> str:
    """GPU memory and time of a sweep per model and number of samples, as Markdown."""
    samples = [f"{number:,} samples" for number in SAMPLES]
    head = ["model", "visual tokens", "weights", "kept states", "stacked", "ablations", "in all", "GPU", "PFLOP/sample"]
    return markdown([*head, *samples], (_sweep_row(name, MODELS[name]) for name in TABLE_MODELS))


def endpoint_table() -> str:
    """GPU memory and prefill time of one replica per model, as Markdown."""
    head = ["model", "weights", f"KV of {ENDPOINT_BATCH} requests", "activations", "in all", "GPU", "prefill"]
    return markdown(head, (_endpoint_row(name, MODELS[name]) for name in TABLE_MODELS))


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
