"""The model `shortv` of lmms-eval: a supported model under a plan, in this process and without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from rich.console import Console
from rich.progress import Progress

from shortv.errors import Refused
from shortv.evals.batching import run_in_batches
from shortv.evals.generation import Answer, decoding_of, generate
from shortv.evals.likelihood import likelihoods
from shortv.evals.prompts import NamedPrompt, named_prompt
from shortv.evals.requests import Request, conversation, generation, likelihood
from shortv.evals.response_cache import key_on_digest
from shortv.evals.rounds import Dialogue
from shortv.evals.settings import parse_model_args, settings_of
from shortv.families import load
from shortv.plan import Plan
from shortv.request import Likelihood

R = TypeVar("R")


class PlannedModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers lmms-eval's requests with a model under a plan, or with the full model.

    model_args: `pretrained` (hub id or folder; default: the bundled model), `plan` (file, folder with
    shortv_plan.json, or name of a published plan; default: the full model), `plan_digest` (checked against the plan),
    `dtype`, `device` (also `auto`, `auto-map`), `attn_implementation`, `revision`, `trust_remote_code`, `batch_size`.

    A request that fails ends the run with an error: no failure becomes an answer. `python -m lmms_eval` then prints
    it, writes no results file and still exits with 0 (with 1 under `--verbosity DEBUG`). Its response cache keys on
    the plan's digest (see `response_cache`). Raises Refused for settings that cannot be right.
    """

    is_simple = False

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise Refused("the model shortv runs in one process; start lmms-eval without accelerate or torchrun")
        self.settings = settings_of(**settings)
        self._loaded = load(
            self.settings.pretrained,
            revision=self.settings.revision,
            dtype=self.settings.dtype,
            device=self.settings.device,
            attn_implementation=self.settings.attn_implementation,
            trust_remote_code=self.settings.trust_remote_code,
        )
        with self._under_plan() as warnings:
            for warning in warnings:
                logger.warning(warning)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str | Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> PlannedModel:
        """Make the model from lmms-eval's `--model_args` and flags; what stands in both is taken from model_args."""
        own = parse_model_args(arg_string)
        flags = {name: value for name, value in (additional_config or {}).items() if name in ("batch_size", "device")}
        model = cls(**{**flags, **own})
        if model.settings.plan is not None and "plan_digest" not in own:
            key_on_digest(arg_string, model.settings.plan.digest)
        return model

    @property
    def batch_size(self) -> int:
        """Most requests that run together."""
        return self.settings.batch_size

    @property
    def device(self) -> Any:
        """Where inputs go."""
        return self._loaded.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request once; returns texts with their token counts, in the order of the requests."""
        found = self._answers([generation(request, self.task_dict) for request in requests])
        return [
            GenerationResult(answer.text, TokenCounts(answer.input_tokens, answer.output_tokens)) for answer in found
        ]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Score each request's continuation: sum of log-probabilities in nats, and whether it is the greedy one.

        lmms-eval 0.7.3 turns such pairs into text before it scores them (`unwrap_generation_output`), so its
        `multiple_choice` and `loglikelihood` tasks end with an error there, whatever the model.
        """

        def run(batch: Sequence[NamedPrompt]) -> list[Likelihood]:
            return likelihoods(self._loaded, batch)

        found = self._run([likelihood(request, self.task_dict) for request in requests], run)
        return [(score.log_probability, score.is_greedy) for score in found]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer round after round until each task says that it is over; returns every round's answer."""
        dialogues = [Dialogue(conversation(request, self.task_dict)) for request in requests]
        while going_on := [(dialogue, dialogue.asked) for dialogue in dialogues if dialogue.asked is not None]:
            answers = self._answers([asked for _, asked in going_on])
            for (dialogue, _), answer in zip(going_on, answers, strict=True):
                dialogue.take(answer.text)
        return [dialogue.answers for dialogue in dialogues]

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        found: dict[int, Answer] = {}
        # Settings are checked for all before the first batch runs.
        decodings = [decoding_of(request.gen_kwargs) for request in requests]
        keys = [repr(decoding) for decoding in decodings]
        for key in dict.fromkeys(keys):
            members = [at for at, other in enumerate(keys) if other == key]
            decoding = decodings[members[0]]

            def run(batch: Sequence[NamedPrompt], decoding: Any = decoding) -> list[Answer]:
                return generate(self._loaded, batch, decoding)

            found.update(zip(members, self._run([requests[at] for at in members], run), strict=True))
        return [found[at] for at in range(len(requests))]

    def _run(self, requests: Sequence[Request], run: Callable[[Sequence[NamedPrompt]], list[R]]) -> list[R]:
        with self._under_plan(), Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("requests", total=len(requests))

            def batch(members: Sequence[Request]) -> list[R]:
                prompts = [named_prompt(self._loaded, request) for request in members]
                found = _with_and_without_images(prompts, run)
                progress.advance(bar, len(members))
                return found

            return run_in_batches(
                requests,
                batch,
                group=lambda request: None,
                length=lambda request: request.length,
                batch_size=self.batch_size,
            )

    @contextmanager
    def _under_plan(self) -> Iterator[list[str]]:
        if self.settings.plan is None:
            yield []
            return
        with self.apply(self._loaded.model, self.settings.plan) as warnings:
            yield warnings

    @staticmethod
    def apply(model: Any, plan: Plan) -> AbstractContextManager[list[str]]:
        """Put a model under a plan: `shortv.apply`, given by the subclass, for this room does not import that one."""
        raise NotImplementedError


def _with_and_without_images(
    prompts: Sequence[NamedPrompt], run: Callable[[Sequence[NamedPrompt]], list[R]]
) -> list[R]:
    """Processors take prompts with images or prompts without, not both at once."""
    return run_in_batches(
        prompts, run, group=lambda named: bool(named.prompt.images), length=lambda prompt: 0, batch_size=len(prompts)
    )
