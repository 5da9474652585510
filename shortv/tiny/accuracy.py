"""Does the model see? Exact-match accuracy on the benchmark, with its images and with blank ones.

`python -m shortv.tiny.accuracy` prints both for the bundled model, next to the share of the most frequent answer.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from shortv.tiny.questions import exact_match
from shortv.tiny.scenes import Scene, render

HERE = Path(__file__).parent
MODEL = HERE / "model"
BENCHMARK = HERE / "benchmark.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One benchmark row; `image` is PNG bytes."""

    kind: str
    image: bytes
    prompt: str
    answer: str


def read_questions(path: Path = BENCHMARK, limit: int | None = None) -> list[Question]:
    """Read the benchmark's questions, the first `limit` of them or all."""
    rows = pq.read_table(path).slice(0, limit).to_pylist()
    return [
        Question(kind=row["kind"], image=row["images"][0], prompt=row["prompt"], answer=row["answer"]) for row in rows
    ]


def generate_answers(
    model: Any, processor: Any, questions: Sequence[Question], *, blank: bool = False, batch_size: int = 50
) -> Iterator[str]:
    """Give the model's greedy answer to each question, in order; `blank` replaces every image by the background."""
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        images = [
            Image.fromarray(render(Scene(objects=()))) if blank else Image.open(io.BytesIO(question.image))
            for question in batch
        ]
        conversations = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
            for question in batch
        ]
        texts = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            # The longest answer to a question is two words and the end token.
            ids_BT = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=8)
        yield from processor.batch_decode(ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def measure_accuracy(model: Any, processor: Any, questions: Sequence[Question], **settings: Any) -> dict[str, float]:
    """Answer the questions and return the share of right answers by kind and `overall`, between 0 and 1."""
    return shares(questions, list(generate_answers(model, processor, questions, **settings)))


def majority_accuracy(questions: Sequence[Question]) -> dict[str, float]:
    """Return the accuracy of always answering each kind's most frequent answer."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        counts[question.kind][question.answer] += 1
    return shares(questions, [counts[question.kind].most_common(1)[0][0] for question in questions])


def shares(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the share of exact matches by kind and `overall`."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        for name in (question.kind, "overall"):
            right[name].append(exact_match(answer, question.answer))
    kinds = [name for name in right if name != "overall"]
    return {name: sum(right[name]) / len(right[name]) for name in (*kinds, "overall")}


def format_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Lay accuracies out as a Markdown table in percent, a column each."""
    lines = ["| kind | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for kind in next(iter(columns.values())):
        lines.append(f"| {kind} | " + " | ".join(f"{100 * column[kind]:.1f}" for column in columns.values()) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--model", "folder", default=MODEL, type=click.Path(path_type=Path), help="Model folder.")
@click.option("--benchmark", default=BENCHMARK, type=click.Path(path_type=Path), help="Benchmark file.")
@click.option("--limit", type=click.IntRange(min=1), default=None, help="First questions only; default: all.")
@click.option("--device", default="cpu", show_default=True, help="Where to run.")
def main(folder: Path, benchmark: Path, limit: int | None, device: str) -> None:
    """Print the model's accuracy with images, with blank images, and that of the most frequent answer."""
    model = cast(Any, AutoModelForImageTextToText).from_pretrained(folder, local_files_only=True).to(device).eval()
    processor = cast(Any, AutoProcessor).from_pretrained(folder, local_files_only=True)
    questions = read_questions(benchmark, limit)
    columns = {
        "accuracy %": measure_accuracy(model, processor, questions),
        "blank image %": measure_accuracy(model, processor, questions, blank=True),
        "most frequent answer %": majority_accuracy(questions),
    }
    click.echo(format_table(columns))


if __name__ == "__main__":
    main()
