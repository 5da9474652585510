"""Does the model see? Exact-match accuracy on the benchmark, with its images and with blank ones.

`python -m shortv.tiny.accuracy` prints both for the bundled model, next to the share of the most frequent answer.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from shortv.tiny.questions import exact_match
from shortv.tiny.scenes import blank_image

HERE = Path(__file__).parent
MODEL = HERE / "model"
BENCHMARK = HERE / "benchmark.parquet"
# The longest answer to a question is two words and the end token.
MAX_NEW_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One benchmark row; `image` is PNG bytes."""

    kind: str
    image: bytes
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares of right answers between 0 and 1, overall and by kind of question."""

    overall: float
    by_kind: Mapping[str, float]


def read_questions(path: Path = BENCHMARK, limit: int | None = None) -> list[Question]:
    """Read the benchmark's questions, the first `limit` of them or all."""
    rows = pq.read_table(path).slice(0, limit).to_pylist()
    return [
        Question(kind=row["kind"], image=row["images"][0], prompt=row["prompt"], answer=row["answer"]) for row in rows
    ]


def measure_accuracy(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    intervention: AbstractContextManager[object] | None = None,
    blank: bool = False,
    batch_size: int = 50,
) -> Accuracy:
    """Answer the questions greedily and score them by exact match.

    `intervention` is entered around all generation: `shortv.apply(model, plan)` makes this the accuracy of a plan.
    `blank` replaces every image by the background alone.
    """
    with intervention or nullcontext():
        answers = list(generate_answers(model, processor, questions, blank=blank, batch_size=batch_size))
    return _score(questions, [exact_match(a, q.answer) for a, q in zip(answers, questions, strict=True)])


def generate_answers(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    blank: bool = False,
    batch_size: int = 50,
) -> Iterator[str]:
    """Give the model's greedy answer to each question, in order."""
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        images = [Image.fromarray(blank_image()) if blank else Image.open(io.BytesIO(q.image)) for q in batch]
        conversations = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
            for question in batch
        ]
        texts = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left").to(
            model.device
        )
        with torch.inference_mode():
            ids_BT = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        yield from processor.batch_decode(ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def majority_accuracy(questions: Sequence[Question]) -> Accuracy:
    """Give the accuracy of always answering each kind's most frequent answer."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        counts[question.kind][question.answer] += 1
    most_frequent = {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()}
    return _score(questions, [question.answer == most_frequent[question.kind] for question in questions])


def format_table(columns: Mapping[str, Accuracy]) -> str:
    """Lay accuracies out as a Markdown table in percent, a column each."""
    kinds = list(next(iter(columns.values())).by_kind)
    lines = ["| kind | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for kind in kinds:
        lines.append(f"| {kind} | " + " | ".join(f"{100 * c.by_kind[kind]:.1f}" for c in columns.values()) + " |")
    lines.append("| overall | " + " | ".join(f"{100 * c.overall:.1f}" for c in columns.values()) + " |")
    return "\n".join(lines)


def _score(questions: Sequence[Question], right: Sequence[bool]) -> Accuracy:
    by_kind: defaultdict[str, list[bool]] = defaultdict(list)
    for question, is_right in zip(questions, right, strict=True):
        by_kind[question.kind].append(is_right)
    return Accuracy(
        overall=sum(right) / len(right),
        by_kind={kind: sum(answers) / len(answers) for kind, answers in by_kind.items()},
    )


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
    click.echo(
        format_table(
            {
                "accuracy %": measure_accuracy(model, processor, questions),
                "blank image %": measure_accuracy(model, processor, questions, blank=True),
                "most frequent answer %": majority_accuracy(questions),
            }
        )
    )


if __name__ == "__main__":
    main()
