"""The model `shortv` of lmms-eval: a supported model under a plan, in this process and without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib import resources
from typing import Any

import torch
from lmms_eval.utils import Collator
from loguru import logger
from pydantic import Field, field_validator
from rich.console import Console
from rich.progress import Progress

from shortv.errors import SampleError, ShortVError
from shortv.evals.dispatch import Response
from shortv.evals.generation import generate, likelihoods
from shortv.evals.lmms_model import LmmsModel, check_plan_digest, read_model_args
from shortv.evals.requests import Conversation
from shortv.families import load
from shortv.families.downsampling import downsampled
from shortv.families.preprocessing import Prompt, prompt_of
from shortv.learned.apply import apply
from shortv.plan import Plan
from shortv.request import Completion, Likelihood
from shortv.spec import Count, LoadingSpec


class LocalSpec(LoadingSpec):
    """Settings of the model `shortv`: the model, its plan, and how both are loaded."""

    pretrained: str = Field(
        default_factory=lambda: str(resources.files("shortv") / "tiny" / "model"),
        description="Hub id or folder of the model; the bundled model by default.",
    )
    plan: str | None = Field(
        None, description="Plan file, folder with shortv_plan.json, or name of a published plan; None: the full model."
    )
    plan_digest: str | None = Field(None, description="Digest that the plan must have, or its first 12 characters.")
    device: str = Field(
        "auto", validate_default=True, description="auto, auto-map (spread over all GPUs), cpu, cuda or cuda:N."
    )
    batch_size: Count = Field(1, description="Most requests that run together.")

    @field_validator("device")
    @classmethod
    def _resolve(cls, value: str) -> str:
        if value == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if value != "auto-map":
            try:
                torch.device(value)
            except RuntimeError:
                raise ValueError("it is not a device; use auto, auto-map, cpu, cuda or cuda:N") from None
        return value


class ShortV(LmmsModel):
    """Answers lmms-eval's requests with a model under a plan, or with the full model; in lmms-eval's chat form.

    model_args are the fields of `LocalSpec`. Where a request fails `python -m lmms_eval` prints the error, writes no
    results file and still exits with 0 (with 1 under `--verbosity DEBUG`). Raises Refused for settings that cannot be
    right.
    """

    flags = ("batch_size", "device")

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        spec = read_model_args(LocalSpec, settings)
        self.plan = Plan.load(spec.plan) if spec.plan is not None else None
        self.plan_digest = self.plan.digest if self.plan else None
        check_plan_digest(self.plan_digest, spec.plan_digest, plan=spec.plan or "")
        self.batch_size = spec.batch_size
        loading = spec.model_dump(include={*LoadingSpec.model_fields})
        self._loaded = load(spec.pretrained, device=spec.device, **loading)
        with self._under_plan() as warnings:
            for warning in warnings or ():
                logger.warning(warning)

    @property
    def device(self) -> Any:
        """Where inputs go."""
        return self._loaded.device

    def respond(self, requests: Sequence[Any]) -> list[Response]:
        """Respond in batches of equal settings, the longest prompts first, round after round."""
        conversations = [Conversation(request, self.task_dict) for request in requests]
        with self._under_plan(), Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("requests", total=len(conversations))
            while going_on := [conversation for conversation in conversations if not conversation.over]:
                # The longest first, so that what does not fit shows at once and the time left is not underestimated.
                collator = Collator(going_on, lambda one: -one.length, lambda one: one.settings.model_dump(), True)
                for batch in collator.get_batched(n=self.batch_size):
                    for conversation, result in zip(batch, self._run(batch), strict=True):
                        conversation.add(result)
                        progress.advance(bar, conversation.over)
        return [Response.of(conversation) for conversation in conversations]

    def _run(self, batch: Sequence[Conversation]) -> Sequence[Completion | Likelihood]:
        """Run a batch; one that runs out of device memory is halved until it fits."""
        try:
            with _naming(batch):
                return self._run_whole(batch)
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
        return [*self._run(batch[:middle]), *self._run(batch[middle:])]

    def _run_whole(self, batch: Sequence[Conversation]) -> Sequence[Completion | Likelihood]:
        settings = batch[0].settings
        prompts = [self._prompt(conversation) for conversation in batch]
        results: dict[int, Completion | Likelihood] = {}
        # Processors take prompts with images or prompts without at once.
        for images in (True, False):
            members = [at for at, prompt in enumerate(prompts) if bool(prompt.images) is images]
            chosen = [prompts[at] for at in members]
            found: Sequence[Completion | Likelihood] = ()
            if chosen and batch[0].scored:
                found = likelihoods(self._loaded, chosen)
            elif chosen:
                found = generate(self._loaded, chosen, settings.generate_arguments(), settings.stop)
            results.update(zip(members, found, strict=True))
        return [results[at] for at in range(len(prompts))]

    def _prompt(self, conversation: Conversation) -> Prompt:
        with _naming([conversation]):
            prompt = prompt_of(self._loaded, conversation.messages(), continuation=conversation.continuation() or "")
            if self.plan is None or self.plan.downsample is None:
                return prompt
            return downsampled(self._loaded, prompt, self.plan.downsample, self._loaded.architecture)

    def _under_plan(self) -> AbstractContextManager[Sequence[str] | None]:
        # Smaller images are a matter of the prompt.
        return apply(self._loaded.model, replace(self.plan, downsample=None)) if self.plan else nullcontext()


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
