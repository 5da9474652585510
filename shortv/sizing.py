"""How large a GPU a model needs and how long a sweep takes, as the tables of cluster/README.md.

    python -m shortv.sizing

Everything is computed from the models' sizes by `shortv.costs`; nothing here was measured on a GPU.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shortv.architecture import Architecture
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A published model: its decoder, the parameters beside it, and the visual tokens of one image."""

    architecture: Architecture
    other_parameters: int
    visual_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of a calibration prompt."""
        return TEXT_TOKENS + self.visual_tokens


def _llama(model_type: str, *, layers: int, hidden: int, ffn: int, heads: int) -> Architecture:
    return Architecture(
        model_type=model_type,
        text_model_type="llama",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        vocab_size=32064,
    )


MODELS: Final = MappingProxyType(
    {
        "LLaVA-1.5-7B": Sized(
            architecture=_llama("llava", layers=32, hidden=4096, ffn=11008, heads=32),
            other_parameters=324_487_168,
            visual_tokens=576,
        ),
        "LLaVA-1.5-13B": Sized(
            architecture=_llama("llava", layers=40, hidden=5120, ffn=13824, heads=40),
            other_parameters=334_974_976,
            visual_tokens=576,
        ),
        "LLaVA-NeXT-13B": Sized(
            architecture=_llama("llava_next", layers=40, hidden=5120, ffn=13824, heads=40),
            other_parameters=334_980_096,
            visual_tokens=2880,
        ),
        "Qwen2.5-VL-7B": Sized(
            architecture=Architecture(
                model_type="qwen2_5_vl",
                text_model_type="qwen2_5_vl_text",
                num_layers=28,
                hidden_size=3584,
                intermediate_size=18944,
                num_heads=28,
                num_kv_heads=4,
                head_dim=128,
                vocab_size=152064,
            ),
            other_parameters=676_550_144,
            visual_tokens=1024,
        ),
    }
)


def sweep_table() -> str:
    """GPU memory and time of a sweep per model and number of samples, as Markdown."""
    samples = [f"{number:,} samples" for number in SAMPLES]
    head = ["model", "visual tokens", "weights", "kept states", "stacked", "ablations", "in all", "GPU", "PFLOP/sample"]
    return _markdown([*head, *samples], (_sweep_row(name, sized) for name, sized in MODELS.items()))


def endpoint_table() -> str:
    """GPU memory and prefill time of one replica per model, as Markdown."""
    head = ["model", "weights", f"KV of {ENDPOINT_BATCH} requests", "activations", "in all", "GPU", "prefill"]
    return _markdown(head, (_endpoint_row(name, sized) for name, sized in MODELS.items()))


def _sweep_row(name: str, sized: Sized) -> list[str]:
    # A larger card stacks more, so what is needed depends on where it runs.
    memories = ((card, _sweep_memory(sized, card)) for card in CARDS)
    card, memory = next(found for found in memories if _fits(found[1].total, found[0]))
    flops = sweep_flops(sized.architecture, MODES, TEXT_TOKENS, sized.visual_tokens)
    sizes = [memory.weights, memory.states, memory.stacked]
    return [
        name,
        f"{sized.visual_tokens:,}",
        *map(_gib, sizes),
        str(memory.stack),
        _gib(memory.total),
        f"{card} GiB",
        f"{flops / 1e15:.2f}",
        *(_duration(number * flops / FLOPS_PER_SECOND) for number in SAMPLES),
    ]


def _sweep_memory(sized: Sized, card: int) -> SweepMemory:
    return sweep_memory(
        sized.architecture,
        tokens=sized.tokens,
        batch=SWEEP_BATCH,
        itemsize=ITEMSIZE,
        ablations=len(MODES) * sized.architecture.num_layers,
        device_bytes=card * GIB,
        other_parameters=sized.other_parameters,
    )


def _endpoint_row(name: str, sized: Sized) -> list[str]:
    arch = sized.architecture
    weights = (decoder_parameters(arch) + sized.other_parameters) * ITEMSIZE
    cache = ENDPOINT_BATCH * kv_cache_bytes(arch, sized.tokens + ANSWER_TOKENS, ITEMSIZE)
    activations = activation_bytes(arch, ENDPOINT_BATCH * sized.tokens, ITEMSIZE)
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


if __name__ == "__main__":
    print(sweep_table(), endpoint_table(), sep="\n\n")
