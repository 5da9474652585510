"""Samples drawn by seed: the calibration and benchmark files as Parquet, and the training samples of learned parts.

`python -m shortv.tiny.dataset --output FOLDER` writes the files again, row for row.
"""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shortv.atomic import replace_file
from shortv.errors import Refused
from shortv.tiny.questions import KINDS, NEW_KINDS, QUESTIONS, Turn, ask
from shortv.tiny.scenes import Scene, draw_scene, render

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        *(pa.field(name, pa.string()) for name in ("answer", "dataset", "kind")),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row: a scene and one turn about it."""

    sample_id: str
    scene: Scene
    turn: Turn


def benchmark_samples(size: int = 1000) -> list[Sample]:
    """Draw the benchmark: the kinds in turn, within a kind its answers in turn, no layout twice."""
    return _draw(KINDS, size, seed="0-benchmark", split="benchmark", names="benchmark-{:04d}", balanced=True)


def new_benchmark_samples(size: int = 460) -> list[Sample]:
    """Draw the benchmark of a kind that the bundled model was not trained on, from scenes of the same split."""
    return _draw(NEW_KINDS[:1], size, seed="0-new", split="benchmark", names="new-{:04d}", balanced=True)


def calibration_samples(size: int = 64) -> list[Sample]:
    """Draw the calibration set, no layout twice; every fourth is a describe turn, as the paper mixes in captions."""
    kinds = (*KINDS[:3], "describe", *KINDS[3:], "describe")
    return _draw(kinds, size, seed="0-calibration", split="calibration", names="calibration-{:02d}")


def training_samples(kinds: Sequence[str], size: int, *, seed: int, split: str = "training") -> list[Sample]:
    """Draw samples about scenes of a split, the kinds in turn; no question is asked twice of one layout.

    Raises:
        Refused: an unknown kind, or none.
    """
    unknown = [kind for kind in kinds if kind not in QUESTIONS]
    if unknown or not kinds:
        found = ", ".join(unknown) or "none given"
        raise Refused(f"unknown kinds of question: {found}; choose from {', '.join(QUESTIONS)}")
    seeded = f"{seed}-{split}-{','.join(kinds)}"
    return _draw(kinds, size, seed=seeded, split=split, names=split + "-{:06d}", layouts_again=True)


def _draw(
    kinds: Sequence[str],
    size: int,
    *,
    seed: str,
    split: str,
    names: str,
    balanced: bool = False,
    layouts_again: bool = False,
) -> list[Sample]:
    """Draw scenes until so many allow the question that is next.

    Where `balanced`, a kind's answers come equally often, so that guessing without the image gains little.
    """
    rng = random.Random(seed)
    samples: list[Sample] = []
    used: set[tuple[str, str]] = set()
    while len(samples) < size:
        round_, position = divmod(len(samples), len(kinds))
        answers = QUESTIONS[kinds[position]].answers
        scene = draw_scene(rng, split)
        turn = ask(kinds[position], scene, rng)
        if turn is None or (balanced and turn.answer != answers[round_ % len(answers)]):
            continue
        key = (scene.layout, turn.prompt if layouts_again else "")
        if key not in used:
            used.add(key)
            samples.append(Sample(sample_id=names.format(len(samples)), scene=scene, turn=turn))
    return samples


def to_table(samples: Sequence[Sample], *, dataset: str = "shapes_vqa") -> pa.Table:
    """Lay samples out in the calibration format, with the kind of question as one more column.

    `dataset` names what the questions belong to; describe turns belong to shapes_describe.
    """
    rows = [
        {
            "sample_id": sample.sample_id,
            "images": [_png(sample.scene)],
            "prompt": sample.turn.prompt,
            "answer": sample.turn.answer,
            "dataset": "shapes_describe" if sample.turn.kind == "describe" else dataset,
            "kind": sample.turn.kind,
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@click.command()
@click.option("--output", default=Path(__file__).parent, type=click.Path(path_type=Path), help="Folder to write to.")
def main(output: Path) -> None:
    """Write calibration.parquet, benchmark.parquet and new_benchmark.parquet."""
    for name, dataset, samples in (
        ("calibration", "shapes_vqa", calibration_samples()),
        ("benchmark", "shapes_vqa", benchmark_samples()),
        ("new_benchmark", "shapes_new", new_benchmark_samples()),
    ):
        buffer = io.BytesIO()
        pq.write_table(to_table(samples, dataset=dataset), buffer, compression="zstd")
        replace_file(output / f"{name}.parquet", buffer.getvalue())
        click.echo(f"{output / name}.parquet: {len(samples)} samples, {buffer.tell()} bytes")


if __name__ == "__main__":
    main()
