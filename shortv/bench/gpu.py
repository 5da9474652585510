"""Every benchmark for a GPU in one run and one table: prefill, sweep, sizing and training in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from shortv.bench.models import MODELS
from shortv.bench.rows import Row
from shortv.bench.specs import (
    DeviceBench,
    GpuBench,
    PrefillBench,
    SizingBench,
    SweepBench,
    TrainingBench,
    run_benchmark,
)
from shortv.errors import Refused

CASES: tuple[tuple[str, DeviceBench], ...] = (
    *(
        ("prefill", PrefillBench(shape=name, batch_size=batch, vision_tower=True, dtype="bfloat16"))
        for name, known in MODELS.items()
        if known.real_tower
        for batch in (1, 8)
    ),
    ("sizing", SizingBench(shape="llava-1.5-7b", layers=32, batch_size=8, dtype="bfloat16")),
    ("training", TrainingBench(layers=8, batch_size=8, dtype="bfloat16")),
    ("sweep", SweepBench()),
)


def bench(spec: GpuBench, cases: Sequence[tuple[str, DeviceBench]] = CASES) -> Iterator[Row]:
    """Run all cases one after another; a case that fails becomes a row with its error.

    Raises Refused when the device is a GPU that this machine does not have.
    """
    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        raise Refused(f"--device is {spec.device}, but torch finds no CUDA device; run this on a machine with a GPU")
    for name, case in cases:
        try:
            yield from run_benchmark(name, case.model_copy(update={"device": spec.device}))
        except (RuntimeError, Refused) as error:
            yield Row(benchmark=name, case=str(case), error=str(error).splitlines()[0])
        if spec.device.startswith("cuda"):
            torch.cuda.empty_cache()
