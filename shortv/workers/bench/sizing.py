"""What a sweep really takes, against the memory and the time that `shortv.costs` predicts for it.

In a process of its own: a model with random weights, a batch of random prompts, and the sweep engine. On a CPU memory
is the growth of the process as Linux counts it, on a GPU what torch's allocator hands out.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from shortv.architecture import Architecture
from shortv.costs import STACK_SHARE, SweepMemory, activation_bytes, decoder_parameters, sweep_flops, sweep_memory
from shortv.errors import Refused
from shortv.families import Batch, LoadedModel, decoder_of
from shortv.families.tokens import token_types
from shortv.layers.roofline import fastest, seconds
from shortv.layers.shapes import SHAPES
from shortv.sizing import MODES
from shortv.sweep.ablations import CPU_BUDGET, automatic_stack
from shortv.sweep.engine import measure

PADDING: Final = 8
"""Padding tokens of every sample but the first: real batches have some, and with them a mask."""
SIDE: Final = MappingProxyType({"cpu": 2048, "cuda": 8192})
"""Of the square matrices whose product gives the rate that a prediction of seconds assumes."""
BEFORE_IMAGE: Final = 35
"""Text tokens before the image in LLaVA-1.5's prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is swept: a shape cut to so many layers, and a batch whose longest prompt has t + v tokens.

    `stack` ablations run together, as many as the engine chooses by itself when it is None.
    """

    shape: str
    layers: int
    batch: int
    text_tokens: int
    visual_tokens: int
    stack: int | None = None
    repeats: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens of the longest prompt."""
        return self.text_tokens + self.visual_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Predicted and measured: bytes on the device, seconds per batch."""

    memory: SweepMemory
    """Predicted."""
    stack: int
    """Ablations that ran together."""
    weights: int
    """What loading the model left behind, in bytes."""
    work: int
    """The most that the sweep took on top of it, in bytes."""
    flops: float
    """Of the sweep of one batch, predicted."""
    rate: float
    """FLOP per second of one large product, measured."""
    seconds: float
    """Of the fastest sweep of the batch."""

    @property
    def predicted_seconds(self) -> float:
        """Seconds of the batch if everything ran at the rate of the large product."""
        return self.flops / self.rate


def bench_sizing(case: Case) -> Sizing:
    """Sweep one batch in a new process; raises Refused where the memory of a process cannot be read."""
    if torch.device(case.device).type == "cpu" and not _STATUS.exists():
        raise Refused(f"the memory of a process is read from {_STATUS}, which is not there; use Linux or a GPU")
    # A new interpreter, so that nothing the caller has loaded or freed counts.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, case).result()


def _measured(case: Case) -> Sizing:
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    model_class, config = BUILDS[case.shape](case.layers)
    # First, because it also starts threads and libraries, whose memory is not the model's.
    rates = [_rate(device, dtype)]
    before = _occupied(device)
    with device:
        model = model_class._from_config(config, attn_implementation="sdpa", dtype=dtype)
    loaded = _loaded(model.eval().requires_grad_(False), case.shape)
    weights = _occupied(device) - before
    batch, layers = _random_batch(loaded, case), range(case.layers)
    stack = min(case.stack or automatic_stack(loaded, case.batch, case.tokens), len(MODES) * case.layers)
    _forget_peak(device)
    times = [seconds(lambda: measure(loaded, batch, layers=layers, modes=MODES, stack=stack), device)]
    work = _peak(device) - before - weights
    # Interleaved, because others may be using the machine: the fastest of both is what it can do.
    for _ in range(case.repeats - 1):
        rates.append(_rate(device, dtype))
        times.append(seconds(lambda: measure(loaded, batch, layers=layers, modes=MODES, stack=stack), device))
    rates.append(_rate(device, dtype))
    return Sizing(
        memory=_predicted_memory(loaded, case),
        stack=stack,
        weights=weights,
        work=work,
        flops=case.batch * sweep_flops(loaded.architecture, MODES, case.text_tokens, case.visual_tokens),
        rate=max(rates),
        seconds=min(times),
    )


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE[device.type]
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / fastest(lambda: torch.mm(left, right), device)


def _predicted_memory(loaded: LoadedModel, case: Case) -> SweepMemory:
    """Of a device with room for as many ablations as were asked for; else of the one that the engine sees."""
    arch, itemsize = loaded.architecture, int(loaded.model.dtype.itemsize)
    if case.stack:
        room = case.stack * activation_bytes(arch, case.batch * case.tokens, itemsize)
    elif loaded.device.type == "cuda":
        room = int(STACK_SHARE * torch.cuda.get_device_properties(loaded.device).total_memory)
    else:
        room = CPU_BUDGET
    return sweep_memory(
        arch,
        tokens=case.tokens,
        batch=case.batch,
        itemsize=itemsize,
        ablations=len(MODES) * case.layers,
        device_bytes=round(room / STACK_SHARE),
        other_parameters=sum(weight.numel() for weight in loaded.model.parameters()) - decoder_parameters(arch),
    )


def _loaded(model: Any, name: str) -> LoadedModel:
    return LoadedModel(
        name=name,
        revision=None,
        model=model,
        processor=None,
        decoder=decoder_of(model),
        architecture=Architecture.from_config_dict(model.config.to_dict()),
        device=model.device,
        context=int(model.config.get_text_config().max_position_embeddings),
        chat_template=None,
    )


def _random_batch(loaded: LoadedModel, case: Case) -> Batch:
    """Placeholders without pixels: the vision tower at work is no part of the prediction."""
    visual_id = min(loaded.decoder.visual_ids)
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, min(1000, visual_id), (case.batch, case.tokens), generator=draw)
    start = min(BEFORE_IMAGE, case.text_tokens - 1)
    ids_BT[:, start : start + case.visual_tokens] = visual_id
    mask_BT = torch.ones_like(ids_BT)
    padding = min(PADDING, start)
    ids_BT[1:, :padding] = 0
    mask_BT[1:, :padding] = 0
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if loaded.decoder.family.positions_from_mask:
        inputs["position_ids"] = (mask_BT.cumsum(1) - 1).clamp(min=0)
    return Batch(inputs=inputs, types=token_types(ids_BT, mask_BT, loaded.decoder.visual_ids)).on(loaded)


_STATUS: Final = Path("/proc/self/status")
_FORGET: Final = Path("/proc/self/clear_refs")


def _occupied(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _FORGET.write_text("5")


def _status(name: str) -> int:
    """A size in bytes; resource.getrusage would hand down the peak of the process that started this one."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _llava(*, hidden: int, ffn: int, heads: int, kv_heads: int, vocabulary: int) -> Callable[[int], tuple[Any, Any]]:
    """A LLaVA around a small language model, its vision tower a stub: no pixel goes through it."""

    def build(layers: int) -> tuple[Any, Any]:
        import transformers as hf

        text = hf.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
        )
        vision = hf.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
        )
        config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
        return hf.LlavaForConditionalGeneration, config

    return build


BUILDS: Final = MappingProxyType(
    {
        "tinyllama-1.1b": _llava(hidden=2048, ffn=5632, heads=32, kv_heads=4, vocabulary=32064),
        "smollm2-135m": _llava(hidden=576, ffn=1536, heads=9, kv_heads=3, vocabulary=49152),
        **{name: shape.build for name, shape in SHAPES.items()},
    }
)
"""Language models small enough for a laptop, as the decoder of a LLaVA, and the shapes that `prefill` measures."""
