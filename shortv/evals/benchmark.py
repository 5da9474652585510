"""One lmms-eval task whose requests go to replicas, scored without the documents that have no answer."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, Final

from shortv.errors import Refused, ShortVError, one_line
from shortv.evals.dispatch import Client, OnResponse, Response, send_all
from shortv.evals.requests import Conversation, Documents, sampling_params
from shortv.evals.scoring import Scored, drawing_from, reasoning_tags, score
from shortv.evals.tasks import IncludePath, TaskIndex, document_names, loading_tasks, task_digest
from shortv.request import FULL_MODEL

# lmms-eval's chat form has requests for generation only.
_CHAT_OUTPUTS: Final = ("generate_until", "generate_until_multi_round")


class Benchmark:
    """The first `limit` documents of a task, loaded once, to be completed and scored under any number of plans.

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
            Refused: an unknown task or a group of tasks, an invalid limit, or requests that replicas cannot answer.
            ShortVError: the task's data or code cannot be loaded.
        """
        self.name = task
        self._seed = seed
        with loading_tasks():
            self._task = _load(TaskIndex(_folders(include_path)), task)
            self.num_docs = _count(limit, len(self._task.eval_docs))
            _configure(self._task, gen_kwargs or {}, seed)
            instances = _instances(self._task, task, self.num_docs, seed)
            self.digest = self._digest(seed)
        self.documents: Documents = {task: self._task.dataset, self._task.config.task: self._task.dataset}
        self._names = document_names(self._task.eval_docs_no_media)
        for instance in instances:
            # Settings that no replica has are refused before any work starts.
            sampling_params(Conversation(instance, self.documents).gen_kwargs)
        self.instances: Sequence[Any] = tuple(one for one in instances for _ in range(one.repeats))
        """lmms-eval's instances in its order, each as often as the task repeats it."""

    @property
    def main_metric(self) -> str | None:
        """The first metric of the task that is better when higher, None where it names none."""
        better = self._task.higher_is_better()
        return next((metric for metric, higher in better.items() if higher), None)

    async def run(
        self,
        client: Client,
        *,
        plan: str = FULL_MODEL,
        concurrency: int,
        timeout_s: float = 600.0,
        on_response: OnResponse | None = None,
    ) -> list[Response]:
        """Send all requests under a plan; returns the responses in the order of `instances`. See `send_all`."""
        return await send_all(
            client,
            self.instances,
            self.documents,
            plan=plan,
            seed=self._seed,
            concurrency=concurrency,
            timeout_s=timeout_s,
            on_response=on_response,
        )

    def score(self, responses: Sequence[Response], *, folder: str | None = None) -> Scored:
        """Score the responses to `instances`, given in the same order.

        Args:
            folder: where tasks that write files (submissions) write them; by default they are thrown away.
        """
        if len(responses) != len(self.instances):
            raise ValueError(f"{len(responses)} responses to {len(self.instances)} instances of {self.name}")
        with loading_tasks():
            return score(
                self.name,
                self._task,
                instances=self.instances,
                responses=responses,
                names=self._names,
                seed=self._seed,
                folder=folder,
            )

    def _digest(self, seed: int) -> str:
        documents = self._task.eval_docs_no_media
        return task_digest(
            vars(self._task.config),
            (documents[at] for at in range(self.num_docs)),
            form=type(self._task).__name__,
            seed=seed,
        )


def _folders(include_path: IncludePath) -> list[str | os.PathLike[str]]:
    given = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path or ())
    return [*given, str(resources.files("shortv") / "tiny" / "task")]


def _load(index: TaskIndex, name: str) -> Any:
    task = index.load(name, "chat")
    output = task.OUTPUT_TYPE
    if output in _CHAT_OUTPUTS:
        return task
    if output == "multiple_choice" or (output == "loglikelihood" and callable(task.config.process_results)):
        return index.load(name, "simple")
    why = "lmms-eval's own scoring of it fails" if output == "loglikelihood" else "replicas do not support that"
    raise Refused(
        f"task {name!r} is of output_type {output}, and {why}; choose a task of output_type "
        f"{', '.join(_CHAT_OUTPUTS)} or multiple_choice"
    )


def _count(limit: int | float | None, total: int) -> int:
    if limit is None:
        return total
    share = 0 < limit < 1
    if not share and not (limit >= 1 and float(limit).is_integer()):
        raise Refused(f"limit {limit} is neither a number of documents nor a share of them; give 1, 2, ... or 0.5")
    return math.ceil(total * limit) if share else min(int(limit), total)


def _configure(task: Any, gen_kwargs: Mapping[str, Any], seed: int) -> None:
    if gen_kwargs and "generate_until" in task.OUTPUT_TYPE:
        task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)
    if task.config.auto_strip_thinking and reasoning_tags(task) is None:
        from lmms_eval.filters.transformation import StripThinkingFilter

        for ensemble in task._filters:
            ensemble.filters.insert(0, StripThinkingFilter())


def _instances(task: Any, name: str, count: int, seed: int) -> list[Any]:
    try:
        with _silent(), drawing_from(seed, name):
            task.build_all_requests(limit=count)
    except Exception as error:  # tasks run third-party code
        raise ShortVError(
            f"the requests of task {name!r} cannot be made: {type(error).__name__}: {one_line(error)}"
        ) from error
    return list(task.instances)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep lmms-eval's progress bar, which cannot be turned off, out of the user's terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
