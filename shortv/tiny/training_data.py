"""Training samples in the calibration format: scenes and questions by seed, of kinds that can be chosen.

`python -m shortv.tiny.training_data --output FOLDER` writes training.parquet, and with `--held-out N` test.parquet.
"""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

from shortv.errors import Refused
from shortv.tiny.dataset import Sample, to_table
from shortv.tiny.questions import KINDS, NEW_KINDS, Turn, ask
from shortv.tiny.scenes import Scene, draw_scene

SAMPLES = 4096
LEARNED_KINDS = (*KINDS, "describe")
"""What the bundled model was trained on."""
_MOST_DRAWS = 200
"""Scenes that are drawn per sample before a kind counts as impossible; one in three or more allows each kind."""


def draw_samples(kinds: Sequence[str], *, samples: int, seed: int, split: str = "training") -> list[Sample]:
    """Draw samples about scenes of a split, the kinds in turn; no question is asked twice of one layout.

    Raises:
        Refused: an unknown kind, or none.
    """
    unknown = [kind for kind in kinds if kind not in (*LEARNED_KINDS, *NEW_KINDS)]
    if unknown or not kinds:
        known = ", ".join((*LEARNED_KINDS, *NEW_KINDS))
        raise Refused(f"unknown kinds of question: {', '.join(unknown) or 'none given'}; choose from {known}")
    rng = random.Random(f"{seed}-{split}-{','.join(kinds)}")
    found: list[Sample] = []
    used: set[tuple[str, str]] = set()
    while len(found) < samples:
        scene, turn = _draw(kinds[len(found) % len(kinds)], split, rng)
        if (scene.layout, turn.prompt) not in used:
            used.add((scene.layout, turn.prompt))
            found.append(Sample(sample_id=f"{split}-{len(found):06d}", scene=scene, turn=turn))
    return found


def _draw(kind: str, split: str, rng: random.Random) -> tuple[Scene, Turn]:
    for _ in range(_MOST_DRAWS):
        scene = draw_scene(rng, split)
        turn = NEW_KINDS[kind](scene, rng) if kind in NEW_KINDS else ask(kind, scene, rng)
        if turn is not None:
            return scene, turn
    raise Refused(f"no scene allows a question of kind {kind!r}; choose another kind")


def training_table(kinds: Sequence[str], *, samples: int, seed: int, split: str = "training") -> pa.Table:
    """The same as a table in the calibration format, with the kind of question as one more column."""
    return to_table(draw_samples(kinds, samples=samples, seed=seed, split=split))


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write to.")
@click.option("--kinds", default=",".join(LEARNED_KINDS), show_default=True, help="Kinds of question, by commas.")
@click.option("--samples", default=SAMPLES, show_default=True, help="Training samples.")
@click.option("--held-out", default=0, show_default=True, help="Test samples, of layouts that no training uses.")
@click.option("--seed", default=0, show_default=True, help="Of scenes and questions.")
def main(output: Path, kinds: str, samples: int, held_out: int, seed: int) -> None:
    """Write training.parquet and, where asked for, test.parquet."""
    output.mkdir(parents=True, exist_ok=True)
    chosen = [kind.strip() for kind in kinds.split(",") if kind.strip()]
    for name, split, count in (("training", "training", samples), ("test", "benchmark", held_out)):
        if count:
            table = training_table(chosen, samples=count, seed=seed, split=split)
            partial, path = output / f"{name}.partial", output / f"{name}.parquet"
            pq.write_table(table, partial, compression="zstd")
            os.replace(partial, path)
            click.echo(f"{path}: {count} samples, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
