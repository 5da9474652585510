"""The model `shortv_serve` of lmms-eval: sends the same requests to replicas."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from rich.console import Console
from rich.progress import Progress

from shortv.errors import Refused, ShortVError
from shortv.evals.asking import Reply, replies_to
from shortv.evals.asks import Ask, ask_of
from shortv.evals.remote import Connection, connect_url
from shortv.evals.response_cache import key_on_digest
from shortv.evals.served_settings import ServedSettings, served_settings_of
from shortv.evals.settings import parse_model_args

# That of lmms-eval for torch; sampled answers are repeatable with it.
_SEED = 1234
# A shorter piece of a digest could fit two plans.
_SHORTEST_DIGEST = 12


class ServedModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers lmms-eval's requests by asking replicas, many at once.

    model_args: `url` (http://127.0.0.1:8000/v1) or `app` (a running Serve application), `model` (name or name@plan),
    `plan` (name), `plan_digest` (checked against the plan), `num_concurrent`, `timeout` (seconds per request),
    `api_key_file`.

    A request that fails ends the run with an error that names its document: no failure becomes an answer. So does a
    plan that changes while the run goes on. lmms-eval's response cache keys on the plan's digest. Raises Refused for
    settings that cannot be right.
    """

    is_simple = False

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise Refused("the model shortv_serve runs in one process; start lmms-eval without accelerate or torchrun")
        self.settings = served_settings_of(**settings)
        self.plan_digest = asyncio.run(self._look())

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str | Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> ServedModel:
        """Make the model from lmms-eval's `--model_args`; batch size and device are the replicas' affair."""
        own = parse_model_args(arg_string)
        model = cls(**own)
        if model.plan_digest is not None and own.get("plan_digest") != model.plan_digest:
            key_on_digest(arg_string, model.plan_digest)
        return model

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request once; returns texts with their token counts, in the order of the requests."""
        return [
            GenerationResult(answer.text, TokenCounts(answer.prompt_tokens, answer.completion_tokens))
            for reply in self._replies(requests)
            for answer in reply.answers
        ]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Score each request's continuation, as the model shortv does. Raises Refused where replicas are a URL."""
        found = [reply.likelihood for reply in self._replies(requests)]
        return [(score.log_probability, score.is_greedy) for score in found if score is not None]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer round after round until each task says that it is over; returns every round's answer."""
        return [list(reply.texts) for reply in self._replies(requests)]

    async def connect(self, settings: ServedSettings) -> Connection:
        """Reach the replicas; a subclass that knows Serve overrides this for `app`."""
        if settings.url is None:
            raise Refused(f"app={settings.app} cannot be asked from here; give url=http://HOST:PORT/v1")
        return await connect_url(settings)

    async def _look(self) -> str | None:
        """The digest of the plan, as the replicas have it."""
        connection = await self.connect(self.settings)
        await connection.client.aclose()
        found, wanted = connection.plan_digest, self.settings.plan_digest
        if wanted is not None and (len(wanted) < _SHORTEST_DIGEST or not (found or "").startswith(wanted)):
            raise Refused(
                f"the replicas' plan {connection.plan!r} has digest {found}, not {wanted}; serve the plan that was "
                f"meant, or give its digest (at least the first {_SHORTEST_DIGEST} characters)"
            )
        return found

    def _replies(self, requests: Sequence[Any]) -> list[Reply]:
        # lmms-eval repeats a request by giving it several times.
        seen: dict[int, int] = {}
        asks = []
        for request in requests:
            repeat = seen[id(request)] = seen.get(id(request), -1) + 1
            asks.append(ask_of(request, self.task_dict, seed=_SEED, repeat=repeat))
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("requests", total=len(asks))

            def told(ask: Ask, reply: Reply) -> None:
                self._check(ask, reply)
                progress.advance(bar)

            return asyncio.run(self._ask(asks, told))

    async def _ask(self, asks: Sequence[Ask], told: Any) -> list[Reply]:
        connection = await self.connect(self.settings)
        try:
            return await replies_to(
                connection.client,
                asks,
                plan=connection.plan,
                concurrency=self.settings.num_concurrent,
                seconds=self.settings.timeout,
                told=told,
            )
        finally:
            await connection.client.aclose()

    def _check(self, ask: Ask, reply: Reply) -> None:
        if reply.failure is not None:
            message = reply.failure.message
            # Failures of the task's own code say already which document it was.
            own = message.startswith(ask.name)
            raise ShortVError(message if own else f"{ask.name} has no answer ({reply.failure.reason}): {message}")
        for answer in reply.answers:
            if answer.plan_digest != self.plan_digest:
                raise ShortVError(
                    f"{ask.name} was answered under plan digest {answer.plan_digest}, and the run began under "
                    f"{self.plan_digest}; the replicas' plans changed in between: run it again"
                )
