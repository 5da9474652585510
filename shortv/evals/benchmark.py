"""One lmms-eval task: its requests for replicas, and the scores of its documents, without those that have no answer."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shortv.errors import Refused, ShortVError, one_line
from shortv.evals.dispatch import Response
from shortv.evals.judging import Judge
from shortv.evals.requests import Conversation, Documents, as_array
from shortv.evals.scoring import Label, Metrics, ScoredSample, aggregate, drawing_from, label_of, reasoning_tags, score
from shortv.evals.tasks import IncludePath, document_digest, document_names, find_task, loading_tasks, task_digest
from shortv.request import Request

# lmms-eval's chat form has requests for generation only.
_CHAT_OUTPUTS: Final = ("generate_until", "generate_until_multi_round")
# Documents whose labels are kept: those that several plans are answering.
_LABELS: Final = 4096


class Benchmark:
    """The first `limit` documents of a task, to be answered and scored under any number of plans.

    lmms-eval's own evaluation cannot leave a document out; here one without an answer gets an error and counts in no
    metric. With an answer for each, metrics are those of `python -m lmms_eval` (its command's defaults).
    """

    def __init__(
        self,
        task: str,
        *,
        limit: int | float | None = None,
        include_path: IncludePath = None,
        gen_kwargs: Mapping[str, Any] | None = None,
        seed: int = 1234,
    ) -> None:
        """Load a task; the bundled ones are found without `include_path`.

        Args:
            limit: documents from the front, or below 1 their share of the task's documents; None for all.
            gen_kwargs: replaces entries of the task's generation settings.
            seed: for few-shot examples, sampled completions, and scores that are drawn at random.

        Raises:
            Refused: an unknown task or a group of tasks, or requests that replicas cannot answer.
            ShortVError: the task's data or code cannot be loaded.
        """
        self.name = task
        self.seed = seed
        with loading_tasks():
            self._task = _load(task, include_path)
            total = len(self._task.eval_docs)
            wanted = total if limit is None else limit * total if limit < 1 else limit
            self.num_docs = min(math.ceil(wanted), total)
            _configure(self._task, gen_kwargs or {}, seed)
            self.digest = task_digest(vars(self._task.config), form=type(self._task).__name__, seed=seed)
            self._check_settings()
        self.documents: Documents = {task: self._task.dataset, self._task.config.task: self._task.dataset}
        self.unusable: dict[int, str] = {}
        """Why documents have no instances; known after the first call of `instances`."""
        self._label = lru_cache(_LABELS)(lambda at: label_of(self._task, at, self._names[at]))

    def _check_settings(self) -> None:
        """Refuse settings that no replica has, before any work starts; a document that fails is an error of its own."""
        try:
            instances = self._built(1) if self.num_docs else []
        except Exception:  # tasks run third-party code
            return
        for instance in instances:
            Conversation(instance, {}).settings.sampling_params()

    def _built(self, count: int) -> list[Any]:
        """Return the instances of the first `count` documents; few-shot examples are drawn in the documents' order."""
        # lmms-eval's progress bar cannot be turned off.
        with contextlib.redirect_stderr(io.StringIO()), drawing_from(self.seed, self.name):
            self._task.build_all_requests(limit=count)
        return list(self._task.instances)

    def _built_alone(self, doc: int) -> list[Any]:
        """Return the instances of a document as `build_all_requests` makes them."""
        task, config = self._task, self._task.config
        context = task.fewshot_context(task.eval_docs_no_media[doc], config.num_fewshot, None, False, False, None)
        split = config.test_split if task.has_test_docs() else config.validation_split
        metadata = {"task": config.task, "doc_id": doc, "repeats": config.repeats, "split": split}
        found = task.construct_requests(doc_id=doc, ctx=context, metadata=metadata)
        return found if isinstance(found, list) else [found]

    @cached_property
    def document_digests(self) -> NDArray[np.int64]:
        """The digest of each document."""
        return np.fromiter(map(self.digest_of, range(self.num_docs)), np.int64, self.num_docs)

    def digest_of(self, doc: int) -> int:
        """Return the digest (64 bits) of a document without its media."""
        with loading_tasks():
            return document_digest(self._task.eval_docs_no_media[doc])

    @cached_property
    def _by_document(self) -> Mapping[int, list[Any]]:
        """The instances of each document; those of documents for which the task's code fails are missing."""
        found: dict[int, list[Any]] = {}
        with loading_tasks():
            try:
                instances = self._built(self.num_docs) if self.num_docs else []
            except Exception:  # tasks run third-party code; which documents it fails on is found one by one
                instances = self._built_one_by_one()
        for instance in instances:
            found.setdefault(instance.doc_id, []).extend([instance] * instance.repeats)
        return found

    def _built_one_by_one(self) -> list[Any]:
        instances = []
        with drawing_from(self.seed, self.name):
            for doc in range(self.num_docs):
                try:
                    instances += self._built_alone(doc)
                except Exception as error:  # tasks run third-party code
                    self.unusable[doc] = f"document {doc} gives no prompt: {type(error).__name__}: {one_line(error)}"
        return instances

    @cached_property
    def _names(self) -> list[str]:
        return document_names(self._task.eval_docs_no_media)

    @property
    def main_metric(self) -> str | None:
        """The first metric of the task that is better when higher, None where it names none."""
        better = self._task.higher_is_better()
        return next((metric for metric, higher in better.items() if higher), None)

    def instances(self, docs: Iterable[int]) -> list[Any]:
        """Return lmms-eval's instances of documents in its order, each as often as the task repeats it."""
        return [instance for doc in docs for instance in self._by_document.get(doc, ())]

    def label(self, doc: int) -> Label:
        """Return what is the same for a document under every plan."""
        return self._label(doc)

    def first_request(self, doc: int, *, timeout_s: float) -> Request | None:
        """Return the request of a document's first round, None where the task's code gives none."""
        try:
            instances = self.instances([doc])
            return Conversation(instances[0], self.documents).request(
                timeout_s=timeout_s, seed=self.seed, form=as_array
            )
        except (ShortVError, IndexError):
            return None

    def score(
        self, docs: Iterable[int], responses: Sequence[Response], *, judge: Judge | None = None
    ) -> list[ScoredSample]:
        """Score the responses to `instances(docs)`, given in the same order; `judge` knows earlier judge calls."""
        with loading_tasks():
            return score(
                self._task,
                instances=self.instances(docs),
                responses=responses,
                label=self._label,
                seed=self.seed,
                judge=judge or Judge(),
            )

    def aggregate(self, values: Iterable[str], *, judge: Judge | None = None, folder: str | None = None) -> Metrics:
        """Compute the metrics from `ScoredSample.values` of the documents without an error, as `scoring.aggregate`."""
        with loading_tasks():
            return aggregate(self.name, self._task, values, judge=judge or Judge(), folder=folder)


def _load(name: str, include_path: IncludePath) -> Any:
    load = find_task(name, include_path)
    task = load("chat")
    output = task.OUTPUT_TYPE
    if output in _CHAT_OUTPUTS:
        return task
    if output == "multiple_choice" or (output == "loglikelihood" and callable(task.config.process_results)):
        return load("simple")
    why = "lmms-eval's own scoring of it fails" if output == "loglikelihood" else "replicas do not support that"
    raise Refused(
        f"task {name!r} is of output_type {output}, and {why}; choose a task of output_type "
        f"{', '.join(_CHAT_OUTPUTS)} or multiple_choice"
    )


def _configure(task: Any, gen_kwargs: Mapping[str, Any], seed: int) -> None:
    """Apply what lmms-eval's command would: its flags, and the filter that removes what a model thinks aloud."""
    if gen_kwargs and "generate_until" in task.OUTPUT_TYPE:
        task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)
    if task.config.auto_strip_thinking and reasoning_tags(task) is None:
        from lmms_eval.filters.transformation import StripThinkingFilter

        for ensemble in task._filters:
            ensemble.filters.insert(0, StripThinkingFilter())
