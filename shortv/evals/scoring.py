"""Replies to a task's requests, as samples with scores or errors, and metrics over those that have answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shortv.errors import ShortVError
from shortv.evals.aggregation import MetricRow, aggregate, number_of
from shortv.evals.asking import Reply
from shortv.evals.marking import Marked, mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One document: its answer with its scores, or why it has none. Costs are sums over its requests."""

    sample_id: str
    prediction: str | None
    """The answer, one line per round or repeat; of a multiple choice, the likeliest one."""
    target: str | None
    kind: str | None = None
    """Kind of the question, where the task's document has one."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Values by metric under the first filter; under further filters by "metric,filter"."""
    error: str | None = None
    """`answer: ...` where a question had none, `score: ...` where the task's own code failed on it."""
    latency_ms: float | None = None
    queue_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    prompt_tokens: int | None = None
    visual_tokens: int | None = None
    completion_tokens: int | None = None
    exit_layer: int | None = None
    """After which layer its visual tokens left, where its answers agree on one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """All documents of a run, each once and in order, and the metrics over those without an error.

    Where the task's own aggregation fails there are no metrics, and `problem` says why.
    """

    samples: tuple[Sample, ...]
    metrics: tuple[MetricRow, ...]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Document:
    """One document's requests, each with its replies."""

    instances: list[Any]
    replies: list[list[Reply]]

    @property
    def failure(self) -> str | None:
        failures = [reply.failure for replies in self.replies for reply in replies if reply.failure]
        return f"answer: {failures[0].reason.value}: {failures[0].message}" if failures else None


def score(
    name: str,
    task: Any,
    *,
    instances: Sequence[Any],
    replies: Sequence[Sequence[Reply]],
    names: Sequence[str],
    seed: int,
    folder: str | None,
) -> Scored:
    """Score a task's requests (lmms-eval's instances), given the replies to each; `names` are all documents' ids."""
    documents = _by_document(instances, replies)
    answered = {doc_id: _responded(task, doc) for doc_id, doc in documents.items() if doc.failure is None}
    marked = mark(task, answered, seed)
    samples = [
        _sample(task, doc_id, names[doc_id], document, marked.get(doc_id)) for doc_id, document in documents.items()
    ]
    kept = [found for doc_id in documents if isinstance(found := marked.get(doc_id), Marked)]
    try:
        return Scored(samples=tuple(samples), metrics=aggregate(name, task, kept, folder))
    except ShortVError as error:
        return Scored(samples=tuple(samples), metrics=(), problem=str(error))


def _by_document(instances: Sequence[Any], replies: Sequence[Sequence[Reply]]) -> dict[int, _Document]:
    documents: dict[int, _Document] = {}
    # As lmms-eval sorts a document's requests before it scores them.
    for instance, given in sorted(zip(instances, replies, strict=True), key=lambda pair: pair[0].idx):
        document = documents.setdefault(instance.doc_id, _Document([], []))
        document.instances.append(instance)
        document.replies.append(list(given))
    return dict(sorted(documents.items()))


def _responded(task: Any, document: _Document) -> list[Any]:
    """Copies of the requests with their responses in lmms-eval's form."""
    return [
        replace(
            instance,
            resps=[_response(task, instance, reply) for reply in replies],
            filtered_resps={},
            raw_filtered_resps={},
            token_counts=[],
        )
        for instance, replies in zip(document.instances, document.replies, strict=True)
    ]


def _response(task: Any, instance: Any, reply: Reply) -> Any:
    if reply.likelihood is not None:
        log_probability, is_greedy = reply.likelihood
        # lmms-eval's multiple choice takes the smallest number for the best: its models give losses.
        return (-log_probability if task.OUTPUT_TYPE == "multiple_choice" else log_probability, is_greedy)
    return list(reply.texts) if instance.request_type == "generate_until_multi_round" else reply.texts[0]


def _sample(task: Any, doc_id: int, name: str, document: _Document, marked: Marked | str | None) -> Sample:
    failure = f"score: {marked}" if isinstance(marked, str) else document.failure
    replies = [reply for each in document.replies for reply in each]
    return Sample(
        sample_id=name,
        prediction=None if document.failure else _prediction(document),
        target=_target(task, doc_id),
        kind=_kind(task, doc_id),
        scores=dict(_scores(task, marked)) if isinstance(marked, Marked) else {},
        error=failure,
        latency_ms=sum(reply.latency_ms for reply in replies),
        **(_costs(replies) if document.failure is None else {}),
    )


def _scores(task: Any, marked: Marked) -> Iterator[tuple[str, float]]:
    for at, (chosen, values) in enumerate(marked.values.items()):
        for metric, value in values.items():
            # Tasks that need more than a number to aggregate keep it under this key, as lmms-eval reads it.
            inner = value.get(task.config.score_key) if isinstance(value, Mapping) else value
            number = number_of(inner)
            if number is not None:
                yield (f"{metric},{chosen}" if at else metric), number


def _prediction(document: _Document) -> str:
    scores = [reply.likelihood for replies in document.replies for reply in replies if reply.likelihood]
    if not scores:
        return "\n".join(text for replies in document.replies for reply in replies for text in reply.texts)
    if len(scores) == 1:
        return str(scores[0].log_probability)
    best = max(range(len(scores)), key=lambda at: scores[at].log_probability)
    return str(document.instances[best].args[1]).strip()


def _target(task: Any, doc_id: int) -> str | None:
    try:
        doc = task.eval_docs_no_media[doc_id]
        target = task.doc_to_target(doc)
        if task.config.doc_to_choice is not None and isinstance(target, int):
            target = task.doc_to_choice(doc)[target]
    except Exception:  # third-party code, for a column that only people read
        return None
    return target if isinstance(target, str) else json.dumps(target, default=str)


def _kind(task: Any, doc_id: int) -> str | None:
    try:
        kind = task.eval_docs_no_media[doc_id].get("kind")
    except Exception:  # third-party data, for a column that groups questions
        return None
    return kind if isinstance(kind, str) else None


def _costs(replies: Sequence[Reply]) -> dict[str, Any]:
    answers = [answer for reply in replies for answer in reply.answers]
    names = ("queue_ms", "prefill_ms", "decode_ms", "prompt_tokens", "visual_tokens", "completion_tokens")
    if not answers:
        return {}
    exits = {answer.exit_layer for answer in answers}
    sums = {name: sum(getattr(answer, name) for answer in answers) for name in names}
    return sums | {"exit_layer": exits.pop() if len(exits) == 1 else None}
