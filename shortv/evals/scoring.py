"""Scores of a task's documents and its metrics, by lmms-eval's own functions, without the documents that failed.

Documents are scored as their answers come (`score`). What a task's functions return for a document is kept as text
(`ScoredSample.values`), from which the metrics are computed when all documents are there (`aggregate`).
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import numpy as np

from shortv.errors import ShortVError, one_line
from shortv.evals.dispatch import Response
from shortv.evals.judging import Judge
from shortv.request import Likelihood

# What `python -m lmms_eval` takes out of answers before it scores them, unless a task says otherwise.
_REASONING_TAGS: Final = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
# What lmms-eval adds per metric for tasks that repeat their requests.
_OF_REPEATS: Final = ("expected_accuracy", "consensus_accuracy", "internal_variance", "consistency_rate")
_COSTS: Final = (
    *("queue_ms", "preprocess_ms", "vision_ms", "prefill_ms", "decode_ms", "busy_ms"),
    *("prompt_tokens", "visual_tokens", "completion_tokens"),
)
# Marks a JSON object that stands for a value JSON does not have; no task has such a key.
_TAG: Final = "!python"


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric under one filter, over the `n` documents that it counts.

    `value` is None where the task's aggregation gives something else than a number (a table, a submission file).
    The other two errors are lmms-eval's `stderr_clt` and `stderr_clustered`.
    """

    metric: str
    filter: str
    value: float | None
    stderr: float | None
    n: int
    stderr_clt: float | None = None
    stderr_clustered: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSample:
    """One document: its answer with its scores, or why it has none. Costs are sums over its requests."""

    doc: int
    """Position of the document in the task."""
    sample_id: str
    prediction: str | None
    """The completion, one line per round or repeat; of a multiple choice, the most likely one."""
    target: str | None
    kind: str | None = None
    """Kind of the question, where the task's document has one."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Values by metric under the first filter; under further filters by "metric,filter"."""
    error: str | None = None
    """`answer: ...` where a request failed, `score: ...` where the task's own code failed."""
    latency_ms: float | None = None
    queue_ms: float | None = None
    preprocess_ms: float | None = None
    vision_ms: float | None = None
    prefill_ms: float | None = None
    prefill_batch: int | None = None
    """The smallest batch in which one of its prompts was prefilled."""
    decode_ms: float | None = None
    busy_ms: float | None = None
    prompt_tokens: int | None = None
    visual_tokens: int | None = None
    completion_tokens: int | None = None
    exit_layer: int | None = None
    """After which layer its visual tokens left, if its completions agree on one."""
    responses: str | None = None
    """The responses as JSON where they are there and scoring them failed, so that they can be scored again."""
    values: str | None = None
    """What the task's functions returned for it, as JSON, for `aggregate`; None after an error."""


class Metrics(NamedTuple):
    """The metrics over the documents without an error; where a task's own aggregation fails, `problem` says why."""

    rows: tuple[MetricRow, ...]
    problem: str | None = None


@dataclass(slots=True)
class _Document:
    """One document on its way to its scores.

    `instances` hold their responses in lmms-eval's form. `values` is what process_results returns, by filter and
    metric; `repeated` holds the values of each repeat alone, for tasks that score their repeats apart.
    """

    instances: list[Any] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    values: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    repeated: dict[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    error: str | None = None


class Label(NamedTuple):
    """What is the same for a document under every plan: its id, its reference, and the kind of its question."""

    sample_id: str
    target: str | None
    kind: str | None


def label_of(task: Any, doc_id: int, sample_id: str) -> Label:
    """Return the label of a document; columns that only people read are None where the task's code fails."""
    try:
        doc = task.eval_docs_no_media[doc_id]
    except Exception:  # third-party data
        return Label(sample_id, None, None)
    kind = doc.get("kind") if isinstance(doc, Mapping) else None
    return Label(sample_id, _target(task, doc), kind if isinstance(kind, str) else None)


def score(
    task: Any,
    *,
    instances: Sequence[Any],
    responses: Sequence[Response],
    label: Callable[[int], Label],
    seed: int,
    judge: Judge,
) -> list[ScoredSample]:
    """Score the responses to lmms-eval's instances, given in the same order; returns the documents in their order.

    A document's scores do not depend on which others are scored with it.

    Args:
        label: from the position of a document to its label.
        judge: answers the task's calls to an LLM judge; a document with a failed one gets an error.
    """
    documents = _by_document(task, instances, responses)
    answered = {at: document for at, document in documents.items() if document.error is None}
    _process_all(task, answered, seed, judge)
    return [_sample(task, at, label(at), document) for at, document in documents.items()]


def aggregate(name: str, task: Any, values: Iterable[str], *, judge: Judge, folder: str | None = None) -> Metrics:
    """Compute a task's metrics from the `values` of its documents without an error, in their order.

    Args:
        folder: where tasks that write files (submissions) write them; None throws them away.
    """
    try:
        with judge.scoring():
            return Metrics(_aggregate(name, task, map(_loaded, values), folder))
    except Exception as error:  # tasks run third-party code
        return Metrics((), f"the metrics of task {name!r} cannot be computed: {_line(error)}")


def _by_document(task: Any, instances: Sequence[Any], responses: Sequence[Response]) -> dict[int, _Document]:
    """Return documents by their number, each with copies of its instances, which hold the responses."""
    by_instance: dict[int, tuple[Any, list[Response]]] = {}
    for instance, response in zip(instances, responses, strict=True):
        by_instance.setdefault(id(instance), (instance, []))[1].append(response)
    documents: dict[int, _Document] = {}
    # As lmms-eval sorts a document's requests before it scores them.
    for instance, given in sorted(by_instance.values(), key=lambda pair: pair[0].idx):
        document = documents.setdefault(instance.doc_id, _Document())
        document.responses += given
        failure = next((one.failure for one in given if one.failure), None)
        if failure and document.error is None:
            document.error = f"answer: {failure.reason.value}: {failure.message}"
        resps = [] if failure else [_in_lmms_form(task, instance, response) for response in given]
        document.instances.append(
            replace(instance, resps=resps, filtered_resps={}, raw_filtered_resps={}, token_counts=[])
        )
    return dict(sorted(documents.items()))


def _in_lmms_form(task: Any, instance: Any, response: Response) -> Any:
    if response.likelihood is not None:
        log_probability, is_greedy = response.likelihood.log_probability, response.likelihood.is_greedy
        # lmms-eval's multiple choice takes the smallest number for the best: its models return losses.
        return (-log_probability if task.OUTPUT_TYPE == "multiple_choice" else log_probability, is_greedy)
    return list(response.texts) if instance.request_type == "generate_until_multi_round" else response.texts[0]


def _process_all(task: Any, documents: Mapping[int, _Document], seed: int, judge: Judge) -> None:
    """Filter and score documents that are answered; one on which the task's code fails does not affect the others."""
    try:
        # All at once, as lmms-eval does.
        _apply_filters(task, [instance for document in documents.values() for instance in document.instances])
        filtered = True
    except Exception:  # filters are third-party code; which document they fail on is found one by one
        filtered = False
    docs = task.eval_docs_no_media
    for doc_id, document in documents.items():
        try:
            if not filtered:
                _apply_filters(task, document.instances)
            # Some tasks guess where an answer says nothing; a guess must not depend on the other documents.
            with drawing_from(seed, doc_id), judge.scoring(doc_id):
                _process_filtered(task, docs[doc_id], document)
        except Exception as error:  # tasks run third-party code
            document.error = f"score: {_line(error)}"


def _apply_filters(task: Any, instances: Sequence[Any]) -> None:
    # lmms-eval gives filters all documents, which is right only while none is missing.
    docs = _Selected(task.eval_docs_no_media, [instance.doc_id for instance in instances])
    for ensemble in task._filters:
        ensemble.apply(list(instances), docs)


class _Selected:
    """A selection of a data set that is made when it is used: it takes milliseconds, and most filters use none."""

    def __init__(self, docs: Any, at: Sequence[int]) -> None:
        self._docs, self._at = docs, at

    @cached_property
    def _made(self) -> Any:
        return self._docs.select(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, key: Any) -> Any:
        return self._made[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)


def _process_filtered(task: Any, doc: Any, document: _Document) -> None:
    tags = reasoning_tags(task)
    # lmms-eval tries five times, two seconds apart, as if only connections could fail.
    once = getattr(task.process_results, "__wrapped__", None)

    def process(responses: list[Any]) -> dict[str, Any]:
        return dict(once(task, doc, responses) if once else task.process_results(doc, responses))

    for name in document.instances[0].filtered_resps:
        responses = [_without_reasoning(instance.filtered_resps[name], tags) for instance in document.instances]
        document.values[name] = process(responses)
        if 1 < (task.config.repeats or 1) == len(responses):
            each = [process([response]) for response in responses]
            document.repeated[name] = {metric: [scores[metric] for scores in each] for metric in each[0]}


def reasoning_tags(task: Any) -> Any:
    """Return the tags between which a model thinks aloud, or None where the task keeps such text."""
    from lmms_eval.api.reasoning import parse_reasoning_tags_config

    return parse_reasoning_tags_config(cli_value=_REASONING_TAGS, task_value=task.config.reasoning_tags)


def _without_reasoning(response: Any, tags: Any) -> Any:
    from lmms_eval.api.reasoning import strip_reasoning_tags

    if isinstance(response, list):
        return [_without_reasoning(item, tags) if isinstance(item, str) else item for item in response]
    return strip_reasoning_tags(response, tags) if tags is not None and isinstance(response, str) else response


@contextmanager
def drawing_from(*key: object) -> Iterator[None]:
    """Make random numbers of third-party code depend on this key alone; the process's own state is restored."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(repr(key))
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _line(error: Exception) -> str:
    return one_line(error) if isinstance(error, ShortVError) else f"{type(error).__name__}: {one_line(error)}"


def _sample(task: Any, doc_id: int, label: Label, document: _Document) -> ScoredSample:
    answered = all(response.failure is None for response in document.responses)
    values = None
    if document.error is None:
        try:
            values = json.dumps(_storable({"values": document.values, "repeated": document.repeated}))
        except TypeError as error:
            document.error = f"score: {one_line(error)}"
    return ScoredSample(
        doc=doc_id,
        **label._asdict(),
        prediction=_prediction(document) if answered else None,
        scores={} if document.error else dict(_scores(task, document)),
        error=document.error,
        latency_ms=sum(response.latency_ms for response in document.responses),
        responses=_dumped(document.responses) if answered and document.error else None,
        values=values,
        **(_costs(document) if answered else {}),
    )


def _storable(value: Any) -> Any:
    """Return a value as JSON has it, with tags where reading has to give back another type. Raises TypeError."""
    if isinstance(value, np.ndarray | np.generic):
        return _storable(value.tolist())
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {str(key): _storable(item) for key, item in value.items()}
        return {_TAG: "dict", "items": [[_storable(key), _storable(item)] for key, item in value.items()]}
    if isinstance(value, tuple | set | frozenset):
        kind = "tuple" if isinstance(value, tuple) else "set"
        return {_TAG: kind, "items": [_storable(item) for item in value]}
    raise TypeError(f"the task returns a {type(value).__name__}, which cannot be stored")


def _loaded(text: str) -> Any:
    def restored(value: dict[str, Any]) -> Any:
        kind = value.get(_TAG)
        return {"tuple": tuple, "set": set, "dict": dict}[kind](value["items"]) if kind else value

    return json.loads(text, object_hook=restored)


def _dumped(responses: Sequence[Response]) -> str:
    found = [
        [list(one.texts), one.likelihood and [one.likelihood.log_probability, one.likelihood.is_greedy]]
        for one in responses
    ]
    return json.dumps(found)


def stored_responses(text: str) -> list[Response]:
    """Return the responses of `ScoredSample.responses`: their texts and likelihoods, without times."""
    return [
        Response(
            texts=tuple(texts),
            likelihood=likelihood and Likelihood(log_probability=likelihood[0], is_greedy=likelihood[1]),
        )
        for texts, likelihood in json.loads(text)
    ]


def _scores(task: Any, document: _Document) -> Iterator[tuple[str, float]]:
    for at, (chosen, by_metric) in enumerate(document.values.items()):
        for metric, value in by_metric.items():
            # Tasks that need more than a number to aggregate keep it under this key, as lmms-eval reads it.
            inner = value.get(task.config.score_key) if isinstance(value, Mapping) else value
            if (number := _number(inner)) is not None:
                yield (f"{metric},{chosen}" if at else metric), number


def _prediction(document: _Document) -> str:
    likelihoods = [response.likelihood for response in document.responses if response.likelihood]
    if not likelihoods:
        return "\n".join(text for response in document.responses for text in response.texts)
    if len(likelihoods) == 1:
        return str(likelihoods[0].log_probability)
    best = max(range(len(likelihoods)), key=lambda at: likelihoods[at].log_probability)
    return str(document.instances[best].args[1]).strip()


def _target(task: Any, doc: Any) -> str | None:
    try:
        target = task.doc_to_target(doc)
        if task.config.doc_to_choice is not None and isinstance(target, int):
            target = task.doc_to_choice(doc)[target]
    except Exception:  # third-party code, for a column that only people read
        return None
    return target if isinstance(target, str) else json.dumps(target, default=str)


def _costs(document: _Document) -> dict[str, Any]:
    results = [result for response in document.responses for result in response.results]
    if not results:
        return {}
    exits = {result.exit_layer for result in results}
    sums = {name: sum(getattr(result, name, 0) for result in results) for name in _COSTS}
    batch = min(result.prefill_batch for result in results)
    return sums | {"prefill_batch": batch, "exit_layer": exits.pop() if len(exits) == 1 else None}


def _aggregate(name: str, task: Any, documents: Iterable[Any], folder: str | None) -> tuple[MetricRow, ...]:
    """Compute the metrics from what was kept of documents, in their order; without documents there are none."""
    # The module takes seconds to import.
    from lmms_eval.evaluator_utils import TaskOutput

    output = TaskOutput.from_taskdict(name, task)
    for document in documents:
        for kept, found in ((output.sample_metrics, "values"), (output.per_sample_metrics, "repeated")):
            for chosen, values in document[found].items():
                for metric, value in values.items():
                    kept[metric, chosen].append(value)
    before = getattr(task, "args", None)
    try:
        # lmms-eval shows bars and lines of its own for errors that it bootstraps.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            TemporaryDirectory(prefix="shortv-submissions-") as thrown_away,
        ):
            # Tasks read from the arguments of lmms-eval's command where to write.
            task.args = SimpleNamespace(output_path=folder or thrown_away, log_samples_suffix="")
            output.calculate_aggregate_metric()
            output.calculate_clt_aggregate_metric()
            output.calculate_stability_metrics()
    finally:
        task.args = before
    return tuple(row for key in output.sample_metrics for row in _rows(output, *key))


def _rows(output: Any, metric: str, chosen: str) -> Iterator[MetricRow]:
    found, n = output.agg_metrics, len(output.sample_metrics[metric, chosen])
    if f"{metric},{chosen}" not in found:
        return
    errors = [_number(found.get(f"{metric}_{kind},{chosen}")) for kind in ("stderr", "stderr_clt", "stderr_clustered")]
    yield MetricRow(metric, chosen, _number(found[f"{metric},{chosen}"]), errors[0], n, errors[1], errors[2])
    for kind in _OF_REPEATS:
        if f"{metric}_{kind},{chosen}" in found:
            yield MetricRow(f"{metric}_{kind}", chosen, _number(found[f"{metric}_{kind},{chosen}"]), None, n)


def _number(value: Any) -> float | None:
    """Return a number of any library as a float, and None for anything else."""
    return float(value) if isinstance(value, Real) else None
