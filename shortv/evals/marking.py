"""A task's own scores of single documents: lmms-eval's filters, then its process_results."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np

# What `python -m lmms_eval` takes out of answers before it scores them, unless a task says otherwise.
_REASONING_TAGS: Final = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'


class Marked(NamedTuple):
    """What process_results says of a document: values by metric, under each filter.

    `repeated` holds the values of each repeat alone, for tasks that score their repeats apart.
    """

    values: Mapping[str, Mapping[str, Any]]
    repeated: Mapping[str, Mapping[str, Sequence[Any]]]


def mark(task: Any, documents: Mapping[int, Sequence[Any]], seed: int) -> dict[int, Marked | str]:
    """Score documents, given as their lmms-eval instances with responses; text in place of scores is an error.

    A document on which the task's code fails takes no other with it.
    """
    found: dict[int, Marked | str] = dict(_filter(task, documents))
    docs = task.eval_docs_no_media
    for doc_id, instances in documents.items():
        if doc_id in found:
            continue
        try:
            # Some tasks guess where an answer says nothing; a guess must not depend on the other documents.
            with drawing_from(seed, doc_id):
                found[doc_id] = _mark(task, docs[doc_id], instances)
        except Exception as error:  # tasks run third-party code
            found[doc_id] = _line(error)
    return found


def _filter(task: Any, documents: Mapping[int, Sequence[Any]]) -> dict[int, str]:
    """Filter all responses at once, as lmms-eval does, or where that fails document by document."""
    try:
        _apply_filters(task, [instance for instances in documents.values() for instance in instances])
    except Exception:  # filters are third-party code; what failed is found below
        return {doc_id: error for doc_id, instances in documents.items() if (error := _fault(task, instances))}
    return {}


def _fault(task: Any, instances: Sequence[Any]) -> str | None:
    try:
        _apply_filters(task, instances)
    except Exception as error:
        return _line(error)
    return None


def _apply_filters(task: Any, instances: Sequence[Any]) -> None:
    # lmms-eval gives filters all documents, which is right only while none is missing.
    docs = task.eval_docs_no_media.select([instance.doc_id for instance in instances])
    for ensemble in task._filters:
        ensemble.apply(list(instances), docs)


def _mark(task: Any, doc: Any, instances: Sequence[Any]) -> Marked:
    tags = reasoning_tags(task)
    values, repeated = {}, {}
    for name in instances[0].filtered_resps:
        responses = [_without_reasoning(instance.filtered_resps[name], tags) for instance in instances]
        values[name] = dict(_process(task, doc, responses))
        if 1 < (task.config.repeats or 1) == len(responses):
            each = [_process(task, doc, [response]) for response in responses]
            repeated[name] = {metric: [scores[metric] for scores in each] for metric in each[0]}
    return Marked(values, repeated)


def _process(task: Any, doc: Any, responses: list[Any]) -> Mapping[str, Any]:
    # lmms-eval tries five times, two seconds apart, as if all that can fail were a connection.
    once = getattr(task.process_results, "__wrapped__", None)
    found: Mapping[str, Any] = once(task, doc, responses) if once else task.process_results(doc, responses)
    return found


def reasoning_tags(task: Any) -> Any:
    """The tags between which a model thinks aloud, or None where the task wants it left in."""
    from lmms_eval.api.reasoning import parse_reasoning_tags_config

    return parse_reasoning_tags_config(cli_value=_REASONING_TAGS, task_value=task.config.reasoning_tags)


def _without_reasoning(response: Any, tags: Any) -> Any:
    from lmms_eval.api.reasoning import strip_reasoning_tags

    if tags is None:
        return response
    if isinstance(response, list):
        return [_without_reasoning(item, tags) if isinstance(item, str) else item for item in response]
    return strip_reasoning_tags(response, tags) if isinstance(response, str) else response


@contextmanager
def drawing_from(*key: object) -> Iterator[None]:
    """Let what third-party code draws by lot depend on this key alone; the process draws on as before."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(repr(key))
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
