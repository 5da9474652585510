"""The calibration and benchmark files: scenes and questions by seed, written as Parquet.

`python -m shortv.tiny.dataset --output FOLDER` writes all of them again, row for row.
"""

import io
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import click
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shortv.tiny.questions import KINDS, NEW_KINDS, Turn, ask
from shortv.tiny.scenes import COLOURS, PLACES, SHAPES, Pixels, Scene, draw_scene, render

SEED = 0
BENCHMARK_SIZE = 1000
NEW_BENCHMARK_SIZE = 460
CALIBRATION_SIZE = 64
# Every fourth calibration sample is a describe turn, as the paper mixes question answering with captions.
CALIBRATION_KINDS = (*KINDS[:3], "describe", *KINDS[3:], "describe")

# A kind that the bundled model was not trained on, which adapters can learn.
NEW_BENCHMARK_KIND = "shape-of-colour"

# A benchmark holds each kind's answers equally often, so that guessing without the image gains little.
ANSWERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "count": ("2", "3", "4", "5"),
        "count-by-colour": ("0", "1", "2", "3"),
        "existence": ("yes", "no"),
        "colour-at-place": tuple(COLOURS),
        "shape-at-place": tuple(SHAPES),
        "place-of-object": PLACES,
        "shape-of-colour": tuple(SHAPES),
        "colour-of-shape": tuple(COLOURS),
    }
)

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("dataset", pa.string()),
        pa.field("kind", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row: a scene and one turn about it."""

    sample_id: str
    scene: Scene
    turn: Turn


def benchmark_samples(seed: int = SEED, size: int = BENCHMARK_SIZE) -> list[Sample]:
    """Draw the benchmark: the kinds in turn, within a kind its answers in turn, no layout twice."""
    return _balanced_samples(KINDS, "benchmark", seed=seed, size=size)


def new_benchmark_samples(seed: int = SEED, size: int = NEW_BENCHMARK_SIZE) -> list[Sample]:
    """Draw the benchmark of a new kind of question in the same way, from scenes of the same split."""
    return _balanced_samples((NEW_BENCHMARK_KIND,), "new", seed=seed, size=size)


def _balanced_samples(kinds: Sequence[str], name: str, *, seed: int, size: int) -> list[Sample]:
    rng = random.Random(f"{seed}-{name}")
    samples: list[Sample] = []
    used: set[str] = set()
    while len(samples) < size:
        round_, position = divmod(len(samples), len(kinds))
        kind = kinds[position]
        answer = ANSWERS[kind][round_ % len(ANSWERS[kind])]
        scene = draw_scene(rng, "benchmark")
        turn = NEW_KINDS[kind](scene, rng) if kind in NEW_KINDS else ask(kind, scene, rng)
        if turn is None or turn.answer != answer or scene.layout in used:
            continue
        used.add(scene.layout)
        samples.append(Sample(sample_id=f"{name}-{len(samples):04d}", scene=scene, turn=turn))
    return samples


def calibration_samples(seed: int = SEED, size: int = CALIBRATION_SIZE) -> list[Sample]:
    """Draw the calibration set: questions of every kind and describe turns, no layout twice."""
    rng = random.Random(f"{seed}-calibration")
    samples: list[Sample] = []
    used: set[str] = set()
    while len(samples) < size:
        kind = CALIBRATION_KINDS[len(samples) % len(CALIBRATION_KINDS)]
        scene = draw_scene(rng, "calibration")
        turn = ask(kind, scene, rng)
        if turn is None or scene.layout in used:
            continue
        used.add(scene.layout)
        samples.append(Sample(sample_id=f"calibration-{len(samples):02d}", scene=scene, turn=turn))
    return samples


def to_table(samples: list[Sample], *, dataset: str = "shapes_vqa") -> pa.Table:
    """Lay samples out in the calibration format, with the kind of question as one more column.

    `dataset` names what the questions belong to; describe turns belong to shapes_describe.
    """
    rows = [
        {
            "sample_id": sample.sample_id,
            "images": [encode_png(render(sample.scene))],
            "prompt": sample.turn.prompt,
            "answer": sample.turn.answer,
            "dataset": "shapes_describe" if sample.turn.kind == "describe" else dataset,
            "kind": sample.turn.kind,
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def encode_png(pixels: Pixels) -> bytes:
    """Give an image of height x width x RGB as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@click.command()
@click.option("--output", default=Path(__file__).parent, type=click.Path(path_type=Path), help="Folder to write to.")
def main(output: Path) -> None:
    """Write calibration.parquet, benchmark.parquet and new_benchmark.parquet."""
    output.mkdir(parents=True, exist_ok=True)
    for name, dataset, samples in (
        ("calibration", "shapes_vqa", calibration_samples()),
        ("benchmark", "shapes_vqa", benchmark_samples()),
        ("new_benchmark", "shapes_new", new_benchmark_samples()),
    ):
        partial, path = output / f"{name}.partial", output / f"{name}.parquet"
        pq.write_table(to_table(samples, dataset=dataset), partial, compression="zstd")
        os.replace(partial, path)
        click.echo(f"{path}: {len(samples)} samples, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
