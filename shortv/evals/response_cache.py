"""lmms-eval's response cache must not give one plan's answers to another plan."""

from __future__ import annotations

from typing import Any


def key_on_digest(planned_args: object, digest: str) -> None:
    """Let the response cache that is made for these model_args also key on a plan's digest.

    With `--use_cache` lmms-eval keys answers on the text of `model_args`. There `plan=FILE` names a file, whose
    content may be another plan tomorrow. lmms-eval makes its cache after the model, from a text of its own that a
    model cannot reach, so `ResponseCache.create` is wrapped until it is next called: a call for `planned_args`
    gets `plan_digest=...` appended, any other is passed on as it is. A wrapper that is never called (no cache was
    asked for) can only ever add a digest, so keys become more specific and never less.
    """
    from lmms_eval.caching.response_cache import ResponseCache

    own = ResponseCache.__dict__["create"]

    def create(cls: Any, /, cache_root: str, *, model_args: Any = "", **rest: Any) -> Any:
        ResponseCache.create = own
        keyed = f"{model_args},plan_digest={digest}" if model_args == planned_args else model_args
        return cls.create(cache_root, model_args=keyed, **rest)

    ResponseCache.create = classmethod(create)
