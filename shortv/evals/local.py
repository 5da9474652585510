"""The model `shortv` of lmms-eval: a supported model under a plan, in this process and without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from loguru import logger
from rich.console import Console
from rich.progress import Progress

from shortv.errors import SampleError, ShortVError
from shortv.evals.generation import generate, likelihoods
from shortv.evals.model_args import (
    LocalSpec,
    check_plan_digest,
    key_on_digest,
    parse_model_args,
    read_model_args,
)
from shortv.evals.requests import Conversation, generate_arguments
from shortv.families import load
from shortv.families.preprocessing import Prompt, prompt_of
from shortv.learned.apply import apply
from shortv.plan import Plan
from shortv.request import Completion, Likelihood

T = TypeVar("T")
R = TypeVar("R")


class ShortV(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers lmms-eval's requests with a model under a plan, or with the full model; in lmms-eval's chat form.

    model_args are the fields of `LocalSpec`. A request that fails ends the run with an error: no failure becomes an
    answer. `python -m lmms_eval` then prints it, writes no results file and still exits with 0 (with 1 under
    `--verbosity DEBUG`). Its response cache keys on the plan's digest. Raises Refused for settings that cannot be
    right.
    """

    is_simple = False

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        spec = read_model_args(LocalSpec, settings)
        self.plan = Plan.load(spec.plan) if spec.plan is not None else None
        check_plan_digest(self.plan.digest if self.plan else None, spec.plan_digest, plan=spec.plan or "")
        self._batch_size = spec.batch_size
        self._loaded = load(
            spec.pretrained,
            revision=spec.revision,
            dtype=spec.dtype,
            device=spec.device,
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
        )
        with self._under_plan() as warnings:
            for warning in warnings:
                logger.warning(warning)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str | Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Make the model from lmms-eval's `--model_args` and flags; model_args win over flags."""
        own = parse_model_args(arg_string)
        flags = {name: value for name, value in (additional_config or {}).items() if name in ("batch_size", "device")}
        model = cls(**{**flags, **own})
        if model.plan is not None and "plan_digest" not in own:
            key_on_digest(arg_string, model.plan.digest)
        return model

    @property
    def batch_size(self) -> int:
        """Most requests that run together."""
        return self._batch_size

    @property
    def device(self) -> Any:
        """Where inputs go."""
        return self._loaded.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Complete each request once; returns texts with their token counts, in the order of the requests."""
        found = self._complete([Conversation(request, self.task_dict) for request in requests])
        return [GenerationResult(one.text, TokenCounts(one.prompt_tokens, one.completion_tokens)) for one in found]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Score each request's continuation: sum of log-probabilities in nats, and whether it is the greedy one.

        lmms-eval 0.7.3 turns such pairs into text before it scores them (`unwrap_generation_output`), so its
        `multiple_choice` and `loglikelihood` tasks end with an error there, whatever the model.
        """

        def score(prompts: Sequence[Prompt]) -> list[Likelihood]:
            return likelihoods(self._loaded, prompts)

        conversations = [Conversation(request, self.task_dict) for request in requests]
        return [(one.log_probability, one.is_greedy) for one in self._run(conversations, lambda _: score)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Complete round after round until each task ends its conversation; returns the completions of all rounds."""
        conversations = [Conversation(request, self.task_dict) for request in requests]
        while going_on := [conversation for conversation in conversations if not conversation.over]:
            for conversation, completion in zip(going_on, self._complete(going_on), strict=True):
                conversation.add(completion.text)
        return [conversation.texts for conversation in conversations]

    def _complete(self, conversations: Sequence[Conversation]) -> list[Completion]:
        for conversation in conversations:
            # Settings are checked for all before the first batch runs.
            generate_arguments(conversation.gen_kwargs)

        def run(conversation: Conversation) -> Callable[[Sequence[Prompt]], list[Completion]]:
            arguments, stop = generate_arguments(conversation.gen_kwargs)
            return lambda prompts: generate(self._loaded, prompts, arguments, stop)

        return self._run(conversations, run)

    def _run(
        self,
        conversations: Sequence[Conversation],
        runner: Callable[[Conversation], Callable[[Sequence[Prompt]], list[R]]],
    ) -> list[R]:
        """Run conversations in batches of equal settings, by what `runner` makes for the first of a batch."""
        with self._under_plan(), Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("requests", total=len(conversations))

            def run(batch: Sequence[Conversation]) -> list[R]:
                with _naming(batch):
                    prompts = [self._prompt(conversation) for conversation in batch]
                    found = _with_and_without_images(prompts, runner(batch[0]))
                progress.advance(bar, len(batch))
                return found

            return run_in_batches(
                conversations,
                run,
                group=lambda conversation: dict(conversation.gen_kwargs),
                length=lambda conversation: conversation.length,
                batch_size=self.batch_size,
            )

    def _prompt(self, conversation: Conversation) -> Prompt:
        with _naming([conversation]):
            return prompt_of(self._loaded, conversation.messages(), continuation=conversation.continuation() or "")

    @contextmanager
    def _under_plan(self) -> Iterator[list[str]]:
        if self.plan is None:
            yield []
            return
        with apply(self._loaded.model, self.plan) as warnings:
            yield warnings


class SimpleShortV(ShortV):
    """The same for `--force_simple`, the form in which lmms-eval requests likelihoods (multiple choice)."""

    is_simple = True


@contextmanager
def _naming(batch: Sequence[Conversation]) -> Iterator[None]:
    name = batch[0].name if len(batch) == 1 else f"{batch[0].name} and {len(batch) - 1} more"
    try:
        yield
    except SampleError as error:
        raise ShortVError(f"{name} cannot be encoded ({error.error}): {error}") from error


def _with_and_without_images(prompts: Sequence[Prompt], run: Callable[[Sequence[Prompt]], list[R]]) -> list[R]:
    """Run prompts with images apart from those without: processors take one kind at once."""
    results: dict[int, R] = {}
    for images in (True, False):
        members = [at for at, prompt in enumerate(prompts) if bool(prompt.images) is images]
        if members:
            results.update(zip(members, run([prompts[at] for at in members]), strict=True))
    return [results[at] for at in range(len(prompts))]


def run_in_batches(
    items: Sequence[T],
    run: Callable[[Sequence[T]], list[R]],
    *,
    group: Callable[[T], Mapping[str, Any]],
    length: Callable[[T], int],
    batch_size: int,
) -> list[R]:
    """Run items of one group together, the longest first, and return a result for each in the order given.

    A batch that runs out of device memory is halved until it fits.

    Raises:
        ShortVError: one item alone does not fit.
    """
    # The longest first, so that what does not fit shows at once and the time left is never underestimated.
    collator = Collator(items, lambda item: -length(item), group, grouping=True)
    results = [result for batch in collator.get_batched(n=batch_size) for result in _halving(run, batch)]
    ordered: list[R] = collator.get_original(results)
    return ordered


def _halving(run: Callable[[Sequence[T]], list[R]], batch: Sequence[T]) -> list[R]:
    try:
        return run(batch)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise ShortVError(
                "one request alone does not fit the device's memory; use a device with more, a smaller dtype, "
                "or spread the model with device=auto-map"
            ) from error
    # Outside the handler: its traceback holds the tensors that did not fit.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(batch) // 2
    return [*_halving(run, batch[:middle]), *_halving(run, batch[middle:])]
