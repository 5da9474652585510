"""One lmms-eval task whose requests go to replicas, scored without the documents that have no answer."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shortv.errors import Refused, ShortVError, one_line
from shortv.evals.dispatch import Client, Response, send_all
from shortv.evals.requests import Conversation, Documents
from shortv.evals.scoring import Scored, drawing_from, reasoning_tags, score
from shortv.evals.tasks import IncludePath, document_names, find_task, loading_tasks, task_digest

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
            Refused: an unknown task or a group of tasks, or requests that replicas cannot answer.
            ShortVError: the task's data or code cannot be loaded.
        """
        self.name = task
        self._seed = seed
        with loading_tasks():
            self._task = _load(task, include_path)
            total = len(self._task.eval_docs)
            wanted = total if limit is None else limit * total if limit < 1 else limit
            self.num_docs = min(math.ceil(wanted), total)
            _configure(self._task, gen_kwargs or {}, seed)
            instances = self._instances()
            documents = self._task.eval_docs_no_media
            self.digest = task_digest(
                vars(self._task.config),
                (documents[at] for at in range(self.num_docs)),
                form=type(self._task).__name__,
                seed=seed,
            )
        self.documents: Documents = {task: self._task.dataset, self._task.config.task: self._task.dataset}
        self._names = document_names(documents)
        for instance in instances:
            # Settings that no replica has are refused before any work starts.
            Conversation(instance, self.documents).settings.sampling_params()
        self.instances: Sequence[Any] = tuple(one for one in instances for _ in range(one.repeats))
        """lmms-eval's instances in its order, each as often as the task repeats it."""

    def _instances(self) -> list[Any]:
        try:
            # lmms-eval's progress bar cannot be turned off.
            with contextlib.redirect_stderr(io.StringIO()), drawing_from(self._seed, self.name):
                self._task.build_all_requests(limit=self.num_docs)
        except Exception as error:  # tasks run third-party code
            message = f"{type(error).__name__}: {one_line(error)}"
            raise ShortVError(f"the requests of task {self.name!r} cannot be made: {message}") from error
        return list(self._task.instances)

    @property
    def main_metric(self) -> str | None:
        """The first metric of the task that is better when higher, None where it names none."""
        better = self._task.higher_is_better()
        return next((metric for metric, higher in better.items() if higher), None)

    async def run(self, client: Client, **how: Any) -> list[Response]:
        """Send all requests, as `send_all` says; returns the responses in the order of `instances`."""
        return await send_all(client, self.instances, self.documents, seed=self._seed, **how)

    def score(self, responses: Sequence[Response], *, folder: str | None = None) -> Scored:
        """Score the responses to `instances`, given in the same order.

        Args:
            folder: where tasks that write files (submissions) write them; by default they are thrown away.
        """
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
