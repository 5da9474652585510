"""The model `shortv_serve` of lmms-eval: sends the same requests to replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Self

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from rich.console import Console
from rich.progress import Progress

from shortv.errors import Refused, ShortVError
from shortv.evals.dispatch import Response, send_all
from shortv.evals.model_args import ServedSpec, check_plan_digest, key_on_digest, parse_model_args, read_model_args
from shortv.evals.remote import Connection, connect_url
from shortv.evals.requests import Conversation

# That of lmms-eval for torch; sampled completions are repeatable with it.
_SEED = 1234


class ServedModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers lmms-eval's requests by sending them to replicas, many at once.

    model_args are the fields of `ServedSpec`. A request that fails ends the run with an error that names its document:
    no failure becomes an answer. So does a plan that changes during the run. lmms-eval's response cache keys on the
    plan's digest. Raises Refused for settings that cannot be right.
    """

    is_simple = False

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.spec = read_model_args(ServedSpec, settings)
        self.plan_digest = asyncio.run(self._look())

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str | Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Make the model from lmms-eval's `--model_args`; the replicas decide batch size and device."""
        own = parse_model_args(arg_string)
        model = cls(**own)
        if model.plan_digest is not None and own.get("plan_digest") != model.plan_digest:
            key_on_digest(arg_string, model.plan_digest)
        return model

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Complete each request once; returns texts with their token counts, in the order of the requests."""
        return [
            GenerationResult(one.text, TokenCounts(one.prompt_tokens, one.completion_tokens))
            for response in self._responses(requests)
            for one in response.completions
        ]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Score each request's continuation, as the model shortv does. Raises Refused where replicas are a URL."""
        scores = [response.likelihood for response in self._responses(requests)]
        return [(score.log_probability, score.is_greedy) for score in scores if score is not None]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Complete round after round until each task ends its conversation; returns the completions of all rounds."""
        return [list(response.texts) for response in self._responses(requests)]

    async def connect(self, spec: ServedSpec) -> Connection:
        """Connect to the replicas; a subclass that knows Serve overrides this for `app`."""
        if spec.url is None:
            raise Refused(f"app={spec.app} cannot be reached from here; give url=http://HOST:PORT/v1")
        return await connect_url(spec)

    async def _look(self) -> str | None:
        """Return the digest of the plan on the replicas."""
        connection = await self.connect(self.spec)
        await connection.client.aclose()
        check_plan_digest(connection.plan_digest, self.spec.plan_digest, plan=connection.plan)
        return connection.plan_digest

    def _responses(self, requests: Sequence[Any]) -> list[Response]:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("requests", total=len(requests))

            def check(conversation: Conversation, response: Response) -> None:
                self._check(conversation.name, response)
                progress.advance(bar)

            return asyncio.run(self._send(requests, check))

    async def _send(self, requests: Sequence[Any], check: Any) -> list[Response]:
        connection = await self.connect(self.spec)
        try:
            return await send_all(
                connection.client,
                requests,
                self.task_dict,
                plan=connection.plan,
                seed=_SEED,
                concurrency=self.spec.num_concurrent,
                timeout_s=self.spec.timeout,
                on_response=check,
            )
        finally:
            await connection.client.aclose()

    def _check(self, name: str, response: Response) -> None:
        if response.failure is not None:
            message = response.failure.message
            # Failures of the task's own code name the document already.
            named = message if name in message else f"{name} has no answer ({response.failure.reason}): {message}"
            raise ShortVError(named)
        for completion in response.completions:
            if completion.plan_digest != self.plan_digest:
                raise ShortVError(
                    f"{name} was answered under plan digest {completion.plan_digest}, and the run began under "
                    f"{self.plan_digest}; the replicas' plans changed in between: run it again"
                )
