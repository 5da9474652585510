"""What `--model_args` says to the `shortv_serve` model of lmms-eval."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shortv.errors import Refused
from shortv.request import FULL_MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSettings:
    """Where replicas are, as which model they are asked, and how many questions at once."""

    url: str | None = None
    app: str | None = None
    model: str | None = None
    """The full model's name, without a plan."""
    plan: str = FULL_MODEL
    plan_digest: str | None = None
    num_concurrent: int = 32
    timeout: float = 600.0
    api_key_file: str | None = None

    @property
    def served_name(self) -> str | None:
        """The name of model and plan on an endpoint."""
        return f"{self.model}@{self.plan}" if self.model and self.plan else self.model

    def api_key(self) -> str | None:
        """The first line of the key file. Raises Refused when it cannot be read or is empty."""
        if self.api_key_file is None:
            return None
        try:
            lines = Path(self.api_key_file).read_text("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"api_key_file={self.api_key_file} cannot be read: {error}; give a text file") from error
        if not lines:
            raise Refused(f"api_key_file={self.api_key_file} is empty; put the key on its first line")
        return lines[0]


KNOWN = frozenset(field.name for field in fields(ServedSettings))


def served_settings_of(**given: Any) -> ServedSettings:
    """Check settings that are texts or already have their types; None counts as absent.

    Raises:
        Refused: an unknown setting, a value it cannot have, or not one of `url` and `app`.
    """
    unknown = sorted(given.keys() - KNOWN)
    if unknown:
        raise Refused(f"the model shortv_serve has no setting {unknown[0]!r}; it knows {', '.join(sorted(KNOWN))}")
    present = {name: value for name, value in given.items() if value is not None}
    if ("url" in present) == ("app" in present):
        raise Refused("the model shortv_serve needs url=http://HOST:PORT/v1 or app=NAME, one of them")
    model, plan = _names(present.get("model"), present.get("plan"))
    return ServedSettings(
        url=_url(str(present["url"])) if "url" in present else None,
        app=str(present["app"]) if "app" in present else None,
        model=model,
        plan=plan,
        plan_digest=str(present["plan_digest"]) if "plan_digest" in present else None,
        num_concurrent=int(_positive("num_concurrent", present.get("num_concurrent", 32), whole=True)),
        timeout=_positive("timeout", present.get("timeout", 600.0)),
        api_key_file=str(present["api_key_file"]) if "api_key_file" in present else None,
    )


def _names(model: object, plan: object) -> tuple[str | None, str]:
    base, _, named = str(model or "").partition("@")
    if plan is not None and named and plan != named:
        raise Refused(f"model={model} names plan {named!r} and plan={plan} another; name one plan")
    return base or None, named or str(plan or FULL_MODEL)


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused(f"url={text} is no address of an endpoint; give one such as http://127.0.0.1:8000/v1")
    if parts.password:
        raise Refused("the url holds a password, which would stand in result files; use api_key_file=FILE")
    return text.rstrip("/")


def _positive(name: str, value: object, *, whole: bool = False) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf") or (whole and number != int(number)):
        raise Refused(f"{name}={value} is no {'whole ' if whole else ''}number above 0; give one")
    return number
