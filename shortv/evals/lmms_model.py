"""What the models `shortv` and `shortv_serve` of lmms-eval's command share: their settings, and what they return."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from shortv.errors import Refused
from shortv.evals.dispatch import Response
from shortv.spec import Spec, validate

S = TypeVar("S", bound=Spec)
# A shorter part of a digest could fit two plans.
_SHORTEST_DIGEST = 12


class LmmsModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """A model of lmms-eval in its chat form; a subclass responds to instances.

    A request that fails ends the run with an error: no failure becomes an answer. lmms-eval's response cache keys on
    the digest of the plan.
    """

    is_simple = False
    plan_digest: str | None
    """That of the plan that answers; None for the full model."""
    flags: tuple[str, ...] = ()
    """Flags of lmms-eval's command that are settings of this model; model_args win over them."""

    def respond(self, requests: Sequence[Any]) -> list[Response]:
        """Return a response without a failure to each of lmms-eval's instances, in their order."""
        raise NotImplementedError

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str | Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Make the model from lmms-eval's `--model_args` and flags; raises Refused for what cannot be right."""
        own = _parse(arg_string) if isinstance(arg_string, str) else dict(arg_string)
        given = {name: value for name, value in (additional_config or {}).items() if name in cls.flags}
        model = cls(**{**given, **own})
        if model.plan_digest not in (None, own.get("plan_digest")):
            _key_on_digest(arg_string, str(model.plan_digest))
        return model

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Complete each request once; returns texts with their token counts, in the order of the requests."""
        return [
            GenerationResult(one.text, TokenCounts(one.prompt_tokens, one.completion_tokens))
            for response in self.respond(requests)
            for one in response.completions
        ]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Score each request's continuation: sum of log-probabilities in nats, and whether it is the greedy one.

        lmms-eval 0.7.3 turns such pairs into text before it scores them (`unwrap_generation_output`), so its
        `multiple_choice` and `loglikelihood` tasks end with an error there, whatever the model.
        """
        found = (response.likelihood for response in self.respond(requests))
        return [(one.log_probability, one.is_greedy) for one in found if one is not None]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Complete round after round until each task ends its conversation; returns the completions of all rounds."""
        return [list(response.texts) for response in self.respond(requests)]


def read_model_args(spec: type[S], values: Mapping[str, Any]) -> S:
    """Return validated settings, given as texts or with their types; None counts as absent.

    Raises:
        Refused: an unknown setting or a value that it cannot have, or more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Refused("this model runs in one process; start lmms-eval without accelerate or torchrun")
    given = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in values.items()
        if value is not None
    }
    return validate(spec, given, where="model_args: ")


def check_plan_digest(found: str | None, wanted: str | None, *, plan: str) -> None:
    """Refuse a plan whose digest is not the wanted one or does not begin with it."""
    if wanted is not None and (len(wanted) < _SHORTEST_DIGEST or not (found or "").startswith(wanted)):
        raise Refused(
            f"plan {plan!r} has digest {found}, not {wanted}; use the plan that was meant, or give its digest "
            f"(at least the first {_SHORTEST_DIGEST} characters)"
        )


def _parse(text: str) -> dict[str, str]:
    """Split `a=1,b=2`, every value as text: a revision of digits is not a number."""
    found: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or name in found:
            problem = "is named twice" if equals else "has no value"
            raise Refused(
                f"in model_args {part!r:.80} {problem}; write name=value, each name once, with commas between"
            )
        found[name] = value
    return found


def _key_on_digest(model_args: object, digest: str) -> None:
    """Make the response cache that lmms-eval creates for these model_args key on a plan's digest too.

    With `--use_cache` lmms-eval keys responses on the text of `model_args`. There `plan=FILE` names a file, whose
    content may be another plan tomorrow. lmms-eval makes its cache after the model, from a text of its own that a
    model cannot reach, so `ResponseCache.create` is wrapped until its next call: a call for these `model_args` gets
    `plan_digest=...` appended, any other passes unchanged. A wrapper that is never called (no cache was requested)
    can only add a digest later, so keys become more specific and never less.
    """
    from lmms_eval.caching.response_cache import ResponseCache

    own = ResponseCache.__dict__["create"]
    planned_args = model_args

    def create(cls: Any, /, cache_root: str, *, model_args: Any = "", **rest: Any) -> Any:
        ResponseCache.create = own
        keyed = f"{model_args},plan_digest={digest}" if model_args == planned_args else model_args
        return cls.create(cache_root, model_args=keyed, **rest)

    ResponseCache.create = classmethod(create)
