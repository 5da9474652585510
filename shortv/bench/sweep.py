"""Speed of the sweep engine against ShortV's released algorithm, which runs one whole forward per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reports.calibration import read_calibration
from shortv.bench.measuring import Timings, seconds
from shortv.bench.rows import Row
from shortv.bench.specs import SweepBench
from shortv.errors import Refused
from shortv.families import Batch, Decoder, LoadedModel, encode, load, quiet_transformers
from shortv.plan import Mode
from shortv.sample import Sample
from shortv.sweep.ablations import last_logits
from shortv.sweep.engine import Divergence, divergence, log_probabilities, measure

RELEASED = "the released algorithm"


def bench(spec: SweepBench) -> Iterator[Row]:
    """Time a sweep of `freeze-visual` by every variant; samples are encoded beforehand, once for all of them.

    Layer passes are counted by hooks: a layer that runs over a stack of k batches of B samples counts k B.

    Raises:
        Refused: a sample cannot be encoded.
    """
    quiet_transformers()
    samples = read_calibration(spec.calibration)[: spec.limit]
    loaded = load(spec.model, dtype=spec.dtype, device=spec.device)
    single, batched = _batches(loaded, samples, 1), _batches(loaded, samples, spec.batch_size)
    layers = range(len(loaded.decoder.layers))
    released = partial(measure_released, loaded)
    stacked = partial(measure, loaded, layers=layers, modes=[Mode.FREEZE_VISUAL])
    engines: dict[tuple[str, int], Callable[[], None]] = {
        (RELEASED, 1): partial(_run, released, single),
        (RELEASED, spec.batch_size): partial(_run, released, batched),
        ("this engine, unstacked", spec.batch_size): partial(_run, partial(stacked, stack=1), batched),
        ("this engine", 1): partial(_run, stacked, single),
        ("this engine", spec.batch_size): partial(_run, stacked, batched),
    }
    passes = {key: _layer_passes(loaded, run) for key, run in engines.items()}
    variants = {key: partial(seconds, run, loaded.device) for key, run in engines.items()}
    times = Timings.interleaved(variants, rounds=spec.repeats, device=loaded.device)
    where = f"{len(samples)} samples, {len(layers)} layers, {spec.dtype} on {spec.device}"
    for key in engines:
        name, size = key
        figures = {
            "layer_passes": passes[key],
            "times_faster": 1 / times.ratio(key, (RELEASED, size)),
            "times_faster_than_batch_1": 1 / times.ratio(key, (RELEASED, 1)),
        }
        yield times.row(f"{where}, {name}, batch {size}; against {RELEASED}", key, (RELEASED, size), **figures)


@torch.inference_mode()
def measure_released(loaded: LoadedModel, batch: Batch) -> list[Divergence]:
    """LC of visual tokens per layer from L + 1 forwards of the whole model, vision tower included.

    The released code takes the softmax in the model's dtype and assumes that the image starts at token 35. Here both
    are corrected, so that only the amount of work differs from `measure`.
    """
    full_BV = log_probabilities(_forward(loaded, batch))
    values = []
    for layer in loaded.decoder.layers:
        with _silenced(loaded.decoder, layer, batch.types.visual_BT[:, :, None]):
            values.append(divergence(full_BV, log_probabilities(_forward(loaded, batch))))
    return values


def _forward(loaded: LoadedModel, batch: Batch) -> Tensor:
    left: list[Tensor] = []
    with loaded.decoder.layers[-1].register_forward_hook(lambda _, __, output: left.append(output)):
        loaded.decoder.backbone(**batch.inputs, use_cache=False)
    return last_logits(loaded.decoder, left[0], batch.types.last_B)


@contextmanager
def _silenced(decoder: Decoder, layer: nn.Module, visual_BT1: Tensor) -> Iterator[None]:
    """Zero both halves' outputs at visual positions before they are added to the residual stream."""

    def silence(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].masked_fill(visual_BT1, 0), *output[1:])
        return output.masked_fill(visual_BT1, 0)

    with decoder.attention(layer).register_forward_hook(silence), decoder.ffn(layer).register_forward_hook(silence):
        yield


def _batches(loaded: LoadedModel, samples: Sequence[Sample], size: int) -> list[Batch]:
    batches = []
    for start in range(0, len(samples), size):
        encoded = encode(loaded, samples[start : start + size])
        if encoded.errors or encoded.batch is None:
            sample, error = encoded.errors[0]
            raise Refused(f"sample {sample.sample_id!r} cannot be used: {error}; bench on samples that all can")
        batches.append(encoded.batch)
    return batches


def _run(engine: Callable[[Batch], object], batches: Sequence[Batch]) -> None:
    for batch in batches:
        engine(batch)


def _layer_passes(loaded: LoadedModel, run: Callable[[], None]) -> int:
    passes = []
    with ExitStack() as hooks:
        for layer in loaded.decoder.layers:
            hooks.enter_context(layer.register_forward_hook(lambda _, __, output_NTD: passes.append(len(output_NTD))))
        run()
    return sum(passes)
