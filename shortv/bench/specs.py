"""The settings of every benchmark: its flags, their help and their limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from shortv.bench.rows import Row
from shortv.spec import Count, Spec, Texts

TINY = Path(__file__).resolve().parents[1] / "tiny"
Layers = Annotated[int, Field(ge=2, le=10_000)]


def _numbers(value: object) -> object:
    """Split texts at commas: `1,2,4` and `("1", "2,4")` mean the same."""
    texts = value if isinstance(value, list | tuple) else [value]
    return [part for text in texts for part in str(text).split(",")]


class Bench(Spec):
    """A benchmark; its rows are printed, and written where a folder is given."""

    output_path: str | None = Field(None, description="Folder for results.md and results.json. [default: none]")


class DeviceBench(Bench):
    """A benchmark on one device."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the weights.")
    device: str = Field("cpu", description="cpu, cuda or cuda:N.")


class SweepBench(DeviceBench):
    """Sweep freeze-visual with this engine and with the released algorithm (one full forward per layer)."""

    model: str = Field(
        default_factory=lambda: str(TINY / "model"), description="Hub id or folder. [default: the bundled model]"
    )
    calibration: str = Field(
        default_factory=lambda: str(TINY / "calibration.parquet"), description="Parquet file. [default: the bundled]"
    )
    limit: Count = Field(64, description="Samples to sweep.")
    batch_size: Count = Field(8, description="Batch size of this engine.")
    repeats: Count = Field(5, description="Interleaved rounds; medians count.")


class ShapeBench(DeviceBench):
    """A benchmark of a published model's sizes with random weights, on prompts with one image each."""

    shape: str = Field("llava-1.5-7b", description="A published model's sizes.")
    batch_size: Count = Field(1, description="Prompts that run together.")
    text_tokens: Annotated[int, Field(ge=2, le=10**6)] = Field(64, description="Text tokens of a prompt.")

    def shown(self, layers: int, visual_tokens: int) -> str:
        """The sizes in one line."""
        sizes = f"{self.shape}, {layers} layers, batch {self.batch_size}, t = {self.text_tokens}, v = {visual_tokens}"
        return f"{sizes}, {self.dtype} on {self.device}"


class PrefillBench(ShapeBench):
    """Prefill of a published model's sizes: full, fast and reference, against FLOPs and the roofline."""

    layers: Layers | None = Field(None, description="Cut the depth, to fit a small machine. [default: all]")
    frozen: Count | None = Field(None, description="Frozen layers, the last ones. [default: the paper's share]")
    visual_tokens: Count | None = Field(None, description="Visual tokens of a prompt. [default: the shape's]")
    vision_tower: bool = Field(False, description="Time the vision tower too, and give the ratio with it.")
    pairs: Count = Field(7, description="Interleaved pairs; medians count.")


class SizingBench(ShapeBench):
    """Memory and time of a sweep by the default modes, against the predictions behind docs/cluster.md."""

    shape: str = Field("tinyllama-1.1b", description="A published model's sizes.")
    layers: Layers = Field(4, description="Depth of the model.")
    batch_size: Count = Field(2, description="Prompts that run together.")
    text_tokens: Count = Field(64, description="Text tokens of the longest prompt.")
    visual_tokens: Count = Field(576, description="Visual tokens of a prompt.")
    stack: Count | None = Field(None, description="Ablations that run together. [default: the engine's choice]")
    repeats: Count = Field(2, description="Sweeps; the fastest counts.")


class TrainingBench(ShapeBench):
    """A SAISA training step against a step of the dense model: forward and backward, without the vision tower."""

    layers: Count = Field(2, description="Depth of the model.")
    text_tokens: Annotated[int, Field(ge=18, le=10**6)] = Field(64, description="16 of them are trained.")
    pairs: Count = Field(5, description="Interleaved pairs; medians count.")


class CampaignBench(Bench):
    """The bundled model: a campaign against runs of lmms-eval, and scores by every interface."""

    limit: Annotated[int, Field(ge=1, le=1000)] = Field(500, description="Documents per plan.")
    tasks: Texts = Field(("photos_vqa", "shapes_vqa"), description="Photographs, small pictures, or both.")
    replicas: Annotated[tuple[Count, ...], BeforeValidator(_numbers)] = Field(
        (1, 2), description="Numbers of replicas, a campaign each.", json_schema_extra={"metavar": "TEXT"}
    )
    batch_sizes: Annotated[tuple[Count, ...], BeforeValidator(_numbers)] = Field(
        (1, 8), description="Batch sizes of lmms_eval.", json_schema_extra={"metavar": "TEXT"}
    )
    parts: tuple[Literal["speed", "scores"], ...] = Field(
        (), description="A part to run; may be repeated. [default: all]", json_schema_extra={"flag": "--part"}
    )


class LoadBench(Bench):
    """MLPerf's loads, Offline and Server, and 1 to 32 clients, on an endpoint and on the replicas of a campaign.

    Plans shorten the prefill, and those of bypass-visual the KV cache; they do not shorten decoding.
    """

    requests: Count = Field(256, description="Requests of the Offline load, all sent at once.")
    rate_share: Annotated[float, Field(gt=0, le=100)] = Field(
        0.7,
        description="Rate of the Server load (Poisson arrivals), as a share of the Offline throughput.",
    )
    concurrency: Annotated[tuple[Count, ...], BeforeValidator(_numbers)] = Field(
        (1, 2, 4, 8, 16, 32), description="Numbers of clients.", json_schema_extra={"metavar": "TEXT"}
    )
    tokens: Count = Field(16, description="Tokens of each completion.")
    seconds: Annotated[float, Field(ge=1, le=10**6)] = Field(10.0, description="Length of each load but Offline.")
    overload_seconds: Annotated[float, Field(ge=1, le=10**6)] = Field(120.0, description="Length of the overload.")
    parts: tuple[Literal["campaign", "endpoint", "overload"], ...] = Field(
        (), description="A part to run; may be repeated. [default: all]", json_schema_extra={"flag": "--part"}
    )


class ScaleBench(Bench):
    """A campaign on replicas that only wait: what the driver, producers and Serve cost when there are many.

    The share of the ideal throughput counts while all replicas work; the ideal is batches without a pause.
    """

    replicas: Annotated[tuple[Count, ...], BeforeValidator(_numbers)] = Field(
        (16, 64, 256, 1000), description="Numbers of replicas.", json_schema_extra={"metavar": "TEXT"}
    )
    processes: Count = Field(16, description="Serve replicas that simulate them, at most.")
    real_replicas: Count = Field(64, description="Serve replicas that wait themselves; each takes 0.13 GB.")
    service_seconds: Annotated[float, Field(ge=0.01, le=10**6)] = Field(
        0.8, description="Time of a batch of 16 documents under one plan; there are six."
    )
    seconds: Annotated[float, Field(ge=1, le=10**6)] = Field(15.0, description="Time to measure, beside the ramps.")
    parts: tuple[Literal["simulated", "images", "real"], ...] = Field(
        (), description="A part to run; may be repeated. [default: all]", json_schema_extra={"flag": "--part"}
    )


class SchedulingBench(Bench):
    """Overhead of distributing units: sweeps by workers with GPUs in name only, whose units sleep."""

    workers: Annotated[tuple[Count, ...], BeforeValidator(_numbers)] = Field(
        (1, 2, 4, 8, 16), description="Numbers of workers, one sweep each.", json_schema_extra={"metavar": "TEXT"}
    )
    units: Count = Field(20, description="Units per worker.")
    unit_seconds: Annotated[float, Field(ge=0.01, le=10**6)] = Field(1.0, description="Length of a unit.")


class KillsBench(Bench):
    """A campaign whose replicas, producers and driver are killed, against the same campaign undisturbed."""

    documents: Count = Field(10_000, description="Questions, each asked under every plan.")
    plans: tuple[str, ...] = Field(("last@4",), description="Plans beside the full model.")
    replicas: Count = Field(2, description="Replicas.")
    replica_seconds: Annotated[float, Field(gt=0, le=10**6)] = Field(
        20.0, description="Time between kills of replicas."
    )
    producer_seconds: Annotated[float, Field(gt=0, le=10**6)] = Field(30.0, description="The same of producers.")
    drivers: Annotated[int, Field(ge=0, le=100)] = Field(2, description="Times that the driver is killed.")


class GpuBench(Bench):
    """Run every GPU benchmark in bfloat16 and write one table; exit status 3 when some of them failed."""

    output_path: str = Field("runs/bench-gpu", description="Folder for results.md and results.json.")
    device: str = Field("cuda", description="cuda or cuda:N.")


BENCHMARKS: Mapping[str, type[Bench]] = {
    "sweep": SweepBench,
    "prefill": PrefillBench,
    "sizing": SizingBench,
    "training": TrainingBench,
    "campaign": CampaignBench,
    "load": LoadBench,
    "scale": ScaleBench,
    "scheduling": SchedulingBench,
    "kills": KillsBench,
    "gpu": GpuBench,
}
"""Each benchmark by its module, whose function `bench` gives rows for such settings."""


def run_benchmark(name: str, spec: Bench) -> Iterator[Row]:
    """Run a benchmark. Torch and Ray take seconds to import, and --help needs neither."""
    for row in import_module(f"shortv.bench.{name}").bench(spec):
        yield replace(row, benchmark=row.benchmark or name)
