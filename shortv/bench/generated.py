"""A task in memory, whose documents are all alike: what a campaign costs beside a task's own code."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shortv.evals.benchmark import Benchmark
from shortv.evals.dispatch import Response
from shortv.evals.judging import Judge
from shortv.evals.scoring import Label, MetricRow, Metrics, ScoredSample

NAME = "generated"
_METRIC = "exact_match"
_COSTS = ("queue_ms", "prefill_ms", "prefill_batch", "decode_ms", "prompt_tokens", "visual_tokens", "completion_tokens")


class GeneratedTask(Benchmark):
    """So many documents with the same question, and the same photo where there is one.

    `photo` is an image file, which is decoded anew for each document, as tasks do. Without one, a text of `ready_bytes`
    stands for an encoded image that lies ready. Scoring gives every answer 1.
    """

    def __init__(self, *, documents: int, ready_bytes: int = 50_000, photo: str | None = None) -> None:
        self.name, self.seed, self.num_docs = NAME, 0, documents
        self.digest = "generated"
        self.unusable: dict[int, str] = {}
        self.documents = {NAME: {"test": range(documents)}}
        self._photo = Path(photo).read_bytes() if photo else None
        self._text = "?" if photo else "x" * ready_bytes

    @cached_property
    def document_digests(self) -> NDArray[np.int64]:
        """The position of each document."""
        return np.arange(self.num_docs, dtype=np.int64)

    def digest_of(self, doc: int) -> int:
        """Return the position."""
        return doc

    @property
    def main_metric(self) -> str:
        """The only metric."""
        return _METRIC

    def _message(self, _: int) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self._text}]
        if self._photo is not None:
            content.insert(0, {"type": "image", "url": Image.open(io.BytesIO(self._photo)).convert("RGB")})
        return [{"role": "user", "content": content}]

    def instances(self, docs: Iterable[int]) -> list[Any]:
        """Return objects with what is read of lmms-eval's instances."""
        return [
            SimpleNamespace(
                request_type="generate_until",
                task_name=NAME,
                idx=0,
                doc_id=doc,
                repeats=1,
                args=("", self._message, {"max_new_tokens": 8}, doc, NAME, "test"),
            )
            for doc in docs
        ]

    def label(self, doc: int) -> Label:
        """Return the label of a document."""
        return Label(str(doc), "red", None)

    def score(
        self, docs: Iterable[int], responses: Sequence[Response], *, judge: Judge | None = None
    ) -> list[ScoredSample]:
        """Return each answer with the score 1, or its failure."""
        return [self._sample(doc, response) for doc, response in zip(docs, responses, strict=True)]

    def _sample(self, doc: int, response: Response) -> ScoredSample:
        label = self.label(doc)._asdict()
        if response.failure is not None:
            return ScoredSample(doc=doc, **label, prediction=None, error=f"answer: {response.failure.message}")
        [completion] = response.completions
        return ScoredSample(
            doc=doc,
            **label,
            prediction=completion.text,
            scores={_METRIC: 1.0},
            latency_ms=response.latency_ms,
            values="1",
            **{name: getattr(completion, name) for name in _COSTS},
        )

    def aggregate(self, values: Iterable[str], *, judge: Judge | None = None, folder: str | None = None) -> Metrics:
        """Return the mean of the scores."""
        count = sum(1 for _ in values)
        return Metrics((MetricRow(metric=_METRIC, filter="none", value=1.0, stderr=0.0, n=count),))
