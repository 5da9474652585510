"""One lmms-eval task whose requests go to replicas, scored without the documents that have no answer."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, Final

from shortv.errors import Refused, ShortVError
from shortv.evals.asking import Reply
from shortv.evals.asks import Ask, ask_of
from shortv.evals.index import TaskIndex, quiet_libraries
from shortv.evals.marking import drawing_from, reasoning_tags
from shortv.evals.scoring import Scored, score
from shortv.evals.task_digest import task_digest
from shortv.evals.tasks import IncludePath, document_names

# In lmms-eval's chat form only generation is asked for.
_CHAT_OUTPUTS: Final = ("generate_until", "generate_until_multi_round")


class Benchmark:
    """The first `limit` documents of a task, loaded once, to be asked and scored for any number of plans.

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
        """Load a task; the bundled one is found without `include_path`.

        Args:
            limit: documents from the front, or below 1 their share of the task's documents; None for all.
            gen_kwargs: replaces entries of the task's generation settings.
            seed: for few-shot examples, sampled answers, and scores that are drawn by lot.

        Raises:
            Refused: an unknown task or a group of tasks, a limit that is none, or what replicas cannot be asked.
            ShortVError: the task's data or code cannot be loaded.
        """
        self.name = task
        with quiet_libraries():
            self._task = _load(TaskIndex(_folders(include_path)), task)
            total = len(self._task.eval_docs)
            self.num_docs = _count(limit, total)
            _configure(self._task, gen_kwargs or {}, seed)
            self._instances = _instances(self._task, task, self.num_docs, seed)
            self.digest = self._digest(seed)
        documents = {task: self._task.dataset, self._task.config.task: self._task.dataset}
        # An instance is asked as often as its task repeats it.
        self._order = [at for at, instance in enumerate(self._instances) for _ in range(instance.repeats)]
        repeats = [repeat for instance in self._instances for repeat in range(instance.repeats)]
        self._asks = [
            ask_of(self._instances[at], documents, seed=seed, repeat=repeat)
            for at, repeat in zip(self._order, repeats, strict=True)
        ]
        self._names = document_names(self._task.eval_docs_no_media)
        self._seed = seed

    @property
    def main_metric(self) -> str | None:
        """The first metric of the task that is better when higher, None where it names none."""
        better = self._task.higher_is_better()
        return next((metric for metric, higher in better.items() if higher), None)

    def asks(self) -> list[Ask]:
        """What is asked, in lmms-eval's order."""
        return list(self._asks)

    def score(self, replies: Sequence[Reply], *, folder: str | None = None) -> Scored:
        """Score the replies to `asks()`, given in the same order.

        Args:
            folder: where tasks that write files (submissions) write them; by default they are thrown away.
        """
        if len(replies) != len(self._asks):
            raise ValueError(f"{len(replies)} replies to {len(self._asks)} asks of {self.name}; give one for each")
        grouped: list[list[Reply]] = [[] for _ in self._instances]
        for at, reply in zip(self._order, replies, strict=True):
            grouped[at].append(reply)
        with quiet_libraries():
            return score(
                self.name,
                self._task,
                instances=self._instances,
                replies=grouped,
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
    why = "lmms-eval's own scoring of it fails" if output == "loglikelihood" else "replicas are not asked that way"
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
        raise ShortVError(f"task {name!r} cannot say what it asks: {type(error).__name__}: {error}") from error
    return list(task.instances)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep lmms-eval's progress bar, which cannot be turned off, out of the user's terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
